//! Prometheus metrics, prefix `pullgate_`. No unbounded label: rules are labelled by name or
//! position, registries and keys only by operation and outcome.

pub mod server;

use std::time::Duration;

use prometheus::{
    Encoder, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder, core::Collector,
};

/// Seconds: from a memory hit to the deadline.
const BUCKETS: &[f64] =
    &[0.000_01, 0.000_05, 0.000_25, 0.001, 0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];

/// Every metric of the daemon; cheap to share, safe to update from anywhere.
pub struct Metrics {
    registry: Registry,
    /// `pullgate_decisions_total{decision,reason,rule}`
    pub decisions: IntCounterVec,
    /// `pullgate_verification_duration_seconds{strategy,cache}`
    pub verification: HistogramVec,
    /// `pullgate_cache_requests_total{tier,outcome}`: tiers `memory`, `disk`, `evidence`, `key`.
    pub cache: IntCounterVec,
    /// `pullgate_cache_entries{tier}`
    pub cache_entries: IntGaugeVec,
    /// `pullgate_cache_evictions_total{tier,cause}`
    pub cache_evictions: IntCounterVec,
    /// `pullgate_cache_write_errors_total`
    pub cache_write_errors: IntCounter,
    /// `pullgate_single_flight_joins_total`
    pub joins: IntCounter,
    /// `pullgate_verifications_in_flight`
    pub in_flight: IntGauge,
    registry_requests: IntCounterVec,
    registry_duration: HistogramVec,
    kms_requests: IntCounterVec,
    kms_duration: HistogramVec,
    ecr_requests: IntCounterVec,
    /// `pullgate_containerd_duration_seconds{method}`
    pub delegate: HistogramVec,
    /// `pullgate_breakers_open{dependency}`: how many endpoints are not asked just now.
    pub breakers_open: IntGaugeVec,
    /// `pullgate_stale_allows_total`: allow verdicts past their TTL that stood in for a failure.
    pub stale_allows: IntCounter,
    /// `pullgate_key_conflicts`: aliases that point at another key than the one trusted.
    pub key_conflicts: IntGauge,
    /// `pullgate_config_reloads_total{outcome}`
    pub reloads: IntCounterVec,
    /// `pullgate_config_last_reload_success_timestamp_seconds`
    pub reload_time: IntGauge,
    /// `pullgate_config_last_reload_successful`: 1 or 0.
    pub reload_ok: IntGauge,
}

impl Metrics {
    /// All metrics, registered.
    ///
    /// # Errors
    /// When two metrics have one name: a mistake in this file.
    pub fn new() -> Result<Self, prometheus::Error> {
        let r = Registry::new_custom(Some("pullgate".into()), None)?;
        let build = counter_gauge(&r, "build_info", "The running version.", &["version"])?;
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        Ok(Self {
            decisions: counters(
                &r,
                "decisions_total",
                "Decisions on images.",
                &["decision", "reason", "rule"],
            )?,
            verification: histogram(
                &r,
                "verification_duration_seconds",
                "Time to a decision.",
                &["strategy", "cache"],
            )?,
            cache: counters(
                &r,
                "cache_requests_total",
                "Look-ups of verdicts and keys.",
                &["tier", "outcome"],
            )?,
            cache_entries: counter_gauge(&r, "cache_entries", "Entries held.", &["tier"])?,
            cache_evictions: counters(&r, "cache_evictions_total", "Entries dropped.", &["tier", "cause"])?,
            cache_write_errors: counter(
                &r,
                "cache_write_errors_total",
                "Verdicts that could not be stored.",
            )?,
            joins: counter(&r, "single_flight_joins_total", "Asks that joined a verification under way.")?,
            in_flight: gauge(&r, "verifications_in_flight", "Verifications under way.")?,
            registry_requests: counters(
                &r,
                "registry_requests_total",
                "Requests to registries.",
                &["operation", "outcome"],
            )?,
            registry_duration: histogram(
                &r,
                "registry_request_duration_seconds",
                "Time of a registry request.",
                &["operation"],
            )?,
            kms_requests: counters(
                &r,
                "kms_requests_total",
                "Requests to AWS KMS.",
                &["operation", "outcome"],
            )?,
            kms_duration: histogram(
                &r,
                "kms_request_duration_seconds",
                "Time of a KMS request.",
                &["operation"],
            )?,
            ecr_requests: counters(
                &r,
                "ecr_requests_total",
                "Requests to AWS ECR.",
                &["operation", "outcome"],
            )?,
            delegate: histogram(
                &r,
                "containerd_duration_seconds",
                "Time that the next hop took.",
                &["method"],
            )?,
            breakers_open: counter_gauge(
                &r,
                "breakers_open",
                "Endpoints that are not asked just now.",
                &["dependency"],
            )?,
            stale_allows: counter(
                &r,
                "stale_allows_total",
                "Allow verdicts past their TTL that stood in for a failure.",
            )?,
            key_conflicts: gauge(
                &r,
                "key_conflicts",
                "Aliases that point at another key than the trusted one.",
            )?,
            reloads: counters(&r, "config_reloads_total", "Configuration reloads.", &["outcome"])?,
            reload_time: gauge(
                &r,
                "config_last_reload_success_timestamp_seconds",
                "When the policy in force was loaded.",
            )?,
            reload_ok: gauge(&r, "config_last_reload_successful", "Whether the newest file is in force.")?,
            registry: r,
        })
    }

    /// One request to a registry: `operation` is `resolve`, `manifest`, `blob` or `token`;
    /// `outcome` is `ok`, `not_found` or a failure's code.
    pub fn registry_request(&self, operation: &'static str, outcome: &'static str, took: Duration) {
        self.registry_requests.with_label_values(&[operation, outcome]).inc();
        self.registry_duration.with_label_values(&[operation]).observe(took.as_secs_f64());
    }

    /// One request to KMS: `operation` is `GetPublicKey` or `Verify`.
    pub fn kms_request(&self, operation: &'static str, outcome: &'static str, took: Duration) {
        self.kms_requests.with_label_values(&[operation, outcome]).inc();
        self.kms_duration.with_label_values(&[operation]).observe(took.as_secs_f64());
    }

    /// One request to ECR (`GetAuthorizationToken`).
    pub fn ecr_request(&self, outcome: &'static str) {
        self.ecr_requests.with_label_values(&["GetAuthorizationToken", outcome]).inc();
    }

    /// One look-up: `tier` is `memory`, `disk`, `evidence` or `key`; `outcome` `hit`, `miss` or `stale`.
    pub fn cache_request(&self, tier: &'static str, outcome: &'static str) {
        self.cache.with_label_values(&[tier, outcome]).inc();
    }

    /// The Prometheus text format.
    ///
    /// # Errors
    /// When a metric can't be encoded.
    pub fn text(&self) -> Result<Vec<u8>, prometheus::Error> {
        let mut text = Vec::with_capacity(16 << 10);
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(text)
    }
}

fn register<C: Collector + Clone + 'static>(registry: &Registry, metric: C) -> Result<C, prometheus::Error> {
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}

fn counter(r: &Registry, name: &str, help: &str) -> Result<IntCounter, prometheus::Error> {
    register(r, IntCounter::new(name, help)?)
}

fn counters(
    r: &Registry,
    name: &str,
    help: &str,
    labels: &[&str],
) -> Result<IntCounterVec, prometheus::Error> {
    register(r, IntCounterVec::new(Opts::new(name, help), labels)?)
}

fn gauge(r: &Registry, name: &str, help: &str) -> Result<IntGauge, prometheus::Error> {
    register(r, IntGauge::new(name, help)?)
}

fn counter_gauge(
    r: &Registry,
    name: &str,
    help: &str,
    labels: &[&str],
) -> Result<IntGaugeVec, prometheus::Error> {
    register(r, IntGaugeVec::new(Opts::new(name, help), labels)?)
}

fn histogram(
    r: &Registry,
    name: &str,
    help: &str,
    labels: &[&str],
) -> Result<HistogramVec, prometheus::Error> {
    register(r, HistogramVec::new(HistogramOpts::new(name, help).buckets(BUCKETS.to_vec()), labels)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_has_the_prefix_and_its_own_name() {
        let metrics = Metrics::new().unwrap();
        metrics.registry_request("manifest", "ok", Duration::from_millis(3));
        metrics.decisions.with_label_values(&["allow", "signed", "ci"]).inc();
        let text = String::from_utf8(metrics.text().unwrap()).unwrap();
        assert!(text.contains("pullgate_registry_requests_total{operation=\"manifest\",outcome=\"ok\"} 1"));
        let documented = include_str!("../../../docs/metrics.md");
        for name in text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()) {
            assert!(documented.contains(&format!("\n| `{name}` |")), "{name}");
        }
        assert!(text.lines().filter(|l| !l.starts_with('#')).all(|l| l.starts_with("pullgate_")), "{text}");
    }
}
