//! Tiny images, built and pushed without any tool: the busybox layer is uploaded once a repository,
//! and what differs is in the configuration.

use crate::oci::{self, Oci};
use crate::parts;
use crate::registry::Registry;
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// An image to be; [`Image::push`] makes it real.
#[derive(Clone)]
pub struct Image {
    repository: String,
    tag: String,
    command: Vec<String>,
    environment: Vec<String>,
    labels: serde_json::Map<String, Value>,
    files: Vec<(String, Vec<u8>)>,
    platform: (String, String),
}

/// An image in a registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pushed {
    /// The registry's host and port.
    pub host: String,
    /// The repository, without the host.
    pub repository: String,
    /// The tag.
    pub tag: String,
    /// The manifest's digest, `sha256:…`.
    pub digest: String,
    /// The configuration's digest, which is the image id in containerd.
    pub config_digest: String,
}

impl Pushed {
    /// `host/repository:tag`.
    pub fn by_tag(&self) -> String {
        format!("{}:{}", self.name(), self.tag)
    }

    /// `host/repository@sha256:…`.
    pub fn by_digest(&self) -> String {
        format!("{}@{}", self.name(), self.digest)
    }

    /// `host/repository`.
    pub fn name(&self) -> String {
        format!("{}/{}", self.host, self.repository)
    }

    /// The tag of cosign's old storage for this image: `sha256-<hex>` and a suffix, as `.sig`.
    pub fn cosign_tag(&self, suffix: &str) -> String {
        format!("{}{suffix}", self.digest.replace(':', "-"))
    }
}

/// A multi-platform image in a registry.
#[derive(Clone, Debug)]
pub struct PushedIndex {
    /// The index; its `config_digest` is the first platform's.
    pub index: Pushed,
    /// The manifests, in the order of the platforms.
    pub platforms: Vec<Pushed>,
}

impl Image {
    /// An image of `repository`, tagged `v1`, that prints `hello` and ends. Unique each time.
    pub fn new(repository: &str) -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let now = std::time::SystemTime::UNIX_EPOCH.elapsed();
        let unique = format!(
            "UNIQUE={}-{}-{}",
            std::process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed),
            now.map_or(0, |now| now.as_nanos())
        );
        Self {
            repository: repository.to_owned(),
            tag: "v1".to_owned(),
            command: Vec::new(),
            environment: vec!["PATH=/bin".to_owned(), unique],
            labels: serde_json::Map::new(),
            files: Vec::new(),
            platform: ("linux".to_owned(), architecture().to_owned()),
        }
        .cmd("echo hello")
    }

    /// Another tag than `v1`.
    #[must_use]
    pub fn tag(mut self, tag: &str) -> Self {
        self.tag = tag.to_owned();
        self
    }

    /// What it runs, by `sh -c`.
    #[must_use]
    pub fn cmd(mut self, script: &str) -> Self {
        self.command = ["/bin/sh", "-c", script].map(str::to_owned).to_vec();
        self
    }

    /// An environment variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push(format!("{name}={value}"));
        self
    }

    /// A label in its configuration.
    #[must_use]
    pub fn label(mut self, name: &str, value: &str) -> Self {
        self.labels.insert(name.to_owned(), value.into());
        self
    }

    /// A file, in a layer of its own.
    #[must_use]
    pub fn file(mut self, path: &str, content: &[u8]) -> Self {
        self.files.push((path.to_owned(), content.to_vec()));
        self
    }

    /// Another platform than this machine's, as `linux`, `arm64`.
    #[must_use]
    pub fn platform(mut self, os: &str, architecture: &str) -> Self {
        self.platform = (os.to_owned(), architecture.to_owned());
        self
    }

    /// Layers, configuration and manifest.
    fn build(&self) -> Result<Built> {
        let mut layers = vec![busybox_layer()?.to_vec()];
        if !self.files.is_empty() {
            layers.push(layer(&self.files)?);
        }
        let diff_ids: Vec<String> = layers.iter().map(|layer| oci::digest(layer)).collect();
        let config = serde_json::to_vec(&json!({
            "os": self.platform.0,
            "architecture": self.platform.1,
            "config": {"Cmd": self.command, "Env": self.environment, "Labels": self.labels},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        }))?;
        let described: Vec<Value> = layers.iter().map(|layer| oci::descriptor(oci::LAYER, layer)).collect();
        let manifest = serde_json::to_vec(&json!({
            "schemaVersion": 2,
            "mediaType": oci::MANIFEST,
            "config": oci::descriptor(oci::CONFIG, &config),
            "layers": described,
        }))?;
        Ok(Built { layers, config, manifest })
    }

    /// Builds and pushes it.
    pub async fn push(&self, registry: &Registry) -> Result<Pushed> {
        self.push_as(&registry.oci(), registry.host()).await
    }

    /// [`Image::push`] where the images go by another host's name (a mirror).
    pub async fn push_as(&self, oci: &Oci, host: &str) -> Result<Pushed> {
        let (pushed, _) = self.upload(oci, host, Some(&self.tag)).await?;
        Ok(pushed)
    }

    async fn upload(&self, oci: &Oci, host: &str, tag: Option<&str>) -> Result<(Pushed, Value)> {
        let built = self.build()?;
        for blob in built.layers.iter().chain([&built.config]) {
            oci.put_blob(&self.repository, blob).await?;
        }
        let digest = oci::digest(&built.manifest);
        let mut described = oci::descriptor(oci::MANIFEST, &built.manifest);
        described["platform"] = json!({"os": self.platform.0, "architecture": self.platform.1});
        oci.put_manifest(&self.repository, tag.unwrap_or(&digest), oci::MANIFEST, built.manifest).await?;
        let pushed = Pushed {
            host: host.to_owned(),
            repository: self.repository.clone(),
            tag: self.tag.clone(),
            digest,
            config_digest: oci::digest(&built.config),
        };
        Ok((pushed, described))
    }

    /// Pushes an index of this image for this machine's architecture and for another one.
    pub async fn push_index(&self, registry: &Registry) -> Result<PushedIndex> {
        let other = if architecture() == "arm64" { "amd64" } else { "arm64" };
        let oci = registry.oci();
        let (mut platforms, mut described) = (Vec::new(), Vec::new());
        for image in [self.clone(), self.clone().platform("linux", other)] {
            let (pushed, descriptor) = image.upload(&oci, registry.host(), None).await?;
            platforms.push(pushed);
            described.push(descriptor);
        }
        let index = serde_json::to_vec(&json!({
            "schemaVersion": 2, "mediaType": oci::INDEX, "manifests": described,
        }))?;
        let digest = oci.put_manifest(&self.repository, &self.tag, oci::INDEX, index).await?;
        let mut index = platforms.first().context("no platform")?.clone();
        index.digest = digest;
        Ok(PushedIndex { index, platforms })
    }

    /// Pushes `count` images `<repository>-0` and so on.
    pub async fn push_many(&self, registry: &Registry, count: usize) -> Result<Vec<Pushed>> {
        let images = (0..count).map(|number| {
            let mut image = self.clone().env("NUMBER", &number.to_string());
            image.repository = format!("{}-{number}", self.repository);
            async move { image.push(registry).await }
        });
        // A few at a time: a registry on a small machine gains nothing from more.
        use futures_util::{StreamExt, TryStreamExt};
        futures_util::stream::iter(images).buffered(8).try_collect().await
    }

    /// The image as an OCI archive, as `ctr images import` takes it, under the full name `name`.
    pub fn archive(&self, name: &str) -> Result<Vec<u8>> {
        let built = self.build()?;
        let mut described = oci::descriptor(oci::MANIFEST, &built.manifest);
        described["annotations"] = json!({
            "io.containerd.image.name": name, "org.opencontainers.image.ref.name": self.tag,
        });
        let index = serde_json::to_vec(&json!({"schemaVersion": 2, "manifests": [described]}))?;
        let mut tar = tar::Builder::new(Vec::new());
        add(&mut tar, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#, 0o644)?;
        add(&mut tar, "index.json", &index, 0o644)?;
        for blob in built.layers.iter().chain([&built.config, &built.manifest]) {
            let path = format!("blobs/{}", oci::digest(blob).replace(':', "/"));
            add(&mut tar, &path, blob, 0o644)?;
        }
        Ok(tar.into_inner()?)
    }
}

struct Built {
    layers: Vec<Vec<u8>>,
    config: Vec<u8>,
    manifest: Vec<u8>,
}

/// This machine's architecture in OCI's words.
pub fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "aarch64" => "arm64",
        "x86_64" => "amd64",
        other => other,
    }
}

/// A root file system of a static busybox, the same bytes for every image.
fn busybox_layer() -> Result<&'static [u8]> {
    static LAYER: OnceLock<Vec<u8>> = OnceLock::new();
    if let Some(layer) = LAYER.get() {
        return Ok(layer);
    }
    let busybox = std::fs::read(parts::path("busybox")?)?;
    let mut tar = tar::Builder::new(Vec::new());
    for folder in ["bin/", "tmp/", "etc/"] {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Directory);
        header.set_mode(0o755);
        header.set_size(0);
        tar.append_data(&mut header, folder, std::io::empty())?;
    }
    add(&mut tar, "bin/busybox", &busybox, 0o755)?;
    for applet in ["sh", "echo", "cat", "sleep", "env", "ls", "true", "false", "id"] {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        tar.append_link(&mut header, format!("bin/{applet}"), "busybox")?;
    }
    add(&mut tar, "etc/passwd", b"root:x:0:0:root:/:/bin/sh\n", 0o644)?;
    let layer = tar.into_inner()?;
    Ok(LAYER.get_or_init(|| layer))
}

fn layer(files: &[(String, Vec<u8>)]) -> Result<Vec<u8>> {
    let mut tar = tar::Builder::new(Vec::new());
    for (path, content) in files {
        add(&mut tar, path.trim_start_matches('/'), content, 0o644)?;
    }
    Ok(tar.into_inner()?)
}

fn add(tar: &mut tar::Builder<Vec<u8>>, path: &str, content: &[u8], mode: u32) -> Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_mode(mode);
    header.set_size(content.len().try_into()?);
    Ok(tar.append_data(&mut header, path, content)?)
}
