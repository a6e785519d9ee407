//! The engine: reference, digest, credentials → judgement. Every door asks [`Engine::judge`].

pub mod fingerprint;
pub mod flight;
pub mod judgement;
mod verification;
mod work;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use tokio::sync::Semaphore;

use crate::config::{Config, DefaultAction, Loaded, SignedBy, Strategy};
use crate::digest::Digest;
use crate::evidence::registry::{Access, Credentials, EcrSettings, FetchError, Registry, Settings};
use crate::metrics::Metrics;
use crate::reference::{Pointer, Reference, Repository};
use crate::store::{Found, Lifetimes, Stored, Verdict, VerdictKey, VerdictStore};
use crate::verdict::{AllowReason, DenyReason, Failure, FailureReason, Stop};
use crate::verify::key::kms::Kms;
use crate::verify::key::pins::Pins;
use crate::verify::key::{KeyRing, TrustedKey};
use flight::Flights;
use judgement::{AppliedRule, CacheState, Judgement, Outcome, Permit};
use verification::Verification;
use work::{Verified, Work};

/// One question.
#[derive(Clone, Debug)]
pub struct Ask {
    /// The reference, as the caller spells it.
    pub image: String,
    /// The digest, where containerd has the image already: then no tag is resolved.
    pub present: Option<Digest>,
    /// The caller's registry credentials.
    pub credentials: Credentials,
    /// How long the caller waits for an answer.
    pub patience: Duration,
}

/// A policy in force, and everything that was built from it.
pub struct Active {
    /// The configuration.
    pub config: Config,
    /// SHA-256 of the file's text, hexadecimal, shortened: names the policy in the journal.
    pub fingerprint: String,
    /// The registry client.
    pub registry: Arc<Registry>,
    /// The keys.
    pub keys: Arc<KeyRing>,
}

impl Active {
    /// A policy in force from a configuration. What it shares with `old` is kept: connections,
    /// tokens and keys outlive a reload that does not touch them.
    pub fn build(loaded: Loaded, old: Option<&Self>, pins: Pins, metrics: &Arc<Metrics>) -> Self {
        let Loaded { config, fingerprint, .. } = loaded;
        let kept = old.filter(|old| Self::same_dependencies(&old.config, &config));
        let registry = kept.map(|old| Arc::clone(&old.registry));
        let registry = registry
            .unwrap_or_else(|| Arc::new(Registry::new(registry_settings(&config), Arc::clone(metrics))));
        let keys = kept.map(|old| Arc::clone(&old.keys));
        let keys = keys.unwrap_or_else(|| {
            let per_second = config.limits.kms_requests_per_second;
            let kms = Kms::new(config.aws.clone(), per_second, Arc::clone(metrics));
            Arc::new(KeyRing::new(Arc::new(kms), pins, config.aws.alias_recheck, Arc::clone(metrics)))
        });
        keys.forget();
        Self { config, fingerprint: fingerprint.hex().chars().take(16).collect(), registry, keys }
    }

    fn same_dependencies(old: &Config, new: &Config) -> bool {
        old.registry == new.registry
            && old.aws == new.aws
            && old.limits == new.limits
            && old.containerd.registry_config_path == new.containerd.registry_config_path
    }
}

fn registry_settings(config: &Config) -> Settings {
    let url = |endpoint: &Option<url::Url>| endpoint.as_ref().map(url::Url::to_string);
    let regions = config.aws.regions.iter();
    let regions =
        regions.filter_map(|(region, own)| Some((region.clone(), url(&own.ecr_endpoint)?))).collect();
    Settings {
        certs_d: config.containerd.registry_config_path.clone(),
        docker_configs: config.registry.docker_configs.clone(),
        requests_per_second: config.limits.registry_requests_per_second,
        ecr: EcrSettings {
            region: config.aws.region.clone(),
            endpoint: url(&config.aws.ecr_endpoint),
            regions,
        },
    }
}

/// The engine; shared by all doors.
pub struct Engine {
    active: ArcSwap<Active>,
    store: Arc<VerdictStore>,
    verifications: Flights<(VerdictKey, Credentials), Verified>,
    resolutions: Flights<(usize, Repository, String, Access), Result<Digest, Stop>>,
    at_once: Arc<Semaphore>,
    at_registries: Mutex<HashMap<String, Arc<Semaphore>>>,
    metrics: Arc<Metrics>,
}

impl Engine {
    /// An engine that decides by `active`.
    pub fn new(active: Active, store: Arc<VerdictStore>, metrics: Arc<Metrics>) -> Self {
        let at_once = Arc::new(Semaphore::new(active.config.limits.concurrent_verifications));
        Self {
            active: ArcSwap::from_pointee(active),
            store,
            verifications: Flights::here(),
            resolutions: Flights::here(),
            at_once,
            at_registries: Mutex::default(),
            metrics,
        }
    }

    /// The policy in force.
    pub fn active(&self) -> Arc<Active> {
        self.active.load_full()
    }

    /// Puts another policy in force; questions under way are answered by the old one.
    pub fn activate(&self, active: Active) {
        self.active.store(Arc::new(active));
    }

    /// The verdict store.
    pub fn store(&self) -> &Arc<VerdictStore> {
        &self.store
    }

    /// Answers one question. Every stage of the request path is a line of this function.
    pub async fn judge(&self, ask: &Ask) -> Judgement {
        let started = Instant::now();
        let active = self.active.load_full();
        let mut judgement = Judgement::about(&ask.image, &active.fingerprint);
        let outcome = self.decide(ask, &active, started, &mut judgement).await;
        judgement.outcome = outcome.unwrap_or_else(Outcome::from);
        judgement.took = started.elapsed();
        self.count(&judgement);
        judgement
    }

    async fn decide(
        &self,
        ask: &Ask,
        active: &Active,
        started: Instant,
        judgement: &mut Judgement,
    ) -> Result<Outcome, Stop> {
        let reference = Reference::parse(&ask.image).map_err(|error| {
            DenyReason::InvalidReference.because(format!("the image reference can't be read: {error}"))
        })?;
        judgement.read_as(&reference, ask.present.as_ref());
        let signed_by = match rule(active, &reference, judgement)? {
            RuleSays::Allow => {
                return Ok(Outcome::Allowed(AllowReason::AllowRule, Permit::as_asked(reference)));
            }
            RuleSays::Verify(signed_by) => signed_by,
        };
        let access = Access { credentials: ask.credentials.clone(), plain_http: judgement.is_dev() };
        let patience = tokio::time::Instant::from_std(started + ask.patience);
        let digest = match (&ask.present, &reference.pointer) {
            (Some(digest), _) | (None, Pointer::Digest(digest)) => digest.clone(),
            (None, Pointer::Tag(tag)) => {
                self.resolve(active, &reference.repository, tag, &access, patience).await?
            }
        };
        judgement.digest = Some(digest.clone());
        let key = active.keys.get(&signed_by.key, signed_by.remote_verify);
        let key = tokio::time::timeout_at(patience, key).await.unwrap_or_else(|_| Err(timeout().into()))?;
        let question = question(&reference, &digest, signed_by, &key);
        let verification = || {
            let look_at_image = ask.present.is_none();
            Verification::new(active, &reference, &digest, signed_by, key, access, look_at_image)
        };
        let stored = self.verdict(question, verification, patience, &active.config, judgement).await?;
        match &stored.verdict {
            Verdict::Allow(proof) => {
                judgement.proof = Some(proof.clone());
                Ok(Outcome::Allowed(AllowReason::Signed, Permit::proved(reference, &digest, &stored)?))
            }
            Verdict::Deny(denial) => Err(denial.clone().into()),
        }
    }

    /// The verdict from the store, or from a verification that is shared with whoever asks the
    /// same; an old allow verdict stands in for a failure.
    async fn verdict(
        &self,
        key: VerdictKey,
        verification: impl FnOnce() -> Verification,
        patience: tokio::time::Instant,
        config: &Config,
        judgement: &mut Judgement,
    ) -> Result<Arc<Stored>, Stop> {
        let lifetimes = Lifetimes::from(&config.cache);
        if let Found::Fresh(stored, tier) = self.store.find_in_memory(&key, &lifetimes) {
            judgement.cache = CacheState::Hit(tier);
            return Ok(stored);
        }
        judgement.cache = CacheState::Miss;
        match self.verify_once(key, verification(), lifetimes, patience).await {
            Ok((stored, cache)) => {
                judgement.cache = cache;
                Ok(stored)
            }
            Err(failure) => {
                match self.store.find_in_memory(&key, &lifetimes) {
                    // Another caller's credentials have settled it in the meantime.
                    Found::Fresh(stored, tier) => {
                        judgement.cache = CacheState::Hit(tier);
                        Ok(stored)
                    }
                    Found::Stale(stored) if failure.is_away => {
                        judgement.cache = CacheState::Stale(failure.reason);
                        self.metrics.stale_allows.inc();
                        Ok(stored)
                    }
                    Found::Stale(_) | Found::Nothing => Err(failure.into()),
                }
            }
        }
    }

    async fn verify_once(
        &self,
        key: VerdictKey,
        verification: Verification,
        lifetimes: Lifetimes,
        patience: tokio::time::Instant,
    ) -> Verified {
        let whose = verification.access().credentials.clone();
        let (mut ticket, joined) = self.verifications.join((key, whose), || {
            let work = Work {
                store: Arc::clone(&self.store),
                metrics: Arc::clone(&self.metrics),
                key,
                lifetimes,
                at_registry: self.at_registry(verification.registry()),
                at_once: Arc::clone(&self.at_once),
                verification,
            };
            work.run()
        });
        if joined {
            self.metrics.joins.inc();
        }
        match tokio::time::timeout_at(patience, ticket.wait()).await {
            Ok(answer) => answer.unwrap_or_else(|| Err(timeout())),
            Err(_) => {
                ticket.leave_running();
                Err(timeout())
            }
        }
    }

    /// What a tag points to now. Who asks while the same question is under way shares its answer.
    async fn resolve(
        &self,
        active: &Active,
        repository: &Repository,
        tag: &str,
        access: &Access,
        patience: tokio::time::Instant,
    ) -> Result<Digest, Stop> {
        let registry = Arc::clone(&active.registry);
        // A registry client that a reload has put in another's place is asked anew.
        let client = Arc::as_ptr(&registry).addr();
        let question = (client, repository.clone(), tag.to_owned(), access.clone());
        let (mut ticket, _) = self.resolutions.join(question.clone(), || async move {
            let (_, repository, tag, access) = &question;
            registry.resolve(repository, tag, access).await.map_err(|error| match error {
                FetchError::NotFound(what) => FailureReason::ImageNotFound.because(what).into(),
                FetchError::Denied(denial) => denial.into(),
                FetchError::Failed(failure) => failure.into(),
            })
        });
        let answer = tokio::time::timeout_at(patience, ticket.wait()).await;
        answer.ok().flatten().unwrap_or_else(|| Err(timeout().into()))
    }

    /// Leave to pull `digest` as `reference`, if a verdict in memory gives it: no question is asked
    /// of anybody, and none is answered. For work that may turn out to be in vain.
    pub fn recall(&self, reference: Reference, digest: &Digest) -> Option<Permit> {
        let active = self.active.load();
        let (Strategy::Signed(signed_by) | Strategy::Dev(signed_by)) =
            &active.config.policy.find(&reference)?.strategy
        else {
            return None;
        };
        let key = active.keys.held(&signed_by.key)?;
        let lifetimes = Lifetimes::from(&active.config.cache);
        let stored = self.store.recall(&question(&reference, digest, signed_by, &key), &lifetimes)?;
        Permit::proved(reference, digest, &stored).ok()
    }

    /// The places of one registry: a slow one must not hold up the others.
    fn at_registry(&self, registry: &str) -> Arc<Semaphore> {
        let mut all = self.at_registries.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|_, semaphore| Arc::strong_count(semaphore) > 1);
        let places = (self.active.load().config.limits.concurrent_verifications / 2).max(1);
        Arc::clone(all.entry(registry.to_owned()).or_insert_with(|| Arc::new(Semaphore::new(places))))
    }

    fn count(&self, judgement: &Judgement) {
        let reason = judgement.outcome.reason();
        let rule = judgement.rule.as_ref().map_or("none", |rule| rule.name.as_str());
        self.metrics.decisions.with_label_values(&[reason.decision(), reason.code(), rule]).inc();
        let strategy = judgement.rule.as_ref().map_or("none", |rule| rule.strategy);
        self.metrics
            .verification
            .with_label_values(&[strategy, judgement.cache.label()])
            .observe(judgement.took.as_secs_f64());
    }
}

enum RuleSays<'a> {
    Allow,
    Verify(&'a SignedBy),
}

fn rule<'a>(
    active: &'a Active,
    reference: &Reference,
    judgement: &mut Judgement,
) -> Result<RuleSays<'a>, Stop> {
    let Some(rule) = active.config.policy.find(reference) else {
        return match active.config.default {
            DefaultAction::Allow => Ok(RuleSays::Allow),
            DefaultAction::Deny => {
                Err(DenyReason::NoRule.because("no rule matches and the default is deny").into())
            }
        };
    };
    judgement.rule = Some(AppliedRule::new(rule));
    match &rule.strategy {
        Strategy::Allow => Ok(RuleSays::Allow),
        Strategy::Deny => Err(DenyReason::DenyRule.because("the rule denies it").into()),
        Strategy::Signed(signed_by) | Strategy::Dev(signed_by) => Ok(RuleSays::Verify(signed_by)),
    }
}

fn question(reference: &Reference, digest: &Digest, required: &SignedBy, key: &TrustedKey) -> VerdictKey {
    VerdictKey::new(&reference.repository, digest, &fingerprint::of(required, key))
}

fn timeout() -> Failure {
    FailureReason::Timeout.because("no verdict within the deadline")
}

impl From<&crate::config::Cache> for Lifetimes {
    fn from(cache: &crate::config::Cache) -> Self {
        Self { positive: cache.positive_ttl, negative: cache.negative_ttl, stale_grace: cache.stale_grace }
    }
}
