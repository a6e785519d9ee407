//! The configuration reference, from the schema.

use std::fmt::Write;

use super::schema::{Field, Kind, TOP};

const INTRODUCTION: &str = include_str!("introduction.md");

/// `docs/configuration.md`: the introduction, then a table a mapping.
pub fn markdown() -> String {
    let mut out = format!("<!-- Generated from daemon/src/config: see schema.rs. -->\n{INTRODUCTION}");
    table(&mut out, "The file", TOP);
    sections(&mut out, "", TOP);
    out
}

fn sections(out: &mut String, path: &str, fields: &[Field]) {
    for field in fields {
        let (path, inner) = match field.kind {
            Kind::Section(inner) => (format!("{path}{}", field.name), inner),
            Kind::Named(inner) => (format!("{path}{}.NAME", field.name), inner),
            Kind::Rules(inner) => (format!("{path}{}[]", field.name), inner),
            _ => continue,
        };
        table(out, &format!("`{path}`"), inner);
        sections(out, &format!("{path}."), inner);
    }
}

fn table(out: &mut String, title: &str, fields: &[Field]) {
    let mut line = |text: String| {
        // Writing to a String can't fail.
        let _ = writeln!(out, "{text}");
    };
    line(format!("\n## {title}\n"));
    line("| field | takes | default | |".into());
    line("| --- | --- | --- | --- |".into());
    for field in fields {
        let default = if field.default.is_empty() { String::new() } else { format!("`{}`", field.default) };
        line(format!("| `{}` | {} | {default} | {} |", field.name, takes(field), field.doc));
    }
}

fn takes(field: &Field) -> String {
    let words = match field.kind {
        Kind::Text => "text".into(),
        Kind::Choice(words) => words.iter().map(|word| format!("`{word}`")).collect::<Vec<_>>().join(", "),
        Kind::Flag => "`true`, `false`".into(),
        Kind::Count => "number".into(),
        Kind::Duration => "duration".into(),
        Kind::Size => "size".into(),
        Kind::Path => "absolute path".into(),
        Kind::Socket => "socket path".into(),
        Kind::Url => "URL".into(),
        Kind::List(of) => format!("list of {of}"),
        Kind::Annotations | Kind::Section(_) | Kind::Named(_) => "mapping".into(),
        Kind::Rules(_) => "list of rules".into(),
    };
    match field.range {
        Some((least, greatest)) => format!("{words}, {least} to {greatest}"),
        None => words,
    }
}
