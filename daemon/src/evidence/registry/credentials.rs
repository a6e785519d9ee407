//! Who asks: the credentials of one pull, and what is made of them for one host.

use std::fmt;
use std::path::PathBuf;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::HeaderValue;
use url::Url;

use super::hosts::is_registry_itself;
use crate::verdict::{Failure, FailureReason};

/// The fields of `runtime.v1.AuthConfig`, as the kubelet sends them; empty is absent.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct AuthConfig {
    /// User name.
    pub username: String,
    /// Password.
    pub password: String,
    /// Base64 of `user:password`.
    pub auth: String,
    /// The registry that these are for; empty means the one of the image.
    pub server_address: String,
    /// An OAuth2 refresh token.
    pub identity_token: String,
    /// A bearer token for the registry itself.
    pub registry_token: String,
}

impl fmt::Debug for AuthConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AuthConfig(redacted)")
    }
}

/// The credentials of one CRI request, if it has any. Never shown.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct Credentials(Option<AuthConfig>);

impl Credentials {
    /// A request without credentials.
    pub fn none() -> Self {
        Self(None)
    }

    /// Those of a `PullImage` request.
    pub fn from_auth_config(config: AuthConfig) -> Self {
        Self(Some(config).filter(|config| *config != AuthConfig::default()))
    }

    /// What containerd's `ParseAuth` (internal/cri/server/images/image_pull.go) makes of them
    /// for the host at `base`: nothing if they name another server. Where they name none they
    /// are for the image's registry and its configured mirrors.
    ///
    /// # Errors
    /// `registry-auth` when `auth` can't be read.
    pub(super) fn login(&self, base: &Url) -> Result<Option<Login>, Failure> {
        let Some(config) = self.0.as_ref().filter(|config| is_for(&config.server_address, base)) else {
            return Ok(None);
        };
        let secret = if !config.username.is_empty() {
            Secret::Basic { user: config.username.clone(), password: config.password.clone() }
        } else if !config.identity_token.is_empty() {
            Secret::Identity(config.identity_token.clone())
        } else if !config.auth.is_empty() {
            decode_basic(&config.auth).ok_or_else(|| {
                FailureReason::RegistryAuth.because(
                    "the credentials of the pull can't be read: `auth` is not the base64 of user:password; \
                     check the imagePullSecret",
                )
            })?
        } else if !config.registry_token.is_empty() {
            Secret::Bearer(config.registry_token.clone())
        } else {
            return Ok(None);
        };
        Ok(Some(Login { secret, source: Source::Pull }))
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "Credentials(redacted)" } else { "Credentials(none)" })
    }
}

/// Whether a `server_address` (a URL, or a bare host) is the host at `base`. The whole host and
/// port count: a look-alike is another host (Ratify CVE-2025-27403).
fn is_for(server_address: &str, base: &Url) -> bool {
    if server_address.is_empty() {
        return true;
    }
    let rest = server_address.split_once("://").map_or(server_address, |(_, rest)| rest);
    let host = rest.split(['/', '?', '#']).next().unwrap_or_default();
    let host = match host {
        "index.docker.io" | "registry-1.docker.io" => "docker.io",
        host => host,
    };
    is_registry_itself(base, host)
}

/// `user:password` from base64, as in `auth` of AuthConfig and of Docker's configuration.
pub(super) fn decode_basic(auth: &str) -> Option<Secret> {
    let bytes = STANDARD.decode(auth.trim()).ok()?;
    let text = String::from_utf8(bytes).ok()?;
    let (user, password) = text.split_once(':')?;
    Some(Secret::Basic { user: user.to_owned(), password: password.trim_matches('\0').to_owned() })
}

/// What proves who asks.
#[derive(Clone, PartialEq, Eq)]
pub(super) enum Secret {
    Anonymous,
    Basic {
        user: String,
        password: String,
    },
    /// An OAuth2 refresh token.
    Identity(String),
    /// A ready bearer token.
    Bearer(String),
    /// There should be one, but it could not be had.
    Unavailable(Failure),
}

/// Where it comes from, for the remedy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Source {
    Nowhere,
    Pull,
    Ecr,
    DockerConfig(PathBuf),
}

/// Secret and source.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Login {
    pub(super) secret: Secret,
    pub(super) source: Source,
}

impl Login {
    pub(super) const ANONYMOUS: Self = Self { secret: Secret::Anonymous, source: Source::Nowhere };

    /// `Basic …`, where there is a name and a password.
    pub(super) fn basic(&self) -> Option<HeaderValue> {
        let Secret::Basic { user, password } = &self.secret else { return None };
        sensitive(&format!("Basic {}", STANDARD.encode(format!("{user}:{password}"))))
    }

    /// `Bearer …`, where the token needs no token service.
    pub(super) fn bearer(&self) -> Option<HeaderValue> {
        let Secret::Bearer(token) = &self.secret else { return None };
        sensitive(&format!("Bearer {token}"))
    }

    /// That this login may not read the repository, and what to do about it.
    pub(super) fn refused(&self, place: &str, repository: &str, registry: &str, status: u16) -> Failure {
        let (whom, remedy) = match &self.source {
            Source::Nowhere => (
                "anonymous readers".to_owned(),
                format!(
                    "give the Pod an imagePullSecret for {registry}, or check that the repository exists"
                ),
            ),
            Source::Pull => (
                "the credentials of the pull".to_owned(),
                "check the Pod's imagePullSecret or the kubelet's credential provider".to_owned(),
            ),
            Source::Ecr => (
                "this node's ECR token".to_owned(),
                "allow ecr:BatchGetImage and ecr:GetDownloadUrlForLayer to the node's role and in the \
                 repository's policy"
                    .to_owned(),
            ),
            Source::DockerConfig(path) => {
                (format!("the credentials in {}", path.display()), "check that file".to_owned())
            }
        };
        FailureReason::RegistryAuth
            .because(format!("{place} does not let {whom} read {repository} ({status}): {remedy}"))
    }
}

impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Login(from {:?}, redacted)", self.source)
    }
}

/// A header that is never shown; `None` if it can't be one.
pub(super) fn sensitive(text: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> AuthConfig {
        AuthConfig { username: "user".into(), password: "hunter2".into(), ..AuthConfig::default() }
    }

    fn login(config: AuthConfig, base: &str) -> Option<Secret> {
        let base = Url::parse(base).unwrap();
        Credentials::from_auth_config(config).login(&base).unwrap().map(|login| login.secret)
    }

    #[test]
    fn credentials_that_name_a_server_go_only_there_ratify_cve_2025_27403() {
        for (server, base, goes) in [
            ("", "https://any.example.com/", true),
            ("https://host.example.com", "https://host.example.com/", true),
            ("https://host.example.com/v1/", "https://host.example.com/", true),
            ("host.example.com", "https://host.example.com/", true),
            ("host.example.com:443", "https://host.example.com/", true),
            ("http://host.example.com:5000", "http://host.example.com:5000/", true),
            ("https://index.docker.io/v1/", "https://registry-1.docker.io/", true),
            ("https://host.example.com", "https://host.example.com.evil.io/", false),
            ("https://host.example.com", "https://evil-host.example.com/", false),
            ("https://host.example.com", "https://host.example.com:8443/", false),
            ("https://host.example.com", "https://mirror.example.com/", false),
            ("https://host.example.com@evil.io", "https://host.example.com/", false),
            ("azurecr.io", "https://team.azurecr.io/", false),
        ] {
            let config = AuthConfig { server_address: server.into(), ..config() };
            assert_eq!(login(config, base).is_some(), goes, "{server} for {base}");
        }
    }

    #[test]
    fn a_name_comes_before_tokens_and_auth_as_in_containerd() {
        let all = AuthConfig {
            auth: STANDARD.encode("a:b:c"),
            identity_token: "refresh".into(),
            registry_token: "bearer".into(),
            ..config()
        };
        let base = "https://h/";
        let basic =
            |user: &str, password: &str| Some(Secret::Basic { user: user.into(), password: password.into() });
        assert!(login(all.clone(), base) == basic("user", "hunter2"));
        let no_name = AuthConfig { username: String::new(), ..all };
        assert!(login(no_name.clone(), base) == Some(Secret::Identity("refresh".into())));
        let auth = AuthConfig { identity_token: String::new(), ..no_name };
        assert!(login(auth.clone(), base) == basic("a", "b:c"));
        let token = AuthConfig { auth: String::new(), ..auth };
        assert!(login(token, base) == Some(Secret::Bearer("bearer".into())));
        assert!(login(AuthConfig::default(), base).is_none());
    }

    #[test]
    fn unreadable_auth_is_a_failure_that_does_not_repeat_it() {
        for auth in ["hunter2!", &STANDARD.encode("hunter2")] {
            let config = AuthConfig { auth: auth.into(), ..AuthConfig::default() };
            let base = Url::parse("https://h/").unwrap();
            let failure = Credentials::from_auth_config(config).login(&base).unwrap_err();
            assert_eq!(failure.reason, FailureReason::RegistryAuth);
            assert!(!failure.found.contains(auth), "{}", failure.found);
        }
    }

    #[test]
    fn secrets_are_not_shown() {
        let base = Url::parse("https://h/").unwrap();
        let credentials = Credentials::from_auth_config(config());
        let login = credentials.login(&base).unwrap().unwrap();
        let shown =
            format!("{:?} {credentials:?} {login:?} {:?} {:?}", config(), login.basic(), login.bearer());
        let refused = login.refused("https://h", "h/a", "h", 401).found;
        for text in [shown, refused] {
            assert!(!text.contains("hunter2") && !text.contains(&STANDARD.encode("user:hunter2")), "{text}");
        }
    }
}
