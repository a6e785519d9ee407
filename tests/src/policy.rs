//! Policies as the tests need them, as YAML.

use crate::registry::Registry;

/// One rule: whatever is in `registry` must be signed by the key.
pub fn signed(registry: &Registry, key: &str) -> String {
    rules(&[rule(registry, key, "")])
}

/// A rule as an item of `verificationRules`; `more` is more fields of it, in flow style
/// (`annotations: {a: b}`).
pub fn rule(registry: &Registry, key: &str, more: &str) -> String {
    let more = if more.is_empty() { String::new() } else { format!(", {more}") };
    format!("{{imageGlob: \"{}/**\", strategy: signed, keyURI: \"{key}\"{more}}}", registry.host())
}

/// A configuration of rules.
pub fn rules(rules: &[String]) -> String {
    rules.iter().fold("verificationRules:\n".to_owned(), |text, rule| text + "  - " + rule + "\n")
}
