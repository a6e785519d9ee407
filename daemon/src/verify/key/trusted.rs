//! A public key that may verify, and the schemes that are sound for it.

use std::fmt;

use sha2::{Digest as _, Sha256};
use sigstore::crypto::{CosignVerificationKey, SigningScheme};

use super::kms::RemoteVerifier;
use crate::verdict::{Denial, DenyReason};

/// A signature scheme: algorithm, padding and hash. The pairs are those that cosign and KMS use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scheme {
    /// RSASSA-PKCS1-v1_5 with SHA-256 (RFC 8017).
    RsaPkcs1Sha256,
    /// RSASSA-PSS with SHA-256 (RFC 8017).
    RsaPssSha256,
    /// ECDSA on P-256 with SHA-256.
    EcdsaP256Sha256,
    /// ECDSA on P-384 with SHA-384.
    EcdsaP384Sha384,
    /// ECDSA on P-521 with SHA-512.
    EcdsaP521Sha512,
    /// Ed25519 (RFC 8032), not pre-hashed.
    Ed25519,
}

impl Scheme {
    /// sigstore's name of it. The number is a key size that only signing uses.
    pub fn sigstore(self) -> SigningScheme {
        match self {
            Self::RsaPkcs1Sha256 => SigningScheme::RSA_PKCS1_SHA256(0),
            Self::RsaPssSha256 => SigningScheme::RSA_PSS_SHA256(0),
            Self::EcdsaP256Sha256 => SigningScheme::ECDSA_P256_SHA256_ASN1,
            Self::EcdsaP384Sha384 => SigningScheme::ECDSA_P384_SHA384_ASN1,
            Self::EcdsaP521Sha512 => SigningScheme::ECDSA_P521_SHA512_ASN1,
            Self::Ed25519 => SigningScheme::ED25519,
        }
    }
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.sigstore().fmt(f)
    }
}

/// A public key under the name by which a rule knows it.
#[derive(Clone, Debug)]
pub struct TrustedKey {
    label: String,
    spki: Vec<u8>,
    pem: String,
    sha256: String,
    schemes: &'static [Scheme],
    kms_id: Option<String>,
    remote: Option<RemoteVerifier>,
}

impl TrustedKey {
    /// A key from its SubjectPublicKeyInfo (RFC 5280), DER.
    ///
    /// # Errors
    /// `untrusted-identity` when it is no key that can verify image signatures.
    pub fn from_spki(label: String, spki: Vec<u8>) -> Result<Self, Denial> {
        let parsed = CosignVerificationKey::try_from_der(&spki).map_err(|_| {
            DenyReason::UntrustedIdentity.because(format!(
                "{label} is not a public key of a known kind (RSA, ECDSA P-256/P-384/P-521, Ed25519)"
            ))
        })?;
        let schemes: &'static [Scheme] = match parsed {
            CosignVerificationKey::RSA_PKCS1_SHA256(_) | CosignVerificationKey::RSA_PSS_SHA256(_) => {
                &[Scheme::RsaPkcs1Sha256, Scheme::RsaPssSha256]
            }
            CosignVerificationKey::ECDSA_P256_SHA256_ASN1(_) => &[Scheme::EcdsaP256Sha256],
            CosignVerificationKey::ECDSA_P384_SHA384_ASN1(_) => &[Scheme::EcdsaP384Sha384],
            CosignVerificationKey::ECDSA_P521_SHA512_ASN1(_) => &[Scheme::EcdsaP521Sha512],
            CosignVerificationKey::ED25519(_) => &[Scheme::Ed25519],
        };
        let sha256 = hex::encode(Sha256::digest(&spki));
        let pem = pem::encode(&pem::Pem::new("PUBLIC KEY", spki.clone()));
        Ok(Self { label, spki, pem, sha256, schemes, kms_id: None, remote: None })
    }

    /// A key from PEM text.
    ///
    /// # Errors
    /// `untrusted-identity` when the text holds no public key.
    pub fn from_pem(label: String, text: &str) -> Result<Self, Denial> {
        match pem::parse(text) {
            Ok(block) if block.tag() == "PUBLIC KEY" => Self::from_spki(label, block.into_contents()),
            _ => Err(DenyReason::UntrustedIdentity.because(format!("{label} holds no PEM block PUBLIC KEY"))),
        }
    }

    /// The same key, which is `id` in KMS (its ARN, also where an alias was asked for).
    pub fn in_kms(mut self, id: String) -> Self {
        self.kms_id = Some(id);
        self
    }

    /// The key's own id in KMS.
    pub fn kms_id(&self) -> Option<&str> {
        self.kms_id.as_deref()
    }

    /// The same key, but KMS verifies as well.
    pub fn verified_by(mut self, remote: RemoteVerifier) -> Self {
        self.remote = Some(remote);
        self
    }

    /// The name: its URI.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// SHA-256 of the SubjectPublicKeyInfo, hexadecimal.
    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    /// The SubjectPublicKeyInfo, DER.
    pub fn spki(&self) -> &[u8] {
        &self.spki
    }

    /// The key as PEM.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// The schemes to try.
    pub fn schemes(&self) -> &'static [Scheme] {
        self.schemes
    }

    /// The remote verifier, where the rule asks for one.
    pub fn remote(&self) -> Option<&RemoteVerifier> {
        self.remote.as_ref()
    }
}
