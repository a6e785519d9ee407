//! What the process does to itself before it handles secrets and connections.

use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// No core dumps and no ptrace by others (memory holds registry tokens), and as many file
/// descriptors as the machine allows. What is refused is logged; nothing depends on it.
pub fn prepare() {
    if let Err(error) = prctl::set_dumpable(false) {
        tracing::warn!(%error, "core dumps could not be switched off");
    }
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, most)| setrlimit(Resource::RLIMIT_NOFILE, most, most));
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit on open files could not be raised");
    }
}
