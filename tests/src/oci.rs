//! The OCI distribution API, as far as fixtures need it.

use crate::http::{self, Answer};
use anyhow::{Context, Result, bail};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::net::SocketAddr;

/// Media type of an image manifest.
pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// Media type of an image index.
pub const INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// Media type of an image configuration.
pub const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// Media type of an uncompressed layer.
pub const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

/// The `sha256:…` digest of bytes.
pub fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

/// A descriptor of bytes.
pub fn descriptor(media_type: &str, bytes: &[u8]) -> Value {
    serde_json::json!({"mediaType": media_type, "digest": digest(bytes), "size": bytes.len()})
}

/// A manifest as the registry gave it.
pub struct Manifest {
    /// Its media type.
    pub media_type: String,
    /// Its digest, worked out from the bytes.
    pub digest: String,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

impl Manifest {
    /// As JSON.
    pub fn json(&self) -> Result<Value> {
        Ok(serde_json::from_slice(&self.bytes)?)
    }
}

/// A client of one registry; talks past the proxy, so that fixtures are neither counted nor spoiled.
#[derive(Clone)]
pub struct Oci {
    address: SocketAddr,
    authorization: Option<String>,
}

impl Oci {
    /// A client of the registry at `address`, which speaks plain HTTP.
    pub fn new(address: SocketAddr, login: Option<(&str, &str)>) -> Self {
        let authorization =
            login.map(|(user, secret)| format!("Basic {}", STANDARD.encode(format!("{user}:{secret}"))));
        Self { address, authorization }
    }

    async fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: Vec<u8>,
    ) -> Result<Answer> {
        let mut headers = headers.to_vec();
        if let Some(authorization) = &self.authorization {
            headers.push(("authorization", authorization));
        }
        http::send(self.address, method, path, &headers, body).await
    }

    /// A manifest by tag or digest; `None` when there is none.
    pub async fn find_manifest(&self, repository: &str, reference: &str) -> Result<Option<Manifest>> {
        let path = format!("/v2/{repository}/manifests/{reference}");
        let accept = format!("{MANIFEST}, {INDEX}, */*");
        let answer = self.send("GET", &path, &[("accept", &accept)], vec![]).await?;
        match answer.status.as_u16() {
            200 => Ok(Some(Manifest {
                media_type: answer.header("content-type").unwrap_or("").to_owned(),
                digest: digest(&answer.body),
                bytes: answer.body.to_vec(),
            })),
            404 => Ok(None),
            status => bail!("GET {path}: {status} {}", answer.text()),
        }
    }

    /// A manifest by tag or digest.
    pub async fn manifest(&self, repository: &str, reference: &str) -> Result<Manifest> {
        let found = self.find_manifest(repository, reference).await?;
        found.with_context(|| format!("no manifest {repository}:{reference}"))
    }

    /// Stores a manifest under a tag or its digest; answers its digest.
    pub async fn put_manifest(
        &self,
        repository: &str,
        reference: &str,
        media_type: &str,
        bytes: Vec<u8>,
    ) -> Result<String> {
        let digest = digest(&bytes);
        let path = format!("/v2/{repository}/manifests/{reference}");
        let answer = self.send("PUT", &path, &[("content-type", media_type)], bytes).await?;
        if answer.status.as_u16() != 201 {
            bail!("PUT {path}: {} {}", answer.status, answer.text());
        }
        Ok(digest)
    }

    /// Stores a manifest by its digest and enters it in the fallback list of what it refers to (its
    /// `subject`), as a client does where the registry has no referrers API.
    pub async fn attach(&self, repository: &str, manifest: &Value) -> Result<String> {
        let bytes = serde_json::to_vec(manifest)?;
        let digest = digest(&bytes);
        let entry = descriptor(MANIFEST, &bytes);
        self.put_manifest(repository, &digest, MANIFEST, bytes).await?;
        let subject = manifest["subject"]["digest"].as_str();
        self.list_referrer(repository, subject.context("no subject")?, entry).await?;
        Ok(digest)
    }

    /// Adds a descriptor to the fallback list of a digest.
    pub async fn list_referrer(&self, repository: &str, subject: &str, entry: Value) -> Result<()> {
        // The list is read, changed and written: one at a time.
        static ONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
        let _one = ONE.lock().await;
        let tag = subject.replace(':', "-");
        let mut index = match self.find_manifest(repository, &tag).await? {
            Some(index) => index.json()?,
            None => serde_json::json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": []}),
        };
        if let Some(list) = index["manifests"].as_array_mut() {
            list.retain(|old| old["digest"] != entry["digest"]);
            list.push(entry);
        }
        let bytes = serde_json::to_vec(&index)?;
        self.put_manifest(repository, &tag, INDEX, bytes).await?;
        Ok(())
    }

    /// Removes a manifest, by digest.
    pub async fn delete_manifest(&self, repository: &str, digest: &str) -> Result<()> {
        let path = format!("/v2/{repository}/manifests/{digest}");
        let answer = self.send("DELETE", &path, &[], vec![]).await?;
        if !answer.status.is_success() {
            bail!("DELETE {path}: {} {}", answer.status, answer.text());
        }
        Ok(())
    }

    /// Points a tag at what another tag or digest names.
    pub async fn retag(&self, repository: &str, from: &str, to: &str) -> Result<String> {
        let manifest = self.manifest(repository, from).await?;
        self.put_manifest(repository, to, &manifest.media_type, manifest.bytes).await
    }

    /// All tags of a repository.
    pub async fn tags(&self, repository: &str) -> Result<Vec<String>> {
        let path = format!("/v2/{repository}/tags/list");
        let answer = self.send("GET", &path, &[], vec![]).await?;
        if answer.status.as_u16() == 404 {
            return Ok(Vec::new());
        }
        let tags = answer.json()?;
        let tags = tags.get("tags").and_then(Value::as_array);
        Ok(tags.into_iter().flatten().filter_map(|tag| tag.as_str().map(str::to_owned)).collect())
    }

    /// A blob's bytes.
    pub async fn blob(&self, repository: &str, digest: &str) -> Result<Vec<u8>> {
        let path = format!("/v2/{repository}/blobs/{digest}");
        let answer = self.send("GET", &path, &[], vec![]).await?;
        if answer.status.as_u16() != 200 {
            bail!("GET {path}: {}", answer.status);
        }
        Ok(answer.body.to_vec())
    }

    /// Stores a blob unless it is there already; answers its digest.
    pub async fn put_blob(&self, repository: &str, bytes: &[u8]) -> Result<String> {
        let digest = digest(bytes);
        let blob = format!("/v2/{repository}/blobs/{digest}");
        if self.send("HEAD", &blob, &[], vec![]).await?.status.as_u16() == 200 {
            return Ok(digest);
        }
        let uploads = format!("/v2/{repository}/blobs/uploads/");
        let begun = self.send("POST", &uploads, &[], vec![]).await?;
        let location = begun
            .header("location")
            .with_context(|| format!("POST {uploads}: {} {}", begun.status, begun.text()))?;
        // Registries answer with a whole address or with a path.
        let location: hyper::Uri = location.parse()?;
        let path = location.path_and_query().map_or("/", |path| path.as_str());
        let joint = if path.contains('?') { '&' } else { '?' };
        let octets = [("content-type", "application/octet-stream")];
        let put = format!("{path}{joint}digest={digest}");
        let done = self.send("PUT", &put, &octets, bytes.to_vec()).await?;
        if done.status.as_u16() != 201 {
            bail!("PUT {put}: {} {}", done.status, done.text());
        }
        Ok(digest)
    }
}
