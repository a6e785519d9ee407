//! The calls that a kubelet makes all day, on a node with five hundred images.

use crate::raw::Grpc;
use crate::sample::{Plan, Samples};
use crate::signer::Signer;
use crate::table::Row;
use anyhow::{Context, Result, ensure};
use futures_util::{StreamExt, TryStreamExt};
use pullgate_tests::cri::v1;
use pullgate_tests::process::Process;
use pullgate_tests::{Image, Pullgate, Version, World, wait};
use std::path::{Path, PathBuf};
use std::process::Command;

const IMAGES: usize = 500;

const GATE: usize = 0;
const PROXY: usize = 1;
const DIRECT: usize = 2;

/// ListImages, ImageStatus, and PullImage of what is there already.
pub async fn measure(quick: bool) -> Result<Vec<Row>> {
    let world = World::on(Version::V21).await?;
    let signer = Signer::new(&world)?;
    fill(&world).await?;
    let pullgate = Pullgate::start(&world, &signer.policy(&world)).await?;
    let (floor, floor_socket) = byte_proxy(&world).await?;
    let image = signer.images("app", 1, 0).await?.pop().context("no image")?.by_tag();
    pullgate.cri().pull(&image).await?;
    let listed = world.cri()?.list_images().await?.len();
    ensure!(listed == IMAGES, "{listed} images are listed");

    let sockets = [pullgate.socket(), floor_socket, world.containerd.socket()];
    let times = on_a_thread(sockets, image, quick).await?;
    drop((floor, pullgate, world));
    Ok(rows(&times))
}

struct Times {
    list: Samples,
    status: Samples,
    pull: Samples,
}

fn rows(Times { list, status, pull }: &Times) -> Vec<Row> {
    let against = |figure: &str, samples: &Samples, quantile: f64, arm: usize, bar: f64| {
        let peer = if arm == PROXY { "bare HTTP/2 byte proxy" } else { "containerd directly" };
        let percent = (quantile * 100.0).round();
        Row::against(
            &format!("{figure}, p{percent}"),
            samples.quantile(GATE, quantile),
            peer,
            samples.quantile(arm, quantile),
            samples.ratio(GATE, arm, quantile),
            bar,
        )
    };
    let (listing, asking) = ("ListImages, 500 images", "ImageStatus, allowed and stored");
    vec![
        against(listing, list, 0.5, PROXY, 1.05),
        against(listing, list, 0.99, PROXY, 1.15),
        against(asking, status, 0.5, PROXY, 1.25),
        against(asking, status, 0.99, PROXY, 1.4),
        against(listing, list, 0.5, DIRECT, 1.25),
        against(asking, status, 0.5, DIRECT, 2.0),
        Row::against(
            "PullImage, verdict stored, image present, p50",
            pull.quantile(0, 0.5),
            "containerd directly",
            pull.quantile(1, 0.5),
            pull.ratio(0, 1, 0.5),
            1.15,
        ),
    ]
}

/// Pulls, past the gate, all but one of the images, and but the sandbox's.
async fn fill(world: &World) -> Result<()> {
    let cri = world.cri()?;
    let have = cri.list_images().await?.len();
    let pulls = (have + 1..IMAGES).map(|number| {
        let cri = cri.clone();
        async move {
            let image = Image::new("many").tag(&format!("v{number}")).push(&world.registry).await?;
            Ok::<_, anyhow::Error>(cri.pull(&image.by_tag()).await?)
        }
    });
    futures_util::stream::iter(pulls).buffer_unordered(4).try_collect::<Vec<_>>().await?;
    Ok(())
}

/// This program again, as the floor, in a process of its own as the daemon is.
async fn byte_proxy(world: &World) -> Result<(Process, PathBuf)> {
    let folder = world.folder("f")?;
    let socket = folder.join("s");
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("byte-proxy").arg(&socket).arg(world.containerd.socket());
    let process = Process::start("byte-proxy", command, &folder.join("log"))?;
    wait::until_true("the byte proxy", || socket.exists()).await?;
    Ok((process, socket))
}

/// The client has a thread and a runtime of its own: the fewest wake-ups.
async fn on_a_thread(sockets: [PathBuf; 3], image: String, quick: bool) -> Result<Times> {
    let run = move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(in_turns(sockets, image, quick))
    };
    tokio::task::spawn_blocking(run).await?
}

async fn in_turns(sockets: [PathBuf; 3], image: String, quick: bool) -> Result<Times> {
    let rounds = |many: usize| if quick { many / 10 } else { many };
    let connect = |socket: &Path| {
        let socket = socket.to_owned();
        async move { Grpc::connect(&socket).await }
    };
    let mut arms = Vec::new();
    for socket in &sockets {
        arms.push(connect(socket).await?);
    }
    let all = v1::ListImagesRequest::default();
    let spec = v1::ImageSpec { image, ..Default::default() };
    let one = v1::ImageStatusRequest { image: Some(spec.clone()), verbose: false };
    let again = v1::PullImageRequest { image: Some(spec), ..Default::default() };

    // The gate must have found the image allowed, or another answer would be measured.
    let mut answers = Vec::new();
    for arm in &mut arms {
        answers.push((arm.call("ImageStatus", &one).await?, arm.call("ListImages", &all).await?));
    }
    ensure!(answers.windows(2).all(|two| two[0] == two[1]), "answers differ in size: {answers:?}");

    let mut list = async |plan: Plan| {
        Samples::take(plan, &mut arms, async |arm: &mut Grpc, _| arm.call("ListImages", &all).await.map(drop))
            .await
    };
    list(Plan { blocks: 1, rounds: rounds(200) }).await?;
    let list = list(Plan { blocks: 7, rounds: rounds(500) }).await?;

    let mut status = async |plan: Plan| {
        Samples::take(plan, &mut arms, async |arm: &mut Grpc, _| {
            arm.call("ImageStatus", &one).await.map(drop)
        })
        .await
    };
    status(Plan { blocks: 1, rounds: rounds(500) }).await?;
    let status = status(Plan { blocks: 9, rounds: rounds(1000) }).await?;

    let mut arms = vec![connect(&sockets[GATE]).await?, connect(&sockets[DIRECT]).await?];
    let mut pull = async |plan: Plan| {
        Samples::take(plan, &mut arms, async |arm: &mut Grpc, _| {
            arm.call("PullImage", &again).await.map(drop)
        })
        .await
    };
    pull(Plan { blocks: 1, rounds: rounds(50) }).await?;
    let pull = pull(Plan { blocks: 7, rounds: rounds(100) }).await?;
    Ok(Times { list, status, pull })
}
