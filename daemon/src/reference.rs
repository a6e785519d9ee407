//! Image references, parsed and normalised as containerd does (`distribution/reference`).
//!
//! The grammar is small and walked by hand: the regular expression by which oci-spec reads it
//! holds Unicode tables of some MiB and takes longer than all the rest of a judgement from memory.
//! A test holds this module to oci-spec's reading. What we can't read exactly as containerd
//! would is denied.

use std::fmt;
use std::net::Ipv6Addr;

use crate::digest::{Digest, InvalidDigest};

/// Longest text that is looked at: 255 characters of name, a tag, a digest, and some slack.
const MAX_LENGTH: usize = 1024;
/// Longest path of a repository (`RepositoryNameTotalLengthMax`).
const MAX_PATH: usize = 255;
/// Longest tag.
const MAX_TAG: usize = 128;

const DOCKER_HUB: &str = "docker.io";
const DOCKER_HUB_LEGACY: &str = "index.docker.io";
/// Hosts that serve what is named `docker.io`.
const DOCKER_HUB_HOSTS: &[&str] =
    &[DOCKER_HUB, DOCKER_HUB_LEGACY, "registry-1.docker.io", "registry.hub.docker.com"];

/// A repository: registry host (with port, if any) and path, such as `docker.io/library/busybox`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Repository {
    registry: String,
    path: String,
}

impl Repository {
    /// Host and port as written in the reference: `docker.io`, `127.0.0.1:5000`, `[fd00::1]:5000`.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// The path within the registry: `library/busybox`.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The same repository by its registry's plain name, where this one spells it out: with the port
    /// that https has anyway, with zeros before the port, or as a host behind Docker Hub.
    pub fn plain(&self) -> Option<Self> {
        let (host, port) = match self.registry.rsplit_once(':') {
            Some((host, port)) if is_number(port) => (host, port.trim_start_matches('0')),
            _ => (self.registry.as_str(), "443"),
        };
        let is_registry = host.contains('.') || host == "localhost" || host.ends_with(']');
        let registry = match port {
            "443" if DOCKER_HUB_HOSTS.contains(&host) => DOCKER_HUB.to_owned(),
            "443" if is_registry => host.to_owned(),
            port => format!("{host}:{port}"),
        };
        if registry == self.registry {
            return None;
        }
        let path = match registry == DOCKER_HUB && !self.path.contains('/') {
            true => format!("library/{}", self.path),
            false => self.path.clone(),
        };
        Some(Self { registry, path })
    }

    /// `repository@digest`: the only form in which an image is asked for.
    pub fn at(&self, digest: &Digest) -> String {
        format!("{self}@{digest}")
    }
}

impl fmt::Display for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.path)
    }
}

/// What a reference points with: a tag that may move, or a digest that can't.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Pointer {
    /// A tag, `latest` where none was written.
    Tag(String),
    /// A digest. A tag beside it was dropped: containerd ignores it, so it can lie.
    Digest(Digest),
}

/// A normalised image reference.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Reference {
    /// The repository.
    pub repository: Repository,
    /// The tag or the digest.
    pub pointer: Pointer,
}

/// A text that is not an image reference, with the reason for a person.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidReference(String);

impl Reference {
    /// Parses and normalises `text`: default registry, `library/`, default tag; the tag of
    /// `name:tag@digest` is dropped.
    pub fn parse(text: &str) -> Result<Self, InvalidReference> {
        let invalid = |why: String| Err(InvalidReference(why));
        if text.len() > MAX_LENGTH {
            return invalid(format!("it is longer than {MAX_LENGTH} bytes"));
        }
        if !text.bytes().all(|b| b.is_ascii_graphic()) {
            return invalid("it holds characters other than visible ASCII".into());
        }
        // containerd refuses these too: they would be taken for an image ID.
        if text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return invalid("a repository can't be named by 64 hex digits".into());
        }
        let (registry, rest) = split_registry(text);
        let registry = match registry.starts_with('[') {
            true => ipv6_host(registry)?,
            false => named_host(registry)?.to_owned(),
        };
        let (name, digest) = rest.split_once('@').map_or((rest, None), |(name, digest)| (name, Some(digest)));
        let (path, tag) = name.split_once(':').map_or((name, None), |(path, tag)| (path, Some(tag)));
        let path = match registry == DOCKER_HUB && !path.contains('/') {
            true => format!("library/{}", checked_path(path)?),
            false => checked_path(path)?.to_owned(),
        };
        if path.len() > MAX_PATH {
            return invalid(format!("its repository's name is longer than {MAX_PATH} characters"));
        }
        let tag = tag.map(checked_tag).transpose()?;
        let pointer = match digest {
            Some(digest) => {
                Pointer::Digest(digest.parse().map_err(|e: InvalidDigest| InvalidReference(e.to_string()))?)
            }
            None => Pointer::Tag(tag.unwrap_or("latest").to_owned()),
        };
        Ok(Self { repository: Repository { registry, path }, pointer })
    }
}

/// The registry, and what follows it: the first component is a registry only if it looks like one
/// (`splitDockerDomain`). An upper-case one does too, so that it is refused as such.
fn split_registry(text: &str) -> (&str, &str) {
    let is_host = |first: &str| {
        first.contains(['.', ':']) || first == "localhost" || first.bytes().any(|b| b.is_ascii_uppercase())
    };
    match text.split_once('/') {
        Some((DOCKER_HUB_LEGACY, rest)) => (DOCKER_HUB, rest),
        Some((first, rest)) if is_host(first) => (first, rest),
        _ => (DOCKER_HUB, text),
    }
}

/// `[address]:port`, in the one spelling of the address that the rules see.
fn ipv6_host(text: &str) -> Result<String, InvalidReference> {
    let invalid = || InvalidReference(format!("its host `{text}` is not of the form [address]:port"));
    let (address, rest) = text.strip_prefix('[').and_then(|text| text.split_once(']')).ok_or_else(invalid)?;
    let address: Ipv6Addr = address.parse().map_err(|_| invalid())?;
    // containerd does not know the form ::ffff:1.2.3.4, in which Rust writes these.
    let address = match (address.to_ipv4_mapped(), address.segments()) {
        (Some(_), [.., high, low]) => format!("::ffff:{high:x}:{low:x}"),
        _ => address.to_string(),
    };
    match rest.strip_prefix(':') {
        Some(port) if is_number(port) => Ok(format!("[{address}]:{port}")),
        None if rest.is_empty() => Ok(format!("[{address}]")),
        _ => Err(invalid()),
    }
}

/// `host` or `host:port`.
fn named_host(text: &str) -> Result<&str, InvalidReference> {
    // containerd keeps a host's case, DNS ignores it: one host, two names for the rules.
    if text.bytes().any(|b| b.is_ascii_uppercase()) {
        return Err(InvalidReference("the registry's name must be in lower case".into()));
    }
    let (host, port) = text.split_once(':').map_or((text, None), |(host, port)| (host, Some(port)));
    let is_label = |label: &str| {
        let inside = |b: u8| b.is_ascii_alphanumeric() || b == b'-';
        !label.is_empty() && !label.starts_with('-') && !label.ends_with('-') && label.bytes().all(inside)
    };
    // `distribution/reference` takes `my_host.lan/a` for one long path, and containerd then asks my_host.lan.
    match (host.split('.').all(is_label) && port.is_none_or(is_number)) || is_component(text) {
        true => Ok(text),
        false => Err(InvalidReference(format!("its registry `{text}` is not of the form host or host:port"))),
    }
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())
}

/// Lower-case letters and digits, with `.`, `_`, `__` or dashes between them.
fn is_component(text: &str) -> bool {
    let is_word = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let is_separator = |text: &str| matches!(text, "." | "_" | "__") || text.bytes().all(|b| b == b'-');
    text.starts_with(is_word) && text.ends_with(is_word) && text.split(is_word).all(is_separator)
}

fn checked_path(path: &str) -> Result<&str, InvalidReference> {
    match path.split('/').all(is_component) {
        true => Ok(path),
        false => Err(InvalidReference(format!(
            "its repository `{path}` is not of lower-case letters and digits, with `.`, `_`, `__` or `-` between them"
        ))),
    }
}

fn checked_tag(tag: &str) -> Result<&str, InvalidReference> {
    let is_word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let is_tag = tag.bytes().next().is_some_and(is_word)
        && tag.bytes().all(|b| is_word(b) || matches!(b, b'.' | b'-'))
        && tag.len() <= MAX_TAG;
    match is_tag {
        true => Ok(tag),
        false => Err(InvalidReference(format!(
            "its tag `{tag}` is not of at most {MAX_TAG} letters, digits, `_`, `.` and `-`"
        ))),
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.pointer {
            Pointer::Tag(tag) => write!(f, "{}:{tag}", self.repository),
            Pointer::Digest(digest) => write!(f, "{}@{digest}", self.repository),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff";

    fn normalised(text: &str) -> String {
        Reference::parse(text).unwrap_or_else(|e| panic!("{text}: {e}")).to_string()
    }

    #[test]
    fn every_spelling_of_one_image_is_one_name() {
        for text in [
            "a",
            "a:latest",
            "library/a",
            "docker.io/a",
            "docker.io/library/a:latest",
            "index.docker.io/library/a",
        ] {
            assert_eq!(normalised(text), "docker.io/library/a:latest", "{text}");
        }
    }

    #[test]
    fn a_digest_drops_the_tag_beside_it() {
        let with_tag = format!("host:5000/a/b:good@sha256:{HEX}");
        assert_eq!(normalised(&with_tag), format!("host:5000/a/b@sha256:{HEX}"));
    }

    #[test]
    fn a_registry_has_one_plain_name() {
        for (text, plain) in [
            ("quay.io:443/a", Some("quay.io/a")),
            ("quay.io:0443/a", Some("quay.io/a")),
            ("[::1]:443/a", Some("[::1]/a")),
            ("localhost:443/a", Some("localhost/a")),
            ("registry-1.docker.io/library/a", Some("docker.io/library/a")),
            ("registry-1.docker.io/a", Some("docker.io/library/a")),
            ("registry-1.docker.io:443/library/a", Some("docker.io/library/a")),
            ("registry.hub.docker.com:443/b/a", Some("docker.io/b/a")),
            ("index.docker.io:443/library/a", Some("docker.io/library/a")),
            ("docker.io:443/library/a", Some("docker.io/library/a")),
            ("quay.io:08443/a", Some("quay.io:8443/a")),
            ("registry:05000/a", Some("registry:5000/a")),
            ("docker.io/library/a", None),
            ("quay.io/a", None),
            ("quay.io:8443/a", None),
            ("[::443]/a", None),
            // `registry/a` would be on Docker Hub.
            ("registry:443/a", None),
        ] {
            let reference = Reference::parse(text).unwrap();
            assert_eq!(
                reference.repository.plain().map(|plain| plain.to_string()).as_deref(),
                plain,
                "{text}"
            );
        }
    }

    #[test]
    fn ipv6_hosts_are_read_and_have_one_spelling() {
        assert_eq!(normalised("[::1]:5000/a:b"), "[::1]:5000/a:b");
        assert_eq!(normalised("[0:0:0:0:0:0:0:1]:5000/a:b"), "[::1]:5000/a:b");
        assert_eq!(normalised("[::ffff:102:304]:5000/a:b"), "[::ffff:102:304]:5000/a:b");
        assert!(Reference::parse("[::1:5000/a").is_err());
        assert!(Reference::parse("[::zz]:5000/a").is_err());
        assert!(Reference::parse("[[::1]:5000/a").is_err());
        assert!(Reference::parse("[::1]:50x0/a").is_err());
    }

    #[test]
    fn what_containerd_would_read_otherwise_is_refused() {
        let long = "a".repeat(300);
        let upper_digest = format!("a@sha256:{}", HEX.to_uppercase());
        for text in [
            "",
            "Busybox",
            "HOST.example.com/a",
            "Host/a",
            "a b",
            "a\n",
            "a\u{0}b",
            "a:täg",
            "a:ß",
            HEX,
            &long,
            &upper_digest,
            "a@sha256:abc",
            "a@md5:d41d8cd98f00b204e9800998ecf8427e",
            "a:",
            ":a",
            "/a",
            "a//b",
            "http://a/b",
        ] {
            assert!(Reference::parse(text).is_err(), "{text:?}");
        }
    }

    /// Texts put together from the grammar's own pieces and from what breaks it: oci-spec's port of
    /// `distribution/reference` reads each in the same way.
    #[test]
    fn the_grammar_is_that_of_oci_spec() {
        let (long, longest, too_long) = ("a".repeat(130), "a".repeat(247), "a".repeat(256));
        let (sha256, sha512) = (format!("@sha256:{HEX}"), format!("@sha512:{HEX}{HEX}"));
        let digests = ["", "@", "@sha256:", "@a", &sha256, &sha512, &sha256[..40]];
        let hosts = [
            "",
            "docker.io/",
            "index.docker.io/",
            "localhost/",
            "a/",
            "a.b/",
            "a-b.c:5000/",
            "-a.b/",
            "a-.b/",
            "a..b/",
            "a:/",
            "a:5x/",
            "a_b.c/",
            "a.b./",
            "1.2.3.4:80/",
            ".a/",
            "a@b.c/",
        ];
        let paths = [
            "",
            "a",
            "a/b",
            "a/b/c",
            "a.b",
            "a..b",
            "a_b",
            "a__b",
            "a___b",
            "a-b",
            "a---b",
            "a.-b",
            "a_-b",
            "-a",
            "a-",
            ".a",
            "a/",
            "a//b",
            "a/.b",
            "a1/2b",
            "A",
            "a/B",
            "a+b",
            "a%b",
            "library/a",
            &long,
            &longest,
            &too_long,
        ];
        let tags =
            ["", ":", ":a", ":A_b.c-1", ":.a", ":-a", ":_a", ":a:b", ":a+b", ":5000", &format!(":{long}")];
        let mut texts = Vec::new();
        for (host, path) in hosts.iter().flat_map(|host| paths.iter().map(move |path| (host, path))) {
            for (tag, digest) in tags.iter().flat_map(|tag| digests.iter().map(move |digest| (tag, digest))) {
                texts.push(format!("{host}{path}{tag}{digest}"));
            }
        }
        let mut read = 0;
        for text in texts {
            let ours = Reference::parse(&text).ok();
            let theirs = oci_spec::distribution::Reference::try_from(text.as_str()).ok();
            let theirs = theirs.map(|theirs| {
                let (registry, path) = (theirs.registry().to_owned(), theirs.repository().to_owned());
                let pointer = match theirs.digest() {
                    Some(digest) => Pointer::Digest(digest.parse().unwrap()),
                    None => Pointer::Tag(theirs.tag().unwrap().to_owned()),
                };
                Reference { repository: Repository { registry, path }, pointer }
            });
            assert_eq!(ours, theirs, "{text}");
            read += usize::from(ours.is_some());
        }
        assert!(read > 1000, "the pieces make too few references: {read}");
    }

    #[test]
    fn a_mistake_is_told_in_the_words_that_were_written() {
        let error = Reference::parse("Busybox").unwrap_err().to_string();
        assert!(error.contains("`Busybox`"), "{error}");
    }

    #[test]
    fn an_image_id_reads_as_a_hub_name_as_in_containerd() {
        assert_eq!(normalised("sha256:abcd"), "docker.io/library/sha256:abcd");
    }
}
