//! Integration tests of the public API of `ps-data`.

mod directory;
mod environment;
mod real_mnist;
mod sample;
mod training;
