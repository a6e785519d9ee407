//! Key pins: the public keys that KMS gave, on disk, one small file each.
//!
//! A pin lets the daemon verify while KMS is away, and shows when an alias starts to point at
//! another key. Files, not sled: they must outlive a verdict store that is set aside, and an
//! operator may want to read them.

use std::io::Write;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// A directory of pins.
pub struct Pins {
    directory: Option<PathBuf>,
}

/// One pin.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pin {
    /// The key's URI.
    pub uri: String,
    /// The trusted key.
    pub trusted: PinnedKey,
    /// What KMS gives now, where that is another key: denied until an operator accepts it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub conflict: Option<PinnedKey>,
}

/// A public key on disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PinnedKey {
    /// The key that an alias pointed at, as KMS names it (ARN).
    pub key_id: String,
    /// SHA-256 of the SubjectPublicKeyInfo, hexadecimal.
    pub sha256: String,
    /// The SubjectPublicKeyInfo, DER in base64.
    pub spki: String,
}

impl PinnedKey {
    /// A pin of `spki`.
    pub fn new(key_id: String, spki: &[u8]) -> Self {
        Self { key_id, sha256: hex::encode(Sha256::digest(spki)), spki: BASE64.encode(spki) }
    }

    /// The SubjectPublicKeyInfo; `None` when the file was changed by hand.
    pub fn spki(&self) -> Option<Vec<u8>> {
        let spki = BASE64.decode(&self.spki).ok()?;
        (hex::encode(Sha256::digest(&spki)) == self.sha256).then_some(spki)
    }
}

impl Pins {
    /// The pins in `directory`, which is made when the first pin is written.
    pub fn in_directory(directory: PathBuf) -> Self {
        Self { directory: Some(directory) }
    }

    /// No pins, for one-shot commands.
    pub fn none() -> Self {
        Self { directory: None }
    }

    /// The pin of `uri`. A file that can't be read is logged, and counts as absent.
    pub fn get(&self, uri: &str) -> Option<Pin> {
        let path = self.path(uri)?;
        match std::fs::read(&path) {
            Ok(bytes) => parse(&path, &bytes).filter(|pin| pin.uri == uri),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => {
                tracing::error!(pin = %path.display(), %error, "a key pin can't be read");
                None
            }
        }
    }

    /// Writes a pin whole or not at all.
    ///
    /// # Errors
    /// The file system's.
    pub fn put(&self, pin: &Pin) -> std::io::Result<()> {
        let (Some(path), Some(directory)) = (self.path(&pin.uri), &self.directory) else { return Ok(()) };
        std::fs::create_dir_all(directory)?;
        let mut file = tempfile::NamedTempFile::new_in(directory)?;
        file.write_all(&serde_json::to_vec_pretty(pin)?)?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        Ok(())
    }

    /// Every readable pin.
    pub fn all(&self) -> Vec<Pin> {
        let entries = self.directory.as_ref().and_then(|directory| std::fs::read_dir(directory).ok());
        let mut pins: Vec<Pin> = entries
            .into_iter()
            .flatten()
            .filter_map(|entry| {
                let path = entry.ok()?.path();
                parse(&path, &std::fs::read(&path).ok()?)
            })
            .collect();
        pins.sort_by(|a, b| a.uri.cmp(&b.uri));
        pins
    }

    fn path(&self, uri: &str) -> Option<PathBuf> {
        let name = hex::encode(Sha256::digest(uri));
        self.directory.as_ref().map(|directory| directory.join(format!("{name}.json")))
    }
}

fn parse(path: &Path, bytes: &[u8]) -> Option<Pin> {
    let pin = serde_json::from_slice::<Pin>(bytes).ok().filter(|pin| pin.trusted.spki().is_some());
    if pin.is_none() {
        tracing::error!(pin = %path.display(), "a key pin is damaged; the key is asked for again");
    }
    pin
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pin_outlives_a_restart_and_a_damaged_one_is_absent() {
        let directory = tempfile::tempdir().unwrap();
        let pins = Pins::in_directory(directory.path().join("keys"));
        assert_eq!(pins.get("aws-kms://a"), None);
        let pin =
            Pin { uri: "aws-kms://a".into(), trusted: PinnedKey::new("arn".into(), b"spki"), conflict: None };
        pins.put(&pin).unwrap();
        let again = Pins::in_directory(directory.path().join("keys"));
        assert_eq!(again.get("aws-kms://a"), Some(pin.clone()));
        assert_eq!(again.all(), std::slice::from_ref(&pin));
        let mut forged = pin;
        forged.trusted.spki = BASE64.encode(b"another");
        again.put(&forged).unwrap();
        assert_eq!(again.get("aws-kms://a"), None);
    }
}
