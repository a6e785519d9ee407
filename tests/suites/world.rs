//! The world itself, without pullgate: if these fail, look at the parts and not at the daemon.

use anyhow::{Context, Result};
use pullgate_tests::world::WorldOptions;
use pullgate_tests::{
    Cosign, Fault, Gate, Image, PullOptions, RegistryOptions, Rule, SigTag, Tamper, Version, World, need,
};
use std::time::Duration;

async fn pulls_and_runs(version: Version) -> Result<()> {
    let world = World::on(version).await?;
    let image = Image::new("app").cmd("echo from $GREETER").env("GREETER", "busybox");
    let image = image.push(&world.registry).await?;
    let cri = world.cri()?;
    assert_eq!(cri.run_container(&image.by_tag()).await?, "from busybox\n");

    let status = cri.image_status(&image.by_tag()).await?.context("absent")?;
    assert_eq!(status.id, image.config_digest);
    assert!(world.registry.proxy.count("GET", "/v2/app/blobs/*") >= 1);
    cri.remove_image(&image.config_digest).await?;
    assert!(cri.image_status(&image.by_tag()).await?.is_none());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn containerd_1_6_pulls_and_runs() -> Result<()> {
    pulls_and_runs(Version::V16).await
}

#[tokio::test(flavor = "multi_thread")]
async fn containerd_1_7_pulls_and_runs() -> Result<()> {
    need!("containerd17");
    pulls_and_runs(Version::V17).await
}

#[tokio::test(flavor = "multi_thread")]
async fn containerd_2_1_pulls_and_runs() -> Result<()> {
    need!("containerd21");
    pulls_and_runs(Version::V21).await
}

/// Signs with a file key and with a key in KMS, and lets cosign itself verify.
async fn signs_and_verifies(world: &World, cosign: &Cosign) -> Result<()> {
    let pair = cosign.generate_key("file").await?;
    let image = Image::new("by-file").push(&world.registry).await?;
    let annotations = [("build.system", "approved-ci")];
    cosign.sign_annotated(&pair.key(), &image.by_digest(), &annotations).await?;
    let public = pair.public.display().to_string();
    cosign.verify(&public, &image.by_digest()).await?;

    let moto = world.moto().await?;
    let key = moto.create_key("ECC_NIST_P256").await?;
    let image = Image::new("by-kms").push(&world.registry).await?;
    cosign.sign(&key.cosign_uri(), &image.by_digest()).await?;
    cosign.verify(&key.cosign_uri(), &image.by_digest()).await?;
    assert!(moto.proxy.count_header("x-amz-target", "TrentService.Sign") >= 1);

    let other = Image::new("unsigned").push(&world.registry).await?;
    let refused = cosign.verify(&public, &other.by_digest()).await;
    assert!(refused.is_err(), "an unsigned image was verified");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn cosign_2_signs_with_files_and_kms() -> Result<()> {
    let world = World::start().await?;
    world.moto().await?;
    signs_and_verifies(&world, &world.cosign().await?).await
}

#[tokio::test(flavor = "multi_thread")]
async fn cosign_3_signs_with_files_and_kms() -> Result<()> {
    need!("cosign3");
    let world = World::start().await?;
    world.moto().await?;
    signs_and_verifies(&world, &world.cosign3().await?).await
}

#[tokio::test(flavor = "multi_thread")]
async fn cosign_3_signs_into_a_registry_with_referrers() -> Result<()> {
    need!("cosign3");
    let options = RegistryOptions { referrers: Some(1), ..Default::default() };
    let world = World::with(WorldOptions { registry: options, ..Default::default() }).await?;
    let cosign = world.cosign3().await?;
    let key = cosign.generate_key("k").await?;
    let image = Image::new("app").push(&world.registry).await?;
    cosign.sign(&key.key(), &image.by_digest()).await?;
    cosign.sign(&key.key(), &image.by_digest()).await?;
    let registry = world.registry.proxy.address();
    let first = format!("/v2/app/referrers/{}", image.digest);
    let first = pullgate_tests::http::get(registry, &first).await?;
    let link = first.header("link").context("one page only")?;
    let next = link.trim_start_matches('<').split('>').next().context("no link")?;
    let second = pullgate_tests::http::get(registry, next).await?;
    assert_eq!(second.header("link"), None);
    for page in [first, second] {
        let entries = page.json()?["manifests"].as_array().cloned().context("no list")?;
        assert_eq!(entries.len(), 1);
        assert_eq!(entries[0]["artifactType"], "application/vnd.dev.sigstore.bundle.v0.3+json");
    }
    let public = key.public.display().to_string();
    cosign.verify(&public, &image.by_digest()).await?;
    Ok(())
}

/// Signs with a file key of each algorithm; cosign itself verifies those that it can.
async fn file_keys(world: &World, cosign: &Cosign, good: &[&str], signed: &[&str]) -> Result<()> {
    for algorithm in good.iter().chain(signed) {
        let image = Image::new(algorithm).push(&world.registry).await?;
        let pair = cosign.import_key(algorithm, algorithm).await?;
        cosign.sign(&pair.key(), &image.by_digest()).await?;
        if good.contains(algorithm) {
            let public = pair.public.display().to_string();
            let verified = cosign.verify(&public, &image.by_digest()).await;
            verified.context(algorithm.to_string())?;
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn cosign_2_file_keys() -> Result<()> {
    let world = World::start().await?;
    file_keys(&world, &world.cosign().await?, &["p256", "ed25519"], &[]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn cosign_3_file_keys() -> Result<()> {
    need!("cosign3");
    let world = World::start().await?;
    // 3.1.1 signs with SHA-384, SHA-512 and Ed25519ph, which its own verify does not expect.
    let signed = ["p384", "p521", "ed25519"];
    let good = ["p256", "rsa2048", "rsa3072", "rsa4096"];
    file_keys(&world, &world.cosign3().await?, &good, &signed).await
}

#[tokio::test(flavor = "multi_thread")]
async fn kms_keys_of_every_spec_sign_for_cosign_2() -> Result<()> {
    let world = World::start().await?;
    let moto = world.moto().await?;
    let cosign = world.cosign().await?;
    for spec in pullgate_tests::moto::SPECS {
        let key = moto.create_key(spec).await?;
        let image = Image::new(&spec.to_lowercase()).push(&world.registry).await?;
        cosign.sign(&key.cosign_uri(), &image.by_digest()).await?;
        cosign.verify(&key.cosign_uri(), &image.by_digest()).await.context(spec)?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn tampered_signatures_are_what_cosign_refuses() -> Result<()> {
    let world = World::start().await?;
    let cosign = world.cosign().await?;
    let pair = cosign.generate_key("k").await?;
    let public = pair.public.display().to_string();
    let image = Image::new("app").push(&world.registry).await?;
    let other = Image::new("app").tag("other").push(&world.registry).await?;
    let oci = world.registry.oci();
    let (sig, other_sig) = (SigTag::of(&oci, &image), SigTag::of(&oci, &other));

    cosign.sign(&pair.key(), &image.by_digest()).await?;
    cosign.verify(&public, &image.by_digest()).await?;
    sig.copy_to(&other_sig).await?;
    assert!(cosign.verify(&public, &other.by_digest()).await.is_err());

    let whole = sig.manifest().await?;
    for tamper in [
        Tamper::PayloadDigest(other.digest.clone()),
        Tamper::SignatureBit,
        Tamper::NoLayers,
        Tamper::NoSignature,
        Tamper::NotBase64,
        Tamper::NotJson,
    ] {
        let shown = format!("{tamper:?}");
        sig.tamper(tamper).await?;
        let verified = cosign.verify(&public, &image.by_digest()).await;
        assert!(verified.is_err(), "verified in spite of {shown}");
        sig.put(&whole).await?;
    }
    cosign.verify(&public, &image.by_digest()).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn kms_has_replicas_aliases_and_many_specs() -> Result<()> {
    let world = World::start().await?;
    let moto = world.moto().await?;
    for spec in pullgate_tests::moto::SPECS {
        let key = moto.create_key(spec).await?;
        assert!(moto.public_key(&key).await?.contains("BEGIN PUBLIC KEY"), "{spec}");
    }
    let primary = moto.create_key_in("us-east-1", "ECC_NIST_P256", true).await?;
    let replica = moto.replicate_key(&primary, "eu-west-1").await?;
    assert_eq!(primary.id, replica.id);
    assert!(replica.arn.contains(":eu-west-1:"), "{}", replica.arn);
    assert_eq!(moto.public_key(&primary).await?, moto.public_key(&replica).await?);
    let other = moto.create_key("ECC_NIST_P256").await?;
    let alias = format!("alias/{}", primary.id);
    moto.create_alias(&alias, &primary).await?;
    moto.update_alias(&alias, &other).await?;
    let (user, _) = moto.ecr_login("us-east-1").await?;
    assert_eq!(user, "AWS");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_with_login_and_tls_serves_containerd_and_cosign() -> Result<()> {
    let options = RegistryOptions { login: true, tls: true, referrers: None };
    let world = World::with(WorldOptions { registry: options, ..Default::default() }).await?;
    let image = Image::new("secret").push(&world.registry).await?;
    let cri = world.cri()?;
    assert!(cri.pull(&image.by_tag()).await.is_err(), "pulled without a login");
    let (user, password) = world.registry.login().context("no login")?;
    let login = PullOptions { login: Some((user.to_owned(), password.to_owned())), ..Default::default() };
    assert_eq!(cri.run_pod(&image.by_tag(), &login).await?, "hello\n");
    let cosign = world.cosign().await?;
    let pair = cosign.generate_key("k").await?;
    cosign.sign(&pair.key(), &image.by_digest()).await?;
    assert!(SigTag::of(&world.registry.oci(), &image).exists().await?);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_are_what_they_say() -> Result<()> {
    let world = World::start().await?;
    let image = Image::new("app").push(&world.registry).await?;
    let proxy = &world.registry.proxy;
    let path = format!("/v2/app/manifests/{}", image.tag);
    let get = || pullgate_tests::http::get(proxy.address(), &path);
    let good = get().await?.body;

    proxy.inject(Rule::on("/v2/app/manifests/*", Fault::throttle(3)).times(1));
    let answer = get().await?;
    assert_eq!((answer.status.as_u16(), answer.header("retry-after")), (429, Some("3")));
    assert_eq!(get().await?.body, good, "the fault was to come once");

    proxy.inject(Rule::on("*", Fault::Body(b"other".to_vec())).skip(1));
    assert_eq!(get().await?.body, good, "the second time was to differ");
    assert_eq!(&get().await?.body[..], b"other");
    proxy.heal();

    proxy.inject(Rule::on("*", Fault::Reset));
    let reset = format!("{:?}", get().await.err().context("no reset")?);
    assert!(reset.contains("reset"), "{reset}");
    proxy.heal();

    proxy.inject(Rule::on("*", Fault::ContentLength(1 << 20)));
    assert!(get().await.is_err(), "a body that ends early");
    proxy.heal();

    for fault in [Fault::Hang, Fault::Stall(10), Fault::Endless] {
        proxy.inject(Rule::on("*", fault));
        let never = tokio::time::timeout(Duration::from_millis(200), get()).await;
        assert!(never.is_err(), "an answer came to an end");
        proxy.heal();
    }

    proxy.forget();
    let gate = Gate::new();
    proxy.inject(Rule::on("*", Fault::Hold(gate.clone())).method("GET"));
    let both = async { tokio::try_join!(get(), get()) };
    let (both, arrived) = tokio::join!(both, async {
        gate.arrived(2).await?;
        gate.open();
        anyhow::Ok(())
    });
    both?;
    arrived?;
    assert_eq!((proxy.peak(), proxy.count("GET", &path)), (2, 2));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_and_a_mirror_serve_containerd() -> Result<()> {
    let world = World::start().await?;
    let cri = world.cri()?;
    let index = Image::new("many").push_index(&world.registry).await?;
    assert_eq!(cri.pull(&index.index.by_tag()).await?, index.index.config_digest);

    world.containerd.mirror("registry.example.com", &world.registry)?;
    let oci = world.registry.oci();
    let image = Image::new("mirrored").push_as(&oci, "registry.example.com").await?;
    assert_eq!(cri.run_container(&image.by_tag()).await?, "hello\n");

    world.containerd.restart().await?;
    assert_eq!(cri.run_container(&image.by_tag()).await?, "hello\n");
    let pushed = Image::new("crowd").push_many(&world.registry, 20).await?;
    assert_eq!(pushed.len(), 20);
    Ok(())
}
