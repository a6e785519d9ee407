//! Verification: does the evidence prove what the rule requires?

pub mod key;
