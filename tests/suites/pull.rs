//! The gate on `PullImage`: what is signed reaches containerd, what is not does not.

use anyhow::{Context, Result};
use pullgate_tests::{
    Fault, Image, KmsKey, Pullgate, Pushed, RegistryOptions, Rule, SigTag, Tamper, Version, World, newest,
    policy,
};
use std::collections::BTreeSet;
use tonic::{Code, Status};

/// A world with one registry, one KMS key, and pullgate that requires it.
struct Gated {
    world: World,
    key: KmsKey,
    pullgate: Pullgate,
}

impl Gated {
    async fn on(version: Version) -> Result<Self> {
        let world = World::on(version).await?;
        let key = world.moto().await?.create_key("ECC_NIST_P256").await?;
        let pullgate = Pullgate::start(&world, &policy::signed(&world.registry, &key.uri())).await?;
        Ok(Self { world, key, pullgate })
    }

    async fn signed(&self, name: &str) -> Result<Pushed> {
        let image = Image::new(name).cmd("echo from a signed image").push(&self.world.registry).await?;
        self.world.cosign().await?.sign(&self.key.cosign_uri(), &image.by_digest()).await?;
        self.world.registry.proxy.forget();
        Ok(image)
    }

    async fn unsigned(&self, name: &str) -> Result<Pushed> {
        Image::new(name).push(&self.world.registry).await
    }

    fn signature(&self, image: &Pushed) -> SigTag {
        SigTag::of(&self.world.registry.oci(), image)
    }

    /// The image is refused with this reason, by a message for the kubelet, a journal entry and
    /// a metric that all say the same, and nothing of it is in containerd.
    async fn refuses(&self, image: &Pushed, reason: &str) -> Result<Status> {
        let before = content(&self.world).await?;
        let status = self.pullgate.cri().pull(&image.by_tag()).await.err().context("it was pulled")?;
        assert_eq!(status.code(), Code::Unknown, "{status:?}");
        let text = status.message();
        assert!(text.starts_with("SignatureValidationFailed: image "), "{text}");
        for part in
            [&image.by_tag(), &image.digest, &format!(": {reason}: "), "expected ", "found: ", "remedy: "]
        {
            assert!(text.contains(part), "`{part}` is not in: {text}");
        }
        assert!(!text.contains('\n'), "{text}");
        // containerd's own collector may have taken something away meanwhile.
        let added: Vec<_> = content(&self.world).await?.difference(&before).cloned().collect();
        assert!(added.is_empty(), "something of it reached containerd: {added:?}");
        let entry = self
            .pullgate
            .audited(|e| e["PULLGATE_DIGEST"] == *image.digest && e["PULLGATE_METHOD"] == "PullImage");
        let entry = entry.await?;
        assert_eq!(entry["PULLGATE_DECISION"], "deny");
        assert_eq!(entry["PULLGATE_REASON"], reason);
        let labels = ["decision=\"deny\"", &format!("reason=\"{reason}\"")];
        assert!(self.pullgate.metric("pullgate_decisions_total", &labels).await? >= 1.0);
        Ok(status)
    }
}

/// Everything in containerd's content store, as `ctr` lists it.
async fn content(world: &World) -> Result<BTreeSet<String>> {
    let listed = world.containerd.ctr(&["content", "ls", "-q"]).await?.stdout;
    Ok(listed.lines().map(str::to_owned).collect())
}

async fn a_signed_image_is_pulled_and_runs(version: Version) -> Result<()> {
    let gated = Gated::on(version).await?;
    let image = gated.signed("app").await?;
    let cri = gated.pullgate.cri();
    let id = cri.pull(&image.by_tag()).await?;
    assert_eq!(id, image.config_digest, "image_ref is the image's id");

    // As after a pull without pullgate: by tag, by digest, by id.
    for name in [&image.by_tag(), &image.by_digest(), &id] {
        let status = cri.image_status(name).await?.with_context(|| format!("{name} is absent"))?;
        assert_eq!(status.id, id);
        assert_eq!(status.repo_tags, [image.by_tag()]);
        assert_eq!(status.repo_digests, [image.by_digest()]);
    }
    assert!(cri.list_images().await?.iter().any(|listed| listed.repo_tags == [image.by_tag()]));
    assert_eq!(cri.run_container(&image.by_tag()).await?, "from a signed image\n");

    let entry = gated.pullgate.audited(|e| e["PULLGATE_DIGEST"] == *image.digest).await?;
    assert_eq!(entry["PULLGATE_DECISION"], "allow");
    assert_eq!(entry["PULLGATE_REASON"], "signed");
    assert_eq!(entry["PULLGATE_KEY_ID"], *gated.key.uri());

    // Image GC removes by id, and everything is gone.
    cri.remove_image(&id).await?;
    assert!(cri.image_status(&image.by_tag()).await?.is_none());
    assert!(cri.list_images().await?.iter().all(|listed| listed.id != id));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signed_image_is_pulled_and_runs_on_1_6() -> Result<()> {
    a_signed_image_is_pulled_and_runs(Version::V16).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signed_image_is_pulled_and_runs_on_2_1() -> Result<()> {
    a_signed_image_is_pulled_and_runs(newest!()).await
}

async fn bad_signatures_are_refused(version: Version) -> Result<()> {
    let gated = Gated::on(version).await?;
    let cosign = gated.world.cosign().await?;

    let status = gated.refuses(&gated.unsigned("unsigned").await?, "unsigned").await?;
    assert!(status.message().contains("cosign sign --key awskms:///"), "{}", status.message());

    let stranger = cosign.generate_key("stranger").await?;
    let image = gated.unsigned("by-a-stranger").await?;
    cosign.sign(&stranger.key(), &image.by_digest()).await?;
    gated.refuses(&image, "invalid-signature").await?;

    let (signed, copy) = (gated.signed("original").await?, gated.unsigned("copy").await?);
    gated.signature(&signed).copy_to(&gated.signature(&copy)).await?;
    let status = gated.refuses(&copy, "invalid-signature").await?;
    assert!(status.message().contains("for another image"), "{}", status.message());

    let spoils = [
        (Tamper::PayloadDigest(signed.digest.clone()), "invalid-signature"),
        (Tamper::SignatureBit, "invalid-signature"),
        (Tamper::NoLayers, "unsigned"),
        (Tamper::NoSignature, "malformed-evidence"),
        (Tamper::NotBase64, "malformed-evidence"),
        (Tamper::NotJson, "invalid-signature"),
        (Tamper::WrongSize, "malformed-evidence"),
        (Tamper::ManyLayers(1000), "evidence-too-large"),
    ];
    for (number, (spoil, reason)) in spoils.into_iter().enumerate() {
        let image = gated.signed(&format!("spoiled-{number}")).await?;
        gated.signature(&image).tamper(spoil.clone()).await?;
        gated.refuses(&image, reason).await.with_context(|| format!("{spoil:?}"))?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_signatures_are_refused_each_with_its_reason_on_1_6() -> Result<()> {
    bad_signatures_are_refused(Version::V16).await
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_signatures_are_refused_each_with_its_reason_on_2_1() -> Result<()> {
    bad_signatures_are_refused(newest!()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn one_good_signature_among_bad_ones_is_enough() -> Result<()> {
    let gated = Gated::on(Version::V16).await?;
    let cosign = gated.world.cosign().await?;
    let stranger = cosign.generate_key("stranger").await?;
    let image = gated.unsigned("app").await?;
    cosign.sign(&stranger.key(), &image.by_digest()).await?;
    cosign.sign(&gated.key.cosign_uri(), &image.by_digest()).await?;
    gated.pullgate.cri().pull(&image.by_tag()).await?;
    Ok(())
}

/// The same cause has the same text every time, or the kubelet no longer shows the reason.
#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_repeats_itself_word_for_word() -> Result<()> {
    let gated = Gated::on(Version::V16).await?;
    let image = gated.unsigned("app").await?;
    let first = gated.refuses(&image, "unsigned").await?;
    let second = gated.refuses(&image, "unsigned").await?;
    gated.pullgate.restart().await?;
    let third = gated.refuses(&image, "unsigned").await?;
    assert_eq!(first.message(), second.message());
    assert_eq!(first.message(), third.message());
    Ok(())
}

/// The source document's matrix: two CI systems, each with a registry and an RSA-2048 key.
#[tokio::test(flavor = "multi_thread")]
async fn the_matrix_of_two_ci_systems() -> Result<()> {
    let world = World::start().await?;
    let other = world.registry(RegistryOptions::default()).await?;
    let moto = world.moto().await?;
    let ours = moto.create_key("RSA_2048").await?;
    let theirs = moto.create_key_in("us-east-1", "RSA_2048", true).await?;
    let replica = moto.replicate_key(&theirs, "eu-west-1").await?;
    let required = "annotations: {build.system: approved-ci}";
    let rules = policy::rules(&[
        policy::rule(&world.registry, &ours.uri(), required),
        policy::rule(&other, &replica.uri(), required),
    ]);
    let pullgate = Pullgate::start(&world, &rules).await?;
    let cosign = world.cosign().await?;
    let approved = [("build.system", "approved-ci")];

    let good = Image::new("good").push(&world.registry).await?;
    cosign.sign_annotated(&ours.cosign_uri(), &good.by_digest(), &approved).await?;
    pullgate.cri().pull(&good.by_tag()).await.context("right key, right annotations")?;
    let entry = pullgate.audited(|e| e["PULLGATE_DIGEST"] == *good.digest).await?;
    assert_eq!(entry["PULLGATE_ANNOTATIONS"], r#"{"build.system":"approved-ci"}"#);

    let wrong_key = Image::new("wrong-key").push(&world.registry).await?;
    cosign.sign_annotated(&theirs.cosign_uri(), &wrong_key.by_digest(), &approved).await?;
    let wrong_build = Image::new("wrong-build").push(&world.registry).await?;
    cosign
        .sign_annotated(&ours.cosign_uri(), &wrong_build.by_digest(), &[("build.system", "laptop")])
        .await?;
    let unsigned = Image::new("unsigned").push(&world.registry).await?;
    for (image, reason) in
        [(wrong_key, "invalid-signature"), (wrong_build, "annotation-mismatch"), (unsigned, "unsigned")]
    {
        let status = pullgate.cri().pull(&image.by_tag()).await.err().context(reason)?;
        assert!(status.message().contains(&format!(": {reason}: ")), "{status}");
    }

    // The rule names the replica in another Region; the primary signed.
    let replicated = Image::new("replicated").push(&other).await?;
    cosign.sign_annotated(&theirs.cosign_uri(), &replicated.by_digest(), &approved).await?;
    pullgate.cri().pull(&replicated.by_tag()).await.context("multi-Region replica")?;

    let metrics = pullgate.metrics().await?;
    for line in [
        "pullgate_decisions_total{decision=\"allow\",reason=\"signed\"",
        "pullgate_decisions_total{decision=\"deny\",reason=\"annotation-mismatch\"",
        "pullgate_cache_requests_total{outcome=\"miss\",tier=\"disk\"}",
        "pullgate_cache_requests_total{outcome=\"hit\",tier=\"key\"}",
        "pullgate_cache_requests_total{outcome=\"miss\",tier=\"key\"}",
        "pullgate_kms_requests_total{operation=\"GetPublicKey\",outcome=\"ok\"}",
    ] {
        assert!(metrics.contains(line), "no {line} in:\n{metrics}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn annotations_may_be_lists_and_globs() -> Result<()> {
    let world = World::start().await?;
    let cosign = world.cosign().await?;
    let key = cosign.generate_key("ci").await?;
    let required = "annotations: {BRANCH: [main, \"release-*\"]}";
    let rules = policy::rules(&[policy::rule(&world.registry, &key.uri(), required)]);
    let pullgate = Pullgate::start(&world, &rules).await?;
    for (branch, allowed) in [("main", true), ("release-7", true), ("feature", false), ("xrelease-7", false)]
    {
        let image = Image::new(&format!("b-{branch}")).push(&world.registry).await?;
        cosign.sign_annotated(&key.key(), &image.by_digest(), &[("BRANCH", branch)]).await?;
        assert_eq!(pullgate.cri().pull(&image.by_tag()).await.is_ok(), allowed, "{branch}");
    }
    Ok(())
}

/// Kyverno CVE-2022-47633, CVE-2023-47630: the registry answers the same tag differently.
async fn what_lands_is_what_was_proved(version: Version) -> Result<()> {
    let gated = Gated::on(version).await?;
    let image = gated.signed("app").await?;
    let evil = Image::new("app").tag("evil").push(&gated.world.registry).await?;
    let oci = gated.world.registry.oci();
    let evil_manifest = oci.manifest("app", &evil.digest).await?;

    // Whoever asks for the tag a second time is given other bytes.
    let tag = format!("/v2/app/manifests/{}", image.tag);
    let lie = Fault::answer(&evil_manifest.media_type, evil_manifest.bytes.clone());
    gated.world.registry.proxy.inject(Rule::on(&tag, lie).skip(1));
    let id = gated.pullgate.cri().pull(&image.by_tag()).await?;
    assert_eq!(id, image.config_digest);
    let status = gated.pullgate.cri().image_status(&image.by_tag()).await?.context("absent")?;
    assert_eq!(status.id, image.config_digest);

    // The tag moves for good: the next pull is about the other image, and refused.
    gated.world.registry.proxy.heal();
    oci.retag("app", "evil", &image.tag).await?;
    let status = gated.pullgate.cri().pull(&image.by_tag()).await.err().context("it was pulled")?;
    assert!(status.message().contains(&evil.digest), "{status}");
    assert!(gated.pullgate.cri().list_images().await?.iter().all(|listed| listed.id != evil.config_digest));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn cve_2022_47633_what_lands_is_what_was_proved_on_1_6() -> Result<()> {
    what_lands_is_what_was_proved(Version::V16).await
}

#[tokio::test(flavor = "multi_thread")]
async fn cve_2022_47633_what_lands_is_what_was_proved_on_2_1() -> Result<()> {
    what_lands_is_what_was_proved(newest!()).await
}

/// Requests counted at the registry and at KMS say what was remembered.
#[tokio::test(flavor = "multi_thread")]
async fn the_second_pull_costs_no_verification_and_a_restart_forgets_nothing() -> Result<()> {
    let gated = Gated::on(Version::V16).await?;
    let moto = gated.world.moto().await?;
    let image = gated.signed("app").await?;
    let proxy = &gated.world.registry.proxy;
    let signatures = format!("/v2/app/manifests/{}", image.cosign_tag(".sig"));
    let kms = || moto.proxy.count_header("x-amz-target", "TrentService.GetPublicKey");

    let (before, cri) = (kms(), gated.pullgate.cri());
    cri.pull(&image.by_tag()).await?;
    assert_eq!((proxy.count("GET", &signatures), kms() - before), (1, 1), "cold");
    cri.pull(&image.by_tag()).await?;
    assert_eq!((proxy.count("GET", &signatures), kms() - before), (1, 1), "warm");
    gated.pullgate.restart().await?;
    cri.pull(&image.by_tag()).await?;
    assert_eq!((proxy.count("GET", &signatures), kms() - before), (1, 1), "after a restart");
    gated.signature(&image).remove().await?;
    cri.pull(&image.by_tag()).await?;
    assert_eq!((proxy.count("GET", &signatures), kms() - before), (1, 1), "the signature is gone");

    let hits =
        gated.pullgate.metric("pullgate_cache_requests_total", &["tier=\"disk\"", "outcome=\"hit\""]).await?;
    assert_eq!(hits, 1.0, "the first ask after the restart");
    let decisions: Vec<_> = gated.pullgate.audit().iter().map(|e| e["PULLGATE_CACHE"].clone()).collect();
    assert_eq!(decisions, ["miss", "memory", "disk", "memory"], "one journal entry a decision");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn verdicts_outlive_a_reload_only_where_the_rule_does() -> Result<()> {
    let gated = Gated::on(Version::V16).await?;
    let image = gated.signed("app").await?;
    let signatures = format!("/v2/app/manifests/{}", image.cosign_tag(".sig"));
    let fetched = || gated.world.registry.proxy.count("GET", &signatures);
    let mine = |more: &str| policy::rule(&gated.world.registry, &gated.key.uri(), more);
    let cri = gated.pullgate.cri();
    let reload = async |rules: &[String]| {
        let before = gated.pullgate.metric("pullgate_config_reloads_total", &["outcome=\"ok\""]).await?;
        gated.pullgate.reconfigure(&gated.world, &policy::rules(rules))?;
        pullgate_tests::wait::until("the reload", std::time::Duration::from_secs(10), async || {
            let now = gated.pullgate.metric("pullgate_config_reloads_total", &["outcome=\"ok\""]).await?;
            Ok((now > before).then_some(()))
        })
        .await
    };
    cri.pull(&image.by_tag()).await?;
    assert_eq!(fetched(), 1);

    let unrelated = "{imageGlob: \"docker.io/**\", strategy: deny}".to_owned();
    reload(&[unrelated.clone(), mine("name: renamed")]).await?;
    cri.pull(&image.by_tag()).await?;
    assert_eq!(fetched(), 1, "an unrelated rule and a new name change nothing");

    reload(&[unrelated, mine("annotations: {a: b}")]).await?;
    let status = cri.pull(&image.by_tag()).await.err().context("it was pulled")?;
    assert!(status.message().contains("annotation-mismatch"), "{status}");
    assert_eq!(fetched(), 2, "a changed rule meets no old verdict");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn rules_that_allow_and_deny_cost_no_network_call() -> Result<()> {
    let world = World::start().await?;
    let host = world.registry.host().to_owned();
    let rules = policy::rules(&[
        format!("{{imageGlob: \"{host}/bad/**\", strategy: deny}}"),
        format!("{{imageGlob: \"{host}/good/**\", strategy: allow}}"),
    ]);
    let pullgate = Pullgate::start(&world, &rules).await?;
    let bad = Image::new("bad/app").push(&world.registry).await?;
    let good = Image::new("good/app").cmd("echo allowed").push(&world.registry).await?;
    let other = Image::new("other/app").push(&world.registry).await?;
    world.registry.proxy.forget();
    for (image, reason) in [(bad, "deny-rule"), (other, "no-rule")] {
        let status = pullgate.cri().pull(&image.by_tag()).await.err().context(reason)?;
        assert!(status.message().contains(&format!(": {reason}: ")), "{status}");
    }
    assert_eq!(world.registry.proxy.requests().len(), 0);
    pullgate.cri().pull(&good.by_tag()).await?;
    assert_eq!(pullgate.cri().run_container(&good.by_tag()).await?, "allowed\n");
    assert_eq!(world.registry.proxy.count("GET", "/v2/good/app/manifests/*.sig"), 0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_multi_platform_image_is_proved_by_its_index() -> Result<()> {
    let gated = Gated::on(Version::V16).await?;
    let pushed = Image::new("multi").push_index(&gated.world.registry).await?;
    gated.world.cosign().await?.sign(&gated.key.cosign_uri(), &pushed.index.by_digest()).await?;
    let id = gated.pullgate.cri().pull(&pushed.index.by_tag()).await?;
    let status = gated.pullgate.cri().image_status(&pushed.index.by_tag()).await?.context("absent")?;
    assert_eq!(status.id, id);
    assert!(gated.pullgate.cri().image_status(&id).await?.is_some(), "by id");
    Ok(())
}

/// Only what was signed counts: whoever can push can annotate manifests and layers.
#[tokio::test(flavor = "multi_thread")]
async fn annotations_that_the_registry_serves_count_for_nothing() -> Result<()> {
    let gated = Gated::on(Version::V16).await?;
    let required =
        policy::rule(&gated.world.registry, &gated.key.uri(), "annotations: {build.system: approved-ci}");
    gated.pullgate.reconfigure(&gated.world, &policy::rules(&[required]))?;
    gated.pullgate.admin(&["reload"]).await?.ok()?;
    let image = gated.signed("app").await?;
    gated
        .signature(&image)
        .edit(|manifest| {
            manifest["annotations"]["build.system"] = "approved-ci".into();
            manifest["layers"][0]["annotations"]["build.system"] = "approved-ci".into();
        })
        .await?;
    gated.refuses(&image, "annotation-mismatch").await?;
    Ok(())
}

/// security-lessons: an attestation by the same signer used as if it were the image signature. The
/// signature over it is good: what stops it is what was signed.
#[tokio::test(flavor = "multi_thread")]
async fn an_attestation_by_the_same_key_is_no_image_signature() -> Result<()> {
    let gated = Gated::on(Version::V16).await?;
    let image = gated.unsigned("app").await?;
    let statement = serde_json::json!({
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": image.name(), "digest": {"sha256": image.digest.trim_start_matches("sha256:")}}],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {},
    })
    .to_string();
    let kind = "application/vnd.in-toto+json";
    // DSSE's pre-authentication encoding: the bytes that are signed for an attestation.
    let pae = format!("DSSEv1 {} {kind} {} {statement}", kind.len(), statement.len());
    let moto = gated.world.moto().await?;
    for signed in [pae, statement] {
        let signature = moto.sign(&gated.key, "ECDSA_SHA_256", signed.as_bytes()).await?;
        gated.signature(&image).make(signed.as_bytes(), &signature).await?;
        gated.refuses(&image, "malformed-evidence").await?;
        gated.pullgate.admin(&["cache", "purge", "--all"]).await?.ok()?;
    }
    Ok(())
}
