//! Training as users do it, on the bundled sample of MNIST.

mod bad_input;
mod batches;
mod buffers;
mod checkpoints;
mod cluster;
mod controls;
mod dashboard;
mod elastic;
mod ending;
mod equivalence;
mod frozen;
mod gate;
mod groups;
mod half;
mod nodes;
mod observe;
mod otel;
mod replay;
mod schedules;
mod served;
mod structure;
mod torch;
mod trace;
mod training;
mod trainings;
mod whole;
