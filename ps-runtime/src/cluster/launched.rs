//! Turns the command line into a cluster: what each copy of a program does at its start.

use std::collections::BTreeSet;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use axum::Router;
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, sleep_until};

use super::config::{ClusterConfig, ClusterError};
use super::driver::{Cluster, random};
use super::host::Hosts;
use super::members::{Members, Refusal};
use super::node::{Node, NodeExit};
use super::task::Task;
use super::way::SAY_WAITING;
use crate::launch::restarts::Restarts;
use crate::launch::{
    self, Launch, LaunchError, LaunchOptions, Place, ProcessConfig, ProcessError, ProcessGroup,
    Rendezvous, env, terminated, terminated_again,
};
use crate::net::{Token, TokenError, threads};

/// How long child processes get to end by themselves.
const GRACE: Duration = Duration::from_secs(5);

/// Why a program could not start or join a cluster.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The command line or the environment contradicts itself.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// The token cannot be used.
    #[error("PS_TOKEN cannot be used")]
    Token(#[from] TokenError),
    /// The cluster could not be started or joined.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// The child processes could not be started.
    #[error("could not start the other processes")]
    Processes(#[from] ProcessError),
    /// Child processes need sockets to reach this process, and the transport has none.
    #[error("processes need a transport with sockets")]
    NotSockets,
    /// The system gave no way to hear the signals that end the process.
    #[error("could not listen for the signals that end the process")]
    Signals(#[source] io::Error),
}

impl StartError {
    /// The exit code for a launcher: [`EXIT_CONFIG`](crate::launch::EXIT_CONFIG) when the same start
    /// would fail again, else 1.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Launch(_) | Self::Token(_) | Self::NotSockets => launch::EXIT_CONFIG,
            Self::Cluster(error) if error.is_permanent() => launch::EXIT_CONFIG,
            _ => 1,
        }
    }
}

impl Cluster {
    /// Starts or joins a cluster, as the options and the environment variables say.
    ///
    /// In the driver it returns the cluster, which may be this process alone. In a node it works until the
    /// node ends, and then returns `None`; the program should then end. The token comes from `PS_TOKEN`
    /// unless `config` has one. Call it early in `main`, before other threads start processes.
    ///
    /// ```no_run
    /// # use actix::{Actor, Context, Handler, Message};
    /// # use ps_runtime::cluster::Hosted;
    /// # use ps_runtime::remote::{Messages, Remote};
    /// # use serde::{Deserialize, Serialize};
    /// # struct Counter(u64);
    /// # impl Actor for Counter { type Context = Context<Self>; }
    /// # #[derive(Message, Serialize, Deserialize)]
    /// # #[rtype(result = "u64")]
    /// # struct Add(u64);
    /// # impl Handler<Add> for Counter {
    /// #     type Result = u64;
    /// #     fn handle(&mut self, Add(n): Add, _: &mut Context<Self>) -> u64 { self.0 += n; self.0 }
    /// # }
    /// # impl Remote for Counter {
    /// #     fn messages(messages: &mut Messages<Self>) { messages.add::<Add>(); }
    /// # }
    /// # impl Hosted for Counter { type Args = u64; }
    /// use ps_runtime::cluster::{Cluster, ClusterConfig, Hosts};
    /// use ps_runtime::launch::LaunchOptions;
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let hosts = Hosts::new().host(|start: u64| Ok(Counter(start)));
    /// // Two processes on this machine: the driver and one child process.
    /// let options = LaunchOptions::processes(2);
    /// let Some(cluster) = Cluster::launch(&options, ClusterConfig::default(), hosts)? else {
    ///     return Ok(()); // This process was a node.
    /// };
    /// let counter = cluster.spawn::<Counter>(40).wait()?;
    /// assert_eq!(counter.ask(Add(2)).wait()?, 42);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// When options and environment contradict each other, when the driver cannot listen, or when a node
    /// cannot reach the driver or is refused.
    pub fn launch(
        options: &LaunchOptions,
        config: ClusterConfig,
        hosts: Hosts,
    ) -> Result<Option<Self>, StartError> {
        Self::launch_with(options, config, hosts, Router::new())
    }

    /// Like [`launch`](Self::launch), and also serves `routes` over HTTP on the driver's port.
    ///
    /// # Errors
    /// Those of [`launch`](Self::launch).
    pub fn launch_with(
        options: &LaunchOptions,
        mut config: ClusterConfig,
        hosts: Hosts,
        routes: Router,
    ) -> Result<Option<Self>, StartError> {
        launch::die_with_parent().map_err(StartError::Signals)?;
        if config.token.is_none()
            && let Some(token) = env::read(env::TOKEN)
        {
            config.token = Some(Token::new(token)?);
        }
        let stated = options.run_id.clone().or_else(|| env::read(env::RUN_ID));
        config.run_id = config.run_id.or(stated).filter(|id| !id.is_empty());
        let launch = launch::resolve(options, env::read)?;
        threads::ready().map_err(ClusterError::Threads)?;
        match launch {
            Launch::Alone => Ok(Some(Self::alone(hosts))),
            Launch::StartProcesses { world_size } => {
                let local = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
                // A secret, so that no other process of this machine can join.
                let token = config.token.get_or_insert_with(Token::random).clone();
                let run_id = config
                    .run_id
                    .get_or_insert_with(|| format!("{:016x}", random()));
                let run_id = run_id.clone();
                let within = config.join_timeout;
                let mut cluster = Self::listen_with(config, local, hosts, routes)?;
                let Some(address) = cluster.address() else {
                    return Err(StartError::NotSockets);
                };
                let group = ProcessGroup::start(ProcessConfig {
                    world_size,
                    rendezvous: address.into(),
                    token: Some(token.reveal().to_owned()),
                    run_id: Some(run_id),
                })?;
                let children = ChildProcesses::watch(group, cluster.node_ended());
                let num_gone = children.num_gone.clone();
                cluster.keep_children(children);
                gather(&cluster, world_size, within, Some(num_gone))?;
                Ok(Some(cluster))
            }
            Launch::Rank(place) if place.is_driver() => {
                let address = listen_address(&place)?;
                let within = config.join_timeout;
                let cluster = Self::listen_with(config, address, hosts, routes)?;
                gather(&cluster, place.world_size, within, None)?;
                Ok(Some(cluster))
            }
            Launch::Rank(place) => {
                serve(&place, config, hosts)?;
                Ok(None)
            }
        }
    }
}

/// Waits for the other processes. If some have joined, it goes on without those that take too long.
/// Processes that were refused for good, or have ended and are not started again, are not waited for.
pub(super) fn gather(
    cluster: &Cluster,
    world_size: u32,
    within: Duration,
    num_gone: Option<watch::Receiver<usize>>,
) -> Result<(), ClusterError> {
    let last = world_size.saturating_sub(1);
    let wanted = last as usize;
    let joined = cluster.wait_for_nodes(wanted, within);
    let watched = Arc::clone(cluster.members());
    let gathered = Task::start(async move {
        let all_settled = async {
            let Some(mut num_gone) = num_gone else {
                return std::future::pending().await;
            };
            let is_settled = |gone: &usize| gone + watched.list().len() >= wanted;
            // An error means that the child processes are not watched any more.
            if num_gone
                .wait_for(|gone| *gone > 0 && is_settled(gone))
                .await
                .is_err()
            {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            // A process that was refused also ends soon. Why it was refused says more than that it ended.
            biased;
            joined = joined => joined.map(drop),
            error = refused(&watched, last) => Err(error),
            () = all_settled => Err(refusal(&watched, last).unwrap_or(ClusterError::Refusals {
                joined: watched.list().len(),
                wanted,
            })),
        }
    });
    match gathered.wait() {
        Err(
            error @ (ClusterError::NotAllJoined { joined: 0, .. }
            | ClusterError::NodesRefused { joined: 0, .. }
            | ClusterError::Refusals { joined: 0, .. }),
        ) => Err(error),
        Err(error) => {
            tracing::warn!(%error, "going on without the others; they may join later");
            Ok(())
        }
        Ok(()) => Ok(()),
    }
}

/// Waits until each of the ranks 1 to `last` has joined or was refused for good, and at least one was refused. Returns
/// the error that says why the first one was refused.
async fn refused(members: &Members, last: u32) -> ClusterError {
    let mut changed = members.changed();
    loop {
        if members.are_settled(last)
            && let Some(error) = refusal(members, last)
        {
            return error;
        }
        // The sender lives as long as the members.
        let _ = changed.changed().await;
    }
}

/// Returns why the first of the ranks 1 to `last` was refused that have not joined.
pub(super) fn refusal(members: &Members, last: u32) -> Option<ClusterError> {
    let Refusal { rank, reason, .. } = members.first_refusal(last)?;
    Some(ClusterError::NodesRefused {
        joined: members.list().len(),
        wanted: last as usize,
        rank,
        reason,
    })
}

/// The address at which the driver listens. It is the address that the other processes were given.
fn listen_address(place: &Place) -> Result<SocketAddr, StartError> {
    let Some(rendezvous) = &place.rendezvous else {
        return Ok(SocketAddr::from((
            Ipv4Addr::LOCALHOST,
            launch::DEFAULT_PORT,
        )));
    };
    let failed = |source| ClusterError::Address {
        address: rendezvous.to_string(),
        source,
    };
    let found = look_up(rendezvous).map_err(failed)?;
    if place.world_size > 1 && is_loopback_in_disguise(rendezvous.host(), found) {
        // Debian's `/etc/hosts` does so for the name of the machine itself.
        tracing::warn!(
            name = rendezvous.host(),
            address = %found.ip(),
            "this name is an address of this machine alone here: processes of other machines cannot join; \
             for them, pass `--master-addr` with an address that they can reach"
        );
    }
    Ok(found)
}

/// Returns the first address of a name. If no name server answers, it says so.
fn look_up(rendezvous: &Rendezvous) -> io::Result<SocketAddr> {
    let target = (rendezvous.host().to_owned(), rendezvous.port());
    let (sender, found) = mpsc::channel();
    let looking = move || sender.send(target.to_socket_addrs().map(|mut found| found.next()));
    thread::Builder::new().spawn(looking)?;
    loop {
        match found.recv_timeout(SAY_WAITING) {
            Ok(found) => return found?.ok_or_else(|| io::ErrorKind::NotFound.into()),
            Err(RecvTimeoutError::Timeout) => {
                let name = rendezvous.host();
                tracing::warn!(
                    name,
                    "no name server has answered yet what this name means: use an address, or a name that this machine knows"
                );
            }
            Err(RecvTimeoutError::Disconnected) => return Err(io::ErrorKind::NotFound.into()),
        }
    }
}

/// Whether this machine resolves the name to a loopback address although the name does not say so. Other
/// machines cannot use such an address.
fn is_loopback_in_disguise(name: &str, resolved: SocketAddr) -> bool {
    let says_so = name == "localhost" || name.parse::<std::net::IpAddr>().is_ok();
    resolved.ip().is_loopback() && !says_so
}

fn serve(place: &Place, config: ClusterConfig, hosts: Hosts) -> Result<NodeExit, StartError> {
    let rendezvous = place.rendezvous.as_ref();
    let driver = rendezvous.map_or_else(
        || format!("127.0.0.1:{}", launch::DEFAULT_PORT),
        ToString::to_string,
    );
    let node = Node::new(config, place.rank, place.attempt, driver, hosts);
    // Signals are heard on an event loop, so the future is made on one.
    let serving = Task::start(async move {
        let stop = terminated().map_err(StartError::Signals)?;
        let (first, first_came) = oneshot::channel();
        let stop = async move {
            let signal = stop.await;
            let _ = first.send(());
            tracing::info!(%signal, "leaving after the step under way");
        };
        let at_once = async {
            if first_came.await.is_err() {
                return std::future::pending().await;
            }
            let signal = terminated_again().await;
            tracing::info!(%signal, "leaving at once");
        };
        Ok(node.serve_until_told(stop, at_once).await?)
    });
    serving.wait()
}

/// The child processes of this process.
pub(crate) struct ChildProcesses {
    /// Dropping it asks the watching task to end the child processes.
    stop: Option<oneshot::Sender<()>>,
    ended: Option<Task<()>>,
    /// How many child processes have ended and are not started again.
    num_gone: watch::Receiver<usize>,
}

impl ChildProcesses {
    /// Restarts child processes that fail, and ends all of them when `stop` is dropped. Calls
    /// `has_ended` with the rank of each one that has ended.
    fn watch(mut group: ProcessGroup, has_ended: impl Fn(u32) + Send + 'static) -> Self {
        let (stop, mut stopped) = oneshot::channel();
        let (gone, num_gone) = watch::channel(0);
        let ended = Task::start(async move {
            let began = Instant::now();
            let mut restarts = Restarts::default();
            // The ranks to start again, each with the time to do so.
            let mut due: BTreeSet<(Instant, u32)> = BTreeSet::new();
            loop {
                let next = due.first().copied();
                let wait = async {
                    match next {
                        Some((at, _)) => sleep_until(at).await,
                        None => std::future::pending().await,
                    }
                };
                let exited = tokio::select! {
                    _ = &mut stopped => break,
                    () = wait => None,
                    Some(exited) = group.exited() => Some(exited),
                };
                let Some(exited) = exited else {
                    let (_, rank) = due.pop_first().expect("one was waited for");
                    if let Err(error) = group.restart(rank) {
                        tracing::error!(rank, %error, "it could not be started again");
                        gone.send_modify(|gone| *gone += 1);
                    }
                    continue;
                };
                let rank = exited.rank;
                has_ended(rank);
                let status = exited.status.map(|status| status.to_string());
                if !exited.can_retry() {
                    tracing::debug!(rank, status, "a process has ended");
                    gone.send_modify(|gone| *gone += 1);
                    continue;
                }
                let Some(pause) = restarts.after_failure(rank, began.elapsed()) else {
                    tracing::error!(
                        rank,
                        status,
                        "a process has failed too often: not started again"
                    );
                    gone.send_modify(|gone| *gone += 1);
                    continue;
                };
                tracing::warn!(
                    rank,
                    status,
                    ?pause,
                    "a process has failed: starting it again"
                );
                due.insert((Instant::now() + pause, rank));
            }
            group.shutdown(GRACE).await;
        });
        Self {
            stop: Some(stop),
            ended: Some(ended),
            num_gone,
        }
    }
}

impl Drop for ChildProcesses {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(ended) = self.ended.take()
            && !crate::net::threads::is_current()
        {
            ended.wait();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machines_own_name_may_lead_nowhere_for_others() {
        let at = |ip: [u8; 4]| SocketAddr::from((ip, 29500));
        for (name, ip, expected) in [
            ("node-7", [127, 0, 1, 1], true),
            ("node-7", [10, 0, 0, 7], false),
            ("localhost", [127, 0, 0, 1], false),
            ("127.0.0.1", [127, 0, 0, 1], false),
        ] {
            assert_eq!(is_loopback_in_disguise(name, at(ip)), expected, "{name}");
        }
    }
}
