//! Live reload: on SIGHUP, and when the configuration file changes (also by the symlink swap of
//! a ConfigMap). A file is read and checked whole, then put in force at once, or not at all.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use notify::event::{AccessKind, AccessMode};
use notify::{EventKind, RecursiveMode, Watcher};
use sd_notify::NotifyState;
use tokio::sync::mpsc;

use crate::config::{Config, ConfigErrors, Loaded, Strategy};
use crate::digest::Digest;
use crate::engine::{Active, Engine};
use crate::metrics::Metrics;
use crate::systemd;
use crate::verify::key::KeyUri;
use crate::verify::key::pins::Pins;

/// Writers replace files in several steps; their events are taken together.
const SETTLE: Duration = Duration::from_millis(100);
/// Files are looked at this often even if nobody tells of a change: some file systems never do.
const LOOK_ANYWAY: Duration = Duration::from_secs(60);
/// A refused file is tried again this often: what it names, such as a key, may come after it, in a
/// place that is not watched.
const TRY_AGAIN: Duration = Duration::from_secs(5);

/// Reloads the configuration.
pub struct Reloader {
    path: PathBuf,
    engine: Arc<Engine>,
    metrics: Arc<Metrics>,
    /// Held while a file is read and put in force: the last one read is the last one in force.
    reloading: Mutex<()>,
    /// Why the newest file is not in force.
    refused: Mutex<Option<String>>,
}

impl Reloader {
    /// Reloads `path` into `engine`.
    pub fn new(path: PathBuf, engine: Arc<Engine>, metrics: Arc<Metrics>) -> Self {
        let reloader = Self { path, engine, metrics, reloading: Mutex::default(), refused: Mutex::default() };
        reloader.succeeded();
        reloader
    }

    /// The configuration file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Why the newest file is not in force, if it is not.
    pub fn refused(&self) -> Option<String> {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Reads the file and puts it in force, or says why not and leaves the old policy.
    ///
    /// # Errors
    /// Why it is refused.
    pub fn reload(&self) -> Result<(), ConfigErrors> {
        let _alone = self.reloading.lock().unwrap_or_else(PoisonError::into_inner);
        systemd::notify_reloading();
        let loaded = Config::load(&self.path);
        let ended =
            loaded.map(|loaded| self.apply(loaded)).inspect_err(|errors| self.refuse(errors.to_string()));
        systemd::notify(&[NotifyState::Ready]);
        ended
    }

    /// [`Reloader::reload`], but a refusal that was told before is not told again.
    fn try_again(&self) {
        let _alone = self.reloading.lock().unwrap_or_else(PoisonError::into_inner);
        match Config::load(&self.path) {
            Ok(loaded) => self.apply(loaded),
            Err(errors) => {
                let text = errors.to_string();
                if self.refused().as_ref() != Some(&text) {
                    self.refuse(text);
                }
            }
        }
    }

    fn refuse(&self, text: String) {
        self.metrics.reloads.with_label_values(&["refused"]).inc();
        self.metrics.reload_ok.set(0);
        tracing::error!(
            message_id = crate::audit::POLICY_REFUSED,
            pullgate_policy = self.engine.active().fingerprint,
            "the new configuration is refused; the old policy stays in force: {text}",
        );
        *self.refused.lock().unwrap_or_else(PoisonError::into_inner) = Some(text);
    }

    fn apply(&self, loaded: Loaded) {
        for warning in &loaded.warnings {
            tracing::warn!("{warning}");
        }
        let old = self.engine.active();
        for field in needs_restart(&old.config, &loaded.config) {
            tracing::warn!("`{field}` has changed; it takes effect after a restart");
        }
        let pins = Pins::in_directory(loaded.config.state_dir.join("keys"));
        let active = Active::build(loaded, Some(&old), pins, &self.metrics);
        tracing::info!(
            message_id = crate::audit::POLICY_LOADED,
            pullgate_policy = active.fingerprint,
            "the configuration was reloaded: {} rules",
            active.config.policy.rules().len(),
        );
        self.engine.activate(active);
        *self.refused.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.metrics.reloads.with_label_values(&["ok"]).inc();
        self.succeeded();
    }

    fn succeeded(&self) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.metrics.reload_ok.set(1);
        self.metrics.reload_time.set(now.as_secs() as i64);
    }

    /// Reloads whenever the file, or a key file that it names, has changed. Ends when the
    /// daemon does.
    pub async fn watch(self: Arc<Self>) {
        let (changed, mut changes) = mpsc::channel(1);
        let Some(mut watcher) = self.watcher(changed) else { return };
        let mut watched = BTreeMap::new();
        let mut seen = BTreeMap::new();
        loop {
            // First watched, then read: nothing is missed in between.
            self.follow(&mut watcher, &mut watched);
            let now = self.contents();
            let has_changed = |(file, text): (&PathBuf, &Option<Vec<u8>>)| match seen.get(file) {
                Some(before) => before != text,
                // The file may have changed since the daemon started with it.
                None => *file == self.path && !self.is_in_force(text.as_deref()),
            };
            if now.iter().any(has_changed) {
                // A refusal was told.
                let _ = self.reload();
                self.follow(&mut watcher, &mut watched);
            } else if self.refused().is_some() {
                self.try_again();
            }
            if now.keys().any(|file| !seen.contains_key(file)) {
                // A key that was read before it was watched may have been replaced since.
                self.engine.active().keys.forget();
            }
            seen = now;
            let pause = if self.refused().is_some() { TRY_AGAIN } else { LOOK_ANYWAY };
            tokio::select! {
                change = changes.recv() => match change {
                    Some(()) => tokio::time::sleep(SETTLE).await,
                    None => return,
                },
                () = tokio::time::sleep(pause) => {}
            }
            let _ = changes.try_recv();
        }
    }

    /// Watches the directories of all files, and no others. One that is watched already may have
    /// been replaced by another of that name, so it is watched again.
    fn follow(&self, watcher: &mut impl Watcher, watched: &mut BTreeMap<PathBuf, bool>) {
        let wanted = self.directories();
        for gone in watched.keys().filter(|directory| !wanted.contains(*directory)) {
            // It may not even be there any more.
            let _ = watcher.unwatch(gone);
        }
        watched.retain(|directory, _| wanted.contains(directory));
        for directory in wanted {
            let failed = watcher.watch(&directory, RecursiveMode::NonRecursive).err();
            let was_well = watched.insert(directory.clone(), failed.is_none()).unwrap_or(true);
            if let Some(error) = failed.filter(|_| was_well) {
                tracing::warn!(
                    directory = %directory.display(), %error,
                    "changes are only noticed within {} s; `pullgate reload` does it at once", LOOK_ANYWAY.as_secs()
                );
            }
        }
    }

    fn is_in_force(&self, text: Option<&[u8]>) -> bool {
        text.is_some_and(|text| Digest::sha256(text).hex().starts_with(&self.engine.active().fingerprint))
    }

    fn watcher(&self, changed: mpsc::Sender<()>) -> Option<notify::RecommendedWatcher> {
        // A full channel means that a look is due anyway.
        let on_event = move |event: notify::Result<notify::Event>| {
            if !event.is_ok_and(|event| is_reading(event.kind)) {
                let _ = changed.try_send(());
            }
        };
        match notify::recommended_watcher(on_event) {
            Ok(watcher) => Some(watcher),
            Err(error) => {
                tracing::warn!(%error, "file changes can't be watched; use `pullgate reload`");
                None
            }
        }
    }

    /// The configuration file and the key files.
    fn files(&self) -> Vec<PathBuf> {
        let active = self.engine.active();
        let keys = active.config.policy.rules().iter().filter_map(|rule| match &rule.strategy {
            Strategy::Signed(signed_by) | Strategy::Dev(signed_by) => match &signed_by.key {
                KeyUri::File(path) => Some(path.clone()),
                _ => None,
            },
            _ => None,
        });
        let mut files: Vec<PathBuf> = keys.chain([self.path.clone()]).collect();
        files.sort();
        files.dedup();
        files
    }

    fn contents(&self) -> BTreeMap<PathBuf, Option<Vec<u8>>> {
        self.files().into_iter().map(|file| (file.clone(), std::fs::read(file).ok())).collect()
    }

    /// Where the files are, and where symbolic links to them lead.
    fn directories(&self) -> BTreeSet<PathBuf> {
        let parent = |file: PathBuf| match file.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        let targets = self.files().into_iter().filter_map(|file| file.canonicalize().ok());
        self.files().into_iter().chain(targets).map(parent).collect()
    }
}

/// Whether somebody has only looked at a file, as this module does all the time.
fn is_reading(event: EventKind) -> bool {
    matches!(event, EventKind::Access(access) if access != AccessKind::Close(AccessMode::Write))
}

/// The fields whose change a running daemon does not follow.
fn needs_restart(old: &Config, new: &Config) -> Vec<&'static str> {
    [
        ("listen", old.listen != new.listen),
        ("admin", old.admin != new.admin),
        ("stateDir", old.state_dir != new.state_dir),
        ("containerd.address", old.containerd.address != new.containerd.address),
        ("containerd.imageEndpoint", old.containerd.image_endpoint != new.containerd.image_endpoint),
        ("containerd.namespace", old.containerd.namespace != new.containerd.namespace),
        ("metrics", old.metrics != new.metrics),
        ("allowedUIDs", old.allowed_uids != new.allowed_uids),
        ("runtimeService", old.runtime_service != new.runtime_service),
        (
            "limits.concurrentVerifications",
            old.limits.concurrent_verifications != new.limits.concurrent_verifications,
        ),
    ]
    .into_iter()
    .filter_map(|(field, changed)| changed.then_some(field))
    .collect()
}
