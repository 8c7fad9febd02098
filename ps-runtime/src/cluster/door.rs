//! Who is let in as a node.
//!
//! A rank belongs to the process that has it for as long as that one lives. Another process with the
//! same attempt is told who has it; it takes the place only when the one before is found dead. A
//! launcher that starts a rank again says so with a higher attempt, which is believed at once.

use std::sync::Arc;

use super::agent::{AreYouThere, Join, JoinRefused, Joined, NodeAgent, TaskScope, agent_of};
use super::members::{Claim, Member, Members};
use crate::actor::{CallError, NotDelivered};
use crate::net::threads;
use crate::remote::process::{Joining, NodeId, Process};

pub(crate) struct Door {
    pub(crate) process: Arc<Process>,
    pub(crate) scope: Arc<TaskScope>,
    pub(crate) members: Arc<Members>,
    /// Addresses are dialled only if they come from somebody trusted, or lead nowhere else.
    pub(crate) takes_far_nodes: bool,
}

impl Door {
    /// Lets a process in, or says why not.
    pub(crate) async fn let_in(self, join: Join) -> Result<Joined, JoinRefused> {
        let (rank, pid, host) = (join.rank, join.pid, join.host.clone());
        let process = join.process;
        let place = Joining::new(rank, join.run_id.as_deref());
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
        self.scope.check_facts(&join.facts)?;
        let node = loop {
            match self.members.admit(&join)? {
                Claim::Admitted(node) => break node,
                Claim::Held { by, refusal } => {
                    if is_there(&by).await {
                        return Err(refusal);
                    }
                    // Whoever made it so has logged it already, if it was not this.
                    if self.members.remove(by.node, false) {
                        tracing::warn!(node = %by.node, "a node is lost: another process takes its place");
                    }
                }
            }
        };
        // Nothing of an earlier incarnation counts any more.
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
        threads::next().spawn(async move {
            agent.stopped().await;
            drop(agent);
            if members.remove(node, false) {
                if let Some(process) = process.upgrade() {
                    process.sever(node);
                }
                tracing::warn!(%node, "a node is lost: its connection has ended, or nothing was heard of it for the lease");
            }
        });
        let session = self.process.session();
        Ok(Joined { node, session })
    }
}

/// Whether a node answers. One whose connection is lost is tried for the length of the lease, as any
/// other call; a node that says nothing at all is given up within two.
async fn is_there(member: &Member) -> bool {
    loop {
        match member.agent.ask(AreYouThere).await {
            Ok(()) => return true,
            // It was written to a connection that then was lost: the next one shows.
            Err(CallError::Unknown { .. }) if member.agent.is_alive() => {}
            // Whoever is too busy to take a call is there.
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
