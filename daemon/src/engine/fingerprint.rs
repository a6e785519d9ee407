//! The fingerprint of everything that could change a verdict about one digest.

use serde::Serialize;
use sha2::{Digest as _, Sha256};

use crate::config::SignedBy;
use crate::verify::key::TrustedKey;

/// Raise it whenever the engine could come to another verdict from the same evidence.
const ENGINE: u32 = 1;

#[derive(Serialize)]
struct Inputs<'a> {
    engine: u32,
    key_uri: &'a str,
    key_sha256: &'a str,
    remote_verify: bool,
    annotations: Vec<(&'a str, Vec<&'a str>)>,
}

/// The fingerprint of a rule's requirement with the key that it resolves to. The rule's glob,
/// name and place in the file are left out: they choose the rule, not the answer.
pub fn of(required: &SignedBy, key: &TrustedKey) -> [u8; 32] {
    let inputs = Inputs {
        engine: ENGINE,
        key_uri: key.label(),
        key_sha256: key.sha256(),
        remote_verify: required.remote_verify,
        annotations: required
            .annotations
            .iter()
            .map(|(name, value)| (name.as_str(), value.alternatives().collect()))
            .collect(),
    };
    // Serialising strings, numbers and lists into memory can't fail; if it ever did, the empty
    // text would still not be another rule's fingerprint with this key.
    let text = serde_json::to_vec(&inputs).unwrap_or_default();
    Sha256::new().chain_update(text).chain_update(key.spki()).finalize().into()
}
