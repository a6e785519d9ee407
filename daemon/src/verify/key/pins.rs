//! Key pins: the public keys that KMS gave, on disk, one small file each.
//!
//! A pin lets the daemon verify while KMS is away, and shows when an alias starts to point at
//! another key. Files, not sled: they must outlive a verdict store that is set aside, and an
//! operator may want to read them.

use std::collections::{HashMap, HashSet};
use std::io::Write;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::verdict::{DenyReason, FailureReason, Stop};

/// A directory of pins.
pub struct Pins {
    directory: PathBuf,
    is_writable: bool,
    /// What could not be written, or may not be: trusted until the process ends all the same.
    kept: Mutex<HashMap<String, Pin>>,
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
        Self { directory, is_writable: true, kept: Mutex::default() }
    }

    /// The pins in `directory`, which are only read: for one-shot commands.
    pub fn only_read(directory: PathBuf) -> Self {
        Self { is_writable: false, ..Self::in_directory(directory) }
    }

    /// The pin of `uri`, if there is one.
    ///
    /// # Errors
    /// When there is one that can't be read (a failure) or understood (a denial). It is not the same
    /// as none: without a pin, whatever KMS gives is trusted.
    pub fn get(&self, uri: &str) -> Result<Option<Pin>, Stop> {
        // A conflict that could not be written is newer than the file.
        if let Some(pin) = self.kept().get(uri).filter(|pin| pin.conflict.is_some()) {
            return Ok(Some(pin.clone()));
        }
        let path = self.path(uri);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(self.kept().get(uri).cloned());
            }
            Err(error) => {
                let why = format!("the key's pin {} can't be read: {}", path.display(), error.kind());
                return Err(FailureReason::KmsUnavailable.because(why).into());
            }
        };
        match parse(&bytes).filter(|pin| pin.uri == uri) {
            Some(pin) => Ok(Some(pin)),
            None => {
                let why = "is damaged (once you know why, remove it and restart pullgate)";
                let why = format!("the key's pin {} {why}", path.display());
                Err(DenyReason::UntrustedIdentity.because(why).into())
            }
        }
    }

    /// Writes a pin whole or not at all.
    ///
    /// # Errors
    /// The file system's.
    pub fn put(&self, pin: &Pin) -> std::io::Result<()> {
        self.kept().insert(pin.uri.clone(), pin.clone());
        if !self.is_writable {
            return Ok(());
        }
        std::fs::create_dir_all(&self.directory)?;
        let mut file = tempfile::NamedTempFile::new_in(&self.directory)?;
        file.write_all(&serde_json::to_vec_pretty(pin)?)?;
        file.as_file().sync_all()?;
        file.persist(self.path(&pin.uri))?;
        self.kept().remove(&pin.uri);
        Ok(())
    }

    /// Every readable pin.
    pub fn all(&self) -> Vec<Pin> {
        let entries = std::fs::read_dir(&self.directory).into_iter().flatten();
        let mut pins: Vec<Pin> =
            entries.filter_map(|entry| parse(&std::fs::read(entry.ok()?.path()).ok()?)).collect();
        let on_disk: HashSet<String> = pins.iter().map(|pin| pin.uri.clone()).collect();
        pins.extend(self.kept().values().filter(|pin| !on_disk.contains(&pin.uri)).cloned());
        pins.sort_by(|a, b| a.uri.cmp(&b.uri));
        pins
    }

    fn path(&self, uri: &str) -> PathBuf {
        self.directory.join(format!("{}.json", hex::encode(Sha256::digest(uri))))
    }

    fn kept(&self) -> MutexGuard<'_, HashMap<String, Pin>> {
        // Every change to it is a single step.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn parse(bytes: &[u8]) -> Option<Pin> {
    serde_json::from_slice::<Pin>(bytes).ok().filter(|pin| pin.trusted.spki().is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pin_outlives_a_restart_and_a_damaged_one_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let pins = Pins::in_directory(directory.path().join("keys"));
        assert_eq!(pins.get("aws-kms://a"), Ok(None));
        let pin =
            Pin { uri: "aws-kms://a".into(), trusted: PinnedKey::new("arn".into(), b"spki"), conflict: None };
        pins.put(&pin).unwrap();
        let again = Pins::in_directory(directory.path().join("keys"));
        assert_eq!(again.get("aws-kms://a"), Ok(Some(pin.clone())));
        assert_eq!(again.all(), std::slice::from_ref(&pin));
        let mut forged = pin;
        forged.trusted.spki = BASE64.encode(b"another");
        again.put(&forged).unwrap();
        assert!(again.get("aws-kms://a").unwrap_err().found().contains("is damaged"));
    }

    /// Without this, a full disk would turn every look into trust on first use.
    #[test]
    fn a_pin_that_cannot_be_written_is_kept_in_memory() {
        let directory = tempfile::tempdir().unwrap();
        let blocked = directory.path().join("file");
        std::fs::write(&blocked, b"").unwrap();
        let pins = Pins::in_directory(blocked.join("keys"));
        let pin = Pin { uri: "u".into(), trusted: PinnedKey::new("arn".into(), b"spki"), conflict: None };
        assert!(pins.put(&pin).is_err());
        // Below a file nothing can be read either: that is an error, not an absence.
        assert!(pins.get("u").is_err() || pins.get("u") == Ok(Some(pin.clone())));
        let read_only = Pins::only_read(directory.path().join("keys"));
        read_only.put(&pin).unwrap();
        assert_eq!(read_only.get("u"), Ok(Some(pin)));
        assert!(!directory.path().join("keys").exists());
    }
}
