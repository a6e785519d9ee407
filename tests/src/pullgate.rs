//! The daemon under test, as its own process between a CRI client and the world's containerd.

use crate::cri::Cri;
use crate::http;
use crate::process::{Output, Process, free_port, run};
use crate::wait;
use crate::world::World;
use anyhow::{Context, Result};
use serde_json::Value;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A running pullgate.
pub struct Pullgate {
    folder: PathBuf,
    metrics: SocketAddr,
    env: Vec<(String, String)>,
    cri: Cri,
    process: Mutex<Process>,
}

impl Pullgate {
    /// Starts it with a configuration of which the test writes only what it cares about: `listen`,
    /// `admin`, `stateDir`, `containerd` and `metrics` are added where they are not given.
    pub async fn start(world: &World, config: &str) -> Result<Self> {
        Self::start_with(world, config, &[]).await
    }

    /// [`Pullgate::start`] with more environment.
    pub async fn start_with(world: &World, config: &str, env: &[(&str, &str)]) -> Result<Self> {
        let pullgate = Self::prepare(world, config, env)?;
        pullgate.ready().await?;
        Ok(pullgate)
    }

    /// Starts it without waiting for it to be ready, for what shall not come up.
    pub fn prepare(world: &World, config: &str, env: &[(&str, &str)]) -> Result<Self> {
        let folder = world.folder("p")?;
        let metrics = SocketAddr::from(([127, 0, 0, 1], free_port()?));
        std::fs::write(folder.join("config.yaml"), completed(world, config, &folder, metrics))?;
        let mut all = world.aws_env();
        all.push(("PULLGATE_LOG".to_owned(), "json".to_owned()));
        all.extend(env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        let process = launch(&folder, &all)?;
        let socket = folder.join("s");
        Ok(Self {
            cri: world.containerd.cri_through(&socket)?,
            folder,
            metrics,
            env: all,
            process: Mutex::new(process),
        })
    }

    /// Waits until `/readyz` says 200 and its CRI socket is there.
    pub async fn ready(&self) -> Result<()> {
        let ready = wait::until("pullgate to be ready", wait::LONG, async || {
            if let Some(status) = self.process().ended() {
                anyhow::bail!("pullgate ended at once ({status})");
            }
            let ready = match http::get(self.metrics, "/readyz").await {
                Ok(answer) => answer.status.is_success(),
                Err(_) => false,
            };
            Ok((ready && self.socket().exists()).then_some(()))
        });
        ready.await.with_context(|| self.log())
    }

    /// A CRI client as the kubelet is with its `imageServiceEndpoint` set to pullgate.
    pub fn cri(&self) -> &Cri {
        &self.cri
    }

    /// Where it listens.
    pub fn socket(&self) -> PathBuf {
        self.folder.join("s")
    }

    /// Its configuration file.
    pub fn config(&self) -> PathBuf {
        self.folder.join("config.yaml")
    }

    /// Its state folder.
    pub fn state(&self) -> PathBuf {
        self.folder.join("state")
    }

    /// Writes another configuration over the old one, atomically. The daemon sees the change by
    /// itself.
    pub fn reconfigure(&self, world: &World, config: &str) -> Result<()> {
        let new = self.folder.join("config.yaml.new");
        std::fs::write(&new, completed(world, config, &self.folder, self.metrics))?;
        std::fs::rename(new, self.config())?;
        Ok(())
    }

    /// A page of its HTTP listener: `/metrics`, `/healthz`, `/readyz`.
    pub async fn http(&self, path: &str) -> Result<http::Answer> {
        http::get(self.metrics, path).await
    }

    /// All metrics, as text.
    pub async fn metrics(&self) -> Result<String> {
        Ok(self.http("/metrics").await?.text())
    }

    /// The sum of a metric's samples whose labels contain all of these (`reason="unsigned"`).
    pub async fn metric(&self, name: &str, labels: &[&str]) -> Result<f64> {
        let text = self.metrics().await?;
        let samples = text.lines().filter(|line| {
            let rest = line.strip_prefix(name);
            rest.is_some_and(|rest| rest.starts_with(['{', ' ']))
                && labels.iter().all(|label| line.contains(label))
        });
        Ok(samples.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum())
    }

    /// The audit entries, oldest first, over restarts too.
    pub fn audit(&self) -> Vec<Value> {
        self.log()
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .filter(|entry: &Value| entry.get("PULLGATE_DECISION").is_some())
            .collect()
    }

    /// Waits for an audit entry of which this is true.
    pub async fn audited(&self, holds: impl Fn(&Value) -> bool) -> Result<Value> {
        let found =
            wait::until("an audit entry", wait::LONG, async || Ok(self.audit().into_iter().find(&holds)));
        found.await.with_context(|| self.log())
    }

    /// Everything that it has logged.
    pub fn log(&self) -> String {
        self.process().log()
    }

    /// Runs `pullgate <args> --config FILE` in the same environment.
    pub async fn admin(&self, args: &[&str]) -> Result<Output> {
        let mut command = Command::new(binary()?);
        command
            .args(args)
            .arg("--config")
            .arg(self.config())
            .envs(self.env.iter().map(|(name, value)| (name, value)));
        run(command).await
    }

    /// How many verdicts it has in memory.
    pub async fn verdicts(&self) -> Result<u64> {
        let stats: Value = serde_json::from_str(&self.admin(&["cache", "stats"]).await?.ok()?.stdout)?;
        stats["memoryEntries"].as_u64().context("no memoryEntries")
    }

    /// SIGTERM, and waits for the end.
    pub async fn stop(&self) -> Result<ExitStatus> {
        self.signal(nix::sys::signal::Signal::SIGTERM)?;
        wait::until("the end of pullgate", wait::LONG, async || Ok(self.process().ended())).await
    }

    /// Starts it again where it has ended.
    pub async fn start_again(&self) -> Result<()> {
        *self.process() = launch(&self.folder, &self.env)?;
        self.ready().await
    }

    /// SIGTERM and a new start on the same state.
    pub async fn restart(&self) -> Result<()> {
        self.stop().await?;
        self.start_again().await
    }

    /// SIGKILL.
    pub fn kill9(&self) {
        self.process().kill9();
    }

    /// Any signal.
    pub fn signal(&self, signal: nix::sys::signal::Signal) -> Result<()> {
        self.process().signal(signal)
    }

    /// Its process id.
    pub fn pid(&self) -> i32 {
        self.process().pid()
    }

    fn process(&self) -> MutexGuard<'_, Process> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn launch(folder: &Path, env: &[(String, String)]) -> Result<Process> {
    let mut command = Command::new(binary()?);
    command
        .args(["run", "--config"])
        .arg(folder.join("config.yaml"))
        .env_remove("NOTIFY_SOCKET")
        .env_remove("LISTEN_FDS")
        .envs(env.iter().map(|(name, value)| (name, value)));
    Process::start("pullgate", command, &folder.join("log"))
}

/// The daemon's binary: `PULLGATE_BIN`, else the one beside the test's own.
pub fn binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("PULLGATE_BIN") {
        return Ok(path.into());
    }
    // target/debug/deps/suite-0123 or target/debug/demo → target/debug/pullgate
    let own = std::env::current_exe()?;
    let beside = own.ancestors().skip(1).take(2).map(|folder| folder.join("pullgate"));
    let binary = beside.into_iter().find(|binary| binary.is_file());
    binary.context("no pullgate beside this program: build it (`make build`), or name it in PULLGATE_BIN")
}

/// The test's configuration and what it left out.
fn completed(world: &World, config: &str, folder: &Path, metrics: SocketAddr) -> String {
    let at = |name: &str| folder.join(name).display().to_string();
    let socket = world.containerd.socket().display().to_string();
    let certs = world.containerd.certs().display().to_string();
    let defaults = [
        ("listen", at("s")),
        ("admin", at("a")),
        ("stateDir", at("state")),
        (
            "containerd",
            format!(
                "{{address: {socket}, imageEndpoint: {socket}, namespace: k8s.io, \
                 registryConfigPath: {certs}}}"
            ),
        ),
        ("metrics", format!("{{listen: \"{metrics}\"}}")),
    ];
    let mut text = String::new();
    for (key, value) in defaults {
        let given = config.lines().any(|line| line.starts_with(&format!("{key}:")));
        if !given {
            text += &format!("{key}: {value}\n");
        }
    }
    text + config
}
