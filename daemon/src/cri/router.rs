//! Which of the caller's methods are gates, which pass, and which are unknown here.

use std::sync::Arc;

use http::{Request, Response};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use tonic::Status;

use super::{image_status, pull_image};
use crate::config::RuntimeService;
use crate::delegate::body::{self, Body};
use crate::gate::Gate;

const IMAGE_SERVICE: &str = "/runtime.v1.ImageService/";
const RUNTIME_SERVICE: &str = "/runtime.v1.RuntimeService/";

/// Answers one gRPC request.
///
/// Everything but the two gates goes to the next hop as it came: no message of it is decoded.
/// Older or foreign services (`runtime.v1alpha2`, containerd's own) are unknown here, or they
/// would be ways around the gate.
pub async fn route(gate: Arc<Gate>, request: Request<Incoming>) -> Response<Body> {
    let path = request.uri().path();
    match path.strip_prefix(IMAGE_SERVICE) {
        Some("PullImage") => pull_image::answer(&gate, request).await,
        Some("ImageStatus") => image_status::answer(&gate, request).await,
        Some(_) => pass(&gate, request).await,
        None if path.starts_with(RUNTIME_SERVICE)
            && gate.runtime_service() == RuntimeService::PassThrough =>
        {
            pass(&gate, request).await
        }
        None => refuse(unknown_service(path)),
    }
}

async fn pass(gate: &Gate, request: Request<Incoming>) -> Response<Body> {
    let request = request.map(|incoming| incoming.boxed_unsync());
    match gate.next_hop.send(request).await {
        Ok(response) => response.map(BodyExt::boxed_unsync),
        Err(status) => refuse(status),
    }
}

/// A status as a response without messages ("Trailers-Only" of gRPC over HTTP/2).
pub fn refuse(status: Status) -> Response<Body> {
    status.into_http::<()>().map(|()| body::empty())
}

/// As grpc-go says it.
fn unknown_service(path: &str) -> Status {
    let (service, method) = path.trim_start_matches('/').rsplit_once('/').unwrap_or((path, ""));
    match service.is_empty() {
        true => Status::unimplemented(format!("malformed method name: {method:?}")),
        false => Status::unimplemented(format!("unknown service {service}")),
    }
}
