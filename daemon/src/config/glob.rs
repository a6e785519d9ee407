//! One image glob: what it may say, and what it matches.
//!
//! The matching is globset's, with `*` and `?` kept from crossing `/`. A glob is matched against
//! the repository alone, or, if its last path component holds a `:` or an `@`, against the whole
//! `repository:tag` or `repository@digest`. What globset would read otherwise than its author
//! meant, and what no normalised name can match, is refused (`lint`).

use std::sync::OnceLock;

use globset::{GlobBuilder, GlobMatcher};

use super::problem::Complaint;

/// No reference is longer, so no longer glob can be of use.
const MAX_LENGTH: usize = 1024;

/// A checked glob.
#[derive(Clone, Debug)]
pub(super) struct ImageGlob {
    /// What every matching name begins with; for [`Form::Literal`] the name itself.
    prefix: String,
    /// Whether tag or digest belong to what is matched.
    whole: bool,
    /// Whether there is an `@` in it.
    names_digest: bool,
    form: Form,
}

#[derive(Clone, Debug)]
enum Form {
    /// No wildcard: the prefix is the name.
    Literal,
    /// `prefix/**` or `**`: everything below the prefix.
    Below,
    /// Anything else. The regex is compiled when a name first gets as far as to need it:
    /// ten thousand of them would make the start slow, and most are never needed.
    Wild(Box<Wild>),
}

#[derive(Clone, Debug)]
struct Wild {
    glob: String,
    /// What every matching name ends with.
    suffix: String,
    /// The longest text without wildcards after the first one: every matching name holds it.
    core: String,
    matcher: OnceLock<Option<GlobMatcher>>,
}

/// A glob, taken apart: characters that stand for themselves, and wildcards.
#[derive(Clone, PartialEq, Debug)]
pub(super) enum Piece {
    Char(char),
    Star,
    AnyChar,
    /// The text between `[` and `]`.
    Class(String),
    /// The text between `{` and `}`.
    Alternatives(String),
}

impl ImageGlob {
    /// Reads a glob; what can't match any image, or not what it seems to, is refused.
    pub fn parse(text: &str) -> Result<Self, Complaint> {
        if text.is_empty() {
            return Err(Complaint::new("the glob is empty")
                .help("write an image, such as docker.io/library/busybox, or ** for every image"));
        }
        if text.len() > MAX_LENGTH {
            return Err(Complaint::new(format!("the glob is longer than {MAX_LENGTH} bytes")));
        }
        let pieces = pieces(text)?;
        super::lint::check(text, &pieces)?;
        let glob = Self::of(text, &pieces);
        if matches!(glob.form, Form::Wild(_)) {
            build(text)
                .map_err(|error| Complaint::new(format!("the glob can't be read: {}", error.kind())))?;
        }
        Ok(glob)
    }

    fn of(text: &str, pieces: &[Piece]) -> Self {
        let prefix: String = pieces.iter().map_while(literal).collect();
        let last = pieces.rsplit(|piece| *piece == Piece::Char('/')).next().unwrap_or_default();
        let whole = pieces.contains(&Piece::Char('/')) && last.iter().any(names_pointer);
        let form = match pieces.get(prefix.len()..) {
            Some([]) => Form::Literal,
            Some([Piece::Star, Piece::Star]) => Form::Below,
            rest => Form::Wild(Box::new(Wild::new(text, rest.unwrap_or_default()))),
        };
        Self { prefix, whole, names_digest: text.contains('@'), form }
    }

    /// Whether an image is meant; `full` is its repository with its tag or digest.
    pub fn matches(&self, repository: &str, full: &str) -> bool {
        let name = match self.whole {
            // A glob over tags means no digest, whatever its `*` would take.
            true if full.contains('@') && self.is_of_tags() => return false,
            true => full,
            false => repository,
        };
        match &self.form {
            Form::Literal => name == self.prefix,
            Form::Below => name.starts_with(&self.prefix),
            Form::Wild(wild) => name.starts_with(&self.prefix) && wild.matches(name),
        }
    }

    /// What every matching name begins with.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// What every matching name ends with; the empty text where that is not known.
    pub fn suffix(&self) -> &str {
        match &self.form {
            Form::Literal | Form::Below => "",
            Form::Wild(wild) => &wild.suffix,
        }
    }

    /// Whether tag or digest belong to the name that is matched.
    pub fn whole(&self) -> bool {
        self.whole
    }

    /// Whether it is about tags, so that no digest matches.
    pub fn is_of_tags(&self) -> bool {
        self.whole && !self.names_digest
    }

    /// `prefix/` of `prefix/**`, and the empty text of `**`: everything that begins so matches.
    pub fn everything_below(&self) -> Option<&str> {
        matches!(self.form, Form::Below).then_some(self.prefix.as_str())
    }

    /// The repository of a glob that is one repository, with every tag and digest.
    pub fn whole_repository(&self) -> Option<&str> {
        (matches!(self.form, Form::Literal) && !self.whole).then_some(self.prefix.as_str())
    }

    /// The one repository to which every match belongs, if there is just one.
    pub fn only_repository(&self) -> Option<&str> {
        if !self.whole {
            return self.whole_repository();
        }
        let (path, last) = self.prefix.rsplit_once('/')?;
        let end = path.len() + 1 + last.find([':', '@'])?;
        self.prefix.get(..end)
    }
}

impl Wild {
    /// `rest` begins with the first wildcard.
    fn new(glob: &str, rest: &[Piece]) -> Self {
        let runs = rest.split(|piece| literal(piece).is_none()).map(|run| {
            // `**` takes the slashes beside it, so they are not always in the name.
            run.iter().filter_map(literal).collect::<String>().trim_matches('/').to_owned()
        });
        let runs: Vec<String> = runs.collect();
        let suffix = runs.last().cloned().unwrap_or_default();
        let core = runs.into_iter().max_by_key(String::len).unwrap_or_default();
        Self { glob: glob.to_owned(), suffix, core, matcher: OnceLock::new() }
    }

    fn matches(&self, name: &str) -> bool {
        // `ImageGlob::parse` has built the same text: `None` can't happen.
        let compile = || build(&self.glob).ok().map(|glob| glob.compile_matcher());
        name.ends_with(&self.suffix)
            && name.contains(&self.core)
            && self.matcher.get_or_init(compile).as_ref().is_some_and(|matcher| matcher.is_match(name))
    }
}

fn literal(piece: &Piece) -> Option<char> {
    match piece {
        Piece::Char(c) => Some(*c),
        _ => None,
    }
}

fn names_pointer(piece: &Piece) -> bool {
    match piece {
        Piece::Char(c) => [':', '@'].contains(c),
        Piece::Class(text) | Piece::Alternatives(text) => text.contains([':', '@']),
        Piece::Star | Piece::AnyChar => false,
    }
}

/// globset's reading of a glob, with the options that make it a policy language.
pub(super) fn build(text: &str) -> Result<globset::Glob, globset::Error> {
    GlobBuilder::new(text).literal_separator(true).backslash_escape(true).build()
}

/// Takes a glob apart as globset does, and refuses what would surprise.
pub(super) fn pieces(text: &str) -> Result<Vec<Piece>, Complaint> {
    let mut pieces = Vec::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        pieces.push(match c {
            '*' => Piece::Star,
            '?' => Piece::AnyChar,
            '[' => Piece::Class(class(&until(&mut chars, '[', ']')?, text)?),
            '{' => Piece::Alternatives(alternatives(until(&mut chars, '{', '}')?)?),
            ']' | '}' => {
                return Err(Complaint::new(format!("the `{c}` was never opened"))
                    .help(r"an IPv6 address is written \[fd00::1\]:5000/**"));
            }
            '\\' => match chars.next() {
                Some(c @ ('[' | ']')) => Piece::Char(c),
                _ => {
                    return Err(Complaint::new(r"a backslash may stand before `[` and `]` only")
                        .help("no image name holds any other character that would need one"));
                }
            },
            c => Piece::Char(c),
        });
    }
    Ok(pieces)
}

fn until(chars: &mut std::str::Chars<'_>, open: char, close: char) -> Result<String, Complaint> {
    match chars.as_str().split_once(close) {
        Some((inside, rest)) => {
            *chars = rest.chars();
            Ok(inside.to_owned())
        }
        None => Err(Complaint::new(format!("the `{open}` is never closed")).help(format!("add a `{close}`"))),
    }
}

fn class(inside: &str, glob: &str) -> Result<String, Complaint> {
    if inside.matches(':').count() > 1 {
        return Err(Complaint::new(format!(
            "`[{inside}]` stands for one of these characters, not for an address"
        ))
        .help(format!(r"write {}", glob.replacen('[', r"\[", 1).replacen(']', r"\]", 1))));
    }
    if inside.starts_with(['!', '^']) {
        return Err(Complaint::new(format!("`[{inside}]` would match a `/` too"))
            .help("list the characters that may stand there, such as [0-9]"));
    }
    let bytes = inside.as_bytes();
    let spans_slash =
        bytes.windows(3).any(|w| matches!(w, [from, b'-', to] if (*from..=*to).contains(&b'/')));
    if inside.is_empty() || inside.contains(['/', '\\', '[']) || spans_slash {
        return Err(Complaint::new(format!("`[{inside}]` is not a list of characters in a name"))
            .help("list the characters that may stand there, without `/`, `[` and `\\`, such as [0-9]"));
    }
    Ok(inside.to_owned())
}

fn alternatives(inside: String) -> Result<String, Complaint> {
    match inside.contains(['/', ':', '@', '*', '?', '[', '{', '\\']) {
        true => Err(Complaint::new(format!("`{{{inside}}}` holds more than parts of one path component"))
            .help("write one rule for each alternative")),
        false => Ok(inside),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::Reference;

    fn matches(glob: &str, image: &str) -> bool {
        let reference = Reference::parse(image).unwrap();
        let glob = ImageGlob::parse(glob).unwrap_or_else(|c| panic!("{glob}: {c:?}"));
        glob.matches(&reference.repository.to_string(), &reference.to_string())
    }

    #[test]
    fn a_glob_matches_what_it_says() {
        let hex = "a".repeat(64);
        let digest = |name: &str| format!("{name}@sha256:{hex}");
        for (glob, image, expected) in [
            ("**", "busybox", true),
            ("docker.io/library/busybox", "busybox", true),
            ("docker.io/library/busybox", "busybox:1.36", true),
            ("docker.io/library/busybox", &digest("busybox:1.36"), true),
            ("docker.io/library/busybox", "busybox2", false),
            ("docker.io/library/busybox:1.*", "busybox:1.36", true),
            ("docker.io/library/busybox:1.*", "busybox:2", false),
            ("docker.io/library/busybox:1.*", &digest("busybox:1.36"), false),
            ("docker.io/*/*:*", &digest("busybox"), false),
            ("docker.io/library/*:aaa*", &digest("busybox"), false),
            ("docker.io/library/busybox@*", &digest("busybox"), true),
            ("docker.io/library/busybox@*", "busybox", false),
            ("quay.io/*", "quay.io/a", true),
            ("quay.io/*", "quay.io/a/b", false),
            ("quay.io/**", "quay.io/a/b/c:d", true),
            ("quay.io/**", "quay.io.evil.com/a", false),
            ("quay.io/**", "evil.com/quay.io/a", false),
            ("**/app", "quay.io/a/app:1", true),
            ("**/app", "quay.io/a/myapp:1", false),
            ("quay.io/**/app", "quay.io/app", true),
            ("quay.io/**/app", "quay.io/a/b/app", true),
            ("quay.io/a?c", "quay.io/abc", true),
            ("quay.io/a?c", "quay.io/a/c", false),
            ("quay.io/a[/0-9]c", "quay.io/a/c", false),
            ("quay.io/app-[0-9]", "quay.io/app-7", true),
            ("quay.io/app-[0-9]", "quay.io/app-x", false),
            ("quay.io/{a,b}/c", "quay.io/b/c", true),
            ("quay.io/{a,b}/c", "quay.io/d/c", false),
            ("localhost:5000/**", "localhost:5000/a/b:c", true),
            ("localhost:5000/**", "localhost:5001/a", false),
            (r"\[fd00::1\]:5000/**", "[fd00::1]:5000/a", true),
            ("quay.io/a.c", "quay.io/abc", false),
        ] {
            if glob.contains("[/") {
                assert!(ImageGlob::parse(glob).is_err());
                continue;
            }
            assert_eq!(matches(glob, image), expected, "{glob} {image}");
        }
    }

    #[test]
    fn one_repository_is_known_as_such() {
        let only = |glob: &str| ImageGlob::parse(glob).unwrap().only_repository().map(str::to_owned);
        assert_eq!(only("quay.io/a:1.*").as_deref(), Some("quay.io/a"));
        assert_eq!(only("host:5000/a@sha256:*").as_deref(), Some("host:5000/a"));
        assert_eq!(only("host:5000/a").as_deref(), Some("host:5000/a"));
        assert_eq!(only("host:5000/a*:1"), None);
        assert_eq!(only("host:5000/*"), None);
    }
}
