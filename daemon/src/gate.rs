//! The gate: what the CRI edge needs to answer, in one place.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use quick_cache::sync::Cache;
use tokio::runtime::Handle;
use tonic::Status;

use crate::audit::{self, Context};
use crate::config::RuntimeService;
use crate::delegate::image_store::ImageStore;
use crate::delegate::next_hop::NextHop;
use crate::digest::Digest;
use crate::engine::judgement::Judgement;
use crate::engine::{Ask, Engine};
use crate::metrics::Metrics;

/// Names of images that are remembered; a node has some hundred images.
const KNOWN_NAMES: usize = 2048;

/// How long the next hop or containerd may take before it counts as not answering.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
/// A name that no image has.
const NO_IMAGE: &str = "pullgate.invalid/ready:ready";

/// A name of an image that was allowed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Known {
    /// The digest that was proved.
    pub digest: Digest,
    /// The fingerprint of the policy that allowed it.
    pub policy: String,
}

/// Shared by all connections.
pub struct Gate {
    /// Decides.
    pub engine: Arc<Engine>,
    /// The next CRI ImageService.
    pub next_hop: NextHop,
    /// containerd's image store.
    pub image_store: ImageStore,
    /// Digests of names of images that were allowed, by the name and the image's id. The id is
    /// the hash of the image's config, which names its content: while containerd resolves the
    /// name to it, the digest that was proved stands. That spares a call of containerd's API for
    /// each `ImageStatus`; only root can give a name another digest with the same id unproved.
    pub known_names: Cache<(String, String), Known>,
    /// What tags pointed to when they were pulled the last time.
    pub pulled_tags: Cache<String, Digest>,
    /// Metrics.
    pub metrics: Arc<Metrics>,
    runtime_service: RuntimeService,
}

impl Gate {
    /// A gate in front of the CRI server at `image_endpoint`. `edge` is the runtime on which calls
    /// are answered.
    pub fn new(engine: Arc<Engine>, metrics: Arc<Metrics>, edge: Handle) -> Self {
        let active = engine.active();
        let containerd = &active.config.containerd;
        let image_endpoint: PathBuf = containerd.image_endpoint.clone();
        Self {
            next_hop: NextHop::new(image_endpoint, edge),
            image_store: ImageStore::new(containerd.address.clone(), containerd.namespace.clone()),
            known_names: Cache::new(KNOWN_NAMES),
            pulled_tags: Cache::new(KNOWN_NAMES),
            metrics,
            runtime_service: active.config.runtime_service,
            engine,
        }
    }

    /// What happens to calls of the RuntimeService that stray in here.
    pub fn runtime_service(&self) -> RuntimeService {
        self.runtime_service
    }

    /// Asks the engine and writes the decision down: no decision leaves the gate unrecorded.
    pub async fn judge(&self, ask: &Ask, context: Context) -> Arc<Judgement> {
        let judgement = self.engine.judge(ask).await;
        self.record(judgement, context).await
    }

    /// Writes a decision down.
    pub async fn record(&self, judgement: Judgement, context: Context) -> Arc<Judgement> {
        let judgement = Arc::new(judgement);
        if audit::is_new(&judgement, &context) {
            let judgement = Arc::clone(&judgement);
            // The journal may be slow, and calls that only pass must not wait for it.
            let recorded = tokio::task::spawn_blocking(move || audit::record(&judgement, &context)).await;
            if let Err(error) = recorded {
                tracing::error!(%error, "a decision could not be recorded");
            }
        }
        judgement
    }

    /// Whether the next hop, and containerd's own API, answer a cheap call.
    ///
    /// # Errors
    /// A sentence.
    pub async fn is_ready(&self) -> Result<(), String> {
        answers("the next hop", self.next_hop.image_id(NO_IMAGE)).await?;
        answers("containerd", self.image_store.digest_of(NO_IMAGE)).await
    }
}

async fn answers<T>(who: &str, call: impl Future<Output = Result<T, Status>>) -> Result<(), String> {
    match tokio::time::timeout(ANSWER_WITHIN, call).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(status)) => Err(format!("{who} does not answer: {}", status.message())),
        Err(_) => Err(format!("{who} takes connections but does not answer")),
    }
}
