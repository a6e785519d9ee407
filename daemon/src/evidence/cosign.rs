//! cosign image signatures under the tag `sha256-<hex>.sig` (cosign's SIGNATURE_SPEC).

use std::collections::BTreeMap;

use bytes::Bytes;
use futures_util::stream::{self, Stream, StreamExt};
use oci_spec::image::ImageManifest;

use super::registry::{Access, FetchError, Registry};
use crate::config::Limits;
use crate::digest::Digest;
use crate::reference::{Pointer, Repository};
use crate::verdict::{Denial, DenyReason, Stop};
use crate::verify::signature::Candidate;

const LAYER_TYPE: &str = "application/vnd.dev.cosign.simplesigning.v1+json";
const SIGNATURE_ANNOTATION: &str = "dev.cosignproject.cosign/signature";
/// Payloads that are fetched ahead of their verification.
const AHEAD: usize = 8;

/// The signatures that the `.sig` manifest lists; the payloads are fetched as they are needed.
#[derive(Debug)]
pub struct Signatures {
    /// Signatures by the payload that they are over: many signatures often share one.
    by_payload: BTreeMap<Digest, Signed>,
}

#[derive(Debug)]
struct Signed {
    size: u64,
    signatures: Vec<String>,
}

/// The tag under which the signatures of `digest` are.
pub fn tag(digest: &Digest) -> String {
    format!("{}-{}.sig", digest.algorithm(), digest.hex())
}

impl Signatures {
    /// Lists the signatures of `digest`.
    ///
    /// # Errors
    /// `unsigned` when there is no such tag or it lists nothing; `malformed-evidence` and
    /// `evidence-too-large` by what the registry serves; a failure when it can't be asked.
    pub async fn list(
        registry: &Registry,
        repository: &Repository,
        digest: &Digest,
        limits: &Limits,
        access: &Access,
    ) -> Result<Self, Stop> {
        let tag = tag(digest);
        let fetched =
            registry.manifest(repository, &Pointer::Tag(tag.clone()), limits.manifest_size, access).await;
        let manifest = match fetched {
            Ok(manifest) => manifest,
            Err(FetchError::NotFound(_)) => return Err(unsigned(&tag, "there is no tag").into()),
            Err(FetchError::Denied(denial)) => return Err(denial.into()),
            Err(FetchError::Failed(failure)) => return Err(failure.into()),
        };
        Ok(Self::parse(&tag, &manifest.bytes, limits)?)
    }

    fn parse(tag: &str, manifest: &[u8], limits: &Limits) -> Result<Self, Denial> {
        let malformed =
            |why: &str| DenyReason::MalformedEvidence.because(format!("the manifest at tag {tag} {why}"));
        let manifest: ImageManifest =
            serde_json::from_slice(manifest).map_err(|_| malformed("is not an OCI image manifest"))?;
        let layers: Vec<_> =
            manifest.layers().iter().filter(|layer| layer.media_type().to_string() == LAYER_TYPE).collect();
        if layers.is_empty() {
            return Err(unsigned(tag, "no signature is listed at tag"));
        }
        if layers.len() > limits.signatures {
            return Err(DenyReason::EvidenceTooLarge
                .because(format!("tag {tag} lists more than {} signatures", limits.signatures)));
        }
        let mut by_payload = BTreeMap::<Digest, Signed>::new();
        for layer in layers {
            let digest: Digest = layer
                .digest()
                .to_string()
                .parse()
                .map_err(|_| malformed("has a layer without a valid digest"))?;
            let signature = layer.annotations().as_ref().and_then(|all| all.get(SIGNATURE_ANNOTATION));
            let signature = signature.ok_or_else(|| malformed("has a layer without a signature"))?;
            let signed =
                by_payload.entry(digest).or_insert(Signed { size: layer.size(), signatures: Vec::new() });
            signed.signatures.push(signature.clone());
        }
        Ok(Self { by_payload })
    }

    /// Fetches the payloads, a few ahead, each with the signatures over it.
    pub fn payloads<'a>(
        &'a self,
        registry: &'a Registry,
        repository: &'a Repository,
        limits: &'a Limits,
        access: &'a Access,
    ) -> impl Stream<Item = Result<Vec<Candidate>, Stop>> + 'a {
        stream::iter(&self.by_payload)
            .map(move |(digest, signed)| async move {
                let fetched =
                    registry.blob(repository, digest, signed.size, limits.payload_size, access).await;
                match fetched {
                    Ok(payload) => Ok(signed.over(&payload)),
                    Err(FetchError::NotFound(_)) => Err(DenyReason::MalformedEvidence
                        .because("a signature's payload is not in the registry")
                        .into()),
                    Err(FetchError::Denied(denial)) => Err(denial.into()),
                    Err(FetchError::Failed(failure)) => Err(failure.into()),
                }
            })
            .buffered(AHEAD)
    }
}

impl Signed {
    fn over(&self, payload: &Bytes) -> Vec<Candidate> {
        let candidate =
            |signature: &String| Candidate { payload: payload.clone(), signature: signature.clone() };
        self.signatures.iter().map(candidate).collect()
    }
}

fn unsigned(tag: &str, what: &str) -> Denial {
    DenyReason::Unsigned.because(format!("{what} {tag}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> Limits {
        let text = "verificationRules: [{imageGlob: '**', strategy: allow}]\nlimits: {signatures: 3}";
        crate::config::Config::parse(std::path::Path::new("test.yaml"), text).unwrap().config.limits
    }

    fn manifest(layers: &[&str]) -> Vec<u8> {
        let config = layer("application/vnd.oci.image.config.v1+json", "");
        format!(r#"{{"schemaVersion":2,"config":{config},"layers":[{}]}}"#, layers.join(",")).into_bytes()
    }

    fn layer(kind: &str, annotations: &str) -> String {
        let digest = Digest::sha256(b"payload");
        format!(r#"{{"mediaType":"{kind}","digest":"{digest}","size":7{annotations}}}"#)
    }

    fn signed(signature: &str) -> String {
        layer(LAYER_TYPE, &format!(r#","annotations":{{"{SIGNATURE_ANNOTATION}":"{signature}"}}"#))
    }

    fn reason(manifest: &[u8]) -> DenyReason {
        Signatures::parse("t.sig", manifest, &limits()).unwrap_err().reason
    }

    #[test]
    fn signatures_over_one_payload_share_it() {
        let found = Signatures::parse("t.sig", &manifest(&[&signed("a"), &signed("b")]), &limits()).unwrap();
        assert_eq!(found.by_payload.len(), 1);
        assert_eq!(found.by_payload.values().next().unwrap().signatures, ["a", "b"]);
    }

    #[test]
    fn nothing_listed_is_unsigned_and_nonsense_is_malformed() {
        assert_eq!(reason(&manifest(&[])), DenyReason::Unsigned);
        assert_eq!(reason(&manifest(&[&layer("text/plain", "")])), DenyReason::Unsigned);
        assert_eq!(reason(&manifest(&[&layer(LAYER_TYPE, "")])), DenyReason::MalformedEvidence);
        assert_eq!(reason(b"{}"), DenyReason::MalformedEvidence);
        assert_eq!(reason(b""), DenyReason::MalformedEvidence);
    }

    /// cosign CVE-2023-46737, CVE-2024-29902: more signatures than anybody can want.
    #[test]
    fn too_many_signatures_are_denied_before_any_is_fetched() {
        let one = signed("a");
        assert_eq!(reason(&manifest(&[&one, &one, &one, &one])), DenyReason::EvidenceTooLarge);
    }
}
