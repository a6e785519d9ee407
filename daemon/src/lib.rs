//! pullgate proves that an image is allowed before containerd pulls it.
//!
//! The modules carry the names of the stages of one request, in order (ARCHITECTURE.md).

pub mod admin;
pub mod audit;
pub mod breaker;
pub mod budget;
pub mod cli;
pub mod config;
pub mod cri;
pub mod daemon;
pub mod delegate;
pub mod digest;
pub mod engine;
pub mod evidence;
pub mod gate;
pub mod http2;
pub mod listener;
pub mod metrics;
pub mod process;
pub mod reference;
pub mod reload;
pub mod store;
pub mod systemd;
pub mod verdict;
pub mod verify;
