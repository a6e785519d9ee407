//! `make demo`: the main job, on real parts, told on the screen.

use std::sync::atomic::Ordering;

use anyhow::{Context, Result, ensure};
use pullgate_tests::{Image, Pullgate, Pushed, SigTag, Tamper, Version, World, policy, process};

fn step(text: &str) {
    println!("\n\x1b[1m== {text}\x1b[0m");
}

fn told(command: &str, outcome: &str) {
    println!("   $ {command}\n     {outcome}");
}

#[tokio::main]
async fn main() -> Result<()> {
    let version = Version::newest()?.unwrap_or_default();
    step(&format!("A real containerd ({version:?}), a real registry, an AWS-compatible KMS"));
    let world = World::on(version).await?;
    let moto = world.moto().await?;
    let key = moto.create_key("ECC_NIST_P256").await?;
    println!("   containerd {}", world.containerd.socket().display());
    println!("   registry   {}", world.registry.host());
    println!("   KMS key    {}", key.arn);

    step("pullgate on the CRI image socket, with one rule");
    let policy = policy::signed(&world.registry, &key.uri());
    print!("{policy}");
    let pullgate = Pullgate::start(&world, &policy).await?;
    println!("   listening on {}", pullgate.socket().display());

    step("An image that the KMS key signed is pulled, and its container runs");
    let cosign = world.cosign().await?;
    let signed = Image::new("signed").cmd("echo hello from a proved image").push(&world.registry).await?;
    cosign.sign(&key.cosign_uri(), &signed.by_digest()).await?;
    world.registry.proxy.forget();
    pulls(&pullgate, &signed).await?;
    let printed = pullgate.cri().run_container(&signed.by_tag()).await?;
    told("crictl run", printed.trim());

    step("An unsigned, a tampered and a stranger-signed image are refused");
    let unsigned = Image::new("unsigned").push(&world.registry).await?;
    refuses(&pullgate, &unsigned, "unsigned").await?;
    let tampered = Image::new("tampered").push(&world.registry).await?;
    cosign.sign(&key.cosign_uri(), &tampered.by_digest()).await?;
    let signature = SigTag::of(&world.registry.oci(), &tampered);
    signature.tamper(Tamper::PayloadDigest(signed.digest.clone())).await?;
    refuses(&pullgate, &tampered, "invalid-signature").await?;
    let stranger = cosign.generate_key("stranger").await?;
    let strange = Image::new("stranger").push(&world.registry).await?;
    cosign.sign(&stranger.key(), &strange.by_digest()).await?;
    refuses(&pullgate, &strange, "invalid-signature").await?;

    step("The second pull costs no verification, and a restart forgets nothing");
    let signatures = format!("/v2/signed/manifests/{}", signed.cosign_tag(".sig"));
    let fetched = world.registry.proxy.count("GET", &signatures);
    pulls(&pullgate, &signed).await?;
    // The log of the process that this ends is not of interest.
    process::ALL_WENT_WELL.store(true, Ordering::Relaxed);
    pullgate.restart().await?;
    process::ALL_WENT_WELL.store(false, Ordering::Relaxed);
    pulls(&pullgate, &signed).await?;
    let again = world.registry.proxy.count("GET", &signatures) - fetched;
    println!("   signature requests at the registry: {fetched} for the first pull, {again} since");
    ensure!(fetched == 1 && again == 0, "a verification was repeated");

    step("The journal has one entry for each decision (here as JSON lines)");
    let entries = pullgate.audit();
    for entry in &entries {
        let field = |name: &str| entry[name].as_str().unwrap_or("-").to_owned();
        println!(
            "   {:<6} {:<18} {:<7} {}",
            field("PULLGATE_DECISION"),
            field("PULLGATE_REASON"),
            field("PULLGATE_CACHE"),
            field("PULLGATE_IMAGE"),
        );
    }
    let pulls = entries.iter().filter(|entry| entry["PULLGATE_METHOD"] == "PullImage").count();
    ensure!(pulls == 6, "6 pulls were decided, the journal has {pulls}");
    step("Done: signed images run, nothing else reached containerd");
    process::ALL_WENT_WELL.store(true, Ordering::Relaxed);
    Ok(())
}

async fn pulls(pullgate: &Pullgate, image: &Pushed) -> Result<()> {
    let started = std::time::Instant::now();
    let id = pullgate.cri().pull(&image.by_tag()).await.context("a signed image was refused")?;
    let took = started.elapsed().as_millis();
    told(&format!("crictl pull {}", image.by_tag()), &format!("pulled {id} in {took} ms"));
    Ok(())
}

async fn refuses(pullgate: &Pullgate, image: &Pushed, reason: &str) -> Result<()> {
    let refused = pullgate.cri().pull(&image.by_tag()).await.err().context("it was pulled")?;
    told(&format!("crictl pull {}", image.by_tag()), refused.message());
    ensure!(refused.message().contains(&format!(": {reason}: ")), "expected the reason {reason}");
    Ok(())
}
