//! Reads the fields of one mapping by its schema, and reports everything that is wrong.
//!
//! Every reading function gives a value in any case, so that reading goes on to the next
//! mistake; a report that holds an error never becomes a `Config`.

use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use url::Url;

use super::problem::{Complaint, Position, Report};
use super::schema::{Field, Kind};
use super::units;
use super::yaml::{self, Data, Entry, Node, shortened};

/// `sun_path` has 108 bytes, one of them for the closing zero.
const MAX_SOCKET_PATH: usize = 107;
/// Names further apart than this are not taken for typing errors.
const LIKENESS: f64 = 0.75;

/// One mapping of the file.
pub(super) struct Section<'a> {
    /// Where it begins.
    pub at: Position,
    report: &'a Report,
    path: String,
    fields: &'static [Field],
    entries: &'a [Entry],
    /// It is no mapping.
    misread: bool,
}

impl<'a> Section<'a> {
    /// Takes `node` as a mapping with these fields, and reports the keys that it should not have.
    pub fn open(report: &'a Report, node: &'a Node, path: String, fields: &'static [Field]) -> Self {
        let entries = match &node.data {
            Data::Map(entries) => entries.as_slice(),
            Data::Null => &[],
            other => {
                let names = names(fields);
                let message = format!("expected a mapping, found {}", other.describe());
                report.error(
                    node.at,
                    path.as_str(),
                    Complaint::new(message).help(format!("with the fields {names}")),
                );
                &[]
            }
        };
        let misread = !matches!(node.data, Data::Map(_) | Data::Null);
        let section = Self { at: node.at, report, path, fields, entries, misread };
        for entry in entries.iter().filter(|entry| !fields.iter().any(|field| field.name == entry.name)) {
            let candidates = fields.iter().map(|field| field.name);
            let help = match nearest(&entry.name, candidates) {
                Some(name) => format!("did you mean `{name}`? allowed here: {}", names(fields)),
                None => format!("allowed here: {}", names(fields)),
            };
            section.error(entry.at, &shortened(&entry.name), Complaint::new("unknown field").help(help));
        }
        section
    }

    /// Whether the field is written.
    pub fn has(&self, name: &str) -> bool {
        self.entry(name).is_some()
    }

    /// The value as it is written.
    pub fn entry(&self, name: &str) -> Option<&'a Entry> {
        self.entries.iter().find(|entry| entry.name == name)
    }

    /// Where the field's value is, or else the mapping.
    pub fn place(&self, name: &str) -> Position {
        self.entry(name).map_or(self.at, |entry| entry.value.at)
    }

    /// The path of a field, as messages write it.
    pub fn path(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    /// Reports a field that should be there, unless a mistake that has been told explains it.
    pub fn missing(&self, name: &str, complaint: Complaint) {
        let known = |written: &str| self.fields.iter().any(|field| field.name == written);
        let meant = |written: &str| nearest(written, self.fields.iter().map(|field| field.name));
        let misspelt = |entry: &Entry| !known(&entry.name) && meant(&entry.name) == Some(name);
        if !self.misread && !self.entries.iter().any(misspelt) {
            self.error(self.at, name, complaint);
        }
    }

    /// Reports an error of a field.
    pub fn error(&self, at: Position, name: &str, complaint: Complaint) {
        self.report.error(at, self.path(name), complaint);
    }

    /// Reports something odd about a field.
    pub fn warning(&self, name: &str, complaint: Complaint) {
        self.report.warning(self.place(name), self.path(name), complaint);
    }

    /// A mapping within this one; without the entry, an empty one.
    pub fn section(&self, name: &str) -> Section<'a> {
        static EMPTY: Node = Node { at: Position { line: 0, column: 0 }, data: Data::Null };
        let fields: &[Field] = match self.field(name).map(|field| &field.kind) {
            Some(Kind::Section(fields)) => fields,
            _ => &[],
        };
        let node = self.entry(name).map_or(&EMPTY, |entry| &entry.value);
        let mut section = Self::open(self.report, node, self.path(name), fields);
        if !self.has(name) {
            section.at = self.at;
        }
        section
    }

    /// A mapping from names to mappings.
    pub fn named(&self, name: &str) -> Vec<(&'a Entry, Section<'a>)> {
        let (Some(entry), Some(Kind::Named(fields))) = (self.entry(name), self.field(name).map(|f| &f.kind))
        else {
            return Vec::new();
        };
        let inner = |entry: &'a Entry| {
            let path = self.path(&format!("{name}.{}", entry.name));
            (entry, Section::open(self.report, &entry.value, path, fields))
        };
        match &entry.value.data {
            Data::Map(entries) => entries.iter().map(inner).collect(),
            Data::Null => Vec::new(),
            other => {
                let message = format!("expected a mapping, found {}", other.describe());
                self.error(entry.value.at, name, Complaint::new(message));
                Vec::new()
            }
        }
    }

    /// A list of mappings.
    pub fn sections(&self, name: &str) -> Vec<Section<'a>> {
        let (Some(entry), Some(Kind::Rules(fields))) = (self.entry(name), self.field(name).map(|f| &f.kind))
        else {
            return Vec::new();
        };
        match &entry.value.data {
            Data::List(nodes) => {
                let item = |(index, node): (usize, &'a Node)| {
                    Section::open(self.report, node, self.path(&format!("{name}[{index}]")), fields)
                };
                nodes.iter().enumerate().map(item).collect()
            }
            Data::Null => Vec::new(),
            other => {
                let message = format!("expected a list, found {}", other.describe());
                self.error(entry.value.at, name, Complaint::new(message).help("begin each with `- `"));
                Vec::new()
            }
        }
    }

    /// Any field: the value written, or else the schema's default, if it has one.
    pub fn read<T>(&self, name: &str, parse: impl Fn(&Node) -> Result<T, Complaint>) -> Option<T> {
        match self.entry(name) {
            Some(entry) => self.checked(entry.value.at, name, parse(&entry.value)),
            None => self.default(name).and_then(|node| parse(&node).ok()),
        }
    }

    /// A field that takes text.
    pub fn text<T>(&self, name: &str, parse: impl Fn(&str) -> Result<T, Complaint>) -> Option<T> {
        self.read(name, |node| parse(text(node)?))
    }

    /// A list, item by item.
    pub fn list<T>(&self, name: &str, parse: impl Fn(&Node) -> Result<T, Complaint>) -> Vec<T> {
        let default = self.default(name);
        let Some(node) = self.entry(name).map(|entry| &entry.value).or(default.as_ref()) else {
            return Vec::new();
        };
        let Data::List(items) = &node.data else {
            let message = format!("expected a list, found {}", node.data.describe());
            self.error(node.at, name, Complaint::new(message).help("write [a, b], or a line `- a` for each"));
            return Vec::new();
        };
        let item =
            |(index, item): (usize, &Node)| self.checked(item.at, &format!("{name}[{index}]"), parse(item));
        items.iter().enumerate().filter_map(item).collect()
    }

    /// A field that takes one of a few words.
    pub fn choice<T: Copy>(&self, name: &str, words: &[(&str, T)]) -> Option<T> {
        self.text(name, |text| {
            words.iter().find(|(word, _)| *word == text).map(|(_, value)| *value).ok_or_else(|| {
                let all = words.iter().map(|(word, _)| *word).collect::<Vec<_>>().join(", ");
                let complaint =
                    Complaint::new(format!("`{}` is not one of the values: {all}", shortened(text)));
                match nearest(text, words.iter().map(|(word, _)| *word)) {
                    Some(word) => complaint.help(format!("did you mean `{word}`?")),
                    None => complaint.help(format!("write one of {all}")),
                }
            })
        })
    }

    /// `true` or `false`.
    pub fn flag(&self, name: &str) -> bool {
        let parse = |node: &Node| match &node.data {
            Data::Bool(value) => Ok(*value),
            other => Err(Complaint::new(format!("expected true or false, found {}", other.describe()))
                .help("write true or false, without quotes")),
        };
        self.read(name, parse).unwrap_or_default()
    }

    /// A duration within the schema's range.
    pub fn duration(&self, name: &str) -> Duration {
        self.measure(name, units::duration)
    }

    /// A size in bytes within the schema's range.
    pub fn size(&self, name: &str) -> u64 {
        self.measure(name, units::size)
    }

    /// A whole number within the schema's range.
    pub fn count<T: TryFrom<u64> + Default>(&self, name: &str) -> T {
        self.read(name, |node| self.within(name, number(node)?, number_text))
            .and_then(|number| T::try_from(number).ok())
            .unwrap_or_default()
    }

    /// An absolute path.
    pub fn absolute(&self, name: &str) -> PathBuf {
        self.text(name, absolute).unwrap_or_default()
    }

    /// An absolute path that fits a socket address; `None` without value and default.
    pub fn socket(&self, name: &str) -> Option<PathBuf> {
        self.text(name, socket)
    }

    /// The base URL of a service.
    pub fn url(&self, name: &str) -> Option<Url> {
        self.text(name, url)
    }

    fn measure<T: PartialOrd + Default>(&self, name: &str, parse: fn(&str) -> Result<T, Complaint>) -> T {
        self.read(name, |node| {
            let text = match &node.data {
                Data::Text(text) | Data::Number(text) => text,
                other => {
                    return Err(Complaint::new(format!(
                        "expected a number with a unit, found {}",
                        other.describe()
                    )));
                }
            };
            self.within(name, parse(text)?, parse)
        })
        .unwrap_or_default()
    }

    fn within<T: PartialOrd>(
        &self,
        name: &str,
        value: T,
        parse: fn(&str) -> Result<T, Complaint>,
    ) -> Result<T, Complaint> {
        let Some((least, greatest)) = self.field(name).and_then(|field| field.range) else {
            return Ok(value);
        };
        let default = self.field(name).map_or("", |field| field.default);
        match value >= parse(least)? && value <= parse(greatest)? {
            true => Ok(value),
            false => Err(Complaint::new(format!("expected a value from {least} to {greatest}"))
                .help(format!("the default is {default}"))),
        }
    }

    fn checked<T>(&self, at: Position, name: &str, result: Result<T, Complaint>) -> Option<T> {
        result.map_err(|complaint| self.error(at, name, complaint)).ok()
    }

    fn field(&self, name: &str) -> Option<&'static Field> {
        self.fields.iter().find(|field| field.name == name)
    }

    fn default(&self, name: &str) -> Option<Node> {
        let text = self.field(name)?.default;
        if text.is_empty() { None } else { yaml::parse(text).ok() }
    }
}

fn names(fields: &[Field]) -> String {
    let mut names: Vec<&str> = fields.iter().map(|field| field.name).collect();
    names.sort_unstable();
    names.join(", ")
}

fn nearest<'n>(written: &str, names: impl Iterator<Item = &'n str>) -> Option<&'n str> {
    let written = written.to_lowercase();
    names
        .map(|name| (strsim::jaro_winkler(&written, &name.to_lowercase()), name))
        .filter(|(likeness, _)| *likeness >= LIKENESS)
        .max_by(|(a, _), (b, _)| a.total_cmp(b))
        .map(|(_, name)| name)
}

/// Text; what YAML takes for something else needs quotes.
pub(super) fn text(node: &Node) -> Result<&str, Complaint> {
    let complaint = || Complaint::new(format!("expected text, found {}", node.data.describe()));
    match &node.data {
        Data::Text(text) => Ok(text),
        Data::Number(text) => Err(complaint().help(format!("quote it: \"{text}\""))),
        Data::Bool(value) => Err(complaint().help(format!("quote it: \"{value}\""))),
        Data::Null => Err(complaint().help("give a value, or remove the line")),
        _ => Err(complaint()),
    }
}

/// A whole number.
pub(super) fn number(node: &Node) -> Result<u64, Complaint> {
    match &node.data {
        Data::Number(text) => number_text(text),
        other => Err(Complaint::new(format!("expected a whole number, found {}", other.describe()))
            .help("write digits, without quotes and unit")),
    }
}

fn number_text(text: &str) -> Result<u64, Complaint> {
    text.parse().map_err(|_| {
        Complaint::new(format!("expected a whole number, found {text}"))
            .help("write it in decimal digits, without sign, point or exponent")
    })
}

/// An absolute path without `..`.
pub(super) fn absolute(text: &str) -> Result<PathBuf, Complaint> {
    if let Some((_, path)) = text.split_once("://") {
        return Err(Complaint::new("expected a path, found a URL").help(format!("write {path}")));
    }
    let path = Path::new(text);
    if !path.is_absolute() || text.contains('\0') {
        return Err(Complaint::new(format!("`{}` is not an absolute path", shortened(text)))
            .help("begin it with `/`"));
    }
    match path.components().any(|component| component == Component::ParentDir) {
        true => Err(Complaint::new("the path holds `..`").help("write it out")),
        false => Ok(path.components().collect()),
    }
}

/// An absolute path that fits into a socket address.
pub(super) fn socket(text: &str) -> Result<PathBuf, Complaint> {
    let path = absolute(text)?;
    match path.as_os_str().len() {
        0..=MAX_SOCKET_PATH => Ok(path),
        length => Err(Complaint::new(format!(
            "a socket's path has at most {MAX_SOCKET_PATH} bytes, this has {length}"
        ))
        .help("choose a shorter path")),
    }
}

fn url(text: &str) -> Result<Url, Complaint> {
    let help = "write https://HOST or https://HOST:PORT";
    let url = Url::parse(text)
        .map_err(|error| Complaint::new(format!("`{}` is not a URL: {error}", shortened(text))).help(help))?;
    let bare = url.path() == "/" && url.query().is_none() && url.fragment().is_none();
    if !["http", "https"].contains(&url.scheme()) || url.host().is_none() {
        return Err(Complaint::new(format!("`{}` is not an https URL", shortened(text))).help(help));
    }
    match bare && url.username().is_empty() && url.password().is_none() {
        true => Ok(url),
        false => Err(Complaint::new("an endpoint has neither user, path, query nor fragment").help(help)),
    }
}
