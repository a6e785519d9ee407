//! Child processes that end with the test: on drop, on panic, and when the test itself is killed.

use crate::wait;
use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, OnceLock};
use std::time::Duration;

/// A daemon under test, with its own process group and log file.
pub struct Process {
    name: String,
    child: Mutex<Child>,
    pid: Pid,
    log: PathBuf,
}

/// Set by a program that is no test, and has succeeded: nobody wants to see logs then.
pub static ALL_WENT_WELL: AtomicBool = AtomicBool::new(false);

impl Process {
    /// Starts `command`, stdout and stderr appended to `log`.
    pub fn start(name: &str, command: Command, log: &Path) -> Result<Self> {
        if let Some(folder) = log.parent() {
            std::fs::create_dir_all(folder)?;
        }
        let out = File::options().create(true).append(true).open(log)?;
        let mut guarded = dying_with_us(&command);
        guarded.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out).process_group(0);
        let child = spawn(guarded).with_context(|| format!("cannot start {name}"))?;
        let pid = Pid::from_raw(child.id().cast_signed());
        Ok(Self { name: name.to_owned(), child: Mutex::new(child), pid, log: log.to_owned() })
    }

    /// Its process id.
    pub fn pid(&self) -> i32 {
        self.pid.as_raw()
    }

    /// How it ended, if it has.
    pub fn ended(&self) -> Option<ExitStatus> {
        let mut child = self.child.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        child.try_wait().ok().flatten()
    }

    /// Sends a signal to the process alone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        if self.ended().is_none() {
            kill(self.pid, signal).with_context(|| format!("{signal} to {}", self.name))?;
        }
        Ok(())
    }

    /// SIGTERM, then waits for the end.
    pub async fn stop(&self) -> Result<ExitStatus> {
        self.signal(Signal::SIGTERM)?;
        wait::until(&format!("the end of {}", self.name), wait::LONG, async || Ok(self.ended())).await
    }

    /// SIGKILL for the whole process group.
    pub fn kill9(&self) {
        if self.ended().is_none() {
            let _ = killpg(self.pid, Signal::SIGKILL);
            wait::until_true_blocking(Duration::from_secs(10), || self.ended().is_some());
        }
    }

    /// Everything that it has written.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Waits until `ready` says yes; an early end is an error with the log's last lines.
    pub async fn wait_ready(&self, mut ready: impl AsyncFnMut() -> bool) -> Result<()> {
        let what = format!("{} to be ready", self.name);
        let asked = wait::until(&what, wait::LONG, async || {
            if let Some(status) = self.ended() {
                bail!("{} ended at once ({status})", self.name);
            }
            Ok(ready().await.then_some(()))
        });
        asked.await.with_context(|| self.tail(30))
    }

    fn tail(&self, lines: usize) -> String {
        let log = self.log();
        let all: Vec<&str> = log.lines().collect();
        let last = all.get(all.len().saturating_sub(lines)..).unwrap_or(&[]);
        format!("--- the end of {}'s log ---\n{}", self.name, last.join("\n"))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill9();
        // The test runner shows captured output only for a test that failed.
        if !ALL_WENT_WELL.load(Ordering::Relaxed) {
            eprintln!("{}", self.tail(40));
        }
    }
}

/// What a finished command said.
#[derive(Debug)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Output {
    /// Itself when it succeeded, else an error with what it said.
    pub fn ok(self) -> Result<Self> {
        if !self.status.success() {
            bail!("{}\n{}{}", self.status, self.stdout, self.stderr);
        }
        Ok(self)
    }
}

/// Runs a command to its end, off the runtime's threads.
pub async fn run(command: Command) -> Result<Output> {
    let shown = format!("{command:?}");
    let mut guarded = dying_with_us(&command);
    guarded.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = spawn(guarded).with_context(|| format!("cannot start {shown}"))?;
    let output = tokio::task::spawn_blocking(move || child.wait_with_output()).await??;
    Ok(Output {
        status: output.status,
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

/// [`run`], where anything but success is an error.
pub async fn run_ok(command: Command) -> Result<Output> {
    let shown = format!("{command:?}");
    run(command).await?.ok().context(shown)
}

/// A port of loopback that nobody listens on. Taken from below the range that the kernel hands out,
/// and never twice in one test process.
pub fn free_port() -> Result<u16> {
    static NEXT: OnceLock<AtomicU16> = OnceLock::new();
    const FIRST: u16 = 20_000;
    const COUNT: u16 = 12_000;
    let next = NEXT.get_or_init(|| {
        AtomicU16::new(u16::try_from(std::process::id() * 37 % u32::from(COUNT)).unwrap_or(0))
    });
    for _ in 0..COUNT {
        let port = FIRST + next.fetch_add(1, Ordering::Relaxed) % COUNT;
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return Ok(port);
        }
    }
    bail!("no free port on loopback")
}

/// The same command under `setpriv`, so that the kernel kills it when the test process dies.
fn dying_with_us(command: &Command) -> Command {
    let mut guarded = Command::new("setpriv");
    guarded.args(["--pdeathsig", "KILL", "--"]).arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => guarded.env(name, value),
            None => guarded.env_remove(name),
        };
    }
    if let Some(folder) = command.get_current_dir() {
        guarded.current_dir(folder);
    }
    guarded
}

type Job = (Command, Sender<std::io::Result<Child>>);

/// The kernel ties the death signal to the *thread* that forked: so one thread forks for all, and it
/// lives as long as the test process.
fn spawn(command: Command) -> Result<Child> {
    static FORKER: OnceLock<Mutex<Sender<Job>>> = OnceLock::new();
    let forker = FORKER.get_or_init(|| {
        let (send, jobs) = channel::<Job>();
        std::thread::spawn(move || {
            for (mut command, answer) in jobs {
                let _ = answer.send(command.spawn());
            }
        });
        Mutex::new(send)
    });
    let (send, answer) = channel();
    forker.lock().unwrap_or_else(std::sync::PoisonError::into_inner).send((command, send))?;
    Ok(answer.recv()??)
}
