//! The shared work behind one verdict: the disk, then stored evidence, then the network.

use std::sync::Arc;
use std::time::Duration;

use prometheus::IntGauge;
use tokio::sync::Semaphore;

use super::judgement::CacheState;
use super::timeout;
use super::verification::Verification;
use crate::metrics::Metrics;
use crate::store::{Found, Lifetimes, Stored, VerdictKey, VerdictStore};
use crate::verdict::Failure;

/// Work that outlived its callers is given up after this long.
const LONGEST: Duration = Duration::from_secs(30);

/// A verdict, and where it came from.
pub type Verified = Result<(Arc<Stored>, CacheState), Failure>;

/// All that the work needs, owned: it may outlive its callers.
pub struct Work {
    pub store: Arc<VerdictStore>,
    pub metrics: Arc<Metrics>,
    /// The question.
    pub key: VerdictKey,
    pub lifetimes: Lifetimes,
    pub verification: Verification,
    /// The places of its registry.
    pub at_registry: Arc<Semaphore>,
    /// The places of all registries together.
    pub at_once: Arc<Semaphore>,
}

enum OnDisk {
    Verdict(Arc<Stored>, &'static str),
    /// Verdicts on the same image under other rules or keys.
    Kin(Vec<Stored>),
}

/// One more in a gauge, for as long as it lives: also when its task is cancelled.
struct Counted<'a>(&'a IntGauge);

impl<'a> Counted<'a> {
    fn up(gauge: &'a IntGauge) -> Self {
        gauge.inc();
        Self(gauge)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl Work {
    /// Does it.
    pub async fn run(self) -> Verified {
        let purges = self.store.purges();
        let kin = match self.look_on_disk().await {
            OnDisk::Verdict(stored, tier) => return Ok((stored, CacheState::Hit(tier))),
            OnDisk::Kin(kin) => kin,
        };
        if let Some(stored) = self.try_evidence(&kin, purges).await {
            return Ok((stored, CacheState::Hit("evidence")));
        }
        let verdict = self.ask_network().await?;
        if !verdict.is_allow() {
            self.drop_evidence().await;
        }
        let stored = self.store.remember(self.key, verdict);
        self.persist(purges, &stored);
        Ok((stored, CacheState::Miss))
    }

    async fn look_on_disk(&self) -> OnDisk {
        let (store, key, lifetimes) = (Arc::clone(&self.store), self.key, self.lifetimes);
        let look = move || match store.find_on_disk(&key, &lifetimes) {
            Found::Fresh(stored, tier) => OnDisk::Verdict(stored, tier),
            // A stale one is in memory now, should the network fail.
            Found::Stale(_) | Found::Nothing => OnDisk::Kin(store.kin(&key, &lifetimes)),
        };
        // It ends early only with the daemon.
        tokio::task::spawn_blocking(look).await.unwrap_or(OnDisk::Kin(Vec::new()))
    }

    /// A fresh verdict worked out from what others rest on. A stale one only stays in memory, should
    /// the network fail.
    async fn try_evidence(&self, kin: &[Stored], purges: u64) -> Option<Arc<Stored>> {
        let reworked = self.verification.rework(kin).await;
        // What was purged meanwhile must not come back.
        let stored = reworked.and_then(|stored| self.store.recover_since(purges, self.key, stored));
        let fresh = stored.filter(|s| s.is_allow() && VerdictStore::is_fresh(s, &self.lifetimes));
        self.metrics.cache_request("evidence", if fresh.is_some() { "hit" } else { "miss" });
        fresh.inspect(|stored| self.persist(purges, stored))
    }

    async fn ask_network(&self) -> Result<Stored, Failure> {
        let verified = async {
            // The semaphores are never closed; without a permit nothing is verified.
            let _place = self.at_registry.acquire().await.map_err(|_| timeout())?;
            let _permit = self.at_once.acquire().await.map_err(|_| timeout())?;
            let _counted = Counted::up(&self.metrics.in_flight);
            self.verification.run().await
        };
        tokio::time::timeout(LONGEST, verified).await.unwrap_or_else(|_| Err(timeout()))
    }

    /// A denial disproves what earlier verdicts about the same image rest on.
    async fn drop_evidence(&self) {
        let (store, key) = (Arc::clone(&self.store), self.key);
        // It ends early only with the daemon.
        let _ = tokio::task::spawn_blocking(move || store.drop_evidence(&key)).await;
    }

    /// Writes a verdict out.
    fn persist(&self, purges: u64, stored: &Arc<Stored>) {
        let (store, key, stored) = (Arc::clone(&self.store), self.key, Arc::clone(stored));
        tokio::task::spawn_blocking(move || store.persist_since(purges, &key, &stored));
    }
}
