//! Servers and workers as actors.

mod checkpoints;
mod cluster;
mod codec;
mod http;
mod server;
