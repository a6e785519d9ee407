//! What is stored, and under which key.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::digest::Digest;
use crate::reference::Repository;
use crate::verdict::Denial;
use crate::verify::Proof;

/// Identifies a question: repository, digest, and the fingerprint of everything that could
/// change the answer.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct VerdictKey([u8; 32]);

impl VerdictKey {
    /// The key of the question "may `repository@digest` run, under `fingerprint`?".
    pub fn new(repository: &Repository, digest: &Digest, fingerprint: &[u8; 32]) -> Self {
        // None of the parts can hold a NUL, so the joined text is unambiguous.
        let hash = Sha256::new()
            .chain_update(repository.to_string())
            .chain_update([0])
            .chain_update(digest.as_str())
            .chain_update([0])
            .chain_update(fingerprint)
            .finalize();
        Self(hash.into())
    }

    /// A key from its bytes.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Its bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

/// A verdict with what it rests on.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Stored {
    /// The repository, for people.
    pub repository: String,
    /// The digest, for people.
    pub digest: String,
    /// The verdict.
    pub verdict: Verdict,
    /// Seconds since the epoch when it was reached.
    pub judged_at_unix: u64,
}

/// The permanent answer about one digest under one rule.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Proved.
    Allow(Proof),
    /// Proved to be wrong, or not to be there.
    Deny(Denial),
}

impl Stored {
    /// A verdict reached now.
    pub fn now(repository: &Repository, digest: &Digest, verdict: Verdict) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            repository: repository.to_string(),
            digest: digest.to_string(),
            verdict,
            judged_at_unix: now.as_secs(),
        }
    }

    /// When it was reached.
    pub fn judged_at(&self) -> SystemTime {
        // A time that can't be is damage; it counts as the oldest.
        UNIX_EPOCH.checked_add(Duration::from_secs(self.judged_at_unix)).unwrap_or(UNIX_EPOCH)
    }

    /// Whether it allows.
    pub fn is_allow(&self) -> bool {
        matches!(self.verdict, Verdict::Allow(_))
    }
}

#[cfg(test)]
impl Stored {
    pub(super) fn example_allow(repository: &str, digest: &str) -> Self {
        let mut stored = Self::example_deny(repository, digest, crate::verdict::DenyReason::Unsigned);
        stored.verdict = Verdict::Allow(Proof::default());
        stored
    }

    pub(super) fn example_deny(repository: &str, digest: &str, reason: crate::verdict::DenyReason) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        Self {
            repository: repository.into(),
            digest: digest.into(),
            verdict: Verdict::Deny(reason.because("an example")),
            judged_at_unix: now.as_secs(),
        }
    }
}
