//! Single flight: concurrent asks of one key share one piece of work.
//!
//! The work runs in a task of its own. It ends early only when nobody waits for it any more,
//! and nobody left it behind on purpose ([`Ticket::leave_running`]) to warm the store.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::AbortHandle;

/// The work under way, by key.
pub struct Flights<K, T> {
    runtime: Handle,
    under_way: Arc<Mutex<HashMap<K, Flight<T>>>>,
}

struct Flight<T> {
    result: watch::Receiver<Option<T>>,
    abort: AbortHandle,
    waiting: usize,
    keep: bool,
    /// Tells a finished flight from a newer one of the same key.
    serial: u64,
}

/// A place in the waiting room of one flight.
pub struct Ticket<K: Hash + Eq, T> {
    key: Option<K>,
    serial: u64,
    result: watch::Receiver<Option<T>>,
    under_way: Arc<Mutex<HashMap<K, Flight<T>>>>,
}

impl<K, T> Flights<K, T> {
    /// Nothing under way. Work runs on the runtime on which this is made, whoever asks for it.
    ///
    /// # Panics
    /// Outside of a tokio runtime, as `tokio::spawn`.
    pub fn here() -> Self {
        Self { runtime: Handle::current(), under_way: Arc::default() }
    }
}

impl<K, T> Flights<K, T>
where
    K: Hash + Eq + Clone + Send + 'static,
    T: Clone + Send + Sync + 'static,
{
    /// Joins the work for `key`, starting it if it is not under way. Says whether it joined.
    pub fn join<F>(&self, key: K, work: impl FnOnce() -> F) -> (Ticket<K, T>, bool)
    where
        F: Future<Output = T> + Send + 'static,
    {
        let mut under_way = lock(&self.under_way);
        let joined = under_way.contains_key(&key);
        let flight = under_way.entry(key.clone()).or_insert_with(|| self.start(key.clone(), work()));
        flight.waiting += 1;
        let ticket = Ticket {
            key: Some(key),
            serial: flight.serial,
            result: flight.result.clone(),
            under_way: Arc::clone(&self.under_way),
        };
        (ticket, joined)
    }

    fn start(&self, key: K, work: impl Future<Output = T> + Send + 'static) -> Flight<T> {
        static SERIAL: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
        let serial = SERIAL.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let (sender, result) = watch::channel(None);
        let under_way = Arc::clone(&self.under_way);
        let task = self.runtime.spawn(async move {
            let landing = Landing { under_way, key, serial };
            let answer = work.await;
            // Out of the map first: who asks after the answer starts anew (or finds it stored).
            drop(landing);
            sender.send_replace(Some(answer));
        });
        Flight { result, abort: task.abort_handle(), waiting: 0, keep: false, serial }
    }
}

/// Takes the flight out of the map when its task ends, also by panic or abort.
struct Landing<K: Hash + Eq, T> {
    under_way: Arc<Mutex<HashMap<K, Flight<T>>>>,
    key: K,
    serial: u64,
}

impl<K: Hash + Eq, T> Drop for Landing<K, T> {
    fn drop(&mut self) {
        let mut under_way = lock(&self.under_way);
        if under_way.get(&self.key).is_some_and(|f| f.serial == self.serial) {
            under_way.remove(&self.key);
        }
    }
}

impl<K: Hash + Eq, T: Clone> Ticket<K, T> {
    /// Waits for the answer; `None` when the work ended without one (it panicked).
    pub async fn wait(&mut self) -> Option<T> {
        match self.result.wait_for(Option::is_some).await {
            Ok(answer) => answer.clone(),
            Err(_) => None,
        }
    }

    /// Lets the work go on even if everybody goes away.
    pub fn keep_running(&self) {
        let mut under_way = lock(&self.under_way);
        if let Some(flight) = self.key.as_ref().and_then(|key| under_way.get_mut(key))
            && flight.serial == self.serial
        {
            flight.keep = true;
        }
    }

    /// Goes away, but lets the work go on.
    pub fn leave_running(mut self) {
        self.leave(true);
    }
}

impl<K: Hash + Eq, T> Ticket<K, T> {
    fn leave(&mut self, keep: bool) {
        let Some(key) = self.key.take() else { return };
        let mut under_way = lock(&self.under_way);
        let Some(flight) = under_way.get_mut(&key).filter(|f| f.serial == self.serial) else { return };
        flight.waiting -= 1;
        flight.keep |= keep;
        if flight.waiting == 0 && !flight.keep {
            flight.abort.abort();
            under_way.remove(&key);
        }
    }
}

impl<K: Hash + Eq, T> Drop for Ticket<K, T> {
    fn drop(&mut self) {
        self.leave(false);
    }
}

/// The map stays whole even if a holder panicked: every change to it is a single step.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::sync::{Notify, oneshot};

    use super::*;

    #[tokio::test]
    async fn a_hundred_asks_share_one_work() {
        let flights = Flights::<u8, usize>::here();
        let runs = Arc::new(AtomicUsize::new(0));
        let go = Arc::new(Notify::new());
        let mut tickets: Vec<_> = (0..100)
            .map(|_| {
                let (runs, go) = (runs.clone(), go.clone());
                flights
                    .join(1, move || async move {
                        go.notified().await;
                        runs.fetch_add(1, Ordering::SeqCst)
                    })
                    .0
            })
            .collect();
        go.notify_one();
        for ticket in &mut tickets {
            assert_eq!(ticket.wait().await, Some(0));
        }
        assert_eq!(runs.load(Ordering::SeqCst), 1);
    }

    #[tokio::test]
    async fn work_that_nobody_waits_for_is_cancelled() {
        let flights = Flights::<u8, ()>::here();
        let (dropped, was_dropped) = oneshot::channel::<()>();
        let work = || async move {
            let _dropped = dropped;
            std::future::pending::<()>().await;
        };
        let (first, joined) = flights.join(1, work);
        assert!(!joined);
        let (second, joined) = flights.join(1, || async {});
        assert!(joined);
        drop(first);
        assert_eq!(lock(&flights.under_way).len(), 1, "the second still waits");
        drop(second);
        assert!(was_dropped.await.is_err(), "the work was dropped");
        assert!(lock(&flights.under_way).is_empty());
    }

    #[tokio::test]
    async fn work_left_running_finishes() {
        let flights = Flights::<u8, ()>::here();
        let (finish, finished) = oneshot::channel();
        let go = Arc::new(Notify::new());
        let waiting = go.clone();
        let (ticket, _) = flights.join(1, || async move {
            waiting.notified().await;
            let _ = finish.send(());
        });
        ticket.leave_running();
        go.notify_one();
        finished.await.expect("it ran to its end");
    }

    #[tokio::test]
    async fn a_panic_is_no_answer_and_blocks_nobody() {
        let flights = Flights::<u8, ()>::here();
        let (mut ticket, _) = flights.join(1, || async { panic!("a bug") });
        assert_eq!(ticket.wait().await, None);
        drop(ticket);
        let (mut ticket, joined) = flights.join(1, || async {});
        assert!(!joined);
        assert_eq!(ticket.wait().await, Some(()));
    }
}
