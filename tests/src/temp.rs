//! A temporary folder with a lock on it, so that what a killed test left behind can be told from what
//! is in use, and swept.

use anyhow::{Context, Result};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Once;

/// Short, because Unix socket paths end at 108 bytes.
const PREFIX: &str = "pgt-";

/// A temporary folder; removed on drop unless `PULLGATE_KEEP` is set.
pub struct Temp {
    path: PathBuf,
    _lock: File,
}

impl Temp {
    /// Makes one, and on the first call sweeps those that dead tests left.
    pub fn new() -> Result<Self> {
        static SWEEP: Once = Once::new();
        SWEEP.call_once(sweep);
        let path = tempfile::Builder::new()
            .prefix(PREFIX)
            .rand_bytes(6)
            .tempdir_in("/tmp")
            .context("a temporary folder")?
            .keep();
        let lock = File::create(path.join("lock"))?;
        lock.try_lock()?;
        Ok(Self { path, _lock: lock })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its last path component, unique among all worlds of the machine.
    pub fn name(&self) -> &str {
        self.path.file_name().and_then(|name| name.to_str()).unwrap_or(PREFIX)
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        if std::env::var_os("PULLGATE_KEEP").is_none() {
            let _ = std::fs::remove_dir_all(&self.path);
        }
    }
}

/// Removes folders whose lock nobody holds, with what still runs or is mounted below them.
fn sweep() {
    let kept = std::env::var_os("PULLGATE_KEEP").is_some();
    for entry in std::fs::read_dir("/tmp").into_iter().flatten().flatten() {
        let path = entry.path();
        if kept || !entry.file_name().to_string_lossy().starts_with(PREFIX) {
            continue;
        }
        // A folder without a lock yet is one that another process is making right now.
        let Ok(lock) = File::options().write(true).open(path.join("lock")) else {
            continue;
        };
        if lock.try_lock().is_ok() {
            crate::containerd::remove_leftovers(&path);
            crate::nspawn::remove_leftovers(&entry.file_name().to_string_lossy());
            let _ = std::fs::remove_dir_all(&path);
        }
    }
}
