//! Policies as the tests need them, as YAML.

use crate::registry::Registry;

/// One rule: whatever is in `registry` must be signed by the key.
pub fn signed(registry: &Registry, key: &str) -> String {
    rules(&[rule(registry, key, "")])
}

/// A rule as an item of `verificationRules`; `more` is more fields of it, in flow style
/// (`annotations: {a: b}`).
pub fn rule(registry: &Registry, key: &str, more: &str) -> String {
    rule_for(&format!("{}/**", registry.host()), key, more)
}

/// [`rule`] for any glob. A PEM block's lines may be ended by `\n` in the text.
pub fn rule_for(glob: &str, key: &str, more: &str) -> String {
    let more = if more.is_empty() { String::new() } else { format!(", {more}") };
    let key = key.replace('\n', "\\n");
    format!("{{imageGlob: \"{glob}\", strategy: signed, keyURI: \"{key}\"{more}}}")
}

/// A configuration of rules.
pub fn rules(rules: &[String]) -> String {
    rules.iter().fold("verificationRules:\n".to_owned(), |text, rule| text + "  - " + rule + "\n")
}
