//! Connections between processes: frames, handshake, heartbeat.
//!
//! This module moves bytes and knows no actor. A connection begins as an HTTP/1.1 request that asks for an upgrade. So one port serves other
//! processes of the program, HTTP clients in any language, and health probes. All but the probes need the
//! token. After the upgrade the connection carries frames. Each process opens one connection to each actor
//! that it has a reference to. Calls arrive in the order in which they were sent, because the stream
//! keeps the order.
//!
//! | module | what it holds |
//! |---|---|
//! | `frame` | the format of frames; does no input or output |
//! | `connection`, `arrivals`, `outbox` | heartbeat, reading and writing of one connection |
//! | `peer_memory` | copies large numbers between processes of one host only once |
//! | `admission` | admits large calls to one actor one after the other |
//! | `stream`, `threads` | TCP, Unix sockets, pipes in memory; the threads that run them |
//! | `address` | the address of a process |
//! | `access`, [`tls`] | the token; certificates |
//! | `quiet` | limits how often a peer can cause the same log line |
//! | `memory` | a network inside one process, with faults, for tests |

pub(crate) mod access;
pub(crate) mod address;
pub(crate) mod admission;
mod arrivals;
pub(crate) mod config;
pub(crate) mod connection;
pub(crate) mod frame;
#[cfg(all(test, target_os = "linux"))]
mod lending;
pub mod memory;
pub(crate) mod outbox;
pub(crate) mod peer_memory;
pub(crate) mod quiet;
pub(crate) mod stream;
pub(crate) mod threads;
pub mod tls;

pub use access::{Token, TokenError};
pub use address::Address;
pub use config::NetConfig;
pub use tls::{Tls, TlsError, TlsFiles};
