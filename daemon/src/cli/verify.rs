//! `pullgate verify`: the same engine, without a daemon.

use std::sync::Arc;

use serde_json::json;

use super::{ConfigFile, DENIED, Ended, OK, Output, TRANSIENT, USAGE, print};
use crate::config::Config;
use crate::cri::refusal;
use crate::engine::judgement::{Judgement, Outcome};
use crate::engine::{Active, Ask, Engine};
use crate::evidence::registry::Credentials;
use crate::metrics::Metrics;
use crate::store::VerdictStore;
use crate::verify::key::pins::Pins;

/// Arguments of `verify`.
#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(flatten)]
    config: ConfigFile,
    /// Form of the output
    #[arg(long, short, value_enum, default_value_t)]
    output: Output,
    /// The image, as a Pod would name it
    image: String,
}

/// Judges one image and prints the judgement.
pub async fn verify(args: Args) -> Ended {
    let loaded = Config::load(&args.config.config).map_err(|errors| (USAGE, errors.to_string()))?;
    let metrics = Arc::new(Metrics::new().map_err(|e| (TRANSIENT, e.to_string()))?);
    let patience = loaded.config.deadline;
    let pins = Pins::only_read(loaded.config.state_dir.join("keys"));
    let active = Active::build(loaded, None, pins, &metrics);
    let store = Arc::new(VerdictStore::in_memory(Arc::clone(&metrics)));
    let engine = Engine::new(active, store, metrics);
    let ask = Ask { image: args.image, present: None, credentials: Credentials::none(), patience };
    let judgement = engine.judge(&ask).await;
    match args.output {
        Output::Json => print(json(&judgement)),
        Output::Text => print(text(&judgement)),
    }
    Ok(match judgement.outcome {
        Outcome::Allowed(..) => OK,
        Outcome::Denied(_) => DENIED,
        Outcome::Failed(_) => TRANSIENT,
    })
}

fn json(judgement: &Judgement) -> serde_json::Value {
    let reason = judgement.outcome.reason();
    json!({
        "image": judgement.image,
        "digest": judgement.digest.as_ref().map(|digest| digest.as_str()),
        "decision": reason.decision(),
        "reason": reason.code(),
        "rule": judgement.rule.as_ref().map(|rule| rule.name.as_str()),
        "message": refusal::message(judgement).unwrap_or_else(|| text(judgement)),
        "key": judgement.proof.as_ref().map(|proof| &proof.key),
        "annotations": judgement.proof.as_ref().map(|proof| &proof.annotations),
        "policy": judgement.policy,
        "durationUs": judgement.took.as_micros() as u64,
    })
}

fn text(judgement: &Judgement) -> String {
    if let Some(refusal) = refusal::message(judgement) {
        return format!("{}: {refusal}", judgement.outcome.reason().decision());
    }
    let digest = judgement.digest.as_ref().map(|digest| format!(" ({digest})")).unwrap_or_default();
    let rule = judgement.rule.as_ref().map_or("the default".into(), |rule| format!("rule {:?}", rule.name));
    let by = judgement.proof.as_ref().map(|proof| format!(", signed by {}", proof.key)).unwrap_or_default();
    format!(
        "allow: image {}{digest} allowed by {rule}: {}{by}",
        judgement.image,
        judgement.outcome.reason().code()
    )
}
