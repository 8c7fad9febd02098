//! The actor runtime. `A-n` in a test's comment is the claim of docs/semantics.md that it guards.

mod bounds;
mod calls;
mod context;
mod model;
mod names;
mod panics;
mod pending;
mod probe;
mod shutdown;
