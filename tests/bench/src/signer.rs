//! Signed images by the hundred: signatures as cosign 2 lays them down, made here, because a
//! cosign process for each would take minutes.

use anyhow::{Result, anyhow};
use aws_lc_rs::encoding::{AsDer, PublicKeyX509Der};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use pullgate_tests::{Containerd, Image, Oci, Pushed, World, oci, signature};
use serde_json::json;
use std::net::SocketAddr;
use std::path::PathBuf;

/// A key, and a world's registry by its own address: the tests' proxy in front of it counts
/// requests, and costs time.
pub struct Signer {
    key: EcdsaKeyPair,
    public: PathBuf,
    oci: Oci,
    registry: SocketAddr,
}

impl Signer {
    pub fn new(world: &World) -> Result<Self> {
        let key = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING).map_err(|_| anyhow!("no key"))?;
        let der: PublicKeyX509Der = key.public_key().as_der().map_err(|_| anyhow!("no public key"))?;
        let public = world.folder("key")?.join("key.pub");
        let text = STANDARD.encode(der.as_ref());
        std::fs::write(&public, format!("-----BEGIN PUBLIC KEY-----\n{text}\n-----END PUBLIC KEY-----\n"))?;
        let signer =
            Self { key, public, oci: world.registry.oci(), registry: world.registry.proxy.upstream() };
        signer.trusted_by(&world.containerd)?;
        Ok(signer)
    }

    /// Where the registry itself listens.
    pub fn registry(&self) -> SocketAddr {
        self.registry
    }

    /// The public key, for cosign.
    pub fn public(&self) -> String {
        self.public.display().to_string()
    }

    /// A policy that requires this key, whether the registry is asked directly or by its proxy.
    pub fn policy(&self, world: &World) -> String {
        let rule = |host: &str| {
            format!(
                "  - {{imageGlob: \"{host}/**\", strategy: signed, keyURI: \"file://{}\"}}\n",
                self.public()
            )
        };
        format!("verificationRules:\n{}{}", rule(&self.registry.to_string()), rule(world.registry.host()))
    }

    /// Lets a containerd pull from the registry directly.
    pub fn trusted_by(&self, containerd: &Containerd) -> Result<()> {
        let folder = containerd.certs().join(self.registry.to_string());
        std::fs::create_dir_all(&folder)?;
        let url = format!("http://{}", self.registry);
        let text = format!("server = '{url}'\n[host.'{url}']\ncapabilities = ['pull', 'resolve']\n");
        Ok(std::fs::write(folder.join("hosts.toml"), text)?)
    }

    /// Signed images with a layer of `extra` bytes of their own.
    pub async fn images(&self, repository: &str, count: usize, extra: usize) -> Result<Vec<Pushed>> {
        self.images_at(&self.registry.to_string(), repository, count, extra).await
    }

    /// [`Signer::images`] by another name of the registry.
    pub async fn images_at(
        &self,
        host: &str,
        repository: &str,
        count: usize,
        extra: usize,
    ) -> Result<Vec<Pushed>> {
        let mut images = Vec::with_capacity(count);
        for number in 0..count {
            let mut image = Image::new(repository).tag(&format!("v{number}"));
            if extra > 0 {
                let content: Vec<u8> = noise(images.len() as u64 ^ now()).take(extra).collect();
                image = image.file("data", &content);
            }
            let pushed = image.push_as(&self.oci, host).await?;
            self.sign(&pushed).await?;
            images.push(pushed);
        }
        Ok(images)
    }

    async fn sign(&self, image: &Pushed) -> Result<()> {
        let payload = json!({
            "critical": {
                "identity": {"docker-reference": image.name()},
                "image": {"docker-manifest-digest": image.digest},
                "type": "cosign container image signature",
            },
            "optional": null,
        });
        let payload = payload.to_string().into_bytes();
        let signed = self.key.sign(&SystemRandom::new(), &payload).map_err(|_| anyhow!("no signature"))?;
        let mut layer = oci::descriptor("application/vnd.dev.cosign.simplesigning.v1+json", &payload);
        layer["annotations"] = json!({signature::SIGNATURE: STANDARD.encode(signed.as_ref())});
        let config =
            json!({"architecture": "", "os": "", "config": {}, "rootfs": {"type": "layers", "diff_ids": []}});
        let config = config.to_string().into_bytes();
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": oci::MANIFEST,
            "config": oci::descriptor(oci::CONFIG, &config),
            "layers": [layer],
        });
        for blob in [&payload, &config] {
            self.oci.put_blob(&image.repository, blob).await?;
        }
        let (tag, manifest) = (image.cosign_tag(".sig"), manifest.to_string().into_bytes());
        self.oci.put_manifest(&image.repository, &tag, oci::MANIFEST, manifest).await?;
        Ok(())
    }
}

fn now() -> u64 {
    std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(1, |now| now.as_nanos() as u64) | 1
}

/// xorshift: bytes that don't compress.
fn noise(seed: u64) -> impl Iterator<Item = u8> {
    std::iter::successors(Some(seed | 1), |last| {
        let mut next = last ^ (last << 13);
        next ^= next >> 7;
        Some(next ^ (next << 17))
    })
    .flat_map(u64::to_le_bytes)
}
