//! The CRI edge: `runtime.v1.ImageService` in front of the next hop.
//!
//! [`router`] reads two methods and passes every other byte for byte; [`pull_image`] and
//! [`image_status`] are the two gates.

mod early_pull;
pub mod image_status;
pub mod messages;
pub mod pull_image;
pub mod refusal;
pub mod router;
pub mod wire;
