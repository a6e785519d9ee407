//! gRPC by hand, over a Unix socket: for what no generated client would send, and to see headers,
//! frames and trailers as they come.

use anyhow::{Context, Result};
use bytes::{BufMut, Bytes, BytesMut};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http2::{SendRequest, handshake};
use hyper::{HeaderMap, Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use std::path::Path;
use tokio::net::UnixStream;
use tonic::Status;

/// The flag of compression and the length.
const FRAME_HEADER: usize = 5;

/// A message as a gRPC frame.
pub fn frame(message: &[u8]) -> Bytes {
    let mut framed = BytesMut::with_capacity(FRAME_HEADER + message.len());
    framed.put_u8(0);
    framed.put_u32(u32::try_from(message.len()).unwrap_or(u32::MAX));
    framed.put_slice(message);
    framed.freeze()
}

/// The messages of a body.
pub fn messages(mut body: Bytes) -> Result<Vec<Bytes>> {
    let mut found = Vec::new();
    while !body.is_empty() {
        let header = body.split_to_checked(FRAME_HEADER)?;
        let length = header.get(1..).and_then(|length| length.try_into().ok()).map(u32::from_be_bytes);
        found.push(body.split_to_checked(length.context("a frame header")? as usize)?);
    }
    Ok(found)
}

trait SplitChecked {
    fn split_to_checked(&mut self, at: usize) -> Result<Bytes>;
}

impl SplitChecked for Bytes {
    fn split_to_checked(&mut self, at: usize) -> Result<Bytes> {
        anyhow::ensure!(at <= self.len(), "the body ends inside a frame");
        Ok(self.split_to(at))
    }
}

/// A whole answer.
#[derive(Debug)]
pub struct Answer {
    /// The initial metadata, or all there is when nothing but a status was answered.
    pub headers: HeaderMap,
    /// The messages.
    pub messages: Vec<Bytes>,
    /// The trailing metadata.
    pub trailers: HeaderMap,
}

impl Answer {
    /// Reads an answer to its end.
    pub async fn of(response: Response<Incoming>) -> Result<Self> {
        let (head, body) = response.into_parts();
        let body = body.collect().await?;
        let trailers = body.trailers().cloned().unwrap_or_default();
        Ok(Self { headers: head.headers, messages: messages(body.to_bytes())?, trailers })
    }

    /// The status, of the trailers or of the headers.
    pub fn status(&self) -> Status {
        let status = [&self.trailers, &self.headers].into_iter().find_map(Status::from_header_map);
        status.unwrap_or_else(|| Status::internal("an answer without grpc-status"))
    }

    /// The one message of a call that succeeded.
    pub fn message(&self) -> Result<&Bytes> {
        let status = self.status();
        anyhow::ensure!(status.code() == tonic::Code::Ok, "{status:?}");
        self.messages.first().context("no message")
    }
}

/// One connection.
pub struct Client {
    sender: SendRequest<Full<Bytes>>,
    socket: std::os::unix::net::UnixStream,
}

impl Client {
    /// Connects to a socket.
    pub async fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).await?.into_std()?;
        let socket = stream.try_clone()?;
        let io = TokioIo::new(UnixStream::from_std(stream)?);
        let (sender, connection) = handshake(TokioExecutor::new(), io).await?;
        tokio::spawn(connection);
        Ok(Self { sender, socket })
    }

    /// Sends a call whose body is these bytes, whatever they are; the answer is still streaming.
    pub async fn send(
        &self,
        method: &str,
        metadata: &[(&str, &str)],
        body: impl Into<Bytes>,
    ) -> Result<Response<Incoming>> {
        let mut request = Request::post(format!("http://localhost/{method}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers");
        for (name, value) in metadata {
            request = request.header(*name, *value);
        }
        let mut sender = self.sender.clone();
        sender.ready().await?;
        Ok(sender.send_request(request.body(Full::new(body.into()))?).await?)
    }

    /// Sends one message and reads the whole answer.
    pub async fn call(&self, method: &str, metadata: &[(&str, &str)], message: &[u8]) -> Result<Answer> {
        Answer::of(self.send(method, metadata, frame(message)).await?).await
    }

    /// Whether the server has closed the connection, or said that it takes no more calls (GOAWAY).
    pub fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }

    /// Breaks the connection off, as the kernel does it for a process that was killed.
    pub fn hang_up(self) -> Result<()> {
        Ok(self.socket.shutdown(std::net::Shutdown::Both)?)
    }
}

/// One call on a connection of its own.
pub async fn call(socket: &Path, method: &str, metadata: &[(&str, &str)], message: &[u8]) -> Result<Answer> {
    Client::connect(socket).await?.call(method, metadata, message).await
}
