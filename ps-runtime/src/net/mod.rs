//! Connections between processes: frames, handshake, heartbeat.
//!
//! A connection begins as an HTTP/1.1 request that asks for an upgrade, so that one port serves
//! other processes of the program, HTTP clients in any language, and health probes, all behind the
//! same token. After the upgrade it carries frames. Each process opens one connection to each
//! actor that it has a reference to; calls arrive in the order sent because the stream keeps it.
//!
//! | module | what it holds |
//! |---|---|
//! | `frame` | the format of what is sent; pure |
//! | `connection`, `arrivals`, `outbox` | heartbeat, reading and writing of one connection |
//! | `peer_memory` | large numbers between processes of one host are copied once |
//! | `admission` | large calls to one actor come in one after the other |
//! | `stream`, `threads` | TCP, Unix sockets, pipes in memory; who runs them |
//! | `address` | where a process listens |
//! | `access`, [`tls`] | the token; certificates |
//! | `quiet` | lines that a peer can cause are few |
//! | `memory` | a network inside one process, with faults |

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
