//! Serving: connections are accepted, their peer is checked, their requests are routed.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::graceful::GracefulShutdown;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;

use super::Listener;
use crate::delegate::body::Body;
use crate::http2;

/// Turns false when the daemon is to stop.
pub type Running = watch::Receiver<bool>;

/// Waits until the daemon is to stop.
pub async fn stopped(running: &mut Running) {
    // The sender's end is the daemon's end.
    let _ = running.wait_for(|running| !running).await;
}

/// Serves gRPC on `listener` until `running` ends, then lets what is in flight finish, for
/// `drain` at most. Says whether everything finished.
pub async fn grpc<A, F>(
    listener: Listener,
    uids: Vec<u32>,
    mut running: Running,
    drain: Duration,
    answer: A,
) -> bool
where
    A: Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Response<Body>> + Send + 'static,
{
    // It was bound on another runtime; its events are to come to this one.
    let listener = match listener.here() {
        Ok(listener) => listener,
        Err(error) => {
            tracing::error!(%error, "the gate's socket can't be served");
            return false;
        }
    };
    let graceful = GracefulShutdown::new();
    loop {
        let stream = tokio::select! {
            stream = accept(&listener.socket, &uids) => stream,
            () = stopped(&mut running) => break,
        };
        let answer = answer.clone();
        let service = service_fn(move |request| {
            let response = answer(request);
            async move { Ok::<_, Infallible>(response.await) }
        });
        let mut http = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
        http.initial_stream_window_size(http2::STREAM_WINDOW)
            .initial_connection_window_size(http2::CONNECTION_WINDOW)
            .max_header_list_size(http2::MAX_HEADER_LIST)
            .max_send_buf_size(http2::SEND_BUFFER)
            .max_concurrent_streams(http2::MAX_STREAMS)
            .max_pending_accept_reset_streams(http2::MAX_RESET_STREAMS)
            .max_local_error_reset_streams(http2::MAX_RESET_STREAMS)
            .auto_date_header(false);
        let connection = graceful.watch(http.serve_connection(TokioIo::new(stream), service));
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection ended");
            }
        });
    }
    listener.remove();
    drop(listener);
    tokio::time::timeout(drain, graceful.shutdown()).await.is_ok()
}

/// The next connection of a user who may speak here. The daemon itself may: it looks whether it
/// answers.
pub async fn accept(socket: &UnixListener, uids: &[u32]) -> UnixStream {
    let own = nix::unistd::geteuid();
    loop {
        match socket.accept().await {
            Ok((stream, _)) => match stream.peer_cred() {
                Ok(peer) if uids.contains(&peer.uid()) || own.as_raw() == peer.uid() => return stream,
                Ok(peer) => tracing::warn!(
                    uid = peer.uid(),
                    pid = peer.pid(),
                    "a connection of another user was refused"
                ),
                Err(error) => tracing::warn!(%error, "a connection whose user is unknown was refused"),
            },
            Err(error) => {
                // Out of file descriptors, most likely: others may be closed meanwhile.
                tracing::error!(%error, "a connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Serves HTTP/1 on a Unix socket, for people and their tools.
pub async fn http1<A, F, B>(listener: Listener, uids: Vec<u32>, mut running: Running, answer: A)
where
    A: Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Response<B>> + Send + 'static,
    B: hyper::body::Body<Error = Infallible> + Send + 'static,
    B::Data: Send,
{
    loop {
        let stream = tokio::select! {
            stream = accept(&listener.socket, &uids) => stream,
            () = stopped(&mut running) => break,
        };
        tokio::spawn(http1_connection(TokioIo::new(stream), Arc::new(answer.clone())));
    }
    listener.remove();
}

/// Serves one HTTP/1 connection.
pub async fn http1_connection<I, A, F, B>(io: I, answer: Arc<A>)
where
    I: hyper::rt::Read + hyper::rt::Write + Unpin,
    A: Fn(Request<Incoming>) -> F,
    F: Future<Output = Response<B>>,
    B: hyper::body::Body<Error = Infallible> + 'static,
{
    let service = service_fn(|request| {
        let response = answer(request);
        async move { Ok::<_, Infallible>(response.await) }
    });
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(hyper_util::rt::TokioTimer::new()).header_read_timeout(Duration::from_secs(10));
    if let Err(error) = http.serve_connection(io, service).await {
        tracing::debug!(%error, "an HTTP connection ended");
    }
}
