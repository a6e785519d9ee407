//! Where log and audit go: to journald where there is one, else to stderr as JSON lines.

use std::io::IsTerminal;

use tracing::Level;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use super::lines::{Form, Lines};

/// `PULLGATE_LOG=json` writes JSON lines even where there is a journal; `text` writes text.
pub const FORM_VARIABLE: &str = "PULLGATE_LOG";
/// `PULLGATE_LOG_LEVEL=debug` shows more; `info` is the default.
pub const LEVEL_VARIABLE: &str = "PULLGATE_LOG_LEVEL";

/// Starts logging for the daemon. Libraries only show warnings, whatever the level: at `debug`
/// some of them write headers.
pub fn for_daemon() {
    let form = std::env::var(FORM_VARIABLE).ok();
    let terminal = std::io::stderr().is_terminal();
    let journal = match form.as_deref() {
        Some("json" | "text") => None,
        _ => tracing_journald::layer().ok().map(|layer| layer.with_field_prefix(None)),
    };
    let lines = match form.as_deref() {
        Some("json") => Some(Form::Json),
        Some("text") => Some(Form::Text),
        _ if terminal => Some(Form::Text),
        _ if journal.is_none() => Some(Form::Json),
        _ => None,
    };
    tracing_subscriber::registry().with(targets(Level::INFO)).with(journal).with(lines.map(Lines)).init();
}

/// Starts logging for a command: warnings, as text.
pub fn for_command() {
    tracing_subscriber::registry().with(targets(Level::WARN)).with(Lines(Form::Text)).init();
}

fn targets(default: Level) -> Targets {
    let level = std::env::var(LEVEL_VARIABLE).ok().and_then(|text| text.parse().ok()).unwrap_or(default);
    Targets::new()
        .with_target("pullgate", level)
        .with_target("sigstore", Level::ERROR)
        .with_default(Level::WARN)
}
