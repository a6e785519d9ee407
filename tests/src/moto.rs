//! AWS KMS and ECR on loopback: moto behind a [`Proxy`].

use crate::process::{Process, free_port};
use crate::proxy::Proxy;
use crate::temp::Temp;
use crate::{http, parts};
use anyhow::{Context, Result, bail};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use tokio::sync::OnceCell;

/// The region that tests use where they don't care.
pub const REGION: &str = "us-east-1";

/// The specs that moto can sign with.
pub const SPECS: [&str; 6] =
    ["RSA_2048", "RSA_3072", "RSA_4096", "ECC_NIST_P256", "ECC_NIST_P384", "ECC_NIST_P521"];

/// An asymmetric signing key in KMS.
#[derive(Clone, Debug)]
pub struct KmsKey {
    /// Its id; `mrk-…` if it is a multi-Region key.
    pub id: String,
    /// Its ARN.
    pub arn: String,
    /// Its region.
    pub region: String,
}

impl KmsKey {
    /// As pullgate's configuration names it.
    pub fn uri(&self) -> String {
        format!("aws-kms://{}", self.arn)
    }

    /// As cosign names it.
    pub fn cosign_uri(&self) -> String {
        format!("awskms:///{}", self.arn)
    }
}

/// The AWS stand-in. The server is shared by all worlds of a test process, the proxy is one's own.
pub struct Moto {
    /// In front of it: counts and faults, which `x-amz-target` tells apart.
    pub proxy: Proxy,
    _own: Option<Process>,
}

struct Shared {
    address: SocketAddr,
    // Both live until the test process ends, and the kernel ends the server with it.
    _process: Process,
    _temp: Temp,
}

impl Moto {
    /// A proxy of one's own in front of the server that the whole test process shares.
    pub async fn shared() -> Result<Self> {
        static SERVER: OnceCell<Shared> = OnceCell::const_new();
        let server = SERVER
            .get_or_try_init(|| async {
                let temp = Temp::new()?;
                let (process, address) = serve(temp.path()).await?;
                anyhow::Ok(Shared { address, _process: process, _temp: temp })
            })
            .await?;
        Ok(Self { proxy: Proxy::start(server.address).await?, _own: None })
    }

    /// A server of one's own, to be killed.
    pub async fn start(folder: &Path) -> Result<Self> {
        let (process, address) = serve(folder).await?;
        Ok(Self { proxy: Proxy::start(address).await?, _own: Some(process) })
    }

    /// What `AWS_ENDPOINT_URL` says.
    pub fn url(&self) -> String {
        format!("http://{}", self.proxy.address())
    }

    /// One call of an AWS JSON API, past the proxy. moto does not check the request's signature, but
    /// reads the region from it.
    pub async fn call(&self, service: &str, region: &str, target: &str, body: &Value) -> Result<Value> {
        let authorization = format!(
            "AWS4-HMAC-SHA256 Credential=test/20260101/{region}/{service}/aws4_request, \
             SignedHeaders=host, Signature=none"
        );
        let headers = [
            ("x-amz-target", target),
            ("content-type", "application/x-amz-json-1.1"),
            ("authorization", authorization.as_str()),
        ];
        let body = serde_json::to_vec(body)?;
        let answer = http::send(self.proxy.upstream(), "POST", "/", &headers, body).await?;
        if !answer.status.is_success() {
            bail!("{target}: {} {}", answer.status, answer.text());
        }
        if answer.body.is_empty() {
            return Ok(Value::Null);
        }
        answer.json()
    }

    async fn kms(&self, region: &str, operation: &str, body: &Value) -> Result<Value> {
        self.call("kms", region, &format!("TrentService.{operation}"), body).await
    }

    /// A signing key in [`REGION`].
    pub async fn create_key(&self, spec: &str) -> Result<KmsKey> {
        self.create_key_in(REGION, spec, false).await
    }

    /// A signing key in a region of choice, multi-Region if asked for.
    pub async fn create_key_in(&self, region: &str, spec: &str, multi: bool) -> Result<KmsKey> {
        let asked = json!({"KeySpec": spec, "KeyUsage": "SIGN_VERIFY", "MultiRegion": multi});
        let answer = self.kms(region, "CreateKey", &asked).await?;
        key(&answer["KeyMetadata"], region)
    }

    /// A replica of a multi-Region key in another region.
    pub async fn replicate_key(&self, primary: &KmsKey, region: &str) -> Result<KmsKey> {
        let asked = json!({"KeyId": primary.id, "ReplicaRegion": region});
        let answer = self.kms(&primary.region, "ReplicateKey", &asked).await?;
        key(&answer["ReplicaKeyMetadata"], region)
    }

    /// An alias (`alias/…`) for a key; answers the alias' ARN.
    pub async fn create_alias(&self, alias: &str, key: &KmsKey) -> Result<String> {
        let asked = json!({"AliasName": alias, "TargetKeyId": key.id});
        self.kms(&key.region, "CreateAlias", &asked).await?;
        let account = key.arn.rsplit_once(':').map_or("", |(head, _)| head);
        Ok(format!("{account}:{alias}"))
    }

    /// Points an alias at another key.
    pub async fn update_alias(&self, alias: &str, key: &KmsKey) -> Result<()> {
        let asked = json!({"AliasName": alias, "TargetKeyId": key.id});
        self.kms(&key.region, "UpdateAlias", &asked).await?;
        Ok(())
    }

    /// Disables a key.
    pub async fn disable_key(&self, key: &KmsKey) -> Result<()> {
        self.kms(&key.region, "DisableKey", &json!({"KeyId": key.id})).await?;
        Ok(())
    }

    /// Signs a message with an algorithm of choice (`RSASSA_PSS_SHA_256`).
    pub async fn sign(&self, key: &KmsKey, algorithm: &str, message: &[u8]) -> Result<Vec<u8>> {
        let asked = json!({
            "KeyId": key.id, "Message": STANDARD.encode(message), "MessageType": "RAW", "SigningAlgorithm": algorithm,
        });
        let answer = self.kms(&key.region, "Sign", &asked).await?;
        Ok(STANDARD.decode(answer["Signature"].as_str().context("no signature")?)?)
    }

    /// A key's public half as PEM.
    pub async fn public_key(&self, key: &KmsKey) -> Result<String> {
        let answer = self.kms(&key.region, "GetPublicKey", &json!({"KeyId": key.id})).await?;
        let base64 = answer["PublicKey"].as_str().context("no public key")?;
        let base64 = STANDARD.encode(STANDARD.decode(base64)?);
        let mut pem = String::from("-----BEGIN PUBLIC KEY-----\n");
        let mut rest = base64.as_str();
        while !rest.is_empty() {
            let (line, more) = rest.split_at(rest.len().min(64));
            pem += line;
            pem.push('\n');
            rest = more;
        }
        pem += "-----END PUBLIC KEY-----\n";
        Ok(pem)
    }

    /// What ECR answers to GetAuthorizationToken: user and password.
    pub async fn ecr_login(&self, region: &str) -> Result<(String, String)> {
        let target = "AmazonEC2ContainerRegistry_V20150921.GetAuthorizationToken";
        let answer = self.call("ecr", region, target, &json!({})).await?;
        let token = answer["authorizationData"][0]["authorizationToken"].as_str();
        let token = String::from_utf8(STANDARD.decode(token.context("no token")?)?)?;
        let (user, password) = token.split_once(':').context("no colon")?;
        Ok((user.to_owned(), password.to_owned()))
    }
}

fn key(metadata: &Value, region: &str) -> Result<KmsKey> {
    let text = |name: &str| metadata[name].as_str().map(str::to_owned);
    Ok(KmsKey {
        id: text("KeyId").context("no KeyId")?,
        arn: text("Arn").context("no Arn")?,
        region: region.to_owned(),
    })
}

async fn serve(folder: &Path) -> Result<(Process, SocketAddr)> {
    let address = SocketAddr::from(([127, 0, 0, 1], free_port()?));
    let mut command = Command::new(parts::path("moto")?.with_file_name("python"));
    command
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/moto_server.py"))
        .args(["-H", "127.0.0.1", "-p", &address.port().to_string()])
        .env("AWS_EC2_METADATA_DISABLED", "true");
    let process = Process::start("moto", command, &folder.join("moto.log"))?;
    process.wait_ready(async || http::get(address, "/moto-api/data.json").await.is_ok()).await?;
    Ok((process, address))
}
