//! A CRI client that does what the kubelet does: images at one socket, containers at another.

use crate::wait;
use anyhow::{Context, Result};
use hyper_util::rt::TokioIo;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::net::UnixStream;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

/// The generated types and clients of `runtime.v1`.
#[allow(missing_docs, clippy::all, rustdoc::all)]
pub mod v1 {
    tonic::include_proto!("runtime.v1");
}

use v1::image_service_client::ImageServiceClient;
use v1::runtime_service_client::RuntimeServiceClient;

/// What containerd itself allows.
const MESSAGE_LIMIT: usize = 16 * 1024 * 1024;

/// What the kubelet tells with a pull.
#[derive(Clone, Debug, Default)]
pub struct PullOptions {
    /// User and password of a pull secret.
    pub login: Option<(String, String)>,
    /// The Pod's namespace.
    pub namespace: Option<String>,
    /// The Pod's name.
    pub pod: Option<String>,
    /// The Pod's labels.
    pub labels: HashMap<String, String>,
    /// The Pod's annotations; they are in the image spec, too, as the kubelet does it.
    pub annotations: HashMap<String, String>,
}

/// The client.
#[derive(Clone)]
pub struct Cri {
    /// The image service.
    pub images: ImageServiceClient<Channel>,
    /// The runtime service.
    pub runtime: RuntimeServiceClient<Channel>,
    logs: PathBuf,
    cgroup: String,
}

/// A channel to a Unix socket. It connects when first used, and anew after a loss.
pub fn channel(socket: &Path) -> Result<Channel> {
    let socket = socket.to_owned();
    let endpoint = Endpoint::try_from("http://localhost")?;
    Ok(endpoint.connect_with_connector_lazy(tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    })))
}

impl Cri {
    /// Images at one socket, containers at another; logs go to `logs`, cgroups below `cgroup`.
    pub fn new(images: &Path, runtime: &Path, logs: &Path, cgroup: &str) -> Result<Self> {
        Ok(Self {
            images: ImageServiceClient::new(channel(images)?)
                .max_decoding_message_size(MESSAGE_LIMIT)
                .max_encoding_message_size(MESSAGE_LIMIT),
            runtime: RuntimeServiceClient::new(channel(runtime)?).max_decoding_message_size(MESSAGE_LIMIT),
            logs: logs.to_owned(),
            cgroup: cgroup.to_owned(),
        })
    }

    /// PullImage; answers the image's id.
    pub async fn pull(&self, image: &str) -> Result<String, Status> {
        self.pull_with(image, &PullOptions::default()).await
    }

    /// PullImage with a Pod's particulars.
    pub async fn pull_with(&self, image: &str, options: &PullOptions) -> Result<String, Status> {
        let login = options.login.as_ref();
        let request = v1::PullImageRequest {
            image: Some(spec(image, &options.annotations)),
            auth: login.map(|(user, password)| v1::AuthConfig {
                username: user.clone(),
                password: password.clone(),
                ..Default::default()
            }),
            sandbox_config: Some(self.sandbox(options)),
        };
        let answer = self.images.clone().pull_image(request).await?;
        Ok(answer.into_inner().image_ref)
    }

    /// ImageStatus; `None` when the image is absent.
    pub async fn image_status(&self, image: &str) -> Result<Option<v1::Image>, Status> {
        let request = v1::ImageStatusRequest { image: Some(spec(image, &HashMap::new())), verbose: false };
        let answer = self.images.clone().image_status(request).await?;
        Ok(answer.into_inner().image)
    }

    /// ListImages without a filter.
    pub async fn list_images(&self) -> Result<Vec<v1::Image>, Status> {
        let request = v1::ListImagesRequest::default();
        let answer = self.images.clone().list_images(request).await?;
        Ok(answer.into_inner().images)
    }

    /// StreamImages, collected; containerd before 2.3 says UNIMPLEMENTED.
    pub async fn stream_images(&self) -> Result<Vec<v1::Image>, Status> {
        let request = v1::StreamImagesRequest::default();
        let mut stream = self.images.clone().stream_images(request).await?.into_inner();
        let mut images = Vec::new();
        while let Some(part) = stream.message().await? {
            images.extend(part.images);
        }
        Ok(images)
    }

    /// RemoveImage.
    pub async fn remove_image(&self, image: &str) -> Result<(), Status> {
        let request = v1::RemoveImageRequest { image: Some(spec(image, &HashMap::new())) };
        self.images.clone().remove_image(request).await?;
        Ok(())
    }

    /// ImageFsInfo.
    pub async fn image_fs_info(&self) -> Result<v1::ImageFsInfoResponse, Status> {
        let request = v1::ImageFsInfoRequest {};
        let answer = self.images.clone().image_fs_info(request).await?;
        Ok(answer.into_inner())
    }

    /// A Pod as the kubelet describes it, on the host's network: no CNI is needed.
    fn sandbox(&self, options: &PullOptions) -> v1::PodSandboxConfig {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let uid = format!("{}-{}", self.cgroup, COUNT.fetch_add(1, Ordering::Relaxed));
        let or = |value: &Option<String>, default: &str| value.clone().unwrap_or_else(|| default.to_owned());
        v1::PodSandboxConfig {
            log_directory: self.logs.join(&uid).display().to_string(),
            metadata: Some(v1::PodSandboxMetadata {
                name: or(&options.pod, "pod"),
                namespace: or(&options.namespace, "default"),
                uid,
                attempt: 0,
            }),
            labels: options.labels.clone(),
            annotations: options.annotations.clone(),
            linux: Some(v1::LinuxPodSandboxConfig {
                cgroup_parent: format!("/{}", self.cgroup),
                security_context: Some(v1::LinuxSandboxSecurityContext {
                    namespace_options: Some(host_network()),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    /// What the kubelet does for `imagePullPolicy: IfNotPresent`: asks, pulls if absent, and runs a
    /// container of it to its end. Answers what it printed.
    pub async fn run_container(&self, image: &str) -> Result<String> {
        self.run_pod(image, &PullOptions::default()).await
    }

    /// [`Cri::run_container`] with a Pod's particulars.
    pub async fn run_pod(&self, image: &str, options: &PullOptions) -> Result<String> {
        let id = match self.image_status(image).await? {
            Some(present) => present.id,
            None => self.pull_with(image, options).await?,
        };
        self.run_image_id(&id, image, options).await
    }

    /// Runs a container of an image that is there, without asking the image service.
    pub async fn run_image_id(
        &self,
        id: &str,
        user_specified: &str,
        options: &PullOptions,
    ) -> Result<String> {
        let sandbox = self.sandbox(options);
        let mut runtime = self.runtime.clone();
        let request =
            v1::RunPodSandboxRequest { config: Some(sandbox.clone()), runtime_handler: String::new() };
        let pod = runtime.run_pod_sandbox(request).await?.into_inner();
        let pod_sandbox_id = pod.pod_sandbox_id;
        let ran = self.run_in(&pod_sandbox_id, sandbox, id, user_specified).await;
        let stop = v1::StopPodSandboxRequest { pod_sandbox_id: pod_sandbox_id.clone() };
        runtime.stop_pod_sandbox(stop).await?;
        let remove = v1::RemovePodSandboxRequest { pod_sandbox_id };
        runtime.remove_pod_sandbox(remove).await?;
        ran
    }

    async fn run_in(
        &self,
        pod: &str,
        sandbox: v1::PodSandboxConfig,
        id: &str,
        user_specified: &str,
    ) -> Result<String> {
        let log = Path::new(&sandbox.log_directory).join("main.log");
        let config = v1::ContainerConfig {
            metadata: Some(v1::ContainerMetadata { name: "main".to_owned(), attempt: 0 }),
            image: Some(v1::ImageSpec {
                image: id.to_owned(),
                user_specified_image: user_specified.to_owned(),
                ..Default::default()
            }),
            log_path: "main.log".to_owned(),
            linux: Some(v1::LinuxContainerConfig {
                security_context: Some(v1::LinuxContainerSecurityContext {
                    namespace_options: Some(host_network()),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let request = v1::CreateContainerRequest {
            pod_sandbox_id: pod.to_owned(),
            config: Some(config),
            sandbox_config: Some(sandbox),
        };
        let mut runtime = self.runtime.clone();
        let created = runtime.create_container(request).await?.into_inner();
        let container_id = created.container_id;
        let start = v1::StartContainerRequest { container_id: container_id.clone() };
        runtime.start_container(start).await?;
        wait::until("the container's end", wait::LONG, async || {
            let request = v1::ContainerStatusRequest { container_id: container_id.clone(), verbose: false };
            let answer = runtime.container_status(request).await?.into_inner();
            let state = answer.status.context("no status")?.state();
            Ok((state == v1::ContainerState::ContainerExited).then_some(()))
        })
        .await?;
        Ok(printed(&std::fs::read_to_string(log)?))
    }
}

fn spec(image: &str, annotations: &HashMap<String, String>) -> v1::ImageSpec {
    v1::ImageSpec {
        image: image.to_owned(),
        user_specified_image: image.to_owned(),
        annotations: annotations.clone(),
        ..Default::default()
    }
}

fn host_network() -> v1::NamespaceOption {
    v1::NamespaceOption {
        network: v1::NamespaceMode::Node.into(),
        pid: v1::NamespaceMode::Container.into(),
        ..Default::default()
    }
}

/// What a container wrote, out of the CRI log format: `TIME STREAM TAG TEXT`.
fn printed(log: &str) -> String {
    log.lines().filter_map(|line| line.splitn(4, ' ').nth(3)).map(|text| format!("{text}\n")).collect()
}
