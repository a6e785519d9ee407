//! Images that nobody has asked for yet.

use crate::raw::Http;
use crate::sample::{Plan, Samples, median, ratio};
use crate::signer::Signer;
use crate::table::Row;
use anyhow::{Context, Result, ensure};
use pullgate_tests::{Cosign, Cri, Fault, Pullgate, Pushed, Rule, Version, World, parts};
use std::collections::HashMap;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

/// Bytes of an image's own layer, beside the busybox that all share.
const LAYER: usize = 512 << 10;
/// What one round trip to the registry costs in the measurement of round trips.
const ROUND_TRIP: Duration = Duration::from_millis(50);

/// Cold verifications, cold pulls, and a hundred pulls at once.
pub async fn measure(quick: bool) -> Result<Vec<Row>> {
    let world = World::on(Version::V21).await?;
    let signer = Signer::new(&world)?;
    let pullgate = Pullgate::start(&world, &signer.policy(&world)).await?;
    let mut rows = verification(&world, &signer, &pullgate, if quick { 20 } else { 120 }).await?;
    rows.push(pull(&world, &signer, &pullgate, if quick { 5 } else { 15 }).await?);
    rows.push(round_trips(&world, &signer, &pullgate).await?);
    rows.push(many(&world, &signer, &pullgate, if quick { 3 } else { 9 }).await?);
    Ok(rows)
}

/// The daemon's own time for cold verdicts, by its audit entries, in turns with a bare client and
/// with cosign, each on images of its own.
async fn verification(world: &World, signer: &Signer, pullgate: &Pullgate, count: usize) -> Result<Vec<Row>> {
    const WARM_UP: usize = 10;
    let cosigns = [world.cosign().await?, world.cosign3().await?];
    let ours = signer.images("gate", count + WARM_UP, 0).await?;
    let bare = signer.images("bare", count + WARM_UP, 0).await?;
    let judged = signer.images("cosign", 2 * count / 6, 0).await?;
    let mut http = Http::connect(signer.registry()).await?;
    let (mut fetched, mut verified) = (Vec::new(), [Vec::new(), Vec::new()]);
    for (number, (gated, other)) in ours.iter().zip(&bare).enumerate() {
        pullgate.cri().pull(&gated.by_tag()).await?;
        let begin = Instant::now();
        http.fetch_evidence(other).await?;
        fetched.push(begin.elapsed());
        let turn = number.checked_sub(WARM_UP).filter(|number| number % 6 == 0);
        if let Some(turn) = turn.map(|number| number / 6 * 2) {
            for ((cosign, image), times) in cosigns.iter().zip(&judged[turn..]).zip(&mut verified) {
                times.push(cosign_verify(cosign, signer, image).await?);
            }
        }
    }
    let ours = median(durations(pullgate, &ours[WARM_UP..])?);
    let fetched = median(fetched.split_off(WARM_UP));
    let figure = "cold verification in the daemon, by key, p50";
    let mut rows = vec![Row::against(
        figure,
        ours,
        "bare HTTP client, 3 requests, verifies nothing",
        fetched,
        ratio(ours, fetched),
        1.5,
    )];
    for (times, peer) in
        verified.into_iter().zip(["cosign 2 verify, a process", "cosign 3 verify, a process"])
    {
        let theirs = median(times);
        rows.push(Row::against(figure, ours, peer, theirs, ratio(ours, theirs), 0.2));
    }
    Ok(rows)
}

async fn cosign_verify(cosign: &Cosign, signer: &Signer, image: &Pushed) -> Result<Duration> {
    let begin = Instant::now();
    cosign.verify(&signer.public(), &image.by_digest()).await?;
    Ok(begin.elapsed())
}

/// What the audit says about the pulls of these images: each was a verdict of its own.
fn durations(pullgate: &Pullgate, images: &[Pushed]) -> Result<Vec<Duration>> {
    let entries = pullgate.audit();
    let pulls = entries
        .iter()
        .filter(|entry| entry["PULLGATE_METHOD"] == "PullImage" && entry["PULLGATE_CACHE"] == "miss");
    let micros: HashMap<&str, u64> = pulls
        .filter_map(|entry| {
            Some((entry["PULLGATE_IMAGE"].as_str()?, entry["PULLGATE_DURATION_US"].as_u64()?))
        })
        .collect();
    let of = |image: &Pushed| micros.get(&*image.by_tag()).copied().map(Duration::from_micros);
    images.iter().map(|image| of(image).context("a pull that was no cold one")).collect()
}

/// A whole pull of a signed image through the gate, against a containerd with a verifier plugin
/// that has cosign look at each image, from the same registry.
async fn pull(world: &World, signer: &Signer, pullgate: &Pullgate, count: usize) -> Result<Row> {
    let other = World::on(Version::V21).await?;
    signer.trusted_by(&other.containerd)?;
    let verifier = other.containerd.verifiers().join("cosign");
    std::fs::write(&verifier, verifier_script(signer, &other)?)?;
    std::fs::set_permissions(&verifier, std::fs::Permissions::from_mode(0o755))?;
    // It must be in force, or a plain pull would be measured.
    let unsigned = pullgate_tests::Image::new("unsigned")
        .push_as(&world.registry.oci(), &signer.registry().to_string())
        .await?;
    ensure!(
        other.cri()?.pull(&unsigned.by_tag()).await.is_err(),
        "the verifier plugin lets an unsigned image in"
    );

    let plan = Plan { blocks: 1, rounds: count + 2 };
    let ours = signer.images("whole-gate", plan.rounds, LAYER).await?;
    let theirs = signer.images("whole-plugin", plan.rounds, LAYER).await?;
    let mut arms = [(pullgate.cri().clone(), ours), (other.cri()?, theirs)];
    let samples = Samples::take(plan, &mut arms, async |arm: &mut (Cri, Vec<Pushed>), number| {
        Ok(arm.0.pull(&arm.1[number].by_tag()).await.map(drop)?)
    });
    let samples = samples.await?;
    Ok(Row::faster_than(
        "whole pull of a small signed image, cold, p50",
        samples.quantile(0, 0.5),
        "containerd 2.1 with cosign 2 as verifier plugin",
        samples.quantile(1, 0.5),
        samples.ratio(0, 1, 0.5),
    ))
}

fn verifier_script(signer: &Signer, world: &World) -> Result<String> {
    Ok(format!(
        "#!/bin/sh\nwhile [ $# -gt 0 ]; do case $1 in -name) name=$2; shift;; -digest) digest=$2; shift;; esac; shift; done\n\
         HOME={home} exec {cosign} verify --insecure-ignore-tlog=true --key {key} \"${{name%:*}}@$digest\" >/dev/null\n",
        home = world.folder("home")?.display(),
        cosign = parts::path("cosign2")?.display(),
        key = signer.public(),
    ))
}

/// How often a cold verification waits for the registry, when a wait is all that counts.
async fn round_trips(world: &World, signer: &Signer, pullgate: &Pullgate) -> Result<Row> {
    let host = world.registry.host();
    // Connections are warm after these, both of those that are used at once.
    for image in signer.images_at(host, "near", 3, 0).await? {
        pullgate.cri().pull(&image.by_tag()).await?;
    }
    world.registry.proxy.inject(Rule::on("*", Fault::Delay(ROUND_TRIP)));
    let far = signer.images_at(host, "far", 15, 0).await?;
    for image in &far {
        pullgate.cri().pull(&image.by_tag()).await?;
    }
    world.registry.proxy.heal();
    // What is above the fastest is the machine's doing: round trips are a matter of order.
    let took = durations(pullgate, &far)?.into_iter().min().context("no pull")?;
    let trips = ratio(took, ROUND_TRIP);
    let floor = format!("{} ms of waiting for 3 dependent answers", 3 * ROUND_TRIP.as_millis());
    let figure = format!(
        "round trips in turn of a cold verification, registry 50 ms away ({} ms, {trips:.2}, rounded)",
        took.as_millis()
    );
    let row = Row::alone(&figure, trips.round(), "", 3.0);
    Ok(row.above(floor, trips / 3.0))
}

/// A hundred pulls of thirty images at once: all cold, through the gate and directly.
async fn many(world: &World, signer: &Signer, pullgate: &Pullgate, rounds: usize) -> Result<Row> {
    const IMAGES: usize = 30;
    const PULLS: usize = 100;
    let mut images = Vec::new();
    for name in ["many-gate", "many-direct"] {
        images.push(signer.images(name, IMAGES * (rounds + 1), LAYER).await?);
    }
    let theirs = images.pop().unwrap_or_default();
    let ours = images.pop().unwrap_or_default();
    let mut arms = [(pullgate.cri().clone(), ours), (world.cri()?, theirs)];
    let at_once = async |arm: &mut (Cri, Vec<Pushed>), round: usize| {
        let round = &arm.1[round * IMAGES..][..IMAGES];
        let pulls = (0..PULLS).map(|pull| {
            let (cri, image) = (arm.0.clone(), round[pull % IMAGES].by_tag());
            async move { cri.pull(&image).await }
        });
        futures_util::future::try_join_all(pulls).await?;
        Ok(())
    };
    // The first round warms up; then every round is a block.
    for arm in &mut arms {
        at_once(arm, rounds).await?;
    }
    let samples = Samples::take(Plan { blocks: rounds, rounds: 1 }, &mut arms, at_once).await?;
    Ok(Row::against(
        "100 pulls of 30 images at once, cold, wall time",
        samples.quantile(0, 0.5),
        "containerd directly",
        samples.quantile(1, 0.5),
        samples.ratio(0, 1, 0.5),
        1.15,
    ))
}
