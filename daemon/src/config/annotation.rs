//! What a rule requires of one signed annotation.

use std::fmt;

use super::problem::Complaint;
use super::yaml::{Data, Node};

/// The values that a signed annotation may have: any one of the alternatives.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct AnnotationRequirement {
    alternatives: Vec<Pattern>,
}

/// One alternative: a value, or a glob over values.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Pattern {
    text: String,
    pieces: Vec<Piece>,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Piece {
    Char(char),
    AnyChar,
    AnyText,
}

impl AnnotationRequirement {
    /// Whether a signed annotation with this value is enough.
    pub fn allows(&self, value: &str) -> bool {
        self.alternatives.iter().any(|pattern| pattern.matches(value))
    }

    /// The alternatives, as they are written.
    pub fn alternatives(&self) -> impl Iterator<Item = &str> {
        self.alternatives.iter().map(|pattern| pattern.text.as_str())
    }

    /// Reads a value, or a list of them.
    pub(super) fn read(node: &Node) -> Result<Self, Complaint> {
        let alternatives = match &node.data {
            Data::List(items) if items.is_empty() => {
                return Err(
                    Complaint::new("an empty list allows no value").help("list the values that are good")
                );
            }
            Data::List(items) => items.iter().map(|item| scalar(&item.data)).collect::<Result<_, _>>()?,
            data => vec![scalar(data)?],
        };
        Ok(Self { alternatives })
    }
}

impl fmt::Display for AnnotationRequirement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, pattern) in self.alternatives.iter().enumerate() {
            let separator = if index == 0 { "" } else { " or " };
            write!(f, "{separator}{}", pattern.text)?;
        }
        Ok(())
    }
}

fn scalar(data: &Data) -> Result<Pattern, Complaint> {
    let quoted = |text: &str| {
        Complaint::new(format!("annotations are text, found {}", data.describe()))
            .help(format!("quote it: \"{text}\""))
    };
    match data {
        Data::Text(text) => Pattern::parse(text),
        Data::Number(text) => Err(quoted(text)),
        Data::Bool(value) => Err(quoted(if *value { "true" } else { "false" })),
        other => {
            Err(Complaint::new(format!("expected a value or a list of values, found {}", other.describe()))
                .help("write the value, or a list such as [main, release]; \"*\" allows any value"))
        }
    }
}

impl Pattern {
    fn parse(text: &str) -> Result<Self, Complaint> {
        let mut pieces = Vec::new();
        let mut chars = text.chars();
        while let Some(c) = chars.next() {
            pieces.push(match c {
                '*' => Piece::AnyText,
                '?' => Piece::AnyChar,
                '\\' => match chars.next() {
                    Some(c @ ('*' | '?' | '\\')) => Piece::Char(c),
                    _ => {
                        return Err(Complaint::new(format!(
                            "in `{text}` a backslash stands before nothing special"
                        ))
                        .help(r"only \*, \? and \\ mean anything; a backslash itself is \\"));
                    }
                },
                c => Piece::Char(c),
            });
        }
        Ok(Self { text: text.to_owned(), pieces })
    }

    /// Greedy matching that goes back to the last `*` only: quadratic at worst, no recursion.
    fn matches(&self, value: &str) -> bool {
        let mut pieces = self.pieces.as_slice();
        let mut rest = value.chars();
        let mut retry = None;
        loop {
            let mut next = rest.clone();
            match (pieces.split_first(), next.next()) {
                (None, None) => return true,
                (Some((Piece::AnyText, after)), _) => {
                    retry = Some((after, rest.clone()));
                    pieces = after;
                    continue;
                }
                (Some((Piece::AnyChar, after)), Some(_)) => {
                    (pieces, rest) = (after, next);
                    continue;
                }
                (Some((Piece::Char(expected), after)), Some(found)) if *expected == found => {
                    (pieces, rest) = (after, next);
                    continue;
                }
                _ => {}
            }
            let Some((after, mut from)) = retry.take() else { return false };
            if from.next().is_none() {
                return false;
            }
            (pieces, rest) = (after, from.clone());
            retry = Some((after, from));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::yaml;

    fn requirement(text: &str) -> Result<AnnotationRequirement, Complaint> {
        AnnotationRequirement::read(&yaml::parse(text).unwrap())
    }

    #[test]
    fn a_value_is_exact_unless_it_holds_a_wildcard() {
        for (pattern, value, allowed) in [
            ("main", "main", true),
            ("main", "main2", false),
            ("main", "Main", false),
            ("'*'", "", true),
            ("release-*", "release-1.2", true),
            ("release-*", "release", false),
            ("'*-ci'", "a-ci-ci", true),
            ("'*-ci'", "a-ci-cj", false),
            ("'a*b*c'", "a-b-b-c", true),
            ("'a*b*c'", "a-c-b", false),
            ("v?.?", "v1.2", true),
            ("v?.?", "v1.", false),
            (r"a\*", "a*", true),
            (r"a\*", "ab", false),
            ("[main, release]", "release", true),
            ("[main, 'r*']", "dev", false),
            ("é?", "éß", true),
        ] {
            assert_eq!(requirement(pattern).unwrap().allows(value), allowed, "{pattern} {value}");
        }
    }

    #[test]
    fn it_reads_as_a_clause() {
        assert_eq!(requirement("[main, release]").unwrap().to_string(), "main or release");
    }

    #[test]
    fn what_is_not_text_is_an_error_with_the_quotes_to_write() {
        assert_eq!(requirement("1").unwrap_err().help.unwrap(), "quote it: \"1\"");
        assert_eq!(requirement("[a, true]").unwrap_err().help.unwrap(), "quote it: \"true\"");
        for text in ["", "[]", "{a: b}", "[[a]]", r"a\b", r"a\"] {
            assert!(requirement(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_hostile_value_is_matched_in_bounded_time() {
        let pattern = requirement("'*a*a*a*a*a*a*a*b'").unwrap();
        assert!(!pattern.allows(&"a".repeat(20_000)));
    }
}
