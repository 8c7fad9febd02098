//! The actor runtime. `A-n` and `R-n` in a test's comment are the claims of docs/semantics.md that
//! it guards.
//!
//! Most tests run three times: on an actor of this process, and on one that is reached through
//! pipes and through sockets. `local` and `names` are about what there is in one process only.

#![expect(
    clippy::duplicate_mod,
    reason = "each file of the suite is compiled once per transport"
)]

mod local;
mod names;
pub(crate) mod probe;
pub(crate) mod transport;

#[path = "."]
mod in_process {
    const ON: super::transport::Place = super::transport::Place::InProcess;

    mod bounds;
    mod calls;
    mod context;
    mod model;
    mod panics;
    mod pending;
    mod shutdown;
}

#[path = "."]
mod memory {
    const ON: super::transport::Place = super::transport::Place::Memory;

    mod bounds;
    mod calls;
    mod context;
    mod model;
    mod panics;
    mod pending;
    mod shutdown;
}

#[path = "."]
mod tcp {
    const ON: super::transport::Place = super::transport::Place::Tcp;

    mod bounds;
    mod calls;
    mod context;
    mod model;
    mod panics;
    mod pending;
    mod shutdown;
}
