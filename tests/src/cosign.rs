//! The real cosign, old and new, kept off the network: no transparency log, no trust root updates.

use crate::parts;
use crate::process::{Output, run_ok};
use crate::registry::Registry;
use anyhow::{Result, bail};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The password of all file keys.
const PASSWORD: &str = "test";

/// A key pair in files.
#[derive(Clone, Debug)]
pub struct KeyPair {
    /// cosign's encrypted private key.
    pub private: PathBuf,
    /// The public key, PEM.
    pub public: PathBuf,
}

impl KeyPair {
    /// The private key as `--key` takes it.
    pub fn key(&self) -> String {
        self.private.display().to_string()
    }

    /// The public key as pullgate's configuration names it.
    pub fn uri(&self) -> String {
        format!("file://{}", self.public.display())
    }

    /// The public key's text.
    pub fn pem(&self) -> Result<String> {
        Ok(std::fs::read_to_string(&self.public)?)
    }
}

/// Which cosign.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Generation {
    /// 2.x: signatures under `sha256-<hex>.sig`, attestations under `.att`.
    Two,
    /// 3.x: bundles as OCI 1.1 referrers.
    Three,
}

/// One cosign with a home of its own.
pub struct Cosign {
    generation: Generation,
    binary: PathBuf,
    home: PathBuf,
    env: Vec<(String, String)>,
}

impl Cosign {
    /// A cosign with its files in `home` and an environment that says where AWS is.
    pub async fn new(generation: Generation, home: &Path, env: Vec<(String, String)>) -> Result<Self> {
        let binary = parts::path(match generation {
            Generation::Two => "cosign2",
            Generation::Three => "cosign3",
        })?;
        std::fs::create_dir_all(home)?;
        let cosign = Self { generation, binary, home: home.to_owned(), env };
        let services = cosign.services();
        if generation == Generation::Three && !services.exists() {
            // A signing config without services: nothing to log to, nothing to fetch.
            let out = services.display().to_string();
            cosign.run(&["signing-config", "create", "--out", &out]).await?;
        }
        Ok(cosign)
    }

    fn services(&self) -> PathBuf {
        self.home.join("signing-config.json")
    }

    /// Runs it with any arguments; failure is an error with what it said.
    pub async fn run(&self, args: &[&str]) -> Result<Output> {
        let mut command = Command::new(&self.binary);
        command
            .args(args)
            .current_dir(&self.home)
            .env("HOME", &self.home)
            .env("DOCKER_CONFIG", &self.home)
            .env("COSIGN_PASSWORD", PASSWORD)
            .env("COSIGN_YES", "true")
            .envs(self.env.iter().map(|(name, value)| (name, value)));
        run_ok(command).await
    }

    /// Logs in to a registry that asks for it, and trusts its certificate.
    pub fn login(&mut self, registry: &Registry) -> Result<()> {
        if let Some((user, password)) = registry.login() {
            let auth = STANDARD.encode(format!("{user}:{password}"));
            let config = serde_json::json!({"auths": {registry.host(): {"auth": auth}}});
            std::fs::write(self.home.join("config.json"), config.to_string())?;
        }
        if let Some(ca) = registry.ca() {
            self.env.push(("SSL_CERT_FILE".to_owned(), ca.display().to_string()));
        }
        Ok(())
    }

    /// A new P-256 key pair `<name>.key`, `<name>.pub`.
    pub async fn generate_key(&self, name: &str) -> Result<KeyPair> {
        self.run(&["generate-key-pair", "--output-key-prefix", name]).await?;
        Ok(self.pair(name))
    }

    /// A key pair of an algorithm: cosign's own for `p256`; made by openssl and imported for
    /// `ed25519`, and with cosign 3 also `p384`, `p521`, `rsa2048`, `rsa3072` and `rsa4096`. cosign
    /// 2.5.0 imports neither EC nor RSA keys: take them from KMS.
    pub async fn import_key(&self, name: &str, algorithm: &str) -> Result<KeyPair> {
        if algorithm == "p256" {
            return self.generate_key(name).await;
        }
        let pem = format!("{name}.openssl.pem");
        let mut openssl = Command::new("openssl");
        openssl.current_dir(&self.home).args(["genpkey", "-out", &pem]);
        let option = match algorithm {
            "ed25519" => None,
            "p384" => Some("ec_paramgen_curve:P-384".to_owned()),
            "p521" => Some("ec_paramgen_curve:P-521".to_owned()),
            rsa if rsa.starts_with("rsa") => {
                Some(format!("rsa_keygen_bits:{}", rsa.trim_start_matches("rsa")))
            }
            other => bail!("no such algorithm: {other}"),
        };
        match option {
            None => openssl.args(["-algorithm", "ed25519"]),
            Some(bits) if bits.starts_with("rsa") => openssl.args(["-algorithm", "RSA", "-pkeyopt", &bits]),
            Some(curve) => openssl.args(["-algorithm", "EC", "-pkeyopt", &curve]),
        };
        run_ok(openssl).await?;
        self.run(&["import-key-pair", "--key", &pem, "--output-key-prefix", name]).await?;
        Ok(self.pair(name))
    }

    /// The key pair of that name.
    pub fn pair(&self, name: &str) -> KeyPair {
        KeyPair {
            private: self.home.join(format!("{name}.key")),
            public: self.home.join(format!("{name}.pub")),
        }
    }

    /// What keeps a signing command off the network.
    fn offline(&self) -> Vec<String> {
        match self.generation {
            Generation::Two => vec!["--tlog-upload=false".to_owned()],
            Generation::Three => vec![format!("--signing-config={}", self.services().display())],
        }
    }

    /// Signs `host/repository@sha256:…` with a key file or a KMS URI.
    pub async fn sign(&self, key: &str, image: &str) -> Result<()> {
        self.sign_annotated(key, image, &[]).await
    }

    /// [`Cosign::sign`] with signed annotations.
    pub async fn sign_annotated(&self, key: &str, image: &str, annotations: &[(&str, &str)]) -> Result<()> {
        let annotations: Vec<String> =
            annotations.iter().map(|(name, value)| format!("--annotations={name}={value}")).collect();
        let offline = self.offline();
        let mut args = vec!["sign", "--key", key];
        args.extend(offline.iter().chain(&annotations).map(String::as_str));
        args.push(image);
        self.run(&args).await?;
        Ok(())
    }

    /// Attests a predicate of a type (a short name as `slsaprovenance`, or a URI).
    pub async fn attest(
        &self,
        key: &str,
        image: &str,
        kind: &str,
        predicate: &serde_json::Value,
    ) -> Result<()> {
        let file = tempfile::NamedTempFile::new_in(&self.home)?;
        std::fs::write(file.path(), predicate.to_string())?;
        let path = file.path().display().to_string();
        let offline = self.offline();
        let mut args = vec!["attest", "--key", key, "--type", kind, "--predicate", &path];
        args.extend(offline.iter().map(String::as_str));
        args.push(image);
        self.run(&args).await?;
        Ok(())
    }

    /// cosign's own opinion of an image's signature; the verified payloads.
    pub async fn verify(&self, key: &str, image: &str) -> Result<serde_json::Value> {
        let args = ["verify", "--insecure-ignore-tlog=true", "--key", key, image];
        let output = self.run(&args).await?;
        Ok(serde_json::from_str(&output.stdout)?)
    }
}
