//! The disk tier: one sled tree of verdicts.
//!
//! sled reports some damage as errors and some as panics; both are caught here, and a store
//! that can't be read is set aside so that a new one is begun. A sled that failed once (a full
//! disk) fails for ever: only [`Disk::reopen`] makes it work again.

use std::ops::RangeBounds;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};

use super::entry::{Stored, VerdictKey};

/// Changes when an older or newer pullgate could misread the entries.
const FORMAT: &[u8] = b"2";
const FORMAT_KEY: &[u8] = b"format";
/// How many verdicts there were at the last clean stop.
const ENTRIES_KEY: &[u8] = b"entries";
/// sled's page cache, bytes: enough for the hot part, small beside the memory bar.
const PAGE_CACHE: u64 = 8 << 20;

/// The disk tier, which may be missing.
pub struct Disk {
    /// The store's folder; `None` when there shall be no disk tier.
    path: Option<PathBuf>,
    open: RwLock<Option<Open>>,
    /// sled counts by reading every entry, so they are counted here; see [`Self::recount`].
    entries: AtomicUsize,
    /// Whether they were counted since the last crash.
    is_counted: AtomicBool,
    trouble: Mutex<Option<Trouble>>,
}

struct Open {
    database: sled::Db,
    verdicts: sled::Tree,
    /// How many verdicts there were, if the last stop was a clean one.
    count: Option<usize>,
}

/// What is wrong with the disk tier.
#[derive(Debug)]
struct Trouble {
    text: String,
    /// The files are damaged, and not only out of reach: they are to be set aside.
    is_damage: bool,
}

/// The entries that a sweep dropped.
#[derive(Default, Debug, PartialEq, Eq)]
pub struct Dropped {
    /// Because they no longer count.
    pub expired: Vec<VerdictKey>,
    /// Because there were too many.
    pub surplus: Vec<VerdictKey>,
}

impl Disk {
    /// Opens, or begins, the store in `directory/verdicts`.
    pub fn open(directory: &Path) -> Self {
        let path = directory.join("verdicts");
        let (open, trouble) = match open_or_begin(&path, false) {
            Ok(open) => (Some(open), None),
            Err(trouble) => {
                tracing::error!(error = %trouble.text, "verdicts are kept in memory only for now");
                (None, Some(trouble))
            }
        };
        let counted = open.as_ref().and_then(|open| open.count);
        Self {
            path: Some(path),
            open: RwLock::new(open),
            entries: AtomicUsize::new(counted.unwrap_or(0)),
            is_counted: AtomicBool::new(counted.is_some()),
            trouble: Mutex::new(trouble),
        }
    }

    /// No disk at all.
    pub fn none() -> Self {
        Self {
            path: None,
            open: RwLock::new(None),
            entries: AtomicUsize::new(0),
            is_counted: AtomicBool::new(true),
            trouble: Mutex::new(None),
        }
    }

    /// Closes what is open and opens it anew; says whether it works again. Blocks for as long as
    /// calls under way do.
    pub fn reopen(&self) -> bool {
        let Some(path) = &self.path else { return true };
        let mut open = self.open.write().unwrap_or_else(PoisonError::into_inner);
        // sled writes out what it can when it is dropped, and holds the lock until then.
        let _ = guarded(|| {
            drop(open.take());
            Ok(())
        });
        let is_damage = self.noted().as_ref().is_some_and(|trouble| trouble.is_damage);
        let opened = open_or_begin(path, is_damage);
        let mut noted = self.noted();
        match opened {
            Ok(new) => {
                *open = Some(new);
                *noted = None;
            }
            Err(trouble) => *noted = Some(trouble),
        }
        noted.is_none()
    }

    /// What is wrong with the disk tier, if anything.
    pub fn trouble(&self) -> Option<String> {
        self.noted().as_ref().map(|trouble| trouble.text.clone())
    }

    /// Reads one entry; what can't be read is not there. Never waits for a [`Self::reopen`].
    pub fn get(&self, key: &VerdictKey) -> Option<Stored> {
        let open = self.open.try_read().ok()?;
        let value =
            self.told(guarded(|| open.as_ref().map(|open| open.verdicts.get(key.as_bytes())).transpose()));
        decode(&value.ok()???)
    }

    /// Writes one entry.
    ///
    /// # Errors
    /// A sentence, when the disk is full or damaged.
    pub fn put(&self, key: &VerdictKey, stored: &Stored) -> Result<(), String> {
        let open = self.opened();
        let Some(open) = &*open else { return self.trouble().map_or(Ok(()), Err) };
        let value = serde_json::to_vec(stored).map_err(|e| e.to_string())?;
        let before = self.told(guarded(|| {
            let before = open.verdicts.insert(key.as_bytes(), value)?;
            open.verdicts.flush()?;
            Ok(before)
        }))?;
        if before.is_none() {
            self.entries.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Removes one entry.
    pub fn remove(&self, key: &VerdictKey) {
        if let Some(open) = &*self.opened()
            && let Ok(Some(_)) = self.told(guarded(|| open.verdicts.remove(key.as_bytes())))
        {
            let one_less = |entries: usize| Some(entries.saturating_sub(1));
            let _ = self.entries.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less);
        }
    }

    /// Visits every readable entry until `visit` says stop.
    pub fn for_each(&self, visit: impl FnMut(VerdictKey, Stored) -> bool) {
        self.for_each_in(.., visit);
    }

    /// Visits every readable entry whose key begins so, until `visit` says stop. Never waits for a
    /// [`Self::reopen`].
    pub fn for_each_beginning(&self, start: &[u8], visit: impl FnMut(VerdictKey, Stored) -> bool) {
        if let Ok(open) = self.open.try_read() {
            self.for_each_of(&open, |verdicts| verdicts.scan_prefix(start), visit);
        }
    }

    /// Changes the entries whose key begins so and for which `change` gives something; their keys.
    /// What is written meanwhile stays.
    pub fn change_beginning(
        &self,
        start: &[u8],
        change: impl Fn(Stored) -> Option<Stored>,
    ) -> Vec<VerdictKey> {
        let mut changed = Vec::new();
        let open = self.opened();
        let Some(open) = &*open else { return changed };
        let _ = self.told(guarded(|| {
            for item in open.verdicts.scan_prefix(start) {
                let (key, value) = item?;
                let new = decode(&value).and_then(&change).and_then(|new| serde_json::to_vec(&new).ok());
                if let (Ok(bytes), Some(new)) = (<[u8; 32]>::try_from(key.as_ref()), new) {
                    // Somebody else's value is later than this one.
                    let _ = open.verdicts.compare_and_swap(key, Some(value), Some(new))?;
                    changed.push(VerdictKey::from_bytes(bytes));
                }
            }
            open.verdicts.flush()
        }));
        changed
    }

    fn for_each_in(&self, keys: impl RangeBounds<[u8; 1]>, visit: impl FnMut(VerdictKey, Stored) -> bool) {
        self.for_each_of(&self.opened(), |verdicts| verdicts.range(keys), visit);
    }

    fn for_each_of(
        &self,
        open: &Option<Open>,
        which: impl FnOnce(&sled::Tree) -> sled::Iter,
        mut visit: impl FnMut(VerdictKey, Stored) -> bool,
    ) {
        let Some(open) = open else { return };
        let _ = self.told(guarded(|| {
            for item in which(&open.verdicts) {
                let (key, value) = item?;
                if let (Ok(key), Some(stored)) = (<[u8; 32]>::try_from(key.as_ref()), decode(&value))
                    && !visit(VerdictKey::from_bytes(key), stored)
                {
                    break;
                }
            }
            Ok(())
        }));
    }

    /// Drops the entries that `expired` picks among those whose key begins with `part`: reading
    /// them part by part keeps most of the store out of memory.
    pub fn sweep_part(&self, part: u8, expired: impl Fn(&Stored) -> bool) -> Vec<VerdictKey> {
        let mut doomed = Vec::new();
        let visit = |key, stored: Stored| {
            if expired(&stored) {
                doomed.push(key);
            }
            true
        };
        match part.checked_add(1) {
            Some(next) => self.for_each_in([part]..[next], visit),
            None => self.for_each_in([part].., visit),
        }
        doomed.iter().for_each(|key| self.remove(key));
        doomed
    }

    /// Drops the entries that `expired` picks, then the oldest beyond `max_entries`.
    pub fn sweep(&self, max_entries: usize, expired: impl Fn(&Stored) -> bool) -> Dropped {
        let mut dropped = Dropped::default();
        let mut kept = Vec::new();
        self.for_each(|key, stored| {
            match expired(&stored) {
                true => dropped.expired.push(key),
                false => kept.push((stored.judged_at_unix, key)),
            }
            true
        });
        let surplus = kept.len().saturating_sub(max_entries);
        kept.sort_unstable();
        dropped.surplus = kept.into_iter().take(surplus).map(|(_, key)| key).collect();
        for key in dropped.expired.iter().chain(&dropped.surplus) {
            self.remove(key);
        }
        dropped
    }

    /// Whether [`Self::entries`] is right: not after a crash, until [`Self::recount`].
    pub fn is_counted(&self) -> bool {
        self.is_counted.load(Ordering::Relaxed)
    }

    /// How many entries there are.
    pub fn entries(&self) -> usize {
        self.entries.load(Ordering::Relaxed)
    }

    /// Counts the entries by reading them all.
    pub fn recount(&self) {
        let counted =
            self.opened().as_ref().map_or(0, |open| guarded(|| Ok(open.verdicts.len())).unwrap_or(0));
        self.entries.store(counted, Ordering::Relaxed);
        self.is_counted.store(true, Ordering::Relaxed);
    }

    /// Bytes on disk.
    pub fn bytes(&self) -> u64 {
        self.opened().as_ref().map_or(0, |open| guarded(|| open.database.size_on_disk()).unwrap_or(0))
    }

    /// Writes everything out.
    pub fn flush(&self) {
        if let Some(open) = &*self.opened() {
            let entries = self.entries() as u64;
            let _ = self.told(guarded(|| {
                open.database.insert(ENTRIES_KEY, &entries.to_be_bytes())?;
                open.database.flush()
            }));
        }
    }

    /// Notes what went wrong.
    fn told<T>(&self, result: Result<T, Trouble>) -> Result<T, String> {
        result.map_err(|trouble| {
            let text = trouble.text.clone();
            *self.noted() = Some(trouble);
            text
        })
    }

    // Both locks guard single assignments, so they are whole even after a panic.

    fn opened(&self) -> RwLockReadGuard<'_, Option<Open>> {
        self.open.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn noted(&self) -> MutexGuard<'_, Option<Trouble>> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    pub(super) fn write_format(directory: &Path, format: &[u8]) {
        let database = sled::open(directory.join("verdicts")).unwrap();
        database.insert(FORMAT_KEY, format).unwrap();
        database.flush().unwrap();
    }
}

/// Opens the store at `path`; a damaged one is set aside and a new one begun.
fn open_or_begin(path: &Path, is_damaged: bool) -> Result<Open, Trouble> {
    let damage = match is_damaged {
        true => Trouble { text: "it could not be read while it was in use".into(), is_damage: true },
        false => match open(path) {
            // A lock held by a pullgate that is still draining, or no permission, is no damage.
            Err(trouble) if trouble.is_damage => trouble,
            other => return other,
        },
    };
    let aside = set_aside(path)?;
    tracing::error!(
        message_id = crate::audit::STORE_SET_ASIDE,
        store = %path.display(),
        aside = %aside.display(),
        error = %damage.text,
        "the verdict store could not be read; it was set aside and a new one begun",
    );
    open(path)
}

fn open(path: &Path) -> Result<Open, Trouble> {
    let config = sled::Config::new()
        .path(path)
        .cache_capacity(PAGE_CACHE)
        .mode(sled::Mode::LowSpace)
        .flush_every_ms(Some(500));
    let was_there = std::fs::metadata(path.join("db")).is_ok_and(|file| file.len() > 0);
    let opened = catch_unwind(AssertUnwindSafe(|| {
        let database = config.open()?;
        if was_there && !database.was_recovered() {
            // sled takes a file of which it can read nothing for a new one.
            return Ok(Err("nothing of it can be read"));
        }
        let verdicts = database.open_tree("verdicts")?;
        let format = database.get(FORMAT_KEY)?;
        if format.is_none() && verdicts.is_empty() {
            database.insert(FORMAT_KEY, FORMAT)?;
        }
        let is_ours = database.get(FORMAT_KEY)?.is_some_and(|f| f.as_ref() == FORMAT);
        Ok::<_, sled::Error>(match is_ours {
            true => {
                let count = take_count(&database, &verdicts)?;
                Ok(Open { database, verdicts, count })
            }
            false => Err("it has another format"),
        })
    }));
    match opened {
        Ok(Ok(Ok(open))) => Ok(open),
        Ok(Ok(Err(damage))) => Err(Trouble { text: damage.into(), is_damage: true }),
        Ok(Err(error)) => Err(Trouble {
            is_damage: !matches!(&error, sled::Error::Io(io) if io.kind() != std::io::ErrorKind::UnexpectedEof
                && io.kind() != std::io::ErrorKind::InvalidData),
            text: error.to_string(),
        }),
        Err(_) => Err(Trouble { text: "sled panicked on it".into(), is_damage: true }),
    }
}

/// The count that the last clean stop left, taken away: a crash leaves none. A new store has none
/// either, and nothing to count.
fn take_count(database: &sled::Db, verdicts: &sled::Tree) -> sled::Result<Option<usize>> {
    Ok(match database.remove(ENTRIES_KEY)? {
        Some(count) => <[u8; 8]>::try_from(count.as_ref())
            .ok()
            .and_then(|count| usize::try_from(u64::from_be_bytes(count)).ok()),
        None => verdicts.is_empty().then_some(0),
    })
}

/// Moves the store to `<path>.set-aside`, in place of an earlier one.
fn set_aside(path: &Path) -> Result<PathBuf, Trouble> {
    let aside = path.with_extension("set-aside");
    let moved = match std::fs::remove_dir_all(&aside) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => std::fs::rename(path, &aside),
    };
    match moved {
        Ok(()) => Ok(aside),
        Err(error) => Err(Trouble { text: format!("{}: {error}", path.display()), is_damage: false }),
    }
}

/// An entry that doesn't decode is as good as absent: it will be judged anew.
fn decode(value: &[u8]) -> Option<Stored> {
    serde_json::from_slice(value).ok()
}

fn guarded<T>(work: impl FnOnce() -> sled::Result<T>) -> Result<T, Trouble> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(Trouble {
            is_damage: matches!(error, sled::Error::Corruption { .. } | sled::Error::ReportableBug(_)),
            text: error.to_string(),
        }),
        // A full disk can make it panic, too: whether the files are damaged shows when they are
        // opened again.
        Err(_) => Err(Trouble { text: "sled panicked".into(), is_damage: false }),
    }
}
