//! Amazon ECR: the node's own AWS credentials are exchanged for a registry token.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use aws_config::{BehaviorVersion, Region, SdkConfig};
use aws_sdk_ecr::config::timeout::TimeoutConfig;
use aws_sdk_ecr::error::{ProvideErrorMetadata as _, SdkError};
use aws_sdk_ecr::operation::get_authorization_token::{
    GetAuthorizationTokenError, GetAuthorizationTokenOutput,
};
use tokio::sync::OnceCell;
use tokio::time::Instant;

use super::credentials::{Login, Secret, Source, decode_basic};
use crate::breaker::Breaker;
use crate::metrics::Metrics;
use crate::verdict::{Failure, FailureReason};

/// Renewed this long before it expires.
const MARGIN: Duration = Duration::from_secs(5 * 60);
/// A token that was refused although it has not expired is renewed, but no younger one: it is then
/// the role that may not read, and no other token would help.
const TOO_YOUNG: Duration = Duration::from_secs(60);
/// Registries remembered.
const REMEMBERED: usize = 256;
const CONNECT_LIMIT: Duration = Duration::from_secs(3);
const CALL_LIMIT: Duration = Duration::from_secs(8);

/// Where ECR is asked for tokens.
#[derive(Clone, Debug, Default)]
pub struct EcrSettings {
    /// The node's own region, for what the AWS SDK asks on its own (STS). Tokens are always
    /// asked for in the region that the registry's name tells.
    pub region: Option<String>,
    /// An endpoint instead of AWS's own, for all regions.
    pub endpoint: Option<String>,
    /// Endpoints by region; they come before `endpoint`.
    pub regions: BTreeMap<String, String>,
}

/// A private ECR registry, read from its host name.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct EcrRegistry {
    account: String,
    region: String,
    is_fips: bool,
}

/// What comes after the region in the names of the partitions and of the dual-stack endpoints.
const SUFFIXES: &[&str] = &[
    "amazonaws.com",
    "amazonaws.com.cn",
    "amazonaws.eu",
    "on.aws",
    "on.amazonwebservices.com.cn",
    "on.amazonwebservices.eu",
    "sc2s.sgov.gov",
    "c2s.ic.gov",
    "cloud.adc-e.uk",
    "csp.hci.ic.gov",
];

impl EcrRegistry {
    /// Reads `<account>.dkr.ecr[-fips].<region>.<suffix>` and `<account>.dkr-ecr[-fips].…`, the
    /// whole of it: a look-alike is not ECR (Ratify CVE-2025-27403).
    pub(super) fn parse(host: &str) -> Option<Self> {
        let (account, rest) = host.split_once('.')?;
        let rest = rest.strip_prefix("dkr.ecr").or_else(|| rest.strip_prefix("dkr-ecr"))?;
        let (is_fips, rest) = match rest.strip_prefix("-fips.") {
            Some(rest) => (true, rest),
            None => (false, rest.strip_prefix('.')?),
        };
        let (region, suffix) = rest.split_once('.')?;
        let is_account = account.len() == 12 && account.bytes().all(|b| b.is_ascii_digit());
        let is_region = region.starts_with(|c: char| c.is_ascii_alphanumeric())
            && region.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        (is_account && is_region && SUFFIXES.contains(&suffix)).then(|| Self {
            account: account.to_owned(),
            region: region.to_owned(),
            is_fips,
        })
    }
}

/// Tokens for ECR registries, each asked for once and kept until shortly before it expires.
pub(super) struct Ecr {
    settings: EcrSettings,
    metrics: Arc<Metrics>,
    config: OnceCell<SdkConfig>,
    slots: Mutex<HashMap<EcrRegistry, Arc<Slot>>>,
}

struct Slot {
    /// Held while a token is asked for, so that one caller asks and the others wait.
    token: tokio::sync::Mutex<Option<Token>>,
    breaker: Breaker,
}

struct Token {
    secret: Secret,
    given: Instant,
    until: Instant,
}

impl Ecr {
    pub(super) fn new(settings: EcrSettings, metrics: Arc<Metrics>) -> Self {
        Self { settings, metrics, config: OnceCell::new(), slots: Mutex::default() }
    }

    /// The login for a registry.
    ///
    /// # Errors
    /// `registry-throttled`, `registry-auth` where AWS denies or no AWS credentials are found,
    /// `registry-unavailable` otherwise.
    pub(super) async fn login(&self, registry: &EcrRegistry) -> Result<Login, Failure> {
        let slot = self.slot(registry);
        let mut token = slot.token.lock().await;
        if let Some(token) = token.as_ref().filter(|token| token.until > Instant::now()) {
            return Ok(Login { secret: token.secret.clone(), source: Source::Ecr });
        }
        let fresh = self.fresh(registry, &slot).await?;
        let secret = fresh.secret.clone();
        *token = Some(fresh);
        Ok(Login { secret, source: Source::Ecr })
    }

    /// Another login than one that a registry refused, if there is any hope in it. Where ECR gives
    /// none, the old token stays: other repositories may take it.
    pub(super) async fn renew(&self, registry: &EcrRegistry, refused: &Secret) -> Option<Login> {
        let slot = self.slot(registry);
        let mut token = slot.token.lock().await;
        let held = token.as_ref()?;
        if held.secret == *refused {
            if held.given.elapsed() < TOO_YOUNG {
                return None;
            }
            *token = Some(self.fresh(registry, &slot).await.ok()?);
        }
        token.as_ref().map(|token| Login { secret: token.secret.clone(), source: Source::Ecr })
    }

    async fn fresh(&self, registry: &EcrRegistry, slot: &Slot) -> Result<Token, Failure> {
        let permit = slot.breaker.admit()?;
        let fresh = self.ask(registry).await;
        match &fresh {
            Ok(_) => permit.succeeded(),
            Err(failure) => permit.failed(failure),
        }
        self.metrics.ecr_request(fresh.as_ref().map_or_else(|failure| failure.reason.code(), |_| "ok"));
        fresh
    }

    fn slot(&self, registry: &EcrRegistry) -> Arc<Slot> {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        if slots.len() >= REMEMBERED && !slots.contains_key(registry) {
            slots.clear();
        }
        let gauge = self.metrics.breakers_open.with_label_values(&["ecr"]);
        let new = || Arc::new(Slot { token: tokio::sync::Mutex::default(), breaker: Breaker::new(gauge) });
        slots.entry(registry.clone()).or_insert_with(new).clone()
    }

    async fn ask(&self, registry: &EcrRegistry) -> Result<Token, Failure> {
        let client = self.client(registry).await;
        let answer = client.get_authorization_token().send().await;
        let answer = answer.map_err(|error| failure(&registry.region, &error))?;
        read(&answer).ok_or_else(|| {
            FailureReason::RegistryUnavailable
                .because(format!("ECR in {} answers without a token that can be read", registry.region))
        })
    }

    async fn client(&self, registry: &EcrRegistry) -> aws_sdk_ecr::Client {
        let own_region = self.settings.region.as_ref().unwrap_or(&registry.region).clone();
        let load = || aws_config::defaults(BehaviorVersion::latest()).region(Region::new(own_region)).load();
        let shared = self.config.get_or_init(load).await;
        let limits =
            TimeoutConfig::builder().connect_timeout(CONNECT_LIMIT).operation_timeout(CALL_LIMIT).build();
        let mut config = aws_sdk_ecr::config::Builder::from(shared)
            .region(Region::new(registry.region.clone()))
            .timeout_config(limits)
            .use_fips(registry.is_fips);
        if let Some(endpoint) =
            self.settings.regions.get(&registry.region).or(self.settings.endpoint.as_ref())
        {
            config = config.endpoint_url(endpoint).use_fips(false);
        }
        aws_sdk_ecr::Client::from_conf(config.build())
    }
}

/// The first token of the answer. One that is about to expire is good for one use.
fn read(answer: &GetAuthorizationTokenOutput) -> Option<Token> {
    let data = answer.authorization_data().first()?;
    let secret = decode_basic(data.authorization_token()?)?;
    let expires = data.expires_at().and_then(|at| SystemTime::try_from(*at).ok());
    let left = expires.and_then(|at| at.duration_since(SystemTime::now()).ok()).unwrap_or_default();
    let given = Instant::now();
    Some(Token { secret, given, until: given + left.saturating_sub(MARGIN) })
}

/// What AWS says, without its own text: that holds request ids.
fn failure(region: &str, error: &SdkError<GetAuthorizationTokenError>) -> Failure {
    let (reason, what) = match error {
        SdkError::ServiceError(service) => {
            // Codes are names such as AccessDeniedException; anything else is not repeated.
            let code = service.err().code().filter(|code| code.bytes().all(|b| b.is_ascii_alphanumeric()));
            match code.unwrap_or("an error") {
                code if is_throttling(code) => {
                    (FailureReason::RegistryThrottled, format!("asks to slow down ({code})"))
                }
                code if is_denial(code) => (
                    FailureReason::RegistryAuth,
                    format!("denies a token ({code}): allow ecr:GetAuthorizationToken to the node's role"),
                ),
                code => (FailureReason::RegistryUnavailable, format!("answers {code}")),
            }
        }
        SdkError::TimeoutError(_) => {
            (FailureReason::RegistryUnavailable, "gives no answer in time".to_owned())
        }
        SdkError::DispatchFailure(dispatch) if dispatch.is_timeout() || dispatch.is_io() => {
            (FailureReason::RegistryUnavailable, "can't be reached".to_owned())
        }
        SdkError::DispatchFailure(_) | SdkError::ConstructionFailure(_) => (
            FailureReason::RegistryAuth,
            "is not asked: no AWS credentials are found on this node; give it an instance role".to_owned(),
        ),
        _ => (FailureReason::RegistryUnavailable, "answers what can't be read".to_owned()),
    };
    reason.because(format!("ECR in {region} {what}"))
}

fn is_throttling(code: &str) -> bool {
    code.starts_with("Throttling")
        || matches!(
            code,
            "TooManyRequestsException" | "RequestLimitExceeded" | "SlowDown" | "LimitExceededException"
        )
}

fn is_denial(code: &str) -> bool {
    code.starts_with("AccessDenied")
        || code.starts_with("ExpiredToken")
        || code.starts_with("UnrecognizedClient")
        || code.starts_with("InvalidSignature")
        || matches!(
            code,
            "InvalidClientTokenId"
                | "SignatureDoesNotMatch"
                | "MissingAuthenticationTokenException"
                | "OptInRequired"
        )
}

#[cfg(test)]
pub(super) mod tests {
    use aws_sdk_ecr::config::{Credentials, SharedCredentialsProvider};
    use http::StatusCode;

    use super::*;
    use crate::evidence::registry::testing::{Reply, Server};

    /// ECR at `endpoint`, asked with fixed AWS credentials.
    pub(in super::super) async fn ecr_at(endpoint: &str) -> Ecr {
        let settings = EcrSettings { endpoint: Some(endpoint.to_owned()), ..EcrSettings::default() };
        let mut ecr = Ecr::new(settings, Arc::new(Metrics::new().unwrap()));
        let credentials = Credentials::new("AKIDEXAMPLE", "topsecret", None, None, "test");
        let config = aws_config::defaults(BehaviorVersion::latest())
            .credentials_provider(SharedCredentialsProvider::new(credentials))
            .region(Region::new("us-west-2"))
            .retry_config(aws_sdk_ecr::config::retry::RetryConfig::disabled())
            .load()
            .await;
        ecr.config = OnceCell::new_with(Some(config));
        ecr
    }

    /// The answer of GetAuthorizationToken: `AWS:<password>`, expiring in `seconds`.
    pub(in super::super) fn token(password: &str, seconds: u64) -> Reply {
        use base64::Engine as _;
        let expires = SystemTime::now() + Duration::from_secs(seconds);
        let expires = expires.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
        let token = base64::engine::general_purpose::STANDARD.encode(format!("AWS:{password}"));
        let body = serde_json::json!({"authorizationData": [
            {"authorizationToken": token, "expiresAt": expires, "proxyEndpoint": "https://x"}]});
        Reply::ok(body.to_string()).header("content-type", "application/x-amz-json-1.1")
    }

    fn registry() -> EcrRegistry {
        EcrRegistry::parse("123456789012.dkr.ecr.us-west-2.amazonaws.com").unwrap()
    }

    #[test]
    fn only_whole_ecr_names_are_ecr_ratify_cve_2025_27403() {
        for (host, region, is_fips) in [
            ("123456789012.dkr.ecr.us-west-2.amazonaws.com", "us-west-2", false),
            ("123456789012.dkr.ecr-fips.us-gov-west-1.amazonaws.com", "us-gov-west-1", true),
            ("123456789012.dkr.ecr.cn-north-1.amazonaws.com.cn", "cn-north-1", false),
            ("123456789012.dkr.ecr.eusc-de-east-1.amazonaws.eu", "eusc-de-east-1", false),
            ("123456789012.dkr-ecr.eu-west-1.on.aws", "eu-west-1", false),
            ("123456789012.dkr-ecr-fips.us-east-1.on.aws", "us-east-1", true),
            ("123456789012.dkr.ecr.us-isob-east-1.sc2s.sgov.gov", "us-isob-east-1", false),
            ("123456789012.dkr.ecr.us-iso-east-1.c2s.ic.gov", "us-iso-east-1", false),
            ("123456789012.dkr.ecr.eu-isoe-west-1.cloud.adc-e.uk", "eu-isoe-west-1", false),
            ("123456789012.dkr.ecr.us-isof-south-1.csp.hci.ic.gov", "us-isof-south-1", false),
        ] {
            let registry = EcrRegistry::parse(host).unwrap_or_else(|| panic!("{host}"));
            assert_eq!((registry.region.as_str(), registry.is_fips), (region, is_fips), "{host}");
        }
        for host in [
            "123456789012.dkr.ecr.us-west-2.amazonaws.com.evil.io",
            "123456789012.dkr.ecr.us-west-2.evil.amazonaws.com",
            "123456789012.dkr.ecr.us-west-2.amazonaws.com:5000",
            "12345678901.dkr.ecr.us-west-2.amazonaws.com",
            "1234567890123.dkr.ecr.us-west-2.amazonaws.com",
            "x.123456789012.dkr.ecr.us-west-2.amazonaws.com",
            "123456789012.dkrxecr.us-west-2.amazonaws.com",
            "123456789012.dkr.ecr-fake.us-west-2.amazonaws.com",
            "123456789012.dkr.ecr.us-west-2.xamazonaws.com",
            "123456789012.dkr.ecr.us_west.amazonaws.com",
            "123456789012.dkr.ecr..amazonaws.com",
            "public.ecr.aws",
            "",
        ] {
            assert!(EcrRegistry::parse(host).is_none(), "{host}");
        }
    }

    #[tokio::test]
    async fn one_token_serves_many_callers_until_it_expires() {
        let server = Server::new(|_| token("secret", 12 * 3600)).await;
        let ecr = ecr_at(&server.url()).await;
        let registry = registry();
        let logins = futures_util::future::join_all((0..20).map(|_| ecr.login(&registry))).await;
        for login in logins {
            let basic = Secret::Basic { user: "AWS".into(), password: "secret".into() };
            assert!(login.unwrap().secret == basic);
        }
        assert_eq!(server.seen().len(), 1);
    }

    #[tokio::test]
    async fn a_token_about_to_expire_is_used_once_and_renewed() {
        let server = Server::new(|_| token("secret", 60)).await;
        let ecr = ecr_at(&server.url()).await;
        ecr.login(&registry()).await.unwrap();
        ecr.login(&registry()).await.unwrap();
        assert_eq!(server.seen().len(), 2);
    }

    #[tokio::test]
    async fn a_refused_token_is_renewed_unless_it_is_new() {
        let asked = std::sync::atomic::AtomicUsize::new(0);
        let next = move || asked.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let server = Server::new(move |_| token(&format!("secret-{}", next()), 12 * 3600)).await;
        let ecr = ecr_at(&server.url()).await;
        let first = ecr.login(&registry()).await.unwrap().secret;
        assert!(ecr.renew(&registry(), &first).await.is_none());
        ecr.slot(&registry()).token.lock().await.as_mut().unwrap().given -= TOO_YOUNG;
        let second = ecr.renew(&registry(), &first).await.unwrap().secret;
        assert!(second != first && ecr.login(&registry()).await.unwrap().secret == second);
        assert!(
            ecr.renew(&registry(), &first).await.unwrap().secret == second,
            "it has been renewed already"
        );
        assert_eq!(server.seen().len(), 2);
    }

    #[tokio::test]
    async fn what_aws_refuses_is_told_without_request_ids() {
        for (status, code, reason) in [
            (400, "AccessDeniedException", FailureReason::RegistryAuth),
            (400, "ThrottlingException", FailureReason::RegistryThrottled),
            (400, "UnrecognizedClientException", FailureReason::RegistryAuth),
            (500, "ServerException", FailureReason::RegistryUnavailable),
        ] {
            let server = Server::new(move |_| {
                let body = serde_json::json!({"__type": code, "message": "id 1234-5678 topsecret"});
                Reply::status(StatusCode::from_u16(status).unwrap(), body.to_string())
                    .header("content-type", "application/x-amz-json-1.1")
                    .header("x-amzn-requestid", "1234-5678")
            })
            .await;
            let failure = ecr_at(&server.url()).await.login(&registry()).await.unwrap_err();
            assert_eq!(failure.reason, reason, "{code}");
            assert!(failure.found.contains(code), "{}", failure.found);
            assert!(!failure.found.contains("1234") && !failure.found.contains("topsecret"));
        }
    }

    #[tokio::test]
    async fn an_endpoint_that_is_away_is_unavailable() {
        let failure = ecr_at("http://127.0.0.1:1").await.login(&registry()).await.unwrap_err();
        assert_eq!(failure, FailureReason::RegistryUnavailable.because("ECR in us-west-2 can't be reached"));
    }
}
