//! Why one request failed, in words that are the same for the same cause.
//!
//! The texts are made of fixed phrases and the host (`host:port`). Nothing of an
//! error's own text is repeated: those hold URLs with tokens, times and ephemeral ports.

use std::error::Error;
use std::io;
use std::time::Duration;

use http::StatusCode;
use rustls::CertificateError;
use url::Url;

use super::client::REQUEST_LIMIT;
use crate::verdict::{Failure, FailureReason};

/// Why one request failed, and whether another try makes sense.
#[derive(Debug, Clone)]
pub(super) struct Fault {
    pub(super) failure: Failure,
    /// Passes by itself, and quickly.
    pub(super) again: bool,
    /// How long the server asks us to wait.
    pub(super) after: Option<Duration>,
    /// TLS was begun with a server that speaks plain HTTP.
    pub(super) is_plain_http: bool,
    /// No connection came about.
    pub(super) is_connect: bool,
}

impl Fault {
    /// A failure that another try would not change.
    pub(super) fn lasting(failure: Failure) -> Self {
        Self { failure, again: false, after: None, is_plain_http: false, is_connect: false }
    }

    /// No answer within the time limit.
    pub(super) fn silent(url: &Url) -> Self {
        let limit = REQUEST_LIMIT.as_secs();
        Self::lasting(unavailable(url, &format!("gives no complete answer within {limit} s")))
    }

    /// What `reqwest` reports: connecting, TLS, sending, receiving.
    pub(super) fn transport(url: &Url, error: &reqwest::Error) -> Self {
        let is_timeout = error.is_timeout();
        let tls = find::<rustls::Error>(error);
        let is_plain_http = matches!(tls, Some(rustls::Error::InvalidMessage(_)));
        let phrase = if let Some(tls) = tls {
            tls_phrase(tls)
        } else if error.is_dns() {
            "can't be reached: no such host name is known"
        } else if is_timeout {
            "can't be reached: no connection within the time limit"
        } else if error.is_connect() {
            connect_phrase(find::<io::Error>(error).map(io::Error::kind))
        } else {
            "breaks off the connection before the answer is complete"
        };
        Self {
            failure: unavailable(url, phrase),
            again: !is_timeout && tls.is_none(),
            after: None,
            is_plain_http,
            is_connect: error.is_connect(),
        }
    }

    /// 429 and 5xx.
    pub(super) fn status(url: &Url, status: StatusCode, after: Option<Duration>) -> Self {
        let failure = if status == StatusCode::TOO_MANY_REQUESTS {
            FailureReason::RegistryThrottled.because(format!("{} asks to slow down (429)", place(url)))
        } else {
            unavailable(url, &format!("answers with the error {}", status.as_u16()))
        };
        Self { again: true, after, ..Self::lasting(failure) }
    }
}

/// Host and port: all of a URL that may be shown. Not the scheme: a host that is tried with
/// https before http would have two texts for one cause.
pub(super) fn place(url: &Url) -> String {
    let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
    format!("{}{port}", url.host_str().unwrap_or_default())
}

/// `registry-unavailable`: `<place> <phrase>`.
pub(super) fn unavailable(url: &Url, phrase: &str) -> Failure {
    FailureReason::RegistryUnavailable.because(format!("{} {phrase}", place(url)))
}

fn connect_phrase(kind: Option<io::ErrorKind>) -> &'static str {
    use io::ErrorKind::{ConnectionRefused, HostUnreachable, NetworkUnreachable, TimedOut};
    match kind {
        Some(ConnectionRefused) => "can't be reached: connection refused",
        Some(HostUnreachable | NetworkUnreachable) => "can't be reached: there is no route",
        Some(TimedOut) => "can't be reached: no connection within the time limit",
        _ => "can't be reached: the connection could not be set up",
    }
}

fn tls_phrase(error: &rustls::Error) -> &'static str {
    let rustls::Error::InvalidCertificate(certificate) = error else {
        return match error {
            rustls::Error::InvalidMessage(_) => "does not speak TLS",
            rustls::Error::AlertReceived(_) => "refuses the TLS handshake (is a client certificate needed?)",
            _ => "fails the TLS handshake",
        };
    };
    match certificate {
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            "shows a TLS certificate that has expired"
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "shows a TLS certificate that is not valid yet (is the node's clock right?)"
        }
        // The last two: the issuer bears a known authority's name, but it is another one.
        CertificateError::UnknownIssuer
        | CertificateError::BadSignature
        | CertificateError::UnsupportedSignatureAlgorithmForPublicKeyContext { .. } => {
            "shows a TLS certificate by an unknown authority: name its CA in hosts.toml (`ca`)"
        }
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            "shows a TLS certificate for another name"
        }
        CertificateError::Revoked => "shows a TLS certificate that was revoked",
        _ => "shows a TLS certificate that is not valid",
    }
}

/// The first error of type `T` among the causes. `io::Error` hides what it wraps from
/// `source()`, so it is opened.
fn find<'a, T: Error + 'static>(error: &'a (dyn Error + 'static)) -> Option<&'a T> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<T>() {
            return Some(found);
        }
        if let Some(inner) = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref)
            && let Some(found) = find::<T>(inner)
        {
            return Some(found);
        }
        next = error.source();
    }
    None
}
