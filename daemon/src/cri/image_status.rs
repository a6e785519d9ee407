//! `ImageStatus`: the second gate. An image that is there but not allowed is answered as absent,
//! so that the kubelet pulls, and the pull says why.

use std::time::Duration;

use futures_util::stream::{FuturesUnordered, StreamExt};
use http::{Request, Response};
use hyper::body::Incoming;
use prost::Message;
use tonic::Status;

use super::messages::{Image, ImageStatusRequest, ImageStatusResponse};
use super::{pull_image, router};
use crate::audit::{Context, Method};
use crate::delegate::body::{self, Body, Unary};
use crate::digest::Digest;
use crate::engine::Ask;
use crate::engine::judgement::Judgement;
use crate::evidence::registry::Credentials;
use crate::gate::{Gate, Known};
use crate::reference::Reference;

/// Answers one `ImageStatus`.
pub async fn answer(gate: &Gate, request: Request<Incoming>) -> Response<Body> {
    gated(gate, request).await.unwrap_or_else(router::refuse)
}

async fn gated(gate: &Gate, request: Request<Incoming>) -> Result<Response<Body>, Status> {
    let (head, incoming) = request.into_parts();
    let message = Unary::request(incoming).await?;
    let asked = ImageStatusRequest::decode(message.clone())
        .map_err(|error| Status::internal(format!("grpc: error unmarshalling request: {error}")))?;
    let spec = asked.image.unwrap_or_default();
    let patience = pull_image::patience(&head.headers, gate.engine.active().config.image_status_deadline);
    let response = gate.next_hop.send(Request::from_parts(head, body::message(&message))).await?;
    let (head, incoming) = response.into_parts();
    let answer = Unary::read(incoming).await?;
    let status = ImageStatusResponse::decode(answer.message.clone().unwrap_or_default())
        .map_err(|error| Status::internal(format!("the next hop's answer can't be read: {error}")))?;
    let Some(image) = status.image else { return Ok(Response::from_parts(head, answer.into_body())) };
    let question =
        Question { gate, asked: &spec.image, image: &image, patience, handler: &spec.runtime_handler };
    let allowed = question.is_allowed().await.unwrap_or_else(|status| {
        // What can't be looked up is not proved: the pull that follows finds out.
        tracing::warn!(
            image = spec.image,
            error = status.message(),
            "containerd's record of a present image can't be read"
        );
        false
    });
    let answer = match allowed {
        true => answer,
        false => Unary { message: Some(ImageStatusResponse::default().encode_to_vec().into()), ..answer },
    };
    Ok(Response::from_parts(head, answer.into_body()))
}

struct Question<'a> {
    gate: &'a Gate,
    asked: &'a str,
    image: &'a Image,
    patience: Duration,
    handler: &'a str,
}

impl Question<'_> {
    /// The decision is about the image that containerd resolved, never about the spelling: by
    /// the digest of the name's own record, or, where the caller did not use a recorded name
    /// (an image ID, in whatever spelling), by any of the names that the image has.
    async fn is_allowed(&self) -> Result<bool, Status> {
        let deadline = tokio::time::Instant::now() + self.patience;
        if let Ok(reference) = Reference::parse(self.asked) {
            let name = reference.to_string();
            if let Some(digest) = self.digest_of(&name).await? {
                let judged = self.judge(&name, digest, deadline).await;
                return Ok(self.record(judged).await);
            }
            // A recorded name that is not this image's: it has just been moved. The pull tells.
            if self.gate.image_store.digest_of(&name).await?.is_some() {
                return Ok(false);
            }
        }
        // All at once: a name whose registry hangs must not use up the patience of the others.
        let names = self.image.repo_digests.iter().chain(&self.image.repo_tags);
        let mut judging: FuturesUnordered<_> =
            names.map(|name| self.judge_recorded(name, deadline)).collect();
        let (mut denied, mut unknown) = (Vec::new(), None);
        while let Some(judged) = judging.next().await {
            match judged {
                // One name is enough, and what the others are is nobody's question.
                Ok(Some(judged)) if judged.judgement.is_allowed() => return Ok(self.record(judged).await),
                Ok(judged) => denied.extend(judged),
                Err(status) => unknown = Some(status),
            }
        }
        for judged in denied {
            self.record(judged).await;
        }
        unknown.map_or(Ok(false), Err)
    }

    async fn judge_recorded(
        &self,
        name: &str,
        deadline: tokio::time::Instant,
    ) -> Result<Option<Judged>, Status> {
        let Some(digest) = self.digest_of(name).await? else { return Ok(None) };
        Ok(Some(self.judge(name, digest, deadline).await))
    }

    /// The digest of `name`'s record, provided that it is this image's.
    async fn digest_of(&self, name: &str) -> Result<Option<Digest>, Status> {
        let known = (name.to_owned(), self.image.id.clone());
        if let Some(known) = self.gate.known_names.get(&known) {
            return Ok(Some(known.digest));
        }
        let Some(digest) = self.gate.image_store.digest_of(name).await? else { return Ok(None) };
        let listed = self.image.repo_digests.iter().any(|d| d.ends_with(&format!("@{digest}")));
        let same = listed || self.gate.image_store.config_digests(&digest).await?.contains(&self.image.id);
        Ok(same.then_some(digest))
    }

    async fn judge(&self, name: &str, digest: Digest, deadline: tokio::time::Instant) -> Judged {
        let ask = Ask {
            image: name.to_owned(),
            present: Some(digest.clone()),
            credentials: Credentials::none(),
            patience: deadline.saturating_duration_since(tokio::time::Instant::now()),
        };
        let judgement = self.gate.engine.judge(&ask).await;
        Judged { name: name.to_owned(), digest, judgement }
    }

    /// Writes a decision down, and remembers the name of an allowed image. Says whether it is one.
    async fn record(&self, judged: Judged) -> bool {
        let name = (judged.name, self.image.id.clone());
        let known = Known { digest: judged.digest, policy: judged.judgement.policy.clone() };
        let context = Context {
            method: Method::ImageStatus,
            was_allowed: self.gate.known_names.get(&name).as_ref() == Some(&known),
            runtime_handler: self.handler.to_owned(),
            ..Context::default()
        };
        let allowed = self.gate.record(judged.judgement, context).await.is_allowed();
        match allowed {
            true => self.gate.known_names.insert(name, known),
            false => drop(self.gate.known_names.remove(&name)),
        }
        allowed
    }
}

/// What was decided about the image under one of its names.
struct Judged {
    name: String,
    digest: Digest,
    judgement: Judgement,
}
