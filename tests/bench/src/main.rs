//! `make bench`: every figure with its bar, against a peer or floor measured in the same run.

mod byte_proxy;
mod cold;
mod latency;
mod raw;
mod resident;
mod rules;
mod sample;
mod signer;
mod table;

use anyhow::{Context, Result, ensure};
use pullgate_tests::process::run_ok;
use pullgate_tests::{parts, pullgate};
use std::path::Path;
use std::process::{Command, ExitCode};

#[tokio::main]
async fn main() -> Result<ExitCode> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (quick, only) = match arguments[..] {
        ["byte-proxy", listen, upstream] => {
            byte_proxy::serve(Path::new(listen), Path::new(upstream)).await?;
            return Ok(ExitCode::SUCCESS);
        }
        [] => (false, None),
        ["--quick"] => (true, None),
        ["--only", part] => (false, Some(part)),
        ["--quick", "--only", part] => (true, Some(part)),
        _ => anyhow::bail!("pullgate-bench [--quick] [--only latency|cold|resident|rules]"),
    };
    for part in ["containerd21", "cosign2", "cosign3"] {
        ensure!(parts::lacks(part)?.is_none(), "the benchmark needs {part}; tests/setup --retry looks again");
    }
    println!("   daemon: {}", pullgate::binary()?.display());
    let before = other_builds();
    let wanted = |part: &str| only.is_none_or(|only| only == part);
    let mut rows = Vec::new();
    if wanted("rules") {
        rows.extend(rules::measure()?);
    }
    if wanted("resident") {
        rows.extend(resident::measure().await?);
    }
    if wanted("latency") {
        rows.extend(latency::measure(quick).await?);
    }
    if wanted("cold") {
        rows.extend(cold::measure(quick).await?);
    }
    let table = table::table(&rows);
    println!("\n{table}");
    if only.is_none() && !quick {
        let machine = machine(before.max(other_builds())).await?;
        let document = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/performance.md");
        table::write(&document, &format!("{machine}\n\n{table}"))?;
    }
    let missed = rows.iter().filter(|row| !row.met()).count();
    println!("{} of {} bars met", rows.len() - missed, rows.len());
    Ok(ExitCode::from(u8::from(missed > 0)))
}

/// Compilers that ran beside the measurement: their noise is in it.
fn other_builds() -> usize {
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let name = |process: std::fs::DirEntry| std::fs::read_to_string(process.path().join("comm")).ok();
    processes.filter_map(name).filter(|name| name.trim() == "rustc").count()
}

async fn machine(other_builds: usize) -> Result<String> {
    let said = async |program: &Path, argument: &str| {
        let mut command = Command::new(program);
        command.arg(argument);
        Ok::<_, anyhow::Error>(run_ok(command).await?.stdout.trim().to_owned())
    };
    let containerd = said(&parts::path("containerd21")?, "--version").await?;
    let containerd = containerd.split_whitespace().nth(2).context("containerd names no version")?;
    let daemon = said(&pullgate::binary()?, "--version").await?;
    let cpus = std::fs::read_to_string("/proc/cpuinfo")?;
    let model = cpus.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let memory = std::fs::read_to_string("/proc/meminfo")?;
    let kib = memory.lines().next().and_then(|line| line.split_whitespace().nth(1)).context("no MemTotal")?;
    Ok(format!(
        "{daemon} (release), containerd {containerd}, Linux {}, {} cores of {}, {} GiB; compilers beside it: {}.",
        std::fs::read_to_string("/proc/sys/kernel/osrelease")?.trim(),
        std::thread::available_parallelism()?,
        model.map_or("an unnamed CPU", |(_, model)| model),
        kib.parse::<u64>()? >> 20,
        if other_builds == 0 { "none".to_owned() } else { other_builds.to_string() },
    ))
}
