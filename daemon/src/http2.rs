//! HTTP/2 limits, the same towards the kubelet and towards the next hop.
//!
//! They follow grpc-go's server defaults, which containerd uses, so that the gate refuses
//! nothing that containerd would have taken.

/// Flow-control window of one stream, bytes: a 16 MiB answer needs few round trips.
pub const STREAM_WINDOW: u32 = 1 << 20;
/// Flow-control window of a connection, bytes.
pub const CONNECTION_WINDOW: u32 = 4 << 20;
/// Metadata of one call, bytes (grpc-go's `defaultServerMaxHeaderListSize`).
pub const MAX_HEADER_LIST: u32 = 16 << 20;
/// Buffered for sending on one stream, bytes.
pub const SEND_BUFFER: usize = 1 << 20;
/// Calls at once on one connection.
pub const MAX_STREAMS: u32 = 1 << 16;
/// Cancelled calls that may wait to be noticed: every caller is root on this node.
pub const MAX_RESET_STREAMS: usize = 1 << 14;
