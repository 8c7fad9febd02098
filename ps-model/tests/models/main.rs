//! The tests of ps-model through its public interface, on every backend that is compiled in.

mod buffers;
mod convolution;
mod custom_model;
mod devices;
mod dropout;
mod fixed;
mod flat_views;
mod gradients;
mod half;
mod local_model;
mod parts;
mod pooling;
mod support;
mod tied;
mod training;
mod update_rules;
