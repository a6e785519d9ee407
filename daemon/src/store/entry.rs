//! What is stored, and under which key.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::digest::Digest;
use crate::reference::Repository;
use crate::verdict::Denial;
use crate::verify::Proof;
use crate::verify::signature::Candidate;

/// Bytes of a key that stand for repository and digest.
const SUBJECT: usize = 16;

/// Identifies a question: repository, digest, and the fingerprint of everything that could
/// change the answer. Questions about one digest of one repository begin alike.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct VerdictKey([u8; 32]);

impl VerdictKey {
    /// The key of the question "may `repository@digest` run, under `fingerprint`?".
    pub fn new(repository: &Repository, digest: &Digest, fingerprint: &[u8; 32]) -> Self {
        // None of the parts can hold a NUL, so the joined text is unambiguous.
        let subject = Sha256::new()
            .chain_update(repository.to_string())
            .chain_update([0])
            .chain_update(digest.as_str())
            .chain_update([0]);
        let about = subject.clone().finalize();
        let mut key: [u8; 32] = subject.chain_update(fingerprint).finalize().into();
        key.iter_mut().zip(about).take(SUBJECT).for_each(|(byte, of_subject)| *byte = of_subject);
        Self(key)
    }

    /// What all questions about the same digest of the same repository begin with.
    pub fn subject(&self) -> &[u8] {
        self.0.split_at(SUBJECT).0
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
    /// Seconds since the epoch when its evidence was fetched.
    pub judged_at_unix: u64,
    /// What was fetched for an allow verdict: under another rule or key, another verdict can be
    /// worked out from it without the network.
    pub evidence: Vec<Candidate>,
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
    pub fn now(repository: &Repository, digest: &Digest, verdict: Verdict, evidence: Vec<Candidate>) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            repository: repository.to_string(),
            digest: digest.to_string(),
            verdict,
            judged_at_unix: now.as_secs(),
            evidence,
        }
    }

    /// When its evidence was fetched.
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
            evidence: Vec::new(),
        }
    }
}
