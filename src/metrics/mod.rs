//! Metrics of a training for Prometheus and other monitoring systems.
//!
//! [`Metrics`] is an [`Observer`](crate::observe::Observer) that feeds the facade of the crate
//! [`metrics`](https://docs.rs/metrics). A program that has installed a recorder gets them there:
//!
//! ```
//! use ps::metrics::Metrics;
//! use ps::prelude::*;
//!
//! let device = select_device(default_device_name())?;
//! // The program's own recorder is installed before, for example by `metrics::set_global_recorder`.
//! Trainer::new(ConvNet::init(1, &device), Mnist::bundled_sample().train)
//!     .device(&device)
//!     .iterations(2)
//!     .observe(Metrics::new())
//!     .run()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! [`Exporter`] is for programs without a recorder. It keeps the metrics itself, and serves them at `/metrics`
//! in the text format of Prometheus. It installs nothing in the program. The flag `--metrics ADDR` of
//! `ps::cli::ShowArgs` makes one.
//!
//! ```
//! use std::io::{Read, Write};
//!
//! use ps::metrics::Exporter;
//! use ps::prelude::*;
//!
//! let device = select_device(default_device_name())?;
//! let exporter = Exporter::new();
//! let listener = exporter.listen("127.0.0.1:0".parse()?, None)?;
//! Trainer::new(ConvNet::init(1, &device), Mnist::bundled_sample().train)
//!     .device(&device)
//!     .workers(2)
//!     .iterations(5)
//!     .observe(exporter.observer())
//!     .run()?;
//!
//! let mut stream = std::net::TcpStream::connect(listener.address())?;
//! stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: ps\r\nconnection: close\r\n\r\n")?;
//! let mut answer = String::new();
//! stream.read_to_string(&mut answer)?;
//! assert!(answer.contains("ps_gradients_total{worker=\"1\",outcome=\"applied\"} 5\n"));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! [`names::ALL`] has all names; `docs/metrics.md` is the same table for people.
//!
//! # What is promised
//! - Only the driver has metrics. They cover all processes.
//! - The number of series has a bound: the first [`MAX_LABELED`] workers and servers have labels of their own, and
//!   the rest share the label `other`.
//! - Counters count what was done in this process. If the servers are lost, the steps since the last checkpoint
//!   are counted again, because they are done again. A driver that is started again begins with 0, which
//!   Prometheus's `rate` knows about.
//! - All series exist from the start of the run, except those that have a worker's or a server's label. These
//!   begin with its first step, or when it is first seen.

mod exporter;
mod feed;
mod handles;
mod listener;
pub mod names;

pub use exporter::Exporter;
pub use feed::Metrics;
pub use listener::MetricsListener;

/// How many workers, and how many servers, have a label of their own.
pub const MAX_LABELED: u32 = 64;
