//! What the engine can say about an image: a verdict (permanent), or a failure (transient).
//!
//! The two are different types from the place where they are born, so that a failure can
//! neither be stored nor be told as "bad signature".

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! reasons {
    ($(#[$meta:meta])* $name:ident { $($(#[$doc:meta])* $variant:ident = $code:literal,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
        pub enum $name { $($(#[$doc])* #[serde(rename = $code)] $variant,)* }

        impl $name {
            /// Every reason of this kind.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The stable code: the same in messages, journal, metrics and JSON.
            pub const fn code(self) -> &'static str {
                match self { $(Self::$variant => $code,)* }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.code())
            }
        }
    };
}

reasons! {
    /// Why an image is allowed.
    AllowReason {
        /// A signature by the rule's key was found and verified.
        Signed = "signed",
        /// A rule allows it without verification.
        AllowRule = "allow-rule",
    }
}

reasons! {
    /// Why an image is denied. Permanent: the same question has the same answer until
    /// somebody changes the image, its signatures or the policy.
    DenyReason {
        /// The reference can't be read as containerd would read it.
        InvalidReference = "invalid-reference",
        /// No rule matches, and the default is deny.
        NoRule = "no-rule",
        /// A rule denies it.
        DenyRule = "deny-rule",
        /// There is no signature.
        Unsigned = "unsigned",
        /// There are signatures, none of them a good one by the rule's key for this digest.
        InvalidSignature = "invalid-signature",
        /// The key that the rule names is not the key that was trusted (a re-pointed alias).
        UntrustedIdentity = "untrusted-identity",
        /// Well signed, but the signed annotations are not those that the rule requires.
        AnnotationMismatch = "annotation-mismatch",
        /// The evidence can't be read, or is not what its descriptor says.
        MalformedEvidence = "malformed-evidence",
        /// The evidence is larger, or more, than the caps allow.
        EvidenceTooLarge = "evidence-too-large",
    }
}

reasons! {
    /// Why no verdict could be reached. Transient: never stored, worth another try.
    FailureReason {
        /// The registry asked us to slow down (429).
        RegistryThrottled = "registry-throttled",
        /// The registry can't be reached, or answers with an error.
        RegistryUnavailable = "registry-unavailable",
        /// The registry does not let these credentials read.
        RegistryAuth = "registry-auth",
        /// The registry has no such image.
        ImageNotFound = "image-not-found",
        /// KMS asked us to slow down.
        KmsThrottled = "kms-throttled",
        /// KMS can't be reached, or refuses to give the key.
        KmsUnavailable = "kms-unavailable",
        /// The deadline passed first; a verification goes on.
        Timeout = "timeout",
        /// containerd does not answer.
        ContainerdUnavailable = "containerd-unavailable",
    }
}

/// Any reason at all, for metrics and audit.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Reason {
    /// Allowed because.
    Allow(AllowReason),
    /// Denied because.
    Deny(DenyReason),
    /// Failed because.
    Failure(FailureReason),
}

impl Reason {
    /// The stable code.
    pub const fn code(self) -> &'static str {
        match self {
            Self::Allow(reason) => reason.code(),
            Self::Deny(reason) => reason.code(),
            Self::Failure(reason) => reason.code(),
        }
    }

    /// `allow`, `deny` or `failure`.
    pub const fn decision(self) -> &'static str {
        match self {
            Self::Allow(_) => "allow",
            Self::Deny(_) => "deny",
            Self::Failure(_) => "failure",
        }
    }
}

/// A permanent refusal, born where something was proved wrong.
///
/// `found` is one clause for a person ("no signature at tag sha256-….sig"). It must be the same
/// for the same cause: no times, counters or ids, or the kubelet no longer shows the reason.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Denial {
    /// The code.
    pub reason: DenyReason,
    /// What was found instead of what was expected.
    pub found: String,
}

/// A transient failure, born where something could not be asked. The same rule for the text.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Failure {
    /// The code.
    pub reason: FailureReason,
    /// What could not be done, and why.
    pub found: String,
    /// Whether something is away or overloaded, so that an old allow verdict may stand in; not
    /// so when it answered that it won't.
    pub is_away: bool,
}

impl Failure {
    /// The same failure, but by a clear answer: no old verdict stands in for it.
    pub fn by_refusal(self) -> Self {
        Self { is_away: false, ..self }
    }
}

/// What stops a verification: a denial or a failure.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Stop {
    /// Permanent.
    Denied(Denial),
    /// Transient.
    Failed(Failure),
}

impl Stop {
    /// What was found.
    pub fn found(&self) -> &str {
        match self {
            Self::Denied(denial) => &denial.found,
            Self::Failed(failure) => &failure.found,
        }
    }
}

impl DenyReason {
    /// A denial for this reason.
    pub fn because(self, found: impl Into<String>) -> Denial {
        Denial { reason: self, found: found.into() }
    }
}

impl FailureReason {
    /// A failure for this reason.
    pub fn because(self, found: impl Into<String>) -> Failure {
        let is_away = !matches!(self, Self::RegistryAuth | Self::ImageNotFound);
        Failure { reason: self, found: found.into(), is_away }
    }
}

impl From<Denial> for Stop {
    fn from(denial: Denial) -> Self {
        Self::Denied(denial)
    }
}

impl From<Failure> for Stop {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_is_documented() {
        let documented = include_str!("../../docs/reason-codes.md");
        let codes = AllowReason::ALL.iter().map(|r| r.code());
        let codes = codes.chain(DenyReason::ALL.iter().map(|r| r.code()));
        for code in codes.chain(FailureReason::ALL.iter().map(|r| r.code())) {
            assert!(documented.contains(&format!("\n| `{code}` |")), "{code}");
        }
    }
}
