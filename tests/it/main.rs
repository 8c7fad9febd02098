//! Training as users do it, on the bundled sample of MNIST.

mod bad_input;
mod equivalence;
mod training;
