//! The registry client: tags, manifests and blobs, from the hosts that containerd would ask.
//!
//! Whatever comes back by digest was hashed here. What a registry can't give is one of three
//! things: it is not there ([`FetchError::NotFound`]), it is not what it should be
//! ([`FetchError::Denied`], permanent), or nobody knows ([`FetchError::Failed`], transient).
//! Absence is told only when every host that may know said so.
//!
//! Texts name hosts, repositories and digests, and never a secret.

mod auth;
mod client;
mod credentials;
mod docker_config;
mod ecr;
mod fault;
mod hosts;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod tls;

use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{Method, StatusCode};

pub use self::credentials::{AuthConfig, Credentials};
pub use self::ecr::EcrSettings;

use self::auth::{Grants, Who};
use self::client::{Answer, Ask, Body, Client, Operation, TRIES};
use self::credentials::{Login, Secret, Source};
use self::docker_config::DockerConfigs;
use self::ecr::{Ecr, EcrRegistry};
use self::hosts::{Endpoint, Hosts};
use crate::digest::Digest;
use crate::metrics::Metrics;
use crate::reference::{Pointer, Repository};
use crate::verdict::{Denial, DenyReason, Failure, FailureReason};

/// What containerd asks for (`core/images`, `images.MediaType…`), in its order.
const MANIFESTS: &str = "application/vnd.docker.distribution.manifest.v2+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, \
    application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, */*";
/// Manifests that are read only for their digest (distribution-spec: registries take 4 MiB).
const LARGEST_MANIFEST: u64 = 4 << 20;

/// Where hosts and credentials are configured, and how much may be asked.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// containerd's `config_path`: `/etc/containerd/certs.d`.
    pub certs_d: PathBuf,
    /// Docker configuration files with credentials, such as `/var/lib/kubelet/config.json`.
    pub docker_configs: Vec<PathBuf>,
    /// Requests a second to all registries together; 0 is no limit.
    pub requests_per_second: u32,
    /// Amazon ECR.
    pub ecr: EcrSettings,
}

/// How one pull may reach its registry.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct Access {
    /// The pull's own credentials.
    pub credentials: Credentials,
    /// A registry for which nothing is configured is spoken to over http.
    pub plain_http: bool,
}

/// A manifest whose bytes have the digest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    /// The digest: the one that was asked for, or, by tag, that of the bytes (SHA-256).
    pub digest: Digest,
    /// `Content-Type` without parameters, as the registry says; empty where it says nothing.
    pub media_type: String,
    /// The bytes.
    pub bytes: Bytes,
}

/// Why something could not be fetched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FetchError {
    /// Every host that was asked says that there is no such thing; the name of the thing.
    NotFound(String),
    /// It is not what it should be: wrong bytes, wrong size, over a cap.
    Denied(Denial),
    /// It could not be asked for.
    Failed(Failure),
}

impl From<Denial> for FetchError {
    fn from(denial: Denial) -> Self {
        Self::Denied(denial)
    }
}

impl From<Failure> for FetchError {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

/// The registry client: one for the process, behind an `Arc`.
pub struct Registry {
    hosts: Hosts,
    docker_configs: DockerConfigs,
    ecr: Ecr,
    grants: Grants,
    client: Client,
}

/// What is wanted of a repository.
struct Want<'a> {
    operation: Operation,
    method: Method,
    /// `manifests/latest`, `blobs/sha256:…`.
    path: String,
    accept: &'static str,
    /// Only hosts with the capability `resolve` may say what a tag means.
    by_tag: bool,
    limit: u64,
    repository: &'a Repository,
    access: &'a Access,
}

impl Registry {
    /// A client; nothing is read or asked yet.
    pub fn new(settings: Settings, metrics: Arc<Metrics>) -> Self {
        Self {
            hosts: Hosts::new(settings.certs_d),
            docker_configs: DockerConfigs::new(settings.docker_configs),
            ecr: Ecr::new(settings.ecr, metrics.clone()),
            grants: Grants::default(),
            client: Client::new(settings.requests_per_second, metrics),
        }
    }

    /// The digest that a tag points to now: HEAD, or, where the registry does not say (or does
    /// not know HEAD), the hash of what GET brings (distribution-spec, "Checking if content
    /// exists", "Pulling manifests").
    ///
    /// # Errors
    /// See [`FetchError`]; `Denied` is `evidence-too-large` here.
    pub async fn resolve(
        &self,
        repository: &Repository,
        tag: &str,
        access: &Access,
    ) -> Result<Digest, FetchError> {
        let mut want = Want {
            operation: Operation::Resolve,
            method: Method::HEAD,
            path: format!("manifests/{tag}"),
            accept: MANIFESTS,
            by_tag: true,
            limit: LARGEST_MANIFEST,
            repository,
            access,
        };
        let name = || format!("{repository}:{tag}");
        let answer = self.fetch(&want, &name).await?;
        let told = answer.headers.get("docker-content-digest").and_then(|value| value.to_str().ok());
        if let Some(digest) =
            told.and_then(|digest| digest.parse().ok()).filter(|_| answer.status.is_success())
        {
            return Ok(digest);
        }
        want.method = Method::GET;
        let answer = self.fetch(&want, &name).await?;
        let bytes = whole(answer.body, LARGEST_MANIFEST, &name)?;
        Ok(Digest::sha256(&bytes))
    }

    /// A manifest of at most `limit` bytes.
    ///
    /// # Errors
    /// See [`FetchError`]; `Denied` is `malformed-evidence` for bytes with another digest, or
    /// `evidence-too-large`.
    pub async fn manifest(
        &self,
        repository: &Repository,
        at: &Pointer,
        limit: u64,
        access: &Access,
    ) -> Result<Manifest, FetchError> {
        let (by_tag, path) = match at {
            Pointer::Tag(tag) => (true, format!("manifests/{tag}")),
            Pointer::Digest(digest) => (false, format!("manifests/{digest}")),
        };
        let (operation, method, accept) = (Operation::Manifest, Method::GET, MANIFESTS);
        let want = Want { operation, method, path, accept, by_tag, limit, repository, access };
        let name = || match at {
            Pointer::Tag(tag) => format!("{repository}:{tag}"),
            Pointer::Digest(digest) => repository.at(digest),
        };
        let answer = self.fetch(&want, &name).await?;
        let content_type = answer.headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let media_type = content_type.and_then(|value| value.split(';').next()).unwrap_or_default();
        let media_type = media_type.trim().to_owned();
        let place = answer.place();
        let bytes = whole(answer.body, limit, &name)?;
        let digest = match at {
            Pointer::Tag(_) => Digest::sha256(&bytes),
            Pointer::Digest(digest) => checked(digest, &bytes, &place, &name)?,
        };
        Ok(Manifest { digest, media_type, bytes })
    }

    /// A blob whose descriptor says `size`, which may be `limit` at most.
    ///
    /// # Errors
    /// See [`FetchError`]; `Denied` is `malformed-evidence` for bytes of another size or digest,
    /// or `evidence-too-large`.
    pub async fn blob(
        &self,
        repository: &Repository,
        digest: &Digest,
        size: u64,
        limit: u64,
        access: &Access,
    ) -> Result<Bytes, FetchError> {
        let name = || repository.at(digest);
        if size > limit {
            return Err(too_large(limit, &name).into());
        }
        let path = format!("blobs/{digest}");
        let (operation, method, accept) = (Operation::Blob, Method::GET, "*/*");
        let want = Want { operation, method, path, accept, by_tag: false, limit: size, repository, access };
        let answer = self.fetch(&want, &name).await?;
        let place = answer.place();
        match answer.body {
            Body::Whole(bytes) if bytes.len() as u64 == size => {
                checked(digest, &bytes, &place, &name)?;
                Ok(bytes)
            }
            _ => {
                let found =
                    format!("the size of {} is not the {size} bytes that its descriptor says", name());
                Err(DenyReason::MalformedEvidence.because(found).into())
            }
        }
    }

    /// Asks the hosts in order until one has it: the answer is a success, or, to HEAD, a 405.
    async fn fetch(
        &self,
        want: &Want<'_>,
        name: &(impl Fn() -> String + Sync),
    ) -> Result<Answer, FetchError> {
        let registry = want.repository.registry();
        let endpoints = self.hosts.of(registry, want.access.plain_http).await?;
        let may = |endpoint: &&Endpoint| if want.by_tag { endpoint.resolves } else { endpoint.pulls };
        let able: Vec<_> = endpoints.iter().filter(may).collect();
        let mut failed = None;
        for (number, endpoint) in able.iter().enumerate() {
            // The next host is the next try; only the last one is asked again.
            let tries = if number + 1 == able.len() { TRIES } else { 1 };
            match self.ask(endpoint, want, tries).await {
                Ok(answer) if answer.status == StatusCode::NOT_FOUND => {}
                Ok(answer) => return Ok(answer),
                Err(failure) => failed = Some(failure),
            }
        }
        match failed {
            // Of several, the last: the registry itself rather than its mirrors.
            Some(failure) => Err(failure.into()),
            None if able.is_empty() => {
                let capability = if want.by_tag { "resolve" } else { "pull" };
                let found =
                    format!("no host with the capability `{capability}` is configured for {registry}");
                Err(FailureReason::RegistryUnavailable.because(found).into())
            }
            None => Err(FetchError::NotFound(name())),
        }
    }

    /// One host's answer: a success, a 404, or, to HEAD, a 405.
    async fn ask(&self, endpoint: &Endpoint, want: &Want<'_>, tries: usize) -> Result<Answer, Failure> {
        let mut login = self.login(endpoint, want).await?;
        let mut answer = self.ask_as(&login, endpoint, want, tries).await?;
        let ecr = EcrRegistry::parse(want.repository.registry()).filter(|_| login.source == Source::Ecr);
        if let Some(ecr) = ecr.filter(|_| is_refusal(&answer))
            && let Some(renewed) = self.ecr.renew(&ecr, &login.secret).await
        {
            login = renewed;
            answer = self.ask_as(&login, endpoint, want, tries).await?;
        }
        match answer.status {
            status if status.is_success() => Ok(answer),
            StatusCode::NOT_FOUND => Ok(answer),
            StatusCode::METHOD_NOT_ALLOWED if want.method == Method::HEAD => Ok(answer),
            _ if is_refusal(&answer) => {
                Err(Who { endpoint, repository: want.repository, login: &login }.refused(&answer))
            }
            status => {
                let found = format!("{} answers with the error {}", answer.place(), status.as_u16());
                Err(FailureReason::RegistryUnavailable.because(found))
            }
        }
    }

    async fn ask_as(
        &self,
        login: &Login,
        endpoint: &Endpoint,
        want: &Want<'_>,
        tries: usize,
    ) -> Result<Answer, Failure> {
        let who = Who { endpoint, repository: want.repository, login };
        let ask = Ask {
            operation: want.operation,
            method: want.method.clone(),
            url: endpoint.url(want.repository.registry(), want.repository.path(), &want.path),
            accept: want.accept,
            headers: &endpoint.headers,
            authorization: None,
            form: None,
            tls: &endpoint.tls,
            https_first: endpoint.https_first,
            limit: want.limit,
            tries,
        };
        self.grants.send(&self.client, &who, ask).await
    }

    /// The pull's credentials, ECR's, the node's Docker configuration's, or none.
    async fn login(&self, endpoint: &Endpoint, want: &Want<'_>) -> Result<Login, Failure> {
        if let Some(login) = want.access.credentials.login(&endpoint.base)? {
            return Ok(login);
        }
        if !endpoint.may_know_the_node() {
            return Ok(Login::ANONYMOUS);
        }
        let (registry, path) = (want.repository.registry(), want.repository.path());
        let ecr = match EcrRegistry::parse(registry) {
            Some(ecr) => Some(self.ecr.login(&ecr).await),
            None => None,
        };
        if let Some(Ok(login)) = ecr {
            return Ok(login);
        }
        let configured = self.docker_configs.login(registry, path).await;
        Ok(match (configured, ecr) {
            (Some(login), _) => login,
            // Told only if the host asks for credentials: a mirror may not.
            (None, Some(Err(failure))) => Login { secret: Secret::Unavailable(failure), source: Source::Ecr },
            (None, _) => Login::ANONYMOUS,
        })
    }
}

/// Whether the credentials were refused; what a redirect led to knows nothing of them.
fn is_refusal(answer: &Answer) -> bool {
    matches!(answer.status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) && !answer.is_redirected
}

fn checked(digest: &Digest, bytes: &[u8], place: &str, name: &impl Fn() -> String) -> Result<Digest, Denial> {
    if digest.matches(bytes) {
        return Ok(digest.clone());
    }
    Err(DenyReason::MalformedEvidence.because(format!("{place} serves other bytes than {}", name())))
}

fn whole(body: Body, limit: u64, name: &impl Fn() -> String) -> Result<Bytes, Denial> {
    match body {
        Body::Whole(bytes) => Ok(bytes),
        Body::TooLarge => Err(too_large(limit, name)),
    }
}

fn too_large(limit: u64, name: &impl Fn() -> String) -> Denial {
    DenyReason::EvidenceTooLarge.because(format!("{} is larger than {limit} bytes", name()))
}
