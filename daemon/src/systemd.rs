//! What systemd is told: ready, reloading, stopping, and that the request path is alive.

use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http_body_util::Empty;
use hyper_util::rt::{TokioExecutor, TokioIo};
use sd_notify::NotifyState;
use tokio::net::UnixStream;
use tonic::{Code, Status};

/// Tells systemd; without systemd nothing happens.
pub fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(false, states) {
        tracing::debug!(%error, "systemd could not be notified");
    }
}

/// `RELOADING=1`, with the clock that `Type=notify-reload` wants.
pub fn notify_reloading() {
    let now = NotifyState::monotonic_usec_now();
    match now {
        Ok(now) => notify(&[NotifyState::Reloading, now]),
        Err(_) => notify(&[NotifyState::Reloading]),
    }
}

/// Feeds the watchdog for as long as the gate answers on its own socket: the listener accepts,
/// the connection is served, the router routes. containerd is not asked: a restart of pullgate
/// would not mend it.
pub async fn feed_watchdog(socket: PathBuf) {
    let mut microseconds = 0;
    if !sd_notify::watchdog_enabled(false, &mut microseconds) {
        return;
    }
    let period = Duration::from_micros(microseconds) / 3;
    let mut ticks = tokio::time::interval(period);
    loop {
        ticks.tick().await;
        match tokio::time::timeout(period, probe(&socket)).await {
            Ok(Ok(())) => notify(&[NotifyState::Watchdog]),
            Ok(Err(why)) => tracing::error!("the gate does not answer on its own socket: {why}"),
            Err(_) => tracing::error!("the gate does not answer on its own socket in time"),
        }
    }
}

/// A call of a service that the router does not know: it answers `UNIMPLEMENTED` by itself.
async fn probe(socket: &PathBuf) -> Result<(), String> {
    let stream = UnixStream::connect(socket).await.map_err(|e| e.to_string())?;
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .map_err(|e| e.to_string())?;
    tokio::spawn(connection);
    let request =
        Request::post("http://localhost/pullgate.Probe/Ping").header("content-type", "application/grpc");
    let request = request.body(Empty::<Bytes>::new()).map_err(|e| e.to_string())?;
    let response = sender.send_request(request).await.map_err(|e| e.to_string())?;
    match Status::from_header_map(response.headers()) {
        Some(status) if status.code() == Code::Unimplemented => Ok(()),
        other => Err(format!("an unexpected answer: {other:?}")),
    }
}
