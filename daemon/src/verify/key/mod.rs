//! Keys that a rule trusts: where they come from, and what they verify.

pub mod uri;

pub use uri::KeyUri;
