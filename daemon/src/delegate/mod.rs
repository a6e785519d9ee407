//! The delegate: what is asked of the node's runtime once the engine has decided.
//!
//! [`next_hop`] carries CRI calls to the next ImageService, byte for byte; [`image_store`] reads
//! and writes containerd's own records of image names.

pub mod body;
pub mod image_store;
pub mod next_hop;
