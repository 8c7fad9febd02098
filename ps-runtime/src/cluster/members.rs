//! The driver's list of nodes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::sync::watch;

use super::agent::{Join, JoinRefused, NodeAgent};
use super::incarnations::{KnownIncarnations, Standing};
use super::resources::Resources;
use crate::actor::ActorRef;
use crate::net::Address;
use crate::remote::listen::Incarnations;
use crate::remote::process::{Joining, NodeId};

/// A node that is in the cluster.
#[derive(Clone, Debug)]
pub(crate) struct Member {
    pub(crate) node: NodeId,
    pub(crate) agent: ActorRef<NodeAgent>,
    pub(crate) resources: Resources,
    pub(crate) host: String,
    pub(crate) pid: u32,
    /// The node is about to leave. No more actors are started there.
    pub(crate) is_leaving: bool,
}

/// The driver knows all incarnations.
impl Incarnations for Members {
    fn may_speak(&self, node: NodeId) -> Option<bool> {
        Some(self.is_live(node))
    }

    fn ask(&self, node: NodeId) -> BoxFuture<'static, Option<bool>> {
        std::future::ready(Some(self.is_live(node))).boxed()
    }

    fn note_refusal(&self, place: Joining, reason: &str) {
        self.refuse_rank(place, reason);
    }
}

/// The answer to a process that asks for a rank.
pub(crate) enum Claim {
    Admitted(NodeId),
    /// Another process has the rank. The answer is a refusal if that process still runs.
    Held {
        by: Box<Member>,
        refusal: JoinRefused,
    },
}

/// How many refused processes are remembered, so that each is logged once.
const MAX_REFUSALS: usize = 1024;

pub(crate) struct Members {
    driver: Vec<Address>,
    /// The run of this driver, if it was told.
    run_id: Option<String>,
    /// Whether every process that connects has shown that it knows a secret.
    is_guarded: bool,
    /// The user of this process, if it asks for no secret because only its own host can reach it.
    user: Option<u32>,
    state: Mutex<State>,
    /// Changes whenever the list does.
    changed: watch::Sender<u64>,
}

#[derive(Default)]
struct State {
    /// By rank. An admitted node becomes a member shortly after it was admitted.
    ranks: BTreeMap<u32, Rank>,
    is_over: bool,
    /// Processes that were refused and that the log has named.
    refused: BTreeSet<u64>,
    /// Ranks of this run that were refused for good and have not joined since.
    refused_ranks: BTreeMap<u32, Refusal>,
    num_refusals: u64,
}

/// Why a rank was refused the first time.
#[derive(Clone, Debug)]
pub(crate) struct Refusal {
    pub(crate) rank: u32,
    pub(crate) reason: String,
    /// Counts all refusals.
    number: u64,
}

struct Rank {
    incarnation: u64,
    attempt: u64,
    process: u64,
    since: Instant,
    addresses: Vec<Address>,
    is_live: bool,
    has_left: bool,
    member: Option<Member>,
}

impl Members {
    pub(crate) fn new(
        driver: Vec<Address>,
        run_id: Option<String>,
        is_guarded: bool,
        user: Option<u32>,
    ) -> Self {
        Self {
            driver,
            run_id,
            is_guarded,
            user,
            state: Mutex::default(),
            changed: watch::Sender::new(0),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code of the user runs under the lock, so a poisoned list is whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refuses a process that was started for another run. If either side states no run, it is not refused.
    pub(crate) fn check_run(&self, wanted: Option<&str>) -> Result<(), JoinRefused> {
        match (wanted, &self.run_id) {
            (Some(wanted), Some(here)) if wanted != here => Err(JoinRefused::OtherRun {
                wanted: wanted.to_owned(),
                here: here.clone(),
            }),
            _ => Ok(()),
        }
    }

    /// Refuses everybody after the end of the run.
    pub(crate) fn check_not_over(&self) -> Result<(), JoinRefused> {
        match self.lock().is_over {
            true => Err(JoinRefused::Over),
            false => Ok(()),
        }
    }

    /// Records that a process was refused. Returns `false` if the log has already named it.
    pub(crate) fn note_refusal(&self, process: u64) -> bool {
        let mut state = self.lock();
        state.refused.len() < MAX_REFUSALS && state.refused.insert(process)
    }

    /// Whether a process clearly belongs to this run.
    fn is_ours(&self, place: Joining) -> bool {
        let here = Joining::new(place.rank, self.run_id.as_deref(), self.user);
        match (place.run, here.run) {
            (Some(_), _) => place.run == here.run,
            (None, _) if self.is_guarded => true,
            (None, Some(_)) => false,
            // The user is only what the process says. That prevents accidents. It is no protection, and it
            // need not be one: without a secret, any process that can connect can also join.
            (None, None) => place.user.is_some() && place.user == here.user,
        }
    }

    /// Records that a rank was refused for good, if the process clearly belongs to this run: a stranger
    /// must not make the driver stop waiting. The rank may still join later.
    pub(crate) fn refuse_rank(&self, place: Joining, reason: &str) {
        let rank = place.rank;
        if !self.is_ours(place) {
            return;
        }
        let mut state = self.lock();
        let is_there = state.ranks.get(&rank).is_some_and(|rank| rank.is_live);
        let is_known = state.refused_ranks.contains_key(&rank);
        if is_there || is_known || state.refused_ranks.len() >= MAX_REFUSALS {
            return;
        }
        let number = state.num_refusals;
        state.num_refusals += 1;
        let refusal = Refusal {
            rank,
            reason: reason.to_owned(),
            number,
        };
        state.refused_ranks.insert(rank, refusal);
        drop(state);
        self.changed.send_modify(|version| *version += 1);
    }

    /// Returns the first refusal among the ranks 1 to `last` that have not joined since.
    pub(crate) fn first_refusal(&self, last: u32) -> Option<Refusal> {
        let state = self.lock();
        let refusals = state.refused_ranks.range(1..=last.max(1));
        let first = refusals.min_by_key(|(_, refusal)| refusal.number);
        first.map(|(_, refusal)| refusal.clone())
    }

    /// Whether each of the ranks 1 to `last` has joined or was refused for good.
    pub(crate) fn are_settled(&self, last: u32) -> bool {
        let state = self.lock();
        let State {
            ranks,
            refused_ranks,
            ..
        } = &*state;
        let takes_part = |number: u32| ranks.get(&number).is_some_and(|rank| rank.member.is_some());
        (1..=last).all(|number| takes_part(number) || refused_ranks.contains_key(&number))
    }

    /// Gives a joining process a new incarnation of its rank, which ends the one before. If another process
    /// has the rank with the same attempt, that process keeps it.
    pub(crate) fn admit(&self, join: &Join) -> Result<Claim, JoinRefused> {
        let &Join { rank, attempt, .. } = join;
        if rank == NodeId::DRIVER.rank {
            return Err(JoinRefused::Driver(rank));
        }
        let mut state = self.lock();
        if state.is_over {
            return Err(JoinRefused::Over);
        }
        let before = state.ranks.get(&rank);
        if let Some(before) = before.filter(|before| before.attempt > attempt) {
            let current = before.attempt;
            return Err(JoinRefused::Superseded {
                rank,
                attempt,
                current,
            });
        }
        if let Some(before) = before
            && before.is_live
            && before.attempt == attempt
            && before.process != join.process
            && let Some(member) = &before.member
        {
            let refusal = JoinRefused::Taken {
                rank,
                attempt,
                host: member.host.clone(),
                pid: member.pid,
                since_secs: before.since.elapsed().as_secs(),
            };
            let by = Box::new(member.clone());
            return Ok(Claim::Held { by, refusal });
        }
        let incarnation = before.map_or(0, |before| before.incarnation) + 1;
        let entry = Rank {
            incarnation,
            attempt,
            process: join.process,
            since: Instant::now(),
            addresses: join.addresses.clone(),
            is_live: true,
            has_left: false,
            member: None,
        };
        let replaced = state.ranks.insert(rank, entry);
        state.refused_ranks.remove(&rank);
        drop(state);
        // Dropped outside the lock, because it holds a reference.
        drop(replaced);
        self.changed.send_modify(|version| *version += 1);
        Ok(Claim::Admitted(NodeId { rank, incarnation }))
    }

    pub(crate) fn insert(&self, member: Member) {
        let mut state = self.lock();
        // After the end of the run, nothing would drop the reference that the member holds.
        let is_over = state.is_over;
        if let Some(rank) = state.ranks.get_mut(&member.node.rank)
            && !is_over
            && rank.incarnation == member.node.incarnation
            && rank.is_live
        {
            rank.member = Some(member);
        }
        drop(state);
        self.changed.send_modify(|version| *version += 1);
    }

    /// Records that a node is about to leave.
    pub(crate) fn set_leaving(&self, node: NodeId) {
        let mut state = self.lock();
        let rank = state.ranks.get_mut(&node.rank);
        let member = rank.and_then(|rank| rank.member.as_mut());
        if let Some(member) = member.filter(|member| member.node == node) {
            member.is_leaving = true;
        }
    }

    /// Removes a node that is lost or `has_left`. Returns `false` if it was not in the list, or if the run
    /// is over.
    pub(crate) fn remove(&self, node: NodeId, has_left: bool) -> bool {
        let mut state = self.lock();
        let Some(rank) = state.ranks.get_mut(&node.rank) else {
            return false;
        };
        if rank.incarnation != node.incarnation || !rank.is_live {
            return false;
        }
        rank.is_live = false;
        rank.has_left = has_left;
        let removed = rank.member.take();
        let is_over = state.is_over;
        drop(state);
        drop(removed);
        self.changed.send_modify(|version| *version += 1);
        !is_over
    }

    /// Whether this incarnation of a node is in the cluster.
    pub(crate) fn is_live(&self, node: NodeId) -> bool {
        let state = self.lock();
        let rank = state.ranks.get(&node.rank);
        rank.is_some_and(|rank| rank.is_live && rank.incarnation == node.incarnation)
    }

    pub(crate) fn addresses(&self, node: NodeId) -> Option<Vec<Address>> {
        if node == NodeId::DRIVER {
            return Some(self.driver.clone());
        }
        let state = self.lock();
        let rank = state.ranks.get(&node.rank)?;
        (rank.is_live && rank.incarnation == node.incarnation).then(|| rank.addresses.clone())
    }

    /// The nodes in the cluster, in the order of their ranks.
    pub(crate) fn list(&self) -> Vec<Member> {
        let state = self.lock();
        state
            .ranks
            .values()
            .filter_map(|rank| rank.member.clone())
            .collect()
    }

    /// Names the ranks that are missing if `wanted` nodes are waited for. Usually these have the ranks from 1.
    pub(crate) fn missing(&self, wanted: usize) -> String {
        const NUM_NAMED: usize = 8;
        let members = self.list();
        let is_there = |rank: u32| members.iter().any(|member| member.node.rank == rank);
        let num_missing = wanted.saturating_sub(members.len());
        let mut missing = (1..).filter(|rank| !is_there(*rank)).take(num_missing);
        let named: Vec<_> = missing.by_ref().take(NUM_NAMED).collect();
        let named: Vec<_> = named.iter().map(u32::to_string).collect();
        let noun = if num_missing == 1 { "rank" } else { "ranks" };
        match num_missing.saturating_sub(NUM_NAMED) {
            0 => format!("{noun} {}", named.join(", ")),
            more => format!("{noun} {} and {more} more", named.join(", ")),
        }
    }

    /// Closes the list: no more nodes are taken. Returns the nodes that are in it.
    pub(crate) fn close(&self) -> Vec<Member> {
        let mut state = self.lock();
        state.is_over = true;
        let members = state.ranks.values_mut();
        let members = members.filter_map(|rank| rank.member.take()).collect();
        drop(state);
        self.changed.send_modify(|version| *version += 1);
        members
    }

    /// Returns the incarnations of all ranks, as soon as they differ from what the caller has `heard`.
    pub(crate) async fn lives(&self, heard: Option<u64>) -> KnownIncarnations {
        let mut changed = self.changed.subscribe();
        let is_news = |version: &u64| heard != Some(*version) || self.lock().is_over;
        // The sender lives as long as `self`. The version is read before the list, so that the list may be
        // newer than the version, but never older.
        let version = changed
            .wait_for(is_news)
            .await
            .map_or(0, |version| *version);
        let state = self.lock();
        let by_rank = state.ranks.iter().map(|(number, rank)| {
            let standing = match (rank.is_live, rank.has_left) {
                (true, _) => Standing::Live,
                (false, true) => Standing::Left,
                (false, false) => Standing::Lost,
            };
            (*number, (rank.incarnation, standing))
        });
        KnownIncarnations {
            version,
            by_rank: by_rank.collect(),
            is_over: state.is_over,
        }
    }

    #[cfg(test)]
    pub(crate) fn is_member(&self, node: NodeId) -> bool {
        self.list().iter().any(|member| member.node == node)
    }

    pub(crate) fn changed(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }
}
