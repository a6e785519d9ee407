//! Where `tests/setup` put the parts.

use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};

const HELP: &str = "run tests/setup";

/// The parts folder: `PULLGATE_PARTS`, else `.parts` in the repository.
pub fn folder() -> PathBuf {
    match std::env::var_os("PULLGATE_PARTS") {
        Some(path) => path.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../.parts"),
    }
}

/// The binary of a part, such as `cosign2`.
pub fn path(part: &str) -> Result<PathBuf> {
    let file = folder().join("env");
    let text = std::fs::read_to_string(&file)
        .with_context(|| format!("the test parts are not set up ({}): {HELP}", file.display()))?;
    match text.lines().filter_map(|line| line.split_once('=')).find(|(name, _)| *name == part) {
        Some((_, path)) => Ok(path.into()),
        None => bail!("no part {part} in {}: {HELP}", file.display()),
    }
}

/// Why a part is not there, if `tests/setup` said that it cannot be had here.
pub fn lacks(part: &str) -> Result<Option<String>> {
    let file = folder().join("unavailable");
    let text = std::fs::read_to_string(&file)
        .with_context(|| format!("the test parts are not set up ({}): {HELP}", file.display()))?;
    Ok(text.lines().find(|line| line.split(':').next() == Some(part)).map(str::to_owned))
}
