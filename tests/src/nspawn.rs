//! A machine with systemd and journald: the root file system of `tests/setup`, booted by
//! systemd-nspawn. What it writes goes to memory and is gone with it. It shares the host's network.

use crate::parts;
use crate::process::{Output, Process, run};
use crate::pullgate::binary;
use crate::wait;
use crate::world::World;
use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where the folder of the world's containerd is inside. Not below /tmp, which systemd empties at boot.
pub const CONTAINERD: &str = "/w";

/// A running machine.
pub struct Nspawn {
    leader: i32,
    // Fields are dropped in this order: a cgroup can go once it is empty.
    process: Process,
    _cgroup: Cgroup,
}

impl Nspawn {
    /// Boots one that sees the world's containerd in [`CONTAINERD`], with pullgate's binary, units and
    /// journal catalog installed and nothing started.
    pub async fn boot(world: &World) -> Result<Self> {
        let folder = world.folder("m")?;
        let name = format!("{}-{}", world.name(), folder.file_name().unwrap_or_default().display());
        let cgroup = Cgroup::new(&name)?;
        let containerd = world.path().join(crate::containerd::FOLDER);
        let mut command = Command::new("sh");
        // SIGKILL would leave the machine behind: nspawn is told to end it when the test dies.
        command.args(["-c", &cgroup.join_and_exec(), "sh", "setpriv", "--pdeathsig", "TERM", "--"]);
        command.args(["systemd-nspawn", "--quiet", "--boot"]);
        command.arg("--directory").arg(parts::path("rootfs")?).args(["--read-only", "--volatile=overlay"]);
        // This machine may have no systemd of its own to register with.
        command.args(["--register=no", "--keep-unit", "--link-journal=no", "--console=pipe"]);
        command.arg(format!("--machine={name}")).arg("--kill-signal=SIGKILL");
        command.arg(format!("--bind={}:{CONTAINERD}", containerd.display()));
        command.arg(format!("--bind-ro={}:/usr/bin/pullgate", binary()?.canonicalize()?.display()));
        let process = Process::start("systemd-nspawn", command, &folder.join("log"))?;
        // From here on its drop ends the machine, however far it has come.
        let mut machine = Self { leader: 0, process, _cgroup: cgroup };
        machine.leader = wait::until("systemd in the machine", wait::LONG, async || {
            let process = &machine.process;
            ensure!(process.ended().is_none(), "systemd-nspawn ended at once: {}", process.log());
            Ok(leader_of(process.pid()))
        })
        .await?;
        machine.booted().await?;
        machine.install().await?;
        Ok(machine)
    }

    async fn booted(&self) -> Result<()> {
        wait::until("the machine to be up", wait::LONG, async || {
            let state = self.run(&["systemctl", "is-system-running"]).await?;
            Ok(matches!(state.stdout.trim(), "running" | "degraded").then_some(()))
        })
        .await
        .with_context(|| self.process.log())
    }

    /// As README.md says it, but for the kubelet.
    async fn install(&self) -> Result<()> {
        let units = Path::new(env!("CARGO_MANIFEST_DIR")).join("../systemd");
        for unit in ["pullgate.service", "pullgate.socket"] {
            let text = std::fs::read_to_string(units.join(unit))?;
            self.write(&format!("/etc/systemd/system/{unit}"), &text)?;
        }
        let catalog = std::fs::read_to_string(units.join("pullgate.catalog"))?;
        self.write("/usr/lib/systemd/catalog/pullgate.catalog", &catalog)?;
        self.run_ok(&["journalctl", "--update-catalog"]).await?;
        self.run_ok(&["systemctl", "daemon-reload"]).await?;
        Ok(())
    }

    /// A file of the machine, or a socket, as seen from outside.
    pub fn path(&self, inside: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{inside}", self.leader))
    }

    /// Writes a file, and the folders that it needs, in one step.
    pub fn write(&self, inside: &str, text: &str) -> Result<()> {
        let path = self.path(inside);
        let new = path.with_extension("new");
        std::fs::create_dir_all(path.parent().context("no folder")?)?;
        std::fs::write(&new, text).with_context(|| new.display().to_string())?;
        Ok(std::fs::rename(new, path)?)
    }

    /// Runs a command inside.
    pub async fn run(&self, args: &[&str]) -> Result<Output> {
        let mut command = Command::new("nsenter");
        command.arg(format!("--target={}", self.leader));
        command.args(["--mount", "--uts", "--ipc", "--pid", "--cgroup", "--root", "--wd", "--"]).args(args);
        command.env("LC_ALL", "C.UTF-8").env("SYSTEMD_COLORS", "0");
        run(command).await
    }

    /// [`Nspawn::run`], where anything but success is an error, told with the journal.
    pub async fn run_ok(&self, args: &[&str]) -> Result<String> {
        let output = self.run(args).await?;
        if !output.status.success() {
            let journal = self.run(&["journalctl", "--no-pager", "--lines=40"]).await?;
            anyhow::bail!("{args:?}: {}{}\n{}", output.stdout, output.stderr, journal.stdout);
        }
        Ok(output.stdout)
    }

    /// A property of a unit.
    pub async fn property(&self, unit: &str, name: &str) -> Result<String> {
        let value = self.run_ok(&["systemctl", "show", "--value", "--property", name, unit]).await?;
        Ok(value.trim().to_owned())
    }

    /// The journal's entries that match (`PULLGATE_DECISION=allow`), oldest first.
    pub async fn journal(&self, matches: &[&str]) -> Result<Vec<Value>> {
        let args = [&["journalctl", "--output=json", "--all", "--no-pager"], matches].concat();
        // Exit status 1 says that nothing matches.
        let output = self.run(&args).await?;
        output.stdout.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
    }
}

impl Drop for Nspawn {
    fn drop(&mut self) {
        // nspawn then kills the machine, and removes what it has made on the host.
        let _ = self.process.signal(Signal::SIGTERM);
        wait::until_true_blocking(wait::LONG, || self.process.ended().is_some());
    }
}

/// The first process of the machine: systemd, once nspawn has started it.
fn leader_of(nspawn: i32) -> Option<i32> {
    let children = std::fs::read_to_string(format!("/proc/{nspawn}/task/{nspawn}/children")).ok()?;
    children.split_whitespace().find_map(|child| {
        let child: i32 = child.parse().ok()?;
        let command = std::fs::read_to_string(format!("/proc/{child}/cmdline")).ok()?;
        command.starts_with("/usr/lib/systemd/systemd").then_some(child)
    })
}

/// A cgroup for one machine: two in the same would be in each other's way.
struct Cgroup(Vec<PathBuf>);

impl Cgroup {
    /// In the hierarchies that systemd manages, of cgroup v1, v2, or both.
    fn new(name: &str) -> Result<Self> {
        let cgroup = Self(hierarchies().into_iter().map(|root| root.join(name)).collect());
        ensure!(!cgroup.0.is_empty(), "no cgroup hierarchy that systemd could use");
        for folder in &cgroup.0 {
            std::fs::create_dir(folder).with_context(|| folder.display().to_string())?;
        }
        Ok(cgroup)
    }

    /// A shell script that enters it and becomes its arguments.
    fn join_and_exec(&self) -> String {
        let enter = |folder: &PathBuf| format!("echo $$ >'{}' && ", folder.join("cgroup.procs").display());
        self.0.iter().map(enter).collect::<String>() + "exec \"$@\""
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        for folder in &self.0 {
            wait::until_true_blocking(wait::LONG, || {
                remove_tree(folder);
                !folder.exists()
            });
        }
    }
}

fn hierarchies() -> Vec<PathBuf> {
    let at = Path::new("/sys/fs/cgroup");
    let mut roots = match at.join("cgroup.controllers").exists() {
        true => vec![at.to_owned()],
        false => ["systemd", "unified"].map(|part| at.join(part)).to_vec(),
    };
    roots.retain(|root| root.exists());
    roots
}

/// Removes the cgroups that the machines of a dead world left, its folder's name given.
pub(crate) fn remove_leftovers(world: &str) {
    for entry in hierarchies().iter().filter_map(|root| std::fs::read_dir(root).ok()).flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(&format!("{world}-m")) {
            remove_tree(&entry.path());
        }
    }
}

/// Removes empty cgroups, the innermost first.
fn remove_tree(folder: &Path) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path());
        }
    }
    let _ = std::fs::remove_dir(folder);
}
