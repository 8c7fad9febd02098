//! Decides which processes may join as nodes.
//!
//! A rank belongs to the process that has it, as long as that process runs. Another process with the
//! same attempt is refused, and the error names the process that has the rank. It takes the rank only
//! if that process is found dead. A launcher that starts a rank again passes a higher attempt. A process
//! with a higher attempt gets the rank at once.

use std::sync::Arc;
use std::time::Duration;

use super::agent::{AreYouThere, Join, JoinRefused, Joined, NodeAgent, agent_of};
use super::members::{Claim, Member, Members};
use super::task_scope::TaskScope;
use super::way;
use crate::actor::{ActorRef, CallError, NotDelivered};
use crate::net::{Address, threads};
use crate::remote::process::{Joining, NodeId, Process};

/// How long a node may take to answer its driver's first call before the log says so.
const CALLED_BACK_WITHIN: Duration = Duration::from_secs(2);

pub(crate) struct Door {
    pub(crate) process: Arc<Process>,
    pub(crate) scope: Arc<TaskScope>,
    pub(crate) members: Arc<Members>,
    /// Whether nodes on other hosts may join. If not, the driver connects only to addresses of its own host.
    pub(crate) takes_far_nodes: bool,
}

impl Door {
    /// Lets a process join, or returns why it is refused.
    pub(crate) async fn let_in(self, join: Join) -> Result<Joined, JoinRefused> {
        let (rank, pid, host) = (join.rank, join.pid, join.host.clone());
        let process = join.process;
        // The number of a user means nothing on another host.
        let user = join.user.filter(|_| is_near(&join.addresses));
        let place = Joining::new(rank, join.run_id.as_deref(), user);
        let answer = self.judge(join).await;
        if let Err(why) = &answer {
            if self.members.note_refusal(process) {
                tracing::warn!(rank, host, pid, reason = %why, "a process is not let in as a node");
            }
            if why.is_about_its_start() {
                self.members.refuse_rank(place, &why.to_string());
            }
        }
        answer
    }

    async fn judge(&self, join: Join) -> Result<Joined, JoinRefused> {
        if !self.takes_far_nodes
            && let Some(far) = join.addresses.iter().find(|address| !address.is_local())
        {
            return Err(JoinRefused::NotLocal(far.clone()));
        }
        self.members.check_run(join.run_id.as_deref())?;
        // What a driver states that has ended says nothing about the next one at the same address.
        self.members.check_not_over()?;
        self.scope.check_facts(&join.facts)?;
        let node = loop {
            match self.members.admit(&join)? {
                Claim::Admitted(node) => break node,
                Claim::Held { by, refusal } => {
                    if is_there(&by).await {
                        return Err(refusal);
                    }
                    // If another task has removed the node, that task has logged the loss.
                    if self.members.remove(by.node, false) {
                        tracing::warn!(node = %by.node, "a node is lost: another process takes its place");
                    }
                }
            }
        };
        // The earlier incarnation is over.
        let rank = node.rank;
        if let Some(incarnation) = node.incarnation.checked_sub(1) {
            self.process.sever(NodeId { rank, incarnation });
        }
        let agent = agent_of::<NodeAgent>(&self.process, node);
        let member = Member {
            node,
            agent: agent.clone(),
            resources: join.resources,
            host: join.host,
            pid: join.pid,
            is_leaving: false,
        };
        tracing::info!(%node, host = member.host, pid = member.pid, "a node has joined");
        self.members.insert(member);
        let members = Arc::clone(&self.members);
        let process = Arc::downgrade(&self.process);
        let addresses: Vec<_> = join.addresses.iter().map(ToString::to_string).collect();
        let addresses = addresses.join(" and ");
        threads::next().spawn(async move {
            tokio::select! {
                () = agent.stopped() => {}
                () = say_if_unreachable(&agent, node, &addresses) => agent.stopped().await,
            }
            drop(agent);
            if members.remove(node, false) {
                if let Some(process) = process.upgrade() {
                    process.sever(node);
                }
                tracing::warn!(%node, "a node is lost: its connection has ended, or nothing was heard of it for the lease");
            }
        });
        let mut sockets = self.members.addresses(NodeId::DRIVER).unwrap_or_default();
        sockets.retain(|address| matches!(address, Address::Unix(_)));
        Ok(Joined {
            node,
            session: self.process.session(),
            sockets,
            clock: way::now(),
        })
    }
}

/// Logs that the driver does not reach a node, although the node has reached the driver. Otherwise the log would only
/// say, after a process lease, that the node is lost.
async fn say_if_unreachable(agent: &ActorRef<NodeAgent>, node: NodeId, addresses: &str) {
    let called = tokio::time::timeout(CALLED_BACK_WITHIN, agent.ask(AreYouThere)).await;
    if called.is_err() {
        tracing::warn!(
            %node,
            addresses,
            "this node has joined, but it does not answer at its own address: a firewall before it drops or rejects \
             packets (nodes listen on any free port), or it has no time to answer"
        );
    }
}

/// Whether a process is on this host, as far as its addresses say.
fn is_near(addresses: &[Address]) -> bool {
    addresses.iter().all(Address::is_local)
}

/// Whether a node answers. If its connection is lost, a new one is tried for one process lease, as for any
/// other call. A node that sends nothing at all is given up within two process leases.
async fn is_there(member: &Member) -> bool {
    loop {
        match member.agent.ask(AreYouThere).await {
            Ok(()) => return true,
            // The call was written to a connection that was then lost. The next call shows more.
            Err(CallError::Unknown { .. }) if member.agent.is_alive() => {}
            // A node that is too busy to take a call still runs.
            Err(
                CallError::NotDelivered {
                    reason: NotDelivered::QueueFull { .. },
                    ..
                }
                | CallError::Failed { .. },
            ) => return true,
            Err(CallError::NotDelivered { .. } | CallError::Unknown { .. }) => return false,
        }
    }
}
