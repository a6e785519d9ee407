//! The floor: an HTTP/2 proxy that passes bytes and knows nothing, in the place of the daemon.

use anyhow::Result;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use std::path::Path;
use tokio::net::{UnixListener, UnixStream};

/// Passes every request on `listen` to `upstream`, for ever.
pub async fn serve(listen: &Path, upstream: &Path) -> Result<()> {
    let listener = UnixListener::bind(listen)?;
    let stream = UnixStream::connect(upstream).await?;
    let executor = TokioExecutor::new;
    let (sender, connection) =
        hyper::client::conn::http2::handshake(executor(), TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    loop {
        let (stream, _) = listener.accept().await?;
        let sender = sender.clone();
        let pass = service_fn(move |request| sender.clone().send_request(request));
        let server = hyper::server::conn::http2::Builder::new(executor());
        tokio::spawn(server.serve_connection(TokioIo::new(stream), pass));
    }
}
