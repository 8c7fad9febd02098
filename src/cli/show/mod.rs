//! Flags for what a training shows while it runs, and what it leaves behind.

#[cfg(feature = "dashboard")]
mod dashboard;
#[cfg(feature = "metrics")]
mod metrics;
mod progress;
mod table;

#[cfg(feature = "metrics")]
use std::net::SocketAddr;
#[cfg(any(feature = "runs", feature = "tensorboard", feature = "trace"))]
use std::path::PathBuf;

use crate::controls::Controls;
use crate::observe::Observer;

#[cfg(feature = "dashboard")]
pub use dashboard::DashboardArgs;
#[cfg(feature = "metrics")]
pub(super) use metrics::routes;
pub use progress::Progress;
pub use table::closing_table;

// No doc comment on this type: `--help` would take it for the program's own text.

#[allow(missing_docs, reason = "see above")]
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "What is shown")]
pub struct ShowArgs {
    /// Show no progress (not even that of a download) and no closing table on standard error.
    #[arg(long)]
    pub quiet: bool,
    /// Describe the run in this directory: settings, events, report, curves. If it has a run already, the name
    /// gets a number.
    #[cfg(feature = "runs")]
    #[arg(long, value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
    /// Write event files for TensorBoard into this directory. If it has a run already, the name gets a number.
    #[cfg(feature = "tensorboard")]
    #[arg(long, value_name = "DIR")]
    pub tensorboard: Option<PathBuf>,
    /// Write a trace of the training into this file, for Perfetto (ui.perfetto.dev) or Chrome (chrome://tracing).
    #[cfg(feature = "trace")]
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
    /// Send each step as a trace to a collector of OpenTelemetry, over OTLP with HTTP and JSON
    /// [default URL: http://127.0.0.1:4318].
    #[cfg(feature = "otel")]
    #[arg(long, value_name = "URL", num_args = 0..=1, default_missing_value = "http://127.0.0.1:4318")]
    pub otlp: Option<crate::otel::Endpoint>,
    /// Serve metrics for Prometheus at /metrics of this address, such as 127.0.0.1:9464. The driver's port and the dashboard
    /// have them, too, with this flag or with --dashboard. From other machines, reading them needs the token in
    /// $PS_TOKEN, if there is one.
    #[cfg(feature = "metrics")]
    #[arg(long, value_name = "ADDR", value_parser = metrics::address)]
    pub metrics: Option<SocketAddr>,
    #[cfg(feature = "dashboard")]
    #[command(flatten)]
    pub dashboard: DashboardArgs,
    /// The handle that controls the training. Give it to
    /// [`Trainer::controls`](crate::Trainer::controls).
    #[arg(skip)]
    pub controls: Controls,
}

impl ShowArgs {
    /// Returns the observers that the user asks for, for [`Trainer::observe`](crate::Trainer::observe) or
    /// [`Observers::start`](crate::observe::Observers::start).
    ///
    /// With `--metrics` and `--dashboard`, the driver begins to serve them. Ends the process with 64
    /// ([`EXIT_CONFIG`](ps_actors::launch::EXIT_CONFIG)) if it cannot, or may not with these flags.
    #[must_use]
    pub fn observers(&self) -> Vec<Box<dyn Observer>> {
        let mut observers: Vec<Box<dyn Observer>> = Vec::new();
        if !self.quiet {
            observers.push(Box::new(Progress::new()));
        }
        #[cfg(feature = "runs")]
        if let Some(directory) = &self.run_dir {
            observers.push(Box::new(crate::runs::RunDir::new(directory)));
        }
        #[cfg(feature = "tensorboard")]
        if let Some(directory) = &self.tensorboard {
            observers.push(Box::new(crate::tensorboard::TensorBoard::new(directory)));
        }
        #[cfg(feature = "trace")]
        if let Some(file) = &self.trace {
            observers.push(Box::new(crate::trace::Trace::new(file)));
        }
        #[cfg(feature = "otel")]
        if let Some(endpoint) = &self.otlp {
            observers.push(Box::new(crate::otel::OpenTelemetry::new(endpoint.clone())));
        }
        #[cfg(feature = "metrics")]
        if self.counts_metrics() {
            observers.extend(metrics::observer(self.metrics));
        }
        #[cfg(feature = "dashboard")]
        {
            #[cfg(feature = "metrics")]
            let text = self.counts_metrics().then(metrics::text).flatten();
            #[cfg(not(feature = "metrics"))]
            let text = None;
            if let Some(dashboard) = self.dashboard.observer(&self.controls, text) {
                observers.push(Box::new(dashboard));
            }
        }
        observers
    }

    /// Returns the route `/metrics`, for a server that the program has already. It has none without `--metrics` and
    /// `--dashboard`. The port of [`ClusterArgs::launch`](super::ClusterArgs::launch) has it by itself.
    #[cfg(feature = "metrics")]
    pub fn routes(&self) -> axum::Router {
        let exporter = self.counts_metrics().then(metrics::exporter).flatten();
        exporter
            .map(crate::metrics::Exporter::routes)
            .unwrap_or_default()
    }

    /// Whether somebody may ask for the metrics: the dashboard has them, too.
    #[cfg(feature = "metrics")]
    fn counts_metrics(&self) -> bool {
        #[cfg(feature = "dashboard")]
        let has_page = self.dashboard.dashboard.is_some();
        #[cfg(not(feature = "dashboard"))]
        let has_page = false;
        self.metrics.is_some() || has_page
    }
}
