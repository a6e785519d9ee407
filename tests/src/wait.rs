//! Waiting for a condition, never for a time.

use anyhow::{Result, bail};
use std::time::{Duration, Instant};

/// How often a condition is looked at.
const STEP: Duration = Duration::from_millis(15);

/// The deadline for most things that a test waits for; generous, for a loaded machine.
pub const LONG: Duration = Duration::from_secs(30);

/// Asks until there is an answer; an error of `ask` ends the wait at once.
pub async fn until<T>(
    what: &str,
    deadline: Duration,
    mut ask: impl AsyncFnMut() -> Result<Option<T>>,
) -> Result<T> {
    let begin = Instant::now();
    let mut tick = tokio::time::interval(STEP);
    loop {
        tick.tick().await;
        if let Some(answer) = ask().await? {
            return Ok(answer);
        }
        if begin.elapsed() > deadline {
            bail!("waited {deadline:?} in vain for {what}");
        }
    }
}

/// [`until`] for a plain condition that cannot fail.
pub async fn until_true(what: &str, mut holds: impl FnMut() -> bool) -> Result<()> {
    until(what, LONG, async || Ok(holds().then_some(()))).await
}

/// [`until_true`] without a runtime, for clean-up: gives up quietly.
pub(crate) fn until_true_blocking(deadline: Duration, mut holds: impl FnMut() -> bool) -> bool {
    let begin = Instant::now();
    while !holds() {
        if begin.elapsed() > deadline {
            return false;
        }
        std::thread::park_timeout(Duration::from_millis(2));
    }
    true
}
