//! The disk tier: one sled tree of verdicts.
//!
//! sled reports some damage as errors and some as panics; both are caught here, and a store
//! that can't be read is set aside so that a new one is begun.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use super::entry::{Stored, VerdictKey};

/// Changes when an older or newer pullgate could misread the entries.
const FORMAT: &[u8] = b"1";
const FORMAT_KEY: &[u8] = b"format";
/// sled's page cache, bytes: enough for the hot part, small beside the memory bar.
const PAGE_CACHE: u64 = 8 << 20;

/// The disk tier, which may be missing.
pub struct Disk {
    open: Option<Open>,
    trouble: Mutex<Option<String>>,
}

struct Open {
    database: sled::Db,
    verdicts: sled::Tree,
}

/// How many entries a sweep dropped.
#[derive(Default, Debug, PartialEq, Eq)]
pub struct Dropped {
    /// Because they no longer count.
    pub expired: u64,
    /// Because there were too many.
    pub surplus: u64,
}

impl Disk {
    /// Opens, or begins, the store in `directory/verdicts`.
    pub fn open(directory: &Path) -> Self {
        let path = directory.join("verdicts");
        let opened = open(&path).or_else(|error| {
            // A lock held by a pullgate that is still draining, or no permission, is no damage.
            if !error.is_damage {
                return Err(error);
            }
            let aside = set_aside(&path)?;
            tracing::error!(
                message_id = crate::audit::STORE_SET_ASIDE,
                store = %path.display(),
                aside = %aside.display(),
                error = %error.text,
                "the verdict store could not be read; it was set aside and a new one begun",
            );
            open(&path)
        });
        match opened {
            Ok(open) => Self { open: Some(open), trouble: Mutex::new(None) },
            Err(error) => {
                tracing::error!(error = %error.text, "verdicts are kept in memory only");
                Self { open: None, trouble: Mutex::new(Some(error.text)) }
            }
        }
    }

    /// No disk at all.
    pub fn none() -> Self {
        Self { open: None, trouble: Mutex::new(None) }
    }

    /// Whether there is a disk tier.
    pub fn is_open(&self) -> bool {
        self.open.is_some()
    }

    /// What is wrong with the disk tier, if anything.
    pub fn trouble(&self) -> Option<String> {
        self.trouble.lock().map_or(None, |t| t.clone())
    }

    /// Reads one entry; what can't be read is not there.
    pub fn get(&self, key: &VerdictKey) -> Option<Stored> {
        let open = self.open.as_ref()?;
        match guarded(|| open.verdicts.get(key.as_bytes())) {
            Ok(value) => decode(&value?),
            Err(error) => {
                self.note(&error);
                None
            }
        }
    }

    /// Writes one entry.
    ///
    /// # Errors
    /// A sentence, when the disk is full or damaged.
    pub fn put(&self, key: &VerdictKey, stored: &Stored) -> Result<(), String> {
        let Some(open) = &self.open else { return Ok(()) };
        let value = serde_json::to_vec(stored).map_err(|e| e.to_string())?;
        let written = guarded(|| {
            open.verdicts.insert(key.as_bytes(), value)?;
            open.verdicts.flush().map(drop)
        });
        match &written {
            Ok(()) => self.clear_note(),
            Err(error) => self.note(error),
        }
        written
    }

    /// Removes one entry.
    pub fn remove(&self, key: &VerdictKey) {
        if let Some(open) = &self.open
            && let Err(error) = guarded(|| open.verdicts.remove(key.as_bytes()))
        {
            self.note(&error);
        }
    }

    /// Visits every readable entry until `visit` says stop.
    pub fn for_each(&self, mut visit: impl FnMut(VerdictKey, Stored) -> bool) {
        let Some(open) = &self.open else { return };
        let visited = guarded(|| {
            for item in &open.verdicts {
                let (key, value) = item?;
                if let (Ok(key), Some(stored)) = (<[u8; 32]>::try_from(key.as_ref()), decode(&value))
                    && !visit(VerdictKey::from_bytes(key), stored)
                {
                    break;
                }
            }
            Ok(())
        });
        if let Err(error) = visited {
            self.note(&error);
        }
    }

    /// Drops the entries that `expired` picks, then the oldest beyond `max_entries`.
    pub fn sweep(&self, max_entries: usize, expired: impl Fn(&Stored) -> bool) -> Dropped {
        let mut dropped = Dropped::default();
        let mut kept = Vec::new();
        let mut doomed = Vec::new();
        self.for_each(|key, stored| {
            match expired(&stored) {
                true => doomed.push(key),
                false => kept.push((stored.judged_at_unix, key)),
            }
            true
        });
        dropped.expired = doomed.len() as u64;
        let surplus = kept.len().saturating_sub(max_entries);
        kept.sort_unstable();
        doomed.extend(kept.into_iter().take(surplus).map(|(_, key)| key));
        dropped.surplus = surplus as u64;
        for key in &doomed {
            self.remove(key);
        }
        dropped
    }

    /// Entries.
    pub fn len(&self) -> usize {
        self.open.as_ref().map_or(0, |open| guarded(|| Ok(open.verdicts.len())).unwrap_or(0))
    }

    /// Bytes on disk.
    pub fn bytes(&self) -> u64 {
        self.open.as_ref().map_or(0, |open| guarded(|| open.database.size_on_disk()).unwrap_or(0))
    }

    /// Writes everything out.
    pub fn flush(&self) {
        if let Some(open) = &self.open
            && let Err(error) = guarded(|| open.database.flush())
        {
            self.note(&error);
        }
    }

    fn note(&self, error: &str) {
        if let Ok(mut trouble) = self.trouble.lock() {
            *trouble = Some(error.to_owned());
        }
    }

    fn clear_note(&self) {
        if let Ok(mut trouble) = self.trouble.lock() {
            *trouble = None;
        }
    }

    #[cfg(test)]
    pub(super) fn write_format(directory: &Path, format: &[u8]) {
        let database = sled::open(directory.join("verdicts")).unwrap();
        database.insert(FORMAT_KEY, format).unwrap();
        database.flush().unwrap();
    }
}

struct OpenError {
    text: String,
    is_damage: bool,
}

fn open(path: &Path) -> Result<Open, OpenError> {
    let config = sled::Config::new()
        .path(path)
        .cache_capacity(PAGE_CACHE)
        .mode(sled::Mode::LowSpace)
        .flush_every_ms(Some(500));
    let opened = catch_unwind(AssertUnwindSafe(|| {
        let database = config.open()?;
        let verdicts = database.open_tree("verdicts")?;
        let format = database.get(FORMAT_KEY)?;
        if format.is_none() && verdicts.is_empty() {
            database.insert(FORMAT_KEY, FORMAT)?;
        }
        let is_ours = database.get(FORMAT_KEY)?.is_some_and(|f| f.as_ref() == FORMAT);
        Ok::<_, sled::Error>((is_ours, Open { database, verdicts }))
    }));
    match opened {
        Ok(Ok((true, open))) => Ok(open),
        Ok(Ok((false, _))) => Err(OpenError { text: "it has another format".into(), is_damage: true }),
        Ok(Err(error)) => Err(OpenError {
            is_damage: !matches!(&error, sled::Error::Io(io) if io.kind() != std::io::ErrorKind::UnexpectedEof
                && io.kind() != std::io::ErrorKind::InvalidData),
            text: error.to_string(),
        }),
        Err(_) => Err(OpenError { text: "sled panicked on it".into(), is_damage: true }),
    }
}

/// Moves the store to `<path>.set-aside`, in place of an earlier one.
fn set_aside(path: &Path) -> Result<PathBuf, OpenError> {
    let aside = path.with_extension("set-aside");
    let moved = match std::fs::remove_dir_all(&aside) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => std::fs::rename(path, &aside),
    };
    match moved {
        Ok(()) => Ok(aside),
        Err(error) => Err(OpenError { text: format!("{}: {error}", path.display()), is_damage: false }),
    }
}

/// An entry that doesn't decode is as good as absent: it will be judged anew.
fn decode(value: &[u8]) -> Option<Stored> {
    serde_json::from_slice(value).ok()
}

fn guarded<T>(work: impl FnOnce() -> sled::Result<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result.map_err(|e| e.to_string()),
        Err(_) => Err("sled panicked".into()),
    }
}
