//! A containerd of one's own, with everything below one folder, and gone without trace afterwards.

use crate::cri::Cri;
use crate::image::Image;
use crate::parts;
use crate::process::{Output, Process, run_ok};
use crate::registry::Registry;
use crate::wait;
use anyhow::{Context, Result};
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Where a world keeps its containerd.
pub const FOLDER: &str = "c";

/// The sandbox image, imported from a file: a world never pulls it.
const PAUSE: &str = "pullgate.test/pause:1";

/// Which containerd.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Version {
    /// 1.6, of Debian 12.
    #[default]
    V16,
    /// 1.7, of Debian 13.
    V17,
    /// 2.1, of Debian testing: optional.
    V21,
}

impl Version {
    /// The newest that is here: 2.1, or 1.7 where that can't be had.
    pub fn newest() -> Result<Option<Self>> {
        for version in [Self::V21, Self::V17] {
            match crate::parts::lacks(version.part())? {
                None => return Ok(Some(version)),
                Some(why) => eprintln!("not on {version:?}: {why}"),
            }
        }
        Ok(None)
    }

    /// The part's name, for [`crate::need!`].
    pub fn part(self) -> &'static str {
        match self {
            Self::V16 => "containerd16",
            Self::V17 => "containerd17",
            Self::V21 => "containerd21",
        }
    }
}

/// A running containerd.
pub struct Containerd {
    version: Version,
    folder: PathBuf,
    cgroup: String,
    process: Mutex<Process>,
}

impl Containerd {
    /// Starts one. `folder` must be short (Unix sockets); `cgroup` names the cgroup of all its Pods.
    pub async fn start(folder: &Path, cgroup: &str, version: Version, discard_layers: bool) -> Result<Self> {
        for name in ["certs.d", "verifiers", "cni", "logs"] {
            fs::create_dir_all(folder.join(name))?;
        }
        let config = config(folder, version, discard_layers)?;
        fs::write(folder.join("config.toml"), config)?;
        let containerd = Self {
            version,
            folder: folder.to_owned(),
            cgroup: cgroup.to_owned(),
            process: Mutex::new(launch(folder, version)?),
        };
        containerd.ready().await?;
        containerd.import_pause().await?;
        Ok(containerd)
    }

    /// Its version.
    pub fn version(&self) -> Version {
        self.version
    }

    /// Where it listens.
    pub fn socket(&self) -> PathBuf {
        socket(&self.folder)
    }

    /// Its folder of registry hosts, pullgate's `containerd.registryConfigPath`.
    pub fn certs(&self) -> PathBuf {
        self.folder.join("certs.d")
    }

    /// Its folder of image verifier binaries (2.x).
    pub fn verifiers(&self) -> PathBuf {
        self.folder.join("verifiers")
    }

    /// A CRI client that talks to it directly.
    pub fn cri(&self) -> Result<Cri> {
        self.cri_through(&self.socket())
    }

    /// A CRI client whose images come from another socket: the kubelet's `imageServiceEndpoint`.
    pub fn cri_through(&self, images: &Path) -> Result<Cri> {
        let logs = self.folder.join("logs");
        Cri::new(images, &self.socket(), &logs, &self.cgroup)
    }

    /// Lets it pull from a registry by the registry's own name.
    pub fn trust(&self, registry: &Registry) -> Result<()> {
        self.mirror(registry.host(), registry)
    }

    /// Lets it pull what is named `host/…` from a registry on loopback.
    pub fn mirror(&self, host: &str, registry: &Registry) -> Result<()> {
        let folder = self.certs().join(host);
        fs::create_dir_all(&folder)?;
        let url = registry.url();
        let mut text = format!("server = '{url}'\n[host.'{url}']\ncapabilities = ['pull', 'resolve']\n");
        if let Some(ca) = registry.ca() {
            text += &format!("ca = '{}'\n", ca.display());
        }
        fs::write(folder.join("hosts.toml"), text)?;
        Ok(())
    }

    /// Runs `ctr` on it, in the namespace of Kubernetes.
    pub async fn ctr(&self, args: &[&str]) -> Result<Output> {
        let mut command = Command::new(beside(self.version, "ctr")?);
        command.arg("--address").arg(self.socket()).args(["--namespace", "k8s.io"]).args(args);
        run_ok(command).await
    }

    /// Puts an image in its store from a file, past every image proxy.
    pub async fn import(&self, image: &Image, name: &str) -> Result<()> {
        let file = tempfile::NamedTempFile::new_in(&self.folder)?;
        fs::write(file.path(), image.archive(name)?)?;
        let path = file.path().display().to_string();
        self.ctr(&["images", "import", "--snapshotter", snapshotter(), &path]).await?;
        Ok(())
    }

    /// Pulls an image with `ctr`, past every image proxy. Its one record is the name as given.
    pub async fn pull(&self, image: &str) -> Result<()> {
        self.ctr(&["images", "pull", "--plain-http", "--snapshotter", snapshotter(), image]).await?;
        Ok(())
    }

    /// Gives a present image more names, all at once; a name that is there already is moved.
    pub async fn tag(&self, image: &str, names: &[&str]) -> Result<()> {
        self.ctr(&[&["images", "tag", "--force", image], names].concat()).await?;
        Ok(())
    }

    /// Ends it without notice. Its Pods go on.
    pub fn kill9(&self) {
        self.process().kill9();
    }

    /// Ends it without notice and starts it again.
    pub async fn restart(&self) -> Result<()> {
        self.kill9();
        *self.process() = launch(&self.folder, self.version)?;
        self.ready().await
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        self.process().log()
    }

    fn process(&self) -> std::sync::MutexGuard<'_, Process> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn ready(&self) -> Result<()> {
        let cri = self.cri()?;
        let ready = wait::until("containerd's CRI", wait::LONG, async || {
            if let Some(status) = self.process().ended() {
                anyhow::bail!("containerd ended at once ({status})");
            }
            Ok(cri.image_fs_info().await.ok().map(|_| ()))
        });
        ready.await.with_context(|| self.log())
    }

    async fn import_pause(&self) -> Result<()> {
        let pause = Image::new("pause").tag("1").cmd("exec sleep 2147483647");
        self.import(&pause, PAUSE).await?;
        let cri = self.cri()?;
        wait::until("the sandbox image", wait::LONG, async || Ok(cri.image_status(PAUSE).await?)).await?;
        Ok(())
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        self.kill9();
        remove_leftovers_of(&self.folder, &self.cgroup);
    }
}

fn socket(folder: &Path) -> PathBuf {
    folder.join("c.sock")
}

/// A binary that came in the same package.
fn beside(version: Version, name: &str) -> Result<PathBuf> {
    Ok(parts::path(version.part())?.with_file_name(name))
}

fn launch(folder: &Path, version: Version) -> Result<Process> {
    let binary = parts::path(version.part())?;
    let own = binary.parent().context("no folder")?.display().to_string();
    let mut command = Command::new(&binary);
    command
        .arg("--config")
        .arg(folder.join("config.toml"))
        // The shim is found by PATH.
        .env("PATH", format!("{own}:/usr/sbin:/usr/bin:/sbin:/bin"))
        .env_remove("NOTIFY_SOCKET");
    Process::start(version.part(), command, &folder.join("log"))
}

/// overlayfs where the kernel has it on /tmp's file system, else plain copies.
fn snapshotter() -> &'static str {
    static KIND: std::sync::OnceLock<&str> = std::sync::OnceLock::new();
    KIND.get_or_init(|| if overlay_works() { "overlayfs" } else { "native" })
}

fn overlay_works() -> bool {
    let Ok(folder) = tempfile::tempdir_in("/tmp") else {
        return false;
    };
    let path = |name: &str| folder.path().join(name);
    for name in ["lower", "upper", "work", "merged"] {
        if fs::create_dir(path(name)).is_err() {
            return false;
        }
    }
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        path("lower").display(),
        path("upper").display(),
        path("work").display()
    );
    let merged = path("merged");
    let flags = nix::mount::MsFlags::empty();
    let mounted = nix::mount::mount(Some("overlay"), &merged, Some("overlay"), flags, Some(options.as_str()));
    mounted.is_ok() && umount2(&merged, MntFlags::MNT_DETACH).is_ok()
}

fn config(folder: &Path, version: Version, discard_layers: bool) -> Result<String> {
    let at = |name: &str| folder.join(name).display().to_string();
    let runc = parts::path("runc")?;
    let options = format!(
        "runtime_type = 'io.containerd.runc.v2'\n\
         options = {{ BinaryName = '{}', Root = '{}', SystemdCgroup = false }}\n",
        runc.display(),
        at("runc")
    );
    let common = format!(
        "root = '{}'\nstate = '{}'\noom_score = 0\n\
         disabled_plugins = ['io.containerd.snapshotter.v1.aufs', \
         'io.containerd.snapshotter.v1.btrfs', 'io.containerd.snapshotter.v1.zfs', \
         'io.containerd.snapshotter.v1.devmapper', 'io.containerd.nri.v1.nri', \
         'io.containerd.internal.v1.restart', 'io.containerd.monitor.container.v1.restart']\n\
         [grpc]\naddress = '{}'\n\
         [plugins.'io.containerd.internal.v1.opt']\npath = '{}'\n",
        at("root"),
        at("state"),
        at("c.sock"),
        at("opt"),
    );
    let (snapshotter, certs, cni) = (snapshotter(), at("certs.d"), at("cni"));
    let layers = format!("discard_unpacked_layers = {discard_layers}\n");
    if version == Version::V21 {
        let (images, runtime) =
            ("plugins.'io.containerd.cri.v1.images'", "plugins.'io.containerd.cri.v1.runtime'");
        return Ok(format!(
            "version = 3\n{common}\
             [plugins.'io.containerd.image-verifier.v1.bindir']\nbin_dir = '{}'\n\
             [{images}]\nsnapshotter = '{snapshotter}'\n{layers}\
             [{images}.pinned_images]\nsandbox = '{PAUSE}'\n\
             [{images}.registry]\nconfig_path = '{certs}'\n\
             [{runtime}]\nrestrict_oom_score_adj = true\ndisable_apparmor = true\n\
             [{runtime}.containerd.runtimes.runc]\n{options}\
             [{runtime}.cni]\nbin_dirs = ['{cni}']\nconf_dir = '{cni}'\n",
            at("verifiers"),
        ));
    }
    let cri = "plugins.'io.containerd.grpc.v1.cri'";
    Ok(format!(
        "version = 2\n{common}\
         [{cri}]\nsandbox_image = '{PAUSE}'\nrestrict_oom_score_adj = true\n\
         disable_apparmor = true\n\
         [{cri}.containerd]\nsnapshotter = '{snapshotter}'\n{layers}\
         [{cri}.containerd.runtimes.runc]\n{options}\
         [{cri}.registry]\nconfig_path = '{certs}'\n\
         [{cri}.cni]\nbin_dir = '{cni}'\nconf_dir = '{cni}'\n",
    ))
}

/// Ends and unmounts all that a dead test's world left: `folder` is the world's.
pub(crate) fn remove_leftovers(folder: &Path) {
    unmount_below(folder);
    let cgroup = folder.file_name().unwrap_or_default().to_string_lossy();
    remove_leftovers_of(&folder.join(FOLDER), &cgroup);
}

fn remove_leftovers_of(folder: &Path, cgroup: &str) {
    let groups = cgroups(cgroup);
    for group in groups.iter().flat_map(|group| with_children(group)) {
        for pid in fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default().lines() {
            kill_pid(pid);
        }
    }
    // Shims outlive containerd by design; they name its socket.
    wait::until_true_blocking(Duration::from_secs(5), || {
        let shims = shims(&socket(folder));
        shims.iter().for_each(|pid| kill_pid(pid));
        shims.is_empty()
    });
    for socket in shim_sockets(folder) {
        let _ = fs::remove_file(socket);
    }
    unmount_below(folder);
    wait::until_true_blocking(Duration::from_secs(5), || {
        for group in groups.iter().flat_map(|group| with_children(group)) {
            let _ = fs::remove_dir(group);
        }
        groups.iter().all(|group| !group.exists())
    });
}

fn kill_pid(pid: &str) {
    if let Ok(pid) = pid.trim().parse() {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
}

/// The cgroups of that name, under every controller (v1) or at the root (v2).
fn cgroups(name: &str) -> Vec<PathBuf> {
    let root = Path::new("/sys/fs/cgroup");
    let controllers = fs::read_dir(root).into_iter().flatten().flatten();
    controllers
        .map(|entry| entry.path())
        .chain([root.to_owned()])
        .map(|folder| folder.join(name))
        .filter(|group| group.is_dir())
        .collect()
}

/// A folder and all below it, children first.
fn with_children(folder: &Path) -> Vec<PathBuf> {
    let mut all = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            all.extend(with_children(&entry.path()));
        }
    }
    all.push(folder.to_owned());
    all
}

/// Process ids of shims that serve the containerd at `socket`.
fn shims(socket: &Path) -> Vec<String> {
    let socket = socket.display().to_string();
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    processes
        .filter(|entry| {
            let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).into_owned();
            let mut words = line.split('\0');
            words.next().is_some_and(|name| name.contains("containerd-shim"))
                && words.any(|word| word == socket)
        })
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

/// Shims listen below /run/containerd, whatever containerd's own state folder is.
fn shim_sockets(folder: &Path) -> Vec<PathBuf> {
    let tasks = folder.join("state/io.containerd.runtime.v2.task/k8s.io");
    let bundles = fs::read_dir(tasks).into_iter().flatten().flatten();
    bundles
        .flat_map(|bundle| ["address", "bootstrap.json"].map(|name| bundle.path().join(name)))
        .filter_map(|file| {
            let text = fs::read_to_string(file).ok()?;
            let (_, path) = text.split_once("unix://")?;
            Some(PathBuf::from(path.split('"').next()?.trim()))
        })
        .collect()
}

fn unmount_below(folder: &Path) {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut points: Vec<&Path> = mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(4).map(Path::new))
        .filter(|point| point.starts_with(folder))
        .collect();
    points.reverse();
    for point in points {
        let _ = umount2(point, MntFlags::MNT_DETACH);
    }
}
