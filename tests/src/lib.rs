//! The end-to-end world: real containerd, registry, cosign and an AWS stand-in, all on loopback, all
//! below one temporary folder that is gone when the test ends.
//!
//! `tests/setup` brings the parts; a test starts a [`World`] and talks to it. Waiting is
//! always for a condition, with a deadline ([`wait`]).

pub mod containerd;
pub mod cosign;
pub mod cri;
pub mod grpc;
pub mod http;
pub mod image;
pub mod moto;
pub mod next_hop;
pub mod nspawn;
pub mod oci;
pub mod parts;
pub mod policy;
pub mod process;
pub mod proxy;
pub mod pullgate;
mod referrers;
pub mod refusal;
pub mod registry;
pub mod signature;
pub mod temp;
pub mod wait;
pub mod world;

pub use containerd::{Containerd, Version};
pub use cosign::{Cosign, KeyPair};
pub use cri::{Cri, PullOptions};
pub use image::{Image, Pushed, PushedIndex};
pub use moto::{KmsKey, Moto};
pub use next_hop::{NextHop, Reply};
pub use nspawn::Nspawn;
pub use oci::Oci;
pub use proxy::{Fault, Gate, Proxy, Rule, Seen};
pub use pullgate::Pullgate;
pub use refusal::{refused, refused_with};
pub use registry::{Registry, RegistryOptions};
pub use signature::{SigTag, Tamper};
pub use world::World;

/// Ends the test early, as passed, when a part from a moving suite could not be had.
#[macro_export]
macro_rules! need {
    ($part:expr) => {
        if let Some(why) = $crate::parts::lacks($part)? {
            eprintln!("skipped: {why}");
            return Ok(());
        }
    };
}

/// The newest containerd; ends the test early, as passed, where there is only the oldest.
#[macro_export]
macro_rules! newest {
    () => {
        match $crate::Version::newest()? {
            Some(version) => version,
            None => return Ok(()),
        }
    };
}

/// Makes tests of functions that take a [`Version`]: on the oldest containerd and on the newest.
#[macro_export]
macro_rules! on_both {
    ($($test:ident,)*) => {
        mod on_1_6 {$(
            #[tokio::test(flavor = "multi_thread")]
            async fn $test() -> anyhow::Result<()> {
                super::$test($crate::Version::V16).await
            }
        )*}
        mod on_2_1 {$(
            #[tokio::test(flavor = "multi_thread")]
            async fn $test() -> anyhow::Result<()> {
                super::$test($crate::newest!()).await
            }
        )*}
    };
}
