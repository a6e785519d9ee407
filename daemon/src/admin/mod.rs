//! The admin socket: HTTP with JSON on a Unix socket of root's, for `pullgate status`, `cache`
//! and `keys`, and for anything else that can speak to it (`curl --unix-socket`).

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use bytes::Bytes;
use globset::GlobBuilder;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use serde_json::{Map, Value, json};

use crate::gate::Gate;
use crate::reload::Reloader;
use crate::store::{Stored, Verdict, VerdictKey};
use crate::verdict::AllowReason;
use crate::verify::key::KeyUri;

/// Answers admin requests.
pub struct Admin {
    gate: Arc<Gate>,
    reloader: Arc<Reloader>,
    started: Instant,
}

type Answer = Result<Value, (StatusCode, String)>;

impl Admin {
    /// For the daemon that started just now.
    pub fn new(gate: Arc<Gate>, reloader: Arc<Reloader>) -> Self {
        Self { gate, reloader, started: Instant::now() }
    }

    /// Answers one request.
    pub async fn answer<B>(self: Arc<Self>, request: Request<B>) -> Response<Full<Bytes>> {
        let query: HashMap<String, String> =
            url::form_urlencoded::parse(request.uri().query().unwrap_or_default().as_bytes())
                .into_owned()
                .collect();
        let answer = match (request.method(), request.uri().path()) {
            (&Method::GET, "/status") => Ok(self.status().await),
            (&Method::POST, "/reload") => self.reload(),
            (&Method::GET, "/cache/stats") => Ok(self.stats()),
            (&Method::GET, "/cache") => self.list(&query),
            (&Method::GET, "/cache/entry") => self.show(&query),
            (&Method::DELETE, "/cache") => self.purge(&query),
            (&Method::GET, "/keys") => Ok(json!({ "keys": self.gate.engine.active().keys.pins() })),
            (&Method::POST, "/keys/accept") => self.accept(&query),
            _ => Err((StatusCode::NOT_FOUND, "no such request".into())),
        };
        let (status, value) = match answer {
            Ok(value) => (StatusCode::OK, value),
            Err((status, error)) => (status, json!({ "error": error })),
        };
        let mut response = Response::new(Full::from(format!("{value}\n")));
        *response.status_mut() = status;
        let json = header::HeaderValue::from_static("application/json");
        response.headers_mut().insert(header::CONTENT_TYPE, json);
        response
    }

    async fn status(&self) -> Value {
        let active = self.gate.engine.active();
        let next_hop = self.gate.is_ready().await;
        let (_, disk, _) = self.gate.engine.store().size();
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "uptimeSeconds": self.started.elapsed().as_secs(),
            "policy": active.fingerprint,
            "rules": active.config.policy.rules().len(),
            "configFile": self.reloader.path(),
            "configError": self.reloader.refused(),
            "nextHop": self.gate.next_hop.socket(),
            "nextHopError": next_hop.err(),
            "verdicts": disk,
            "storeError": self.gate.engine.store().trouble(),
            "keyConflicts": active.keys.pins().iter().filter(|pin| pin.conflict.is_some()).map(|pin| &pin.uri).collect::<Vec<_>>(),
        })
    }

    fn reload(&self) -> Answer {
        self.reloader.reload().map_err(|errors| (StatusCode::UNPROCESSABLE_ENTITY, errors.to_string()))?;
        let active = self.gate.engine.active();
        Ok(json!({ "policy": active.fingerprint, "rules": active.config.policy.rules().len() }))
    }

    fn stats(&self) -> Value {
        self.gate.engine.store().recount();
        let (memory, disk, bytes) = self.gate.engine.store().size();
        let (mut allow, mut deny) = (0_usize, 0_usize);
        self.gate.engine.store().for_each(|_, stored| {
            *if stored.is_allow() { &mut allow } else { &mut deny } += 1;
            true
        });
        json!({ "memoryEntries": memory, "diskEntries": disk, "diskBytes": bytes, "allow": allow, "deny": deny })
    }

    fn list(&self, query: &HashMap<String, String>) -> Answer {
        let wanted = filter(query)?;
        let limit = match query.get("limit").map(|limit| limit.parse::<usize>()) {
            None => 100,
            Some(Ok(limit)) => limit,
            Some(Err(_)) => return Err((StatusCode::BAD_REQUEST, "limit is not a number".into())),
        };
        let mut found = Vec::new();
        self.gate.engine.store().for_each(|key, stored| {
            if wanted(&stored) {
                found.push((key, stored));
            }
            true
        });
        let matching = found.len();
        found.sort_unstable_by_key(|(key, stored)| (std::cmp::Reverse(stored.judged_at_unix), *key));
        let entries: Vec<_> = found.iter().take(limit).map(|(key, stored)| brief(key, stored)).collect();
        Ok(json!({ "matching": matching, "entries": entries }))
    }

    fn show(&self, query: &HashMap<String, String>) -> Answer {
        let start = query.get("key").filter(|key| !key.is_empty());
        let start = start.ok_or((StatusCode::BAD_REQUEST, "which key?".to_owned()))?;
        let mut found = None;
        self.gate.engine.store().for_each(|key, stored| {
            if hex::encode(key.as_bytes()).starts_with(start.as_str()) {
                found = Some((key, stored));
            }
            found.is_none()
        });
        let (key, stored) =
            found.ok_or((StatusCode::NOT_FOUND, format!("no verdict has a key that begins {start}")))?;
        let mut entry = brief(&key, &stored);
        entry.insert("verdict".into(), json!(stored.verdict));
        Ok(Value::Object(entry))
    }

    fn purge(&self, query: &HashMap<String, String>) -> Answer {
        let all = query.get("all").is_some_and(|all| all == "true");
        if !all && !["image", "digest", "decision"].iter().any(|field| query.contains_key(*field)) {
            return Err((StatusCode::BAD_REQUEST, "say which verdicts, or all=true".into()));
        }
        let doomed = filter(query)?;
        let before = self.gate.engine.store().trouble();
        let purged = self.gate.engine.store().purge(|stored| doomed(stored));
        tracing::warn!(message_id = crate::audit::CACHE_PURGED, purged, "an operator purged verdicts");
        match before.or_else(|| self.gate.engine.store().trouble()) {
            None => Ok(json!({ "purged": purged })),
            Some(trouble) => Err((
                StatusCode::SERVICE_UNAVAILABLE,
                format!(
                    "{purged} verdicts are purged, but the disk has trouble ({trouble}), and those on it may count \
                     again; purge again when `pullgate status` shows no storeError"
                ),
            )),
        }
    }

    fn accept(&self, query: &HashMap<String, String>) -> Answer {
        let uri = query.get("uri").ok_or((StatusCode::BAD_REQUEST, "which uri?".to_owned()))?;
        // As a rule spells it, or as it is pinned: both name one key.
        let label = KeyUri::parse(uri).map_or_else(|_| uri.clone(), |parsed| parsed.label());
        match self.gate.engine.active().keys.accept(&label, query.get("sha256").map(String::as_str)) {
            Ok(pin) => Ok(json!({ "accepted": pin })),
            Err(error) => Err((StatusCode::CONFLICT, error)),
        }
    }
}

fn brief(key: &VerdictKey, stored: &Stored) -> Map<String, Value> {
    let (decision, reason) = match &stored.verdict {
        Verdict::Allow(_) => ("allow", AllowReason::Signed.code()),
        Verdict::Deny(denial) => ("deny", denial.reason.code()),
    };
    let age = SystemTime::now().duration_since(stored.judged_at()).unwrap_or_default();
    Map::from_iter([
        ("key".into(), hex::encode(key.as_bytes()).into()),
        ("repository".into(), stored.repository.as_str().into()),
        ("digest".into(), stored.digest.as_str().into()),
        ("decision".into(), decision.into()),
        ("reason".into(), reason.into()),
        ("ageSeconds".into(), age.as_secs().into()),
    ])
}

fn filter(query: &HashMap<String, String>) -> Result<impl Fn(&Stored) -> bool + use<>, (StatusCode, String)> {
    let bad = |error: globset::Error| (StatusCode::BAD_REQUEST, error.to_string());
    let image = query.get("image").map(|glob| GlobBuilder::new(glob).literal_separator(true).build());
    let image = image.transpose().map_err(bad)?.map(|glob| glob.compile_matcher());
    let (digest, decision) = (query.get("digest").cloned(), query.get("decision").cloned());
    Ok(move |stored: &Stored| {
        image.as_ref().is_none_or(|glob| glob.is_match(&stored.repository))
            && digest.as_ref().is_none_or(|digest| *digest == stored.digest)
            && decision.as_ref().is_none_or(|decision| (decision == "allow") == stored.is_allow())
    })
}
