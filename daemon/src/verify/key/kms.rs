//! AWS KMS: the public key once, and verification where a rule asks KMS to do it.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use aws_config::{BehaviorVersion, Region, retry::RetryConfig, timeout::TimeoutConfig};
use aws_sdk_kms::Client;
use aws_sdk_kms::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_kms::primitives::Blob;
use aws_sdk_kms::types::{KeyUsageType, MessageType, SigningAlgorithmSpec};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use sha2::{Digest as _, Sha256, Sha384, Sha512};
use tokio::sync::{Mutex, OnceCell};

use super::trusted::Scheme;
use super::uri::KmsKey;
use crate::config::Aws;
use crate::metrics::Metrics;
use crate::verdict::{Failure, FailureReason};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(4);
const ATTEMPTS: u32 = 3;

/// KMS in every Region that the rules name.
pub struct Kms {
    settings: Aws,
    clients: Mutex<HashMap<(Option<String>, Option<String>), Client>>,
    home: OnceCell<Option<String>>,
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
    pub fn new(settings: Aws, metrics: Arc<Metrics>) -> Self {
        Self { settings, clients: Mutex::default(), home: OnceCell::new(), metrics }
    }

    /// `GetPublicKey`, for a multi-Region key in the node's own Region first.
    ///
    /// # Errors
    /// `kms-throttled` or `kms-unavailable`: the last Region's.
    pub async fn public_key(&self, key: &KmsKey) -> Result<GivenKey, Failure> {
        let mut last = None;
        for place in self.places(key).await {
            match self.public_key_at(&place).await {
                Ok(given) => return Ok(given),
                Err(failure) => last = Some(failure),
            }
        }
        Err(last.unwrap_or_else(|| unavailable(key, "no Region is known for it")))
    }

    async fn public_key_at(&self, key: &KmsKey) -> Result<GivenKey, Failure> {
        let client = self.client(key).await;
        let started = Instant::now();
        let answer = client.get_public_key().key_id(&key.id).send().await;
        let result = match answer {
            Ok(output) => {
                let usable = output.key_usage() == Some(&KeyUsageType::SignVerify);
                match output.public_key() {
                    Some(spki) if usable => Ok(GivenKey {
                        key_id: output.key_id().unwrap_or(&key.id).to_owned(),
                        spki: spki.as_ref().to_vec(),
                    }),
                    _ => Err(unavailable(key, "it is not a key for SIGN_VERIFY")),
                }
            }
            Err(error) => Err(classify(key, "GetPublicKey", &error)),
        };
        self.count("GetPublicKey", started, &result);
        result
    }

    /// `Verify` of one scheme over `message`; `false` when KMS says that the signature is wrong.
    async fn verify(
        &self,
        key: &KmsKey,
        scheme: Scheme,
        message: &[u8],
        signature: &[u8],
    ) -> Result<bool, Failure> {
        let mut last = None;
        for place in self.places(key).await {
            let client = self.client(&place).await;
            let started = Instant::now();
            let (algorithm, hash) = algorithm(scheme, message)
                .ok_or_else(|| unavailable(key, "KMS does not verify Ed25519 over a digest"))?;
            let answer = client
                .verify()
                .key_id(&place.id)
                .message_type(MessageType::Digest)
                .message(Blob::new(hash))
                .signature(Blob::new(signature))
                .signing_algorithm(algorithm)
                .send()
                .await;
            let result = match answer {
                Ok(output) => Ok(output.signature_valid()),
                Err(error) if error.code() == Some("KMSInvalidSignatureException") => Ok(false),
                Err(error) => Err(classify(&place, "Verify", &error)),
            };
            self.count("Verify", started, &result);
            match result {
                Ok(valid) => return Ok(valid),
                Err(failure) => last = Some(failure),
            }
        }
        Err(last.unwrap_or_else(|| unavailable(key, "no Region is known for it")))
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
    async fn home(&self) -> Option<String> {
        let look = async {
            match &self.settings.region {
                Some(region) => Some(region.clone()),
                None => {
                    let chain = aws_config::default_provider::region::DefaultRegionChain::builder().build();
                    let found = tokio::time::timeout(CONNECT_TIMEOUT, chain.region()).await.ok()?;
                    found.map(|region| region.to_string())
                }
            }
        };
        self.home.get_or_init(|| look).await.clone()
    }

    async fn client(&self, key: &KmsKey) -> Client {
        let region = key.region().map(str::to_owned).or_else(|| self.settings.region.clone());
        let configured = region
            .as_ref()
            .and_then(|region| self.settings.regions.get(region)?.kms_endpoint.as_ref())
            .or(self.settings.kms_endpoint.as_ref());
        let endpoint = configured.map(|url| url.to_string()).or_else(|| key.endpoint.clone());
        let mut clients = self.clients.lock().await;
        let slot = (region.clone(), endpoint.clone());
        if let Some(client) = clients.get(&slot) {
            return client.clone();
        }
        let timeouts = TimeoutConfig::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .operation_attempt_timeout(ATTEMPT_TIMEOUT)
            .build();
        let mut loader = aws_config::defaults(BehaviorVersion::latest())
            .retry_config(RetryConfig::standard().with_max_attempts(ATTEMPTS))
            .timeout_config(timeouts);
        if let Some(region) = region {
            loader = loader.region(Region::new(region));
        }
        if let Some(endpoint) = endpoint {
            loader = loader.endpoint_url(endpoint);
        }
        let client = Client::new(&loader.load().await);
        clients.insert(slot, client.clone());
        client
    }

    fn count<T>(&self, operation: &'static str, started: Instant, result: &Result<T, Failure>) {
        let outcome = result.as_ref().map_or_else(|failure| failure.reason.code(), |_| "ok");
        self.metrics.kms_request(operation, outcome, started.elapsed());
    }
}

/// Asks KMS to verify, instead of the public key here (`remoteVerify: true`).
#[derive(Clone)]
pub struct RemoteVerifier {
    kms: Arc<Kms>,
    key: KmsKey,
    schemes: &'static [Scheme],
}

impl RemoteVerifier {
    /// KMS verifies by `key`, which is of a kind that fits `schemes`.
    pub fn new(kms: Arc<Kms>, key: KmsKey, schemes: &'static [Scheme]) -> Self {
        Self { kms, key, schemes }
    }

    /// The scheme by which `signature` (base64) over `message` is good, if it is.
    ///
    /// # Errors
    /// `kms-throttled` or `kms-unavailable`.
    pub async fn verify(&self, message: &[u8], signature: &str) -> Result<Option<Scheme>, Failure> {
        let Ok(signature) = BASE64.decode(signature) else { return Ok(None) };
        for scheme in self.schemes {
            if self.kms.verify(&self.key, *scheme, message, &signature).await? {
                return Ok(Some(*scheme));
            }
        }
        Ok(None)
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

fn unavailable(key: &KmsKey, why: &str) -> Failure {
    FailureReason::KmsUnavailable.because(format!("KMS key {}: {why}", key.id))
}

/// KMS' error code says what happened; its message may hold request ids, so it is left out.
fn classify<E: ProvideErrorMetadata, R>(key: &KmsKey, operation: &str, error: &SdkError<E, R>) -> Failure {
    match error {
        SdkError::ServiceError(service) => {
            let code = service.err().code().unwrap_or("an unknown error");
            match code {
                "ThrottlingException"
                | "Throttling"
                | "TooManyRequestsException"
                | "LimitExceededException"
                | "RequestLimitExceeded" => FailureReason::KmsThrottled
                    .because(format!("KMS key {}: {operation} is throttled", key.id)),
                _ => unavailable(key, &format!("{operation} answers {code}")),
            }
        }
        SdkError::ConstructionFailure(_) => unavailable(key, "no AWS credentials or Region were found"),
        SdkError::DispatchFailure(failure) if failure.is_other() => {
            unavailable(key, "no AWS credentials were found, or the request could not be sent")
        }
        _ => unavailable(key, "KMS can't be reached"),
    }
}
