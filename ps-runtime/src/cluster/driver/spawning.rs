//! Starts actors on the nodes of a cluster.

use std::any::type_name;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{Cluster, Shared, random};
use crate::actor::error::error_chain;
use crate::actor::{ActorRef, CallError};
use crate::cluster::agent::{Make, SpawnRefused, hosted_name};
use crate::cluster::host::{Args, Hosted, Hosts};
use crate::cluster::members::Member;
use crate::cluster::placement::{Placement, SpawnOn, SpawnOnError};
use crate::cluster::resources::Resources;
use crate::cluster::task::Task;
use crate::remote::process::NodeId;
use crate::remote::reference::{Wire, reference};

/// How often all nodes are asked in turn to start an actor.
const MAX_ROUNDS: usize = 3;

impl Cluster {
    /// Starts an actor on the next node in turn, or in this process if there are no nodes. For an example
    /// see [`alone`](Self::alone) and [`listen`](Self::listen).
    pub fn spawn<A: Hosted>(&self, args: A::Args) -> Task<Result<ActorRef<A>, SpawnOnError>> {
        self.spawn_with(SpawnOn::new(), args)
    }

    /// Starts an actor with these options; see [`SpawnOn`] and [`Placement`] for examples.
    pub fn spawn_with<A: Hosted>(
        &self,
        options: SpawnOn,
        args: A::Args,
    ) -> Task<Result<ActorRef<A>, SpawnOnError>> {
        let shared = Arc::clone(&self.inner.shared);
        let spawning = async move { shared.spawn(options, args).await };
        Task::try_start(spawning, |error| Err(SpawnOnError::Threads(error)))
    }
}

impl Shared {
    async fn spawn<A: Hosted>(
        &self,
        options: SpawnOn,
        args: A::Args,
    ) -> Result<ActorRef<A>, SpawnOnError> {
        let actor_type = type_name::<A>();
        let SpawnOn {
            placement,
            name,
            variant,
            here,
        } = options;
        let args = Args::write(&self.process, &args).map_err(|error| SpawnOnError::Args {
            actor_type,
            reason: error_chain(&error),
        })?;
        let needs = match &placement {
            Placement::Needs(needs) => needs.clone(),
            _ => Resources::none(),
        };
        let order = Make {
            order: random(),
            type_name: hosted_name::<A>(),
            variant,
            args,
            name,
            needs: needs.clone(),
        };
        // If a node dies while it is asked, another node may do.
        let mut lost = None;
        for _ in 0..MAX_ROUNDS {
            for candidate in self.candidates(&placement)? {
                let node = candidate
                    .as_ref()
                    .map_or(NodeId::DRIVER, |member| member.node);
                let made = match candidate {
                    Some(member) => ask_to_make(&member, &order).await,
                    None => Ok(self.make_here(here.as_ref(), order.clone()).await),
                };
                match made {
                    Ok(Ok(wire)) => {
                        return reference(&self.process, wire).map_err(SpawnOnError::Ended);
                    }
                    Ok(Err(SpawnRefused::NoRoom { .. })) => {}
                    // In the next round this node is not among the candidates.
                    Ok(Err(source @ SpawnRefused::Leaving)) => {
                        lost = Some(SpawnOnError::Refused {
                            node,
                            actor_type,
                            source,
                        });
                    }
                    Ok(Err(source)) => {
                        return Err(SpawnOnError::Refused {
                            node,
                            actor_type,
                            source,
                        });
                    }
                    Err(source) => {
                        tracing::warn!(%node, %source, "could not start an actor");
                        let source = Box::new(source);
                        lost = Some(SpawnOnError::Call {
                            node,
                            actor_type,
                            source,
                        });
                    }
                }
            }
            if lost.is_none() {
                break;
            }
        }
        Err(lost.unwrap_or_else(|| {
            let nodes = self.members.list().into_iter();
            let nodes = nodes.map(|member| format!("{} with {}", member.node, member.resources));
            let nodes = nodes.collect::<Vec<_>>().join("; ");
            SpawnOnError::NoRoom { needs, nodes }
        }))
    }

    async fn make_here(&self, hosts: Option<&Hosts>, order: Make) -> Result<Wire, SpawnRefused> {
        let scope = Arc::clone(&self.scope);
        match hosts {
            Some(hosts) => {
                let host = hosts.get(&order.type_name, order.variant.as_deref())?;
                scope.make_by(host, order).await
            }
            None => scope.make(order).await,
        }
    }

    /// The nodes to ask, in order; `None` is this process.
    fn candidates(&self, placement: &Placement) -> Result<Vec<Option<Member>>, SpawnOnError> {
        let mut members = self.members.list();
        members.retain(|member| !member.is_leaving);
        let in_turn = |members: &mut Vec<Member>| {
            let admitted = self.next.fetch_add(1, Ordering::Relaxed);
            let len = members.len().max(1);
            members.rotate_left(admitted % len);
        };
        let one = |members: Vec<Member>, is_it: &dyn Fn(NodeId) -> bool, what: String| {
            let found = members.into_iter().find(|member| is_it(member.node));
            found
                .map(|member| vec![Some(member)])
                .ok_or(SpawnOnError::NoSuchNode(what))
        };
        match placement {
            Placement::Driver | Placement::Node(NodeId::DRIVER) | Placement::Rank(0) => {
                Ok(vec![None])
            }
            Placement::Node(node) => one(members, &|other| other == *node, node.to_string()),
            Placement::Rank(rank) => one(
                members,
                &|other| other.rank == *rank,
                format!("node {rank}"),
            ),
            Placement::RoundRobin if members.is_empty() => Ok(vec![None]),
            Placement::RoundRobin => {
                in_turn(&mut members);
                Ok(members.into_iter().map(Some).collect())
            }
            Placement::Needs(needs) => {
                in_turn(&mut members);
                members.retain(|member| member.resources.include(needs));
                let nodes = members.into_iter().map(Some);
                // The driver comes last, because it also has other work.
                Ok(nodes.chain([None]).collect())
            }
        }
    }
}

/// Asks a node to make an actor. If the answer is lost, the same node is asked again first: it may have
/// made the actor, and another node would make a second one with the same name.
async fn ask_to_make(
    member: &Member,
    order: &Make,
) -> Result<Result<Wire, SpawnRefused>, CallError> {
    loop {
        match member.agent.ask(order.clone()).await {
            Err(error) if error.is_connection_lost() && error.may_have_run() => {
                tracing::debug!(node = %member.node, %error, "asking again for an actor");
            }
            answer => return answer,
        }
    }
}
