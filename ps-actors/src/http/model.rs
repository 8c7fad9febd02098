//! The model that is served: its servers, what never changes about it, and which clients wait for it.

use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared};
use tokio::sync::{OnceCell, watch};

use super::problem::Problem;
use crate::group::ServerGroup;
use crate::ids::Version;
use crate::server::{GroupError, Pull, PullVersion};
use crate::weights::{Layout, Weights};

/// A model that clients may use now. Dropping it ends the waiting calls of clients.
#[derive(Debug)]
pub(super) struct Opening {
    model: Arc<Model>,
    _open: watch::Sender<()>,
}

impl Opening {
    pub(super) fn new(group: ServerGroup) -> Self {
        let (open, closed) = watch::channel(());
        let model = Arc::new(Model {
            group,
            layout: OnceCell::new(),
            next_update: Mutex::new(None),
            closed,
        });
        Self { model, _open: open }
    }

    pub(super) fn model(&self) -> Arc<Model> {
        Arc::clone(&self.model)
    }
}

/// The servers, and what is known about them.
pub(super) struct Model {
    pub(super) group: ServerGroup,
    layout: OnceCell<Arc<Layout>>,
    next_update: Mutex<Option<(Version, NextUpdate)>>,
    closed: watch::Receiver<()>,
}

/// A future that ends when the servers have a certain version.
type NextUpdate = Shared<BoxFuture<'static, Result<(), Problem>>>;

impl Model {
    /// Does some work for a client, as long as the model is open.
    pub(super) async fn while_open<T>(
        &self,
        work: impl Future<Output = Result<T, Problem>>,
    ) -> Result<T, Problem> {
        let mut open = self.closed.clone();
        tokio::select! {
            // Nothing is ever sent on this channel. It changes only when the model is closed.
            _ = open.changed() => Err(Problem::unavailable("the training has ended")),
            done = work => done,
        }
    }

    /// Returns the names and shapes of the parameters. The first call asks the servers for them.
    pub(super) async fn layout(&self) -> Result<&Arc<Layout>, Problem> {
        let ask = async || {
            let weights = self.group.pull(PullVersion::Latest).await?;
            Ok(Arc::clone(weights.layout()))
        };
        self.layout.get_or_try_init(ask).await
    }

    /// Returns a snapshot of the wanted version. Waits until this version exists.
    pub(super) async fn pull(&self, wanted: PullVersion) -> Result<Weights, Problem> {
        let version = match wanted {
            PullVersion::Latest => Version(0),
            PullVersion::AtLeast(version) | PullVersion::Exactly(version) => version,
        };
        loop {
            let weights = self.group.pull(PullVersion::Latest).await?;
            let current = weights.version();
            match wanted {
                PullVersion::Exactly(_) if current > version => {
                    return Ok(self.group.pull(wanted).await?);
                }
                _ if current >= version => return Ok(weights),
                // A snapshot that nobody holds is updated in place.
                _ => drop(weights),
            }
            self.await_update(current.next()).await?;
        }
    }

    /// Waits until the servers have `version`, which is later than a version that they were seen at.
    ///
    /// All waiting clients share one call. A waiting call takes one of the server's slots, and keeps it
    /// even if its caller has gone. If each client had its own call, clients that ask for a version in the
    /// far future and hang up would fill all slots.
    async fn await_update(&self, version: Version) -> Result<(), Problem> {
        let update = {
            let next = self.next_update.lock();
            let mut next = next.unwrap_or_else(PoisonError::into_inner);
            match &*next {
                // Somebody has already seen this version.
                Some((asked, _)) if *asked > version => return Ok(()),
                Some((_, update)) if update.peek().is_none() => update.clone(),
                _ => {
                    let update = self.ask_for(version);
                    *next = Some((version, update.clone()));
                    update
                }
            }
        };
        update.await
    }

    fn ask_for(&self, version: Version) -> NextUpdate {
        let first = self.group.servers().next().cloned();
        let ask = async move {
            // This cannot happen: a group has at least one server.
            let Some(first) = first else { return Ok(()) };
            let reply = first.ask(Pull::new(PullVersion::AtLeast(version))).await;
            let (index, reply) = (
                0,
                reply.map_err(|source| GroupError::Call { index: 0, source })?,
            );
            let reached = reply.map_err(|source| GroupError::Server { index, source })?;
            // Not kept: a snapshot that nobody holds is updated in place.
            drop(reached);
            Ok(())
        };
        ask.boxed().shared()
    }
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Model")
            .field("group", &self.group)
            .finish_non_exhaustive()
    }
}
