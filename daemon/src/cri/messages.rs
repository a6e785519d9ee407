//! The parts of the CRI messages that the gate reads (k8s.io/cri-api, `runtime/v1/api.proto`).
//!
//! They are only ever decoded: what goes on is the caller's own bytes (see [`super::wire`]).

use std::collections::HashMap;

/// `ImageSpec`
#[derive(Clone, PartialEq, prost::Message)]
pub struct ImageSpec {
    /// The reference, as the Pod or the kubelet spells it.
    #[prost(string, tag = "1")]
    pub image: String,
    /// The runtime handler of the Pod.
    #[prost(string, tag = "19")]
    pub runtime_handler: String,
}

/// `AuthConfig`
#[derive(Clone, PartialEq, prost::Message)]
#[prost(skip_debug)]
pub struct AuthConfig {
    /// User name for basic authentication.
    #[prost(string, tag = "1")]
    pub username: String,
    /// Password for basic authentication.
    #[prost(string, tag = "2")]
    pub password: String,
    /// base64 of `user:password`.
    #[prost(string, tag = "3")]
    pub auth: String,
    /// The registry that these are for; empty for any.
    #[prost(string, tag = "4")]
    pub server_address: String,
    /// An OAuth2 refresh token.
    #[prost(string, tag = "5")]
    pub identity_token: String,
    /// A bearer token to be used as it is.
    #[prost(string, tag = "6")]
    pub registry_token: String,
}

impl std::fmt::Debug for AuthConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("AuthConfig(redacted)")
    }
}

/// `PodSandboxMetadata`
#[derive(Clone, PartialEq, prost::Message)]
pub struct PodSandboxMetadata {
    /// Pod name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Pod UID.
    #[prost(string, tag = "2")]
    pub uid: String,
    /// Pod namespace.
    #[prost(string, tag = "3")]
    pub namespace: String,
}

/// `PodSandboxConfig`
#[derive(Clone, PartialEq, prost::Message)]
pub struct PodSandboxConfig {
    /// Who the Pod is.
    #[prost(message, optional, tag = "1")]
    pub metadata: Option<PodSandboxMetadata>,
}

/// `PullImageRequest`
#[derive(Clone, PartialEq, prost::Message)]
pub struct PullImageRequest {
    /// What to pull.
    #[prost(message, optional, tag = "1")]
    pub image: Option<ImageSpec>,
    /// With which credentials.
    #[prost(message, optional, tag = "2")]
    pub auth: Option<AuthConfig>,
    /// For which Pod.
    #[prost(message, optional, tag = "3")]
    pub sandbox_config: Option<PodSandboxConfig>,
}

/// `PullImageResponse`
#[derive(Clone, PartialEq, prost::Message)]
pub struct PullImageResponse {
    /// The image's id.
    #[prost(string, tag = "1")]
    pub image_ref: String,
}

/// `ImageStatusRequest`
#[derive(Clone, PartialEq, prost::Message)]
pub struct ImageStatusRequest {
    /// What to look up: a reference, or an image ID in one of many spellings.
    #[prost(message, optional, tag = "1")]
    pub image: Option<ImageSpec>,
}

/// `Image`
#[derive(Clone, PartialEq, prost::Message)]
pub struct Image {
    /// The image ID: `sha256:<config digest>`.
    #[prost(string, tag = "1")]
    pub id: String,
    /// Every `repository:tag` that names it.
    #[prost(string, repeated, tag = "2")]
    pub repo_tags: Vec<String>,
    /// Every `repository@digest` that names it.
    #[prost(string, repeated, tag = "3")]
    pub repo_digests: Vec<String>,
}

/// `ImageStatusResponse`
#[derive(Clone, PartialEq, prost::Message)]
pub struct ImageStatusResponse {
    /// Absent when the image is.
    #[prost(message, optional, tag = "1")]
    pub image: Option<Image>,
    /// Filled for verbose requests.
    #[prost(map = "string, string", tag = "2")]
    pub info: HashMap<String, String>,
}
