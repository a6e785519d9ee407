//! The referrers API of OCI 1.1, put in front of a registry that has none. The lists are kept in the
//! fallback tags that clients write for such a registry; what is pushed with a subject is entered
//! there, and the client is told so.

use crate::oci;
use crate::oci::Oci;
use anyhow::Result;
use serde_json::{Value, json};

/// A page of referrers.
pub(crate) struct Page {
    /// The index, as JSON.
    pub body: Vec<u8>,
    /// Where the next page is.
    pub next: Option<String>,
}

/// The repository and the digest that a path asks the referrers of.
pub(crate) fn asked(path: &str) -> Option<(&str, &str)> {
    let (repository, digest) = path.strip_prefix("/v2/")?.split_once("/referrers/")?;
    Some((repository, digest))
}

/// The repository that a path pushes a manifest to.
pub(crate) fn pushed_to(path: &str) -> Option<&str> {
    let (repository, _) = path.strip_prefix("/v2/")?.split_once("/manifests/")?;
    Some(repository)
}

/// Enters a manifest that was stored; answers the digest that it refers to.
pub(crate) async fn stored(oci: &Oci, repository: &str, manifest: &[u8]) -> Result<Option<String>> {
    let Ok(json) = serde_json::from_slice::<Value>(manifest) else {
        return Ok(None);
    };
    let Some(subject) = json["subject"]["digest"].as_str() else {
        return Ok(None);
    };
    let entry = oci::descriptor(oci::MANIFEST, manifest);
    oci.list_referrer(repository, subject, entry).await?;
    Ok(Some(subject.to_owned()))
}

/// Answers one request; `query` says where the page begins, as an earlier page's `next` put it.
pub(crate) async fn page(
    oci: &Oci,
    repository: &str,
    digest: &str,
    query: Option<&str>,
    size: usize,
) -> Result<Page> {
    let tag = digest.replace(':', "-");
    let mut all = Vec::new();
    if let Some(index) = oci.find_manifest(repository, &tag).await? {
        for descriptor in index.json()?["manifests"].as_array().into_iter().flatten() {
            all.push(typed(oci, repository, descriptor.clone()).await?);
        }
    }
    let begin = query
        .and_then(|query| query.split('&').find_map(|part| part.strip_prefix("from=")))
        .and_then(|from| from.parse().ok())
        .unwrap_or(0)
        .min(all.len());
    let end = begin.saturating_add(size).min(all.len());
    let next = (end < all.len()).then(|| format!("/v2/{repository}/referrers/{digest}?from={end}"));
    let body = json!({
        "schemaVersion": 2, "mediaType": oci::INDEX, "manifests": all.get(begin..end),
    });
    Ok(Page { body: serde_json::to_vec(&body)?, next })
}

/// A real registry takes artifactType and annotations from the manifest, not from the client's list.
async fn typed(oci: &Oci, repository: &str, mut descriptor: Value) -> Result<Value> {
    let digest = descriptor["digest"].as_str().unwrap_or_default().to_owned();
    let manifest = oci.manifest(repository, &digest).await?.json()?;
    let declared = &manifest["artifactType"];
    descriptor["artifactType"] = match declared.is_string() {
        true => declared.clone(),
        false => manifest["config"]["mediaType"].clone(),
    };
    if manifest["annotations"].is_object() {
        descriptor["annotations"] = manifest["annotations"].clone();
    }
    Ok(descriptor)
}
