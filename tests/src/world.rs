//! One test's world.

use crate::containerd::{Containerd, Version};
use crate::cosign::{Cosign, Generation};
use crate::cri::Cri;
use crate::moto::{Moto, REGION};
use crate::registry::{Registry, RegistryOptions};
use crate::temp::Temp;
use anyhow::{Result, ensure};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::sync::OnceCell;

/// A containerd and a registry, ready; AWS and cosign when asked for. All of it ends when the world
/// is dropped, and the logs' last lines are printed (the test runner shows them on failure).
pub struct World {
    // Fields are dropped in this order: the folder goes last.
    /// The container runtime.
    pub containerd: Containerd,
    /// The registry; containerd trusts it.
    pub registry: Registry,
    moto: OnceCell<Moto>,
    names: AtomicUsize,
    temp: Temp,
}

/// What a world is made of, where it is not the usual.
#[derive(Clone, Copy, Default)]
pub struct WorldOptions {
    /// Which containerd.
    pub containerd: Version,
    /// What kind of registry.
    pub registry: RegistryOptions,
    /// containerd throws layers away once unpacked, as on EKS: 2.x then pulls without verifiers.
    pub discard_layers: bool,
}

impl World {
    /// containerd 1.6 and a plain registry.
    pub async fn start() -> Result<Self> {
        Self::with(WorldOptions::default()).await
    }

    /// With a containerd of choice.
    pub async fn on(containerd: Version) -> Result<Self> {
        Self::with(WorldOptions { containerd, ..Default::default() }).await
    }

    /// With everything of choice.
    pub async fn with(options: WorldOptions) -> Result<Self> {
        ensure!(nix::unistd::geteuid().is_root(), "the end-to-end world needs root");
        let temp = Temp::new()?;
        let (at_c, at_r) = (temp.path().join(crate::containerd::FOLDER), temp.path().join("r"));
        let (containerd, registry) = tokio::try_join!(
            Containerd::start(&at_c, temp.name(), options.containerd, options.discard_layers),
            Registry::start(&at_r, options.registry),
        )?;
        containerd.trust(&registry)?;
        Ok(Self { containerd, registry, moto: OnceCell::new(), names: AtomicUsize::new(0), temp })
    }

    /// The world's own folder.
    pub fn path(&self) -> &Path {
        self.temp.path()
    }

    /// A name that no other world has.
    pub fn name(&self) -> &str {
        self.temp.name()
    }

    /// A folder for one more thing, with a short path.
    pub fn folder(&self, name: &str) -> Result<PathBuf> {
        let number = self.names.fetch_add(1, Ordering::Relaxed);
        let path = self.temp.path().join(format!("{name}{number}"));
        std::fs::create_dir_all(&path)?;
        Ok(path)
    }

    /// AWS: KMS and ECR. Started when first asked for.
    pub async fn moto(&self) -> Result<&Moto> {
        self.moto.get_or_try_init(Moto::shared).await
    }

    /// One more registry, which containerd trusts as well.
    pub async fn registry(&self, options: RegistryOptions) -> Result<Registry> {
        let registry = Registry::start(&self.folder("r")?, options).await?;
        self.containerd.trust(&registry)?;
        Ok(registry)
    }

    /// cosign 2 with a home of its own. Ask for [`World::moto`] before, if it shall use KMS.
    pub async fn cosign(&self) -> Result<Cosign> {
        self.cosign_of(Generation::Two).await
    }

    /// cosign 3; say `need!("cosign3")` before.
    pub async fn cosign3(&self) -> Result<Cosign> {
        self.cosign_of(Generation::Three).await
    }

    async fn cosign_of(&self, generation: Generation) -> Result<Cosign> {
        let mut cosign = Cosign::new(generation, &self.folder("k")?, self.aws_env()).await?;
        cosign.login(&self.registry)?;
        Ok(cosign)
    }

    /// A CRI client that talks to containerd directly.
    pub fn cri(&self) -> Result<Cri> {
        self.containerd.cri()
    }

    /// The environment in which AWS means this world's moto, and never anything else.
    pub fn aws_env(&self) -> Vec<(String, String)> {
        // Nobody listens on port 1: without moto, AWS is away.
        let url = self.moto.get().map_or_else(|| "http://127.0.0.1:1".to_owned(), Moto::url);
        [
            ("AWS_ACCESS_KEY_ID", "test"),
            ("AWS_SECRET_ACCESS_KEY", "test"),
            ("AWS_REGION", REGION),
            ("AWS_DEFAULT_REGION", REGION),
            ("AWS_EC2_METADATA_DISABLED", "true"),
            ("AWS_CONFIG_FILE", "/dev/null"),
            ("AWS_SHARED_CREDENTIALS_FILE", "/dev/null"),
            ("AWS_ENDPOINT_URL", &url),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .to_vec()
    }
}
