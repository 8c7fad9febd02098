//! The actor runtime, and servers and workers as actors.

mod actor;
mod cluster;
mod http;
mod server;
