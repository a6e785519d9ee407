//! The simple-signing payload that cosign signs (containers/image, containers-signature(5)).

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::digest::Digest;
use crate::verdict::{Denial, DenyReason};

/// `critical.type` of a cosign image signature; an attestation has another one.
const TYPE: &str = "cosign container image signature";
/// What is kept of a payload with a verdict, bytes in all.
const MAX_KEPT: usize = 16 << 10;

/// A payload whose signature was verified. Only [`super::signature`] makes one.
#[derive(Debug)]
pub struct Payload {
    /// The image that the signature is about.
    pub digest: Digest,
    /// What the signer called it.
    pub docker_reference: String,
    /// The signed annotations, as text.
    pub annotations: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct Document {
    critical: Critical,
    optional: Option<BTreeMap<String, serde_json::Value>>,
}

#[derive(Deserialize)]
struct Critical {
    #[serde(rename = "type")]
    kind: String,
    image: Image,
    identity: Identity,
}

#[derive(Deserialize)]
struct Image {
    #[serde(rename = "docker-manifest-digest")]
    digest: String,
}

#[derive(Deserialize)]
struct Identity {
    #[serde(rename = "docker-reference")]
    docker_reference: String,
}

impl Payload {
    /// Reads the payload strictly.
    ///
    /// # Errors
    /// `malformed-evidence` when it is not a cosign image signature's payload.
    pub fn parse(bytes: &[u8]) -> Result<Self, Denial> {
        let malformed =
            |what: &str| DenyReason::MalformedEvidence.because(format!("a signed payload {what}"));
        let document: Document =
            serde_json::from_slice(bytes).map_err(|_| malformed("is not a simple-signing document"))?;
        if document.critical.kind != TYPE {
            return Err(malformed("is of another type than an image signature"));
        }
        let digest =
            document.critical.image.digest.parse().map_err(|_| malformed("names no valid digest"))?;
        let annotations: BTreeMap<String, String> = document
            .optional
            .unwrap_or_default()
            .into_iter()
            .map(|(name, value)| (name, text(value)))
            .collect();
        let size: usize = annotations.iter().map(|(name, value)| name.len() + value.len()).sum();
        if size + document.critical.identity.docker_reference.len() > MAX_KEPT {
            return Err(DenyReason::EvidenceTooLarge
                .because(format!("the signed annotations and name are larger than {MAX_KEPT} bytes")));
        }
        Ok(Self { digest, docker_reference: document.critical.identity.docker_reference, annotations })
    }
}

/// cosign signs annotations as strings; whatever else a signer put there is shown as its JSON.
fn text(value: serde_json::Value) -> String {
    match value {
        serde_json::Value::String(text) => text,
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn payload(kind: &str, digest: &str, optional: &str) -> Vec<u8> {
        format!(
            r#"{{"critical":{{"identity":{{"docker-reference":"host/a"}},"image":{{"docker-manifest-digest":"{digest}"}},"type":"{kind}"}},"optional":{optional}}}"#
        )
        .into_bytes()
    }

    #[test]
    fn annotations_are_read_as_text() {
        let digest = Digest::sha256(b"x");
        let read =
            Payload::parse(&payload(TYPE, digest.as_str(), r#"{"a":"b","n":1,"timestamp":"t"}"#)).unwrap();
        assert_eq!(read.digest, digest);
        assert_eq!(read.annotations["a"], "b");
        assert_eq!(read.annotations["n"], "1");
        assert!(Payload::parse(&payload(TYPE, digest.as_str(), "null")).unwrap().annotations.is_empty());
    }

    /// cosign CVE-2026-39395: a malformed payload under a good signature.
    #[test]
    fn malformed_payloads_are_denied() {
        let digest = Digest::sha256(b"x").to_string();
        for bytes in [
            b"{}".to_vec(),
            b"not json".to_vec(),
            payload("cosign attestation", &digest, "null"),
            payload(TYPE, "sha256:short", "null"),
            payload(TYPE, "", "null"),
            payload(TYPE, &digest, "[]"),
            [payload(TYPE, &digest, "null"), b"{}".to_vec()].concat(),
        ] {
            let denial = Payload::parse(&bytes).unwrap_err();
            assert_eq!(denial.reason, DenyReason::MalformedEvidence, "{}", String::from_utf8_lossy(&bytes));
        }
    }

    #[test]
    fn a_payload_with_two_digests_is_malformed() {
        let digest = Digest::sha256(b"x");
        let text = format!(
            r#"{{"critical":{{"identity":{{"docker-reference":""}},"image":{{"docker-manifest-digest":"{digest}","docker-manifest-digest":"{digest}"}},"type":"{TYPE}"}},"optional":null}}"#
        );
        assert!(Payload::parse(text.as_bytes()).is_err());
    }

    #[test]
    fn oversized_annotations_are_denied() {
        let digest = Digest::sha256(b"x");
        let optional = format!(r#"{{"a":"{}"}}"#, "x".repeat(MAX_KEPT));
        let denial = Payload::parse(&payload(TYPE, digest.as_str(), &optional)).unwrap_err();
        assert_eq!(denial.reason, DenyReason::EvidenceTooLarge);
    }
}
