//! The actor runtime, over all transports.

mod actor;
mod cluster;
mod structure;
