//! Verification: does the evidence prove what the rule requires?
//!
//! Nothing here asks a registry; [`crate::evidence`] has fetched and hashed the bytes. What is
//! not proved is a [`crate::verdict::Denial`]; what could not be asked (KMS) is a failure.

pub mod annotations;
pub mod key;
pub mod payload;
pub mod signature;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// What an allow verdict rests on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proof {
    /// The key's name: its URI, without secrets.
    pub key: String,
    /// SHA-256 of the key's SubjectPublicKeyInfo, hexadecimal.
    pub key_sha256: String,
    /// The signature scheme that verified, such as `ECDSA_P256_SHA256`.
    pub scheme: String,
    /// The signed `docker-reference`: reported, never trusted.
    pub docker_reference: String,
    /// The signed annotations (`optional` in the payload).
    pub annotations: BTreeMap<String, String>,
}
