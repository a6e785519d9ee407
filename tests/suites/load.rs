//! Many callers at once, callers that go away, and a store that is killed, damaged, full or held.

use anyhow::{Context, Result, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures_util::future::{join_all, try_join_all};
use futures_util::stream::{self, StreamExt, TryStreamExt};
use pullgate_tests::cri::v1;
use pullgate_tests::registry::{PASSWORD, USER};
use pullgate_tests::world::WorldOptions;
use pullgate_tests::{
    Cri, Fault, Gate, Image, KeyPair, PullOptions, Pullgate, Pushed, RegistryOptions, Rule, Version, World,
    grpc, policy, wait,
};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::task::JoinHandle;
use tonic::{Code, Status};

pullgate_tests::on_both! {
    five_hundred_images_are_listed_as_containerd_lists_them,
}

/// `STORE_SET_ASIDE` of the journal's catalog.
const SET_ASIDE: &str = "5d1b3cf0ab7e4f0c8f2f3cb1c2f5d806";
/// All requests for signatures.
const SIGNATURES: &str = "/v2/*.sig";

/// A world in which one key signs and pullgate requires it.
struct Gated {
    world: World,
    key: KeyPair,
    pullgate: Pullgate,
}

impl Gated {
    async fn start(settings: &str) -> Result<Self> {
        Self::on(World::start().await?, settings).await
    }

    async fn on(world: World, settings: &str) -> Result<Self> {
        let key = world.cosign().await?.generate_key("ci").await?;
        let rules = policy::signed(&world.registry, &key.uri());
        let pullgate = Pullgate::start(&world, &format!("{settings}\n{rules}")).await?;
        Ok(Self { world, key, pullgate })
    }

    /// Signs them all with one cosign.
    async fn sign(&self, images: &[Pushed]) -> Result<()> {
        let (key, names) = (self.key.key(), images.iter().map(Pushed::by_digest));
        let mut args: Vec<String> =
            ["sign", "--tlog-upload=false", "--key", &key].map(str::to_owned).to_vec();
        args.extend(names);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        self.world.cosign().await?.run(&args).await?;
        self.world.registry.proxy.forget();
        Ok(())
    }

    async fn signed(&self, name: &str) -> Result<Pushed> {
        let image = Image::new(name).push(&self.world.registry).await?;
        self.sign(std::slice::from_ref(&image)).await?;
        Ok(image)
    }

    /// From now on requests for signatures stand before a gate.
    fn hold_signatures(&self) -> Gate {
        let gate = Gate::new();
        self.world.registry.proxy.inject(Rule::on(SIGNATURES, Fault::Hold(gate.clone())));
        gate
    }

    fn fetched(&self, image: &Pushed) -> usize {
        let path = format!("/v2/{}/manifests/{}", image.repository, image.cosign_tag(".sig"));
        self.world.registry.proxy.count("GET", &path)
    }

    /// A pull in a task of its own, that can be broken off.
    fn pulling(&self, image: &Pushed) -> JoinHandle<Result<String, Status>> {
        let (cri, name) = (self.pullgate.cri().clone(), image.by_tag());
        tokio::spawn(async move { cri.pull(&name).await })
    }

    async fn metric_is(&self, name: &str, value: f64) -> Result<()> {
        let what = format!("{name} to be {value}");
        wait::until(&what, wait::LONG, async || {
            Ok((self.pullgate.metric(name, &[]).await? == value).then_some(()))
        })
        .await
    }

    /// What the running daemon answers to a command.
    async fn asks(&self, args: &[&str]) -> Result<Value> {
        let said = self.pullgate.admin(&[args, &["--output", "json"]].concat()).await?.ok()?;
        serde_json::from_str(&said.stdout).with_context(|| said.stdout)
    }

    /// Every verdict that it remembers: decision by repository.
    async fn verdicts(&self) -> Result<BTreeMap<String, String>> {
        let listed = self.asks(&["cache", "list", "--limit", "100000"]).await?;
        let entries = listed["entries"].as_array().context("no list")?.iter();
        let text = |entry: &Value, name: &str| entry[name].as_str().unwrap_or_default().to_owned();
        Ok(entries.map(|entry| (text(entry, "repository"), text(entry, "decision"))).collect())
    }

    /// No thread of the daemon has panicked, in this or in an earlier life. sled does, on damage; the
    /// store catches it.
    fn no_panic(&self) {
        let log = self.pullgate.log();
        let panics: Vec<&str> =
            log.lines().filter(|line| line.contains("panicked") && !line.contains("sled")).collect();
        assert!(panics.is_empty(), "{panics:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_pulls_of_thirty_images_cost_thirty_verifications() -> Result<()> {
    let gated = Gated::start("deadline: 60s\nlimits: {concurrentVerifications: 16}").await?;
    let images = Image::new("app").push_many(&gated.world.registry, 30).await?;
    gated.sign(&images).await?;
    let gate = gated.hold_signatures();
    let pulls: Vec<_> = images.iter().cycle().take(100).map(|image| gated.pulling(image)).collect();
    // All are there before the first verification ends, and the limit holds: one registry gets
    // half of the places.
    gate.arrived(8).await?;
    gated.metric_is("pullgate_single_flight_joins_total", 70.0).await?;
    assert_eq!(gated.pullgate.metric("pullgate_verifications_in_flight", &[]).await?, 8.0);
    assert_eq!(gated.world.registry.proxy.count("GET", SIGNATURES), 8);
    gate.open();
    for (pull, image) in join_all(pulls).await.into_iter().zip(images.iter().cycle()) {
        assert_eq!(pull??, image.config_digest);
    }
    for image in &images {
        assert_eq!(gated.fetched(image), 1, "{}", image.repository);
    }
    let allowed = ["decision=\"allow\"", "reason=\"signed\""];
    assert_eq!(gated.pullgate.metric("pullgate_decisions_total", &allowed).await?, 100.0);
    assert_eq!(gated.pullgate.audit().len(), 100, "every decision is in the journal");
    gated.metric_is("pullgate_verifications_in_flight", 0.0).await?;
    gated.no_panic();
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_verification_is_shared_only_with_the_same_credentials() -> Result<()> {
    let registry = RegistryOptions { login: true, ..Default::default() };
    let world = World::with(WorldOptions { registry, ..Default::default() }).await?;
    let gated = Gated::on(world, "deadline: 60s").await?;
    let image = gated.signed("secret").await?;
    // Only what comes with the right credentials is held.
    let (gate, right) = (Gate::new(), STANDARD.encode(format!("{USER}:{PASSWORD}")));
    let hold = Rule::on(SIGNATURES, Fault::Hold(gate.clone())).header("authorization", &right);
    gated.world.registry.proxy.inject(hold);
    let pull = |user: &str, password: &str| {
        let login = Some((user.to_owned(), password.to_owned()));
        let (cri, name) = (gated.pullgate.cri().clone(), image.by_digest());
        async move { cri.pull_with(&name, &PullOptions { login, ..Default::default() }).await }
    };
    let (first, second) = (tokio::spawn(pull(USER, PASSWORD)), tokio::spawn(pull(USER, PASSWORD)));
    gate.arrived(1).await?;
    gated.metric_is("pullgate_single_flight_joins_total", 1.0).await?;
    // While these wait: others neither join them nor profit, and their failure is theirs alone.
    for (user, password) in [(USER, "wrong"), ("somebody", PASSWORD), ("", "")] {
        let refused = pull(user, password).await.err().context("it was pulled")?;
        assert_eq!(refused.code(), Code::Unknown, "{refused:?}");
        assert!(refused.message().starts_with("RegistryUnavailable: "), "{refused:?}");
        assert!(refused.message().contains(": registry-auth: "), "{refused:?}");
    }
    assert_eq!(gated.pullgate.metric("pullgate_single_flight_joins_total", &[]).await?, 1.0);
    assert!(gated.verdicts().await?.is_empty(), "a failure was stored");
    gate.open();
    assert_eq!(first.await??, image.config_digest);
    assert_eq!(second.await??, image.config_digest);
    // The verdict is about the image. Whether it may be read is still the registry's to say.
    assert!(pull(USER, "wrong").await.is_err(), "containerd pulled it without the right");
    gated.no_panic();
    Ok(())
}

fn resident(pid: i32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? * 1024)
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_image_statuses_cost_one_verification_and_no_memory() -> Result<()> {
    let settings = "imageStatusDeadline: 60s\ndeadline: 60s\ncache: {negativeTTL: 1h}";
    let gated = Gated::start(settings).await?;
    let (good, other) = (gated.signed("good").await?, gated.signed("other").await?);
    let bad = Image::new("bad").push(&gated.world.registry).await?;
    for image in [&good, &bad] {
        gated.world.cri()?.pull(&image.by_tag()).await?;
    }
    gated.world.registry.proxy.forget();
    let asked = stream::iter(0..10_000).map(|number| {
        let (cri, name) = match number % 10 {
            0 => (gated.pullgate.cri(), bad.by_tag()),
            _ => (gated.pullgate.cri(), good.by_tag()),
        };
        async move { cri.image_status(&name).await.map(|image| (number % 10 != 0, image.is_some())) }
    });
    let mut asked = asked.buffer_unordered(256);
    let mut answers = 0;
    let flood = async {
        while let Some(answer) = asked.next().await {
            let (allowed, served) = answer?;
            ensure!(allowed == served, "answer {answers} was wrong");
            answers += 1;
        }
        anyhow::Ok(())
    };
    // A pull has its turn in the middle of it.
    let pull = async { Ok(gated.pullgate.cri().pull(&other.by_tag()).await?) };
    let (_, id) = tokio::try_join!(flood, pull)?;
    assert_eq!((answers, id.as_str()), (10_000, other.config_digest.as_str()));
    assert_eq!((gated.fetched(&good), gated.fetched(&bad)), (1, 1));
    assert!(resident(gated.pullgate.pid())? < 256 << 20, "{} bytes", resident(gated.pullgate.pid())?);
    // An allow that is only repeated is no new decision; a denial is one each time.
    let entries = gated.pullgate.audit();
    let allows = entries.iter().filter(|e| e["PULLGATE_DIGEST"] == *good.digest).count();
    assert!((1..=256).contains(&allows), "{allows} entries");
    gated.no_panic();
    Ok(())
}

async fn five_hundred_images_are_listed_as_containerd_lists_them(version: Version) -> Result<()> {
    const IMAGES: usize = 500;
    let gated = Gated::on(World::on(version).await?, "").await?;
    let images = Image::new("app").push_many(&gated.world.registry, IMAGES).await?;
    let (cri, direct) = (gated.pullgate.cri(), gated.world.cri()?);
    let pulls = images.iter().map(|image| {
        let (direct, name) = (direct.clone(), image.by_tag());
        async move { direct.pull(&name).await }
    });
    stream::iter(pulls).buffer_unordered(8).try_collect::<Vec<_>>().await?;
    let listed = async |cri: &Cri| {
        let mut images = cri.list_images().await?;
        images.sort_by(|a, b| a.id.cmp(&b.id));
        anyhow::Ok(images)
    };
    let all = listed(&direct).await?;
    assert!(all.len() >= IMAGES, "{}", all.len());
    assert_eq!(listed(cri).await?, all);
    for image in images.iter().step_by(100) {
        assert_eq!(cri.image_status(&image.config_digest).await?, None, "the gate is not open");
    }
    // Methods that containerd does not have, one of them streaming: its own words.
    for method in ["StreamImages", "NotYetInvented"] {
        let method = format!("runtime.v1.ImageService/{method}");
        let through = grpc::call(&gated.pullgate.socket(), &method, &[], b"").await?.status();
        let straight = grpc::call(&gated.world.containerd.socket(), &method, &[], b"").await?.status();
        assert_eq!((through.code(), through.message()), (straight.code(), straight.message()));
        assert_eq!(through.code(), Code::Unimplemented);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn past_the_deadline_the_work_goes_on_and_the_retry_is_warm() -> Result<()> {
    let gated = Gated::start("deadline: 400ms").await?;
    let image = gated.signed("app").await?;
    let gate = gated.hold_signatures();
    let mut texts = Vec::new();
    for _ in 0..2 {
        let begin = Instant::now();
        let failed = gated.pullgate.cri().pull(&image.by_tag()).await.err().context("it was pulled")?;
        let took = begin.elapsed();
        assert!(took >= Duration::from_millis(390) && took < Duration::from_secs(3), "{took:?}");
        assert_eq!(failed.code(), Code::Unknown);
        texts.push(failed.message().to_owned());
    }
    let text = &texts[0];
    assert!(text.starts_with("RegistryUnavailable: image ") && text.contains(": timeout: "), "{text}");
    assert_eq!(texts[0], texts[1], "the kubelet shows a reason only while every try says the same");
    assert_eq!(gated.fetched(&image), 1, "the second try joined the first one's work");
    assert!(gated.verdicts().await?.is_empty(), "a failure was stored");

    gate.open();
    wait::until("the verdict", wait::LONG, async || Ok((gated.verdicts().await?.len() == 1).then_some(())))
        .await?;
    assert_eq!(gated.pullgate.cri().pull(&image.by_tag()).await?, image.config_digest);
    assert_eq!(gated.fetched(&image), 1);
    let last = gated.pullgate.audit().pop().context("no entry")?;
    assert_eq!((&last["PULLGATE_DECISION"], &last["PULLGATE_CACHE"]), (&"allow".into(), &"memory".into()));
    gated.no_panic();
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_with_a_short_deadline_of_its_own_still_hears_the_reason() -> Result<()> {
    let gated = Gated::start("deadline: 60s\nimageStatusDeadline: 60s").await?;
    let image = gated.signed("app").await?;
    gated.world.cri()?.pull(&image.by_tag()).await?;
    let gate = gated.hold_signatures();
    let spec = || Some(v1::ImageSpec { image: image.by_tag(), ..Default::default() });
    let mut images = gated.pullgate.cri().images.clone();

    // The client itself gives up after 1.5 s, with another code.
    let mut pull = tonic::Request::new(v1::PullImageRequest { image: spec(), ..Default::default() });
    pull.set_timeout(Duration::from_millis(1500));
    let failed = images.pull_image(pull).await.err().context("it was pulled")?;
    assert_eq!(failed.code(), Code::Unknown, "{failed:?}");
    assert!(failed.message().contains(": timeout: "), "{failed:?}");
    let mut ask = tonic::Request::new(v1::ImageStatusRequest { image: spec(), verbose: false });
    ask.set_timeout(Duration::from_millis(1500));
    assert_eq!(images.image_status(ask).await?.into_inner().image, None);

    assert_eq!(gated.pullgate.metric("pullgate_verifications_in_flight", &[]).await?, 1.0);
    gate.open();
    wait::until("the verdict", wait::LONG, async || Ok((gated.verdicts().await?.len() == 1).then_some(())))
        .await?;
    gated.pullgate.cri().pull(&image.by_tag()).await?;
    assert_eq!(gated.fetched(&image), 1);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_goes_away_ends_only_what_nobody_else_waits_for() -> Result<()> {
    let gated = Gated::start("deadline: 60s").await?;
    let (image, proxy) = (gated.signed("app").await?, &gated.world.registry.proxy);
    let gate = gated.hold_signatures();

    let alone = gated.pulling(&image);
    gate.arrived(1).await?;
    wait::until_true("only the held request to be under way", || proxy.running() == 1).await?;
    alone.abort();
    // Well before the registry client itself gives such a request up, after 7 s.
    wait::until("the held request to be dropped", Duration::from_secs(5), async || {
        Ok((proxy.running() == 0).then_some(()))
    })
    .await?;
    gated.metric_is("pullgate_verifications_in_flight", 0.0).await?;

    let (first, second) = (gated.pulling(&image), gated.pulling(&image));
    gate.arrived(2).await?;
    gated.metric_is("pullgate_single_flight_joins_total", 1.0).await?;
    first.abort();
    assert!(first.await.err().context("it ended")?.is_cancelled());
    // pullgate has seen the call go when it answers another one on the same connection.
    gated.pullgate.cri().image_fs_info().await?;
    wait::until_true("only the held request to be under way", || proxy.running() == 1).await?;
    assert_eq!(gated.pullgate.metric("pullgate_verifications_in_flight", &[]).await?, 1.0);
    gate.open();
    assert_eq!(second.await??, image.config_digest);
    assert_eq!(gated.fetched(&image), 2);
    gated.no_panic();
    Ok(())
}

/// Whether cosign itself accepts an image.
async fn cosign_accepts(gated: &Gated, images: &[Pushed]) -> Result<BTreeMap<String, String>> {
    let (cosign, public) = (gated.world.cosign().await?, gated.key.public.display().to_string());
    let verdicts = images.iter().map(async |image| {
        let accepted = cosign.verify(&public, &image.by_digest()).await.is_ok();
        anyhow::Ok((image.name(), if accepted { "allow" } else { "deny" }.to_owned()))
    });
    Ok(try_join_all(verdicts).await?.into_iter().collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_times_kill_9_under_load_leave_no_wrong_and_no_unreadable_verdict() -> Result<()> {
    // With these lifetimes nothing counts for long: every ask verifies anew, and writes.
    let gated = Gated::start("cache: {positiveTTL: 0s, negativeTTL: 0s, staleGrace: 0s}").await?;
    let images = Image::new("app").push_many(&gated.world.registry, 12).await?;
    gated.sign(&images[..8]).await?;
    for image in &images {
        gated.world.cri()?.pull(&image.by_tag()).await?;
    }
    for round in 0..50 {
        let answered = AtomicUsize::new(0);
        gated.world.registry.proxy.forget();
        let load = images.iter().enumerate().map(async |(number, image)| {
            // Answers that the kill cuts off are errors; those that came are right.
            let wrong = match (number % 4, number < 8) {
                (0, signed) => gated.pullgate.cri().pull(&image.by_tag()).await.is_ok() && !signed,
                (_, signed) => {
                    let told = gated.pullgate.cri().image_status(&image.by_tag()).await;
                    told.is_ok_and(|told| told.is_some()) && !signed
                }
            };
            answered.fetch_add(1, Ordering::SeqCst);
            wrong
        });
        // Earlier and later in the work: in the middle of fetching, of writing, of answering.
        let moment = wait::until_true("the moment of the kill", || match round % 2 {
            0 => gated.world.registry.proxy.count("GET", SIGNATURES) > round % images.len(),
            _ => answered.load(Ordering::SeqCst) > round % images.len(),
        });
        let kill = async {
            moment.await?;
            gated.pullgate.kill9();
            anyhow::Ok(())
        };
        let (wrong, killed) = tokio::join!(join_all(load), kill);
        killed?;
        assert!(wrong.iter().all(|wrong| !wrong), "an unsigned image was let through");
        gated.pullgate.start_again().await?;
    }
    let stored = gated.asks(&["cache", "stats"]).await?;
    let listed = gated.asks(&["cache", "list", "--limit", "1000"]).await?;
    assert_eq!(stored["diskEntries"], listed["matching"], "an entry can't be read");
    let (verdicts, truth) = (gated.verdicts().await?, cosign_accepts(&gated, &images).await?);
    assert!(verdicts.len() >= 9, "only {} verdicts were ever written", verdicts.len());
    for (repository, decision) in &verdicts {
        assert_eq!(truth.get(repository), Some(decision), "{repository}");
    }
    for entry in listed["entries"].as_array().context("no list")? {
        let shown = gated.asks(&["cache", "show", entry["key"].as_str().context("no key")?]).await?;
        assert_eq!((&shown["digest"], &shown["decision"]), (&entry["digest"], &entry["decision"]));
    }
    for (number, image) in images.iter().enumerate() {
        assert_eq!(gated.pullgate.cri().pull(&image.by_tag()).await.is_ok(), number < 8, "{number}");
    }
    assert!(!gated.pullgate.log().contains(SET_ASIDE), "a kill damaged the store");
    gated.no_panic();
    Ok(())
}

/// Every file below a folder.
fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() { all.extend(files(&path)?) } else { all.push(path) }
    }
    Ok(all)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_store_is_set_aside_audited_and_begun_anew() -> Result<()> {
    let gated = Gated::start("").await?;
    let good = gated.signed("good").await?;
    let bad = Image::new("bad").push(&gated.world.registry).await?;
    let store = gated.pullgate.state().join("verdicts");
    type Damage = fn(&Path) -> Result<()>;
    let overwrite: Damage = |store| {
        for file in files(store)? {
            std::fs::write(&file, vec![0x5a; std::fs::metadata(&file)?.len() as usize])?;
        }
        Ok(())
    };
    let database: Damage = |store| Ok(std::fs::write(store.join("db"), b"not a database")?);
    let settings: Damage = |store| Ok(std::fs::write(store.join("conf"), [0x5a; 100])?);
    let text: Damage = |store| {
        for file in files(store)? {
            std::fs::write(&file, "segment_size: 1\n".repeat(1000))?;
        }
        Ok(())
    };
    for (number, damage) in [overwrite, database, settings, text].into_iter().enumerate() {
        gated.pullgate.cri().pull(&good.by_tag()).await?;
        wait::until("the verdict on disk", wait::LONG, async || {
            Ok((gated.asks(&["cache", "stats"]).await?["diskEntries"] == 1).then_some(()))
        })
        .await?;
        gated.pullgate.stop().await?;
        damage(&store)?;
        gated.pullgate.start_again().await.with_context(|| format!("damage {number}"))?;
        assert_eq!(gated.pullgate.log().matches(SET_ASIDE).count(), number + 1, "damage {number}");
        assert!(store.with_extension("set-aside").is_dir());
        assert!(gated.verdicts().await?.is_empty());
        gated.world.registry.proxy.forget();
        gated.pullgate.cri().pull(&good.by_tag()).await?;
        assert_eq!(gated.fetched(&good), 1, "it was judged anew");
        let refused = gated.pullgate.cri().pull(&bad.by_tag()).await.err().context("it was pulled")?;
        assert!(refused.message().contains(": unsigned: "), "{refused}");
        gated.asks(&["cache", "purge", "--image", &bad.name()]).await?;
    }
    // Damage in the middle may cost verdicts; it never makes one up, and never stops the start.
    for place in 0..8 {
        gated.pullgate.stop().await?;
        let mut bytes = std::fs::read(store.join("db"))?;
        let (length, start) = (bytes.len() / 64, bytes.len() / 8 * place);
        bytes[start..start + length].fill(0xff);
        std::fs::write(store.join("db"), bytes)?;
        gated.pullgate.start_again().await.with_context(|| format!("damage at {start}"))?;
        assert_eq!(gated.pullgate.cri().pull(&good.by_tag()).await?, good.config_digest);
        assert!(gated.pullgate.cri().pull(&bad.by_tag()).await.is_err());
    }
    gated.no_panic();
    Ok(())
}

/// A small file system, gone with the test.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(at: PathBuf, size: &str) -> Result<Self> {
        let options = format!("size={size}");
        let flags = nix::mount::MsFlags::empty();
        nix::mount::mount(Some("tmpfs"), &at, Some("tmpfs"), flags, Some(options.as_str()))?;
        Ok(Self(at))
    }

    fn filler(&self) -> PathBuf {
        self.0.join("filler")
    }

    /// Writes until nothing goes any more.
    fn fill(&self) -> Result<()> {
        use std::io::Write;
        let mut file = std::fs::File::create(self.filler())?;
        while file.write_all(&[0; 4096]).is_ok() {}
        Ok(())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

/// notation-go CVE-2024-51491: a write error must not deny a valid image.
#[tokio::test(flavor = "multi_thread")]
async fn cve_2024_51491_on_a_full_disk_verdicts_stand_and_are_written_once_there_is_room() -> Result<()> {
    let world = World::start().await?;
    let disk = SmallDisk::mount(world.folder("full")?, "4m")?;
    let gated = Gated::on(world, &format!("stateDir: {}", disk.0.display())).await?;
    let images = Image::new("app").push_many(&gated.world.registry, 12).await?;
    gated.sign(&images).await?;
    let unsigned = Image::new("unsigned").push(&gated.world.registry).await?;
    let written =
        async || anyhow::Ok(gated.asks(&["cache", "stats"]).await?["diskEntries"].as_u64().unwrap_or(0));
    gated.pullgate.cri().pull(&images[0].by_tag()).await?;
    wait::until("the first verdict", wait::LONG, async || Ok((written().await? == 1).then_some(()))).await?;

    disk.fill()?;
    for image in &images {
        assert_eq!(gated.pullgate.cri().pull(&image.by_tag()).await?, image.config_digest);
    }
    let refused = gated.pullgate.cri().pull(&unsigned.by_tag()).await.err().context("it was pulled")?;
    assert!(refused.message().contains(": unsigned: "), "{refused}");
    wait::until("a write error", wait::LONG, async || {
        Ok((gated.pullgate.metric("pullgate_cache_write_errors_total", &[]).await? >= 1.0).then_some(()))
    })
    .await?;
    assert!(gated.pullgate.log().contains("a verdict could not be written to disk"));
    assert!(gated.asks(&["status"]).await?["storeError"].is_string());
    assert_eq!(gated.verdicts().await?.len(), 13, "all are in memory");

    // An operator makes room, and does not restart anything.
    std::fs::remove_file(disk.filler())?;
    wait::until("all verdicts on disk", wait::LONG, async || Ok((written().await? == 13).then_some(())))
        .await?;
    assert!(gated.asks(&["status"]).await?["storeError"].is_null());
    gated.pullgate.restart().await?;
    gated.world.registry.proxy.forget();
    for image in &images {
        gated.pullgate.cri().pull(&image.by_tag()).await?;
    }
    assert_eq!(gated.world.registry.proxy.count("GET", SIGNATURES), 0);
    assert!(!gated.pullgate.log().contains(SET_ASIDE), "a full disk is no damage");
    gated.no_panic();
    Ok(())
}

/// An upgrade: the new pullgate starts while the old one still drains.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_another_pullgate_holds_is_used_once_it_lets_go() -> Result<()> {
    let old = Gated::start("").await?;
    let image = old.signed("app").await?;
    old.pullgate.cri().pull(&image.by_tag()).await?;
    wait::until("the verdict", wait::LONG, async || Ok((old.verdicts().await?.len() == 1).then_some(())))
        .await?;
    let state = format!("stateDir: {}\n", old.pullgate.state().display());
    let rules = policy::signed(&old.world.registry, &old.key.uri());
    let new = Pullgate::start(&old.world, &(state + &rules)).await?;

    let other = old.signed("other").await?;
    assert_eq!(new.cri().pull(&other.by_tag()).await?, other.config_digest, "it works without");
    assert!(new.log().contains("verdicts are kept in memory only"), "{}", new.log());
    assert!(!new.log().contains(SET_ASIDE), "a held lock is no damage");
    let purge = new.admin(&["cache", "purge", "--all"]).await?;
    assert_eq!(purge.status.code(), Some(1), "what is on disk would come back: {purge:?}");
    assert!(purge.stderr.contains("purge again when"), "{purge:?}");
    assert_eq!(new.cri().pull(&other.by_tag()).await?, other.config_digest);
    old.pullgate.stop().await?;
    wait::until("both verdicts on disk", wait::LONG, async || {
        let said = new.admin(&["cache", "stats", "--output", "json"]).await?.ok()?.stdout;
        let stats: Value = serde_json::from_str(&said)?;
        Ok((stats["diskEntries"] == 2).then_some(()))
    })
    .await?;
    old.world.registry.proxy.forget();
    new.cri().pull(&image.by_tag()).await?;
    assert_eq!(old.fetched(&image), 0, "the old one's verdict");
    assert!(!new.log().contains("panicked"));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_cache_can_be_looked_at_and_purged_while_the_daemon_runs() -> Result<()> {
    let gated = Gated::start("").await?;
    let (a, b) = (gated.signed("team/a").await?, gated.signed("team/b").await?);
    let bad = Image::new("other/bad").push(&gated.world.registry).await?;
    let cri = gated.pullgate.cri();
    cri.pull(&a.by_tag()).await?;
    cri.pull(&b.by_tag()).await?;
    assert!(cri.pull(&bad.by_tag()).await.is_err());
    wait::until("three verdicts on disk", wait::LONG, async || {
        Ok((gated.asks(&["cache", "stats"]).await?["diskEntries"] == 3).then_some(()))
    })
    .await?;
    let stats = gated.asks(&["cache", "stats"]).await?;
    assert_eq!((&stats["allow"], &stats["deny"], &stats["memoryEntries"]), (&2.into(), &1.into(), &3.into()));
    assert!(stats["diskBytes"].as_u64() > Some(0));

    let listed = gated.asks(&["cache", "list", "--decision", "deny"]).await?;
    let entry = &listed["entries"][0];
    assert_eq!((&listed["matching"], &entry["reason"]), (&1.into(), &"unsigned".into()));
    assert_eq!((&entry["repository"], &entry["digest"]), (&bad.name().into(), &bad.digest.clone().into()));
    let key = entry["key"].as_str().context("no key")?;
    assert_eq!(gated.asks(&["cache", "show", &key[..12]]).await?["digest"], *bad.digest);
    let by_digest = gated.asks(&["cache", "list", "--digest", &a.digest]).await?;
    assert_eq!((&by_digest["matching"], &by_digest["entries"][0]["decision"]), (&1.into(), &"allow".into()));
    let table = gated.pullgate.admin(&["cache", "list", "--limit", "2"]).await?.ok()?.stdout;
    assert!(table.ends_with("2 of 3 verdicts\n"), "{table}");
    let unknown = gated.pullgate.admin(&["cache", "show", "ffff0000ffff"]).await?;
    assert_eq!(unknown.status.code(), Some(1), "{unknown:?}");

    for wrong in [&["cache", "purge"][..], &["cache", "purge", "--all", "--decision", "deny"], &["cache"]] {
        let said = gated.pullgate.admin(wrong).await?;
        assert_eq!(said.status.code(), Some(2), "{wrong:?}: {said:?}");
    }
    assert_eq!(gated.verdicts().await?.len(), 3, "nothing was purged by mistake");
    let glob = format!("{}/team/*", gated.world.registry.host());
    assert_eq!(gated.asks(&["cache", "purge", "--image", &glob]).await?["purged"], 2);
    assert_eq!(gated.verdicts().await?.into_keys().collect::<Vec<_>>(), [bad.name()]);
    gated.world.registry.proxy.forget();
    cri.pull(&a.by_tag()).await?;
    assert_eq!(gated.fetched(&a), 1, "what was purged is worked out again");

    // A mistake of CI is mended, and nobody wants to wait for the negative TTL.
    gated.sign(std::slice::from_ref(&bad)).await?;
    assert!(cri.pull(&bad.by_tag()).await.is_err(), "the denial is remembered");
    assert_eq!(gated.asks(&["cache", "purge", "--digest", &bad.digest]).await?["purged"], 1);
    cri.pull(&bad.by_tag()).await?;
    gated.asks(&["cache", "purge", "--all"]).await?;
    assert!(gated.verdicts().await?.is_empty());
    gated.pullgate.restart().await?;
    assert!(gated.verdicts().await?.is_empty(), "purged on disk as well");

    gated.pullgate.stop().await?;
    let away = gated.pullgate.admin(&["cache", "stats"]).await?;
    assert_eq!(away.status.code(), Some(3), "{away:?}");
    Ok(())
}
