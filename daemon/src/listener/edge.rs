//! The edge: one thread on which every call of the kubelet is answered.
//!
//! A call passes from the caller's connection to a handler and on to containerd's connection.
//! On one thread these hand over without waking another one up, which costs more than the work
//! itself. What takes long (registries, keys, signatures, disks, the audit) runs elsewhere.

use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;

/// A thread with a runtime of its own; both end when this is dropped.
pub struct Edge {
    runtime: Handle,
    _end: oneshot::Sender<()>,
}

impl Edge {
    /// Starts the thread.
    ///
    /// # Errors
    /// The operating system's.
    pub fn start() -> std::io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let (end, ended) = oneshot::channel::<()>();
        // It ends without a word: the other end is only ever dropped.
        let run = move || drop(runtime.block_on(ended));
        std::thread::Builder::new().name("edge".into()).spawn(run)?;
        Ok(Self { runtime: handle, _end: end })
    }

    /// Runs what is spawned on it.
    pub fn runtime(&self) -> &Handle {
        &self.runtime
    }
}
