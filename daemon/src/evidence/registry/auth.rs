//! Answers to a registry's challenge (distribution-spec defers to RFC 9110 and to Docker's
//! token specification; containerd: `core/remotes/docker/authorizer.go`, `auth/fetch.go`).
//!
//! Credentials go to a host only after it asked for them, and to the token service that it
//! names; what was accepted is remembered, so that later requests carry it from the start.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http::header::WWW_AUTHENTICATE;
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use http_auth::ChallengeRef;
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use tokio::time::Instant;
use url::{Url, form_urlencoded};

use super::client::{Answer, Ask, Body, Client, Operation};
use super::credentials::{Login, Secret, sensitive};
use super::fault::{place, unavailable};
use super::hosts::Endpoint;
use crate::reference::Repository;
use crate::verdict::{Failure, FailureReason};

/// A token service's answer is not larger.
const TOKEN_LIMIT: u64 = 64 << 10;
/// How long a token is good where the service does not say (Docker's token specification).
const DEFAULT_LIFE: u64 = 60;
/// How long it is remembered that a host takes Basic, or a ready token.
const REMEMBERED: Duration = Duration::from_secs(600);
/// Grants remembered.
const GRANTS: usize = 1024;

/// Who asks which host for what.
pub(super) struct Who<'a> {
    pub(super) endpoint: &'a Endpoint,
    pub(super) repository: &'a Repository,
    pub(super) login: &'a Login,
}

/// What hosts accepted, by host, repository and credentials.
#[derive(Default)]
pub(super) struct Grants {
    slots: Mutex<HashMap<[u8; 32], Arc<Slot>>>,
}

/// Held while a token is asked for: one caller asks, the others wait for it.
#[derive(Default)]
struct Slot(tokio::sync::Mutex<Option<Grant>>);

struct Grant {
    header: HeaderValue,
    until: Instant,
}

impl Grants {
    /// Sends `ask`; where the host answers 401, meets its challenge and sends it again.
    ///
    /// # Errors
    /// As [`Client::send`]; `registry-auth` when the token service refuses, or the challenge
    /// must not be met.
    pub(super) async fn send(
        &self,
        client: &Client,
        who: &Who<'_>,
        mut ask: Ask<'_>,
    ) -> Result<Answer, Failure> {
        let slot = self.slot(who);
        ask.authorization = match slot.current().await {
            Some(header) => Some(header),
            None => who.unasked(),
        };
        let answer = client.send(&ask).await?;
        if answer.status != StatusCode::UNAUTHORIZED || answer.is_redirected {
            return Ok(answer);
        }
        let Some(header) = slot.meet(client, who, &ask, &answer).await? else { return Ok(answer) };
        ask.authorization = Some(header);
        client.send(&ask).await
    }

    fn slot(&self, who: &Who<'_>) -> Arc<Slot> {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let key = who.key();
        if slots.len() >= GRANTS && !slots.contains_key(&key) {
            slots.clear();
        }
        slots.entry(key).or_default().clone()
    }
}

impl Slot {
    async fn current(&self) -> Option<HeaderValue> {
        let grant = self.0.lock().await;
        grant.as_ref().filter(|grant| grant.until > Instant::now()).map(|grant| grant.header.clone())
    }

    /// The header that meets the challenge of `answer`; `None` where there is no new one to try.
    async fn meet(
        &self,
        client: &Client,
        who: &Who<'_>,
        ask: &Ask<'_>,
        answer: &Answer,
    ) -> Result<Option<HeaderValue>, Failure> {
        let mut slot = self.0.lock().await;
        let is_new = |header: &HeaderValue| ask.authorization.as_ref() != Some(header);
        if let Some(grant) = slot.take().filter(|grant| grant.until > Instant::now() && is_new(&grant.header))
        {
            let header = grant.header.clone();
            *slot = Some(grant);
            return Ok(Some(header));
        }
        if let Secret::Unavailable(failure) = &who.login.secret {
            return Err(failure.clone());
        }
        let ready = |header: HeaderValue| Grant { header, until: Instant::now() + REMEMBERED };
        let grant = match Challenge::read(&answer.headers) {
            Some(Challenge::Bearer(_)) if who.login.bearer().is_some() => who.login.bearer().map(ready),
            Some(Challenge::Bearer(bearer)) => Some(bearer.token(client, who, ask).await?),
            Some(Challenge::Basic) => who.login.basic().map(ready),
            None => None,
        };
        let Some(grant) = grant.filter(|grant| is_new(&grant.header)) else { return Ok(None) };
        let header = grant.header.clone();
        *slot = Some(grant);
        Ok(Some(header))
    }
}

impl Who<'_> {
    /// What the registry itself gets without asking: a ready token, and, over https, ECR's
    /// Basic credentials (it always asks). Mirrors must ask first.
    fn unasked(&self) -> Option<HeaderValue> {
        if self.endpoint.is_mirror {
            return None;
        }
        let is_ecr =
            self.login.source == super::credentials::Source::Ecr && self.endpoint.base.scheme() == "https";
        self.login.bearer().or_else(|| self.login.basic().filter(|_| is_ecr))
    }

    /// Host, repository and credentials; hashed, so that no secret is a key.
    fn key(&self) -> [u8; 32] {
        let secret = match &self.login.secret {
            Secret::Anonymous | Secret::Unavailable(_) => ["", "", ""],
            Secret::Basic { user, password } => ["basic", user, password],
            Secret::Identity(token) => ["identity", token, ""],
            Secret::Bearer(token) => ["bearer", token, ""],
        };
        let endpoint = [self.endpoint.base.as_str(), &self.endpoint.path];
        let repository = [self.repository.registry(), self.repository.path()];
        let mut hash = Sha256::new();
        for part in endpoint.into_iter().chain(repository).chain(secret) {
            hash.update((part.len() as u64).to_be_bytes());
            hash.update(part);
        }
        hash.finalize().into()
    }

    /// That this login was refused.
    pub(super) fn refused(&self, answer: &Answer) -> Failure {
        let (repository, registry) = (self.repository.to_string(), self.repository.registry());
        self.login.refused(&answer.place(), &repository, registry, answer.status.as_u16())
    }
}

/// What a 401 asks for.
enum Challenge {
    Bearer(Bearer),
    Basic,
}

/// A token of a token service.
struct Bearer {
    realm: String,
    service: String,
    scope: String,
}

impl Challenge {
    /// Bearer before Basic, as containerd. Whatever else is not understood.
    fn read(headers: &HeaderMap) -> Option<Self> {
        let mut basic = None;
        for value in headers.get_all(WWW_AUTHENTICATE) {
            let Ok(challenges) = value.to_str().map(http_auth::parse_challenges) else { continue };
            for challenge in challenges.unwrap_or_default() {
                if challenge.scheme.eq_ignore_ascii_case("bearer") {
                    return Some(Self::Bearer(Bearer {
                        realm: parameter(&challenge, "realm"),
                        service: parameter(&challenge, "service"),
                        scope: parameter(&challenge, "scope"),
                    }));
                }
                if challenge.scheme.eq_ignore_ascii_case("basic") {
                    basic = Some(Self::Basic);
                }
            }
        }
        basic
    }
}

fn parameter(challenge: &ChallengeRef<'_>, name: &str) -> String {
    let found = challenge.params.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
    found.map(|(_, value)| value.to_unescaped()).unwrap_or_default()
}

/// Docker's token specification, and the OAuth2 variant of it.
#[derive(Deserialize)]
struct TokenAnswer {
    token: Option<String>,
    access_token: Option<String>,
    expires_in: Option<serde_json::Value>,
}

impl Bearer {
    /// Asks the token service.
    async fn token(&self, client: &Client, who: &Who<'_>, ask: &Ask<'_>) -> Result<Grant, Failure> {
        let realm = self.realm(who.endpoint)?;
        let answer = match &who.login.secret {
            Secret::Identity(token) => {
                let answer = self.send(client, who, ask, &realm, Some(token)).await?;
                // Where there is no OAuth2 endpoint, as in containerd's authorizer.go.
                match answer.status.as_u16() {
                    400 | 401 | 404 => self.send(client, who, ask, &realm, None).await?,
                    _ => answer,
                }
            }
            _ => self.send(client, who, ask, &realm, None).await?,
        };
        match answer.status.as_u16() {
            200..300 => {}
            400 | 401 | 403 => return Err(who.refused(&answer)),
            status => {
                return Err(unavailable(&realm, &format!("answers {status} where a token was asked for")));
            }
        }
        read_token(&answer).ok_or_else(|| unavailable(&realm, "answers without a token that can be read"))
    }

    /// Where the token is asked for: https, unless the registry itself is spoken to in the clear.
    fn realm(&self, endpoint: &Endpoint) -> Result<Url, Failure> {
        let url = Url::parse(&self.realm).ok().filter(Url::has_host);
        let is_clear = endpoint.base.scheme() == "http";
        let url = url.filter(|url| url.scheme() == "https" || (is_clear && url.scheme() == "http"));
        let url = url.filter(|url| url.username().is_empty() && url.password().is_none());
        url.ok_or_else(|| {
            let place = place(&endpoint.base);
            FailureReason::RegistryAuth
                .because(format!("{place} names a token service that is not at an https URL"))
        })
    }

    /// One request: a form with the refresh token, or a GET with Basic credentials, if any.
    async fn send(
        &self,
        client: &Client,
        who: &Who<'_>,
        ask: &Ask<'_>,
        realm: &Url,
        refresh: Option<&str>,
    ) -> Result<Answer, Failure> {
        let no_headers = HeaderMap::new();
        let scopes = self.scopes(who.repository.path());
        let mut url = realm.clone();
        let mut form = None;
        if let Some(refresh) = refresh {
            let mut fields = form_urlencoded::Serializer::new(String::new());
            fields.append_pair("grant_type", "refresh_token").append_pair("service", &self.service);
            fields.append_pair("client_id", "pullgate").append_pair("scope", &scopes.join(" "));
            form = Some(fields.append_pair("refresh_token", refresh).finish());
        } else {
            let mut query = url.query_pairs_mut();
            if !self.service.is_empty() {
                query.append_pair("service", &self.service);
            }
            for scope in &scopes {
                query.append_pair("scope", scope);
            }
            if let Secret::Basic { user, .. } = &who.login.secret {
                query.append_pair("account", user);
            }
        }
        let authorization = match (&who.login.secret, refresh) {
            (Secret::Identity(token), None) => {
                let secret = Secret::Basic { user: String::new(), password: token.clone() };
                Login { secret, source: who.login.source.clone() }.basic()
            }
            _ => who.login.basic(),
        };
        let is_same_origin = realm.origin() == who.endpoint.base.origin();
        let ask = Ask {
            operation: Operation::Token,
            method: if form.is_some() { Method::POST } else { Method::GET },
            url,
            accept: "application/json",
            headers: if is_same_origin { ask.headers } else { &no_headers },
            authorization,
            form,
            tls: ask.tls,
            https_first: false,
            limit: TOKEN_LIMIT,
            tries: ask.tries,
        };
        client.send(&ask).await
    }

    /// Our repository, and what the challenge names (a mirror may keep it under another path);
    /// of that only reading repositories, whatever else the host would like a token for.
    fn scopes(&self, path: &str) -> Vec<String> {
        let mut scopes = vec![format!("repository:{path}:pull")];
        for scope in self.scope.split_ascii_whitespace() {
            let name = scope.strip_prefix("repository:").and_then(|rest| rest.rsplit_once(':'));
            if let Some((name, actions)) = name
                && actions.split(',').any(|action| action == "pull")
            {
                let scope = format!("repository:{name}:pull");
                if !scopes.contains(&scope) && scopes.len() < 4 {
                    scopes.push(scope);
                }
            }
        }
        scopes
    }
}

/// `None` where the answer holds no token.
fn read_token(answer: &Answer) -> Option<Grant> {
    let Body::Whole(body) = &answer.body else { return None };
    let answer: TokenAnswer = serde_json::from_slice(body).ok()?;
    let token = answer.access_token.filter(|token| !token.is_empty()).or(answer.token)?;
    let header = sensitive(&format!("Bearer {token}")).filter(|_| !token.is_empty())?;
    let life = answer.expires_in.and_then(|seconds| seconds.as_u64()).unwrap_or(DEFAULT_LIFE);
    // A tenth is kept as a margin; a day is enough for any token.
    let life = Duration::from_secs(life.min(24 * 3600));
    Some(Grant { header, until: Instant::now() + life - life / 10 })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn challenge(values: &[&str]) -> Option<Challenge> {
        let headers = values.iter().map(|value| (WWW_AUTHENTICATE, value.parse().unwrap()));
        Challenge::read(&HeaderMap::from_iter(headers))
    }

    fn bearer(scope: &str) -> Bearer {
        Bearer { realm: String::new(), service: String::new(), scope: scope.into() }
    }

    #[test]
    fn bearer_is_taken_before_basic_and_the_unknown_is_passed_over() {
        let both = challenge(&["Basic realm=\"r\"", "Bearer realm=\"https://t/x\",service=\"s\""]);
        let Some(Challenge::Bearer(bearer)) = both else { panic!() };
        assert_eq!((bearer.realm.as_str(), bearer.service.as_str()), ("https://t/x", "s"));
        assert!(matches!(challenge(&["Digest realm=\"r\", Basic realm=\"r\""]), Some(Challenge::Basic)));
        assert!(challenge(&["Negotiate"]).is_none());
        assert!(challenge(&["\u{1}", "=,=,"].map(|v| if v == "\u{1}" { "" } else { v })).is_none());
        assert!(challenge(&[]).is_none());
    }

    #[test]
    fn a_challenge_gets_no_wider_token_than_reading() {
        let scopes = |scope| bearer(scope).scopes("team/app");
        let own = "repository:team/app:pull".to_owned();
        assert_eq!(scopes(""), [own.as_str()]);
        assert_eq!(scopes("repository:team/app:pull,push"), [own.as_str()]);
        assert_eq!(
            scopes("repository:proxy/team/app:pull"),
            [own.as_str(), "repository:proxy/team/app:pull"]
        );
        assert_eq!(scopes("registry:catalog:* repository:x:push"), [own.as_str()]);
    }

    #[test]
    fn tokens_are_read_as_docker_and_oauth_write_them() {
        let grant = |body: &str| {
            read_token(&Answer {
                status: StatusCode::OK,
                headers: HeaderMap::new(),
                body: Body::Whole(body.to_owned().into()),
                url: Url::parse("https://t/").unwrap(),
                is_redirected: false,
            })
        };
        assert_eq!(grant(r#"{"token": "a"}"#).unwrap().header, "Bearer a");
        assert_eq!(grant(r#"{"token": "a", "access_token": "b"}"#).unwrap().header, "Bearer b");
        assert!(grant(r#"{"token": "a\nb"}"#).is_none());
        assert!(grant(r#"{"token": ""}"#).is_none());
        assert!(grant("{}").is_none());
        assert!(grant("not json").is_none());
        assert!(grant(r#"{"token": "a", "expires_in": 18446744073709551615}"#).is_some());
        assert!(grant(r#"{"token": "a", "expires_in": -1}"#).is_some());
    }
}
