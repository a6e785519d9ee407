//! `PullImage`: the first gate. Only a proved digest is asked for.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::CONTENT_LENGTH;
use http::request::Parts;
use http::{HeaderMap, Request, Response, response};
use hyper::body::Incoming;
use prost::Message;
use tonic::Status;

use super::early_pull::{self, Permitted};
use super::messages::{AuthConfig, PullImageRequest, PullImageResponse};
use super::{refusal, router, wire};
use crate::audit::{self, Context, Method};
use crate::delegate::body::{self, Body, Unary};
use crate::digest::Digest;
use crate::engine::Ask;
use crate::engine::judgement::Permit;
use crate::evidence::registry::{self, Credentials};
use crate::gate::Gate;
use crate::reference::Repository;

/// How long a pull waits for the CRI plugin to notice the tag that was recorded for it.
const TAG_SHOWS_WITHIN: Duration = Duration::from_secs(2);

/// Answers one `PullImage`.
pub async fn answer(gate: &Arc<Gate>, request: Request<Incoming>) -> Response<Body> {
    gated(gate, request).await.unwrap_or_else(router::refuse)
}

async fn gated(gate: &Arc<Gate>, request: Request<Incoming>) -> Result<Response<Body>, Status> {
    let (head, incoming) = request.into_parts();
    let message = Unary::request(incoming).await?;
    let asked = PullImageRequest::decode(message.clone())
        .map_err(|error| Status::internal(format!("grpc: error unmarshalling request: {error}")))?;
    let (ask, context) = question(gate, &head, asked);
    let permitted = Permitted::new();
    let judging = async {
        let judgement = gate.judge(&ask, context).await;
        // Nobody else sets it.
        let _ = permitted.set(judgement.permit().and_then(Permit::pinned));
        judgement
    };
    let (judgement, early) =
        tokio::join!(judging, early_pull::pull(gate, &ask.image, &head, &message, &permitted));
    if let Some(refused) = refusal::status(&judgement) {
        return Err(refused);
    }
    // `refusal::status` has answered whatever has no permit.
    let permit = judgement.permit().ok_or_else(|| Status::internal("a refusal without a text"))?;
    let (pulled, was_early) = match early {
        Some((early, pulled)) if early.pinned() == permit.pinned() => (pulled, true),
        _ => {
            let pulled = ask_next_hop(gate, &head, &message, permit).await;
            if let Err(status) = &pulled {
                let (permit, why) = (permit.clone(), status.message().to_owned());
                // It ends early only with the daemon.
                let _ = tokio::task::spawn_blocking(move || audit::next_hop_away(&permit, &why)).await;
            }
            (pulled?, false)
        }
    };
    if let Some(tag) = Tag::of(permit, &pulled) {
        gate.pulled_tags.insert(tag.name.clone(), tag.digest.clone());
        match was_early {
            // It was recorded when it was pulled the last time: nearly always it is still there.
            true => drop(tokio::spawn(tag.recorded(Arc::clone(gate)))),
            false => tag.recorded(Arc::clone(gate)).await,
        }
    }
    Ok(Response::from_parts(pulled.head, pulled.answer.into_body()))
}

fn question(gate: &Gate, head: &Parts, asked: PullImageRequest) -> (Ask, Context) {
    let spec = asked.image.unwrap_or_default();
    let pod = asked.sandbox_config.and_then(|sandbox| sandbox.metadata).unwrap_or_default();
    let context = Context {
        method: Method::PullImage,
        was_allowed: false,
        namespace: pod.namespace,
        pod: pod.name,
        pod_uid: pod.uid,
        runtime_handler: spec.runtime_handler,
    };
    let ask = Ask {
        image: spec.image,
        present: None,
        credentials: asked.auth.map_or_else(Credentials::none, credentials),
        patience: patience(&head.headers, gate.engine.active().config.deadline),
    };
    (ask, context)
}

fn credentials(auth: AuthConfig) -> Credentials {
    Credentials::from_auth_config(registry::AuthConfig {
        username: auth.username,
        password: auth.password,
        auth: auth.auth,
        server_address: auth.server_address,
        identity_token: auth.identity_token,
        registry_token: auth.registry_token,
    })
}

/// The configured deadline, or a little less than the caller's own where that is shorter: so it
/// still hears the reason, and the work is left running instead of being cancelled with the call.
pub fn patience(headers: &HeaderMap, configured: Duration) -> Duration {
    let own = headers.get("grpc-timeout").and_then(|value| timeout(value.to_str().ok()?));
    own.map_or(configured, |own| configured.min(own.mul_f64(0.9)))
}

/// `grpc-timeout`: at most 8 digits and a unit (gRPC over HTTP/2, "Timeout").
fn timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let count: u64 = digits.parse().ok().filter(|_| digits.len() <= 8)?;
    Some(match unit {
        "H" => Duration::from_secs(count * 3600),
        "M" => Duration::from_secs(count * 60),
        "S" => Duration::from_secs(count),
        "m" => Duration::from_millis(count),
        "u" => Duration::from_micros(count),
        "n" => Duration::from_nanos(count),
        _ => return None,
    })
}

/// What the next hop answered to a pull.
pub struct Pulled {
    head: response::Parts,
    answer: Unary,
    /// The image's id; empty where the answer is an error.
    image: String,
}

impl Pulled {
    /// Whether the image has come.
    pub fn is_success(&self) -> bool {
        !self.image.is_empty()
    }
}

/// The caller's own request, with nothing but the image reference replaced.
pub async fn ask_next_hop(
    gate: &Gate,
    head: &Parts,
    message: &Bytes,
    permit: &Permit,
) -> Result<Pulled, Status> {
    let message = match permit.pinned() {
        Some(pinned) => wire::with_image(message, &pinned)
            .map_err(|error| Status::internal(format!("grpc: error unmarshalling request: {error}")))?
            .into(),
        None => message.clone(),
    };
    let mut head = head.clone();
    head.headers.remove(CONTENT_LENGTH);
    let started = Instant::now();
    let response = gate.next_hop.send(Request::from_parts(head, body::message(&message))).await?;
    let (head, incoming) = response.into_parts();
    let answer = Unary::read(incoming).await?;
    gate.metrics.delegate.with_label_values(&["PullImage"]).observe(started.elapsed().as_secs_f64());
    let told = PullImageResponse::decode(answer.message.clone().unwrap_or_default());
    Ok(Pulled { head, answer, image: told.unwrap_or_default().image_ref })
}

/// A tag that containerd won't record by itself when it pulls by digest.
struct Tag {
    name: String,
    repository: Repository,
    digest: Digest,
    /// The image's id.
    image: String,
}

impl Tag {
    /// The tag that the caller used for what has been pulled.
    fn of(permit: &Permit, pulled: &Pulled) -> Option<Self> {
        let (name, digest) = (permit.tag_to_record()?, permit.digest()?.clone());
        let repository = permit.repository().clone();
        pulled.is_success().then(|| Self { name, repository, digest, image: pulled.image.clone() })
    }

    /// Sees to it that there is a record of it. The image is there and was proved: without the
    /// record the kubelet still runs it, by its id.
    async fn recorded(self, gate: Arc<Gate>) {
        if gate.pulled_tags.get(&self.name).as_ref() != Some(&self.digest) {
            // It has been pulled anew meanwhile, and has moved.
            return;
        }
        if let Err(status) = self.record(&gate).await {
            let error = status.message();
            tracing::warn!(image = self.name, error, "the pulled image's tag could not be recorded");
        }
    }

    /// Makes the record, and waits until the CRI plugin shows it for the pulled image.
    async fn record(&self, gate: &Gate) -> Result<(), Status> {
        if !gate.image_store.tag(&self.name, &self.repository, &self.digest).await? {
            return Ok(());
        }
        let deadline = tokio::time::Instant::now() + TAG_SHOWS_WITHIN;
        let mut pause = Duration::from_millis(1);
        while gate.next_hop.image_id(&self.name).await?.as_ref() != Some(&self.image) {
            if tokio::time::Instant::now() + pause > deadline {
                return Err(Status::deadline_exceeded("containerd does not show the recorded tag"));
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(50));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shorter_deadline_of_the_caller_counts() {
        let configured = Duration::from_secs(10);
        let with = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("grpc-timeout", text.parse().unwrap());
            patience(&headers, configured)
        };
        assert_eq!(patience(&HeaderMap::new(), configured), configured);
        assert_eq!(with("100m"), Duration::from_millis(90));
        assert_eq!(with("2M"), configured);
        for nonsense in ["", "S", "123456789S", "1x", "-1S", "é"] {
            let mut headers = HeaderMap::new();
            headers.insert("grpc-timeout", http::HeaderValue::from_bytes(nonsense.as_bytes()).unwrap());
            assert_eq!(patience(&headers, configured), configured, "{nonsense:?}");
        }
    }
}
