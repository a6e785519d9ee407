//! The search for a rule, as a function of the daemon's library.

use crate::sample::median;
use crate::table::Row;
use anyhow::{Context, Result, ensure};
use pullgate::config::Config;
use pullgate::reference::Reference;
use std::hint::black_box;
use std::path::Path;
use std::time::{Duration, Instant};

const RULES: usize = 10_000;

/// The slowest kind of name decides: each kind is searched for by itself.
pub fn measure() -> Result<Vec<Row>> {
    let text: String = (0..RULES).map(rule).collect();
    let loaded = Config::parse(Path::new("bench.yaml"), &format!("verificationRules:\n{text}"))
        .map_err(|errors| anyhow::anyhow!("{errors}"))?;
    let policy = &loaded.config.policy;
    ensure!(policy.rules().len() == RULES);
    let names = [
        ("first rule", "registry.example.com/team-0/app:v1"),
        ("below a folder", "registry.example.com/team-9996/app/sub:v1"),
        ("one repository", "registry-9997.example.com/app:v1"),
        ("a tag's pattern", "quay.io/org-9998/app:v1.2.3"),
        ("anywhere", "some.example.com/a/b/service-9999"),
        ("none", "docker.io/library/busybox:latest"),
    ];
    let mut slowest = (Duration::ZERO, "");
    for (kind, name) in names {
        let reference = Reference::parse(name).ok().with_context(|| format!("{name} is no reference"))?;
        ensure!(policy.find(&reference).is_some() == (kind != "none"), "{name}: not as meant");
        let once = || {
            const TIMES: u32 = 1000;
            let begin = Instant::now();
            for _ in 0..TIMES {
                black_box(policy.find(black_box(&reference)));
            }
            begin.elapsed() / TIMES
        };
        let took = median((0..9).map(|_| once()).collect());
        println!("   rule search, {kind}: {took:?}");
        slowest = slowest.max((took, kind));
    }
    let (took, kind) = slowest;
    let figure = format!("matching a reference against 10,000 rules, slowest of 6 kinds ({kind})");
    Ok(vec![Row::alone(&figure, took.as_secs_f64() * 1e6, "µs", 20.0)])
}

fn rule(number: usize) -> String {
    let glob = match number % 4 {
        0 => format!("registry.example.com/team-{number}/**"),
        1 => format!("registry-{number}.example.com/app"),
        2 => format!("quay.io/org-{number}/app:v1.*"),
        _ => format!("**/service-{number}"),
    };
    format!("  - {{imageGlob: \"{glob}\", strategy: allow}}\n")
}
