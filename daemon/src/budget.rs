//! A budget of requests a second: what one node may ask of registries, or of KMS.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// A token bucket that holds one second's worth. Callers over the budget wait their turn.
#[derive(Debug)]
pub struct Budget {
    interval: Duration,
    /// When the bucket will be full again.
    full_at: Mutex<Instant>,
}

impl Budget {
    /// `per_second` requests a second; 0 is no limit.
    pub fn new(per_second: u32) -> Self {
        let interval = Duration::from_secs(1).checked_div(per_second).unwrap_or_default();
        Self { interval, full_at: Mutex::new(Instant::now()) }
    }

    /// Waits until one more request may be sent.
    pub async fn take(&self) {
        if self.interval.is_zero() {
            return;
        }
        if let Some(at) = self.reserve(Instant::now()) {
            tokio::time::sleep_until(at).await;
        }
    }

    /// Takes the next place; when it is, if not now.
    fn reserve(&self, now: Instant) -> Option<Instant> {
        let mut full_at = self.full_at.lock().unwrap_or_else(PoisonError::into_inner);
        *full_at = (*full_at).max(now) + self.interval;
        // A second's worth may go at once.
        full_at.checked_sub(Duration::from_secs(1)).filter(|&at| at > now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_s_worth_goes_at_once_and_the_rest_waits() {
        let (budget, now) = (Budget::new(10), Instant::now());
        for _ in 0..10 {
            assert_eq!(budget.reserve(now), None);
        }
        for waiting in 1..=20 {
            assert_eq!(budget.reserve(now), Some(now + Duration::from_millis(100) * waiting));
        }
        let later = now + Duration::from_secs(4);
        assert_eq!(budget.reserve(later), None);
    }

    #[tokio::test]
    async fn zero_is_no_limit() {
        let budget = Budget::new(0);
        for _ in 0..1000 {
            budget.take().await;
        }
    }
}
