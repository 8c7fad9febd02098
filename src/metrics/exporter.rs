//! Keeps the metrics in the process, and writes them as Prometheus reads them.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::http::header::CONTENT_TYPE;
use axum::routing::get;
use metrics_exporter_prometheus::{
    Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder,
};
use ps_actors::net::Token;

use super::feed::Metrics;
use super::handles::Ended;
use super::listener::MetricsListener;
use super::names::{self, Kind};
use crate::observe::{Event, Observer};

/// The text format of Prometheus.
const FORMAT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Where the metrics are.
const PATH: &str = "/metrics";

/// After how many events the values of histograms are put into their buckets. Until then each takes 16 bytes.
const SETTLE_EVERY: u32 = 1 << 10;

/// Keeps metrics in this process, and writes them in the text format of Prometheus; see the [module](super). A
/// clone is another handle to the same metrics.
#[derive(Clone, Debug)]
pub struct Exporter {
    recorder: Arc<PrometheusRecorder>,
    handle: PrometheusHandle,
    ended: Ended,
}

impl Exporter {
    /// Makes an exporter without metrics. Nothing is installed in the program.
    #[must_use]
    pub fn new() -> Self {
        let recorder = recorder();
        Self {
            handle: recorder.handle(),
            recorder: Arc::new(recorder),
            ended: Ended::default(),
        }
    }

    /// Returns an observer that feeds this exporter. Several trainings may feed the same one. Counters go on from one
    /// to the next; what belonged to a training that has ended is NaN when another one begins.
    #[must_use]
    pub fn observer(&self) -> impl Observer {
        Feeding {
            metrics: Metrics::feeding(Arc::clone(&self.recorder) as _)
                .with_ended(self.ended.clone()),
            handle: self.handle.clone(),
            num_events: 0,
        }
    }

    /// Returns all metrics as text.
    ///
    /// ```
    /// use ps::metrics::Exporter;
    ///
    /// // Nothing has been observed.
    /// assert_eq!(Exporter::new().render(), "");
    /// ```
    #[must_use]
    pub fn render(&self) -> String {
        self.handle.render()
    }

    /// Returns the route `/metrics`, for a server that the program has already, such as
    /// [`Cluster::launch_with`](ps_actors::cluster::Cluster::launch_with).
    pub fn routes(&self) -> Router {
        let handle = self.handle.clone();
        let answer = move || std::future::ready(([(CONTENT_TYPE, FORMAT)], handle.render()));
        Router::new().route(PATH, get(answer))
    }

    /// Serves the metrics at `/metrics` of this address, over HTTP without encryption, until the returned
    /// listener is dropped. Port 0 takes any free port. With a token, each request needs
    /// `Authorization: Bearer TOKEN`.
    ///
    /// # Errors
    /// If this process cannot listen at the address, for example because another one does.
    pub fn listen(&self, address: SocketAddr, token: Option<Token>) -> io::Result<MetricsListener> {
        MetricsListener::start(address, token, self.routes())
    }
}

/// Makes a recorder that knows the buckets of the histograms.
fn recorder() -> PrometheusRecorder {
    let mut builder = PrometheusBuilder::new();
    for metric in names::ALL {
        if let Kind::Histogram(buckets) = metric.kind {
            let matcher = Matcher::Full(metric.name.to_owned());
            let built = builder.set_buckets_for_metric(matcher, buckets);
            builder = built.expect("a histogram has buckets");
        }
    }
    builder.build_recorder()
}

impl Default for Exporter {
    fn default() -> Self {
        Self::new()
    }
}

/// Feeds the exporter, and keeps its memory small.
struct Feeding {
    metrics: Metrics,
    handle: PrometheusHandle,
    num_events: u32,
}

impl Observer for Feeding {
    fn observe(&mut self, event: &Event) {
        self.metrics.observe(event);
        self.num_events += 1;
        if self.num_events == SETTLE_EVERY {
            self.num_events = 0;
            self.handle.run_upkeep();
        }
    }
}
