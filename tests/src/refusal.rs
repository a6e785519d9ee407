//! A refused pull, looked at from all sides: the kubelet, the journal and the metrics are told the same.

use crate::cri::PullOptions;
use crate::pullgate::Pullgate;
use anyhow::{Context, Result, ensure};
use tonic::Code;

/// The reasons that are no verdict.
const TRANSIENT: [&str; 8] = [
    "registry-throttled",
    "registry-unavailable",
    "registry-auth",
    "image-not-found",
    "kms-throttled",
    "kms-unavailable",
    "timeout",
    "containerd-unavailable",
];

/// Pulls `image`, which must be refused for this reason; answers the text.
pub async fn refused(pullgate: &Pullgate, image: &str, reason: &str) -> Result<String> {
    refused_with(pullgate, image, &PullOptions::default(), reason).await
}

/// [`refused`] for a Pod with particulars.
pub async fn refused_with(
    pullgate: &Pullgate,
    image: &str,
    options: &PullOptions,
    reason: &str,
) -> Result<String> {
    let transient = TRANSIENT.contains(&reason);
    let decision = if transient { "failure" } else { "deny" };
    let labels = [format!("decision=\"{decision}\""), format!("reason=\"{reason}\"")];
    let count = async || pullgate.metric("pullgate_decisions_total", &[&labels[0], &labels[1]]).await;
    let (entries, before) = (pullgate.audit().len(), count().await?);

    let status = pullgate.cri().pull_with(image, options).await.err();
    let status = status.with_context(|| format!("{image} was pulled, and not refused as {reason}"))?;
    let text = status.message().to_owned();
    let (code, prefix) = match (reason, transient) {
        ("image-not-found", _) => (Code::NotFound, "image "),
        (_, true) => (Code::Unknown, "RegistryUnavailable: image "),
        (_, false) => (Code::Unknown, "SignatureValidationFailed: image "),
    };
    ensure!(status.code() == code, "expected {code:?}: {status:?}");
    ensure!(text.starts_with(prefix), "expected {prefix:?} first: {text}");
    for part in [image, &format!(": {reason}: "), "found: ", "remedy: "] {
        ensure!(text.contains(part), "`{part}` is not in: {text}");
    }
    ensure!(!text.contains('\n'), "more than one line: {text}");

    let entry = crate::wait::until("the refusal's journal entry", crate::wait::LONG, async || {
        Ok(pullgate.audit().into_iter().skip(entries).find(|entry| entry["PULLGATE_METHOD"] == "PullImage"))
    });
    let entry = entry.await?;
    ensure!(entry["PULLGATE_DECISION"] == decision && entry["PULLGATE_REASON"] == reason, "{entry}");
    ensure!(entry["MESSAGE"] == text, "the journal says otherwise: {entry}");
    ensure!(count().await? == before + 1.0, "the metric does not count {reason}");
    Ok(text)
}
