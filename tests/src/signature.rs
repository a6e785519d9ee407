//! cosign's signature tag, read and spoiled by plain registry calls.

use crate::image::Pushed;
use crate::oci::{self, Oci};
use anyhow::{Context, Result};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;

/// Where cosign keeps a signature's bytes.
pub const SIGNATURE: &str = "dev.cosignproject.cosign/signature";

/// What to spoil.
#[derive(Clone, Debug)]
pub enum Tamper {
    /// The payload names another digest; signature and descriptors as they were before, but right
    /// for the new payload's bytes.
    PayloadDigest(String),
    /// One bit of the signature is other.
    SignatureBit,
    /// The manifest has no layers.
    NoLayers,
    /// The signature annotation is gone.
    NoSignature,
    /// The signature annotation is not base64.
    NotBase64,
    /// The payload is not JSON.
    NotJson,
    /// The layer's descriptor names a size that is not the blob's.
    WrongSize,
    /// The same layer so many times.
    ManyLayers(usize),
}

/// The `.sig` (or `.att`) tag of one image.
pub struct SigTag {
    oci: Oci,
    repository: String,
    /// The tag itself.
    pub tag: String,
}

impl SigTag {
    /// The signature tag of an image.
    pub fn of(oci: &Oci, image: &Pushed) -> Self {
        Self::with_suffix(oci, image, ".sig")
    }

    /// With another suffix, as `.att`, or the empty one of the referrers fallback.
    pub fn with_suffix(oci: &Oci, image: &Pushed, suffix: &str) -> Self {
        Self { oci: oci.clone(), repository: image.repository.clone(), tag: image.cosign_tag(suffix) }
    }

    /// What cosign signs for this image: a simple-signing document.
    pub fn document(image: &Pushed) -> Vec<u8> {
        let critical = serde_json::json!({
            "identity": {"docker-reference": image.name()},
            "image": {"docker-manifest-digest": image.digest},
            "type": "cosign container image signature",
        });
        serde_json::json!({"critical": critical, "optional": null}).to_string().into_bytes()
    }

    /// Puts a signature there that was not made by cosign.
    pub async fn make(&self, payload: &[u8], signature: &[u8]) -> Result<()> {
        let config = b"{}";
        for blob in [payload, config] {
            self.oci.put_blob(&self.repository, blob).await?;
        }
        let mut layer = oci::descriptor("application/vnd.dev.cosign.simplesigning.v1+json", payload);
        layer["annotations"] = serde_json::json!({SIGNATURE: STANDARD.encode(signature)});
        self.put(&serde_json::json!({
            "schemaVersion": 2,
            "mediaType": oci::MANIFEST,
            "config": oci::descriptor(oci::CONFIG, config),
            "layers": [layer],
        }))
        .await
    }

    /// Whether it is there.
    pub async fn exists(&self) -> Result<bool> {
        let found = self.oci.find_manifest(&self.repository, &self.tag).await?;
        Ok(found.is_some())
    }

    /// Its manifest.
    pub async fn manifest(&self) -> Result<Value> {
        let manifest = self.oci.manifest(&self.repository, &self.tag).await?;
        manifest.json()
    }

    /// The bytes of layer `number`: a signed payload, or a DSSE envelope.
    pub async fn payload(&self, number: usize) -> Result<Vec<u8>> {
        let manifest = self.manifest().await?;
        let digest = manifest["layers"][number]["digest"].as_str();
        let digest = digest.context("no such layer")?;
        self.oci.blob(&self.repository, digest).await
    }

    /// Changes the manifest in place.
    pub async fn edit(&self, edit: impl FnOnce(&mut Value)) -> Result<()> {
        let mut manifest = self.manifest().await?;
        edit(&mut manifest);
        self.put(&manifest).await
    }

    /// Replaces the manifest.
    pub async fn put(&self, manifest: &Value) -> Result<()> {
        let bytes = serde_json::to_vec(manifest)?;
        self.oci.put_manifest(&self.repository, &self.tag, oci::MANIFEST, bytes).await?;
        Ok(())
    }

    /// Removes the tag, and the manifest with it.
    pub async fn remove(&self) -> Result<()> {
        let manifest = self.oci.manifest(&self.repository, &self.tag).await?;
        self.oci.delete_manifest(&self.repository, &manifest.digest).await
    }

    /// Puts this image's signatures, as they are, beside another image.
    pub async fn copy_to(&self, other: &SigTag) -> Result<()> {
        let manifest = self.manifest().await?;
        let layers = manifest["layers"].as_array().cloned().unwrap_or_default();
        for blob in layers.iter().chain([&manifest["config"]]) {
            let digest = blob["digest"].as_str().context("no digest")?;
            let bytes = self.oci.blob(&self.repository, digest).await?;
            other.oci.put_blob(&other.repository, &bytes).await?;
        }
        other.put(&manifest).await
    }

    /// Replaces the payload of the first layer; its descriptor is made right for it.
    pub async fn replace_payload(&self, payload: &[u8]) -> Result<()> {
        let digest = self.oci.put_blob(&self.repository, payload).await?;
        self.edit(|manifest| {
            let layer = &mut manifest["layers"][0];
            layer["digest"] = digest.into();
            layer["size"] = payload.len().into();
        })
        .await
    }

    /// Spoils the first signature.
    pub async fn tamper(&self, tamper: Tamper) -> Result<()> {
        match tamper {
            Tamper::PayloadDigest(digest) => {
                let mut payload: Value = serde_json::from_slice(&self.payload(0).await?)?;
                payload["critical"]["image"]["docker-manifest-digest"] = digest.into();
                self.replace_payload(&serde_json::to_vec(&payload)?).await
            }
            Tamper::SignatureBit => {
                let manifest = self.manifest().await?;
                let text = manifest["layers"][0]["annotations"][SIGNATURE].as_str();
                let mut bytes = STANDARD.decode(text.context("no signature")?)?;
                if let Some(last) = bytes.last_mut() {
                    *last ^= 1;
                }
                self.annotate(Some(STANDARD.encode(bytes))).await
            }
            Tamper::NoLayers => self.edit(|manifest| manifest["layers"] = Value::Array(vec![])).await,
            Tamper::NoSignature => self.annotate(None).await,
            Tamper::NotBase64 => self.annotate(Some("!not base64!".to_owned())).await,
            Tamper::NotJson => self.replace_payload(b"{not json").await,
            Tamper::WrongSize => self.edit(|manifest| manifest["layers"][0]["size"] = 7.into()).await,
            Tamper::ManyLayers(count) => {
                self.edit(|manifest| {
                    let layer = manifest["layers"][0].clone();
                    manifest["layers"] = Value::Array(vec![layer; count]);
                })
                .await
            }
        }
    }

    async fn annotate(&self, signature: Option<String>) -> Result<()> {
        self.edit(|manifest| {
            let annotations = &mut manifest["layers"][0]["annotations"];
            match signature {
                Some(text) => annotations[SIGNATURE] = text.into(),
                None => {
                    if let Some(map) = annotations.as_object_mut() {
                        map.remove(SIGNATURE);
                    }
                }
            }
        })
        .await
    }
}
