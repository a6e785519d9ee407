//! pullgate proves that an image is allowed before containerd pulls it.
//!
//! The modules carry the names of the stages of one request, in order (ARCHITECTURE.md).

pub mod config;
pub mod digest;
pub mod evidence;
pub mod metrics;
pub mod reference;
pub mod verdict;
pub mod verify;
