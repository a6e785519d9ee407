//! HTTP bodies that are passed on, and bodies that are held whole for a moment.

use bytes::Bytes;
use http::HeaderMap;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty, Full, Limited};
use hyper::body::Incoming;
use tonic::Status;

use crate::cri::wire;

/// A body on its way through, streamed frame by frame or held whole.
pub type Body = UnsyncBoxBody<Bytes, hyper::Error>;

/// A body that was read whole: its gRPC message, if it has one, and its trailers.
pub struct Unary {
    /// The message without its frame; an error has none.
    pub message: Option<Bytes>,
    /// The trailers (`grpc-status`, `grpc-message`, details).
    pub trailers: Option<HeaderMap>,
}

impl Unary {
    /// Reads a unary body of at most one message of the size that containerd takes.
    ///
    /// # Errors
    /// The status that a gRPC server gives for such a body.
    pub async fn read(incoming: Incoming) -> Result<Self, Status> {
        let limited = Limited::new(incoming, wire::MAX_MESSAGE + wire::FRAME_HEADER);
        let collected = limited.collect().await.map_err(|error| {
            match error.downcast_ref::<http_body_util::LengthLimitError>() {
                Some(_) => Status::resource_exhausted("the message is larger than 16 MiB"),
                None => Status::unavailable(format!("the stream ended: {error}")),
            }
        })?;
        let trailers = collected.trailers().cloned();
        let bytes = collected.to_bytes();
        let message = if bytes.is_empty() { None } else { Some(wire::unframe(bytes)?) };
        Ok(Self { message, trailers })
    }

    /// Reads the body of a unary request.
    ///
    /// # Errors
    /// As [`Self::read`], and when there is no message.
    pub async fn request(incoming: Incoming) -> Result<Bytes, Status> {
        Self::read(incoming).await?.message.ok_or_else(|| Status::internal("a unary call without a message"))
    }

    /// The body again, as it was read.
    pub fn into_body(self) -> Body {
        let framed = Full::new(self.message.map(|message| wire::frame(&message)).unwrap_or_default());
        let trailers = self.trailers.map(Ok);
        framed.with_trailers(std::future::ready(trailers)).map_err(|never| match never {}).boxed_unsync()
    }
}

/// A body of one gRPC message.
pub fn message(message: &[u8]) -> Body {
    Full::new(wire::frame(message)).map_err(|never| match never {}).boxed_unsync()
}

/// No body.
pub fn empty() -> Body {
    Empty::new().map_err(|never| match never {}).boxed_unsync()
}
