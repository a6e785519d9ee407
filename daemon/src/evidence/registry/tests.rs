//! The client against registries that misbehave.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};

use super::ecr::tests::{ecr_at, token};
use super::testing::{Reply, Seen, Server};
use super::*;
use crate::reference::Reference;

const BYTES: &[u8] = b"{\"schemaVersion\":2}";

/// A client with an empty certs.d, and what belongs to it.
struct World {
    registry: Registry,
    certs_d: tempfile::TempDir,
    metrics: Arc<Metrics>,
    access: Access,
}

impl World {
    fn new() -> Self {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let certs_d = tempfile::tempdir().unwrap();
        let metrics = Arc::new(Metrics::new().unwrap());
        let settings = Settings { certs_d: certs_d.path().to_owned(), ..Settings::default() };
        let registry = Registry::new(settings, metrics.clone());
        Self { registry, certs_d, metrics, access: Access::default() }
    }

    /// With a hosts.toml for `registry`.
    fn hosts(self, registry: &str, toml: &str) -> Self {
        let directory = self.certs_d.path().join(registry);
        std::fs::create_dir_all(&directory).unwrap();
        std::fs::write(directory.join("hosts.toml"), toml).unwrap();
        self
    }

    /// With `user` and `hunter2` in the pull.
    fn credentials(mut self) -> Self {
        self.access.credentials = Credentials::from_auth_config(AuthConfig {
            username: "user".into(),
            password: "hunter2".into(),
            ..AuthConfig::default()
        });
        self
    }

    async fn resolve(&self, image: &str) -> Result<Digest, FetchError> {
        let reference = Reference::parse(image).unwrap();
        let Pointer::Tag(tag) = &reference.pointer else { panic!("{image} has no tag") };
        self.registry.resolve(&reference.repository, tag, &self.access).await
    }

    async fn manifest(&self, image: &str) -> Result<Manifest, FetchError> {
        let reference = Reference::parse(image).unwrap();
        self.registry.manifest(&reference.repository, &reference.pointer, 1 << 20, &self.access).await
    }

    async fn blob(&self, host: &str, bytes: &[u8], size: u64) -> Result<Bytes, FetchError> {
        let reference = Reference::parse(&format!("{host}/team/app")).unwrap();
        self.registry.blob(&reference.repository, &Digest::sha256(bytes), size, 1 << 20, &self.access).await
    }
}

fn by_digest(server: &Server) -> String {
    format!("{}/team/app@{}", server.address, Digest::sha256(BYTES))
}

fn by_tag(server: &Server) -> String {
    format!("{}/team/app:v1", server.address)
}

/// Serves `BYTES` for everything, with digest.
fn good(_: &Seen) -> Reply {
    Reply::ok(BYTES)
        .header("docker-content-digest", Digest::sha256(BYTES).as_str())
        .header("content-type", "application/vnd.oci.image.manifest.v1+json; charset=utf-8")
}

#[track_caller]
fn failed<T: std::fmt::Debug>(result: Result<T, FetchError>) -> Failure {
    match result {
        Err(FetchError::Failed(failure)) => failure,
        other => panic!("not a failure: {other:?}"),
    }
}

#[track_caller]
fn denied<T: std::fmt::Debug>(result: Result<T, FetchError>) -> Denial {
    match result {
        Err(FetchError::Denied(denial)) => denial,
        other => panic!("not a denial: {other:?}"),
    }
}

#[tokio::test]
async fn a_pull_is_one_head_and_one_get_on_one_connection() {
    let server = Server::new(good).await;
    let world = World::new();
    let digest = world.resolve(&by_tag(&server)).await.unwrap();
    assert_eq!(digest, Digest::sha256(BYTES));
    let manifest = world.manifest(&by_digest(&server)).await.unwrap();
    assert_eq!(manifest.bytes, BYTES);
    assert_eq!(manifest.media_type, "application/vnd.oci.image.manifest.v1+json");
    let seen: Vec<_> = server.seen().into_iter().filter(|seen| seen.line != "TLS").collect();
    assert_eq!(seen.len(), 2);
    assert_eq!(seen[0].line, "HEAD /v2/team/app/manifests/v1");
    assert_eq!(seen[0].connection, seen[1].connection);
    assert!(seen[0].header("accept").unwrap().contains("application/vnd.oci.image.index.v1+json"));
    assert!(seen[0].header("user-agent").unwrap().starts_with("pullgate/"));
    let text = String::from_utf8(world.metrics.text().unwrap()).unwrap();
    assert!(text.contains("registry_requests_total{operation=\"resolve\",outcome=\"ok\"} 1"), "{text}");
    assert!(text.contains("registry_requests_total{operation=\"manifest\",outcome=\"ok\"} 1"), "{text}");
}

#[tokio::test]
async fn without_a_digest_header_the_manifest_is_fetched_and_hashed() {
    for header in ["", "sha256:short"] {
        let server = Server::new(move |_| match header {
            "" => Reply::ok(BYTES),
            header => Reply::ok(BYTES).header("docker-content-digest", header),
        })
        .await;
        assert_eq!(World::new().resolve(&by_tag(&server)).await.unwrap(), Digest::sha256(BYTES));
    }
    let no_head = |seen: &Seen| if seen.line.starts_with("HEAD") { Reply::code(405) } else { good(seen) };
    let server = Server::new(no_head).await;
    assert_eq!(World::new().resolve(&by_tag(&server)).await.unwrap(), Digest::sha256(BYTES));
}

#[tokio::test]
async fn other_bytes_than_asked_for_are_denied_kyverno_cve_2022_47633() {
    let server = Server::new(|_| Reply::ok("something else")).await;
    let denial = denied(World::new().manifest(&by_digest(&server)).await);
    assert_eq!(denial.reason, DenyReason::MalformedEvidence);
    let denial = denied(World::new().blob(&server.address, b"expected bytes", 14).await);
    assert_eq!(denial.reason, DenyReason::MalformedEvidence);
}

#[tokio::test]
async fn a_blob_must_have_its_descriptor_s_size() {
    let server = Server::new(good).await;
    let world = World::new();
    let size = BYTES.len() as u64;
    assert_eq!(world.blob(&server.address, BYTES, size).await.unwrap(), BYTES);
    for size in [size - 1, size + 1] {
        let denial = denied(world.blob(&server.address, BYTES, size).await);
        assert_eq!(denial.reason, DenyReason::MalformedEvidence);
    }
    let denial = denied(world.blob(&server.address, BYTES, (1 << 20) + 1).await);
    assert_eq!(denial.reason, DenyReason::EvidenceTooLarge);
}

#[tokio::test]
async fn an_endless_body_is_cut_at_the_cap_cosign_cve_2023_46737() {
    let server = Server::new(|_| Reply::Endless).await;
    let denial = denied(World::new().manifest(&by_digest(&server)).await);
    assert_eq!(denial.reason, DenyReason::EvidenceTooLarge);
    let denial = denied(World::new().blob(&server.address, b"x", 1).await);
    assert_eq!(denial.reason, DenyReason::MalformedEvidence);
}

#[tokio::test]
async fn absence_is_told_only_when_every_host_says_so() {
    let absent = Server::new(|_| Reply::code(404)).await;
    let broken = Server::new(|_| Reply::code(503)).await;
    let two = |a: &Server, b: &Server| format!("server = '{}'\n[host.'{}']\n", b.url(), a.url());
    let world = World::new().hosts("r.example.com", &two(&absent, &absent));
    let missing = world.resolve("r.example.com/a:v1").await.unwrap_err();
    assert_eq!(missing, FetchError::NotFound("r.example.com/a:v1".into()));
    for toml in [two(&absent, &broken), two(&broken, &absent)] {
        let world = World::new().hosts("r.example.com", &toml);
        let failure = failed(world.resolve("r.example.com/a:v1").await);
        assert_eq!(failure.found, format!("{} answers with the error 503", broken.address));
    }
}

#[tokio::test]
async fn mirrors_are_asked_in_order_for_what_they_may_answer() {
    for first in [
        Reply::code(404),
        Reply::code(500),
        Reply::code(401),
        Reply::code(403),
        Reply::code(429),
        Reply::Close,
    ] {
        let mirror = Server::new(move |_| first.clone()).await;
        let upstream = Server::new(good).await;
        let toml = format!("server = '{}'\n[host.'{}']\n", upstream.url(), mirror.url());
        let world = World::new().hosts("r.example.com", &toml);
        assert_eq!(world.manifest("r.example.com/a:v1").await.unwrap().bytes, BYTES);
        assert_eq!(mirror.lines(), ["GET /v2/a/manifests/v1?ns=r.example.com"]);
        assert_eq!(upstream.lines(), ["GET /v2/a/manifests/v1?ns=r.example.com"]);
    }
    let mirror = Server::new(good).await;
    let upstream = Server::new(good).await;
    let toml = format!(
        "server = '{}'\ncapabilities = ['resolve']\n[host.'{}']\ncapabilities = ['pull']\n",
        upstream.url(),
        mirror.url()
    );
    let world = World::new().hosts("r.example.com", &toml);
    let digest = world.resolve("r.example.com/a:v1").await.unwrap();
    world.manifest(&format!("r.example.com/a@{digest}")).await.unwrap();
    assert_eq!(upstream.lines(), ["HEAD /v2/a/manifests/v1?ns=r.example.com"]);
    assert_eq!(mirror.lines(), [format!("GET /v2/a/manifests/{digest}?ns=r.example.com")]);
}

#[tokio::test]
async fn a_malformed_hosts_file_is_a_failure_that_names_it() {
    let world = World::new().hosts("r.example.com", "server = [\n");
    let failure = failed(world.resolve("r.example.com/a:v1").await);
    assert!(failure.found.contains("r.example.com/hosts.toml:"), "{}", failure.found);
}

#[tokio::test]
async fn a_passing_error_is_tried_again_and_a_lasting_one_three_times() {
    let count = AtomicUsize::new(0);
    let server = Server::new(move |seen| match count.fetch_add(1, Ordering::SeqCst) {
        0 => Reply::Close,
        1 => Reply::code(502),
        _ => good(seen),
    })
    .await;
    let world = World::new().hosts("r.example.com", &format!("server = '{}'", server.url()));
    world.manifest("r.example.com/a:v1").await.unwrap();
    assert_eq!(server.seen().len(), TRIES);
    let broken = Server::new(|_| Reply::code(500)).await;
    let world = World::new().hosts("r.example.com", &format!("server = '{}'", broken.url()));
    failed(world.manifest("r.example.com/a:v1").await);
    assert_eq!(broken.seen().len(), TRIES);
}

#[tokio::test]
async fn too_many_requests_is_throttled_and_retry_after_is_honoured() {
    let count = AtomicUsize::new(0);
    let server = Server::new(move |seen| match count.fetch_add(1, Ordering::SeqCst) {
        0 => Reply::code(429).header("retry-after", "1"),
        _ => good(seen),
    })
    .await;
    let world = World::new().hosts("r.example.com", &format!("server = '{}'", server.url()));
    let start = Instant::now();
    world.manifest("r.example.com/a:v1").await.unwrap();
    assert!(start.elapsed() >= Duration::from_secs(1));

    let busy = Server::new(|_| Reply::code(429).header("retry-after", "3600")).await;
    let world = World::new().hosts("r.example.com", &format!("server = '{}'", busy.url()));
    let failure = failed(world.manifest("r.example.com/a:v1").await);
    assert_eq!(failure.reason, FailureReason::RegistryThrottled);
    assert_eq!(failure.found, format!("{} asks to slow down (429)", busy.address));
    assert_eq!(busy.seen().len(), 1);
}

#[tokio::test]
async fn transport_faults_are_unavailable_with_one_text_for_one_cause() {
    for (reply, phrase) in [
        (Reply::Close, "breaks off the connection before the answer is complete"),
        (Reply::Truncated, "breaks off the connection before the answer is complete"),
        (Reply::code(500), "answers with the error 500"),
        (Reply::code(418), "answers with the error 418"),
    ] {
        let server = Server::new(move |_| reply.clone()).await;
        let world = World::new().hosts("r.example.com", &format!("server = '{}'", server.url()));
        // The breaker opens on the way: the text stays.
        for _ in 0..4 {
            let failure = failed(world.manifest("r.example.com/a:v1").await);
            assert_eq!(failure.reason, FailureReason::RegistryUnavailable);
            assert_eq!(failure.found, format!("{} {phrase}", server.address));
        }
    }
    let world = World::new();
    let failure = failed(world.manifest("127.0.0.1:1/a:v1").await);
    assert_eq!(failure.found, "127.0.0.1:1 can't be reached: connection refused");
    let failure = failed(world.manifest("no-such-host.invalid/a:v1").await);
    assert_eq!(failure.found, "no-such-host.invalid can't be reached: no such host name is known");
}

#[tokio::test]
async fn the_text_is_the_same_whether_https_was_tried_or_not() {
    let server = Server::new(good).await;
    let (world, image) = (World::new(), by_digest(&server));
    world.manifest(&image).await.unwrap();
    drop(server);
    let known = failed(world.manifest(&image).await);
    let unknown = failed(World::new().manifest(&image).await);
    assert_eq!(known, unknown);
}

#[tokio::test]
async fn a_silent_registry_is_left_after_a_while() {
    let server = Server::new(|_| Reply::Hang).await;
    let world = World::new().hosts("r.example.com", &format!("server = '{}'", server.url()));
    let start = Instant::now();
    let failure = failed(world.manifest("r.example.com/a:v1").await);
    assert_eq!(failure.found, format!("{} gives no complete answer within 7 s", server.address));
    assert!(start.elapsed() < Duration::from_secs(12));
}

#[tokio::test]
async fn the_breaker_spares_a_registry_that_keeps_failing() {
    let server = Server::new(|_| Reply::code(500)).await;
    let world = World::new().hosts("r.example.com", &format!("server = '{}'", server.url()));
    for _ in 0..3 {
        failed(world.manifest("r.example.com/a:v1").await);
    }
    assert_eq!(server.seen().len(), 5);
    let text = String::from_utf8(world.metrics.text().unwrap()).unwrap();
    assert!(text.contains("breakers_open{dependency=\"registry\"} 1"), "{text}");
}

/// A registry with a token service on another server: 401 unless the bearer is `issued`.
async fn with_tokens(
    issued: impl Fn(&Seen) -> Reply + Send + Sync + 'static,
    accepted: &'static str,
) -> (Server, Server) {
    let tokens = Server::new(issued).await;
    let realm = format!("Bearer realm=\"{}/token\",service=\"registry\"", tokens.url());
    let registry = Server::new(move |seen| match seen.header("authorization") {
        Some(header) if header == format!("Bearer {accepted}") => good(seen),
        _ => Reply::code(401).header("www-authenticate", realm.clone()),
    })
    .await;
    (registry, tokens)
}

fn issue(token: &'static str) -> impl Fn(&Seen) -> Reply + Send + Sync {
    move |_| Reply::ok(serde_json::json!({"token": token, "expires_in": 300}).to_string())
}

#[tokio::test]
async fn a_token_is_asked_for_once_with_basic_credentials() {
    let (registry, tokens) = with_tokens(issue("t0ken"), "t0ken").await;
    let world = World::new().credentials();
    world.resolve(&by_tag(&registry)).await.unwrap();
    world.manifest(&by_digest(&registry)).await.unwrap();
    assert_eq!(
        tokens.lines(),
        ["GET /token?service=registry&scope=repository%3Ateam%2Fapp%3Apull&account=user"]
    );
    assert_eq!(tokens.seen()[0].header("authorization"), Some("Basic dXNlcjpodW50ZXIy"));
    let seen: Vec<_> = registry.seen().into_iter().filter(|seen| seen.line != "TLS").collect();
    assert_eq!(seen.len(), 3, "{seen:?}");
    assert!(seen.iter().all(|seen| seen.header("authorization").is_none_or(|h| h == "Bearer t0ken")));
}

#[tokio::test]
async fn a_remembered_token_that_is_refused_is_asked_for_once_again() {
    let count = Arc::new(AtomicUsize::new(0));
    let counter = count.clone();
    let issue = move |_: &Seen| {
        let number = counter.fetch_add(1, Ordering::SeqCst);
        Reply::ok(serde_json::json!({"token": format!("t{number}"), "expires_in": 300}).to_string())
    };
    let tokens = Server::new(issue).await;
    let realm = format!("Bearer realm=\"{}/token\"", tokens.url());
    let registry = Server::new(move |seen| {
        let newest = format!("Bearer t{}", count.load(Ordering::SeqCst).saturating_sub(1));
        match seen.header("authorization") {
            Some(header) if header == newest && !seen.line.contains("stale") => good(seen),
            Some("Bearer t1") => good(seen),
            _ => Reply::code(401).header("www-authenticate", realm.clone()),
        }
    })
    .await;
    let world = World::new();
    world.resolve(&by_tag(&registry)).await.unwrap();
    world.resolve(&format!("{}/team/app:stale", registry.address)).await.unwrap();
    assert_eq!(tokens.seen().len(), 2);
}

#[tokio::test]
async fn an_identity_token_is_exchanged_by_post() {
    let (registry, tokens) = with_tokens(issue("t0ken"), "t0ken").await;
    let mut world = World::new();
    world.access.credentials = Credentials::from_auth_config(AuthConfig {
        identity_token: "r3fresh".into(),
        ..AuthConfig::default()
    });
    world.resolve(&by_tag(&registry)).await.unwrap();
    let seen = &tokens.seen()[0];
    assert_eq!(seen.line, "POST /token");
    assert_eq!(
        seen.body,
        "grant_type=refresh_token&service=registry&client_id=pullgate\
         &scope=repository%3Ateam%2Fapp%3Apull&refresh_token=r3fresh"
    );
}

#[tokio::test]
async fn a_registry_token_is_sent_as_it_is() {
    let (registry, tokens) = with_tokens(issue("other"), "r3gistry").await;
    let mut world = World::new();
    world.access.credentials = Credentials::from_auth_config(AuthConfig {
        registry_token: "r3gistry".into(),
        ..AuthConfig::default()
    });
    world.manifest(&by_digest(&registry)).await.unwrap();
    assert!(tokens.seen().is_empty());
}

#[tokio::test]
async fn basic_is_sent_when_asked_for_and_then_remembered() {
    let server = Server::new(|seen| match seen.header("authorization") {
        Some("Basic dXNlcjpodW50ZXIy") => good(seen),
        _ => Reply::code(401).header("www-authenticate", "Basic realm=\"r\""),
    })
    .await;
    let world = World::new().credentials();
    world.resolve(&by_tag(&server)).await.unwrap();
    world.manifest(&by_digest(&server)).await.unwrap();
    assert_eq!(server.seen().iter().filter(|seen| seen.line != "TLS").count(), 3);
}

#[tokio::test]
async fn refused_credentials_are_registry_auth_with_a_remedy_and_no_secret() {
    let challenge = || Reply::code(401).header("www-authenticate", "Basic realm=\"r\"");
    let server = Server::new(move |_| challenge()).await;
    let failure = failed(World::new().credentials().manifest(&by_digest(&server)).await);
    assert_eq!(failure.reason, FailureReason::RegistryAuth);
    assert_eq!(
        failure.found,
        format!(
            "{} does not let the credentials of the pull read {}/team/app (401): check the Pod's \
             imagePullSecret or the kubelet's credential provider",
            server.address, server.address
        )
    );
    let failure = failed(World::new().manifest(&by_digest(&server)).await);
    assert!(failure.found.contains("does not let anonymous readers read"), "{}", failure.found);
    let forbidden = Server::new(|_| Reply::code(403)).await;
    let failure = failed(World::new().manifest(&by_digest(&forbidden)).await);
    assert_eq!(failure.reason, FailureReason::RegistryAuth);
}

#[tokio::test]
async fn a_token_service_that_fails_is_told_without_its_url() {
    for (reply, reason) in [
        (Reply::code(401), FailureReason::RegistryAuth),
        (Reply::code(429), FailureReason::RegistryThrottled),
        (Reply::code(500), FailureReason::RegistryUnavailable),
        (Reply::code(404), FailureReason::RegistryUnavailable),
        (Reply::ok("no token"), FailureReason::RegistryUnavailable),
        (Reply::Endless, FailureReason::RegistryUnavailable),
    ] {
        let (registry, _tokens) = with_tokens(move |_| reply.clone(), "x").await;
        let failure = failed(World::new().credentials().manifest(&by_digest(&registry)).await);
        assert_eq!(failure.reason, reason, "{}", failure.found);
        assert!(!failure.found.contains("/token") && !failure.found.contains("user"), "{}", failure.found);
    }
}

#[tokio::test]
async fn a_realm_in_the_clear_is_refused_by_a_registry_over_tls() {
    let pki = Pki::new();
    let server = Server::tls(pki.server(), |_| {
        Reply::code(401).header("www-authenticate", "Bearer realm=\"http://127.0.0.1:9/token\"")
    })
    .await;
    let world = pki.trusted(World::new().credentials(), &server);
    let failure = failed(world.manifest("r.example.com/a:v1").await);
    assert_eq!(failure.reason, FailureReason::RegistryAuth);
    assert_eq!(
        failure.found,
        format!("{} names a token service that is not at an https URL", server.address)
    );
}

#[tokio::test]
async fn a_redirect_elsewhere_gets_neither_credentials_nor_headers_ratify_cve_2025_27403() {
    let storage = Server::new(good).await;
    let target = format!("{}/blob?signature=s1gnature", storage.url());
    let server = Server::new(move |seen| match seen.header("authorization") {
        Some(_) => Reply::code(307).header("location", target.clone()),
        None => Reply::code(401).header("www-authenticate", "Basic realm=\"r\""),
    })
    .await;
    let toml = format!("server = '{}'\n[header]\nx-key = 'sesame'\n", server.url());
    let world = World::new().credentials().hosts("r.example.com", &toml);
    world.blob("r.example.com", BYTES, BYTES.len() as u64).await.unwrap();
    let seen = storage.seen();
    assert_eq!(seen[0].line, "GET /blob?signature=s1gnature");
    assert!(seen[0].header("authorization").is_none() && seen[0].header("x-key").is_none());
    assert_eq!(server.seen()[0].header("x-key"), Some("sesame"));
    assert!(server.seen()[1].header("authorization").is_some());
}

#[tokio::test]
async fn a_challenge_of_a_redirect_s_target_is_not_met() {
    let thief = Server::new(issue("t0ken")).await;
    for challenge in ["Basic realm=\"give\"".to_owned(), format!("Bearer realm=\"{}/give\"", thief.url())] {
        let greedy =
            Server::new(move |_| Reply::code(401).header("www-authenticate", challenge.clone())).await;
        let target = format!("{}/x?sig=s1gnature", greedy.url());
        let server = Server::new(move |_| Reply::code(302).header("location", target.clone())).await;
        let toml = format!("server = '{}'", server.url());
        let world = World::new().credentials().hosts("r.example.com", &toml);
        let failure = failed(world.blob("r.example.com", BYTES, 1).await);
        assert_eq!(failure.found, format!("{} answers with the error 401", greedy.address));
        assert_eq!((server.seen().len(), greedy.seen().len(), thief.seen().len()), (1, 1, 0));
    }
}

#[tokio::test]
async fn redirects_within_a_host_keep_the_credentials_and_end_after_five() {
    let server = Server::new(|seen| match (seen.header("authorization"), seen.line.contains("/moved")) {
        (None, _) => Reply::code(401).header("www-authenticate", "Basic realm=\"r\""),
        (_, false) => Reply::code(308).header("location", "/moved"),
        (_, true) => good(seen),
    })
    .await;
    let world = World::new().credentials().hosts("r.example.com", &format!("server = '{}'", server.url()));
    world.blob("r.example.com", BYTES, BYTES.len() as u64).await.unwrap();
    let looping = Server::new(|_| Reply::code(302).header("location", "/again")).await;
    let world = World::new().hosts("r.example.com", &format!("server = '{}'", looping.url()));
    let failure = failed(world.blob("r.example.com", BYTES, 1).await);
    assert_eq!(failure.found, format!("{} redirects without end", looping.address));
    assert_eq!(looping.seen().len(), 6);
}

#[tokio::test]
async fn credentials_for_a_named_server_do_not_go_to_its_mirror() {
    let mirror = Server::new(|_| Reply::code(401).header("www-authenticate", "Basic realm=\"r\"")).await;
    let mut world = World::new().hosts("r.example.com", &format!("server = '{}'", mirror.url()));
    world.access.credentials = Credentials::from_auth_config(AuthConfig {
        username: "user".into(),
        password: "hunter2".into(),
        server_address: "https://r.example.com".into(),
        ..AuthConfig::default()
    });
    failed(world.manifest("r.example.com/a:v1").await);
    assert!(mirror.seen().iter().all(|seen| seen.header("authorization").is_none()));
}

#[tokio::test]
async fn an_ecr_registry_s_token_goes_to_its_mirror_on_loopback_when_it_asks() {
    const HOST: &str = "123456789012.dkr.ecr.us-west-2.amazonaws.com";
    let aws = Server::new(|_| token("s3cret", 12 * 3600)).await;
    let mirror = Server::new(|seen| match seen.header("authorization") {
        Some("Basic QVdTOnMzY3JldA==") => good(seen),
        _ => Reply::code(401).header("www-authenticate", "Basic realm=\"ecr\""),
    })
    .await;
    let mut world = World::new().hosts(HOST, &format!("server = '{}'", mirror.url()));
    world.registry.ecr = ecr_at(&aws.url()).await;
    world.manifest(&format!("{HOST}/team/app:v1")).await.unwrap();
    world.resolve(&format!("{HOST}/team/app:v1")).await.unwrap();
    assert_eq!(aws.seen().len(), 1);
    assert_eq!(mirror.seen().len(), 3);
    assert!(mirror.seen()[0].header("authorization").is_none());
}

#[tokio::test]
async fn a_docker_configuration_of_the_node_is_used_last() {
    let server = Server::new(|seen| match seen.header("authorization") {
        Some("Basic bm9kZTpub2RlcGFzcw==") => good(seen),
        _ => Reply::code(401).header("www-authenticate", "Basic realm=\"r\""),
    })
    .await;
    let mut world = World::new();
    let path = world.certs_d.path().join("config.json");
    let auths = serde_json::json!({"auths": {
        server.address.clone(): {"username": "node", "password": "nodepass"}}});
    std::fs::write(&path, auths.to_string()).unwrap();
    world.registry.docker_configs = DockerConfigs::new(vec![path]);
    world.manifest(&by_digest(&server)).await.unwrap();
}

/// A CA, and what it signs.
struct Pki {
    ca: CertifiedIssuer<'static, KeyPair>,
}

impl Pki {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self { ca: CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap() }
    }

    fn leaf(&self, name: &str) -> (rcgen::Certificate, KeyPair) {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        (params.signed_by(&key, &self.ca).unwrap(), key)
    }

    fn builder() -> rustls::ConfigBuilder<rustls::ServerConfig, rustls::WantsVerifier> {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        rustls::ServerConfig::builder()
    }

    /// A server's configuration for `127.0.0.1`.
    fn server(&self) -> rustls::ServerConfig {
        self.server_named("127.0.0.1")
    }

    fn server_named(&self, name: &str) -> rustls::ServerConfig {
        let (certificate, key) = self.leaf(name);
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        Self::builder().with_no_client_auth().with_single_cert(vec![certificate.der().clone()], key).unwrap()
    }

    /// A server that asks for a client certificate by this CA.
    fn mutual(&self) -> rustls::ServerConfig {
        let (certificate, key) = self.leaf("127.0.0.1");
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let mut roots = rustls::RootCertStore::empty();
        roots.add(self.ca.der().clone()).unwrap();
        let builder = Self::builder();
        let verifier = rustls::server::WebPkiClientVerifier::builder(Arc::new(roots)).build().unwrap();
        builder
            .with_client_cert_verifier(verifier)
            .with_single_cert(vec![certificate.der().clone()], key)
            .unwrap()
    }

    /// `world` with this CA for `r.example.com`, which `server` serves.
    fn trusted(&self, world: World, server: &Server) -> World {
        let world = world.hosts("r.example.com", &format!("server = '{}'\nca = 'ca.pem'\n", server.url()));
        std::fs::write(world.certs_d.path().join("r.example.com/ca.pem"), self.ca.pem()).unwrap();
        world
    }
}

#[tokio::test]
async fn a_configured_ca_is_trusted_beside_the_system_s() {
    let pki = Pki::new();
    let server = Server::tls(pki.server(), good).await;
    let world = pki.trusted(World::new(), &server);
    world.manifest("r.example.com/a:v1").await.unwrap();

    let world = World::new().hosts("r.example.com", &format!("server = '{}'", server.url()));
    let failure = failed(world.manifest("r.example.com/a:v1").await);
    assert!(failure.found.contains("by an unknown authority"), "{}", failure.found);

    let world =
        World::new().hosts("r.example.com", &format!("server = '{}'\nskip_verify = true\n", server.url()));
    world.manifest("r.example.com/a:v1").await.unwrap();
}

#[tokio::test]
async fn a_certificate_for_another_name_is_refused() {
    let pki = Pki::new();
    let server = Server::tls(pki.server_named("other.example.com"), good).await;
    let failure = failed(pki.trusted(World::new(), &server).manifest("r.example.com/a:v1").await);
    assert_eq!(failure.found, format!("{} shows a TLS certificate for another name", server.address));
}

#[tokio::test]
async fn docker_s_certificate_layout_and_client_certificates_work() {
    let pki = Pki::new();
    let server = Server::tls(pki.mutual(), good).await;
    let (certificate, key) = pki.leaf("node");
    let world = World::new();
    let directory = world.certs_d.path().join(server.address.replace(':', "_") + "_");
    std::fs::create_dir_all(&directory).unwrap();
    std::fs::write(directory.join("ca.crt"), pki.ca.pem()).unwrap();
    let image = format!("{}/a:v1", server.address);
    let failure = failed(world.manifest(&image).await);
    assert_eq!(failure.reason, FailureReason::RegistryUnavailable);
    let world = World::new();
    let directory = world.certs_d.path().join(server.address.replace(':', "_") + "_");
    std::fs::create_dir_all(&directory).unwrap();
    std::fs::write(directory.join("ca.crt"), pki.ca.pem()).unwrap();
    std::fs::write(directory.join("client.cert"), certificate.pem()).unwrap();
    std::fs::write(directory.join("client.key"), key.serialize_pem()).unwrap();
    world.manifest(&image).await.unwrap();
}

#[tokio::test]
async fn a_local_registry_with_tls_is_spoken_to_over_tls() {
    let server = Server::tls(Pki::new().server(), good).await;
    let world = World::new();
    world.manifest(&by_digest(&server)).await.unwrap();
    world.resolve(&by_tag(&server)).await.unwrap();
    assert_eq!(server.seen().len(), 2);
}

#[tokio::test]
async fn a_registry_over_tls_can_t_redirect_to_http() {
    let plain = Server::new(good).await;
    let pki = Pki::new();
    let target = format!("{}/x?sig=s1gnature", plain.url());
    let server =
        Server::tls(pki.server(), move |_| Reply::code(307).header("location", target.clone())).await;
    let failure = failed(pki.trusted(World::new(), &server).manifest("r.example.com/a:v1").await);
    assert_eq!(failure.found, format!("{} redirects from https to a less secure place", server.address));
    assert!(plain.seen().is_empty());
}

#[tokio::test]
async fn no_text_for_a_person_holds_a_secret() {
    let (registry, _tokens) = with_tokens(issue("t0ken"), "never").await;
    let world = World::new().credentials();
    let error = world.manifest(&by_digest(&registry)).await.unwrap_err();
    let shown = format!("{error:?} {:?}", world.access);
    for secret in ["hunter2", "dXNlcjpodW50ZXIy", "t0ken", "account="] {
        assert!(!shown.contains(secret), "{shown}");
    }
}

#[test]
fn work_may_go_on_in_a_task_of_its_own() {
    fn is_send(_: impl Send) {}
    let world = World::new();
    is_send(world.resolve("r.example.com/a:v1"));
    is_send(world.manifest("r.example.com/a:v1"));
    is_send(world.blob("r.example.com", BYTES, 1));
}
