//! The key ring: from a key's URI to the key, at the price of at most one KMS request.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use super::TrustedKey;
use super::kms::{GivenKey, Kms, RemoteVerifier};
use super::pins::{Pin, PinnedKey, Pins};
use super::uri::{KeyUri, KmsKey};
use crate::engine::flight::Flights;
use crate::metrics::Metrics;
use crate::verdict::{DenyReason, FailureReason, Stop};

/// So long an alias with a pin is waited for: then the pinned key stands, and the comparison goes on.
const COMPARE_WITHIN: Duration = Duration::from_secs(1);

type Answer = Result<Arc<TrustedKey>, Stop>;

/// The keys in use; shared by all requests.
pub struct KeyRing {
    shelf: Arc<Shelf>,
    flights: Flights<KeyUri, Answer>,
}

struct Shelf {
    held: RwLock<HashMap<KeyUri, Held>>,
    kms: Arc<Kms>,
    pins: Pins,
    alias_recheck: Duration,
    /// Counts the `forget`s.
    generation: AtomicU64,
    metrics: Arc<Metrics>,
}

#[derive(Clone)]
struct Held {
    answer: Answer,
    checked: Instant,
}

impl KeyRing {
    /// An empty ring. Aliases are compared with KMS again after `alias_recheck`.
    pub fn new(kms: Arc<Kms>, pins: Pins, alias_recheck: Duration, metrics: Arc<Metrics>) -> Self {
        let shelf = Shelf {
            held: RwLock::default(),
            kms,
            pins,
            alias_recheck,
            generation: AtomicU64::new(0),
            metrics,
        };
        shelf.count_conflicts();
        Self { shelf: Arc::new(shelf), flights: Flights::here() }
    }

    /// The key that `uri` names; with `remote`, one that KMS verifies with.
    ///
    /// # Errors
    /// A failure when KMS can't be asked and has not been asked before; the denial
    /// `untrusted-identity` when what is there is no usable key, or another one than was trusted.
    pub async fn get(&self, uri: &KeyUri, remote: bool) -> Answer {
        let key = self.local(uri).await?;
        match (uri, key.kms_id()) {
            (KeyUri::Kms(place), Some(id)) if remote => {
                let pinned = KmsKey { id: id.to_owned(), ..place.clone() };
                let verifier = RemoteVerifier::new(Arc::clone(&self.shelf.kms), pinned);
                Ok(Arc::new(TrustedKey::clone(&key).verified_by(verifier)))
            }
            _ => Ok(key),
        }
    }

    /// The key that `uri` names, if it is known without asking anybody.
    pub fn held(&self, uri: &KeyUri) -> Option<Arc<TrustedKey>> {
        self.shelf.fresh(uri)?.ok()
    }

    async fn local(&self, uri: &KeyUri) -> Answer {
        if let Some(held) = self.shelf.fresh(uri) {
            self.shelf.metrics.cache_request("key", "hit");
            return held;
        }
        self.shelf.metrics.cache_request("key", "miss");
        let (mut ticket, _) = self.flights.join(uri.clone(), || {
            let (shelf, uri) = (Arc::clone(&self.shelf), uri.clone());
            async move { shelf.fetch(&uri).await }
        });
        let nothing =
            || Err(FailureReason::KmsUnavailable.because("the look-up of the key ended early").into());
        // Whoever gives up waiting still wants the key to be there the next time.
        ticket.keep_running();
        match tokio::time::timeout(COMPARE_WITHIN, ticket.wait()).await {
            Ok(answer) => answer.unwrap_or_else(nothing),
            Err(_) => match self.pinned(uri).await {
                Some(pinned) => pinned,
                None => ticket.wait().await.unwrap_or_else(nothing),
            },
        }
    }

    /// What the pin says, where there is one.
    async fn pinned(&self, uri: &KeyUri) -> Option<Answer> {
        let (shelf, uri) = (Arc::clone(&self.shelf), uri.clone());
        // Away from the callers: the disk may be what hangs.
        tokio::task::spawn_blocking(move || shelf.pinned(&uri)).await.ok()?
    }

    /// Every pin.
    pub fn pins(&self) -> Vec<Pin> {
        self.shelf.pins.all()
    }

    /// Trusts the key that an alias points at now, instead of the one that was trusted; with
    /// `sha256`, only if it is that one.
    ///
    /// # Errors
    /// A sentence, when there is no such conflict or the pin can't be written.
    pub fn accept(&self, uri: &str, sha256: Option<&str>) -> Result<Pin, String> {
        let pin = self
            .shelf
            .pins
            .get(uri)
            .map_err(|stop| stop.found().to_owned())?
            .ok_or_else(|| format!("no key is pinned for {uri}"))?;
        let trusted = pin.conflict.ok_or_else(|| format!("{uri} points at the key that is trusted"))?;
        if sha256.is_some_and(|expected| expected != trusted.sha256) {
            return Err(format!("{uri} points at another key by now (SHA-256 {})", trusted.sha256));
        }
        let accepted = Pin { uri: pin.uri, trusted, conflict: None };
        self.shelf.pins.put(&accepted).map_err(|e| format!("the pin can't be written: {e}"))?;
        self.shelf.count_conflicts();
        self.forget();
        tracing::warn!(
            message_id = crate::audit::KEY_ACCEPTED,
            key = uri,
            "an operator accepted a re-pointed key"
        );
        Ok(accepted)
    }

    /// Looks every key up anew at its next use (files may have changed).
    pub fn forget(&self) {
        let mut held = self.shelf.held.write().unwrap_or_else(PoisonError::into_inner);
        self.shelf.generation.fetch_add(1, Ordering::AcqRel);
        held.clear();
    }
}

impl Shelf {
    fn fresh(&self, uri: &KeyUri) -> Option<Answer> {
        let held = self.held.read().unwrap_or_else(PoisonError::into_inner);
        let found = held.get(uri)?;
        let may_move = matches!(uri, KeyUri::Kms(key) if key.is_alias());
        (!may_move || found.checked.elapsed() < self.alias_recheck).then(|| found.answer.clone())
    }

    /// What the pin says, where there is one.
    fn pinned(&self, uri: &KeyUri) -> Option<Answer> {
        let KeyUri::Kms(_) = uri else { return None };
        Some(self.trust(&self.pins.get(&uri.label()).ok()??))
    }

    async fn fetch(&self, uri: &KeyUri) -> Answer {
        let generation = self.generation.load(Ordering::Acquire);
        let answer = match uri {
            KeyUri::Inline(text) => Ok(Arc::new(TrustedKey::from_pem(uri.label(), text)?)),
            KeyUri::File(path) => match tokio::fs::read_to_string(path).await {
                Ok(text) => Ok(Arc::new(TrustedKey::from_pem(uri.label(), &text)?)),
                Err(error) => {
                    return Err(DenyReason::UntrustedIdentity
                        .because(format!("the key file {} can't be read: {}", path.display(), error.kind()))
                        .into());
                }
            },
            KeyUri::Kms(key) => self.ask_kms(uri, key).await,
        };
        if !matches!(answer, Err(Stop::Failed(_))) {
            let held = Held { answer: answer.clone(), checked: Instant::now() };
            let mut all = self.held.write().unwrap_or_else(PoisonError::into_inner);
            // What was read before a `forget` may be what should be forgotten.
            if generation == self.generation.load(Ordering::Acquire) {
                all.insert(uri.clone(), held);
            }
        }
        answer
    }

    async fn ask_kms(&self, uri: &KeyUri, key: &KmsKey) -> Answer {
        let label = uri.label();
        // A pin that is there but can't be read must not turn into trust on first use.
        let pin = self.pins.get(&label)?;
        match pin {
            // A key id can't be re-pointed: the pin is all that is ever needed.
            Some(pin) if !key.is_alias() && pin.conflict.is_none() => self.trust(&pin),
            Some(pin) => match self.kms.public_key(key).await {
                Ok(given) => self.compare(pin, given),
                Err(failure) => {
                    tracing::warn!(
                        key = label,
                        reason = failure.reason.code(),
                        found = failure.found,
                        "an alias can't be compared with KMS; the pinned key stands"
                    );
                    self.trust(&pin)
                }
            },
            None => {
                let given = self.kms.public_key(key).await?;
                let trusted = PinnedKey::new(given.key_id, &given.spki);
                let pin = Pin { uri: label, trusted, conflict: None };
                // A key that can't be used must not be pinned.
                let answer = self.trust(&pin)?;
                self.write(&pin);
                Ok(answer)
            }
        }
    }

    fn compare(&self, mut pin: Pin, given: GivenKey) -> Answer {
        let now = PinnedKey::new(given.key_id, &given.spki);
        let conflict = (now.sha256 != pin.trusted.sha256).then_some(now);
        if conflict != pin.conflict {
            if let Some(other) = &conflict {
                tracing::error!(
                    message_id = crate::audit::KEY_CONFLICT,
                    key = pin.uri,
                    trusted = pin.trusted.sha256,
                    found = other.sha256,
                    "an alias points at another key than the one that is trusted; its images are denied",
                );
            }
            pin.conflict = conflict;
            self.write(&pin);
        }
        self.trust(&pin)
    }

    fn trust(&self, pin: &Pin) -> Answer {
        if let Some(other) = &pin.conflict {
            let found = format!(
                "{} now points at another key (SHA-256 {}) than the trusted one (SHA-256 {})",
                pin.uri, other.sha256, pin.trusted.sha256
            );
            return Err(DenyReason::UntrustedIdentity.because(found).into());
        }
        let spki = pin
            .trusted
            .spki()
            .ok_or_else(|| DenyReason::UntrustedIdentity.because("the key's pin is damaged"))?;
        Ok(Arc::new(TrustedKey::from_spki(pin.uri.clone(), spki)?.in_kms(pin.trusted.key_id.clone())))
    }

    fn write(&self, pin: &Pin) {
        if let Err(error) = self.pins.put(pin) {
            tracing::warn!(key = pin.uri, %error, "a key pin can't be written; KMS is asked again after a restart");
        }
        self.count_conflicts();
    }

    fn count_conflicts(&self) {
        let conflicts = self.pins.all().iter().filter(|pin| pin.conflict.is_some()).count();
        self.metrics.key_conflicts.set(conflicts as i64);
    }
}
