//! One verification: evidence is fetched, and verified in the order of the checks.

use std::pin::pin;
use std::sync::Arc;

use futures_util::stream::StreamExt;

use super::Active;
use crate::config::{Limits, SignedBy};
use crate::digest::Digest;
use crate::evidence::cosign::Signatures;
use crate::evidence::registry::{Access, FetchError, Registry};
use crate::reference::{Pointer, Reference, Repository};
use crate::store::{Stored, Verdict};
use crate::verdict::{DenyReason, Failure, FailureReason, Stop};
use crate::verify::Proof;
use crate::verify::key::TrustedKey;
use crate::verify::signature::{self, Candidate, Passed, Rejection};

/// All that a verification needs, owned: it may outlive its caller and the policy that began it.
pub struct Verification {
    registry: Arc<Registry>,
    repository: Repository,
    digest: Digest,
    required: SignedBy,
    key: Arc<TrustedKey>,
    limits: Limits,
    access: Access,
    /// Whether the image itself must be seen at the registry; not for one that containerd has.
    look_at_image: bool,
}

impl Verification {
    pub(super) fn new(
        active: &Active,
        reference: &Reference,
        digest: &Digest,
        required: &SignedBy,
        key: Arc<TrustedKey>,
        access: Access,
        look_at_image: bool,
    ) -> Self {
        Self {
            registry: Arc::clone(&active.registry),
            repository: reference.repository.clone(),
            digest: digest.clone(),
            required: required.clone(),
            key,
            limits: active.config.limits.clone(),
            access,
            look_at_image,
        }
    }

    /// The registry that it asks.
    pub(super) fn registry(&self) -> &str {
        self.repository.registry()
    }

    pub(super) fn access(&self) -> &Access {
        &self.access
    }

    /// Reaches a verdict, or fails.
    pub(super) async fn run(self) -> Result<Stored, Failure> {
        let verdict = match self.prove().await {
            Ok(proof) => Verdict::Allow(proof),
            Err(Stop::Denied(denial)) => Verdict::Deny(denial),
            Err(Stop::Failed(failure)) => return Err(failure),
        };
        Ok(Stored::now(&self.repository, &self.digest, verdict))
    }

    async fn prove(&self) -> Result<Proof, Stop> {
        let signatures =
            Signatures::list(&self.registry, &self.repository, &self.digest, &self.limits, &self.access);
        // Both at once: the second does not depend on the first, and a round trip is saved. Only
        // what is wrong with the image ends both.
        let ((), signatures) = tokio::try_join!(
            async { if self.look_at_image { self.see_image().await } else { Ok(()) } },
            async { Ok::<_, Stop>(signatures.await) },
        )?;
        match signatures {
            Ok(signatures) => self.any_good(&signatures).await,
            Err(Stop::Denied(denial)) if denial.reason == DenyReason::Unsigned && !self.look_at_image => {
                // Some registries say "not found" to whoever may not read: only who sees the
                // image knows that it has no signature.
                self.see_image().await?;
                Err(denial.into())
            }
            Err(stop) => Err(stop),
        }
    }

    /// The image's manifest must be there, and its bytes must hash to its digest.
    async fn see_image(&self) -> Result<(), Stop> {
        let at = Pointer::Digest(self.digest.clone());
        match self.registry.manifest(&self.repository, &at, self.limits.manifest_size, &self.access).await {
            Ok(_) => Ok(()),
            Err(FetchError::NotFound(what)) => Err(FailureReason::ImageNotFound.because(what).into()),
            Err(FetchError::Denied(denial)) => Err(denial.into()),
            Err(FetchError::Failed(failure)) => Err(failure.into()),
        }
    }

    /// Any one good signature is enough. Where none is, a failure outweighs the denials: what
    /// could not be read may have been the good one.
    async fn any_good(&self, signatures: &Signatures) -> Result<Proof, Stop> {
        let mut payloads =
            pin!(signatures.payloads(&self.registry, &self.repository, &self.limits, &self.access));
        let mut rejected: Option<Rejection> = None;
        while let Some(candidates) = payloads.next().await {
            match self.first_good(candidates).await {
                Ok(proof) => return Ok(proof),
                Err(rejection) => rejected = Some(more_telling(rejected, rejection)),
            }
        }
        // `Signatures` is never empty; without one there is nothing good.
        Err(rejected
            .map_or_else(|| DenyReason::Unsigned.because("no signature was found").into(), |r| r.stop))
    }

    async fn first_good(&self, candidates: Result<Vec<Candidate>, Stop>) -> Result<Proof, Rejection> {
        let candidates = candidates.map_err(|stop| Passed::Nothing.then(stop))?;
        let mut rejected: Option<Rejection> = None;
        for candidate in candidates {
            match signature::verify(&candidate, &self.key, &self.digest, &self.required.annotations).await {
                Ok(proof) => return Ok(proof),
                Err(rejection) => rejected = Some(more_telling(rejected, rejection)),
            }
        }
        Err(rejected
            .unwrap_or_else(|| Passed::Nothing.then(DenyReason::Unsigned.because("no signature was found"))))
    }
}

fn more_telling(so_far: Option<Rejection>, next: Rejection) -> Rejection {
    let weight = |r: &Rejection| (matches!(r.stop, Stop::Failed(_)), r.passed);
    match so_far {
        Some(rejection) if weight(&rejection) >= weight(&next) => rejection,
        _ => next,
    }
}
