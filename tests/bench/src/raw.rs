//! Clients that cost next to nothing, the same for all arms.

use anyhow::{Context, Result, bail, ensure};
use bytes::{BufMut, Bytes, BytesMut};
use http_body_util::{BodyExt, Empty, Full};
use hyper::{Method, Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message;
use pullgate_tests::Pushed;
use std::net::SocketAddr;
use std::path::Path;
use tokio::net::{TcpStream, UnixStream};

/// A gRPC client that reads the whole answer and decodes nothing of it.
pub struct Grpc(hyper::client::conn::http2::SendRequest<Full<Bytes>>);

impl Grpc {
    pub async fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).await?;
        let (sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        Ok(Self(sender))
    }

    /// Calls a method of `runtime.v1.ImageService`; how many bytes the answer had.
    pub async fn call(&mut self, method: &str, message: &impl Message) -> Result<usize> {
        let message = message.encode_to_vec();
        let mut frame = BytesMut::with_capacity(message.len() + 5);
        frame.put_u8(0);
        frame.put_u32(u32::try_from(message.len())?);
        frame.put_slice(&message);
        let request = Request::post(format!("http://localhost/runtime.v1.ImageService/{method}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(Full::new(frame.freeze()))?;
        let response = self.0.send_request(request).await?;
        let refused = response.headers().get("grpc-status").cloned();
        let body = response.into_body().collect().await?;
        let status = refused.or_else(|| body.trailers()?.get("grpc-status").cloned());
        ensure!(status.as_ref().is_some_and(|status| status == "0"), "{method}: status {status:?}");
        Ok(body.to_bytes().len())
    }
}

/// A registry client on one warm connection.
pub struct Http {
    sender: hyper::client::conn::http1::SendRequest<Empty<Bytes>>,
    host: String,
}

impl Http {
    pub async fn connect(address: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        Ok(Self { sender, host: address.to_string() })
    }

    /// The fewest requests that bring a signed image's evidence: its digest, its `.sig` manifest,
    /// the payload. Nothing is verified.
    pub async fn fetch_evidence(&mut self, image: &Pushed) -> Result<Bytes> {
        let manifests = format!("/v2/{}/manifests", image.repository);
        let (head, _) = self.send(Method::HEAD, &format!("{manifests}/{}", image.tag)).await?.into_parts();
        let digest = head.headers.get("docker-content-digest").context("no digest")?.to_str()?;
        let tag = format!("{}.sig", digest.replace(':', "-"));
        let manifest = self.send(Method::GET, &format!("{manifests}/{tag}")).await?.into_body();
        let manifest: serde_json::Value = serde_json::from_slice(&manifest)?;
        let payload = manifest["layers"][0]["digest"].as_str().context("no payload")?;
        let path = format!("/v2/{}/blobs/{payload}", image.repository);
        Ok(self.send(Method::GET, &path).await?.into_body())
    }

    async fn send(&mut self, method: Method, path: &str) -> Result<Response<Bytes>> {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", &self.host)
            .header("accept", "application/vnd.oci.image.manifest.v1+json, */*")
            .body(Empty::new())?;
        self.sender.ready().await?;
        let (head, body) = self.sender.send_request(request).await?.into_parts();
        let body = body.collect().await?.to_bytes();
        if !head.status.is_success() {
            bail!("{path}: {}", head.status);
        }
        Ok(Response::from_parts(head, body))
    }
}
