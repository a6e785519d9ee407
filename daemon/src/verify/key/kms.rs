//! AWS KMS: the public key once, and verification where a rule asks KMS to do it.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use aws_config::default_provider::region::DefaultRegionChain;
use aws_sdk_kms::Client;
use aws_sdk_kms::error::ProvideErrorMetadata as _;
use aws_sdk_kms::primitives::Blob;
use aws_sdk_kms::types::{KeyUsageType, MessageType, SigningAlgorithmSpec};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use sha2::{Digest as _, Sha256, Sha384, Sha512};
use tokio::sync::{Mutex, OnceCell};

use super::endpoint::{CONNECT_LIMIT, Endpoint, Fault, TRIES, unavailable};
use super::trusted::Scheme;
use super::uri::KmsKey;
use crate::config::Aws;
use crate::metrics::Metrics;
use crate::verdict::{DenyReason, Failure, Stop};

/// A Region, and an endpoint other than its own.
type Place = (String, Option<String>);

/// KMS in every Region that the rules name.
pub struct Kms {
    settings: Aws,
    requests_per_second: u32,
    endpoints: Mutex<HashMap<Place, Arc<Endpoint>>>,
    home: OnceCell<String>,
    metrics: Arc<Metrics>,
}

/// A public key as KMS gave it.
#[derive(Clone, Debug)]
pub struct GivenKey {
    /// The key's ARN, also where an alias was asked for.
    pub key_id: String,
    /// The SubjectPublicKeyInfo, DER.
    pub spki: Vec<u8>,
}

impl Kms {
    /// KMS as configured; no request is made, nor credentials looked for, until a key is needed.
    /// Each Region is sent `requests_per_second` at most; 0 is no limit.
    pub fn new(settings: Aws, requests_per_second: u32, metrics: Arc<Metrics>) -> Self {
        let (endpoints, home) = (Mutex::default(), OnceCell::new());
        Self { settings, requests_per_second, endpoints, home, metrics }
    }

    /// `GetPublicKey`, for a multi-Region key in the node's own Region first.
    ///
    /// # Errors
    /// `kms-throttled` or `kms-unavailable`: the last Region's.
    pub async fn public_key(&self, key: &KmsKey) -> Result<GivenKey, Failure> {
        self.ask(key, "GetPublicKey", |client, id| async move {
            let answer = client.get_public_key().key_id(&id).send().await;
            let output = answer.map_err(|error| Fault::of("GetPublicKey", &error))?;
            match output.public_key() {
                Some(spki) if output.key_usage() == Some(&KeyUsageType::SignVerify) => Ok(GivenKey {
                    key_id: output.key_id().unwrap_or(&id).to_owned(),
                    spki: spki.as_ref().to_vec(),
                }),
                _ => Err(Fault::lasting(unavailable("it is not a key for SIGN_VERIFY"))),
            }
        })
        .await
    }

    /// `Verify` of one scheme over `message`; `false` when KMS says that the signature is wrong.
    async fn verify(
        &self,
        key: &KmsKey,
        scheme: Scheme,
        message: &[u8],
        signature: &[u8],
    ) -> Result<bool, Stop> {
        let (algorithm, hash) = algorithm(scheme, message).ok_or_else(|| {
            DenyReason::UntrustedIdentity
                .because("KMS does not verify Ed25519 over a digest: drop `remoteVerify`")
        })?;
        let (hash, signature) = (Blob::new(hash), Blob::new(signature));
        self.ask(key, "Verify", |client, id| {
            let request = client
                .verify()
                .key_id(id)
                .message_type(MessageType::Digest)
                .message(hash.clone())
                .signature(signature.clone())
                .signing_algorithm(algorithm.clone());
            async move {
                match request.send().await {
                    Ok(output) => Ok(output.signature_valid()),
                    Err(error) if error.code() == Some("KMSInvalidSignatureException") => Ok(false),
                    Err(error) => Err(Fault::of("Verify", &error)),
                }
            }
        })
        .await
        .map_err(Stop::from)
    }

    /// Asks in one Region after the other until one answers.
    async fn ask<T, F>(
        &self,
        key: &KmsKey,
        operation: &'static str,
        call: impl Fn(Client, String) -> F,
    ) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, Fault>>,
    {
        let places = self.places(key).await;
        let mut last = None;
        for (number, place) in places.iter().enumerate() {
            // The next Region is the next try; only the last one is asked again.
            let tries = if number + 1 == places.len() { TRIES } else { 1 };
            let call = |client| call(client, place.id.clone());
            let answer = match self.endpoint(place).await {
                Ok(endpoint) => endpoint.ask(operation, tries, &self.metrics, call).await,
                Err(failure) => Err(failure),
            };
            match answer {
                Ok(answer) => return Ok(answer),
                Err(failure) => last = Some(about(place, failure)),
            }
        }
        Err(last.unwrap_or_else(|| about(key, unavailable("no Region is known for it"))))
    }

    /// The key in each Region to ask, in order.
    async fn places(&self, key: &KmsKey) -> Vec<KmsKey> {
        let Some(region) = key.region().filter(|_| key.is_multi_region()) else { return vec![key.clone()] };
        let mut regions: Vec<String> = Vec::new();
        let home = self.home().await;
        let others = self.settings.replica_regions.iter().cloned();
        for candidate in home.into_iter().chain([region.to_owned()]).chain(others) {
            if !regions.contains(&candidate) {
                regions.push(candidate);
            }
        }
        regions.iter().map(|region| key.in_region(region)).collect()
    }

    /// The node's own Region: configured, or found by the SDK's chain (environment, profile, IMDS).
    /// One that is not found is looked for again.
    async fn home(&self) -> Option<String> {
        let look = async {
            if let Some(region) = &self.settings.region {
                return Ok(region.clone());
            }
            let chain = DefaultRegionChain::builder().build();
            let found = tokio::time::timeout(CONNECT_LIMIT, chain.region()).await;
            found.ok().flatten().map(|region| region.to_string()).ok_or(())
        };
        self.home.get_or_try_init(|| look).await.ok().cloned()
    }

    async fn endpoint(&self, key: &KmsKey) -> Result<Arc<Endpoint>, Failure> {
        let region = match key.region() {
            Some(region) => region.to_owned(),
            None => {
                self.home().await.ok_or_else(|| unavailable("no AWS Region is known: set `aws.region`"))?
            }
        };
        let own = self.settings.regions.get(&region).and_then(|own| own.kms_endpoint.as_ref());
        let configured = own.or(self.settings.kms_endpoint.as_ref());
        let url = key.endpoint.clone().or_else(|| configured.map(|url| url.to_string()));
        let mut endpoints = self.endpoints.lock().await;
        let slot = (region.clone(), url.clone());
        if let Some(endpoint) = endpoints.get(&slot) {
            return Ok(Arc::clone(endpoint));
        }
        let new = Arc::new(Endpoint::new(region, url, self.requests_per_second, &self.metrics).await);
        endpoints.insert(slot, Arc::clone(&new));
        Ok(new)
    }
}

/// The failure, with the key that it is about.
fn about(key: &KmsKey, failure: Failure) -> Failure {
    Failure { found: format!("KMS key {}: {}", key.id, failure.found), ..failure }
}

/// Asks KMS to verify, instead of the public key here (`remoteVerify: true`).
#[derive(Clone)]
pub struct RemoteVerifier {
    kms: Arc<Kms>,
    key: KmsKey,
}

impl RemoteVerifier {
    /// KMS verifies by `key`: the pinned key's own id, never an alias that may have moved.
    pub fn new(kms: Arc<Kms>, key: KmsKey) -> Self {
        Self { kms, key }
    }

    /// Whether KMS says that `signature` (base64) over `message` is good.
    ///
    /// # Errors
    /// `kms-throttled` or `kms-unavailable`; a denial for a kind of key that KMS can't verify with.
    pub async fn verify(&self, scheme: Scheme, message: &[u8], signature: &str) -> Result<bool, Stop> {
        match BASE64.decode(signature) {
            Ok(signature) => self.kms.verify(&self.key, scheme, message, &signature).await,
            Err(_) => Ok(false),
        }
    }
}

impl fmt::Debug for RemoteVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RemoteVerifier({})", self.key.id)
    }
}

fn algorithm(scheme: Scheme, message: &[u8]) -> Option<(SigningAlgorithmSpec, Vec<u8>)> {
    let sha256 = || Sha256::digest(message).to_vec();
    Some(match scheme {
        Scheme::RsaPkcs1Sha256 => (SigningAlgorithmSpec::RsassaPkcs1V15Sha256, sha256()),
        Scheme::RsaPssSha256 => (SigningAlgorithmSpec::RsassaPssSha256, sha256()),
        Scheme::EcdsaP256Sha256 => (SigningAlgorithmSpec::EcdsaSha256, sha256()),
        Scheme::EcdsaP384Sha384 => (SigningAlgorithmSpec::EcdsaSha384, Sha384::digest(message).to_vec()),
        Scheme::EcdsaP521Sha512 => (SigningAlgorithmSpec::EcdsaSha512, Sha512::digest(message).to_vec()),
        Scheme::Ed25519 => return None,
    })
}
