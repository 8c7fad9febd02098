//! The servers' side of a checkpoint: all of them fix their state at one version.
//!
//! A checkpoint is one more decision in the stream that all servers follow ([`Decision::Save`]). So the
//! parts belong to one and the same version, although the servers are not updated at the same instant and
//! workers push without a pause. The state of the update rule is copied at that moment. The weights are not
//! copied, because a snapshot of them never changes.
//!
//! Each other server keeps its part until the caller has fetched it. The [`checkpoint`](crate::checkpoint)
//! module joins the parts and writes them.

use actix::{Context, Handler, Message, Response};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use super::actor::{ParameterServer, Role};
use super::coordinator::CoordinatorState;
use super::handlers::now_or_later;
use super::messages::ServerError;
use super::shard::ShardState;
use super::waiting::Caller;
use crate::ids::Version;
use crate::rule::SavedRule;
use crate::weights::Weights;

/// Fixes the state of all servers of a group at the current version, and returns the state of the first one,
/// which this is sent to. The state of each other server is then there for [`GetSavedState`]. While workers
/// push without a pause, all parts are of one and the same version.
///
/// [`ServerGroup::checkpoint`](crate::group::ServerGroup::checkpoint) sends these messages and joins the
/// answers. [`Checkpoint::of`](crate::checkpoint::Checkpoint::of) makes a checkpoint of the answer of a
/// server that holds all weights.
///
/// ```
/// use ps_actors::checkpoint::Checkpoint;
/// use ps_actors::ids::Version;
/// use ps_actors::rule::Sgd;
/// use ps_actors::server::{ParameterServer, ServerConfig, TakeCheckpoint};
/// use ps_actors::weights::{Layout, Weights};
///
/// let initial = Weights::initial(Layout::flat(2), vec![1.0, 2.0]);
/// let server = ParameterServer::new(&initial, Sgd::new(), ServerConfig::default())?.spawn()?;
/// let checkpoint = Checkpoint::of(server.ask(TakeCheckpoint).wait()??)?;
/// assert_eq!(checkpoint.weights().version(), Version(0));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Result<ServerState, ServerError>")]
pub struct TakeCheckpoint;

/// Returns the state that a server saved when the first server took a [`TakeCheckpoint`] at this version.
/// Waits until the server has made the version. Sent to every server of a group but the first.
#[derive(Clone, Copy, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Result<ServerState, ServerError>")]
pub struct GetSavedState {
    /// The version that the first server's state has.
    pub version: Version,
}

/// Frees the memory of saved states that were fetched: of this version and of earlier ones.
#[derive(Clone, Copy, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "()")]
pub struct ForgetSavedStates {
    /// The version of the latest state that is not needed any more.
    pub until: Version,
}

/// Everything that one server must know to go on at one version: its weights, the state of its update rule,
/// and, if it is the first server of its group, what became of each gradient. A clone shares the numbers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ServerState {
    pub(crate) weights: Weights,
    pub(crate) rule: SavedRule,
    pub(crate) learning_rate: f64,
    #[serde(with = "super::coordinator::beside_header")]
    pub(crate) coordinator: Option<CoordinatorState>,
}

impl ParameterServer {
    /// Adds to a shard's state what the server around it knows.
    pub(super) fn server_state(
        &self,
        shard: ShardState,
        coordinator: Option<CoordinatorState>,
    ) -> ServerState {
        ServerState {
            weights: shard.weights,
            rule: shard.rule,
            learning_rate: self.shard.learning_rate(),
            coordinator,
        }
    }

    /// Fixes the state of all servers of the group at the current version, for a checkpoint. Returns the
    /// state of this server. The other servers keep theirs until it is fetched.
    pub(super) fn take_checkpoint(
        &mut self,
        ctx: &mut Context<Self>,
    ) -> Result<ServerState, ServerError> {
        self.check_followers()?;
        let first = self.coordinate()?;
        let coordinator = first.coordinator.save();
        let version = coordinator.version;
        if let Some(log) = &first.update_log {
            log.rotate(version);
        }
        for follower in &mut first.followers {
            follower.queue_save(version);
        }
        self.tell_followers(ctx);
        // The first server has the numbers of each gradient before it decides, so it is never behind its
        // own decisions.
        let state = self.shard.state();
        Ok(self.server_state(state, Some(coordinator)))
    }
}

impl Handler<TakeCheckpoint> for ParameterServer {
    type Result = Result<ServerState, ServerError>;

    fn handle(&mut self, _: TakeCheckpoint, ctx: &mut Self::Context) -> Self::Result {
        self.take_checkpoint(ctx)
    }
}

impl Handler<GetSavedState> for ParameterServer {
    type Result = Response<Result<ServerState, ServerError>>;

    fn handle(&mut self, message: GetSavedState, _: &mut Self::Context) -> Self::Result {
        if let Role::First(_) = self.role {
            let reason = "the first server returns its state to `TakeCheckpoint`".to_owned();
            return Response::reply(Err(ServerError::NotFollowed { reason }));
        }
        let ticket = self.waiting.ticket();
        if let Some(answer) = self.shard.saved_state(ticket, message.version) {
            let state = answer.map(|state| self.server_state(state, None));
            return Response::reply(state.map_err(ServerError::from));
        }
        if let Err(full) = self.waiting.check_room_for_pull() {
            self.shard.cancel(ticket);
            return Response::reply(Err(full));
        }
        let (caller, state) = oneshot::channel();
        self.waiting.insert(ticket, Caller::State(caller));
        now_or_later(self, ticket, state, |state| state)
    }
}

impl Handler<ForgetSavedStates> for ParameterServer {
    type Result = ();

    fn handle(&mut self, message: ForgetSavedStates, _: &mut Self::Context) {
        self.shard.forget_states(message.until);
    }
}
