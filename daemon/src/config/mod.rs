//! The configuration: one YAML file, read whole, checked whole, and never changed after.
//!
//! Text becomes a tree with positions (`yaml`), the tree becomes a [`Config`] by the schema
//! (`reader`, `sections`, `rule`), and every mistake is told at once with its place and remedy
//! (`problem`). A [`Config`] exists only if there was none. Key files that rules name are looked
//! into while reading; nothing else is touched.

mod annotation;
mod glob;
mod key;
mod lint;
mod markdown;
mod policy;
mod problem;
mod reach;
mod reader;
mod rule;
pub mod schema;
mod sections;
#[cfg(test)]
mod tests;
mod units;
mod yaml;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use url::Url;

pub use annotation::AnnotationRequirement;
pub use policy::Policy;
pub use problem::{ConfigErrors, Position, Problem, Severity};
pub use rule::{Rule, SignedBy, Strategy};

use crate::digest::Digest;

/// Where the file is, unless said otherwise.
pub const DEFAULT_PATH: &str = "/etc/pullgate/config.yaml";

/// The admin socket, unless said otherwise.
pub const DEFAULT_ADMIN: &str = "/run/pullgate/admin.sock";

/// Ten thousand rules with inline keys have room; a mistaken file does not fill the memory.
const MAX_TEXT: u64 = 4 << 20;

/// A configuration without errors.
#[derive(Clone, Debug)]
pub struct Config {
    /// The socket that the kubelet's `imageServiceEndpoint` names. Default: `/run/pullgate/pullgate.sock`.
    pub listen: PathBuf,
    /// The socket of the administrative commands. Default: `/run/pullgate/admin.sock`.
    pub admin: PathBuf,
    /// Where verdicts and pinned keys are kept. Default: `/var/lib/pullgate`.
    pub state_dir: PathBuf,
    /// Where containerd is.
    pub containerd: Containerd,
    /// What becomes of RuntimeService calls on the image socket. Default: refuse.
    pub runtime_service: RuntimeService,
    /// Users that may connect to `listen`; never empty. Default: root.
    pub allowed_uids: Vec<u32>,
    /// Where metrics and health are served. Default: `127.0.0.1:9473`.
    pub metrics: MetricsListen,
    /// How long verdicts are kept.
    pub cache: Cache,
    /// How long a pull waits for a verdict. Default: 10 s.
    pub deadline: Duration,
    /// How long an ImageStatus call waits for a verdict. Default: 2 s.
    pub image_status_deadline: Duration,
    /// What verification may cost.
    pub limits: Limits,
    /// How registries are asked for signatures.
    pub registry: RegistryAccess,
    /// How KMS and ECR are reached.
    pub aws: Aws,
    /// What happens to an image that no rule matches. Default: deny.
    pub default: DefaultAction,
    /// The rules.
    pub policy: Policy,
}

/// Where containerd is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Containerd {
    /// containerd's own socket. Default: `/run/containerd/containerd.sock`.
    pub address: PathBuf,
    /// The next CRI ImageService. Default: `address`.
    pub image_endpoint: PathBuf,
    /// The namespace of the kubelet's images. Default: `k8s.io`.
    pub namespace: String,
    /// The tree of `hosts.toml` files. Default: `/etc/containerd/certs.d`.
    pub registry_config_path: PathBuf,
}

/// What becomes of CRI RuntimeService calls on the image socket.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RuntimeService {
    /// They are refused.
    Refuse,
    /// They go on to containerd.
    PassThrough,
}

/// Where metrics and health are served.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum MetricsListen {
    /// A TCP address.
    Tcp(SocketAddr),
    /// A Unix socket.
    Unix(PathBuf),
    /// Nowhere.
    Off,
}

/// How long verdicts are kept, and how many.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Cache {
    /// How long an allowing verdict is used. Default: 12 h.
    pub positive_ttl: Duration,
    /// How long a denying verdict is used. Default: 30 s.
    pub negative_ttl: Duration,
    /// How long past its TTL an allowing verdict stands in for failures. Default: 72 h.
    pub stale_grace: Duration,
    /// How many verdicts are kept; at least 1. Default: 100,000.
    pub max_entries: usize,
}

/// What verification may cost.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Verifications at one time; at least 1. Default: 16.
    pub concurrent_verifications: usize,
    /// The largest manifest that is read, in bytes. Default: 4 MiB.
    pub manifest_size: u64,
    /// The largest signed payload that is read, in bytes. Default: 1 MiB.
    pub payload_size: u64,
    /// Layers that are looked at in one `.sig` manifest; at least 1. Default: 64.
    pub signatures: usize,
    /// Requests to registries, per second; at least 1. Default: 100.
    pub registry_requests_per_second: u32,
    /// Requests to KMS in each Region, per second; at least 1. Default: 20.
    pub kms_requests_per_second: u32,
}

/// How registries are asked for signatures.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RegistryAccess {
    /// Docker configuration files with credentials, those that exist.
    /// Default: `/var/lib/kubelet/config.json`, `/root/.docker/config.json`.
    pub docker_configs: Vec<PathBuf>,
}

/// How KMS and ECR are reached.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Aws {
    /// The node's Region, if it is not to be found out.
    pub region: Option<String>,
    /// A KMS endpoint other than the Region's own.
    pub kms_endpoint: Option<Url>,
    /// An ECR endpoint other than the Region's own.
    pub ecr_endpoint: Option<Url>,
    /// Endpoints of single Regions.
    pub regions: BTreeMap<String, RegionEndpoints>,
    /// Regions with replicas of multi-Region keys, in the order to try them. Default: none.
    pub replica_regions: Vec<String>,
    /// An alias is compared with KMS again after this long. Default: 5 min.
    pub alias_recheck: Duration,
}

/// Endpoints of one Region.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RegionEndpoints {
    /// The KMS endpoint.
    pub kms_endpoint: Option<Url>,
    /// The ECR endpoint.
    pub ecr_endpoint: Option<Url>,
}

/// What happens to an image that no rule matches.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DefaultAction {
    /// It is denied.
    Deny,
    /// It is allowed.
    Allow,
}

/// A configuration, and what there is to say about it.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The configuration.
    pub config: Config,
    /// What is odd, in the order of the file's lines.
    pub warnings: Vec<Problem>,
    /// The SHA-256 digest of the file's text.
    pub fingerprint: Digest,
}

impl Config {
    /// Reads and checks a file.
    pub fn load(path: &Path) -> Result<Loaded, ConfigErrors> {
        let whole_file = |message: String, help: Option<&str>| {
            ConfigErrors::of_file(path, message, help.map(str::to_owned))
        };
        let unreadable = |error: std::io::Error| whole_file(format!("the file can't be read: {error}"), None);
        let file = File::open(path).map_err(unreadable)?;
        if file.metadata().map_err(unreadable)?.is_dir() {
            return Err(whole_file("this is a directory".into(), Some("name the file in it")));
        }
        let mut bytes = Vec::new();
        file.take(MAX_TEXT + 1).read_to_end(&mut bytes).map_err(unreadable)?;
        if bytes.len() as u64 > MAX_TEXT {
            return Err(too_large(path));
        }
        let text = std::str::from_utf8(&bytes).map_err(|error| {
            whole_file(
                format!("the file is not UTF-8 text: byte {}", error.valid_up_to()),
                Some("save it as UTF-8"),
            )
        })?;
        Self::parse(path, text)
    }

    /// Checks a text; `path` is the file that messages name.
    pub fn parse(path: &Path, text: &str) -> Result<Loaded, ConfigErrors> {
        if text.len() as u64 > MAX_TEXT {
            return Err(too_large(path));
        }
        let report = problem::Report::new(path);
        let config = match yaml::parse(text) {
            Ok(root) => {
                Some(sections::config(&reader::Section::open(&report, &root, String::new(), schema::TOP)))
            }
            Err(faults) => {
                faults.into_iter().for_each(|(at, complaint)| report.error(at, "", complaint));
                None
            }
        };
        match (report.finish(), config) {
            ((errors, warnings), Some(config)) if errors.is_empty() => {
                Ok(Loaded { config, warnings, fingerprint: Digest::sha256(text.as_bytes()) })
            }
            ((errors, _), _) => Err(ConfigErrors::new(errors)),
        }
    }
}

fn too_large(path: &Path) -> ConfigErrors {
    ConfigErrors::of_file(path, format!("the file is larger than {} MiB", MAX_TEXT >> 20), None)
}
