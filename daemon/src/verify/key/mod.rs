//! Keys that a rule trusts: where they come from, and what they verify.
//!
//! [`ring::KeyRing`] turns a [`KeyUri`] into a [`TrustedKey`]: a file or an inline PEM at once,
//! a KMS key by asking KMS for the public key, once; its hash is pinned on disk, so that later
//! starts need no KMS and an alias that was re-pointed is noticed.

mod endpoint;
pub mod kms;
pub mod pins;
pub mod ring;
pub mod trusted;
pub mod uri;

pub use ring::KeyRing;
pub use trusted::{Scheme, TrustedKey};
pub use uri::KeyUri;
