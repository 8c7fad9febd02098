//! Actors in other processes. The nodes of these tests share one process and differ in nothing
//! else from real ones: they reach each other through sockets or pipes only.

mod calls;
mod hostile;
mod incarnations;
mod kept;
mod nodes;
mod tls;
mod values;
pub(crate) mod world;
