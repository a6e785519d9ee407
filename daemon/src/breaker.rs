//! A circuit breaker: an endpoint that keeps failing is left alone for a while.
//!
//! After [`THRESHOLD`] failures in a row the breaker opens for a second, then lets one request
//! through; each failed probe doubles the wait, up to [`LONGEST`]. While it is open, callers
//! get the failure that was seen last, word for word: the kubelet shows a reason only while
//! every try says the same.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use prometheus::IntGauge;

use crate::verdict::Failure;

/// Failures in a row that open the breaker.
pub const THRESHOLD: u32 = 5;
/// How long it stays open the first time.
pub const SHORTEST: Duration = Duration::from_secs(1);
/// How long it stays open at most.
pub const LONGEST: Duration = Duration::from_secs(30);

/// The breaker of one endpoint.
#[derive(Debug)]
pub struct Breaker {
    state: Mutex<State>,
    open: IntGauge,
}

#[derive(Debug, Clone)]
enum State {
    Closed {
        failures: u32,
    },
    Open {
        until: Instant,
        wait: Duration,
        last: Failure,
    },
    /// Half open: one request is on its way, the others are turned back.
    Probing {
        since: Instant,
        wait: Duration,
        last: Failure,
    },
}

/// Leave for one request. What became of it must be told; a permit that is dropped untold (the
/// caller's deadline passed) counts as neither.
#[derive(Debug)]
#[must_use = "tell the breaker what became of the request"]
pub struct Permit<'a> {
    breaker: &'a Breaker,
    probe: bool,
}

impl Breaker {
    /// A closed breaker. `open` counts the breakers of its kind that are open
    /// (`pullgate_breakers_open{dependency}`).
    pub fn new(open: IntGauge) -> Self {
        Self { state: Mutex::new(State::Closed { failures: 0 }), open }
    }

    /// Leave to send one request.
    ///
    /// # Errors
    /// The failure that was seen last, while the breaker is open.
    pub fn admit(&self) -> Result<Permit<'_>, Failure> {
        self.admit_at(Instant::now())
    }

    fn admit_at(&self, now: Instant) -> Result<Permit<'_>, Failure> {
        let mut state = self.state();
        match &*state {
            State::Closed { .. } => Ok(Permit { breaker: self, probe: false }),
            State::Open { until, wait, last } if *until <= now => {
                *state = State::Probing { since: now, wait: *wait, last: last.clone() };
                Ok(Permit { breaker: self, probe: true })
            }
            State::Open { last, .. } | State::Probing { last, .. } => Err(last.clone()),
        }
    }

    /// Whether nothing would be lost by forgetting this breaker.
    pub fn is_idle(&self) -> bool {
        matches!(*self.state(), State::Closed { failures: 0 })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Breaker {
    fn drop(&mut self) {
        if !matches!(*self.state(), State::Closed { .. }) {
            self.open.dec();
        }
    }
}

impl Permit<'_> {
    /// The endpoint answered.
    pub fn succeeded(mut self) {
        self.probe = false;
        let mut state = self.breaker.state();
        if !matches!(*state, State::Closed { .. }) {
            self.breaker.open.dec();
        }
        *state = State::Closed { failures: 0 };
    }

    /// The endpoint failed.
    pub fn failed(self, failure: &Failure) {
        self.failed_at(failure, Instant::now());
    }

    fn failed_at(mut self, failure: &Failure, now: Instant) {
        let probe = std::mem::replace(&mut self.probe, false);
        let mut state = self.breaker.state();
        let wait = match &*state {
            State::Closed { failures } if failures + 1 < THRESHOLD => {
                *state = State::Closed { failures: failures + 1 };
                return;
            }
            State::Closed { .. } => {
                self.breaker.open.inc();
                SHORTEST
            }
            State::Probing { wait, .. } if probe => (*wait * 2).min(LONGEST),
            // Sent before the breaker opened: already counted.
            State::Open { .. } | State::Probing { .. } => return,
        };
        *state = State::Open { until: now + wait, wait, last: failure.clone() };
    }
}

impl Drop for Permit<'_> {
    /// A probe that was given up leaves room for the next one.
    fn drop(&mut self) {
        if !self.probe {
            return;
        }
        let mut state = self.breaker.state();
        if let State::Probing { since, wait, last } = &*state {
            *state = State::Open { until: *since, wait: *wait, last: last.clone() };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verdict::FailureReason;

    fn breaker() -> Breaker {
        Breaker::new(IntGauge::new("open", "open").unwrap())
    }

    fn failure(text: &str) -> Failure {
        FailureReason::RegistryUnavailable.because(text)
    }

    /// Opens it at `now`.
    fn open(breaker: &Breaker, now: Instant) {
        for _ in 0..THRESHOLD {
            breaker.admit_at(now).unwrap().failed_at(&failure("away"), now);
        }
    }

    #[test]
    fn five_failures_in_a_row_open_it_with_the_last_text() {
        let breaker = breaker();
        for _ in 1..THRESHOLD {
            breaker.admit().unwrap().failed(&failure("away"));
        }
        breaker.admit().unwrap().failed(&failure("gone"));
        assert_eq!(breaker.admit().unwrap_err(), failure("gone"));
        assert_eq!(breaker.open.get(), 1);
    }

    #[test]
    fn a_success_between_failures_starts_the_count_again() {
        let breaker = breaker();
        for _ in 0..3 {
            for _ in 1..THRESHOLD {
                breaker.admit().unwrap().failed(&failure("away"));
            }
            breaker.admit().unwrap().succeeded();
        }
        assert!(breaker.is_idle());
    }

    #[test]
    fn half_open_lets_one_through_and_its_success_closes() {
        let (breaker, now) = (breaker(), Instant::now());
        open(&breaker, now);
        let later = now + SHORTEST;
        let probe = breaker.admit_at(later).unwrap();
        assert_eq!(breaker.admit_at(later).unwrap_err(), failure("away"));
        probe.succeeded();
        assert!(breaker.admit_at(later).is_ok());
        assert_eq!(breaker.open.get(), 0);
    }

    #[test]
    fn failed_probes_double_the_wait_up_to_thirty_seconds() {
        let (breaker, mut now) = (breaker(), Instant::now());
        open(&breaker, now);
        let mut wait = SHORTEST;
        for _ in 0..8 {
            now += wait;
            assert!(breaker.admit_at(now - Duration::from_millis(1)).is_err());
            breaker.admit_at(now).unwrap().failed_at(&failure("away"), now);
            wait = (wait * 2).min(LONGEST);
        }
        assert_eq!(wait, LONGEST);
        assert_eq!(breaker.open.get(), 1);
    }

    #[test]
    fn an_abandoned_probe_makes_room_for_the_next() {
        let (breaker, now) = (breaker(), Instant::now());
        open(&breaker, now);
        drop(breaker.admit_at(now + SHORTEST).unwrap());
        breaker.admit_at(now + SHORTEST).unwrap().succeeded();
    }

    #[test]
    fn a_request_from_before_the_opening_does_not_lengthen_it() {
        let (breaker, now) = (breaker(), Instant::now());
        let early = breaker.admit_at(now).unwrap();
        open(&breaker, now);
        early.failed_at(&failure("late"), now + SHORTEST);
        assert!(breaker.admit_at(now + SHORTEST).is_ok());
    }

    #[test]
    fn a_forgotten_breaker_is_not_counted_as_open() {
        let breaker = breaker();
        let gauge = breaker.open.clone();
        open(&breaker, Instant::now());
        drop(breaker);
        assert_eq!(gauge.get(), 0);
    }
}
