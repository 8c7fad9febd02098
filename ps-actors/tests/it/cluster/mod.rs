//! Servers and workers in several processes. The nodes of these tests share one process and differ in
//! nothing else from real ones: they reach each other through sockets or pipes only.

mod checkpoints;
mod faults;
mod kept;
mod layouts;
mod leaving;
mod precision;
