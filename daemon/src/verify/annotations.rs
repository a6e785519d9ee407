//! Do the signed annotations say what the rule requires?

use std::collections::BTreeMap;

use crate::config::AnnotationRequirement;
use crate::verdict::{Denial, DenyReason};

/// Every required annotation must be there with an allowed value.
///
/// # Errors
/// `annotation-mismatch`, which names each one that is not.
pub fn check(
    required: &BTreeMap<String, AnnotationRequirement>,
    signed: &BTreeMap<String, String>,
) -> Result<(), Denial> {
    let wrong: Vec<String> = required
        .iter()
        .filter_map(|(name, requirement)| match signed.get(name) {
            None => Some(format!("`{name}` is not signed, expected {requirement}")),
            Some(value) if requirement.allows(value) => None,
            Some(value) => Some(format!("`{name}` is {}, expected {requirement}", printable(value))),
        })
        .collect();
    match wrong.is_empty() {
        true => Ok(()),
        false => {
            Err(DenyReason::AnnotationMismatch.because(format!("signed annotations: {}", wrong.join("; "))))
        }
    }
}

/// A signed value in a message: one line, not too long.
fn printable(value: &str) -> String {
    let short: String = value.chars().take(80).collect();
    format!("{short:?}")
}
