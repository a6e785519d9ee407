//! A registry on loopback: Debian's docker-registry, always behind a [`Proxy`].

use crate::oci::Oci;
use crate::process::{Process, free_port, run_ok};
use crate::proxy::Proxy;
use crate::{http, parts};
use anyhow::Result;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The usual user of a registry that asks for a login.
pub const USER: &str = "puller";
/// Their password.
pub const PASSWORD: &str = "correct-horse";
/// A second login: what moto's ECR hands out.
pub const ECR_USER: &str = "AWS";
/// Its password.
pub const ECR_PASSWORD: &str = "123456789012-auth-token";
/// [`PASSWORD`] and [`ECR_PASSWORD`] as bcrypt with the lowest cost.
const HTPASSWD: &str = "puller:$2b$04$rTrq2V70ZMO/SLBrxYYQcOXLcASmB.JxUp9EmSvsXFwahSEoCn2Ri\n\
                        AWS:$2b$04$rTrq2V70ZMO/SLBrxYYQcOKCSqxwzwUOynR7Js0WUZO62AE0XzQ/W\n";
/// A name that the TLS certificate is good for, and that nobody can resolve.
pub const TLS_NAME: &str = "registry.pullgate.test";

/// What kind of registry.
#[derive(Clone, Copy, Default)]
pub struct RegistryOptions {
    /// Asks for [`USER`] and [`PASSWORD`].
    pub login: bool,
    /// HTTPS with a certificate that only [`Registry::ca`] vouches for.
    pub tls: bool,
    /// Has the referrers API of OCI 1.1, with so many entries a page.
    pub referrers: Option<usize>,
}

/// A running registry. Dropping it stops it.
pub struct Registry {
    /// In front of it: counts and faults.
    pub proxy: Proxy,
    process: Process,
    host: String,
    options: RegistryOptions,
    ca: Option<PathBuf>,
}

impl Registry {
    /// Starts one with its storage in `folder`.
    pub async fn start(folder: &Path, options: RegistryOptions) -> Result<Self> {
        std::fs::create_dir_all(folder)?;
        let direct = SocketAddr::from(([127, 0, 0, 1], free_port()?));
        let command = docker_registry(direct, folder, options.login)?;
        let process = Process::start("registry", command, &folder.join("log"))?;
        process.wait_ready(async || http::get(direct, "/v2/").await.is_ok()).await?;
        let (proxy, ca) = if options.tls {
            let (cert, key) = certificate(folder).await?;
            (Proxy::start_tls(direct, &cert, &key).await?, Some(cert))
        } else {
            (Proxy::start(direct).await?, None)
        };
        let host = proxy.address().to_string();
        let registry = Self { host, proxy, process, options, ca };
        if let Some(page) = options.referrers {
            registry.proxy.serve_referrers(registry.oci(), page);
        }
        Ok(registry)
    }

    /// What stands before the first slash of its images' names: `127.0.0.1:PORT`, the proxy's.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// `http://…` or `https://…`.
    pub fn url(&self) -> String {
        let scheme = if self.options.tls { "https" } else { "http" };
        format!("{scheme}://{}", self.host)
    }

    /// The login that it asks for, if any.
    pub fn login(&self) -> Option<(&'static str, &'static str)> {
        self.options.login.then_some((USER, PASSWORD))
    }

    /// The certificate to trust, if it speaks TLS.
    pub fn ca(&self) -> Option<&Path> {
        self.ca.as_deref()
    }

    /// A client that goes past the proxy.
    pub fn oci(&self) -> Oci {
        Oci::new(self.proxy.upstream(), self.login())
    }

    /// Stops the registry behind the proxy: every request is then answered with 502.
    pub fn kill9(&self) {
        self.process.kill9();
    }
}

fn docker_registry(address: SocketAddr, folder: &Path, login: bool) -> Result<Command> {
    let storage = folder.join("storage");
    let mut config = format!(
        "version: 0.1\n\
         log: {{level: warn, accesslog: {{disabled: true}}}}\n\
         storage: {{filesystem: {{rootdirectory: '{}'}}, delete: {{enabled: true}}}}\n\
         http: {{addr: '{address}'}}\n",
        storage.display()
    );
    if login {
        let users = folder.join("htpasswd");
        std::fs::write(&users, HTPASSWD)?;
        config += &format!("auth: {{htpasswd: {{realm: test, path: '{}'}}}}\n", users.display());
    }
    let file = folder.join("config.yml");
    std::fs::write(&file, config)?;
    let mut command = Command::new(parts::path("registry")?);
    command.arg("serve").arg(file).env("OTEL_TRACES_EXPORTER", "none");
    Ok(command)
}

/// A self-signed certificate for loopback.
async fn certificate(folder: &Path) -> Result<(PathBuf, PathBuf)> {
    let (cert, key) = (folder.join("tls.crt"), folder.join("tls.key"));
    let mut openssl = Command::new("openssl");
    openssl
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"])
        .args(["-nodes", "-days", "2", "-subj", "/CN=localhost"])
        .arg("-addext")
        .arg(format!("subjectAltName=IP:127.0.0.1,DNS:localhost,DNS:{TLS_NAME}"))
        .args(["-addext", "basicConstraints=critical,CA:FALSE"])
        .arg("-keyout")
        .arg(&key)
        .arg("-out")
        .arg(&cert);
    run_ok(openssl).await?;
    Ok((cert, key))
}
