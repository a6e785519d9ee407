//! YAML text to a tree of values that know their line and column.
//!
//! The values are serde_yaml's. The positions come from a second parser, saphyr, which also
//! refuses what a policy has no use for (aliases, tags, several documents, depth) before
//! serde_yaml sees it. The two trees are joined node by node: a text that the two read
//! differently is refused, so nobody can write a policy that reads in two ways.

use std::collections::HashMap;

use saphyr_parser::{Event, Parser, ScanError, Span, StrInput};
use serde_yaml::Value;

use super::problem::{Complaint, Position};

/// The configuration has four levels; annotations and lists make it five.
const MAX_DEPTH: usize = 16;

/// A value and the place where it begins.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Node {
    pub at: Position,
    pub data: Data,
}

/// What a node holds. Numbers keep the text that was written.
#[derive(Clone, PartialEq, Debug)]
pub(super) enum Data {
    Null,
    Bool(bool),
    Number(String),
    Text(String),
    List(Vec<Node>),
    Map(Vec<Entry>),
}

/// A key, its place, and its value.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Entry {
    pub name: String,
    pub at: Position,
    pub value: Node,
}

impl Data {
    /// The value in words, for "found …".
    pub fn describe(&self) -> String {
        match self {
            Self::Null => "nothing".into(),
            Self::Bool(value) => format!("the truth value {value}"),
            Self::Number(text) => format!("the number {text}"),
            Self::Text(text) => format!("the text `{}`", shortened(text)),
            Self::List(_) => "a list".into(),
            Self::Map(_) => "a mapping".into(),
        }
    }
}

/// Text from the file, fit for one line of a message.
pub(super) fn shortened(text: &str) -> String {
    let line: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(80).collect();
    if line.len() < text.len() { line + "…" } else { line }
}

/// A fault of the text itself: the place and what is wrong there.
pub(super) type Fault = (Position, Complaint);

/// Reads one YAML document.
pub(super) fn parse(text: &str) -> Result<Node, Vec<Fault>> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut outliner = Outliner { events: Parser::new_from_str(text), faults: Vec::new() };
    let outline = match outliner.document() {
        Ok(outline) => outline,
        Err(fault) => {
            outliner.faults.push(tab_explained(text, fault));
            return Err(outliner.faults);
        }
    };
    if !outliner.faults.is_empty() {
        return Err(outliner.faults);
    }
    let Some(outline) = outline else {
        return Ok(Node { at: Position { line: 1, column: 1 }, data: Data::Null });
    };
    let value = serde_yaml::from_str(text).map_err(|error| vec![refusal(&error)])?;
    join(outline, value).map_err(|fault| vec![fault])
}

/// The document as saphyr sees it: structure, positions and raw text.
struct Outline {
    at: Position,
    shape: Shape,
}

enum Shape {
    Scalar(String),
    List(Vec<Outline>),
    Map(Vec<(Outline, Outline)>),
}

struct Outliner<'a> {
    events: Parser<'a, StrInput<'a>>,
    faults: Vec<Fault>,
}

impl<'a> Outliner<'a> {
    fn document(&mut self) -> Result<Option<Outline>, Fault> {
        let mut outline = None;
        loop {
            let (event, at) = self.next()?;
            match event {
                Event::StreamEnd => return Ok(outline),
                Event::StreamStart | Event::DocumentStart(_) | Event::DocumentEnd | Event::Nothing => {}
                _ if outline.is_some() => {
                    return Err((
                        at,
                        Complaint::new("a second YAML document begins here")
                            .help("keep one document: remove the line `---` between the two"),
                    ));
                }
                event => outline = Some(self.node(event, at, 0)?),
            }
        }
    }

    fn next(&mut self) -> Result<(Event<'a>, Position), Fault> {
        match self.events.next_event() {
            Some(Ok((event, span))) => Ok((event, position(span))),
            Some(Err(error)) => Err(syntax(&error)),
            None => Ok((Event::StreamEnd, Position::default())),
        }
    }

    fn node(&mut self, event: Event<'a>, at: Position, depth: usize) -> Result<Outline, Fault> {
        if depth > MAX_DEPTH {
            return Err((at, Complaint::new(format!("nested more than {MAX_DEPTH} levels deep"))));
        }
        let shape = match event {
            Event::Scalar(text, ..) => Shape::Scalar(text.into_owned()),
            Event::SequenceStart(..) => Shape::List(self.list(depth)?),
            Event::MappingStart(..) => Shape::Map(self.map(depth)?),
            Event::Alias(_) => {
                return Err((
                    at,
                    Complaint::new("YAML aliases (`*name`) are not supported")
                        .help("write the value out where it is used"),
                ));
            }
            _ => return Err((at, Complaint::new("the document ends in the middle of a value"))),
        };
        Ok(Outline { at, shape })
    }

    fn list(&mut self, depth: usize) -> Result<Vec<Outline>, Fault> {
        let mut items = Vec::new();
        loop {
            match self.next()? {
                (Event::SequenceEnd, _) => return Ok(items),
                (event, at) => items.push(self.node(event, at, depth + 1)?),
            }
        }
    }

    fn map(&mut self, depth: usize) -> Result<Vec<(Outline, Outline)>, Fault> {
        let mut pairs = Vec::new();
        let mut seen = HashMap::new();
        loop {
            let (event, at) = self.next()?;
            if event == Event::MappingEnd {
                return Ok(pairs);
            }
            let key = self.node(event, at, depth + 1)?;
            if let Shape::Scalar(name) = &key.shape {
                match seen.get(name) {
                    Some(first) => self.faults.push(duplicate(name, at, *first)),
                    None => drop(seen.insert(name.clone(), at)),
                }
            }
            let (event, at) = self.next()?;
            pairs.push((key, self.node(event, at, depth + 1)?));
        }
    }
}

fn duplicate(name: &str, at: Position, first: Position) -> Fault {
    let name = shortened(name);
    (
        at,
        Complaint::new(format!("`{name}` is written twice; the first is in line {}", first.line))
            .help("keep one of the two"),
    )
}

fn position(span: Span) -> Position {
    Position { line: span.start.line(), column: span.start.col() + 1 }
}

fn syntax(error: &ScanError) -> Fault {
    let marker = error.marker();
    let at = Position { line: marker.line(), column: marker.col() + 1 };
    (at, Complaint::new(format!("this is not valid YAML: {}", error.info())))
}

/// Tabs are the one syntax error that can't be seen in an editor.
fn tab_explained(text: &str, (at, complaint): Fault) -> Fault {
    let near = text.lines().skip(at.line.saturating_sub(2)).take(2);
    let indented_by_tab = |line: &str| line.trim_start_matches(' ').starts_with('\t');
    match complaint.help.is_none() && near.into_iter().any(indented_by_tab) {
        true => (at, complaint.help("a line is indented with a tab; YAML takes only spaces")),
        false => (at, complaint),
    }
}

fn refusal(error: &serde_yaml::Error) -> Fault {
    let at = error.location().map(|l| Position { line: l.line(), column: l.column() }).unwrap_or_default();
    (at, Complaint::new(format!("this is not valid YAML: {error}")))
}

fn join(outline: Outline, value: Value) -> Result<Node, Fault> {
    let Outline { at, shape } = outline;
    let data = match (shape, value) {
        (Shape::Scalar(_), Value::Null) => Data::Null,
        (Shape::Scalar(_), Value::Bool(value)) => Data::Bool(value),
        (Shape::Scalar(text), Value::Number(_)) => Data::Number(text),
        (Shape::Scalar(text), Value::String(value)) if text == value => Data::Text(text),
        (Shape::List(outlines), Value::Sequence(values)) if outlines.len() == values.len() => {
            Data::List(outlines.into_iter().zip(values).map(|(o, v)| join(o, v)).collect::<Result<_, _>>()?)
        }
        (Shape::Map(outlines), Value::Mapping(values)) if outlines.len() == values.len() => {
            Data::Map(outlines.into_iter().zip(values).map(join_entry).collect::<Result<_, _>>()?)
        }
        (_, Value::Tagged(_)) => {
            return Err((
                at,
                Complaint::new("YAML tags (`!name`) are not supported")
                    .help("remove the tag; quote the value to make it text"),
            ));
        }
        _ => {
            return Err((
                at,
                Complaint::new("this can be read in two ways")
                    .help("write it more simply: one line, with quotes around text"),
            ));
        }
    };
    Ok(Node { at, data })
}

fn join_entry(((key, outline), (name, value)): ((Outline, Outline), (Value, Value))) -> Result<Entry, Fault> {
    let at = key.at;
    match join(key, name)?.data {
        Data::Text(name) => Ok(Entry { name, at, value: join(outline, value)? }),
        other => Err((
            at,
            Complaint::new(format!("expected a name before the `:`, found {}", other.describe()))
                .help("put quotes around the name"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(text: &str) -> String {
        let faults = parse(text).unwrap_err();
        faults
            .iter()
            .map(|(at, c)| {
                format!("{}:{}: {} / {}", at.line, at.column, c.message, c.help.as_deref().unwrap_or("-"))
            })
            .collect::<Vec<_>>()
            .join("\n")
    }

    #[test]
    fn every_value_knows_where_it_begins() {
        let node = parse("a: 1\nlist:\n  - x: \"é\"\n    yy: true\n  - [p, 0x10]\n").unwrap();
        let Data::Map(entries) = node.data else { panic!("not a mapping") };
        let at = |line, column| Position { line, column };
        assert_eq!((entries[0].at, entries[0].value.at), (at(1, 1), at(1, 4)));
        assert_eq!(entries[0].value.data, Data::Number("1".into()));
        let Data::List(items) = &entries[1].value.data else { panic!("not a list") };
        assert_eq!(items[0].at, at(3, 5));
        let Data::Map(inner) = &items[0].data else { panic!("not a mapping") };
        assert_eq!((inner[1].at, inner[1].value.at), (at(4, 5), at(4, 9)));
        let Data::List(flow) = &items[1].data else { panic!("not a list") };
        assert_eq!((flow[1].at, &flow[1].data), (at(5, 9), &Data::Number("0x10".into())));
    }

    #[test]
    fn empty_texts_are_null() {
        for text in ["", "\n\n", "# nothing\n", "---\n", "\u{feff}"] {
            assert_eq!(parse(text).unwrap().data, Data::Null, "{text:?}");
        }
    }

    #[test]
    fn what_a_policy_has_no_use_for_is_refused() {
        for (text, expected) in [
            ("a: &x 1\nb: *x\n", "2:4: YAML aliases"),
            ("a: 1\n---\nb: 1\n", "3:1: a second YAML document"),
            ("a: 1\na: 2\n", "2:1: `a` is written twice; the first is in line 1"),
            ("a: !secret x\n", "1:12: YAML tags"),
            ("1: x\n", "1:1: expected a name before the `:`, found the number 1"),
            ("a:\n\tb: 1\n", "indented with a tab"),
            ("a: [1, 2\nb: 3\n", "not valid YAML"),
            ("a: \"x\n", "not valid YAML"),
            ("a: b: c\n", "1:5: this is not valid YAML"),
        ] {
            let found = fault(text);
            assert!(found.contains(expected), "{text:?}: {found}");
        }
        assert!(fault(&"[".repeat(100)).contains("levels deep"));
        assert!(fault(&"[".repeat(100_000)).contains("recursion limit"));
    }

    #[test]
    fn all_duplicates_are_told_at_once() {
        assert_eq!(fault("a: {x: 1, x: 2}\na: 1\n").lines().count(), 2);
    }

    /// Not a proof: a cheap search for texts on which either parser panics.
    #[test]
    fn mangled_texts_are_errors_and_never_panics() {
        let seed = "default: deny\nlist:\n  - {a: \"b\", c: [1, 2]}\n  - d: |\n      text\n    e: 'x'\n";
        let pieces =
            ["\t", "*", "&a", "!", "|", ">", "- ", ": ", "\"", "'", "{", "]", "\n", "#", "?", "%", "é", "\0"];
        for (at, _) in seed.char_indices() {
            for piece in pieces {
                let _ = parse(&format!("{}{piece}{}", &seed[..at], &seed[at..]));
                let _ = parse(&format!("{}{piece}", &seed[..at]));
            }
        }
    }
}
