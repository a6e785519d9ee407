//! Image references, parsed and normalised as containerd does (`distribution/reference`).
//!
//! The grammar is oci-spec's port of that package. Where the port is wider or narrower than
//! containerd, this module refuses: what we can't read exactly as containerd would is denied.

use std::fmt;
use std::net::Ipv6Addr;

use oci_spec::distribution::Reference as OciReference;

use crate::digest::Digest;

/// Longest text that is looked at: 255 characters of name, a tag, a digest, and some slack.
const MAX_LENGTH: usize = 1024;
/// Stands in for an IPv6 host while oci-spec, which does not know them, parses the rest.
const IPV6_PLACEHOLDER: &str = "ipv6.invalid";

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
        let (host, rest) = ipv6_host(text)?;
        let parsed =
            OciReference::try_from(rest.as_str()).map_err(|error| InvalidReference(error.to_string()))?;
        let registry = host.unwrap_or_else(|| parsed.registry().to_owned());
        // containerd keeps a host's case, DNS ignores it: one host, two names for the rules.
        let first = text.split('/').next().unwrap_or_default();
        if registry.bytes().any(|b| b.is_ascii_uppercase())
            || (text.contains('/') && first.bytes().any(|b| b.is_ascii_uppercase()))
        {
            return invalid("the registry's name must be in lower case".into());
        }
        let pointer = match (parsed.digest(), parsed.tag()) {
            (Some(digest), _) => Pointer::Digest(
                digest.parse().map_err(|e: crate::digest::InvalidDigest| InvalidReference(e.to_string()))?,
            ),
            (None, Some(tag)) => Pointer::Tag(tag.to_owned()),
            (None, None) => return invalid("it has neither tag nor digest".into()),
        };
        let repository = Repository { registry, path: parsed.repository().to_owned() };
        Ok(Self { repository, pointer })
    }
}

/// Takes a leading `[IPv6]` host (with port) out of `text`, leaving a name in its place.
fn ipv6_host(text: &str) -> Result<(Option<String>, String), InvalidReference> {
    if !text.starts_with('[') {
        return Ok((None, text.to_owned()));
    }
    let invalid = || InvalidReference("its IPv6 host is not of the form [address]:port/".into());
    let (host, path) = text.split_once('/').ok_or_else(invalid)?;
    let (address, port) = host.split_once(']').ok_or_else(invalid)?;
    let address: Ipv6Addr = address.trim_start_matches('[').parse().map_err(|_| invalid())?;
    // One address has many spellings; the rules see one.
    Ok((Some(format!("[{address}]{port}")), format!("{IPV6_PLACEHOLDER}{port}/{path}")))
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
    fn ipv6_hosts_are_read_and_have_one_spelling() {
        assert_eq!(normalised("[::1]:5000/a:b"), "[::1]:5000/a:b");
        assert_eq!(normalised("[0:0:0:0:0:0:0:1]:5000/a:b"), "[::1]:5000/a:b");
        assert!(Reference::parse("[::1:5000/a").is_err());
        assert!(Reference::parse("[::zz]:5000/a").is_err());
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

    #[test]
    fn an_image_id_reads_as_a_hub_name_as_in_containerd() {
        assert_eq!(normalised("sha256:abcd"), "docker.io/library/sha256:abcd");
    }
}
