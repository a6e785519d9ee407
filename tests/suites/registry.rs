//! Registries that refuse, throttle, stall, lie or are away; logins of every kind; hosts.toml.

use anyhow::{Context, Result, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use pullgate_tests::registry::{ECR_PASSWORD, ECR_USER, PASSWORD, TLS_NAME, USER};
use pullgate_tests::world::WorldOptions;
use pullgate_tests::{
    Fault, Gate, Image, KmsKey, Oci, Proxy, PullOptions, Pullgate, Pushed, Registry, RegistryOptions, Rule,
    SigTag, World, policy, refused, refused_with, wait,
};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// The manifest of an image by its digest.
const IMAGE: &str = "/v2/*/manifests/sha256:*";
/// The list of its signatures.
const SIGNATURES: &str = "/v2/*/manifests/sha256-*.sig";
/// What was signed.
const PAYLOAD: &str = "/v2/*/blobs/sha256:*";
/// Its tag.
const TAG: &str = "/v2/*/manifests/v1";

/// A world with one registry and a key: KMS signs, pullgate has the public half in a file.
struct Site {
    world: World,
    key: KmsKey,
    uri: String,
}

impl Site {
    async fn start() -> Result<Self> {
        Self::with(RegistryOptions::default()).await
    }

    async fn with(registry: RegistryOptions) -> Result<Self> {
        Self::of(World::with(WorldOptions { registry, ..Default::default() }).await?).await
    }

    async fn of(world: World) -> Result<Self> {
        let moto = world.moto().await?;
        let key = moto.create_key("ECC_NIST_P256").await?;
        let file = world.folder("k")?.join("ci.pem");
        std::fs::write(&file, moto.public_key(&key).await?)?;
        Ok(Self { world, key, uri: format!("file://{}", file.display()) })
    }

    fn proxy(&self) -> &Proxy {
        &self.world.registry.proxy
    }

    /// pullgate that requires the key for every image of every registry.
    async fn pullgate(&self, more: &str) -> Result<Pullgate> {
        self.pullgate_with(more, &[]).await
    }

    async fn pullgate_with(&self, more: &str, env: &[(&str, &str)]) -> Result<Pullgate> {
        let rules = policy::rules(&[policy::rule_for("*/**", &self.uri, "")]);
        // At this level nothing that could leak stays unsaid.
        let env: Vec<_> = env.iter().copied().chain([("PULLGATE_LOG_LEVEL", "trace")]).collect();
        Pullgate::start_with(&self.world, &format!("{more}\n{rules}"), &env).await
    }

    async fn unsigned(&self, name: &str) -> Result<Pushed> {
        Image::new(name).push(&self.world.registry).await
    }

    async fn signed(&self, name: &str) -> Result<Pushed> {
        let image = self.unsigned(name).await?;
        self.sign(&image).await?;
        self.proxy().forget();
        Ok(image)
    }

    /// What cosign does, without its half a second for each key.
    async fn sign(&self, image: &Pushed) -> Result<()> {
        let payload = SigTag::document(image);
        let signature = self.world.moto().await?.sign(&self.key, "ECDSA_SHA_256", &payload).await?;
        SigTag::of(&self.world.registry.oci(), image).make(&payload, &signature).await
    }

    /// A signed image whose name begins with another host.
    async fn signed_as(&self, name: &str, host: &str) -> Result<Pushed> {
        let image = Image::new(name).push_as(&self.world.registry.oci(), host).await?;
        self.sign(&image).await?;
        self.proxy().forget();
        Ok(image)
    }

    /// What containerd and pullgate know about a host.
    fn hosts_toml(&self, host: &str, text: &str) -> Result<()> {
        hosts_toml(&self.world.containerd.certs(), host, text)
    }

    /// All blobs that containerd has.
    fn content(&self) -> Result<BTreeSet<OsString>> {
        let folder = "c/root/io.containerd.content.v1.content/blobs/sha256";
        let entries = std::fs::read_dir(self.world.path().join(folder)).context("containerd's content")?;
        Ok(entries.map(|entry| Ok(entry?.file_name())).collect::<std::io::Result<_>>()?)
    }

    /// With this fault an image is refused for this reason, and nothing of it reaches containerd. A
    /// failure is not stored: once healed, the next pull works at once. A denial is.
    async fn case(
        &self,
        pullgate: &Pullgate,
        at: &str,
        number: usize,
        fault: Fault,
        reason: &str,
    ) -> Result<()> {
        let image = self.signed(&format!("case-{number}")).await?;
        let (content, verdicts) = (self.content()?, pullgate.verdicts().await?);
        self.proxy().inject(Rule::on(at, fault));
        let text = refused(pullgate, &image.by_tag(), reason).await?;
        // containerd's own collector may have taken something away meanwhile.
        ensure!(self.content()?.is_subset(&content), "something of it reached containerd");
        let transient = text.starts_with("RegistryUnavailable: ") || reason == "image-not-found";
        ensure!(pullgate.verdicts().await? == verdicts + u64::from(!transient), "stored or not: {text}");
        if transient {
            let again = refused(pullgate, &image.by_tag(), reason).await?;
            ensure!(again == text, "two texts for one cause: {text} {again}");
        }
        self.proxy().heal();
        if transient {
            // At once, unless the second refusal opened the breaker for a second.
            wait::until("the healed registry", wait::LONG, async || {
                Ok(pullgate.cri().pull(&image.by_tag()).await.ok())
            })
            .await?;
        } else {
            ensure!(refused(pullgate, &image.by_tag(), reason).await? == text, "a denial is stored");
        }
        Ok(())
    }

    async fn cases(&self, at: &str, cases: Vec<(&str, Fault, &str)>) -> Result<()> {
        let pullgate = self.pullgate("limits: {manifestSize: 64KiB, payloadSize: 64KiB}").await?;
        for (number, (name, fault, reason)) in cases.into_iter().enumerate() {
            self.case(&pullgate, at, number, fault, reason)
                .await
                .with_context(|| format!("{name} at {at}"))?;
        }
        Ok(())
    }
}

fn hosts_toml(certs: &Path, host: &str, text: &str) -> Result<()> {
    let folder = certs.join(host);
    std::fs::create_dir_all(&folder)?;
    std::fs::write(folder.join("hosts.toml"), text)?;
    Ok(())
}

fn base64(user: &str, password: &str) -> String {
    STANDARD.encode(format!("{user}:{password}"))
}

fn login(user: &str, password: &str) -> PullOptions {
    PullOptions { login: Some((user.to_owned(), password.to_owned())), ..Default::default() }
}

/// What goes wrong wherever it is asked for, each with its reason.
fn everywhere() -> Vec<(&'static str, Fault, &'static str)> {
    vec![
        ("401 without a challenge", Fault::status(401), "registry-auth"),
        ("403", Fault::status(403), "registry-auth"),
        ("429 for an hour", Fault::throttle(3600), "registry-throttled"),
        ("500", Fault::status(500), "registry-unavailable"),
        ("410", Fault::status(410), "registry-unavailable"),
        ("a reset", Fault::Reset, "registry-unavailable"),
        ("a redirect to nowhere", Fault::redirect("ftp://nowhere/x"), "registry-unavailable"),
        ("redirects without end", Fault::redirect("?again"), "registry-unavailable"),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tag_that_cannot_be_resolved_is_a_failure_with_its_reason() -> Result<()> {
    let mut cases = everywhere();
    cases.push(("404", Fault::status(404), "image-not-found"));
    Site::start().await?.cases(TAG, cases).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_is_not_what_its_digest_says_is_refused() -> Result<()> {
    let mut cases = everywhere();
    cases.extend([
        ("404", Fault::status(404), "image-not-found"),
        ("other bytes", Fault::Body(b"{}".to_vec()), "malformed-evidence"),
        ("a length that is too short", Fault::ContentLength(20), "malformed-evidence"),
        ("a length that is too long", Fault::ContentLength(60_000), "registry-unavailable"),
        ("a length over the cap", Fault::ContentLength(1 << 30), "evidence-too-large"),
        ("an endless body", Fault::Endless, "evidence-too-large"),
    ]);
    Site::start().await?.cases(IMAGE, cases).await
}

/// Only a 404 proves that there is no signature.
#[tokio::test(flavor = "multi_thread")]
async fn signatures_that_cannot_be_listed_are_not_absent() -> Result<()> {
    let mut cases = everywhere();
    cases.extend([
        ("404", Fault::status(404), "unsigned"),
        ("an empty list", Fault::Edit(Arc::new(without_layers)), "unsigned"),
        ("a web page", Fault::answer("text/html", "<html>Please log in</html>"), "malformed-evidence"),
        ("nothing", Fault::answer("application/json", ""), "malformed-evidence"),
        ("a length that is too short", Fault::ContentLength(20), "malformed-evidence"),
        ("a length that is too long", Fault::ContentLength(60_000), "registry-unavailable"),
        ("an endless body", Fault::Endless, "evidence-too-large"),
    ]);
    Site::start().await?.cases(SIGNATURES, cases).await
}

fn without_layers(manifest: Vec<u8>) -> Vec<u8> {
    let Ok(mut manifest) = serde_json::from_slice::<Value>(&manifest) else { return manifest };
    manifest["layers"] = json!([]);
    manifest.to_string().into_bytes()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_payload_that_cannot_be_fetched_is_not_a_bad_signature() -> Result<()> {
    let same_length = |bytes: Vec<u8>| bytes.into_iter().rev().collect();
    let mut cases = everywhere();
    cases.extend([
        ("404", Fault::status(404), "malformed-evidence"),
        ("other bytes", Fault::Edit(Arc::new(same_length)), "malformed-evidence"),
        ("fewer bytes", Fault::Body(b"{}".to_vec()), "malformed-evidence"),
        ("a length that is too short", Fault::ContentLength(20), "malformed-evidence"),
        ("an endless body", Fault::Endless, "malformed-evidence"),
    ]);
    Site::start().await?.cases(PAYLOAD, cases).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retry_after_is_waited_for_where_it_fits_into_the_pull() -> Result<()> {
    let site = Site::start().await?;
    let pullgate = site.pullgate("").await?;
    let (short, long) = (site.signed("short").await?, site.signed("long").await?);

    site.proxy().inject(Rule::on(SIGNATURES, Fault::throttle(1)).times(1));
    let begin = Instant::now();
    pullgate.cri().pull(&short.by_tag()).await?;
    assert!(begin.elapsed() >= Duration::from_secs(1), "{:?}", begin.elapsed());
    assert_eq!(site.proxy().count("GET", SIGNATURES), 2);

    site.proxy().heal();
    site.proxy().forget();
    site.proxy().inject(Rule::on(SIGNATURES, Fault::throttle(3600)));
    refused(&pullgate, &long.by_tag(), "registry-throttled").await?;
    assert_eq!(site.proxy().count("GET", SIGNATURES), 1, "asked again before its time");
    let throttled = ["operation=\"manifest\"", "outcome=\"registry-throttled\""];
    assert_eq!(pullgate.metric("pullgate_registry_requests_total", &throttled).await?, 2.0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn past_the_deadline_the_work_goes_on_and_the_next_pull_finds_it() -> Result<()> {
    let site = Site::start().await?;
    let pullgate = site.pullgate("deadline: 300ms").await?;
    let image = site.signed("app").await?;
    let gate = Gate::new();
    site.proxy().inject(Rule::on(SIGNATURES, Fault::Hold(gate.clone())));
    let first = refused(&pullgate, &image.by_digest(), "timeout").await?;
    let second = refused(&pullgate, &image.by_digest(), "timeout").await?;
    assert_eq!(first, second);
    assert_eq!(pullgate.verdicts().await?, 0);
    gate.open();
    wait::until("the verdict", wait::LONG, async || Ok((pullgate.verdicts().await? == 1).then_some(())))
        .await?;
    pullgate.cri().pull(&image.by_digest()).await?;
    let entry = pullgate.audited(|entry| entry["PULLGATE_DECISION"] == "allow").await?;
    assert_eq!(entry["PULLGATE_CACHE"], "memory");
    assert_eq!(site.proxy().count("GET", SIGNATURES), 1, "both waited for one request");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_says_nothing_is_given_up() -> Result<()> {
    let site = Site::start().await?;
    let pullgate = site.pullgate("deadline: 30s").await?;
    let (silent, stalled) = (site.signed("silent").await?, site.signed("stalled").await?);
    site.proxy().inject(Rule::on("/v2/silent/manifests/*.sig", Fault::Hang));
    site.proxy().inject(Rule::on("/v2/stalled/manifests/*.sig", Fault::Stall(10)));
    let (silent_name, stalled_name) = (silent.by_tag(), stalled.by_tag());
    let cri = pullgate.cri();
    let (one, two) = tokio::join!(cri.pull(&silent_name), cri.pull(&stalled_name));
    for status in [one, two] {
        let status = status.err().context("it was pulled")?;
        assert!(status.message().contains(": registry-unavailable: "), "{status}");
        assert!(status.message().contains("no complete answer within 7 s"), "{status}");
    }
    site.proxy().heal();
    pullgate.cri().pull(&silent_name).await?;
    pullgate.cri().pull(&stalled_name).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_breaker_leaves_a_registry_alone_that_is_away() -> Result<()> {
    let site = Site::start().await?;
    let pullgate = site.pullgate("").await?;
    let (image, other) = (site.signed("app").await?, site.signed("other").await?);
    let open = async || pullgate.metric("pullgate_breakers_open", &["dependency=\"registry\""]).await;
    site.proxy().inject(Rule::on("*", Fault::status(503)));
    let first = refused(&pullgate, &image.by_tag(), "registry-unavailable").await?;
    assert_eq!((site.proxy().requests().len(), open().await?), (3, 0.0));
    refused(&pullgate, &image.by_tag(), "registry-unavailable").await?;
    assert_eq!((site.proxy().requests().len(), open().await?), (5, 1.0));

    let begin = Instant::now();
    let again = refused(&pullgate, &image.by_tag(), "registry-unavailable").await?;
    refused(&pullgate, &other.by_tag(), "registry-unavailable").await?;
    if begin.elapsed() < Duration::from_millis(700) {
        assert_eq!(site.proxy().requests().len(), 5, "asked though the breaker is open");
    }
    assert_eq!(again, first, "the same text, asked or not");

    site.proxy().heal();
    wait::until("the breaker to close", wait::LONG, async || {
        Ok(pullgate.cri().pull(&image.by_tag()).await.ok())
    })
    .await?;
    pullgate.cri().pull(&other.by_tag()).await?;
    assert_eq!(open().await?, 0.0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn registries_that_do_not_tell_a_tag_s_digest_are_read_instead() -> Result<()> {
    let site = Site::start().await?;
    let pullgate = site.pullgate("").await?;
    for (name, fault) in [
        ("no-digest", Fault::Header("docker-content-digest".into(), String::new())),
        ("a-strange-digest", Fault::Header("docker-content-digest".into(), "md5:1".into())),
        ("no-head", Fault::status(405)),
    ] {
        let image = site.signed(name).await?;
        site.proxy().inject(Rule::on(TAG, fault).method("HEAD").header("user-agent", "pullgate"));
        pullgate.cri().pull(&image.by_tag()).await.context(name)?;
        assert_eq!(site.proxy().count("GET", TAG), 1);
        site.proxy().heal();
    }
    // A digest that is a lie leads to another image, or to none: never to this one.
    let image = site.signed("lie").await?;
    let lie = format!("sha256:{}", "0".repeat(64));
    site.proxy().inject(Rule::on(TAG, Fault::Header("docker-content-digest".into(), lie)));
    refused(&pullgate, &image.by_tag(), "image-not-found").await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_host_is_a_failure() -> Result<()> {
    let site = Site::start().await?;
    let pullgate = site.pullgate("").await?;
    let text = refused(&pullgate, "nowhere.pullgate.test/app:v1", "registry-unavailable").await?;
    assert!(text.contains("nowhere.pullgate.test can't be reached: no such host name is known"), "{text}");
    assert_eq!(pullgate.verdicts().await?, 0);
    Ok(())
}

/// Nobody who reads what pullgate writes learns one of these.
async fn keeps_secret(pullgate: &Pullgate, secrets: &[&str], texts: &[String]) -> Result<()> {
    let mut all = vec![
        ("its log".to_owned(), pullgate.log().into_bytes()),
        ("its metrics".to_owned(), pullgate.metrics().await?.into_bytes()),
        ("what it said".to_owned(), texts.join("\n").into_bytes()),
    ];
    for command in [&["cache", "list"], &["keys", "list"]] {
        let output = pullgate.admin(command).await?;
        all.push((command.join(" "), format!("{}{}", output.stdout, output.stderr).into_bytes()));
    }
    let mut folders = vec![pullgate.state()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder)? {
            let path = entry?.path();
            match path.is_dir() {
                true => folders.push(path),
                false => all.push((path.display().to_string(), std::fs::read(&path)?)),
            }
        }
    }
    ensure!(all.len() > 5 && all.iter().any(|(_, bytes)| bytes.len() > 1000), "nothing was looked at");
    for (place, bytes) in all {
        for secret in secrets {
            ensure!(secret.len() > 5, "`{secret}` is found everywhere");
            let found = bytes.windows(secret.len()).any(|window| window == secret.as_bytes());
            ensure!(!found, "`{secret}` is in {place}");
        }
    }
    Ok(())
}

const PRIVATE: RegistryOptions = RegistryOptions { login: true, tls: false, referrers: None };

#[tokio::test(flavor = "multi_thread")]
async fn a_private_registry_is_read_with_the_pull_s_own_credentials() -> Result<()> {
    let site = Site::with(PRIVATE).await?;
    let image = site.signed("team/app").await?;
    let pullgate = site.pullgate("").await?;
    let mut texts = Vec::new();

    let text = refused(&pullgate, &image.by_tag(), "registry-auth").await?;
    assert!(text.contains("anonymous readers") && text.contains("imagePullSecret"), "{text}");
    texts.push(text);
    assert!(site.proxy().requests().iter().all(|seen| !seen.authorized()));

    let wrong = login(USER, "wrong-password");
    let text = refused_with(&pullgate, &image.by_tag(), &wrong, "registry-auth").await?;
    assert!(text.contains("the credentials of the pull"), "{text}");
    texts.push(text);
    assert_eq!(pullgate.verdicts().await?, 0);

    pullgate.cri().pull_with(&image.by_tag(), &login(USER, PASSWORD)).await?;
    let unsigned = site.unsigned("team/unsigned").await?;
    texts.push(refused_with(&pullgate, &unsigned.by_tag(), &login(USER, PASSWORD), "unsigned").await?);
    let (good, bad) = (base64(USER, PASSWORD), base64(USER, "wrong-password"));
    keeps_secret(&pullgate, &[PASSWORD, "wrong-password", &good, &bad], &texts).await
}

/// The kubelet pulls once for each pull secret, until one is good.
#[tokio::test(flavor = "multi_thread")]
async fn of_two_pull_secrets_the_second_may_read_the_signatures() -> Result<()> {
    let site = Site::with(PRIVATE).await?;
    let image = site.signed("app").await?;
    let pullgate = site.pullgate("").await?;
    let (first, second) = (login(USER, PASSWORD), login(ECR_USER, ECR_PASSWORD));
    for at in [SIGNATURES, PAYLOAD] {
        let rule = Rule::on(at, Fault::status(403)).header("authorization", &base64(USER, PASSWORD));
        site.proxy().inject(rule);
    }
    let text = refused_with(&pullgate, &image.by_tag(), &first, "registry-auth").await?;
    assert_eq!(pullgate.verdicts().await?, 0, "what one secret may not see is not absent");
    pullgate.cri().pull_with(&image.by_tag(), &second).await?;
    let secrets = [PASSWORD, ECR_PASSWORD, &base64(USER, PASSWORD), &base64(ECR_USER, ECR_PASSWORD)];
    keeps_secret(&pullgate, &secrets, &[text]).await
}

/// `ImageStatus` brings no credentials: the node's own Docker configuration has them.
#[tokio::test(flavor = "multi_thread")]
async fn a_present_private_image_is_judged_with_the_node_s_docker_configuration() -> Result<()> {
    let site = Site::with(PRIVATE).await?;
    let (image, unsigned) = (site.signed("app").await?, site.unsigned("unsigned").await?);
    for image in [&image, &unsigned] {
        site.world.cri()?.pull_with(&image.by_tag(), &login(USER, PASSWORD)).await?;
    }
    let file = site.world.folder("d")?.join("config.json");
    let configs = format!("registry: {{dockerConfigs: [{}]}}", file.display());
    let pullgate = site.pullgate(&configs).await?;

    assert!(pullgate.cri().image_status(&image.by_tag()).await?.is_none(), "judged without credentials");
    let entry = pullgate.audited(|entry| entry["PULLGATE_METHOD"] == "ImageStatus").await?;
    assert_eq!(entry["PULLGATE_REASON"], "registry-auth");

    let auth = base64(USER, PASSWORD);
    let auths = json!({"auths": {
        "127.0.0.1": {"auth": base64("other", "other-password")},
        site.world.registry.host(): {"auth": auth},
    }});
    std::fs::write(&file, auths.to_string())?;
    let status = wait::until("the new file to be read", wait::LONG, async || {
        Ok(pullgate.cri().image_status(&image.by_tag()).await?)
    });
    assert_eq!(status.await?.id, image.config_digest);
    assert!(pullgate.cri().image_status(&unsigned.by_tag()).await?.is_none());
    pullgate.audited(|entry| entry["PULLGATE_REASON"] == "unsigned").await?;
    let others = base64("other", "other-password");
    assert_eq!(site.proxy().count_header("authorization", &others), 0, "another host's credentials");
    keeps_secret(&pullgate, &[PASSWORD, &auth, "other-password", &others], &[]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bearer_token_is_asked_for_where_the_registry_says_and_only_for_reading() -> Result<()> {
    let site = Site::start().await?;
    let image = site.signed("team/app").await?;
    let tokens = Proxy::start(site.proxy().upstream()).await?;
    let basic = base64("robot", "robot-secret");
    let answer = json!({"token": "the-token-itself", "expires_in": 300}).to_string();
    let answer = Fault::answer("application/json", answer);
    tokens.inject(Rule::on("/token", answer).header("authorization", &basic));
    tokens.inject(Rule::on("/token", Fault::status(401)));
    // With the token all is as before; without it there is a challenge.
    let through = Fault::Header("x-passed".into(), "yes".into());
    site.proxy().inject(Rule::on("*", through).header("authorization", "Bearer the-token-itself"));
    let challenge = format!(
        "Bearer realm=\"http://{}/token\",service=\"registry\",scope=\"repository:team/app:pull,push\"",
        tokens.address()
    );
    site.proxy().inject(Rule::on("*", Fault::status(401).header("www-authenticate", &challenge)));
    let pullgate = site.pullgate("").await?;

    let mut texts = vec![refused(&pullgate, &image.by_tag(), "registry-auth").await?];
    let wrong = login("robot", "wrong-secret");
    texts.push(refused_with(&pullgate, &image.by_tag(), &wrong, "registry-auth").await?);
    assert_eq!(pullgate.verdicts().await?, 0);

    tokens.forget();
    pullgate.cri().pull_with(&image.by_tag(), &login("robot", "robot-secret")).await?;
    let requests = tokens.requests();
    let ours: Vec<_> =
        requests.iter().filter(|seen| seen.header("user-agent").contains("pullgate")).collect();
    assert_eq!(ours.len(), 1, "one token for all that a verification asks");
    let query = ours[0].query.clone().unwrap_or_default();
    assert!(query.contains("scope=repository%3Ateam%2Fapp%3Apull") && !query.contains("push"), "{query}");
    assert_eq!(site.proxy().count_header("authorization", &basic), 0, "the registry saw the password");
    keeps_secret(&pullgate, &["robot-secret", "wrong-secret", "the-token-itself", &basic], &texts).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_service_that_is_away_is_no_lack_of_rights() -> Result<()> {
    let site = Site::start().await?;
    let image = site.signed("app").await?;
    let tokens = Proxy::start(site.proxy().upstream()).await?;
    let challenge = format!("Bearer realm=\"http://{}/token\",service=\"registry\"", tokens.address());
    site.proxy().inject(Rule::on("*", Fault::status(401).header("www-authenticate", &challenge)));
    let pullgate = site.pullgate("").await?;
    for (fault, reason) in [
        (Fault::throttle(3600), "registry-throttled"),
        (Fault::status(503), "registry-unavailable"),
        (Fault::answer("application/json", "{}"), "registry-unavailable"),
    ] {
        tokens.inject(Rule::on("/token", fault));
        refused(&pullgate, &image.by_tag(), reason).await?;
        tokens.heal();
    }
    Ok(())
}

const ECR: &str = "123456789012.dkr.ecr.us-east-1.amazonaws.com";

/// moto's token, with another time to live.
fn expiring_in(seconds: u64) -> Fault {
    Fault::Edit(Arc::new(move |body| {
        let Ok(mut answer) = serde_json::from_slice::<Value>(&body) else { return body };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        answer["authorizationData"][0]["expiresAt"] = json!(now.as_secs() + seconds);
        answer.to_string().into_bytes()
    }))
}

/// The node's own AWS credentials are exchanged for a token, once, and again when it expires.
#[tokio::test(flavor = "multi_thread")]
async fn an_ecr_token_serves_until_it_expires() -> Result<()> {
    let world = World::with(WorldOptions { registry: PRIVATE, ..Default::default() }).await?;
    world.moto().await?;
    let site = Site::of(world).await?;
    let moto = site.world.moto().await?;
    assert_eq!(moto.ecr_login("us-east-1").await?, (ECR_USER.to_owned(), ECR_PASSWORD.to_owned()));
    site.world.containerd.mirror(ECR, &site.world.registry)?;
    let (one, two) = (site.signed_as("one", ECR).await?, site.signed_as("two", ECR).await?);
    let unsigned = Image::new("unsigned").push_as(&site.world.registry.oci(), ECR).await?;
    for image in [&one, &two, &unsigned] {
        site.world.cri()?.pull_with(&image.by_tag(), &login(ECR_USER, ECR_PASSWORD)).await?;
    }
    let pullgate = site.pullgate("cache: {negativeTTL: 0s}").await?;
    let asked = || moto.proxy.count_header("x-amz-target", "GetAuthorizationToken");
    let on_token = |fault| Rule::on("*", fault).header("x-amz-target", "GetAuthorizationToken");

    // ECR's own errors first: no token, no verdict.
    let denied = Fault::aws(400, "AccessDeniedException").header("x-amzn-requestid", "request-id-1");
    moto.proxy.inject(on_token(denied));
    let text = refused(&pullgate, &one.by_tag(), "registry-auth").await?;
    assert!(text.contains("AccessDeniedException") && text.contains("ecr:GetAuthorizationToken"), "{text}");
    moto.proxy.heal();
    moto.proxy.inject(on_token(Fault::aws(400, "ThrottlingException")));
    refused(&pullgate, &one.by_tag(), "registry-throttled").await?;
    moto.proxy.heal();
    assert_eq!(pullgate.verdicts().await?, 0);

    // Tokens are renewed five minutes early: this one is good for two seconds, the next for hours.
    moto.proxy.forget();
    moto.proxy.inject(on_token(expiring_in(302)).times(1));
    moto.proxy.inject(on_token(expiring_in(12 * 3600)));
    for image in [&one, &two] {
        let status = pullgate.cri().image_status(&image.by_tag()).await?.context("judged as absent")?;
        assert_eq!(status.id, image.config_digest);
    }
    assert!(asked() <= 2, "{} tokens for two images", asked());
    wait::until("the token to be renewed", wait::LONG, async || {
        assert!(pullgate.cri().image_status(&unsigned.by_tag()).await?.is_none());
        Ok((asked() == 2).then_some(()))
    })
    .await?;
    for _ in 0..3 {
        assert!(pullgate.cri().image_status(&unsigned.by_tag()).await?.is_none());
    }
    assert_eq!(asked(), 2, "the second token serves on");
    let entries = pullgate.audit();
    let reasons = entries.iter().filter(|e| e["PULLGATE_IMAGE"] == unsigned.by_tag());
    assert!(reasons.clone().count() >= 4 && reasons.clone().all(|e| e["PULLGATE_REASON"] == "unsigned"));
    let secret = base64(ECR_USER, ECR_PASSWORD);
    keeps_secret(&pullgate, &[ECR_PASSWORD, &secret, "request-id-1"], &[text]).await
}

/// Blobs are often elsewhere: what leads there brings no credentials along.
#[tokio::test(flavor = "multi_thread")]
async fn a_redirect_to_another_host_takes_no_credentials_there() -> Result<()> {
    let site = Site::with(PRIVATE).await?;
    let images = [site.signed("good").await?, site.signed("other-bytes").await?, site.signed("asks").await?];
    let [good, other_bytes, asks] = &images;
    let url = site.world.registry.url();
    let host = site.world.registry.host().to_owned();
    let header =
        format!("server = '{url}'\n[host.'{url}']\n[host.'{url}'.header]\nx-team-key = 'sesame-key'\n");
    site.hosts_toml(&host, &header)?;
    let pullgate = site.pullgate("").await?;
    let elsewhere = Proxy::start(site.proxy().upstream()).await?;
    for image in &images {
        let signature = SigTag::of(&site.world.registry.oci(), image);
        let payload = signature.payload(0).await?;
        let digest = pullgate_tests::oci::digest(&payload);
        let target =
            format!("http://{}/{}?X-Amz-Signature=url-secret", elsewhere.address(), image.repository);
        let path = format!("/v2/{}/blobs/{digest}", image.repository);
        site.proxy().inject(Rule::on(&path, Fault::redirect(&target)).header("authorization", "Basic"));
        let answer = match image.repository.as_str() {
            "good" => Fault::answer("application/octet-stream", payload),
            "other-bytes" => Fault::answer("application/octet-stream", b"{}".to_vec()),
            _ => Fault::status(401).header("www-authenticate", "Basic realm=\"give me your password\""),
        };
        elsewhere.inject(Rule::on(&format!("/{}", image.repository), answer));
    }
    let secret = login(USER, PASSWORD);
    pullgate.cri().pull_with(&good.by_tag(), &secret).await?;
    let mut texts = vec![
        refused_with(&pullgate, &other_bytes.by_tag(), &secret, "malformed-evidence").await?,
        refused_with(&pullgate, &asks.by_tag(), &secret, "registry-unavailable").await?,
    ];
    let seen = elsewhere.requests();
    assert!(seen.len() >= 3, "{seen:?}");
    for request in &seen {
        assert!(!request.authorized(), "{request:?}");
        for (name, value) in &request.headers {
            let value = value.to_str()?;
            assert!(!value.contains("sesame") && !value.contains(PASSWORD), "{name}: {value}");
        }
        texts.push(request.path.clone());
    }
    assert!(
        site.proxy().count_header("x-team-key", "sesame-key") >= 3,
        "the registry itself gets the header"
    );
    let basic = base64(USER, PASSWORD);
    keeps_secret(&pullgate, &[PASSWORD, &basic, "sesame-key", "url-secret"], &texts).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_that_nobody_vouches_for_is_a_failure_until_its_ca_is_named() -> Result<()> {
    let site = Site::with(RegistryOptions { login: true, tls: true, referrers: None }).await?;
    let image = site.signed("app").await?;
    let (url, host) = (site.world.registry.url(), site.world.registry.host().to_owned());
    site.hosts_toml(&host, &format!("server = '{url}'\n"))?;
    let pullgate = site.pullgate("").await?;
    let secret = login(USER, PASSWORD);
    let text = refused_with(&pullgate, &image.by_tag(), &secret, "registry-unavailable").await?;
    assert!(text.contains("by an unknown authority") && text.contains("hosts.toml"), "{text}");
    assert_eq!((site.proxy().requests().len(), pullgate.verdicts().await?), (0, 0));

    // With plain HTTP the registry does not answer, and with its CA it does. No restart.
    site.hosts_toml(&host, &format!("server = 'http://{host}'\n"))?;
    wait::until("the changed hosts.toml", wait::LONG, async || {
        let status =
            pullgate.cri().pull_with(&image.by_tag(), &secret).await.err().context("it was pulled")?;
        Ok((!status.message().contains("unknown authority")).then_some(()))
    })
    .await?;
    refused_with(&pullgate, &image.by_tag(), &secret, "registry-unavailable").await?;
    site.world.containerd.trust(&site.world.registry)?;
    wait::until("the CA to be read", wait::LONG, async || {
        Ok(pullgate.cri().pull_with(&image.by_tag(), &secret).await.ok())
    })
    .await?;
    keeps_secret(&pullgate, &[PASSWORD, &base64(USER, PASSWORD)], &[text]).await
}

/// A mirror and the registry itself, both with everything; the mirror is asked first.
async fn mirrored() -> Result<(Site, Registry)> {
    let site = Site::start().await?;
    let mirror = site.world.registry(RegistryOptions::default()).await?;
    let (first, last) = (mirror.url(), site.world.registry.url());
    site.hosts_toml("mirrored.pullgate.test", &format!("server = '{last}'\n[host.'{first}']\n"))?;
    Ok((site, mirror))
}

/// Copies an image with its signature.
async fn copy(image: &Pushed, from: &Oci, to: &Oci) -> Result<()> {
    let repository = &image.repository;
    for reference in [&image.tag, &image.cosign_tag(".sig")] {
        let Some(manifest) = from.find_manifest(repository, reference).await? else { continue };
        let json = manifest.json()?;
        let layers = json["layers"].as_array().cloned().unwrap_or_default();
        for blob in layers.iter().chain([&json["config"]]) {
            let digest = blob["digest"].as_str().context("no digest")?;
            to.put_blob(repository, &from.blob(repository, digest).await?).await?;
        }
        to.put_manifest(repository, reference, &manifest.media_type, manifest.bytes).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_is_asked_first_and_the_registry_when_it_is_down() -> Result<()> {
    let (site, mirror) = mirrored().await?;
    let pullgate = site.pullgate("").await?;
    let mut images = Vec::new();
    for name in ["both", "down", "lacks", "signature-lacks", "nobody-knows"] {
        let image = site.signed_as(name, "mirrored.pullgate.test").await?;
        if name != "lacks" {
            copy(&image, &site.world.registry.oci(), &mirror.oci()).await?;
        }
        images.push(image);
    }
    let [both, down, lacks, signature_lacks, nobody_knows] = &images[..] else { unreachable!() };
    site.proxy().forget();
    mirror.proxy.forget();

    pullgate.cri().pull(&both.by_tag()).await?;
    assert_eq!(site.proxy().requests().len(), 0, "the mirror has it all");
    let ours = mirror.proxy.requests();
    assert!(ours.iter().any(|seen| seen.query.as_deref() == Some("ns=mirrored.pullgate.test")), "{ours:?}");

    mirror.proxy.inject(Rule::on("/v2/down/*", Fault::status(503)));
    pullgate.cri().pull(&down.by_tag()).await?;
    assert_eq!(site.proxy().count("GET", "/v2/down/manifests/*.sig"), 1);
    assert_eq!(mirror.proxy.count("GET", "/v2/down/manifests/*.sig"), 1, "the next host is the next try");
    pullgate.cri().pull(&lacks.by_tag()).await?;

    // A mirror that has no signatures does not prove that there are none.
    mirror.proxy.inject(Rule::on("/v2/signature-lacks/manifests/*.sig", Fault::status(404)));
    pullgate.cri().pull(&signature_lacks.by_tag()).await?;

    // Nor does a registry that has none, while a mirror can't be asked.
    SigTag::of(&site.world.registry.oci(), nobody_knows).remove().await?;
    mirror.proxy.inject(Rule::on("/v2/nobody-knows/manifests/*.sig", Fault::status(503)));
    let verdicts = pullgate.verdicts().await?;
    refused(&pullgate, &nobody_knows.by_tag(), "registry-unavailable").await?;
    assert_eq!(pullgate.verdicts().await?, verdicts);
    mirror.proxy.heal();
    wait::until("the mirror", wait::LONG, async || {
        Ok(pullgate.cri().pull(&nobody_knows.by_tag()).await.ok())
    })
    .await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_mirror_costs_no_pull() -> Result<()> {
    let (site, mirror) = mirrored().await?;
    let image = site.signed_as("app", "mirrored.pullgate.test").await?;
    let unsigned =
        Image::new("unsigned").push_as(&site.world.registry.oci(), "mirrored.pullgate.test").await?;
    drop(mirror);
    let pullgate = site.pullgate("").await?;
    pullgate.cri().pull(&image.by_tag()).await?;
    let text = refused(&pullgate, &unsigned.by_tag(), "registry-unavailable").await?;
    assert!(text.contains("connection refused"), "{text}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn paths_headers_and_the_default_of_hosts_toml_count() -> Result<()> {
    let site = Site::start().await?;
    let url = site.world.registry.url();
    let pullgate = site.pullgate("").await?;

    // A proxy cache's project: everything of the other registry is below one path.
    let pushed = site.signed("cache/app").await?;
    let text = format!("[host.'{url}/v2/cache']\noverride_path = true\n");
    site.hosts_toml("overridden.pullgate.test", &text)?;
    pullgate.cri().pull(&format!("overridden.pullgate.test/app@{}", pushed.digest)).await?;
    assert!(site.proxy().count("GET", "/v2/cache/app/manifests/*.sig") == 1);

    // A registry that wants to see a header.
    let text = format!("[host.'{url}']\n[host.'{url}'.header]\nx-team-key = 'sesame-key'\n");
    site.hosts_toml("keyed.pullgate.test", &text)?;
    let keyed = site.signed_as("keyed/app", "keyed.pullgate.test").await?;
    let through = Fault::Header("x-passed".into(), "yes".into());
    site.proxy().inject(Rule::on("/v2/keyed/*", through).header("x-team-key", "sesame-key"));
    site.proxy().inject(Rule::on("/v2/keyed/*", Fault::status(403)));
    pullgate.cri().pull(&keyed.by_tag()).await?;
    let at_its_own_address = format!("{}/keyed/app@{}", site.world.registry.host(), keyed.digest);
    let text = refused(&pullgate, &at_its_own_address, "registry-auth").await?;
    site.proxy().heal();

    let any = site.signed_as("any/app", "any.pullgate.test").await?;
    refused(&pullgate, &any.by_tag(), "registry-unavailable").await?;
    // containerd 1.6 passes over a `server` without a `[host]`.
    site.hosts_toml("_default", &format!("[host.'{url}']\n"))?;
    wait::until("_default to be read", wait::LONG, async || {
        Ok(pullgate.cri().pull(&any.by_tag()).await.ok())
    })
    .await?;

    // A file that can't be read is told, and nobody is asked in its stead.
    site.hosts_toml("broken.pullgate.test", "server = 3\n")?;
    let broken = refused(&pullgate, "broken.pullgate.test/any/app:v1", "registry-unavailable").await?;
    assert!(broken.contains("broken.pullgate.test/hosts.toml:1 is malformed"), "{broken}");
    keeps_secret(&pullgate, &["sesame-key"], &[text, broken]).await
}

/// A forward proxy: what it was asked for, head by head.
async fn forward_proxy(to: SocketAddr) -> Result<(SocketAddr, Arc<Mutex<Vec<String>>>)> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let (address, heads) = (listener.local_addr()?, Arc::new(Mutex::new(Vec::new())));
    let seen = Arc::clone(&heads);
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let seen = Arc::clone(&seen);
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(client.read_u8().await?);
                }
                let head = String::from_utf8_lossy(&head).into_owned();
                seen.lock().unwrap_or_else(PoisonError::into_inner).push(head);
                client.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await?;
                let mut server = tokio::net::TcpStream::connect(to).await?;
                tokio::io::copy_bidirectional(&mut client, &mut server).await
            });
        }
    });
    Ok((address, heads))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_environment_s_proxy_is_used_where_no_proxy_does_not_except_it() -> Result<()> {
    let site = Site::with(RegistryOptions { login: false, tls: true, referrers: None }).await?;
    let image = site.signed_as("app", TLS_NAME).await?;
    // containerd goes straight to the registry; pullgate knows only the name, and the proxy.
    site.world.containerd.mirror(TLS_NAME, &site.world.registry)?;
    let certs = site.world.folder("certs")?;
    let ca = site.world.registry.ca().context("no CA")?.display().to_string();
    hosts_toml(&certs, TLS_NAME, &format!("server = 'https://{TLS_NAME}'\nca = '{ca}'\n"))?;
    let socket = site.world.containerd.socket().display().to_string();
    let containerd = format!("containerd: {{address: {socket}, registryConfigPath: {}}}", certs.display());
    let (proxy, heads) = forward_proxy(site.proxy().address()).await?;
    let proxy = format!("http://node:proxy-secret@{proxy}");
    let asked = || heads.lock().unwrap_or_else(PoisonError::into_inner).clone();

    let excepted = [("HTTPS_PROXY", proxy.as_str()), ("NO_PROXY", ".pullgate.test")];
    let pullgate = site.pullgate_with(&containerd, &excepted).await?;
    refused(&pullgate, &image.by_tag(), "registry-unavailable").await?;
    assert_eq!(asked(), Vec::<String>::new());
    pullgate.stop().await?;

    let env = [("HTTPS_PROXY", proxy.as_str()), ("NO_PROXY", "other.test")];
    let pullgate = site.pullgate_with(&containerd, &env).await?;
    pullgate.cri().pull(&image.by_tag()).await?;
    let heads = asked();
    assert!(!heads.is_empty());
    for head in &heads {
        assert!(head.starts_with(&format!("CONNECT {TLS_NAME}:443 ")), "{head}");
        assert!(head.contains(&base64("node", "proxy-secret")), "{head}");
    }
    keeps_secret(&pullgate, &["proxy-secret", &base64("node", "proxy-secret")], &[]).await
}

/// A verdict past its time still stands while the signatures can't be asked for; a denial never does.
#[tokio::test(flavor = "multi_thread")]
async fn an_old_allow_verdict_stands_while_the_registry_is_away() -> Result<()> {
    let site = Site::start().await?;
    let (image, unsigned) = (site.signed("app").await?, site.unsigned("unsigned").await?);
    let cache = |grace: &str| {
        format!("deadline: 2s\ncache: {{positiveTTL: 0s, negativeTTL: 0s, staleGrace: {grace}}}")
    };
    let pullgate = site.pullgate(&cache("1h")).await?;
    pullgate.cri().pull(&image.by_tag()).await?;
    refused(&pullgate, &unsigned.by_tag(), "unsigned").await?;

    let is_stale = |entry: &Value, reason: &str| {
        entry["PULLGATE_CACHE"] == "stale"
            && entry["PULLGATE_STALE_BECAUSE"] == reason
            && entry["PULLGATE_DECISION"] == "allow"
    };
    for (fault, reason) in [
        (Fault::throttle(3600), "registry-throttled"),
        (Fault::status(503), "registry-unavailable"),
        (Fault::Hang, "timeout"),
    ] {
        site.proxy().inject(Rule::on(SIGNATURES, fault));
        pullgate.cri().pull(&image.by_tag()).await.context(reason)?;
        pullgate.audited(|entry| is_stale(entry, reason)).await?;
        refused(&pullgate, &unsigned.by_tag(), reason).await.context("an old denial stands for nothing")?;
        site.proxy().heal();
    }

    // The whole registry is away: what is on the node goes on to run.
    site.proxy().inject(Rule::on("*", Fault::Reset));
    let before = pullgate.metric("pullgate_stale_allows_total", &[]).await?;
    assert_eq!(before, 3.0);
    let status = pullgate.cri().image_status(&image.by_tag()).await?.context("judged as absent")?;
    assert_eq!(status.id, image.config_digest);
    assert_eq!(pullgate.metric("pullgate_stale_allows_total", &[]).await?, before + 1.0);
    pullgate.restart().await?;
    pullgate.cri().image_status(&image.by_tag()).await?.context("after a restart")?;

    pullgate.stop().await?;
    let rules = policy::rules(&[policy::rule_for("*/**", &site.uri, "")]);
    pullgate.reconfigure(&site.world, &format!("{}\n{rules}", cache("0s")))?;
    pullgate.start_again().await?;
    assert!(pullgate.cri().image_status(&image.by_tag()).await?.is_none(), "past the grace");

    // A signature that is gone is no failure.
    site.proxy().heal();
    pullgate.stop().await?;
    pullgate.reconfigure(&site.world, &format!("{}\n{rules}", cache("1h")))?;
    pullgate.start_again().await?;
    SigTag::of(&site.world.registry.oci(), &image).remove().await?;
    refused(&pullgate, &image.by_tag(), "unsigned").await?;
    Ok(())
}

/// What was fetched once proves the image under another rule, too: a new policy costs no request, and
/// works with the registry away. What the evidence does not prove is asked for.
#[tokio::test(flavor = "multi_thread")]
async fn a_new_rule_is_answered_from_the_evidence_that_is_kept() -> Result<()> {
    let site = Site::start().await?;
    let image = site.unsigned("app").await?;
    let cosign = site.world.cosign().await?;
    let key = cosign.generate_key("ci").await?;
    cosign.sign_annotated(&key.key(), &image.by_digest(), &[("team", "shop")]).await?;
    let rules = |more: &str| policy::rules(&[policy::rule_for("*/**", &key.uri(), more)]);
    let pullgate = Pullgate::start(&site.world, &rules("")).await?;
    pullgate.cri().pull(&image.by_tag()).await?;
    wait::until("the verdict", wait::LONG, async || Ok((pullgate.verdicts().await? == 1).then_some(())))
        .await?;
    let reload = async |text: &str| {
        pullgate.reconfigure(&site.world, text)?;
        pullgate.admin(&["reload"]).await?.ok().map(drop)
    };
    let cached = || pullgate.audit().last().map(|entry| entry["PULLGATE_CACHE"].clone());

    site.proxy().forget();
    reload(&rules("annotations: {team: shop}")).await?;
    pullgate.cri().pull(&image.by_tag()).await?;
    assert_eq!(cached(), Some(json!("evidence")));
    assert_eq!(site.proxy().count("*", SIGNATURES), 0);

    site.proxy().inject(Rule::on("*", Fault::Reset));
    reload(&rules("annotations: {team: [shop, web]}")).await?;
    let status = pullgate.cri().image_status(&image.by_tag()).await?.context("judged as absent")?;
    assert_eq!(status.id, image.config_digest);
    assert_eq!(cached(), Some(json!("evidence")));
    // Nobody has said that it is not signed so by now.
    reload(&rules("annotations: {team: web}")).await?;
    assert!(pullgate.cri().image_status(&image.by_tag()).await?.is_none());
    let entry = pullgate.audit().pop().context("no entry")?;
    assert_eq!(
        (&entry["PULLGATE_CACHE"], &entry["PULLGATE_REASON"]),
        (&json!("miss"), &json!("registry-unavailable"))
    );
    site.proxy().heal();
    refused(&pullgate, &image.by_tag(), "annotation-mismatch").await?;

    // Old evidence gives an old verdict: it only stands in for the registry.
    let old = format!("cache: {{positiveTTL: 0s, staleGrace: 1h}}\n{}", rules("annotations: {team: s*}"));
    reload(&old).await?;
    pullgate.cri().pull(&image.by_tag()).await?;
    assert_eq!(cached(), Some(json!("miss")));
    site.proxy().inject(Rule::on("*", Fault::Reset));
    reload(&old.replace("s*", "sh*")).await?;
    pullgate.cri().image_status(&image.by_tag()).await?.context("judged as absent")?;
    assert_eq!(cached(), Some(json!("stale")));
    Ok(())
}

/// What a denial disproved is no evidence under any other rule: a registry that goes away afterwards
/// brings nothing of it back.
#[tokio::test(flavor = "multi_thread")]
async fn evidence_that_was_disproved_stands_in_for_nothing() -> Result<()> {
    let site = Site::start().await?;
    let image = site.unsigned("app").await?;
    let mut document: Value = serde_json::from_slice(&SigTag::document(&image))?;
    document["optional"] = json!({"team": "shop"});
    let payload = document.to_string().into_bytes();
    let signature = site.world.moto().await?.sign(&site.key, "ECDSA_SHA_256", &payload).await?;
    SigTag::of(&site.world.registry.oci(), &image).make(&payload, &signature).await?;
    let config = |more: &str| {
        let rules = policy::rules(&[policy::rule_for("*/**", &site.uri, more)]);
        format!("cache: {{positiveTTL: 0s, negativeTTL: 0s, staleGrace: 1h}}\n{rules}")
    };
    let pullgate = Pullgate::start(&site.world, &config("")).await?;
    pullgate.cri().pull(&image.by_tag()).await?;
    wait::until("the verdict", wait::LONG, async || Ok((pullgate.verdicts().await? == 1).then_some(())))
        .await?;
    // Another requirement that the same evidence meets.
    pullgate.reconfigure(&site.world, &config("annotations: {team: shop}"))?;
    pullgate.admin(&["reload"]).await?.ok()?;
    SigTag::of(&site.world.registry.oci(), &image).remove().await?;
    refused(&pullgate, &image.by_tag(), "unsigned").await?;
    // A third requirement that it meets: nobody has denied that one yet.
    site.proxy().inject(Rule::on("*", Fault::Reset));
    pullgate.reconfigure(&site.world, &config("annotations: {team: s*}"))?;
    pullgate.admin(&["reload"]).await?.ok()?;
    assert!(pullgate.cri().image_status(&image.by_tag()).await?.is_none());
    let entry = pullgate.audit().pop().context("no entry")?;
    assert_eq!(entry["PULLGATE_REASON"], "registry-unavailable", "{entry}");
    Ok(())
}
