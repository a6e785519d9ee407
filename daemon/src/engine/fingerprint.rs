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
    by_engine(ENGINE, required, key)
}

fn by_engine(engine: u32, required: &SignedBy, key: &TrustedKey) -> [u8; 32] {
    let inputs = Inputs {
        engine,
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

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::path::Path;

    use super::*;
    use crate::config::{Config, Strategy};

    fn key(label: &str) -> TrustedKey {
        TrustedKey::from_pem(label.into(), &rcgen::KeyPair::generate().unwrap().public_key_pem()).unwrap()
    }

    /// What a rule requires, as it is written in a file.
    fn required(more: &str) -> SignedBy {
        let text = format!(
            "verificationRules: [{{imageGlob: quay.io/a, strategy: signed, keyURI: 'awskms:///a'{more}}}]"
        );
        let config = Config::parse(Path::new("t"), &text).unwrap().config;
        match &config.policy.rules()[0].strategy {
            Strategy::Signed(signed_by) => signed_by.clone(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn whatever_could_change_a_verdict_changes_the_fingerprint() {
        let (one, other) = (key("one"), key("one"));
        let renamed = TrustedKey::from_spki("two".into(), one.spki().to_vec()).unwrap();
        let plain = required("");
        let all = [
            of(&plain, &one),
            of(&plain, &other),
            of(&plain, &renamed),
            by_engine(ENGINE + 1, &plain, &one),
            of(&required(", remoteVerify: true"), &one),
            of(&required(", annotations: {a: b}"), &one),
            of(&required(", annotations: {a: c}"), &one),
            of(&required(", annotations: {a: [b]}"), &one),
            of(&required(", annotations: {a: [b, c]}"), &one),
            of(&required(", annotations: {b: b}"), &one),
        ];
        // One text and a list of it require the same.
        assert_eq!(all.iter().collect::<HashSet<_>>().len(), all.len() - 1);
        assert_eq!(of(&required(", name: other"), &one), of(&plain, &one));
    }
}
