//! A judgement: the outcome of one question, with all that people will ask about it.

use std::time::Duration;

use crate::config::{Rule, Strategy};
use crate::digest::Digest;
use crate::reference::{Pointer, Reference, Repository};
use crate::store::{Stored, Verdict};
use crate::verdict::{AllowReason, Denial, DenyReason, Failure, FailureReason, Reason, Stop};
use crate::verify::Proof;

/// The answer to one question.
#[derive(Debug)]
pub struct Judgement {
    /// The normalised reference; what the caller wrote, made printable, if it is none.
    pub image: String,
    /// Whether it is a reference at all; without one no rule is looked for.
    pub is_readable: bool,
    /// The digest, as far as it is known.
    pub digest: Option<Digest>,
    /// The rule that applied; `None` is the default.
    pub rule: Option<AppliedRule>,
    /// Allowed, denied or failed.
    pub outcome: Outcome,
    /// What an allow by signature rests on.
    pub proof: Option<Proof>,
    /// Where the verdict came from.
    pub cache: CacheState,
    /// From the question to the answer.
    pub took: Duration,
    /// The policy's fingerprint.
    pub policy: String,
}

/// A rule, as far as people want to read about it.
#[derive(Clone, Debug)]
pub struct AppliedRule {
    /// Its name, or its glob.
    pub name: String,
    /// `signed`, `dev`, `allow` or `deny`.
    pub strategy: &'static str,
    /// What it expects, as a clause.
    pub expected: Option<String>,
    /// The key by which it wants a signature.
    pub key: Option<String>,
    /// What to sign with, where the rule tells.
    pub sign_with: Option<String>,
}

/// Where a verdict came from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CacheState {
    /// No verdict was needed.
    None,
    /// From this tier of the store; `evidence` where it was worked out anew from what is stored.
    Hit(&'static str),
    /// Worked out now.
    Miss,
    /// An old allow verdict stood in for this failure.
    Stale(FailureReason),
}

/// What became of the question.
#[derive(Debug)]
pub enum Outcome {
    /// It may be pulled, and how.
    Allowed(AllowReason, Permit),
    /// It may not.
    Denied(Denial),
    /// Nobody knows yet.
    Failed(Failure),
}

/// Leave to ask containerd for an image. Only this module makes one, and the delegate takes
/// nothing else.
#[derive(Clone, Debug)]
pub struct Permit {
    reference: Reference,
    digest: Option<Digest>,
}

impl Permit {
    /// A rule allows whatever the reference points to.
    pub(super) fn as_asked(reference: Reference) -> Self {
        Self { reference, digest: None }
    }

    /// A stored allow verdict is about one digest of one repository, and only that is permitted.
    pub(super) fn proved(reference: Reference, asked: &Digest, stored: &Stored) -> Result<Self, Stop> {
        let mismatch = || DenyReason::MalformedEvidence.because("the stored verdict is about another image");
        let same = stored.digest == asked.as_str()
            && stored.repository == reference.repository.to_string()
            && matches!(stored.verdict, Verdict::Allow(_));
        match same {
            true => Ok(Self { reference, digest: Some(asked.clone()) }),
            false => Err(mismatch().into()),
        }
    }

    /// What containerd is to be asked for instead of the caller's reference: `repository@digest`.
    pub fn pinned(&self) -> Option<String> {
        self.digest.as_ref().map(|digest| self.reference.repository.at(digest))
    }

    /// The proved digest.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// The repository.
    pub fn repository(&self) -> &Repository {
        &self.reference.repository
    }

    /// The `repository:tag` that containerd won't record by itself when it pulls by digest.
    pub fn tag_to_record(&self) -> Option<String> {
        match (&self.reference.pointer, &self.digest) {
            (Pointer::Tag(_), Some(_)) => Some(self.reference.to_string()),
            _ => None,
        }
    }
}

impl Judgement {
    pub(super) fn about(image: &str, policy: &str) -> Self {
        Self {
            image: printable(image),
            is_readable: false,
            digest: None,
            rule: None,
            outcome: Outcome::Failed(super::timeout()),
            proof: None,
            cache: CacheState::None,
            took: Duration::ZERO,
            policy: policy.to_owned(),
        }
    }

    pub(super) fn read_as(&mut self, reference: &Reference, present: Option<&Digest>) {
        self.image = reference.to_string();
        self.is_readable = true;
        self.digest = match &reference.pointer {
            Pointer::Digest(digest) => Some(digest.clone()),
            Pointer::Tag(_) => present.cloned(),
        };
    }

    pub(super) fn is_dev(&self) -> bool {
        self.rule.as_ref().is_some_and(|rule| rule.strategy == "dev")
    }

    /// Leave to pull it, if it is allowed.
    pub fn permit(&self) -> Option<&Permit> {
        match &self.outcome {
            Outcome::Allowed(_, permit) => Some(permit),
            Outcome::Denied(_) | Outcome::Failed(_) => None,
        }
    }

    /// Whether it is allowed.
    pub fn is_allowed(&self) -> bool {
        self.permit().is_some()
    }
}

/// A text that is no reference, so that it can stand in one line, in visible ASCII: a letter that
/// only looks like one of the Latin ones is seen to be another.
fn printable(image: &str) -> String {
    let short: String = image.chars().take(300).collect();
    format!("\"{}\"", short.escape_default())
}

impl AppliedRule {
    pub(super) fn new(rule: &Rule) -> Self {
        let (strategy, signed_by) = match &rule.strategy {
            Strategy::Allow => ("allow", None),
            Strategy::Deny => ("deny", None),
            Strategy::Signed(signed_by) => ("signed", Some(signed_by)),
            Strategy::Dev(signed_by) => ("dev", Some(signed_by)),
        };
        let expected = signed_by.map(|signed_by| {
            let annotations: Vec<String> =
                signed_by.annotations.iter().map(|(name, value)| format!("{name}={value}")).collect();
            match annotations.is_empty() {
                true => format!("a cosign signature by {}", signed_by.key),
                false => format!("a cosign signature by {} with {}", signed_by.key, annotations.join(", ")),
            }
        });
        let sign_with = signed_by.and_then(|signed_by| signed_by.key.for_signing());
        Self { name: rule.name.clone(), strategy, expected, key: signed_by.map(|s| s.key.label()), sign_with }
    }
}

impl CacheState {
    /// For metrics and journal: `none`, `memory`, `disk`, `evidence`, `miss` or `stale`.
    pub fn label(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Hit(tier) => tier,
            Self::Miss => "miss",
            Self::Stale(_) => "stale",
        }
    }
}

impl Outcome {
    /// The reason, of whatever kind.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Allowed(reason, _) => Reason::Allow(*reason),
            Self::Denied(denial) => Reason::Deny(denial.reason),
            Self::Failed(failure) => Reason::Failure(failure.reason),
        }
    }
}

impl From<Stop> for Outcome {
    fn from(stop: Stop) -> Self {
        match stop {
            Stop::Denied(denial) => Self::Denied(denial),
            Stop::Failed(failure) => Self::Failed(failure),
        }
    }
}
