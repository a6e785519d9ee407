//! containerd's own image store, through its API: which digest a name has, and tag records.
//!
//! The CRI plugin follows the store's event stream, so a record made here shows in `crictl
//! images` and `ImageStatus` as if the CRI had made it (checked on 1.6 and 2.1).

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::time::Duration;

use containerd_client::services::v1::content_client::ContentClient;
use containerd_client::services::v1::images_client::ImagesClient;
use containerd_client::services::v1::{
    CreateImageRequest, GetImageRequest, Image, ReadContentRequest, UpdateImageRequest,
};
use containerd_client::types::Descriptor;
use oci_spec::image::{ImageIndex, ImageManifest};
use prost_types::FieldMask;
use tokio::sync::OnceCell;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use crate::digest::Digest;
use crate::reference::Repository;

/// By this label the CRI plugin knows the images that it manages.
const MANAGED: (&str, &str) = ("io.cri-containerd.image", "managed");
/// containerd's own store answers within milliseconds, or not at all.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);
/// Manifests larger than this are not read (containerd's own limit on manifests is 8 MiB).
const MAX_MANIFEST: usize = 8 << 20;

/// A client of containerd's image and content services.
pub struct ImageStore {
    socket: PathBuf,
    namespace: String,
    channel: OnceCell<Channel>,
}

impl ImageStore {
    /// A client of the containerd at `socket`, which need not be there yet.
    pub fn new(socket: PathBuf, namespace: String) -> Self {
        Self { socket, namespace, channel: OnceCell::new() }
    }

    /// The digest that `name` points to now; `None` when no such name is recorded.
    ///
    /// # Errors
    /// containerd's, or `UNAVAILABLE` when it is away.
    pub async fn digest_of(&self, name: &str) -> Result<Option<Digest>, Status> {
        let Some(target) = self.target(name).await? else { return Ok(None) };
        target
            .digest
            .parse()
            .map(Some)
            .map_err(|_| Status::internal("containerd holds an image without a valid digest"))
    }

    /// Records `tag` with the target that `repository@digest` has. Says whether that changed
    /// anything.
    ///
    /// # Errors
    /// containerd's; `NOT_FOUND` when there is no record of `repository@digest`.
    pub async fn tag(&self, tag: &str, repository: &Repository, digest: &Digest) -> Result<bool, Status> {
        if self.target(tag).await?.is_some_and(|present| present.digest == digest.as_str()) {
            return Ok(false);
        }
        let pinned = repository.at(digest);
        let missing = || Status::not_found(format!("containerd has no record of {pinned}"));
        let target = self.target(&pinned).await?.ok_or_else(missing)?;
        let labels = HashMap::from([(MANAGED.0.to_owned(), MANAGED.1.to_owned())]);
        let image = Image { name: tag.to_owned(), labels, target: Some(target), ..Default::default() };
        let mut client = self.images().await?;
        let create = CreateImageRequest { image: Some(image.clone()), ..Default::default() };
        match client.create(self.request(create)?).await {
            Err(status) if status.code() == Code::AlreadyExists => {
                let paths = vec!["target".to_owned(), format!("labels.{}", MANAGED.0)];
                let update = UpdateImageRequest {
                    image: Some(image),
                    update_mask: Some(FieldMask { paths }),
                    ..Default::default()
                };
                client.update(self.request(update)?).await.map(|_| true)
            }
            other => other.map(|_| true),
        }
    }

    /// The config digests (image IDs) that the image `digest` can have: one, or one a platform.
    ///
    /// # Errors
    /// containerd's, also when its content is not there or not an image.
    pub async fn config_digests(&self, digest: &Digest) -> Result<HashSet<String>, Status> {
        let bytes = self.content(digest.as_str()).await?;
        if let Ok(manifest) = serde_json::from_slice::<ImageManifest>(&bytes) {
            return Ok(HashSet::from([manifest.config().digest().to_string()]));
        }
        let index: ImageIndex =
            serde_json::from_slice(&bytes).map_err(|_| Status::internal(format!("{digest} is no image")))?;
        let mut configs = HashSet::new();
        for platform in index.manifests() {
            // Only the node's own platform need be there.
            let Ok(bytes) = self.content(platform.digest().as_ref()).await else { continue };
            if let Ok(manifest) = serde_json::from_slice::<ImageManifest>(&bytes) {
                configs.insert(manifest.config().digest().to_string());
            }
        }
        Ok(configs)
    }

    async fn target(&self, name: &str) -> Result<Option<Descriptor>, Status> {
        let get = GetImageRequest { name: name.to_owned() };
        match self.images().await?.get(self.request(get)?).await {
            Ok(answer) => Ok(answer.into_inner().image.and_then(|image| image.target)),
            Err(status) if status.code() == Code::NotFound => Ok(None),
            Err(status) => Err(status),
        }
    }

    async fn content(&self, digest: &str) -> Result<Vec<u8>, Status> {
        let read = ReadContentRequest { digest: digest.to_owned(), ..Default::default() };
        let mut chunks =
            ContentClient::new(self.channel().await?).read(self.request(read)?).await?.into_inner();
        let mut bytes = Vec::new();
        while let Some(chunk) = chunks.message().await? {
            bytes.extend_from_slice(&chunk.data);
            if bytes.len() > MAX_MANIFEST {
                return Err(Status::resource_exhausted(format!("{digest} is too large for a manifest")));
            }
        }
        Ok(bytes)
    }

    async fn images(&self) -> Result<ImagesClient<Channel>, Status> {
        Ok(ImagesClient::new(self.channel().await?))
    }

    /// The first connection must succeed; afterwards the channel reconnects by itself.
    async fn channel(&self) -> Result<Channel, Status> {
        let connect = || containerd_client::connect(&self.socket);
        let away =
            |_| Status::unavailable(format!("containerd does not answer at {}", self.socket.display()));
        self.channel.get_or_try_init(connect).await.cloned().map_err(away)
    }

    fn request<T>(&self, message: T) -> Result<Request<T>, Status> {
        let mut request = Request::new(message);
        let namespace =
            self.namespace.parse().map_err(|_| Status::internal("containerd.namespace is no metadata"))?;
        request.metadata_mut().insert("containerd-namespace", namespace);
        // containerd heeds it; a pull must not wait for ever for a name to be written.
        request.set_timeout(ANSWER_WITHIN);
        Ok(request)
    }
}
