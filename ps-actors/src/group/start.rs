//! Starts the servers of a group, in this process or at places of a cluster.

use std::ops::Range;

use futures_util::future::try_join_all;
use ps_runtime::actor::{ActorRef, Spawn, SpawnError};
use ps_runtime::cluster::{Cluster, Hosted, SpawnOn, SpawnOnError};
use serde::{Deserialize, Serialize};

use super::ServerGroup;
use crate::checkpoint::{Rest, Start};
use crate::rule::UpdateRule;
use crate::server::{ConfigError, GroupSecret, ParameterServer, ServerConfig, split};
use crate::weights::{Precision, Weights};

/// How many versions each server keeps at least, if the group has several servers.
const MIN_KEPT_VERSIONS: usize = 4;

/// Why a group of servers could not be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GroupSpawnError {
    /// The group would have no server.
    #[error("weights need at least one server")]
    NoServers,
    /// A setting cannot work.
    #[error(transparent)]
    Config(#[from] crate::server::ConfigError),
    /// An actor could not be started.
    #[error("could not start server {index} of the group")]
    Spawn {
        /// The index of the server in the group.
        index: usize,
        /// Why its actor could not be started.
        #[source]
        source: SpawnError,
    },
    /// An actor could not be started on another node.
    #[error("could not start server {index} of the group")]
    SpawnOn {
        /// The index of the server in the group.
        index: usize,
        /// Why its actor could not be started.
        #[source]
        source: SpawnOnError,
    },
}

/// What a node needs to make one server of a group; see [`ServerGroup::spawn_on`].
#[derive(Debug, Serialize, Deserialize)]
pub struct ServerArgs {
    /// The weights of the server's range.
    weights: Weights,
    rest: Rest,
    config: ServerConfig,
    /// A number that only the servers of this group know.
    secret: GroupSecret,
    /// The other servers, if this is the first one.
    followers: Option<Vec<ActorRef<ParameterServer>>>,
}

impl ServerArgs {
    /// Returns the range of weights that the server will hold.
    #[must_use]
    pub fn range(&self) -> Range<usize> {
        self.weights.range()
    }

    /// Makes the server, with the update rule of its range.
    ///
    /// # Errors
    /// If a setting cannot work, or the server goes on from the state of another update rule.
    pub fn into_server(self, rule: Box<dyn UpdateRule>) -> Result<ParameterServer, ConfigError> {
        let Self {
            weights,
            rest,
            config,
            secret,
            followers,
        } = self;
        let range = weights.range();
        match followers {
            Some(followers) => {
                ParameterServer::first(&weights, range, rest, rule, config, secret, followers)
            }
            None => ParameterServer::follower(&weights, range, rest, rule, config, secret),
        }
    }
}

impl Hosted for ParameterServer {
    type Args = ServerArgs;

    fn options(options: Spawn) -> Spawn {
        Self::options(options)
    }
}

impl ServerGroup {
    /// Splits the weights of `start` over `num_servers` new servers: initial weights, or a
    /// [`Checkpoint`](crate::checkpoint::Checkpoint) from which they go on. Each server is an actor on a thread of its own.
    ///
    /// `rule` makes the update rule for each server's range. For an example, see [`ServerGroup`].
    ///
    /// # Errors
    /// If `num_servers` is 0, a setting cannot work, a thread cannot be started, or the checkpoint is of
    /// another update rule.
    pub fn spawn<'a>(
        start: impl Into<Start<'a>>,
        num_servers: usize,
        mut config: ServerConfig,
        mut rule: impl FnMut(Range<usize>) -> Box<dyn UpdateRule>,
    ) -> Result<Self, GroupSpawnError> {
        if num_servers == 0 {
            return Err(GroupSpawnError::NoServers);
        }
        config.check()?;
        if num_servers > 1 {
            config.num_kept_versions = config.num_kept_versions.max(MIN_KEPT_VERSIONS);
        }
        let secret = GroupSecret::random();
        let from = start.into();
        let initial = from.weights();
        let ranges = split(initial.layout(), num_servers, config.cut);
        let start = |index: usize, server: ParameterServer| {
            let options = Spawn::new().thread_name(format!("server-{index}"));
            server
                .spawn_with(options)
                .map_err(|source| GroupSpawnError::Spawn { index, source })
        };
        let mut followers = Vec::new();
        for (index, range) in ranges.iter().enumerate().skip(1) {
            let (range, secret) = (range.clone(), secret.clone());
            let (rule, rest) = (rule(range.clone()), from.rest(range.clone(), false));
            let server = ParameterServer::follower(initial, range, rest, rule, config, secret)?;
            followers.push(start(index, server)?);
        }
        let range = ranges[0].clone();
        let (rule, rest) = (rule(range.clone()), from.rest(range.clone(), true));
        let others = followers.clone();
        let first = ParameterServer::first(initial, range, rest, rule, config, secret, others)?;
        let servers = [start(0, first)?].into_iter().chain(followers);
        Ok(Self {
            servers: ranges.into_iter().zip(servers).collect(),
            precision: Precision::F32,
        })
    }

    /// Splits the weights of `start` (initial weights, or a
    /// [`Checkpoint`](crate::checkpoint::Checkpoint)) over new servers at these places
    /// of a cluster, one server per place. A place is a
    /// [`Placement`](ps_runtime::cluster::Placement) or [`SpawnOn`] options. Each process at these places
    /// must host [`ParameterServer`]. There it also says which update rule a server has.
    ///
    /// ```
    /// use ps_actors::actor::run;
    /// use ps_actors::cluster::{Cluster, Hosts, Placement};
    /// use ps_actors::group::{ServerArgs, ServerGroup};
    /// use ps_actors::rule::Sgd;
    /// use ps_actors::server::{PullVersion, ServerConfig};
    /// use ps_actors::weights::{Layout, Weights};
    ///
    /// let hosts = Hosts::new()
    ///     .host(|args: ServerArgs| Ok(args.into_server(Box::new(Sgd::with_momentum(0.9)))?));
    /// let cluster = Cluster::alone(hosts); // Or `Cluster::listen`, and nodes that join it.
    /// let initial = Weights::initial(Layout::flat(40), vec![0.5; 40]);
    /// let places = [Placement::RoundRobin, Placement::RoundRobin];
    /// let servers = run(ServerGroup::spawn_on(&cluster, places, &initial, ServerConfig::default()))?;
    /// let weights = run(servers.pull(PullVersion::Latest))?;
    /// assert_eq!(weights.to_vec(), [0.5; 40]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// If there is no place, a setting cannot work, or a server cannot be started.
    pub async fn spawn_on<'a>(
        cluster: &Cluster,
        places: impl IntoIterator<Item = impl Into<SpawnOn>>,
        start: impl Into<Start<'a>>,
        mut config: ServerConfig,
    ) -> Result<Self, GroupSpawnError> {
        let places: Vec<SpawnOn> = places.into_iter().map(Into::into).collect();
        if places.is_empty() {
            return Err(GroupSpawnError::NoServers);
        }
        config.check()?;
        if places.len() > 1 {
            config.num_kept_versions = config.num_kept_versions.max(MIN_KEPT_VERSIONS);
        }
        let secret = GroupSecret::random();
        let from = start.into();
        let initial = from.weights();
        let ranges = split(initial.layout(), places.len(), config.cut);
        let start = |index: usize, followers| {
            let range = ranges[index].clone();
            let args = ServerArgs {
                weights: initial.part(range.clone()),
                rest: from.rest(range, index == 0),
                config,
                secret: secret.clone(),
                followers,
            };
            let started = cluster.spawn_with(places[index].clone(), args);
            async move {
                let started = started.await;
                started.map_err(|source| GroupSpawnError::SpawnOn { index, source })
            }
        };
        let followers = try_join_all((1..places.len()).map(|index| start(index, None))).await?;
        let first = start(0, Some(followers.clone())).await?;
        let servers = [first].into_iter().chain(followers);
        Ok(Self {
            servers: ranges.iter().cloned().zip(servers).collect(),
            precision: Precision::F32,
        })
    }
}
