//! Content digests (OCI image-spec, "Digests").

use std::fmt;
use std::str::FromStr;

use sha2::{Digest as _, Sha256, Sha384, Sha512};

/// The digest of some content: `sha256:<64 lower-case hex>`, or sha384, sha512.
///
/// A `Digest` says which bytes are meant; [`Digest::matches`] says whether these are the bytes.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest(String);

/// A text that is not a digest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a digest: expected sha256:<64 lower-case hex digits>, or sha384 / sha512")]
pub struct InvalidDigest(String);

impl Digest {
    /// The SHA-256 digest of `bytes`.
    pub fn sha256(bytes: &[u8]) -> Self {
        Self(format!("sha256:{}", hex::encode(Sha256::digest(bytes))))
    }

    /// Whether `bytes` hash to this digest, by its own algorithm.
    pub fn matches(&self, bytes: &[u8]) -> bool {
        let found = match self.algorithm() {
            "sha256" => hex::encode(Sha256::digest(bytes)),
            "sha384" => hex::encode(Sha384::digest(bytes)),
            _ => hex::encode(Sha512::digest(bytes)),
        };
        found == self.hex()
    }

    /// `sha256`, `sha384` or `sha512`.
    pub fn algorithm(&self) -> &str {
        self.split().0
    }

    /// The hexadecimal part.
    pub fn hex(&self) -> &str {
        self.split().1
    }

    /// `algorithm:hex`, as it is written in references and descriptors.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn split(&self) -> (&str, &str) {
        self.0.split_once(':').unwrap_or(("", &self.0))
    }
}

impl FromStr for Digest {
    type Err = InvalidDigest;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let invalid = || InvalidDigest(text.chars().take(80).collect());
        let (algorithm, hex) = text.split_once(':').ok_or_else(invalid)?;
        let length = match algorithm {
            "sha256" => 64,
            "sha384" => 96,
            "sha512" => 128,
            _ => return Err(invalid()),
        };
        let is_hex = hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if hex.len() != length || !is_hex {
            return Err(invalid());
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_match_only_their_own_digest() {
        let digest = Digest::sha256(b"hello");
        assert!(digest.matches(b"hello"));
        assert!(!digest.matches(b"hellp"));
    }

    #[test]
    fn sha512_is_hashed_as_sha512() {
        let text = format!("sha512:{}", hex::encode(Sha512::digest(b"hello")));
        let digest: Digest = text.parse().unwrap();
        assert!(digest.matches(b"hello"));
        assert!(!digest.matches(b"other"));
    }

    #[test]
    fn upper_case_short_and_unknown_digests_are_refused() {
        let hex = "a".repeat(64);
        for text in [
            format!("sha256:{}", hex.to_uppercase()),
            format!("sha256:{}", &hex[1..]),
            format!("md5:{hex}"),
            hex,
            String::new(),
        ] {
            assert!(text.parse::<Digest>().is_err(), "{text}");
        }
    }
}
