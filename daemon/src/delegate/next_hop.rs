//! The next CRI ImageService: containerd, or another proxy that stood there first.
//!
//! One HTTP/2 connection is shared by all calls and made anew whenever it is gone, for ever.

use std::path::{Path, PathBuf};

use http::{Request, Response, Uri, Version};
use hyper::body::Incoming;
use hyper::client::conn::http2::{Builder, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message;
use tokio::net::UnixStream;
use tokio::runtime::Handle;
use tokio::sync::Mutex;
use tonic::{Code, Status};

use super::body::{self, Body, Unary};
use crate::cri::messages::{ImageSpec, ImageStatusRequest, ImageStatusResponse};
use crate::http2;

/// A client of the next hop; shared by all requests.
pub struct NextHop {
    socket: PathBuf,
    runtime: Handle,
    connection: Mutex<Option<SendRequest<Body>>>,
}

impl NextHop {
    /// A client of the CRI server at `socket`, which need not be there yet. Its connection lives
    /// on `runtime`, whoever asks first.
    pub fn new(socket: PathBuf, runtime: Handle) -> Self {
        Self { socket, runtime, connection: Mutex::new(None) }
    }

    /// The socket's path.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Sends a request on, and gives the response as soon as its headers are there. Dropping
    /// either cancels the call at the next hop.
    ///
    /// # Errors
    /// `UNAVAILABLE` with the text that a gRPC client shows when the next hop itself is away.
    pub async fn send(&self, request: Request<Body>) -> Result<Response<Incoming>, Status> {
        let mut request = canonical(request);
        // A connection may turn out dead only when it is used; the request then comes back unsent.
        for _ in 0..3 {
            let mut connection = self.connection().await?;
            match connection.try_send_request(request).await {
                Ok(response) => return Ok(response),
                Err(mut error) => match error.take_message() {
                    Some(unsent) => request = unsent,
                    None => return Err(broken(error.error())),
                },
            }
            self.forget().await;
        }
        Err(Status::unavailable("the connection to the next hop closes before it takes a request"))
    }

    /// Asks, on the gate's own account, for the id of the image that is there under `name`.
    ///
    /// # Errors
    /// The next hop's.
    pub async fn image_id(&self, name: &str) -> Result<Option<String>, Status> {
        let spec = ImageSpec { image: name.to_owned(), ..Default::default() };
        let message = ImageStatusRequest { image: Some(spec) }.encode_to_vec();
        let request = Request::post("http://localhost/runtime.v1.ImageService/ImageStatus")
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(body::message(&message))
            .map_err(|error| Status::internal(error.to_string()))?;
        let (head, incoming) = self.send(request).await?.into_parts();
        let answer = Unary::read(incoming).await?;
        match answer
            .trailers
            .as_ref()
            .and_then(Status::from_header_map)
            .or_else(|| Status::from_header_map(&head.headers))
        {
            Some(status) if status.code() != Code::Ok => return Err(status),
            _ => {}
        }
        let status = ImageStatusResponse::decode(answer.message.unwrap_or_default())
            .map_err(|e| Status::internal(e.to_string()))?;
        Ok(status.image.map(|image| image.id))
    }

    async fn connection(&self) -> Result<SendRequest<Body>, Status> {
        let mut slot = self.connection.lock().await;
        if let Some(connection) = slot.as_ref().filter(|c| !c.is_closed()) {
            return Ok(connection.clone());
        }
        let connected = self.runtime.spawn(connect(self.socket.clone())).await;
        let connection = connected.unwrap_or_else(|_| Err(Status::unavailable("pullgate stops")))?;
        *slot = Some(connection.clone());
        Ok(connection)
    }

    async fn forget(&self) {
        let mut slot = self.connection.lock().await;
        if slot.as_ref().is_some_and(SendRequest::is_closed) {
            *slot = None;
        }
    }
}

async fn connect(socket: PathBuf) -> Result<SendRequest<Body>, Status> {
    let away = |error: std::io::Error| {
        // The words of grpc-go, so that logs and people recognise it.
        Status::unavailable(format!(
            "connection error: desc = \"transport: Error while dialing: dial unix {}: connect: {}\"",
            socket.display(),
            go_errno(&error),
        ))
    };
    let stream = UnixStream::connect(&socket).await.map_err(away)?;
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .initial_stream_window_size(http2::STREAM_WINDOW)
        .initial_connection_window_size(http2::CONNECTION_WINDOW)
        .max_header_list_size(http2::MAX_HEADER_LIST)
        .max_send_buf_size(http2::SEND_BUFFER);
    let (sender, connection) = builder.handshake(TokioIo::new(stream)).await.map_err(|e| broken(&e))?;
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "the connection to the next hop ended");
        }
    });
    Ok(sender)
}

/// HTTP/2 wants a scheme and an authority; gRPC clients on Unix sockets send odd ones or none.
fn canonical(mut request: Request<Body>) -> Request<Body> {
    *request.version_mut() = Version::HTTP_2;
    if request.uri().authority().is_none() || request.uri().scheme().is_none() {
        let path = request.uri().path_and_query().map_or("/", |p| p.as_str());
        if let Ok(uri) = Uri::builder().scheme("http").authority("localhost").path_and_query(path).build() {
            *request.uri_mut() = uri;
        }
    }
    request
}

fn broken(error: &hyper::Error) -> Status {
    Status::unavailable(format!("error reading from server: {error}"))
}

fn go_errno(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::NotFound => "no such file or directory".into(),
        std::io::ErrorKind::ConnectionRefused => "connection refused".into(),
        std::io::ErrorKind::PermissionDenied => "permission denied".into(),
        _ => error.to_string(),
    }
}
