//! Servers and workers as actors.

mod cluster;
mod codec;
mod http;
mod server;
