//! `/metrics`, `/healthz` (alive) and `/readyz` (policy loaded, the next hop answers).

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::gate::Gate;
use crate::listener::serve::{self, Running};

/// Connections at once to the TCP socket.
const MOST_CONNECTIONS: usize = 32;

/// Serves on a TCP socket until `running` ends.
pub async fn tcp(socket: TcpListener, mut running: Running, gate: Arc<Gate>) {
    let places = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    loop {
        // Anybody on the node may connect: they wait for each other, never the gate for them.
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let stream = tokio::select! {
            accepted = socket.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::error!(%error, "a metrics connection could not be accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
            () = serve::stopped(&mut running) => return,
        };
        let gate = Arc::clone(&gate);
        let answer = move |request| answer(Arc::clone(&gate), request);
        tokio::spawn(async move {
            serve::http1_connection(TokioIo::new(stream), Arc::new(answer)).await;
            drop(place);
        });
    }
}

/// Answers one request.
pub async fn answer<B>(gate: Arc<Gate>, request: Request<B>) -> Response<Full<Bytes>> {
    let (status, text) = match request.uri().path() {
        "/healthz" => (StatusCode::OK, Bytes::from_static(b"ok\n")),
        "/readyz" => match gate.is_ready().await {
            Ok(()) => (StatusCode::OK, Bytes::from_static(b"ok\n")),
            Err(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n").into()),
        },
        "/metrics" => {
            gate.engine.store().count_entries();
            match gate.metrics.text() {
                Ok(text) => (StatusCode::OK, text.into()),
                Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n").into()),
            }
        }
        _ => (StatusCode::NOT_FOUND, Bytes::from_static(b"/metrics, /healthz, /readyz\n")),
    };
    plain(status, text)
}

fn plain(status: StatusCode, text: Bytes) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::<Bytes>::new(text));
    *response.status_mut() = status;
    let plain = header::HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, plain);
    response
}
