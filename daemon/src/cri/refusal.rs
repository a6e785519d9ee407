//! A refusal as the kubelet can show it on the Pod.
//!
//! The kubelet takes the code away only from `Unknown`, and shows the reason of a message that
//! begins with one of two words (cri-api `pkg/errors`). One line, and the same text for the same
//! cause: it joins differing texts of several tries, and then no longer sees the word.

use tonic::Status;

use crate::engine::judgement::{Judgement, Outcome};
use crate::verdict::{DenyReason, FailureReason};

const DENIED: &str = "SignatureValidationFailed";
const AWAY: &str = "RegistryUnavailable";

/// The status of a refused pull; `None` when it was allowed.
pub fn status(judgement: &Judgement) -> Option<Status> {
    let text = message(judgement)?;
    Some(match &judgement.outcome {
        Outcome::Failed(failure) if failure.reason == FailureReason::ImageNotFound => Status::not_found(text),
        _ => Status::unknown(text),
    })
}

/// The text of a refusal; `None` when the image was allowed.
pub fn message(judgement: &Judgement) -> Option<String> {
    let (prefix, code, found, remedy) = match &judgement.outcome {
        Outcome::Allowed(..) => return None,
        Outcome::Denied(denial) => {
            (DENIED, denial.reason.code(), &denial.found, deny_remedy(denial.reason, judgement))
        }
        Outcome::Failed(failure) => {
            (AWAY, failure.reason.code(), &failure.found, failure_remedy(failure.reason).into())
        }
    };
    let prefix = match &judgement.outcome {
        Outcome::Failed(failure) if failure.reason == FailureReason::ImageNotFound => String::new(),
        _ => format!("{prefix}: "),
    };
    let digest = match &judgement.digest {
        Some(digest) if !judgement.image.ends_with(digest.as_str()) => format!(" ({digest})"),
        _ => String::new(),
    };
    let rule = match &judgement.rule {
        Some(rule) => format!(" by rule {:?}", rule.name),
        None if judgement.is_readable => " by the default".to_owned(),
        None => String::new(),
    };
    let expected = judgement.rule.as_ref().and_then(|rule| rule.expected.as_ref());
    let expected = expected.map(|expected| format!("expected {expected}; ")).unwrap_or_default();
    Some(format!(
        "{prefix}image {}{digest} refused{rule}: {code}: {expected}found: {found}; remedy: {remedy}",
        judgement.image,
    ))
}

fn deny_remedy(reason: DenyReason, judgement: &Judgement) -> String {
    let sign = || {
        let key = judgement.rule.as_ref().and_then(|rule| rule.sign_with.as_deref()).unwrap_or("PRIVATE-KEY");
        let repository = judgement.image.rsplit_once('@').map_or(judgement.image.as_str(), |(name, _)| name);
        let digest = judgement.digest.as_ref().map_or("DIGEST".to_owned(), ToString::to_string);
        let name = match (judgement.image.contains('@'), repository.rsplit_once(':')) {
            (false, Some((name, tag))) if !tag.contains('/') => name,
            _ => repository,
        };
        format!("have your CI sign it (cosign sign --key {key} {name}@{digest})")
    };
    match reason {
        DenyReason::InvalidReference => "correct the image name in the Pod".into(),
        DenyReason::NoRule => "use an image of an allowed registry, or ask the platform team for a rule".into(),
        DenyReason::DenyRule => "use another image; the platform team forbids this one".into(),
        DenyReason::Unsigned | DenyReason::InvalidSignature => sign(),
        DenyReason::AnnotationMismatch => {
            "use an image that the required build system built and signed, or sign it with these annotations (cosign sign -a NAME=VALUE)".into()
        }
        DenyReason::UntrustedIdentity => {
            "tell the platform team; if the new key is right they accept it on the node (pullgate keys accept URI)".into()
        }
        DenyReason::MalformedEvidence | DenyReason::EvidenceTooLarge => {
            "tell whoever signs this image; its signature must be made anew".into()
        }
    }
}

fn failure_remedy(reason: FailureReason) -> &'static str {
    match reason {
        FailureReason::RegistryThrottled | FailureReason::KmsThrottled | FailureReason::Timeout => {
            "none needed, the pull is tried again"
        }
        FailureReason::RegistryUnavailable => {
            "check the registry and the node's way to it; the pull is tried again"
        }
        FailureReason::RegistryAuth => {
            "give the Pod an imagePullSecret (or the node a credential) that may read the image and its signatures"
        }
        FailureReason::ImageNotFound => "check the image's name and tag",
        FailureReason::KmsUnavailable => {
            "check KMS, its key policy and the node's role; the pull is tried again"
        }
        FailureReason::ContainerdUnavailable => "check containerd; the pull is tried again",
    }
}
