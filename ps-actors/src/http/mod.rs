//! A parameter server for workers in any language: plain HTTP/1.1, raw little-endian `f32`.
//!
//! [`routes`] answers `/v1/join`, `/v1/push` and the other paths of `docs/http-api.md`. Requests go through
//! a [`ServerGroup`], like the calls of a Rust worker. So exactly-once (PS-2), the consistency modes,
//! fences and leases are the same for both, and both can train together.
//!
//! Numbers are never converted. A gradient's body is received into the recycled buffer that the server then
//! adds up. A snapshot is written from the server's own memory (PS-8). A body is read only if its length is
//! that of the weights (PS-6). The number of bodies that are read at a time is limited (PS-7).
//!
//! This module has no access control. Serve the routes behind the token of
//! [`Cluster::listen_with`](ps_runtime::cluster::Cluster::listen_with). It only refuses what a browser sends for a
//! page: without that, a page of another site could train a model on this machine.
//!
//! ```
//! use ps_actors::cluster::{Cluster, ClusterConfig, Hosts};
//! use ps_actors::group::ServerGroup;
//! use ps_actors::http;
//! use ps_actors::rule::Sgd;
//! use ps_actors::server::ServerConfig;
//! use ps_actors::weights::{Layout, Weights};
//!
//! let initial = Weights::initial(Layout::flat(3), vec![0.0; 3]);
//! let servers = ServerGroup::spawn(&initial, 1, ServerConfig::default(), |_| Box::new(Sgd::new()))?;
//! let address = "127.0.0.1:0".parse()?;
//! let routes = http::routes(servers);
//! let cluster = Cluster::listen_with(ClusterConfig::default(), address, Hosts::new(), routes)?;
//! println!("curl http://{}/v1/status", cluster.address().expect("a TCP socket"));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod body;
mod handlers;
mod headers;
mod model;
mod problem;
mod views;
mod watch;

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use axum::Router;
use axum::middleware::from_fn;
use axum::routing::{get, post};

use self::body::Uploads;
use self::model::{Model, Opening};
use self::problem::Problem;
use self::watch::Watcher;
pub use self::watch::{Seen, SettledPush};
use crate::group::ServerGroup;

/// How many gradients are received at a time, and how long the server waits for their bytes.
#[derive(Clone, Copy, Debug)]
pub struct HttpConfig {
    /// How many gradients may be received at the same time. Each takes a buffer as large as the weights.
    /// Further ones wait, for at most [`silence`](Self::silence). Default: 64.
    pub max_uploads: usize,
    /// How long a client may send nothing of its gradient before the upload is given up. Default: 10 s.
    pub silence: Duration,
    /// How long the upload of a whole gradient may take. Default: 5 minutes.
    pub max_upload_time: Duration,
}

impl Default for HttpConfig {
    fn default() -> Self {
        Self {
            max_uploads: 64,
            silence: Duration::from_secs(10),
            max_upload_time: Duration::from_secs(300),
        }
    }
}

/// The HTTP routes for a model. The model can be set later, and removed again. Cheap to clone.
///
/// Without a model, requests are answered with status 503.
#[derive(Clone, Debug)]
pub struct Api {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    uploads: Uploads,
    watcher: Watcher,
    open: RwLock<Option<Opening>>,
}

/// Makes the routes of one model, with the default limits. The routes keep the servers of the model alive.
///
/// For several models on one port, use `Router::new().nest("/other", routes(other))`.
pub fn routes(group: ServerGroup) -> Router {
    let api = Api::new(HttpConfig::default());
    api.open(group);
    api.routes()
}

impl Api {
    /// Makes routes without a model.
    #[must_use]
    pub fn new(config: HttpConfig) -> Self {
        Self::with_watcher(config, Watcher::default())
    }

    /// As [`new`](Self::new). `watch` is told what the workers do, on the thread that answers them: so it must not
    /// block.
    #[must_use]
    pub fn watched(config: HttpConfig, watch: impl Fn(&Seen) + Send + Sync + 'static) -> Self {
        Self::with_watcher(config, Watcher::new(watch))
    }

    fn with_watcher(config: HttpConfig, watcher: Watcher) -> Self {
        Self {
            shared: Arc::new(Shared {
                uploads: Uploads::new(config),
                watcher,
                open: RwLock::new(None),
            }),
        }
    }

    /// Lets clients train this model from now on. It replaces a model that was opened before.
    pub fn open(&self, group: ServerGroup) {
        self.replace(Some(Opening::new(group)));
    }

    /// Closes the model. Requests that are being handled are answered with status 503.
    pub fn close(&self) {
        self.replace(None);
    }

    fn replace(&self, opening: Option<Opening>) {
        let open = &self.shared.open;
        let mut open = open.write().unwrap_or_else(PoisonError::into_inner);
        let old = std::mem::replace(&mut *open, opening);
        drop(open);
        drop(old);
    }

    fn model(&self) -> Result<Arc<Model>, Problem> {
        let open = &self.shared.open;
        let open = open.read().unwrap_or_else(PoisonError::into_inner);
        let model = open.as_ref().map(Opening::model);
        model.ok_or_else(|| Problem::unavailable("no model is being trained here now"))
    }

    /// Returns the routes. Any axum server can serve them.
    pub fn routes(&self) -> Router {
        Router::new()
            .route("/v1/join", post(handlers::join))
            .route("/v1/leave", post(handlers::leave))
            .route("/v1/heartbeat", post(handlers::heartbeat))
            .route("/v1/layout", get(handlers::layout))
            .route("/v1/weights", get(handlers::weights))
            .route("/v1/push", post(handlers::push))
            .route("/v1/push-pull", post(handlers::push_pull))
            .route("/v1/status", get(handlers::status))
            .route_layer(from_fn(handlers::refuse_pages))
            .with_state(self.clone())
    }
}
