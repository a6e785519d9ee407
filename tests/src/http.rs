//! One plain HTTP request on loopback, or on a Unix socket.

use anyhow::{Context, Result};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use std::net::SocketAddr;
use std::path::Path;
use tokio::io::{AsyncRead, AsyncWrite};

/// A whole answer.
#[derive(Debug)]
pub struct Answer {
    /// The status code.
    pub status: StatusCode,
    /// The headers.
    pub headers: hyper::HeaderMap,
    /// The whole body.
    pub body: Bytes,
}

impl Answer {
    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as JSON.
    pub fn json(&self) -> Result<serde_json::Value> {
        serde_json::from_slice(&self.body).with_context(|| format!("not JSON: {}", self.text()))
    }

    /// A header's value, or nothing.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }
}

/// Sends a request over a connection of its own; the answer's body is still streaming.
pub async fn stream<B>(address: SocketAddr, request: Request<B>) -> Result<Response<Incoming>>
where
    B: hyper::body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let socket = tokio::net::TcpStream::connect(address).await?;
    socket.set_nodelay(true)?;
    over(socket, request).await
}

async fn over<S, B>(socket: S, request: Request<B>) -> Result<Response<Incoming>>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    B: hyper::body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(socket)).await?;
    tokio::spawn(connection);
    Ok(sender.send_request(request).await?)
}

/// Sends a request and reads the whole answer, whatever its status.
pub async fn send(
    address: SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: impl Into<Bytes>,
) -> Result<Answer> {
    let mut request = Request::builder().method(method).uri(path);
    if !headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("host")) {
        request = request.header("host", address.to_string());
    }
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    whole(stream(address, request.body(Full::new(body.into()))?).await?).await
}

async fn whole(answer: Response<Incoming>) -> Result<Answer> {
    let (head, body) = answer.into_parts();
    Ok(Answer { status: head.status, headers: head.headers, body: body.collect().await?.to_bytes() })
}

/// GET, for what a daemon tells about itself.
pub async fn get(address: SocketAddr, path: &str) -> Result<Answer> {
    send(address, "GET", path, &[], Bytes::new()).await
}

/// [`get`] on a Unix socket.
pub async fn get_unix(socket: &Path, path: &str) -> Result<Answer> {
    let request = Request::get(path).header("host", "localhost").body(Full::<Bytes>::default())?;
    whole(over(tokio::net::UnixStream::connect(socket).await?, request).await?).await
}
