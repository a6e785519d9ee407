//! Memory, and the time of a start.

use crate::raw::Grpc;
use crate::sample::median;
use crate::signer::Signer;
use crate::table::Row;
use anyhow::{Context, Result, ensure};
use pullgate::store::{Stored, Verdict, VerdictKey, VerdictStore};
use pullgate::verify::Proof;
use pullgate::verify::signature::Candidate;
use pullgate_tests::cri::v1;
use pullgate_tests::{Pullgate, Version, World, oci};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

const VERDICTS: usize = 100_000;
/// What systemd/pullgate.service sets.
const UNIT_ENVIRONMENT: &[(&str, &str)] = &[("MALLOC_TRIM_THRESHOLD_", "65536")];

/// Resident memory idle and with many verdicts, and how soon the socket answers with these.
pub async fn measure() -> Result<Vec<Row>> {
    let world = World::on(Version::V21).await?;
    let signer = Signer::new(&world)?;
    let pullgate = Pullgate::start_with(&world, &signer.policy(&world), UNIT_ENVIRONMENT).await?;
    let image = signer.images("app", 1, 0).await?.pop().context("no image")?.by_tag();
    pullgate.cri().pull(&image).await?;
    pullgate.restart().await?;
    let idle = resident_after_a_status(&pullgate, &image).await?;

    pullgate.stop().await?;
    let state = pullgate.state();
    tokio::task::spawn_blocking(move || fill(&state)).await??;
    let mut starts = Vec::new();
    for _ in 0..7 {
        starts.push(start(&pullgate).await?);
        pullgate.stop().await?;
    }
    pullgate.start_again().await?;
    let held = pullgate.metric("pullgate_cache_entries", &["tier=\"disk\""]).await?;
    ensure!(held > VERDICTS as f64, "the store has {held} verdicts");
    let full = resident_after_a_status(&pullgate, &image).await?;
    Ok(vec![
        Row::alone("resident memory, idle", idle, "MiB", 25.0),
        Row::alone("resident memory, 100,000 verdicts", full, "MiB", 60.0),
        Row::alone("exec to the first answer, 100,000 verdicts, p50", median(starts).as_secs_f64(), "s", 0.3),
    ])
}

/// VmRSS in MiB.
async fn resident_after_a_status(pullgate: &Pullgate, image: &str) -> Result<f64> {
    pullgate.cri().image_status(image).await?.context("the image is not allowed")?;
    let status = std::fs::read_to_string(format!("/proc/{}/status", pullgate.pid()))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kib: f64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kib / 1024.0)
}

/// Writes verdicts as the daemon does, but from many threads: each waits for the disk.
fn fill(state: &Path) -> Result<()> {
    const THREADS: usize = 32;
    let metrics = pullgate::metrics::Metrics::new()?;
    let store = VerdictStore::open(state, Arc::new(metrics));
    ensure!(store.trouble().is_none(), "{:?}", store.trouble());
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let store = &store;
            scope.spawn(move || {
                for number in (thread..VERDICTS).step_by(THREADS) {
                    let (key, stored) = verdict(number);
                    store.persist(&key, &stored);
                }
            });
        }
    });
    store.flush();
    Ok(())
}

fn verdict(number: usize) -> (VerdictKey, Stored) {
    let digest = oci::digest(number.to_string().as_bytes());
    let key = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, digest.as_bytes());
    let key = std::array::from_fn(|at| key.as_ref()[at]);
    let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
    let repository = format!("123456789012.dkr.ecr.us-west-2.amazonaws.com/team-{}/service", number % 5000);
    let proof = Proof {
        key: "aws-kms://arn:aws:kms:us-west-2:123456789012:key/aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee".into(),
        key_sha256: digest.trim_start_matches("sha256:").into(),
        scheme: "ECDSA_P256_SHA256".into(),
        docker_reference: repository.clone(),
        ..Proof::default()
    };
    // As long as those that cosign writes.
    let payload = bytes::Bytes::from(vec![b'p'; 300]);
    let evidence = vec![Candidate { payload, signature: "s".repeat(96) }];
    let (verdict, judged_at_unix) = (Verdict::Allow(proof), now.as_secs());
    (VerdictKey::from_bytes(key), Stored { repository, digest, verdict, judged_at_unix, evidence })
}

/// From the fork to the answer of a call through the socket.
async fn start(pullgate: &Pullgate) -> Result<Duration> {
    let begin = Instant::now();
    let answered = async {
        loop {
            if let Ok(mut gate) = Grpc::connect(&pullgate.socket()).await
                && gate.call("ImageFsInfo", &v1::ImageFsInfoRequest {}).await.is_ok()
            {
                return begin.elapsed();
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let (started, answered) = tokio::join!(pullgate.start_again(), answered);
    started?;
    Ok(answered)
}
