//! The queue, the calls and the replies of `src/actor`, run under thousands of schedules of their threads.
//!
//! A schedule says which thread runs next. [shuttle](https://docs.rs/shuttle) runs a scenario again and again on
//! one real thread, and draws each schedule from a seed. A thread that nobody wakes is found as a deadlock.
//!
//! The files of the product are compiled here a second time, with other locks in `sync`. What they need around
//! them is small: `background` waits, and `busy_poll` does nothing, because it looks at the clock.
//!
//! A failure prints the seed, and shuttle prints the schedule. Both can be given back:
//!
//! ```text
//! PS_SCHEDULES=100000 PS_SCHEDULE_SEED=7 cargo test -p ps-runtime --test schedules
//! PS_SCHEDULE=91011a... cargo test -p ps-runtime --test schedules -- a_slot_is_free
//! ```

#![allow(
    dead_code,
    unused_imports,
    unreachable_pub,
    missing_docs,
    missing_debug_implementations,
    clippy::default_constructed_unit_structs,
    reason = "parts of the product that these scenarios do not use"
)]

mod actor;
mod busy_poll;
#[path = "../../src/deadline.rs"]
mod deadline;
mod scenarios;
mod stage;
mod sync;
