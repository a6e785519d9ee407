//! The pull of what a tag pointed to the last time, begun while the tag is being resolved.
//!
//! As long as the tag has not moved, which is nearly always, that saves a round trip to the
//! registry. It needs a permit like any other pull, from a verdict in memory; what comes of it
//! counts only if the judgement permits the same.

use bytes::Bytes;
use http::request::Parts;
use tokio::sync::SetOnce;

use super::pull_image::{Pulled, ask_next_hop};
use crate::engine::judgement::Permit;
use crate::gate::Gate;
use crate::reference::{Pointer, Reference};

/// Meets the judgement: what it permits (`repository@digest`), if anything.
pub type Permitted = SetOnce<Option<String>>;

/// Pulls `image` early. `None` when it was not pulled lately, when that does not succeed, or when
/// `permitted` turns out to be something else.
pub async fn pull(
    gate: &Gate,
    image: &str,
    head: &Parts,
    message: &Bytes,
    permitted: &Permitted,
) -> Option<(Permit, Pulled)> {
    let permit = recall(gate, image)?;
    let in_vain = async {
        if *permitted.wait().await == permit.pinned() {
            std::future::pending::<()>().await;
        }
    };
    let pulled = tokio::select! {
        pulled = ask_next_hop(gate, head, message, &permit) => pulled.ok()?,
        () = in_vain => return None,
    };
    pulled.is_success().then_some((permit, pulled))
}

/// Leave to pull what `image`, if it is a tag, pointed to the last time.
fn recall(gate: &Gate, image: &str) -> Option<Permit> {
    let reference = Reference::parse(image).ok()?;
    if !matches!(reference.pointer, Pointer::Tag(_)) {
        return None;
    }
    let digest = gate.pulled_tags.get(&reference.to_string())?;
    gate.engine.recall(reference, &digest)
}
