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

/// Bytes of evidence that are kept with a verdict: some dozen signatures over usual payloads.
const MOST_EVIDENCE: usize = 16 << 10;

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

    /// Works an allow verdict out from what was fetched for earlier ones about the same image,
    /// without the network: not for a key that KMS verifies with. It is as old as its evidence. A
    /// denial is left to [`Self::run`]: somebody may have signed the image since.
    pub(super) async fn rework(&self, kin: &[Stored]) -> Option<Stored> {
        if self.key.remote().is_some() {
            return None;
        }
        let about = |old: &&Stored| {
            old.repository == self.repository.to_string() && old.digest == self.digest.as_str()
        };
        for old in kin.iter().filter(about) {
            if let Ok((proof, _)) = self.first_good(&old.evidence).await {
                return Some(Stored { verdict: Verdict::Allow(proof), ..old.clone() });
            }
        }
        None
    }

    /// Reaches a verdict, or fails.
    pub(super) async fn run(&self) -> Result<Stored, Failure> {
        let (verdict, evidence) = match self.prove().await {
            Ok((proof, evidence)) => (Verdict::Allow(proof), evidence),
            Err(Stop::Denied(denial)) => (Verdict::Deny(denial), Vec::new()),
            Err(Stop::Failed(failure)) => return Err(failure),
        };
        Ok(Stored::now(&self.repository, &self.digest, verdict, evidence))
    }

    async fn prove(&self) -> Result<(Proof, Vec<Candidate>), Stop> {
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
    async fn any_good(&self, signatures: &Signatures) -> Result<(Proof, Vec<Candidate>), Stop> {
        let mut payloads =
            pin!(signatures.payloads(&self.registry, &self.repository, &self.limits, &self.access));
        let mut rejected: Option<Rejection> = None;
        let mut seen = Vec::new();
        while let Some(candidates) = payloads.next().await {
            let candidates = match candidates {
                Ok(candidates) => candidates,
                Err(stop) => {
                    rejected = Some(more_telling(rejected, Passed::Nothing.then(stop)));
                    continue;
                }
            };
            match self.first_good(&candidates).await {
                Ok((proof, good)) => {
                    let others = candidates.iter().chain(&seen).filter(|other| *other != good);
                    return Ok((proof, kept(std::iter::once(good).chain(others))));
                }
                Err(rejection) => rejected = Some(more_telling(rejected, rejection)),
            }
            seen.extend(candidates);
        }
        // `Signatures` is never empty; without one there is nothing good.
        Err(rejected
            .map_or_else(|| DenyReason::Unsigned.because("no signature was found").into(), |r| r.stop))
    }

    async fn first_good<'a>(&self, candidates: &'a [Candidate]) -> Result<(Proof, &'a Candidate), Rejection> {
        let mut rejected: Option<Rejection> = None;
        for candidate in candidates {
            match signature::verify(candidate, &self.key, &self.digest, &self.required.annotations).await {
                Ok(proof) => return Ok((proof, candidate)),
                Err(rejection) => rejected = Some(more_telling(rejected, rejection)),
            }
        }
        Err(rejected
            .unwrap_or_else(|| Passed::Nothing.then(DenyReason::Unsigned.because("no signature was found"))))
    }
}

/// What is kept of the evidence, as far as there is room.
fn kept<'a>(candidates: impl Iterator<Item = &'a Candidate>) -> Vec<Candidate> {
    let mut room = MOST_EVIDENCE;
    let fits = |candidate: &&Candidate| {
        let left = room.checked_sub(candidate.payload.len() + candidate.signature.len());
        room = left.unwrap_or(0);
        left.is_some()
    };
    candidates.take_while(fits).cloned().collect()
}

fn more_telling(so_far: Option<Rejection>, next: Rejection) -> Rejection {
    let weight = |r: &Rejection| (matches!(r.stop, Stop::Failed(_)), r.passed);
    match so_far {
        Some(rejection) if weight(&rejection) >= weight(&next) => rejection,
        _ => next,
    }
}
