//! Parameter-server training in typed Rust.
