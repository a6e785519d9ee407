//! The verdict store: a small memory tier in front of a sled tree.
//!
//! A verdict is keyed by everything that could change it ([`VerdictKey`]), so a changed rule,
//! key or engine never meets an old verdict, and an unchanged one keeps its verdicts across a
//! reload or a restart. Failures have no representation here.

mod disk;
mod entry;

use std::collections::HashSet;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, Weak};
use std::time::{Duration, SystemTime};

use quick_cache::sync::Cache;

pub use disk::Disk;
pub use entry::{Stored, Verdict, VerdictKey};

use crate::metrics::Metrics;

/// Entries in the memory tier: more images than a node runs, a few MiB.
const MEMORY_ENTRIES: usize = 4096;
/// A disk tier that failed is tried again after this long, until it works.
const MEND_PAUSE: Duration = Duration::from_secs(5);

/// A clock may be set back by so much without costing verdicts.
const CLOCK_STEP: Duration = Duration::from_secs(300);

/// How long verdicts count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lifetimes {
    /// An allow verdict stands this long.
    pub positive: Duration,
    /// A deny verdict stands this long.
    pub negative: Duration,
    /// Past `positive`, an allow verdict stands in for a failure this much longer.
    pub stale_grace: Duration,
}

/// What the store knows about a key.
#[derive(Clone, Debug)]
pub enum Found {
    /// A verdict within its lifetime, and the tier it came from.
    Fresh(Arc<Stored>, &'static str),
    /// An allow verdict past its lifetime but within the grace.
    Stale(Arc<Stored>),
    /// Nothing that counts.
    Nothing,
}

/// The store; shared by all requests.
pub struct VerdictStore {
    tiers: Arc<Tiers>,
    metrics: Arc<Metrics>,
    /// Counts the purges; held while one runs.
    purges: RwLock<u64>,
}

struct Tiers {
    memory: Cache<VerdictKey, Arc<Stored>>,
    disk: Disk,
    /// Whether somebody is at it already.
    mending: AtomicBool,
}

impl VerdictStore {
    /// Opens the store under `directory`. A corrupt or foreign store is set aside; while the
    /// disk can't be used the memory tier works alone (see [`Self::trouble`]).
    pub fn open(directory: &Path, metrics: Arc<Metrics>) -> Self {
        let store = Self::on(Disk::open(directory), metrics);
        store.mend();
        store
    }

    /// A store that forgets at exit, for one-shot commands.
    pub fn in_memory(metrics: Arc<Metrics>) -> Self {
        Self::on(Disk::none(), metrics)
    }

    fn on(disk: Disk, metrics: Arc<Metrics>) -> Self {
        let memory = Cache::new(MEMORY_ENTRIES);
        Self {
            tiers: Arc::new(Tiers { memory, disk, mending: AtomicBool::new(false) }),
            metrics,
            purges: RwLock::default(),
        }
    }

    /// Sees to it that a disk tier in trouble is tried again until it works: a full disk is
    /// cleaned up some day, and a pullgate that is still draining lets go of its lock.
    fn mend(&self) {
        let tiers = &self.tiers;
        if tiers.disk.trouble().is_none() || tiers.mending.swap(true, Ordering::AcqRel) {
            return;
        }
        let patient = Arc::downgrade(tiers);
        let started = std::thread::Builder::new().name("mend-store".into()).spawn(|| mend(patient));
        if let Err(error) = started {
            tiers.mending.store(false, Ordering::Release);
            tracing::warn!(%error, "the disk tier can't be mended just now");
        }
    }

    /// Looks `key` up in memory.
    pub fn find_in_memory(&self, key: &VerdictKey, lifetimes: &Lifetimes) -> Found {
        self.counted(self.tiers.memory.get(key), "memory", lifetimes)
    }

    /// Looks `key` up on disk, after memory; what is there is in memory from then on. Blocks for as
    /// long as the disk does.
    pub fn find_on_disk(&self, key: &VerdictKey, lifetimes: &Lifetimes) -> Found {
        self.counted(self.load(key), "disk", lifetimes)
    }

    fn counted(&self, stored: Option<Arc<Stored>>, tier: &'static str, lifetimes: &Lifetimes) -> Found {
        let found = stored.map_or(Found::Nothing, |stored| match age(&stored, lifetimes) {
            Age::Fresh => Found::Fresh(stored, tier),
            Age::Stale => Found::Stale(stored),
            Age::Over => Found::Nothing,
        });
        let outcome = match found {
            Found::Fresh(..) => "hit",
            Found::Stale(_) => "stale",
            Found::Nothing => "miss",
        };
        self.metrics.cache_request(tier, outcome);
        found
    }

    /// How often verdicts have been purged, once none is being purged: what was read before a purge
    /// must not be written after it.
    pub fn purges(&self) -> u64 {
        *self.not_purging()
    }

    fn not_purging(&self) -> RwLockReadGuard<'_, u64> {
        self.purges.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// An allow verdict within its lifetime, if memory holds one. It does not count as a look-up.
    pub fn recall(&self, key: &VerdictKey, lifetimes: &Lifetimes) -> Option<Arc<Stored>> {
        let stored = self.tiers.memory.get(key)?;
        (stored.is_allow() && Self::is_fresh(&stored, lifetimes)).then_some(stored)
    }

    /// The allow verdicts about the same digest of the same repository under other rules or keys,
    /// the newest first, as long as they count for anything.
    pub fn kin(&self, key: &VerdictKey, lifetimes: &Lifetimes) -> Vec<Stored> {
        let mut kin = Vec::new();
        self.tiers.disk.for_each_beginning(key.subject(), |other, stored| {
            if other != *key && stored.is_allow() && !Self::is_over(&stored, lifetimes) {
                kin.push(stored);
            }
            true
        });
        kin.sort_unstable_by_key(|stored| std::cmp::Reverse(stored.judged_at_unix));
        kin
    }

    /// Takes the evidence from every verdict about the same digest of the same repository: it has
    /// been disproved. Blocks for as long as the disk does.
    pub fn drop_evidence(&self, key: &VerdictKey) {
        let without = |stored: Stored| Stored { evidence: Vec::new(), ..stored };
        let stripped = self
            .tiers
            .disk
            .change_beginning(key.subject(), |stored| (!stored.evidence.is_empty()).then(|| without(stored)));
        for other in stripped {
            if let Some(held) = self.tiers.memory.get(&other) {
                self.tiers.memory.insert(other, Arc::new(without((*held).clone())));
            }
        }
    }

    /// Whether a verdict stands on its own, and not only where a failure needs it to.
    pub fn is_fresh(stored: &Stored, lifetimes: &Lifetimes) -> bool {
        age(stored, lifetimes) == Age::Fresh
    }

    fn load(&self, key: &VerdictKey) -> Option<Arc<Stored>> {
        let _still = self.not_purging();
        let Some(stored) = self.tiers.disk.get(key) else {
            self.mend();
            return None;
        };
        Some(self.recover(*key, stored))
    }

    /// [`Self::persist`], unless something was purged since there had been `purges` of them.
    pub fn persist_since(&self, purges: u64, key: &VerdictKey, stored: &Stored) {
        let now = self.not_purging();
        if *now == purges {
            self.persist(key, stored);
        }
    }

    /// [`Self::recover`], unless something is being purged, or was since there had been `purges`.
    pub fn recover_since(&self, purges: u64, key: VerdictKey, stored: Stored) -> Option<Arc<Stored>> {
        let now = self.purges.try_read().ok()?;
        (*now == purges).then(|| self.recover(key, stored))
    }

    /// Remembers a verdict of earlier in memory, unless there is one as late. Gives the one that is
    /// there.
    fn recover(&self, key: VerdictKey, stored: Stored) -> Arc<Stored> {
        let later = |held: &Arc<Stored>| held.judged_at_unix >= stored.judged_at_unix;
        let held = self.tiers.memory.get(&key).filter(later);
        held.unwrap_or_else(|| self.remember(key, stored))
    }

    /// Remembers a verdict in memory, at once. [`Self::persist`] writes it out.
    pub fn remember(&self, key: VerdictKey, stored: Stored) -> Arc<Stored> {
        let stored = Arc::new(stored);
        self.tiers.memory.insert(key, Arc::clone(&stored));
        stored
    }

    /// Writes a verdict to disk; blocks for as long as the disk does. A disk that can't be
    /// written is a metric and a warning, never a reason to refuse (notation-go CVE-2024-51491).
    pub fn persist(&self, key: &VerdictKey, stored: &Stored) {
        if let Err(error) = self.tiers.disk.put(key, stored) {
            self.metrics.cache_write_errors.inc();
            tracing::warn!(%error, "a verdict could not be written to disk; it is kept in memory");
            self.mend();
        }
    }

    /// Drops what no longer counts, and the oldest beyond `max_entries`.
    pub fn sweep(&self, lifetimes: &Lifetimes, max_entries: usize) {
        let dropped = self.tiers.disk.sweep(max_entries, |stored| Self::is_over(stored, lifetimes));
        self.evicted("expired", &dropped.expired);
        self.evicted("capacity", &dropped.surplus);
        self.recount();
        self.count_entries();
    }

    /// Counts the entries on disk by reading them all.
    pub fn recount(&self) {
        self.tiers.disk.recount();
    }

    /// Counts them if that is still to be done: after a crash.
    pub fn count_once(&self) {
        if !self.tiers.disk.is_counted() {
            self.recount();
        }
    }

    /// Drops what no longer counts among one 256th of the entries.
    pub fn sweep_part(&self, part: u8, lifetimes: &Lifetimes) {
        let dropped = self.tiers.disk.sweep_part(part, |stored| Self::is_over(stored, lifetimes));
        self.evicted("expired", &dropped);
    }

    fn is_over(stored: &Stored, lifetimes: &Lifetimes) -> bool {
        age(stored, lifetimes) == Age::Over
    }

    fn evicted(&self, cause: &str, keys: &[VerdictKey]) {
        keys.iter().for_each(|key| drop(self.tiers.memory.remove(key)));
        self.metrics.cache_evictions.with_label_values(&["disk", cause]).inc_by(keys.len() as u64);
    }

    /// Updates the entry gauges.
    pub fn count_entries(&self) {
        let entries = &self.metrics.cache_entries;
        entries.with_label_values(&["memory"]).set(self.tiers.memory.len() as i64);
        entries.with_label_values(&["disk"]).set(self.tiers.disk.entries() as i64);
    }

    /// Every verdict, until `visit` says stop: those in memory, of which a full disk may not hold
    /// all, then the others on disk.
    pub fn for_each(&self, mut visit: impl FnMut(VerdictKey, Stored) -> bool) {
        let mut seen = HashSet::new();
        for (key, stored) in self.tiers.memory.iter() {
            if !visit(key, (*stored).clone()) {
                return;
            }
            seen.insert(key);
        }
        self.tiers.disk.for_each(|key, stored| seen.contains(&key) || visit(key, stored));
    }

    /// Forgets the verdicts that `doomed` picks; how many they were.
    pub fn purge(&self, mut doomed: impl FnMut(&Stored) -> bool) -> usize {
        let mut purges = self.purges.write().unwrap_or_else(PoisonError::into_inner);
        *purges += 1;
        let mut keys = Vec::new();
        self.for_each(|key, stored| {
            if doomed(&stored) {
                keys.push(key);
            }
            true
        });
        for key in &keys {
            self.tiers.memory.remove(key);
            self.tiers.disk.remove(key);
        }
        self.count_entries();
        keys.len()
    }

    /// Verdicts in memory and on disk, and bytes on disk.
    pub fn size(&self) -> (usize, usize, u64) {
        (self.tiers.memory.len(), self.tiers.disk.entries(), self.tiers.disk.bytes())
    }

    /// Why verdicts are not kept on disk, if they are not.
    pub fn trouble(&self) -> Option<String> {
        self.tiers.disk.trouble()
    }

    /// Writes everything out.
    pub fn flush(&self) {
        self.tiers.disk.flush();
    }
}

/// Tries again and again until the disk tier works, and writes out what memory holds meanwhile.
fn mend(patient: Weak<Tiers>) {
    loop {
        // A thread of its own, which blocks nobody.
        #[allow(clippy::disallowed_methods)]
        std::thread::sleep(MEND_PAUSE);
        let Some(tiers) = patient.upgrade() else { return };
        if !tiers.disk.reopen() {
            continue;
        }
        let written = tiers.memory.iter().try_for_each(|(key, stored)| tiers.disk.put(&key, &stored));
        if written.is_ok() {
            tiers.disk.recount();
            tracing::info!("verdicts are kept on disk again");
            tiers.mending.store(false, Ordering::Release);
            return;
        }
    }
}

/// What a verdict counts for, by its age.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Age {
    /// It stands.
    Fresh,
    /// It stands in for a failure.
    Stale,
    /// It counts for nothing.
    Over,
}

fn age(stored: &Stored, lifetimes: &Lifetimes) -> Age {
    // A verdict from the future was reached under a wrong clock: nobody knows how old it is.
    let age = match SystemTime::now().duration_since(stored.judged_at()) {
        Ok(age) => age,
        Err(ahead) if ahead.duration() < CLOCK_STEP => Duration::ZERO,
        Err(_) => return Age::Over,
    };
    let lifetime = if stored.is_allow() { lifetimes.positive } else { lifetimes.negative };
    match stored.is_allow() {
        _ if age < lifetime => Age::Fresh,
        true if age < lifetime.saturating_add(lifetimes.stale_grace) => Age::Stale,
        _ => Age::Over,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verdict::DenyReason;

    const LIFETIMES: Lifetimes = Lifetimes {
        positive: Duration::from_secs(100),
        negative: Duration::from_secs(10),
        stale_grace: Duration::from_secs(50),
    };

    fn key(n: u8) -> VerdictKey {
        VerdictKey::from_bytes([n; 32])
    }

    fn aged(mut stored: Stored, seconds: i64) -> Stored {
        stored.judged_at_unix = stored.judged_at_unix.saturating_add_signed(-seconds);
        stored
    }

    fn open(directory: &Path) -> VerdictStore {
        VerdictStore::open(directory, Arc::new(Metrics::new().unwrap()))
    }

    fn keep(store: &VerdictStore, key: VerdictKey, stored: Stored) {
        store.persist(&key, &store.remember(key, stored));
    }

    fn find(store: &VerdictStore, key: &VerdictKey, lifetimes: &Lifetimes) -> Found {
        match store.find_in_memory(key, lifetimes) {
            Found::Nothing => store.find_on_disk(key, lifetimes),
            found => found,
        }
    }

    fn allow() -> Stored {
        Stored::example_allow("host/a", "sha256:00")
    }

    fn deny() -> Stored {
        Stored::example_deny("host/a", "sha256:00", DenyReason::Unsigned)
    }

    #[test]
    fn lifetimes_differ_and_only_an_allow_has_a_grace() {
        let store = VerdictStore::in_memory(Arc::new(Metrics::new().unwrap()));
        let cases = [
            (allow(), 99, "fresh"),
            (allow(), 101, "stale"),
            (allow(), 151, "nothing"),
            (deny(), 9, "fresh"),
            (deny(), 11, "nothing"),
            (allow(), -1, "fresh"),
            (allow(), -301, "nothing"),
        ];
        for (n, (stored, age, expected)) in cases.into_iter().enumerate() {
            keep(&store, key(n as u8), aged(stored, age));
            let found = match find(&store, &key(n as u8), &LIFETIMES) {
                Found::Fresh(..) => "fresh",
                Found::Stale(_) => "stale",
                Found::Nothing => "nothing",
            };
            assert_eq!(found, expected, "case {n}");
        }
    }

    #[test]
    fn a_restart_forgets_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let store = open(directory.path());
        keep(&store, key(1), allow());
        store.flush();
        drop(store);
        let store = open(directory.path());
        assert!(matches!(find(&store, &key(1), &LIFETIMES), Found::Fresh(_, "disk")));
        assert!(matches!(find(&store, &key(1), &LIFETIMES), Found::Fresh(_, "memory")));
    }

    #[test]
    fn a_corrupt_store_is_set_aside_and_a_new_one_works() {
        let directory = tempfile::tempdir().unwrap();
        let store = open(directory.path());
        for n in 0..100 {
            keep(&store, key(n), allow());
        }
        store.flush();
        drop(store);
        for file in ["db", "conf"] {
            let path = directory.path().join("verdicts").join(file);
            let length = std::fs::metadata(&path).unwrap().len() as usize;
            std::fs::write(&path, vec![0x5a; length]).unwrap();
        }
        let store = open(directory.path());
        assert!(store.trouble().is_none());
        assert!(matches!(find(&store, &key(1), &LIFETIMES), Found::Nothing));
        keep(&store, key(1), allow());
        assert!(directory.path().join("verdicts.set-aside").exists());
    }

    #[test]
    fn another_format_is_set_aside() {
        let directory = tempfile::tempdir().unwrap();
        let store = open(directory.path());
        keep(&store, key(1), allow());
        drop(store);
        Disk::write_format(directory.path(), b"0");
        let store = open(directory.path());
        assert!(matches!(find(&store, &key(1), &LIFETIMES), Found::Nothing));
    }

    #[test]
    fn the_sweep_drops_what_expired_and_then_the_oldest() {
        let directory = tempfile::tempdir().unwrap();
        let store = open(directory.path());
        keep(&store, key(0), aged(allow(), 151));
        for n in 1..=10 {
            keep(&store, key(n), aged(allow(), 100 - i64::from(n)));
        }
        store.sweep(&LIFETIMES, 4);
        let mut left = Vec::new();
        store.for_each(|key, _| {
            left.push(key.as_bytes()[0]);
            true
        });
        left.sort_unstable();
        assert_eq!(left, [7, 8, 9, 10]);
    }

    #[test]
    fn the_sweep_by_parts_drops_what_expired_and_keeps_count() {
        let directory = tempfile::tempdir().unwrap();
        let store = open(directory.path());
        for n in [0, 7, 255] {
            keep(&store, key(n), aged(allow(), 151));
            keep(&store, VerdictKey::from_bytes([n, 1].repeat(16).try_into().unwrap()), allow());
        }
        assert_eq!(store.size().1, 6);
        for part in [0, 255] {
            store.sweep_part(part, &LIFETIMES);
        }
        assert_eq!(store.size().1, 4);
        let mut left = Vec::new();
        store.for_each(|key, _| {
            left.push(key.as_bytes()[1]);
            true
        });
        left.sort_unstable();
        assert_eq!(left, [1, 1, 1, 7], "only the expired one of part 7 is left");
        store.flush();
        drop(store);
        assert_eq!(open(directory.path()).size().1, 4, "the count outlives a restart");
    }

    #[test]
    fn kin_are_the_allow_verdicts_about_the_same_digest_of_the_same_repository() {
        let directory = tempfile::tempdir().unwrap();
        let store = open(directory.path());
        let digest = |text: &str| crate::digest::Digest::sha256(text.as_bytes());
        let about = |name: &str, digest: &crate::digest::Digest, rule: u8| {
            let reference = crate::reference::Reference::parse(name).unwrap();
            VerdictKey::new(&reference.repository, digest, &[rule; 32])
        };
        let (one, other) = (digest("one"), digest("other"));
        let asked = about("host.lan/a", &one, 1);
        keep(&store, asked, allow());
        keep(&store, about("host.lan/a", &one, 2), aged(allow(), 120));
        keep(&store, about("host.lan/a", &one, 3), aged(allow(), 20));
        keep(&store, about("host.lan/a", &one, 4), deny());
        keep(&store, about("host.lan/a", &one, 5), aged(allow(), 151));
        keep(&store, about("host.lan/a", &other, 2), allow());
        keep(&store, about("host.lan/b", &one, 2), allow());
        let now = SystemTime::now();
        let age = |stored: Stored| now.duration_since(stored.judged_at()).unwrap_or_default().as_secs() / 10;
        let ages: Vec<u64> = store.kin(&asked, &LIFETIMES).into_iter().map(age).collect();
        assert_eq!(ages, [2, 12]);
    }

    #[test]
    fn after_a_crash_the_entries_are_counted_anew() {
        let directory = tempfile::tempdir().unwrap();
        let store = open(directory.path());
        (0..3).for_each(|n| keep(&store, key(n), allow()));
        store.flush();
        drop(store);
        let store = open(directory.path());
        assert_eq!(store.size().1, 3);
        (3..5).for_each(|n| keep(&store, key(n), allow()));
        // Without `flush`, as after a crash.
        drop(store);
        let store = open(directory.path());
        assert!(!store.tiers.disk.is_counted());
        store.count_once();
        assert_eq!(store.size().1, 5);
    }

    #[test]
    fn what_was_disproved_is_no_evidence_any_more() {
        let directory = tempfile::tempdir().unwrap();
        let store = open(directory.path());
        let reference = crate::reference::Reference::parse("host.lan/a").unwrap();
        let digest = crate::digest::Digest::sha256(b"a");
        let [asked, other] = [1, 2].map(|rule| VerdictKey::new(&reference.repository, &digest, &[rule; 32]));
        let evidence = vec![crate::verify::signature::Candidate {
            payload: bytes::Bytes::from_static(b"payload"),
            signature: "signature".into(),
        }];
        keep(&store, other, Stored { evidence: evidence.clone(), ..allow() });
        assert_eq!(store.kin(&asked, &LIFETIMES)[0].evidence, evidence);
        store.drop_evidence(&asked);
        assert_eq!(store.kin(&asked, &LIFETIMES)[0].evidence, []);
    }

    #[test]
    fn purge_forgets_in_both_tiers() {
        let directory = tempfile::tempdir().unwrap();
        let store = open(directory.path());
        keep(&store, key(1), allow());
        keep(&store, key(2), Stored::example_allow("host/b", "sha256:00"));
        assert_eq!(store.purge(|stored| stored.repository == "host/a"), 1);
        assert!(matches!(find(&store, &key(1), &LIFETIMES), Found::Nothing));
        assert!(matches!(find(&store, &key(2), &LIFETIMES), Found::Fresh(..)));
    }

    #[test]
    fn a_directory_that_cannot_be_used_leaves_the_memory_tier() {
        let directory = tempfile::tempdir().unwrap();
        let blocked = directory.path().join("file");
        std::fs::write(&blocked, b"not a directory").unwrap();
        let store = open(&blocked);
        assert!(store.trouble().is_some());
        keep(&store, key(1), allow());
        assert!(matches!(find(&store, &key(1), &LIFETIMES), Found::Fresh(_, "memory")));
        // What is in memory only is listed, and purged, like everything else.
        assert_eq!(store.purge(|_| true), 1);
        assert!(matches!(find(&store, &key(1), &LIFETIMES), Found::Nothing));
    }

    /// An upgrade: the old process still drains when the new one starts.
    #[test]
    fn a_store_that_another_holds_is_opened_once_it_lets_go() {
        let directory = tempfile::tempdir().unwrap();
        let old = open(directory.path());
        keep(&old, key(1), allow());
        let new = open(directory.path());
        assert!(new.trouble().is_some_and(|trouble| trouble.contains("lock")), "{:?}", new.trouble());
        assert!(!directory.path().join("verdicts.set-aside").exists());
        keep(&new, key(2), allow());
        drop(old);
        // What the mender does, without its pause.
        assert!(new.tiers.disk.reopen());
        for (key, stored) in new.tiers.memory.iter() {
            new.tiers.disk.put(&key, &stored).unwrap();
        }
        assert!(new.trouble().is_none());
        for n in [1, 2] {
            assert!(matches!(find(&new, &key(n), &LIFETIMES), Found::Fresh(..)), "{n}");
        }
        new.tiers.disk.recount();
        assert_eq!(new.size().1, 2);
    }
}
