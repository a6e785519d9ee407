//! One question to one host: tries, redirects, time limit, size cap. What the answer means is
//! for the callers.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use backon::{ExponentialBuilder, Retryable as _};
use bytes::{Bytes, BytesMut};
use http::header::{AUTHORIZATION, LOCATION, RETRY_AFTER};
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use tokio::time::Instant;
use url::Url;

use super::fault::{Fault, place, unavailable};
use super::tls::{Pools, Tls};
use crate::breaker::Breaker;
use crate::budget::Budget;
use crate::metrics::Metrics;
use crate::verdict::Failure;

/// Time for one request, from the connection to the last byte: less than a pull's usual deadline, so
/// that a registry that says nothing is told as such.
pub(super) const REQUEST_LIMIT: Duration = Duration::from_secs(7);
/// Tries of one question to the last host that can answer it.
pub(super) const TRIES: usize = 3;
/// After this long no further try is begun.
const TRIES_LIMIT: Duration = Duration::from_secs(3);
/// A `Retry-After` up to this long is waited for.
const LONGEST_WAIT: Duration = Duration::from_secs(5);
const REDIRECTS: usize = 5;
/// This much of an error's body is read, so that the connection can be used again.
const DRAIN: u64 = 16 << 10;
/// How long it is known whether a host that may speak either speaks https or http.
const SCHEME_KNOWN: Duration = Duration::from_secs(60);
/// Origins remembered.
const ORIGINS: usize = 256;

/// What is asked for, as the metrics name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Resolve,
    Manifest,
    Blob,
    Token,
}

impl Operation {
    const fn label(self) -> &'static str {
        match self {
            Self::Resolve => "resolve",
            Self::Manifest => "manifest",
            Self::Blob => "blob",
            Self::Token => "token",
        }
    }
}

/// One question. No `Debug`: it holds credentials.
#[derive(Clone)]
pub(super) struct Ask<'a> {
    pub(super) operation: Operation,
    pub(super) method: Method,
    pub(super) url: Url,
    pub(super) accept: &'static str,
    /// Headers of hosts.toml: for this host only, dropped when a redirect leads elsewhere.
    pub(super) headers: &'a HeaderMap,
    /// For this host only, too.
    pub(super) authorization: Option<HeaderValue>,
    /// A form to post. Redirects are then not followed.
    pub(super) form: Option<String>,
    pub(super) tls: &'a Tls,
    pub(super) https_first: bool,
    /// Bytes of the body at most.
    pub(super) limit: u64,
    pub(super) tries: usize,
}

/// What came back: any status but 429, 5xx and redirects. No `Debug`: see `url`.
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: Body,
    /// What answered. Not to be shown: a redirect's query holds a signature.
    pub(super) url: Url,
    /// Another than was asked.
    pub(super) is_redirected: bool,
}

impl Answer {
    /// Who answered: `host:port`.
    pub(super) fn place(&self) -> String {
        place(&self.url)
    }
}

/// A body under the cap, or the knowledge that it is over it.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Body {
    Whole(Bytes),
    TooLarge,
}

/// Sends questions.
pub(super) struct Client {
    pools: Pools,
    budget: Budget,
    metrics: Arc<Metrics>,
    breakers: Mutex<HashMap<String, Arc<Breaker>>>,
    /// Of hosts that are tried with https first, by their http origin: the scheme they speak.
    schemes: Mutex<HashMap<String, (&'static str, Instant)>>,
}

impl Client {
    pub(super) fn new(requests_per_second: u32, metrics: Arc<Metrics>) -> Self {
        Self {
            pools: Pools::default(),
            budget: Budget::new(requests_per_second),
            metrics,
            breakers: Mutex::default(),
            schemes: Mutex::default(),
        }
    }

    /// Asks, again if need be, following redirects.
    ///
    /// # Errors
    /// `registry-throttled` for 429; `registry-unavailable` for 5xx, everything that goes wrong
    /// on the way, redirects that must not be followed, and an open breaker.
    pub(super) async fn send(&self, ask: &Ask<'_>) -> Result<Answer, Failure> {
        let start = Instant::now();
        let backoff = ExponentialBuilder::new()
            .with_min_delay(Duration::from_millis(100))
            .with_max_times(ask.tries.saturating_sub(1))
            .with_jitter();
        (|| self.follow(ask))
            .retry(backoff)
            .when(|fault| fault.again && start.elapsed() < TRIES_LIMIT)
            .adjust(|fault, delay| match (delay, fault.after) {
                (Some(_), Some(after)) => (after <= LONGEST_WAIT).then_some(after),
                (delay, _) => delay,
            })
            .await
            .map_err(|fault| fault.failure)
    }

    /// One try, redirects included (distribution-spec, "Pulling blobs": 307 and the like).
    async fn follow(&self, ask: &Ask<'_>) -> Result<Answer, Fault> {
        let mut ask = ask.clone();
        let mut is_redirected = false;
        let no_headers = HeaderMap::new();
        for _ in 0..=REDIRECTS {
            let mut answer = if ask.https_first && !is_redirected && ask.url.scheme() == "http" {
                self.https_then_http(&ask).await?
            } else {
                self.exchange(&ask).await?
            };
            answer.is_redirected = is_redirected;
            if !is_redirect(answer.status) || ask.form.is_some() {
                return Ok(answer);
            }
            if answer.url.scheme() == "https" && ask.url.set_scheme("https").is_err() {
                return Ok(answer);
            }
            let target = target(&ask.url, &answer.headers).map_err(Fault::lasting)?;
            if target.origin() != ask.url.origin() {
                is_redirected = true;
                ask.authorization = None;
                ask.headers = &no_headers;
            }
            ask.url = target;
        }
        Err(Fault::lasting(unavailable(&ask.url, "redirects without end")))
    }

    /// containerd's `NewHTTPFallback`: a host configured for http, with TLS settings, is tried
    /// with https; what it speaks is remembered.
    async fn https_then_http(&self, ask: &Ask<'_>) -> Result<Answer, Fault> {
        let key = ask.url.origin().ascii_serialization();
        let mut tls = ask.clone();
        if tls.url.set_scheme("https").is_err() {
            return self.exchange(ask).await;
        }
        let schemes = || self.schemes.lock().unwrap_or_else(PoisonError::into_inner);
        let known =
            schemes().get(&key).filter(|(_, at)| at.elapsed() < SCHEME_KNOWN).map(|(scheme, _)| *scheme);
        let remember = |scheme| {
            let mut schemes = schemes();
            if schemes.len() >= ORIGINS {
                schemes.clear();
            }
            schemes.insert(key.clone(), (scheme, Instant::now()));
        };
        match known {
            Some("https") => return self.exchange(&tls).await,
            Some(_) => return self.exchange(ask).await,
            None => {}
        }
        let has_port = ask.url.port().is_some();
        let speaks_http = |fault: &Fault| fault.is_plain_http || (fault.is_connect && !has_port);
        match self.guarded(&tls, speaks_http).await {
            Err(fault) if speaks_http(&fault) => {
                remember("http");
                self.exchange(ask).await
            }
            Err(fault) => Err(fault),
            Ok(answer) => {
                remember("https");
                Ok(answer)
            }
        }
    }

    async fn exchange(&self, ask: &Ask<'_>) -> Result<Answer, Fault> {
        self.guarded(ask, |_| false).await
    }

    /// One request under breaker, budget and metrics. A fault that is `expected` counts as none.
    async fn guarded(&self, ask: &Ask<'_>, expected: impl Fn(&Fault) -> bool) -> Result<Answer, Fault> {
        let breaker = self.breaker(&ask.url);
        let permit = breaker.admit().map_err(Fault::lasting)?;
        self.budget.take().await;
        let start = Instant::now();
        let result = self.within_limit(ask).await.and_then(|answer| judged(&ask.url, answer));
        if result.as_ref().is_err_and(expected) {
            permit.succeeded();
            return result;
        }
        let outcome = match &result {
            Ok(answer) if answer.status == StatusCode::NOT_FOUND => "not_found",
            Ok(answer) if matches!(answer.status.as_u16(), 401 | 403) => "registry-auth",
            Ok(answer) if answer.status.is_success() || is_redirect(answer.status) => "ok",
            Ok(_) => "registry-unavailable",
            Err(fault) => fault.failure.reason.code(),
        };
        self.metrics.registry_request(ask.operation.label(), outcome, start.elapsed());
        match &result {
            Err(fault) if outcome == "registry-unavailable" => permit.failed(&fault.failure),
            _ => permit.succeeded(),
        }
        result
    }

    async fn within_limit(&self, ask: &Ask<'_>) -> Result<Answer, Fault> {
        let exchange = self.bare_exchange(ask);
        tokio::time::timeout(REQUEST_LIMIT, exchange).await.unwrap_or_else(|_| Err(Fault::silent(&ask.url)))
    }

    async fn bare_exchange(&self, ask: &Ask<'_>) -> Result<Answer, Fault> {
        let client = self.pools.client(ask.tls, &ask.url).map_err(Fault::lasting)?;
        let mut headers = ask.headers.clone();
        headers.insert(http::header::ACCEPT, HeaderValue::from_static(ask.accept));
        if let Some(authorization) = &ask.authorization {
            headers.insert(AUTHORIZATION, authorization.clone());
        }
        let mut request = client.request(ask.method.clone(), ask.url.clone());
        if let Some(form) = &ask.form {
            let form_type = HeaderValue::from_static("application/x-www-form-urlencoded");
            headers.insert(http::header::CONTENT_TYPE, form_type);
            request = request.body(form.clone());
        }
        let fault = |error: reqwest::Error| Fault::transport(&ask.url, &error);
        let mut response = request.headers(headers).send().await.map_err(fault)?;
        let status = response.status();
        let body = if status.is_success() {
            read(&mut response, ask.limit).await.map_err(fault)?
        } else {
            // Its content does not matter, nor what goes wrong with it.
            let _ = read(&mut response, DRAIN).await;
            Body::Whole(Bytes::new())
        };
        let headers = std::mem::take(response.headers_mut());
        Ok(Answer { status, headers, body, url: ask.url.clone(), is_redirected: false })
    }

    fn breaker(&self, url: &Url) -> Arc<Breaker> {
        let mut breakers = self.breakers.lock().unwrap_or_else(PoisonError::into_inner);
        let key = url.origin().ascii_serialization();
        if let Some(breaker) = breakers.get(&key) {
            return breaker.clone();
        }
        // Redirects and token realms are named by registries: they may not fill the memory.
        if breakers.len() >= ORIGINS {
            breakers.retain(|_, breaker| !breaker.is_idle());
        }
        if breakers.len() >= ORIGINS {
            breakers.clear();
        }
        let gauge = self.metrics.breakers_open.with_label_values(&["registry"]);
        breakers.entry(key).or_insert_with(|| Arc::new(Breaker::new(gauge))).clone()
    }
}

/// 429 and 5xx are failures whatever was asked.
fn judged(url: &Url, answer: Answer) -> Result<Answer, Fault> {
    if answer.status != StatusCode::TOO_MANY_REQUESTS && !answer.status.is_server_error() {
        return Ok(answer);
    }
    let after = answer.headers.get(RETRY_AFTER).and_then(|value| retry_after(value.to_str().ok()?));
    Err(Fault::status(url, answer.status, after))
}

/// Seconds or a date (RFC 9110, 10.2.3).
fn retry_after(value: &str) -> Option<Duration> {
    if let Ok(seconds) = value.trim().parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = httpdate::parse_http_date(value.trim()).ok()?;
    Some(date.duration_since(SystemTime::now()).unwrap_or_default())
}

fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

/// Where a redirect leads: http(s) only, and never from https to http.
fn target(from: &Url, headers: &HeaderMap) -> Result<Url, Failure> {
    let location = headers.get(LOCATION).and_then(|value| value.to_str().ok());
    let target = location.and_then(|location| from.join(location).ok());
    let Some(mut target) = target.filter(|url| url.has_host()) else {
        return Err(unavailable(from, "redirects to what is not a URL"));
    };
    match (from.scheme(), target.scheme()) {
        (_, "https") | ("http", "http") => {}
        _ => return Err(unavailable(from, "redirects from https to a less secure place")),
    }
    // Sent as they are, these would become an Authorization header.
    if target.set_username("").is_err() || target.set_password(None).is_err() {
        return Err(unavailable(from, "redirects to what is not a URL"));
    }
    target.set_fragment(None);
    Ok(target)
}

/// Reads `limit` bytes at most; one more and it is too large.
async fn read(response: &mut reqwest::Response, limit: u64) -> Result<Body, reqwest::Error> {
    if response.content_length().is_some_and(|length| length > limit) {
        return Ok(Body::TooLarge);
    }
    let mut bytes = BytesMut::new();
    while let Some(chunk) = response.chunk().await? {
        if bytes.len() as u64 + chunk.len() as u64 > limit {
            return Ok(Body::TooLarge);
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(Body::Whole(bytes.freeze()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        assert_eq!(retry_after("3"), Some(Duration::from_secs(3)));
        assert_eq!(retry_after("Thu, 01 Jan 1970 00:00:00 GMT"), Some(Duration::ZERO));
        let soon = httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(100));
        assert!(retry_after(&soon).is_some_and(|d| d > Duration::from_secs(90)));
        assert_eq!(retry_after("soon"), None);
    }

    #[test]
    fn redirects_never_lead_from_https_to_http_nor_elsewhere() {
        let from = Url::parse("https://registry.example.com/v2/a/blobs/x").unwrap();
        let headers = |location: &str| HeaderMap::from_iter([(LOCATION, location.parse().unwrap())]);
        for location in
            ["http://cdn.example.com/x", "ftp://cdn/x", "file:///etc/shadow", "https://", "data:,x"]
        {
            let failure = target(&from, &headers(location)).unwrap_err();
            assert!(failure.found.starts_with("registry.example.com redirects"), "{failure:?}");
        }
        assert!(target(&from, &HeaderMap::new()).is_err());
    }

    #[test]
    fn user_information_of_a_redirect_is_dropped() {
        let from = Url::parse("https://registry.example.com/v2/").unwrap();
        let headers =
            HeaderMap::from_iter([(LOCATION, "https://u:p@cdn.example.com/x?sig=1".parse().unwrap())]);
        assert_eq!(target(&from, &headers).unwrap().as_str(), "https://cdn.example.com/x?sig=1");
    }
}
