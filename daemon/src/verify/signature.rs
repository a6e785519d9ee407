//! One cosign signature: bytes that were fetched and hashed, in; a verified payload, out.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use sigstore::cosign::payload::SimpleSigning;
use sigstore::cosign::verification_constraint::{PublicKeyVerifier, VerificationConstraintVec};
use sigstore::cosign::{SignatureLayer, verify_constraints};
use sigstore::registry::OciReference;

use super::key::{Scheme, TrustedKey};
use super::payload::Payload;
use super::{Proof, annotations};
use crate::config::AnnotationRequirement;
use crate::digest::Digest;
use crate::verdict::{Denial, DenyReason, Stop};

/// A signature as it lies beside an image: the signed bytes and the signature over them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Candidate {
    /// The payload blob, whose hash was compared with its descriptor.
    #[serde(with = "as_base64")]
    pub payload: Bytes,
    /// The value of the layer's annotation `dev.cosignproject.cosign/signature`.
    pub signature: String,
}

mod as_base64 {
    use super::{BASE64, Bytes};
    use base64::Engine as _;
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    pub fn serialize<S: Serializer>(bytes: &Bytes, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&BASE64.encode(bytes))
    }

    pub fn deserialize<'a, D: Deserializer<'a>>(deserializer: D) -> Result<Bytes, D::Error> {
        let text = String::deserialize(deserializer)?;
        BASE64.decode(text).map(Bytes::from).map_err(D::Error::custom)
    }
}

/// A signature that does not prove what is required.
#[derive(Debug)]
pub struct Rejection {
    /// How far it came: of several rejections, the one that came furthest tells people most.
    pub passed: Passed,
    /// What stopped it: a failure only from a key that is verified remotely.
    pub stop: Stop,
}

/// The checks that a signature passes, in their order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Passed {
    /// It could not even be fetched and hashed.
    Nothing,
    /// The payload's hash is right.
    Hash,
    /// The key signed the payload.
    Signature,
    /// The payload is about the digest.
    Subject,
}

impl Passed {
    /// A rejection after this check.
    pub fn then(self, stop: impl Into<Stop>) -> Rejection {
        Rejection { passed: self, stop: stop.into() }
    }
}

/// Verifies `candidate` in the order of the checks: signature, payload, subject, annotations.
///
/// # Errors
/// A rejection that says which check failed.
pub async fn verify(
    candidate: &Candidate,
    key: &TrustedKey,
    digest: &Digest,
    required: &BTreeMap<String, AnnotationRequirement>,
) -> Result<Proof, Rejection> {
    let scheme = signed_by(candidate, key).await.map_err(|stop| Passed::Hash.then(stop))?;
    let payload = Payload::parse(&candidate.payload).map_err(|denial| Passed::Signature.then(denial))?;
    if payload.digest != *digest {
        let found = format!("the signature is good, but for another image ({})", payload.digest);
        return Err(Passed::Signature.then(DenyReason::InvalidSignature.because(found)));
    }
    annotations::check(required, &payload.annotations).map_err(|denial| Passed::Subject.then(denial))?;
    Ok(Proof {
        key: key.label().to_owned(),
        key_sha256: key.sha256().to_owned(),
        scheme: scheme.to_string(),
        docker_reference: payload.docker_reference,
        annotations: payload.annotations,
    })
}

/// The scheme by which the key's owner signed the payload.
async fn signed_by(candidate: &Candidate, key: &TrustedKey) -> Result<Scheme, Stop> {
    if BASE64.decode(&candidate.signature).map_or(true, |bytes| bytes.is_empty()) {
        return Err(DenyReason::MalformedEvidence.because("a signature is empty or not base64").into());
    }
    let no_match = || -> Denial {
        DenyReason::InvalidSignature.because("there are signatures, but none verifies with this key")
    };
    for scheme in key.schemes() {
        if verifies(candidate, key, *scheme)? {
            // KMS is only asked about what the pinned key verifies: junk costs no request, and
            // KMS can forbid what the pin allows, never the other way round.
            return match key.remote() {
                Some(remote) if !remote.verify(*scheme, &candidate.payload, &candidate.signature).await? => {
                    Err(no_match().into())
                }
                _ => Ok(*scheme),
            };
        }
    }
    Err(no_match().into())
}

fn verifies(candidate: &Candidate, key: &TrustedKey, scheme: Scheme) -> Result<bool, Stop> {
    let verifier = PublicKeyVerifier::new(key.pem().as_bytes(), &scheme.sigstore()).map_err(|_| {
        DenyReason::UntrustedIdentity.because("the rule's key can't be used for verification")
    })?;
    let constraints: VerificationConstraintVec = vec![Box::new(verifier)];
    Ok(verify_constraints(&[layer(candidate)], constraints.iter()).is_ok())
}

/// sigstore's view of the candidate. It verifies `signature` over `raw_data`; the payload is
/// read by [`Payload`], which is stricter, so the parsed part here is only a placeholder.
fn layer(candidate: &Candidate) -> SignatureLayer {
    SignatureLayer {
        simple_signing: SimpleSigning::new(&placeholder(), ""),
        oci_digest: String::new(),
        certificate_signature: None,
        bundle: None,
        signature: Some(candidate.signature.clone()),
        raw_data: candidate.payload.to_vec(),
    }
}

fn placeholder() -> OciReference {
    OciReference::with_tag(String::new(), String::new(), String::new())
}
