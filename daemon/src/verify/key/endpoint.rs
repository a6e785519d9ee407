//! One KMS endpoint in one Region: how it is asked, and when it is left alone.

use std::time::{Duration, Instant};

use aws_config::{BehaviorVersion, Region, retry::RetryConfig, timeout::TimeoutConfig};
use aws_sdk_kms::Client;
use aws_sdk_kms::config::http::HttpResponse;
use aws_sdk_kms::error::{ProvideErrorMetadata, SdkError};
use backon::{ExponentialBuilder, Retryable as _};

use crate::breaker::Breaker;
use crate::budget::Budget;
use crate::metrics::Metrics;
use crate::verdict::{Failure, FailureReason};

pub(super) const CONNECT_LIMIT: Duration = Duration::from_secs(2);
/// Time for one request, connection included.
const REQUEST_LIMIT: Duration = Duration::from_secs(4);
/// Tries of one question in the last Region that can answer it.
pub(super) const TRIES: usize = 3;
/// After this long no further try is begun.
const TRIES_LIMIT: Duration = Duration::from_secs(3);

/// An endpoint, shared by all keys that are there.
pub(super) struct Endpoint {
    client: Client,
    breaker: Breaker,
    budget: Budget,
}

/// Why one request failed. The text names no key: the breaker repeats it to others.
#[derive(Debug, Clone)]
pub(super) struct Fault {
    pub(super) failure: Failure,
    /// Passes by itself, and quickly.
    again: bool,
    /// The endpoint is at fault, not this key or this request.
    away: bool,
}

impl Endpoint {
    /// The endpoint at `url`, or AWS's own of the Region.
    pub(super) async fn new(
        region: String,
        url: Option<String>,
        requests_per_second: u32,
        metrics: &Metrics,
    ) -> Self {
        let timeouts = TimeoutConfig::builder()
            .connect_timeout(CONNECT_LIMIT)
            .operation_attempt_timeout(REQUEST_LIMIT)
            .build();
        // Tries are made here, each under breaker and budget.
        let mut loader = aws_config::defaults(BehaviorVersion::latest())
            .region(Region::new(region))
            .retry_config(RetryConfig::disabled())
            .timeout_config(timeouts);
        if let Some(url) = url {
            loader = loader.endpoint_url(url);
        }
        Self {
            client: Client::new(&loader.load().await),
            breaker: Breaker::new(metrics.breakers_open.with_label_values(&["kms"])),
            budget: Budget::new(requests_per_second),
        }
    }

    /// Asks, again if need be.
    pub(super) async fn ask<T, F>(
        &self,
        operation: &'static str,
        tries: usize,
        metrics: &Metrics,
        call: impl Fn(Client) -> F,
    ) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, Fault>>,
    {
        let started = Instant::now();
        let backoff = ExponentialBuilder::new()
            .with_min_delay(Duration::from_millis(200))
            .with_max_times(tries.saturating_sub(1))
            .with_jitter();
        (|| self.guarded(operation, metrics, &call))
            .retry(backoff)
            .when(|fault| fault.again && started.elapsed() < TRIES_LIMIT)
            .await
            .map_err(|fault| fault.failure)
    }

    /// One request under breaker, budget and metrics.
    async fn guarded<T, F>(
        &self,
        operation: &'static str,
        metrics: &Metrics,
        call: &impl Fn(Client) -> F,
    ) -> Result<T, Fault>
    where
        F: Future<Output = Result<T, Fault>>,
    {
        let permit = self.breaker.admit().map_err(Fault::lasting)?;
        self.budget.take().await;
        let started = Instant::now();
        let result = call(self.client.clone()).await;
        let outcome = result.as_ref().map_or_else(|fault| fault.failure.reason.code(), |_| "ok");
        metrics.kms_request(operation, outcome, started.elapsed());
        match &result {
            Err(fault) if fault.away => permit.failed(&fault.failure),
            _ => permit.succeeded(),
        }
        result
    }
}

impl Fault {
    /// A failure that another try would not change, and that is not the endpoint's.
    pub(super) fn lasting(failure: Failure) -> Self {
        Self { failure, again: false, away: false }
    }

    /// What the SDK reports. KMS' error code says what happened; its message may hold request
    /// ids, so it is left out.
    pub(super) fn of<E: ProvideErrorMetadata>(operation: &str, error: &SdkError<E, HttpResponse>) -> Self {
        let (what, again) = match error {
            SdkError::ServiceError(service) => {
                // Codes are names such as AccessDeniedException; anything else is not repeated.
                let code =
                    service.err().code().filter(|code| code.bytes().all(|b| b.is_ascii_alphanumeric()));
                let code = code.unwrap_or("an unknown error");
                if is_throttling(code) {
                    let failure = FailureReason::KmsThrottled.because(format!("{operation} is throttled"));
                    return Self { failure, again: true, away: false };
                }
                let its_own = service.raw().status().is_server_error();
                let failure = unavailable(&format!("{operation} answers {code}"));
                // A key that is disabled or forbidden is not away.
                let failure = if its_own { failure } else { failure.by_refusal() };
                return Self { failure, again: its_own, away: its_own };
            }
            SdkError::ConstructionFailure(_) => ("no AWS credentials or Region were found", false),
            SdkError::DispatchFailure(failure) if failure.is_other() => {
                ("no AWS credentials were found, or the request could not be sent", false)
            }
            SdkError::DispatchFailure(failure) => ("KMS can't be reached", !failure.is_timeout()),
            SdkError::TimeoutError(_) => ("KMS can't be reached", false),
            _ => ("KMS can't be reached", true),
        };
        Self { failure: unavailable(what), again, away: true }
    }
}

/// `kms-unavailable`.
pub(super) fn unavailable(what: &str) -> Failure {
    FailureReason::KmsUnavailable.because(what)
}

fn is_throttling(code: &str) -> bool {
    code.starts_with("Throttling")
        || matches!(code, "TooManyRequestsException" | "LimitExceededException" | "RequestLimitExceeded")
}
