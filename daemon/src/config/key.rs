//! Keys that rules name: read once each, and files looked into while somebody is there to fix them.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use sigstore::crypto::CosignVerificationKey;

use super::problem::Complaint;
use crate::verify::key::KeyUri;

/// A PEM public key is less than 1 KiB.
const MAX_FILE: u64 = 64 << 10;

/// Remembers what it has read: thousands of rules name few keys.
#[derive(Default)]
pub(super) struct KeyReader {
    known: HashMap<String, Result<KeyUri, Complaint>>,
}

impl KeyReader {
    pub fn read(&mut self, text: &str) -> Result<KeyUri, Complaint> {
        if let Some(result) = self.known.get(text) {
            return result.clone();
        }
        let result = check(text);
        self.known.insert(text.to_owned(), result.clone());
        result
    }
}

fn check(text: &str) -> Result<KeyUri, Complaint> {
    let key = KeyUri::parse(text).map_err(Complaint::new)?;
    match &key {
        KeyUri::Kms(_) => {}
        KeyUri::Inline(pem) => public_key(pem)?,
        KeyUri::File(path) => {
            let of_file = |complaint: Complaint| Complaint {
                message: format!("the key file {}: {}", path.display(), complaint.message),
                ..complaint
            };
            key_file(path).map_err(of_file)?;
        }
    }
    Ok(key)
}

fn key_file(path: &Path) -> Result<(), Complaint> {
    let unreadable = |error: std::io::Error| Complaint::new(format!("it can't be read: {error}"));
    let file = File::open(path).map_err(unreadable)?;
    if !file.metadata().map_err(unreadable)?.is_file() {
        return Err(Complaint::new("it is not a regular file"));
    }
    let mut pem = String::new();
    file.take(MAX_FILE).read_to_string(&mut pem).map_err(unreadable)?;
    match KeyUri::parse(&pem) {
        Ok(KeyUri::Inline(pem)) => public_key(&pem),
        Ok(_) => Err(Complaint::new("it holds no PEM block")),
        Err(_) if !pem.trim_start().starts_with("-----BEGIN ") => {
            Err(Complaint::new("it holds no PEM block")
                .help("put the public key into it, in PEM (cosign public-key --key …)"))
        }
        Err(message) => Err(Complaint::new(message)),
    }
}

fn public_key(pem: &str) -> Result<(), Complaint> {
    CosignVerificationKey::try_from_pem(pem.as_bytes()).map(drop).map_err(|error| {
        Complaint::new(format!("the PEM block is not a public key that can verify signatures: {error}"))
            .help("ECDSA P-256, P-384, P-521, RSA and Ed25519 keys are known")
    })
}
