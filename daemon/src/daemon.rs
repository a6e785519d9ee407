//! `pullgate run`: start, serve, stop.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

use crate::admin::Admin;
use crate::audit::{POLICY_LOADED, logging};
use crate::cli::{Ended, OK, TRANSIENT, USAGE};
use crate::config::{Config, Loaded, MetricsListen};
use crate::cri::router;
use crate::engine::{Active, Engine};
use crate::gate::Gate;
use crate::listener::edge::Edge;
use crate::listener::serve::{self, Running};
use crate::listener::{Activated, Listener};
use crate::metrics::{Metrics, server};
use crate::reload::Reloader;
use crate::store::{Lifetimes, VerdictStore};
use crate::systemd;
use crate::verify::key::pins::Pins;

/// Calls in flight at a stop may take this long (the unit's TimeoutStopSec is longer).
const DRAIN: Duration = Duration::from_secs(25);
/// One part of the verdicts is swept this often: all of them in three quarters of an hour.
const SWEEP: Duration = Duration::from_secs(10);
/// Who may speak to the admin socket, whoever may speak to the gate.
const ADMINS: &[u32] = &[0];
/// Threads for verification, beside the edge's. A node has many cores and few pulls.
const MOST_WORKERS: usize = 4;

/// Runs the daemon until it is told to stop.
pub fn run(config: &Path) -> Ended {
    logging::for_daemon();
    crate::process::prepare();
    let loaded = Config::load(config).map_err(|errors| (USAGE, errors.to_string()))?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(cores.min(MOST_WORKERS))
        .enable_all()
        .build()
        .map_err(|error| (TRANSIENT, format!("the runtime can't be started: {error}")))?;
    let edge = Edge::start().map_err(|error| (TRANSIENT, format!("a thread can't be started: {error}")))?;
    let ended = runtime.block_on(serve(config.to_owned(), loaded, &edge));
    // Verifications that nobody waits for any more must not hold up the exit.
    runtime.shutdown_timeout(Duration::from_millis(200));
    ended
}

async fn serve(path: PathBuf, loaded: Loaded, edge: &Edge) -> Ended {
    let usage = |text: String| (USAGE, text);
    for warning in &loaded.warnings {
        tracing::warn!("{warning}");
    }
    let mut signals = Signals::new().map_err(|error| usage(format!("signals can't be handled: {error}")))?;
    let mut activated = Activated::take().map_err(usage)?;
    let gate_socket = activated.listen(&loaded.config.listen).await.map_err(usage)?;
    let admin_socket = activated.listen(&loaded.config.admin).await.map_err(usage)?;
    for path in activated.left_over() {
        tracing::warn!(path = %path.display(), "systemd passed a socket that the configuration does not name");
    }
    let metrics_socket = MetricsSocket::bind(&loaded.config.metrics).await.map_err(usage)?;

    let metrics = Arc::new(Metrics::new().map_err(|error| usage(error.to_string()))?);
    let state = loaded.config.state_dir.clone();
    let store = {
        let (state, metrics) = (state.clone(), Arc::clone(&metrics));
        let open = move || VerdictStore::open(&state, metrics);
        Arc::new(tokio::task::spawn_blocking(open).await.map_err(|e| usage(e.to_string()))?)
    };
    let active = Active::build(loaded, None, Pins::in_directory(state.join("keys")), &metrics);
    let uids = active.config.allowed_uids.clone();
    tracing::info!(
        message_id = POLICY_LOADED,
        pullgate_policy = active.fingerprint,
        "pullgate {} starts with {} rules",
        env!("CARGO_PKG_VERSION"),
        active.config.policy.rules().len(),
    );
    let engine = Arc::new(Engine::new(active, Arc::clone(&store), Arc::clone(&metrics)));
    let gate = Arc::new(Gate::new(Arc::clone(&engine), Arc::clone(&metrics), edge.runtime().clone()));
    let reloader = Arc::new(Reloader::new(path, Arc::clone(&engine), Arc::clone(&metrics)));

    let (stop, running) = watch::channel(true);
    let gate_path = gate_socket.path.clone();
    let route = {
        let gate = Arc::clone(&gate);
        move |request| router::route(Arc::clone(&gate), request)
    };
    let serving = edge.runtime().spawn(serve::grpc(gate_socket, uids.clone(), running.clone(), DRAIN, route));
    let admin = Arc::new(Admin::new(Arc::clone(&gate), Arc::clone(&reloader)));
    let answer = move |request| Arc::clone(&admin).answer(request);
    tokio::spawn(serve::http1(admin_socket, ADMINS.to_vec(), running.clone(), answer));
    metrics_socket.serve(uids, running, Arc::clone(&gate));
    tokio::spawn(sweep(Arc::clone(&engine)));
    tokio::spawn(Arc::clone(&reloader).watch());
    tokio::spawn(systemd::feed_watchdog(gate_path));
    systemd::notify(&[NotifyState::Ready]);

    signals.until_stop(&reloader).await;
    systemd::notify(&[NotifyState::Stopping]);
    tracing::info!("pullgate stops; calls in flight are finished first");
    stop.send_replace(false);
    tokio::select! {
        drained = serving => if !drained.unwrap_or(false) {
            tracing::warn!("calls were still in flight after {} s", DRAIN.as_secs());
        },
        () = signals.stop() => tracing::warn!("told to stop again: calls in flight are dropped"),
    }
    // Flushing is the last word: it may block for as long as the disk does.
    let flushed = tokio::task::spawn_blocking(move || store.flush());
    flushed.await.map(|()| OK).map_err(|error| (TRANSIENT, error.to_string()))
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hang_up: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hang_up: signal(SignalKind::hangup())?,
        })
    }

    /// Reloads at every SIGHUP until SIGTERM or SIGINT.
    async fn until_stop(&mut self, reloader: &Reloader) {
        loop {
            tokio::select! {
                _ = self.terminate.recv() => return,
                _ = self.interrupt.recv() => return,
                // A refusal is told by the reloader.
                _ = self.hang_up.recv() => drop(reloader.reload()),
            }
        }
    }

    /// Waits for SIGTERM or SIGINT.
    async fn stop(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

enum MetricsSocket {
    Tcp(TcpListener),
    Unix(Listener),
    Off,
}

impl MetricsSocket {
    async fn bind(listen: &MetricsListen) -> Result<Self, String> {
        match listen {
            MetricsListen::Off => Ok(Self::Off),
            MetricsListen::Unix(path) => Activated::none().listen(path).await.map(Self::Unix),
            MetricsListen::Tcp(address) => TcpListener::bind(address).await.map(Self::Tcp).map_err(|error| {
                format!("metrics.listen {address} can't be bound: {error}; set another address, or \"off\"")
            }),
        }
    }

    fn serve(self, uids: Vec<u32>, running: Running, gate: Arc<Gate>) {
        match self {
            Self::Off => {}
            Self::Tcp(socket) => drop(tokio::spawn(server::tcp(socket, running, gate))),
            Self::Unix(listener) => {
                let answer = move |request| server::answer(Arc::clone(&gate), request);
                tokio::spawn(serve::http1(listener, uids, running, answer));
            }
        }
    }
}

/// Drops expired verdicts, a 256th of them at a time; all at once only where there are too many.
async fn sweep(engine: Arc<Engine>) {
    let mut ticks = tokio::time::interval(SWEEP);
    ticks.tick().await;
    for part in (0..=u8::MAX).cycle() {
        ticks.tick().await;
        let engine = Arc::clone(&engine);
        let swept = tokio::task::spawn_blocking(move || {
            let active = engine.active();
            let (store, cache) = (engine.store(), &active.config.cache);
            store.count_once();
            match store.size().1 > cache.max_entries {
                true => store.sweep(&Lifetimes::from(cache), cache.max_entries),
                false => store.sweep_part(part, &Lifetimes::from(cache)),
            }
        });
        if let Err(error) = swept.await {
            tracing::error!(%error, "the sweep of expired verdicts ended early");
        }
    }
}
