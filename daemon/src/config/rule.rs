//! The rules: reading one, and what a list of them must hold to.

use std::collections::{BTreeMap, HashMap};

use super::annotation::AnnotationRequirement;
use super::glob::ImageGlob;
use super::key::KeyReader;
use super::problem::{Complaint, Position};
use super::reach::Reach;
use super::reader::Section;
use super::yaml::{Data, shortened};
use crate::verify::key::KeyUri;

/// A name is a label of metrics and a field of the journal.
const MAX_NAME: usize = 128;

/// One rule: which images, and how they are verified.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rule {
    /// What messages, journal and metrics call it: its `name`, or else the glob.
    pub name: String,
    /// The images that it is for.
    pub image_glob: String,
    /// How they are verified.
    pub strategy: Strategy,
    /// The line of the file in which it begins.
    pub line: usize,
}

/// How a rule verifies an image.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Strategy {
    /// Allowed, without any network call.
    Allow,
    /// Denied, without any network call.
    Deny,
    /// A signature by the key is required.
    Signed(SignedBy),
    /// The same, and the registry may be a local one that speaks plain HTTP.
    Dev(SignedBy),
}

/// Whose signature is required, and what it must say.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SignedBy {
    /// The public key.
    pub key: KeyUri,
    /// Annotations that the signed payload must hold. Default: none.
    pub annotations: BTreeMap<String, AnnotationRequirement>,
    /// KMS verifies, instead of this node with the pinned public key. Default: false.
    pub remote_verify: bool,
}

#[derive(Clone, Copy)]
enum Kind {
    Allow,
    Deny,
    Signed,
    Dev,
}

/// Reads all rules; those with errors are reported and left out.
pub(super) fn read(sections: &[Section<'_>]) -> Vec<(Rule, ImageGlob)> {
    let mut keys = KeyReader::default();
    let mut reach = Reach::default();
    let mut names = HashMap::new();
    let mut rules = Vec::with_capacity(sections.len());
    for section in sections {
        let glob = section.text("imageGlob", |text| Ok((text.to_owned(), ImageGlob::parse(text)?)));
        let name = section.text("name", name);
        let strategy = strategy(section, &mut keys);
        if !section.has("imageGlob") {
            section.missing(
                "imageGlob",
                Complaint::new("missing field")
                    .help("add imageGlob: the images that the rule is for, such as docker.io/library/*"),
            );
        }
        let Some((text, glob)) = glob else { continue };
        let line = section.at.line;
        if let Err(complaint) = reach.add(&text, &glob, line) {
            section.error(section.place("imageGlob"), "imageGlob", complaint);
            continue;
        }
        let named = if name.is_some() { "name" } else { "imageGlob" };
        let name = name.unwrap_or_else(|| text.clone());
        if let Some(first) = names.insert(name.clone(), line) {
            section.error(
                section.place(named),
                named,
                Complaint::new(format!("the name `{}` is taken", shortened(&name)))
                    .help(format!("the rule in line {first} has it; choose another")),
            );
        }
        warn(section, &glob, strategy.as_ref());
        if let Some(strategy) = strategy {
            rules.push((Rule { name, image_glob: text, strategy, line }, glob));
        }
    }
    rules
}

fn name(text: &str) -> Result<String, Complaint> {
    match text.trim().is_empty() || text.len() > MAX_NAME || text.chars().any(char::is_control) {
        true => Err(Complaint::new(format!("a name is one line of 1 to {MAX_NAME} bytes"))
            .help("leave it out to use the glob as the name")),
        false => Ok(text.to_owned()),
    }
}

fn strategy(section: &Section<'_>, keys: &mut KeyReader) -> Option<Strategy> {
    let words = [("signed", Kind::Signed), ("dev", Kind::Dev), ("allow", Kind::Allow), ("deny", Kind::Deny)];
    if !section.has("strategy") {
        section.missing(
            "strategy",
            Complaint::new("missing field").help("add strategy: signed, dev, allow or deny"),
        );
    }
    let kind = section.choice("strategy", &words);
    let signed = signed_by(section, kind, keys);
    match kind? {
        Kind::Allow => unused(section, "allow").then_some(Strategy::Allow),
        Kind::Deny => unused(section, "deny").then_some(Strategy::Deny),
        Kind::Signed => signed.map(Strategy::Signed),
        Kind::Dev => signed.map(Strategy::Dev),
    }
}

/// What `signed` and `dev` need. With an unknown strategy, what is written is still checked.
fn signed_by(section: &Section<'_>, kind: Option<Kind>, keys: &mut KeyReader) -> Option<SignedBy> {
    if matches!(kind, Some(Kind::Allow | Kind::Deny)) {
        return None;
    }
    if kind.is_some() && !section.has("keyURI") {
        section.missing(
            "keyURI",
            Complaint::new("missing field: the strategy needs a key")
                .help("add keyURI: aws-kms://ARN, awskms:///KEY, file:///PATH.pem or a PEM public key"),
        );
    }
    let key = match section.text("keyURI", |text| Ok(text.to_owned())) {
        Some(text) => keys.read(&text).map_err(|c| section.error(section.place("keyURI"), "keyURI", c)).ok(),
        None => None,
    };
    let annotations = annotations(section);
    let remote_verify = section.flag("remoteVerify");
    if remote_verify && matches!(key, Some(KeyUri::File(_) | KeyUri::Inline(_))) {
        section.error(
            section.place("remoteVerify"),
            "remoteVerify",
            Complaint::new("only KMS can verify remotely, and keyURI is not a KMS key")
                .help("remove remoteVerify, or name a KMS key"),
        );
    }
    Some(SignedBy { key: key?, annotations, remote_verify })
}

fn annotations(section: &Section<'_>) -> BTreeMap<String, AnnotationRequirement> {
    let Some(entry) = section.entry("annotations") else { return BTreeMap::new() };
    let report = |at: Position, path: &str, complaint| section.error(at, path, complaint);
    let Data::Map(entries) = &entry.value.data else {
        let found = entry.value.data.describe();
        report(
            entry.value.at,
            "annotations",
            Complaint::new(format!("expected a mapping, found {found}"))
                .help("write {build.system: approved-ci}, or remove the line"),
        );
        return BTreeMap::new();
    };
    if entries.is_empty() {
        report(
            entry.value.at,
            "annotations",
            Complaint::new("the mapping requires nothing").help("name an annotation, or remove the line"),
        );
    }
    let mut requirements = BTreeMap::new();
    for entry in entries {
        match AnnotationRequirement::read(&entry.value) {
            Ok(requirement) => drop(requirements.insert(entry.name.clone(), requirement)),
            Err(complaint) => {
                report(entry.value.at, &format!("annotations.{}", shortened(&entry.name)), complaint);
            }
        }
    }
    requirements
}

/// Reports the fields that mean nothing without verification.
fn unused(section: &Section<'_>, strategy: &str) -> bool {
    let written: Vec<_> = ["keyURI", "annotations", "remoteVerify"]
        .into_iter()
        .filter_map(|name| section.entry(name))
        .collect();
    for entry in &written {
        let help = "remove it, or write strategy: signed";
        section.error(
            entry.at,
            &entry.name,
            Complaint::new(format!("strategy `{strategy}` verifies nothing, so this would have no effect"))
                .help(help),
        );
    }
    written.is_empty()
}

fn warn(section: &Section<'_>, glob: &ImageGlob, strategy: Option<&Strategy>) {
    let registry = glob.prefix().split_once('/').map_or("", |(registry, _)| registry);
    let local = ["localhost", "127.", "[::1]"].iter().any(|host| registry.starts_with(host));
    match strategy {
        Some(Strategy::Allow) if glob.everything_below() == Some("") => {
            section.warning(
                "imageGlob",
                Complaint::new("every image that gets as far as this rule is allowed")
                    .help("name the registries that are trusted without a signature"),
            );
        }
        Some(Strategy::Deny) if glob.is_of_tags() => {
            section.warning(
                "imageGlob",
                Complaint::new("the same image by its digest is not denied: this matches tags only")
                    .help("deny the repository, without a tag"),
            );
        }
        Some(Strategy::Dev(_)) if !local => {
            section.warning(
                "strategy",
                Complaint::new("`dev` permits plain HTTP, and the registry is not on this node")
                    .help("write signed"),
            );
        }
        _ => {}
    }
}
