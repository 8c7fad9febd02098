//! A page in the browser that shows a training while it runs, and controls it.
//!
//! [`Dashboard`] is an [`Observer`] that serves the page on a thread of its own, from the first event to the end
//! of the training. The examples have it as `--dashboard`.
//!
//! ```
//! use ps::controls::Controls;
//! use ps::dashboard::{Dashboard, DashboardConfig};
//! use ps::prelude::*;
//!
//! let device = select_device(default_device_name())?;
//! let controls = Controls::new();
//! let config = DashboardConfig { address: "127.0.0.1:0".parse()?, ..DashboardConfig::default() };
//! Trainer::new(ConvNet::init(1, &device), Mnist::bundled_sample().train)
//!     .device(&device)
//!     .iterations(5)
//!     .observe(Dashboard::new(config, &controls)?)
//!     .controls(&controls)
//!     .run()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # The API
//! | request | what it does |
//! |---|---|
//! | `GET /` | the page |
//! | `GET /api/state` | the state, as JSON |
//! | `GET /api/events` | the state each time that there is a new one, as server-sent events. `Last-Event-ID` leaves out the points of curves that the client has |
//! | `GET /metrics` | the metrics for Prometheus, if [`DashboardConfig::metrics`] has them |
//! | `POST /api/pause`, `/api/resume`, `/api/checkpoint`, `/api/end` | see [`Controls`]; the body is `{}` |
//! | `POST /api/learning-rate` | the body is `{"learning_rate": 0.01}` |
//! | `POST /api/consistency` | the body is `{"consistency": "ssp:3"}` |
//! | `POST /api/remove-worker` | the body is `{"worker": 1}` |
//!
//! # What is promised
//! - The training never waits for the page. A client that reads too slowly gets fewer states. One that reads nothing
//!   is dropped, 20 s after the buffers of the system are full. There are at most 32 streams of events and 128 connections.
//!   The end of the training waits up to 1 s for clients that read nothing, and at most 3 s in all.
//! - The memory is bounded, whatever the length of the run. A curve has at most 600 points: when it is full, each two
//!   become one. Of more than 64 workers, those are listed that are lost or slow.
//! - Without a token, nobody can change anything. With one, changes need `authorization: Bearer TOKEN`, which is
//!   compared in constant time, and the header `x-ps-dashboard: 1`.
//! - An address that other hosts can reach needs a token, and reading then needs it, too. The token travels
//!   unencrypted: use a tunnel (`ssh -L`) where others can listen.
//! - Requests from pages of other sites are refused, and so are names in `Host` that were not given (DNS
//!   rebinding). The page loads nothing from elsewhere.
//! - If the address cannot be used, that is logged, and the training goes on.
//!
//! | file | what it holds |
//! |---|---|
//! | `mod` | the observer and its settings |
//! | `state`, `curve` | what the page shows, counted from the events; pure |
//! | `view` | the state as JSON; pure |
//! | `guard` | which requests may pass; pure |
//! | `shared` | what the observer and the server share |
//! | `server` | connections, their number and their time limits |
//! | `answer` | the answer to each request |
//! | `page/` | the page: HTML, CSS, JavaScript, without anything from elsewhere |

mod answer;
mod curve;
mod guard;
mod server;
mod shared;
mod state;
mod view;

use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Duration;

use ps_actors::net::Token;

use self::guard::Guard;
use self::shared::Shared;
use crate::controls::Controls;
use crate::observe::{Event, Observer};

/// The port of the page, if no other one is named.
pub const DEFAULT_PORT: u16 = 8265;

/// How long the end of a training waits for the server's thread.
const END: Duration = Duration::from_secs(3);

type OnReady = Arc<dyn Fn(SocketAddr) + Send + Sync>;

type MetricsText = Arc<dyn Fn() -> String + Send + Sync>;

/// Where the page is served, and who may use it.
#[derive(Clone)]
pub struct DashboardConfig {
    /// Where to listen. Default: 127.0.0.1:8265. With port 0, the system chooses one.
    pub address: SocketAddr,
    /// The token that a user must know to control the training. With `None`, the default, the page only
    /// shows the training. An address that other hosts can reach needs a token.
    pub token: Option<Token>,
    /// Names under which browsers may ask for the page, besides `localhost` and addresses. Default: none.
    pub names: Vec<String>,
    /// Returns the metrics for `GET /metrics`, in the text format of Prometheus, as `metrics::Exporter::render` does.
    /// With `None`, the default, there is no such path.
    pub metrics: Option<MetricsText>,
    /// Is called with the address at which the page is served. Default: logs it.
    pub on_ready: OnReady,
}

impl Default for DashboardConfig {
    fn default() -> Self {
        Self {
            address: SocketAddr::from((Ipv4Addr::LOCALHOST, DEFAULT_PORT)),
            token: None,
            names: Vec::new(),
            metrics: None,
            on_ready: Arc::new(|address| tracing::info!("the dashboard is at http://{address}/")),
        }
    }
}

impl fmt::Debug for DashboardConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DashboardConfig")
            .field("address", &self.address)
            .field("has_token", &self.token.is_some())
            .field("names", &self.names)
            .field("has_metrics", &self.metrics.is_some())
            .finish_non_exhaustive()
    }
}

/// Why the page cannot be served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DashboardError {
    /// Other hosts can reach the address, and there is no token, so they could read everything.
    #[error(
        "other hosts can reach {0}, so a dashboard there needs a token: set --dashboard-token-file or \
         PS_DASHBOARD_TOKEN, or listen at 127.0.0.1"
    )]
    NoToken(SocketAddr),
}

/// Serves the page of a training; see the [module](self). Nothing listens before the first event.
#[derive(Debug)]
pub struct Dashboard {
    config: DashboardConfig,
    controls: Controls,
    serving: Serving,
}

enum Serving {
    NotYet,
    Here {
        shared: Arc<Shared>,
        /// Nothing is sent. It ends with the server's thread.
        ended: Receiver<()>,
    },
    Failed,
}

impl fmt::Debug for Serving {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotYet => "NotYet",
            Self::Here { .. } => "Here",
            Self::Failed => "Failed",
        })
    }
}

impl Dashboard {
    /// Makes the observer. The page can change the training that has these controls.
    ///
    /// # Errors
    /// If other hosts could reach it without a token.
    pub fn new(config: DashboardConfig, controls: &Controls) -> Result<Self, DashboardError> {
        if !config.address.ip().is_loopback() && config.token.is_none() {
            return Err(DashboardError::NoToken(config.address));
        }
        Ok(Self {
            config,
            controls: controls.clone(),
            serving: Serving::NotYet,
        })
    }

    fn begin(&self) -> std::io::Result<Serving> {
        let (listener, address) = server::listen(self.config.address)?;
        let guard = Guard {
            names: self.config.names.clone(),
            token: self.config.token.clone(),
            reads_need_token: !address.ip().is_loopback(),
        };
        let shared = Arc::new(Shared::new(
            guard,
            self.controls.clone(),
            self.config.metrics.clone(),
        ));
        let (ends, ended) = sync_channel(0);
        let for_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("dashboard".to_owned());
        thread.spawn(move || {
            if let Err(error) = server::serve(listener, &for_thread, server::PATIENCE) {
                tracing::warn!(%error, "there is no dashboard any more; the training goes on");
            }
            drop::<std::sync::mpsc::SyncSender<()>>(ends);
        })?;
        (self.config.on_ready)(address);
        Ok(Serving::Here { shared, ended })
    }
}

impl Observer for Dashboard {
    fn observe(&mut self, event: &Event) {
        if let Serving::NotYet = self.serving {
            self.serving = self.begin().unwrap_or_else(|error| {
                let address = self.config.address;
                tracing::warn!(
                    %address, %error,
                    "no dashboard: cannot listen there; the training goes on. Another training may have it: \
                     use another port, or port 0"
                );
                Serving::Failed
            });
        }
        if let Serving::Here { shared, .. } = &self.serving {
            shared.state().count(event);
        }
    }
}

impl Drop for Dashboard {
    fn drop(&mut self) {
        if let Serving::Here { shared, ended } = &self.serving {
            shared.close();
            // Browsers that watch get the end of the training.
            let _ = ended.recv_timeout(END);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_that_others_can_reach_needs_a_token() {
        let config = |address: &str, token: Option<Token>| DashboardConfig {
            address: address.parse().unwrap(),
            token,
            ..DashboardConfig::default()
        };
        let made = |config| Dashboard::new(config, &Controls::new());
        for address in ["127.0.0.1:0", "127.8.8.8:1", "[::1]:0"] {
            assert!(made(config(address, None)).is_ok(), "{address}");
        }
        for address in ["0.0.0.0:0", "[::]:8265", "10.0.0.1:8265"] {
            let error = made(config(address, None)).unwrap_err().to_string();
            assert!(error.contains("--dashboard-token-file"), "{error}");
            assert!(made(config(address, Some(Token::random()))).is_ok());
        }
    }

    #[test]
    fn the_token_is_not_shown() {
        let token = Token::new("correct-horse-battery").unwrap();
        let config = DashboardConfig {
            token: Some(token),
            ..DashboardConfig::default()
        };
        let shown = format!("{:?}", Dashboard::new(config, &Controls::new()));
        assert!(!shown.contains("horse"), "{shown}");
    }
}
