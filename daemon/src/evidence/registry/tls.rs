//! How hosts are connected to: one warm connection pool for each distinct TLS configuration.

use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use reqwest::{Certificate, Client, Identity};
use sha2::{Digest as _, Sha256};
use url::{Host, Url};

use super::hosts::{cannot_read, read_file};
use crate::verdict::{Failure, FailureReason};

/// Time for a connection, TLS handshake included, unless `dial_timeout` says otherwise.
pub(super) const CONNECT_LIMIT: Duration = Duration::from_secs(3);
/// Pools kept; past it (certificates that rotate) all are made anew.
const POOLS: usize = 64;

/// What `ca`, `client`, `skip_verify` and `dial_timeout` of a host say, files read.
#[derive(Clone)]
pub(super) struct Tls {
    /// Trusted beside the system's roots.
    ca: Vec<u8>,
    /// Certificate and key in PEM. Of several pairs the first is used.
    identity: Option<Vec<u8>>,
    skip_verify: bool,
    connect_limit: Duration,
    /// The same for the same configuration.
    key: [u8; 32],
}

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    /// `registry-unavailable`, naming the file that can't be read or holds no certificate.
    pub(super) fn read(
        ca: &[PathBuf],
        client: Option<&(PathBuf, Option<PathBuf>)>,
        skip_verify: bool,
        dial_timeout: Option<Duration>,
    ) -> Result<Self, Failure> {
        let read = |path: &Path| read_file(path).map_err(|kind| cannot_read(path, kind));
        let mut roots = Vec::new();
        for path in ca {
            let pem = read(path)?;
            if !Certificate::from_pem_bundle(&pem).is_ok_and(|certificates| !certificates.is_empty()) {
                return Err(unusable(path, "no certificate"));
            }
            roots.extend(pem);
            roots.push(b'\n');
        }
        let mut identity = None;
        if let Some((certificate, key)) = client {
            let mut pem = read(certificate)?;
            if let Some(key) = key {
                pem.push(b'\n');
                pem.extend(read(key)?);
            }
            Identity::from_pem(&pem).map_err(|_| unusable(certificate, "no certificate with its key"))?;
            identity = Some(pem);
        }
        let connect_limit = dial_timeout.unwrap_or(CONNECT_LIMIT);
        let key = Sha256::new()
            .chain_update(Sha256::digest(&roots))
            .chain_update(Sha256::digest(identity.as_deref().unwrap_or_default()))
            .chain_update([u8::from(skip_verify)])
            .chain_update(connect_limit.as_nanos().to_be_bytes())
            .finalize()
            .into();
        Ok(Self { ca: roots, identity, skip_verify, connect_limit, key })
    }

    /// A client for this configuration; `direct` goes past any proxy of the environment.
    fn client(&self, direct: bool, roots: Roots) -> Result<Client, reqwest::Error> {
        let mut builder = Client::builder()
            .user_agent(concat!("pullgate/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            .referer(false)
            .connect_timeout(self.connect_limit)
            .tls_danger_accept_invalid_certs(self.skip_verify);
        if roots == Roots::None {
            builder = builder.tls_certs_only(std::iter::empty());
        } else if !self.ca.is_empty() {
            builder = builder.tls_certs_merge(Certificate::from_pem_bundle(&self.ca)?);
        }
        if let Some(identity) = &self.identity {
            builder = builder.identity(Identity::from_pem(identity)?);
        }
        if direct {
            builder = builder.no_proxy();
        }
        builder.build()
    }
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls")
            .field("ca", &!self.ca.is_empty())
            .field("identity", &self.identity.is_some())
            .field("skip_verify", &self.skip_verify)
            .field("connect_limit", &self.connect_limit)
            .finish()
    }
}

/// Which certificates are trusted, besides those of the configuration.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Roots {
    System,
    None,
}

/// The clients, each with its connections.
#[derive(Default)]
pub(super) struct Pools {
    clients: Mutex<HashMap<([u8; 32], bool), Client>>,
}

impl Pools {
    /// The client for `url` under this TLS configuration. Loopback is never asked through a
    /// proxy, as in Go's `http.ProxyFromEnvironment`.
    ///
    /// # Errors
    /// `registry-unavailable` when the system's trust roots can't be loaded.
    pub(super) fn client(&self, tls: &Tls, url: &Url) -> Result<Client, Failure> {
        let key = (tls.key, is_loopback(url));
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = clients.get(&key) {
            return Ok(client.clone());
        }
        // Plain HTTP must work on a machine without any CA certificate; TLS then trusts nobody.
        let without = |error| match url.scheme() {
            "http" => tls.client(key.1, Roots::None),
            _ => Err(error),
        };
        let roots = if tls.skip_verify { Roots::None } else { Roots::System };
        let client = tls.client(key.1, roots).or_else(without).map_err(|_| {
            FailureReason::RegistryUnavailable
                .because("TLS can't be set up: check the system's CA certificates (SSL_CERT_FILE)")
        })?;
        if clients.len() >= POOLS {
            clients.clear();
        }
        clients.insert(key, client.clone());
        Ok(client)
    }
}

fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(Host::Ipv4(ip)) => IpAddr::V4(ip).is_loopback(),
        Some(Host::Ipv6(ip)) => IpAddr::V6(ip).is_loopback(),
        Some(Host::Domain(name)) => name == "localhost",
        None => false,
    }
}

fn unusable(path: &Path, what: &str) -> Failure {
    FailureReason::RegistryUnavailable.because(format!("{} holds {what} that can be used", path.display()))
}
