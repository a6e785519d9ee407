//! The pull of what containerd has under a tag already, begun while the tag is being resolved.
//!
//! As long as the tag has not moved, which is nearly always, that saves a round trip to the
//! registry. It needs a permit like any other pull, from a verdict in memory; what comes of it
//! counts only if the judgement permits the same.

use std::sync::OnceLock;

use bytes::Bytes;
use http::request::Parts;
use tokio::sync::SetOnce;
use tonic::Status;

use super::pull_image::{Pulled, ask_next_hop};
use crate::engine::judgement::Permit;
use crate::gate::Gate;
use crate::reference::{Pointer, Reference};

/// Meets the judgement: what it permits (`repository@digest`), if anything.
pub type Permitted = SetOnce<Option<String>>;

/// Pulls `image` early. `None` when there is nothing to pull early, or when `permitted` turns out
/// to be something else.
pub async fn pull(
    gate: &Gate,
    image: &str,
    head: &Parts,
    message: &Bytes,
    permitted: &Permitted,
) -> Option<(Permit, Result<Pulled, Status>)> {
    let recalled = OnceLock::new();
    let work = async {
        let found = recall(gate, image).await?;
        let permit = recalled.get_or_init(|| found);
        Some((permit.clone(), ask_next_hop(gate, head, message, permit).await))
    };
    let in_vain = async {
        let permitted = permitted.wait().await;
        if permitted.is_some() && recalled.get().and_then(Permit::pinned) == *permitted {
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        pulled = work => pulled,
        () = in_vain => None,
    }
}

/// Leave to pull what containerd has under `image`, if that is a tag.
async fn recall(gate: &Gate, image: &str) -> Option<Permit> {
    let reference = Reference::parse(image).ok()?;
    if !matches!(reference.pointer, Pointer::Tag(_)) {
        return None;
    }
    let name = reference.to_string();
    let digest = gate.image_store.digest_of(&name).await.ok()??;
    gate.engine.recall(&name, &digest)
}
