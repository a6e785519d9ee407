//! Audit: every decision is one journal entry, with the same fields everywhere.

mod lines;
pub mod logging;

use tracing::{error, info, warn};

use crate::engine::judgement::{CacheState, Judgement, Outcome, Permit};
use crate::verdict::FailureReason;

// MESSAGE_IDs (systemd.journal-fields(7)); systemd/pullgate.catalog explains each.
/// An image was allowed.
pub const ALLOWED: &str = "5d1b3cf0ab7e4f0c8f2f3cb1c2f5d801";
/// An image was denied.
pub const DENIED: &str = "5d1b3cf0ab7e4f0c8f2f3cb1c2f5d802";
/// No verdict could be reached.
pub const FAILED: &str = "5d1b3cf0ab7e4f0c8f2f3cb1c2f5d803";
/// An alias points at another key than the trusted one.
pub const KEY_CONFLICT: &str = "5d1b3cf0ab7e4f0c8f2f3cb1c2f5d804";
/// An operator accepted such a key.
pub const KEY_ACCEPTED: &str = "5d1b3cf0ab7e4f0c8f2f3cb1c2f5d805";
/// The verdict store was damaged and set aside.
pub const STORE_SET_ASIDE: &str = "5d1b3cf0ab7e4f0c8f2f3cb1c2f5d806";
/// A policy came into force.
pub const POLICY_LOADED: &str = "5d1b3cf0ab7e4f0c8f2f3cb1c2f5d807";
/// A policy was refused; the old one stays in force.
pub const POLICY_REFUSED: &str = "5d1b3cf0ab7e4f0c8f2f3cb1c2f5d808";
/// Verdicts were purged by an operator.
pub const CACHE_PURGED: &str = "5d1b3cf0ab7e4f0c8f2f3cb1c2f5d809";

/// An allowed image could not be pulled: the next hop is away.
pub const NEXT_HOP_AWAY: &str = "5d1b3cf0ab7e4f0c8f2f3cb1c2f5d80a";

/// The call that asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Method {
    /// CRI `PullImage`
    #[default]
    PullImage,
    /// CRI `ImageStatus`
    ImageStatus,
}

impl Method {
    /// Its name in the journal.
    pub fn name(self) -> &'static str {
        match self {
            Self::PullImage => "PullImage",
            Self::ImageStatus => "ImageStatus",
        }
    }
}

/// Who asked, as far as the kubelet says. Never used for the decision.
#[derive(Clone, Debug, Default)]
pub struct Context {
    /// The call.
    pub method: Method,
    /// Whether the same image was allowed under the same name by the same policy before, and that
    /// was recorded.
    pub was_allowed: bool,
    /// The Pod's namespace.
    pub namespace: String,
    /// The Pod's name.
    pub pod: String,
    /// The Pod's UID.
    pub pod_uid: String,
    /// The Pod's runtime handler.
    pub runtime_handler: String,
}

/// Whether a decision is to be written down.
///
/// The kubelet asks for the status of a running Pod's image again and again. An allow that was
/// recorded before, and is only repeated from memory or by a rule, is no new decision.
pub fn is_new(judgement: &Judgement, context: &Context) -> bool {
    let repeated = matches!(judgement.cache, CacheState::Hit("memory") | CacheState::None);
    !(context.was_allowed && judgement.is_allowed() && repeated)
}

/// Writes one decision down; blocks for as long as the journal does.
pub fn record(judgement: &Judgement, context: &Context) {
    let reason = judgement.outcome.reason();
    let text = match crate::cri::refusal::message(judgement) {
        Some(refusal) => refusal,
        None => format!("image {} allowed: {}", judgement.image, reason.code()),
    };
    // One list of fields; the macro needs the level as a constant.
    macro_rules! entry {
        ($level:ident, $id:expr) => {
            $level!(
                target: "pullgate::audit",
                message_id = $id,
                pullgate_decision = reason.decision(),
                pullgate_reason = reason.code(),
                pullgate_method = context.method.name(),
                pullgate_image = judgement.image,
                pullgate_digest = judgement.digest.as_ref().map(|d| d.as_str()),
                pullgate_rule = judgement.rule.as_ref().map_or("default", |rule| rule.name.as_str()),
                pullgate_key_id = key(judgement),
                pullgate_key_sha256 = judgement.proof.as_ref().map(|proof| proof.key_sha256.as_str()),
                pullgate_annotations = annotations(judgement),
                pullgate_docker_reference = judgement.proof.as_ref().map(|proof| proof.docker_reference.as_str()),
                pullgate_cache = judgement.cache.label(),
                pullgate_stale_because = stale(judgement),
                pullgate_duration_us = judgement.took.as_micros() as u64,
                pullgate_policy = judgement.policy,
                k8s_namespace = present(&context.namespace),
                k8s_pod = present(&context.pod),
                k8s_pod_uid = present(&context.pod_uid),
                k8s_container_runtime_handler = present(&context.runtime_handler),
                "{text}"
            )
        };
    }
    match judgement.outcome {
        Outcome::Allowed(..) => entry!(info, ALLOWED),
        Outcome::Denied(_) => entry!(warn, DENIED),
        Outcome::Failed(_) => entry!(error, FAILED),
    }
}

/// Writes down that an allowed image could not be asked for.
pub fn next_hop_away(permit: &Permit, why: &str) {
    tracing::error!(
        target: "pullgate::audit",
        message_id = NEXT_HOP_AWAY,
        pullgate_reason = FailureReason::ContainerdUnavailable.code(),
        pullgate_image = permit.repository().to_string(),
        pullgate_digest = permit.digest().map(|digest| digest.as_str()),
        "an allowed image could not be pulled: {why}",
    );
}

fn key(judgement: &Judgement) -> Option<&str> {
    judgement.rule.as_ref().and_then(|rule| rule.key.as_deref())
}

fn annotations(judgement: &Judgement) -> Option<String> {
    let signed = &judgement.proof.as_ref()?.annotations;
    (!signed.is_empty()).then(|| serde_json::to_string(signed).unwrap_or_default())
}

fn stale(judgement: &Judgement) -> Option<&'static str> {
    match judgement.cache {
        CacheState::Stale(reason) => Some(reason.code()),
        _ => None,
    }
}

fn present(text: &str) -> Option<&str> {
    (!text.is_empty()).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_journal_catalog_explains_every_kind_of_entry() {
        let catalog = include_str!("../../../systemd/pullgate.catalog");
        let ids = [
            ALLOWED,
            DENIED,
            FAILED,
            KEY_CONFLICT,
            KEY_ACCEPTED,
            STORE_SET_ASIDE,
            POLICY_LOADED,
            POLICY_REFUSED,
            CACHE_PURGED,
            NEXT_HOP_AWAY,
        ];
        for id in ids {
            assert_eq!(catalog.matches(&format!("\n-- {id}\nSubject: ")).count(), 1, "{id}");
        }
        assert_eq!(catalog.matches("\n-- ").count(), ids.len());
    }
}
