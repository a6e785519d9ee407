//! The gate on `ImageStatus`: an image that came past `PullImage` (`ctr`, a tarball, an earlier
//! policy) is there for the kubelet only if it would have been allowed.

use anyhow::{Context, Result};
use pullgate_tests::cri::v1;
use pullgate_tests::{Fault, Gate, Image, KeyPair, Pullgate, Pushed, Rule, Version, World, policy, wait};
use std::time::{Duration, Instant};
use tokio::task::JoinHandle;
use tonic::Status;

pullgate_tests::on_both! {
    what_ctr_imported_or_pulled_is_absent_unless_it_is_allowed,
    no_spelling_of_an_image_id_gets_round_the_gate,
    a_tag_beside_a_digest_changes_nothing,
    what_is_signed_costs_one_verification_for_ever,
    while_the_registry_hangs_an_image_is_absent_and_the_work_goes_on,
    lists_removal_and_garbage_collection_are_never_filtered,
    a_tag_moved_in_the_store_is_judged_by_what_it_points_to_now,
    names_of_one_digest_are_judged_each_by_its_own_rule,
    a_verbose_answer_about_a_denied_image_says_nothing,
    a_pulled_tag_is_recorded_and_moves_with_the_registry,
    what_is_there_is_pulled_again_while_its_tag_is_resolved,
    a_pull_after_a_removal_brings_the_tag_back,
    a_pull_begun_early_counts_for_nothing_where_the_tag_has_moved,
}

/// A world in which one key signs, and pullgate requires it everywhere but where a rule says else.
struct Gated {
    world: World,
    key: KeyPair,
    pullgate: Pullgate,
}

impl Gated {
    async fn on(version: Version) -> Result<Self> {
        Self::with(version, |_| Vec::new(), "").await
    }

    /// With rules before the one that wants signatures (the registry's host is given), and settings.
    async fn with(version: Version, first: impl FnOnce(&str) -> Vec<String>, more: &str) -> Result<Self> {
        let world = World::on(version).await?;
        let key = world.cosign().await?.generate_key("ci").await?;
        let mut rules = first(world.registry.host());
        rules.push(policy::rule(&world.registry, &key.uri(), ""));
        let pullgate = Pullgate::start(&world, &format!("{more}\n{}", policy::rules(&rules))).await?;
        Ok(Self { world, key, pullgate })
    }

    async fn unsigned(&self, name: &str) -> Result<Pushed> {
        Image::new(name).push(&self.world.registry).await
    }

    async fn sign(&self, image: &Pushed) -> Result<()> {
        self.world.cosign().await?.sign(&self.key.key(), &image.by_digest()).await?;
        self.world.registry.proxy.forget();
        Ok(())
    }

    async fn signed(&self, name: &str) -> Result<Pushed> {
        let image = self.unsigned(name).await?;
        self.sign(&image).await?;
        Ok(image)
    }

    fn pulling(&self, image: &Pushed) -> JoinHandle<Result<String, Status>> {
        let (cri, name) = (self.pullgate.cri().clone(), image.by_tag());
        tokio::spawn(async move { cri.pull(&name).await })
    }

    /// Puts an image on the node past the gate, as the CRI records it: by tag, digest and id.
    async fn preload(&self, image: &Pushed) -> Result<()> {
        self.world.cri()?.pull(&image.by_tag()).await?;
        self.world.registry.proxy.forget();
        Ok(())
    }

    /// What containerd itself says of a name.
    async fn direct(&self, name: &str) -> Result<Option<v1::Image>> {
        Ok(self.world.cri()?.image_status(name).await?)
    }

    /// What the kubelet is told.
    async fn told(&self, name: &str) -> Result<Option<v1::Image>> {
        Ok(self.pullgate.cri().image_status(name).await?)
    }

    /// Waits until containerd's CRI shows this image (or none) under a name, as `ctr` left it.
    async fn shows(&self, name: &str, id: Option<&str>) -> Result<()> {
        wait::until(&format!("{name} to be {id:?}"), wait::LONG, async || {
            let shown = self.direct(name).await?.map(|image| image.id);
            Ok((shown.as_deref() == id).then_some(()))
        })
        .await
    }

    /// containerd has it under this name, and the kubelet is told the very same.
    async fn serves(&self, name: &str) -> Result<()> {
        let direct = self.direct(name).await?.with_context(|| format!("containerd does not know {name}"))?;
        let told = self.told(name).await?.with_context(|| format!("{name} is not served"))?;
        assert_eq!(told, direct);
        Ok(())
    }

    /// containerd has it under this name, and the kubelet is told that it is absent.
    async fn hides(&self, name: &str) -> Result<()> {
        self.direct(name).await?.with_context(|| format!("containerd does not know {name}"))?;
        assert_eq!(self.told(name).await?, None, "{name} is served");
        Ok(())
    }
}

async fn what_ctr_imported_or_pulled_is_absent_unless_it_is_allowed(version: Version) -> Result<()> {
    let gated = Gated::on(version).await?;
    let (pulled, signed) = (gated.unsigned("pulled").await?, gated.signed("signed").await?);
    let imported = format!("{}/imported:v1", gated.world.registry.host());
    gated.world.containerd.pull(&pulled.by_tag()).await?;
    gated.world.containerd.pull(&signed.by_tag()).await?;
    gated.world.containerd.import(&Image::new("imported"), &imported).await?;
    for name in [&imported, &pulled.by_tag(), &signed.by_tag()] {
        wait::until(name, wait::LONG, async || gated.direct(name).await).await?;
    }
    gated.hides(&imported).await?;
    gated.hides(&pulled.by_tag()).await?;
    gated.serves(&signed.by_tag()).await?;

    // The kubelet now pulls, and hears why not.
    let refused = gated.pullgate.cri().run_container(&pulled.by_tag()).await.err().context("it ran")?;
    assert!(refused.to_string().contains(": unsigned: "), "{refused}");
    assert_eq!(gated.pullgate.cri().run_container(&signed.by_tag()).await?, "hello\n");

    let entry = gated
        .pullgate
        .audited(|e| e["PULLGATE_METHOD"] == "ImageStatus" && e["PULLGATE_DIGEST"] == *pulled.digest)
        .await?;
    assert_eq!(
        (&entry["PULLGATE_DECISION"], &entry["PULLGATE_REASON"]),
        (&"deny".into(), &"unsigned".into())
    );
    Ok(())
}

/// Every way in which containerd reads an image ID, and the shortest prefix that is unique.
fn spellings(image: &Pushed) -> Vec<String> {
    let hex = image.config_digest.trim_start_matches("sha256:");
    let mut all = Vec::new();
    for length in [64, 63, 32, 12, 9, 7] {
        let prefix = &hex[..length];
        all.extend([prefix.to_owned(), format!("sha256:{prefix}")]);
    }
    all
}

async fn no_spelling_of_an_image_id_gets_round_the_gate(version: Version) -> Result<()> {
    // containerd reads `sha256:0123` as the name docker.io/library/sha256:0123, too.
    let hub = |_: &str| vec!["{imageGlob: \"docker.io/**\", strategy: allow}".to_owned()];
    let gated = Gated::with(version, hub, "").await?;
    // The sandbox image is the only one, so that the start of every ID means it; no rule allows it.
    let only = gated.direct("").await?.context("more than one image")?.id;
    for start in ["", &only[..8], &only["sha256:".len()..8]] {
        gated.hides(start).await?;
    }
    let (unsigned, signed) = (gated.unsigned("bad").await?, gated.signed("good").await?);
    gated.preload(&unsigned).await?;
    gated.preload(&signed).await?;
    for (unsigned, signed) in spellings(&unsigned).iter().zip(&spellings(&signed)) {
        gated.hides(unsigned).await?;
        gated.serves(signed).await?;
    }
    // An ID with a tag, as the kubelet completes a bare prefix, and manifest digests are no names.
    let hex = unsigned.config_digest.trim_start_matches("sha256:");
    for name in [&format!("{}:latest", &hex[..12]), &unsigned.digest] {
        assert_eq!(gated.direct(name).await?, None);
        assert_eq!(gated.told(name).await?, None);
    }
    // Nor does an image that has lost all its names.
    let names = gated.direct(&unsigned.config_digest).await?.context("gone")?;
    for name in names.repo_tags.iter().chain(&names.repo_digests) {
        gated.world.containerd.ctr(&["images", "rm", name]).await?;
        gated.shows(name, None).await?;
    }
    gated.hides(&unsigned.config_digest).await
}

async fn a_tag_beside_a_digest_changes_nothing(version: Version) -> Result<()> {
    let gated = Gated::on(version).await?;
    let signed = gated.signed("app").await?;
    let evil = Image::new("app").tag("evil").push(&gated.world.registry).await?;
    gated.preload(&signed).await?;
    gated.preload(&evil).await?;
    let name = signed.name();
    gated.hides(&format!("{name}:{}@{}", signed.tag, evil.digest)).await?;
    gated.serves(&format!("{name}:{}@{}", evil.tag, signed.digest)).await?;
    gated.serves(&format!("{name}:no-such-tag@{}", signed.digest)).await?;

    let lie = format!("{name}:{}@{}", signed.tag, evil.digest);
    let refused = gated.pullgate.cri().pull(&lie).await.err().context("it was pulled")?;
    assert!(refused.message().contains(&format!("{name}@{} refused", evil.digest)), "{refused}");
    Ok(())
}

async fn what_is_signed_costs_one_verification_for_ever(version: Version) -> Result<()> {
    let gated = Gated::on(version).await?;
    let image = gated.signed("app").await?;
    gated.preload(&image).await?;
    let proxy = &gated.world.registry.proxy;
    let signatures = format!("/v2/app/manifests/{}", image.cosign_tag(".sig"));

    gated.serves(&image.by_tag()).await?;
    assert_eq!(proxy.count("GET", &signatures), 1);
    assert_eq!(proxy.count("*", &format!("/v2/app/manifests/{}", image.tag)), 0, "the tag is not resolved");
    proxy.forget();
    for name in [image.by_tag(), image.by_digest(), image.config_digest.clone()] {
        gated.serves(&name).await?;
    }
    gated.pullgate.restart().await?;
    gated.world.registry.kill9();
    for name in [image.by_tag(), image.by_digest(), image.config_digest.clone()] {
        gated.serves(&name).await?;
    }
    assert_eq!(proxy.requests().len(), 0, "{:?}", proxy.requests());
    let caches: Vec<_> = gated.pullgate.audit().iter().map(|e| e["PULLGATE_CACHE"].clone()).collect();
    // By tag and by digest; by id it is one of these.
    assert_eq!(caches, ["miss", "memory", "disk", "memory"], "a repetition is no new decision");
    Ok(())
}

async fn while_the_registry_hangs_an_image_is_absent_and_the_work_goes_on(version: Version) -> Result<()> {
    let gated = Gated::with(version, |_| Vec::new(), "imageStatusDeadline: 300ms").await?;
    let image = gated.signed("app").await?;
    gated.preload(&image).await?;
    let (proxy, gate) = (&gated.world.registry.proxy, Gate::new());
    proxy.inject(Rule::on("/v2/*.sig", Fault::Hold(gate.clone())));

    let begin = Instant::now();
    gated.hides(&image.by_tag()).await?;
    let took = begin.elapsed();
    assert!(took >= Duration::from_millis(290) && took < Duration::from_millis(1500), "{took:?}");
    gate.arrived(1).await?;
    let entry = gated.pullgate.audited(|e| e["PULLGATE_METHOD"] == "ImageStatus").await?;
    assert_eq!(entry["PULLGATE_DECISION"], "failure");
    assert_eq!(entry["PULLGATE_REASON"], "timeout");
    // The next ask joins the work under way, and so does the pull that the kubelet makes.
    gated.hides(&image.by_tag()).await?;
    assert_eq!(gated.pullgate.metric("pullgate_single_flight_joins_total", &[]).await?, 1.0);

    gate.open();
    wait::until("the verdict", wait::LONG, async || {
        let kept = gated.pullgate.admin(&["cache", "list", "--output", "json"]).await?.ok()?.stdout;
        Ok(kept.contains(&image.digest).then_some(()))
    })
    .await?;
    proxy.inject(Rule::on("*", Fault::Hang));
    gated.serves(&image.by_tag()).await?;
    assert_eq!(proxy.count("GET", "/v2/*.sig"), 1);
    Ok(())
}

async fn lists_removal_and_garbage_collection_are_never_filtered(version: Version) -> Result<()> {
    let gated = Gated::on(version).await?;
    let (bad, good) = (gated.unsigned("bad").await?, gated.signed("good").await?);
    gated.preload(&bad).await?;
    gated.preload(&good).await?;
    let (cri, direct) = (gated.pullgate.cri(), gated.world.cri()?);

    let listed = async |cri: &pullgate_tests::Cri| {
        let mut images = cri.list_images().await?;
        images.sort_by(|a, b| a.id.cmp(&b.id));
        anyhow::Ok(images)
    };
    let all = listed(cri).await?;
    assert_eq!(all, listed(&direct).await?);
    assert!(all.iter().any(|image| image.id == bad.config_digest), "{all:?}");
    let filter = v1::ListImagesRequest {
        filter: Some(v1::ImageFilter {
            image: Some(v1::ImageSpec { image: bad.by_tag(), ..Default::default() }),
        }),
    };
    let sorted = |mut answer: v1::ListImagesResponse| {
        answer.images.sort_by(|a, b| a.id.cmp(&b.id));
        answer
    };
    let filtered = cri.images.clone().list_images(filter.clone()).await?.into_inner();
    let same = direct.images.clone().list_images(filter).await?.into_inner();
    assert_eq!(sorted(filtered), sorted(same));
    let (info, same) = (cri.image_fs_info().await?, direct.image_fs_info().await?);
    let points = |info: &v1::ImageFsInfoResponse| -> Vec<_> {
        info.image_filesystems.iter().map(|fs| (fs.fs_id.clone(), fs.used_bytes)).collect()
    };
    assert_eq!(points(&info), points(&same));
    assert!(!points(&info).is_empty());

    // As image garbage collection does it: whatever is listed is removed by its id.
    for image in [&bad, &good] {
        cri.remove_image(&image.config_digest).await?;
        assert_eq!(gated.direct(&image.by_tag()).await?, None);
        for name in [image.by_tag(), image.by_digest(), image.config_digest.clone()] {
            assert_eq!(gated.told(&name).await?, None, "{name}");
        }
    }
    assert!(
        cri.list_images()
            .await?
            .iter()
            .all(|image| ![&bad, &good].iter().any(|i| i.config_digest == image.id))
    );
    // And what was removed comes back.
    assert_eq!(cri.run_container(&good.by_tag()).await?, "hello\n");
    gated.serves(&good.by_tag()).await
}

async fn a_tag_moved_in_the_store_is_judged_by_what_it_points_to_now(version: Version) -> Result<()> {
    let gated = Gated::on(version).await?;
    let signed = gated.signed("app").await?;
    let evil = Image::new("app").tag("evil").push(&gated.world.registry).await?;
    gated.preload(&signed).await?;
    gated.preload(&evil).await?;
    let name = signed.by_tag();
    for _ in 0..3 {
        gated.serves(&name).await?;
        gated.world.containerd.tag(&evil.by_tag(), &[&name]).await?;
        // From here on nothing but the evil image is under that name, whoever is late to notice.
        let served = gated.told(&name).await?;
        assert!(served.as_ref().is_none_or(|image| image.id == signed.config_digest), "{served:?}");
        gated.shows(&name, Some(&evil.config_digest)).await?;
        gated.hides(&name).await?;
        gated.serves(&signed.by_digest()).await?;
        gated.world.containerd.tag(&signed.by_digest(), &[&name]).await?;
        gated.shows(&name, Some(&signed.config_digest)).await?;
    }
    Ok(())
}

async fn names_of_one_digest_are_judged_each_by_its_own_rule(version: Version) -> Result<()> {
    let rules = |host: &str| {
        vec![
            format!("{{imageGlob: \"{host}/free/**\", strategy: allow}}"),
            format!("{{imageGlob: \"{host}/banned/**\", strategy: deny}}"),
        ]
    };
    let gated = Gated::with(version, rules, "").await?;
    let (host, containerd) = (gated.world.registry.host().to_owned(), &gated.world.containerd);
    let signed = gated.signed("signed/app").await?;
    gated.preload(&signed).await?;
    let banned = [format!("{host}/banned/app:v1"), format!("{host}/banned/app@{}", signed.digest)];
    let free = [format!("{host}/free/app:v1"), format!("{host}/free/app@{}", signed.digest)];
    let all: Vec<&str> = banned.iter().chain(&free).map(String::as_str).collect();
    containerd.tag(&signed.by_tag(), &all).await?;
    for name in &all {
        gated.shows(name, Some(&signed.config_digest)).await?;
    }
    for name in banned.iter() {
        gated.hides(name).await?;
    }
    for name in free.iter().chain([&signed.by_tag(), &signed.by_digest(), &signed.config_digest]) {
        gated.serves(name).await?;
    }
    // By id it is there for as long as one of its names is allowed.
    for name in free.iter().chain([&signed.by_tag(), &signed.by_digest()]) {
        containerd.ctr(&["images", "rm", name]).await?;
        gated.shows(name, None).await?;
    }
    gated.hides(&signed.config_digest).await
}

async fn a_verbose_answer_about_a_denied_image_says_nothing(version: Version) -> Result<()> {
    let gated = Gated::on(version).await?;
    let (bad, good) = (gated.unsigned("bad").await?, gated.signed("good").await?);
    gated.preload(&bad).await?;
    gated.preload(&good).await?;
    let ask = async |cri: &pullgate_tests::Cri, name: &str| {
        let image = Some(v1::ImageSpec { image: name.to_owned(), ..Default::default() });
        let request = v1::ImageStatusRequest { image, verbose: true };
        anyhow::Ok(cri.images.clone().image_status(request).await?.into_inner())
    };
    let (cri, direct) = (gated.pullgate.cri(), gated.world.cri()?);
    for name in [bad.by_tag(), bad.by_digest(), bad.config_digest.clone()] {
        assert!(!ask(&direct, &name).await?.info.is_empty(), "containerd has nothing to tell");
        assert_eq!(ask(cri, &name).await?, v1::ImageStatusResponse::default());
    }
    let told = ask(cri, &good.by_tag()).await?;
    assert_eq!(told, ask(&direct, &good.by_tag()).await?);
    assert!(!told.info.is_empty());
    Ok(())
}

async fn a_pulled_tag_is_recorded_and_moves_with_the_registry(version: Version) -> Result<()> {
    let gated = Gated::on(version).await?;
    let (old, cri) = (gated.signed("app").await?, gated.pullgate.cri());
    let next = Image::new("app").tag("next").push(&gated.world.registry).await?;
    gated.sign(&next).await?;
    let record = async || {
        let listed = gated.world.containerd.ctr(&["images", "ls"]).await?.stdout;
        let name = format!("{} ", old.by_tag());
        anyhow::Ok(listed.lines().find(|line| line.starts_with(&name)).context("no record")?.to_owned())
    };

    assert_eq!(cri.pull(&old.by_tag()).await?, old.config_digest);
    let line = record().await?;
    assert!(line.contains(&old.digest) && line.contains("io.cri-containerd.image=managed"), "{line}");

    gated.world.registry.oci().retag("app", &next.tag, &old.tag).await?;
    assert_eq!(cri.pull(&old.by_tag()).await?, next.config_digest);
    let line = record().await?;
    assert!(line.contains(&next.digest) && line.contains("io.cri-containerd.image=managed"), "{line}");
    let told = gated.told(&old.by_tag()).await?.context("absent")?;
    assert_eq!((&told.id, &told.repo_tags), (&next.config_digest, &vec![old.by_tag()]));
    // The old image has lost its tag, not its place.
    let left = gated.told(&old.config_digest).await?.context("absent")?;
    assert_eq!((left.repo_tags.len(), left.repo_digests), (0, vec![old.by_digest()]));
    Ok(())
}

/// One round trip to the registry, not two: both requests stand before the gates at one time.
async fn what_is_there_is_pulled_again_while_its_tag_is_resolved(version: Version) -> Result<()> {
    let gated = Gated::on(version).await?;
    let image = gated.signed("app").await?;
    gated.pullgate.cri().pull(&image.by_tag()).await?;
    let (tag, digest) = (Gate::new(), Gate::new());
    let hold = |pointer: &str, gate: &Gate| {
        gated
            .world
            .registry
            .proxy
            .inject(Rule::on(&format!("/v2/app/manifests/{pointer}"), Fault::Hold(gate.clone())));
    };
    hold(&image.tag, &tag);
    hold(&image.digest, &digest);
    let pull = gated.pulling(&image);
    tag.arrived(1).await?;
    digest.arrived(1).await?;
    digest.open();
    wait::until("containerd's answer to the early pull", wait::LONG, async || {
        let answers = gated.pullgate.metric("pullgate_containerd_duration_seconds_count", &[]).await?;
        Ok((answers == 2.0).then_some(()))
    })
    .await?;
    assert!(!pull.is_finished(), "the tag decides");
    tag.open();
    assert_eq!(pull.await??, image.config_digest);
    gated.told(&image.by_tag()).await?.context("absent")?;
    Ok(())
}

async fn a_pull_after_a_removal_brings_the_tag_back(version: Version) -> Result<()> {
    let gated = Gated::on(version).await?;
    let (image, cri) = (gated.signed("app").await?, gated.pullgate.cri());
    cri.pull(&image.by_tag()).await?;
    // The tag alone, past the CRI, and then all of it.
    gated.world.containerd.ctr(&["images", "rm", &image.by_tag()]).await?;
    gated.shows(&image.by_tag(), None).await?;
    assert_eq!(cri.pull(&image.by_tag()).await?, image.config_digest);
    gated.shows(&image.by_tag(), Some(&image.config_digest)).await?;
    cri.remove_image(&image.by_tag()).await?;
    gated.shows(&image.by_tag(), None).await?;
    assert_eq!(cri.pull(&image.by_tag()).await?, image.config_digest);
    gated.shows(&image.by_tag(), Some(&image.config_digest)).await
}

async fn a_pull_begun_early_counts_for_nothing_where_the_tag_has_moved(version: Version) -> Result<()> {
    let gated = Gated::on(version).await?;
    let old = gated.signed("app").await?;
    gated.pullgate.cri().pull(&old.by_tag()).await?;
    let next = Image::new("app").tag("next").push(&gated.world.registry).await?;
    gated.sign(&next).await?;
    let bad = Image::new("app").tag("bad").push(&gated.world.registry).await?;
    let oci = gated.world.registry.oci();
    // The early pull never ends: whoever waited for it would not end, either.
    let early = Gate::new();
    let path = format!("/v2/app/manifests/{}", old.digest);
    gated.world.registry.proxy.inject(Rule::on(&path, Fault::Hold(early.clone())));
    let moved = async |to: &Pushed, count: usize| -> Result<Result<String, Status>> {
        let tag = Gate::new();
        let held = format!("/v2/app/manifests/{}", old.tag);
        gated.world.registry.proxy.inject(Rule::on(&held, Fault::Hold(tag.clone())).method("HEAD").times(1));
        let pull = gated.pulling(&old);
        tag.arrived(1).await?;
        early.arrived(count).await?;
        oci.retag("app", &to.tag, &old.tag).await?;
        tag.open();
        Ok(pull.await?)
    };
    let refused = moved(&bad, 1).await?.err().context("it was pulled")?;
    assert!(
        refused.message().contains(&bad.digest) && refused.message().contains(": unsigned: "),
        "{refused}"
    );
    assert_eq!(gated.told(&old.by_tag()).await?.context("absent")?.id, old.config_digest);
    assert_eq!(moved(&next, 2).await??, next.config_digest);
    assert_eq!(gated.told(&old.by_tag()).await?.context("absent")?.id, next.config_digest);
    Ok(())
}
