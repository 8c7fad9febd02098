//! What the fuzz targets do with an input, and the inputs that they begin with.
//!
//! The targets themselves are in `fuzz_targets/` and need nightly. Everything here compiles with stable, and the
//! program `corpus` runs all inputs of a directory once.

pub mod checkpoint;
pub mod frames;
mod repair;
pub mod schedule;
pub mod update_log;
