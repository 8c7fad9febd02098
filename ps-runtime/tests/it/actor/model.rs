//! Random sequences of operations on one actor, against a model of what the page promises.
//!
//! Of an actor elsewhere, the model knows what it was sent, and waits where the caller learns
//! something later than it happens: what it has taken back, and what a kill hands back.

use std::collections::VecDeque;
use std::time::Duration;

use proptest::prelude::*;
use ps_runtime::{CallError, Reply, RestartPolicy, Spawn};

use super::ON;
use crate::actor::probe::{
    Count, Gate, Log, Probe, SOON, act, eventually, panic_of, wait_until_arrived,
};
use crate::actor::transport::Place;

const MAX_PENDING: usize = 6;
const MAX_RESTARTS: u32 = 2;

/// What the driver does while the actor is held at a gate, so that the outcome is determined.
#[derive(Debug, Clone)]
enum Op {
    Ask,
    AskToPanic,
    Tell,
    /// Drops the reply of the n-th call that is out.
    DropReply(usize),
    /// Lets the n-th call that is out time out.
    TimeOut(usize),
    /// Opens the gate, lets the actor run all it has, and holds it at a new one.
    Run,
    Stop,
    Kill,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => Just(Op::Ask),
        1 => Just(Op::AskToPanic),
        3 => Just(Op::Tell),
        2 => any::<usize>().prop_map(Op::DropReply),
        2 => any::<usize>().prop_map(Op::TimeOut),
        3 => Just(Op::Run),
        1 => Just(Op::Stop),
        1 => Just(Op::Kill),
    ]
}

enum Call {
    Count(u64, Reply<u64>),
    Panic(Reply<()>),
}

/// What the model expects of the actor.
#[derive(Default)]
struct Model {
    /// Tags of queued messages; `None` is one that panics.
    queue: VecDeque<Option<u64>>,
    closed: bool,
    restarts: u32,
    dead_letters: u64,
    /// Tags in the order in which handlers have begun.
    log: Vec<u64>,
    is_over: bool,
}

impl Model {
    fn takes_calls(&self) -> bool {
        !self.closed && self.has_slot()
    }

    fn has_slot(&self) -> bool {
        // The gate is one of the pending calls.
        self.queue.len() + 1 < MAX_PENDING
    }

    /// Runs the queue; returns the tags that were handled, in order, and whether panics ended it.
    fn run(&mut self, told: &[u64]) {
        while let Some(message) = self.queue.pop_front() {
            match message {
                Some(tag) => self.log.push(tag),
                None if self.restarts < MAX_RESTARTS => self.restarts += 1,
                None => {
                    self.close_and_drop_queue(told);
                    self.is_over = true;
                }
            }
        }
        self.is_over |= self.closed;
    }

    fn close_and_drop_queue(&mut self, told: &[u64]) {
        self.closed = true;
        let lost = self.queue.drain(..).flatten();
        self.dead_letters += lost.filter(|tag| told.contains(tag)).count() as u64;
    }
}

fn check(ops: &[Op]) {
    let log = Log::default();
    let options = Spawn::new()
        .max_pending(MAX_PENDING)
        .restart(RestartPolicy {
            max_restarts: MAX_RESTARTS,
            within: Duration::MAX,
        });
    let make = {
        let log = log.clone();
        move || Probe::with_log(&log)
    };
    let actor = ON.start(options, make).unwrap();
    let is_local = actor.is_local();
    let mut gate = Some(Gate::hold(&actor));
    let mut model = Model::default();
    let mut calls: Vec<Call> = Vec::new();
    let mut told = Vec::new();

    for (tag, op) in ops.iter().enumerate() {
        let tag = tag as u64;
        match op {
            Op::Ask => {
                let reply = actor.ask(Count(tag));
                if model.takes_calls() {
                    model.queue.push_back(Some(tag));
                    calls.push(Call::Count(tag, reply));
                } else {
                    let error = reply.wait_timeout(SOON).unwrap_err();
                    assert_eq!(error.into_message::<Count>().unwrap(), Count(tag));
                }
            }
            Op::AskToPanic => {
                let reply = actor.ask(act(|_, _| panic!("asked to")));
                if model.takes_calls() {
                    model.queue.push_back(None);
                    calls.push(Call::Panic(reply));
                } else {
                    assert!(!reply.wait_timeout(SOON).unwrap_err().may_have_run());
                }
            }
            Op::Tell => {
                let result = actor.tell(Count(tag));
                if is_local || !model.closed || model.is_over {
                    assert_eq!(result.is_ok(), model.takes_calls());
                } else {
                    // It is refused where the actor is.
                    assert_eq!(result.is_ok(), model.has_slot());
                    model.dead_letters += u64::from(result.is_ok());
                }
                if model.takes_calls() {
                    model.queue.push_back(Some(tag));
                    told.push(tag);
                }
            }
            Op::DropReply(index) | Op::TimeOut(index) => {
                if calls.is_empty() {
                    continue;
                }
                let index = index % calls.len();
                let Call::Count(tag, _) = &calls[index] else {
                    continue;
                };
                let tag = *tag;
                let Call::Count(_, reply) = calls.remove(index) else {
                    unreachable!("the kind was just looked at");
                };
                let was_queued = model.queue.contains(&Some(tag));
                model.queue.retain(|queued| *queued != Some(tag));
                if matches!(op, Op::DropReply(_)) {
                    drop(reply);
                } else {
                    let error = reply.wait_timeout(Duration::ZERO);
                    // What was sent to another process may have begun, for all its caller knows.
                    if was_queued && (is_local || !error.as_ref().unwrap_err().may_have_run()) {
                        let message = error.unwrap_err().into_message::<Count>();
                        assert_eq!(message.unwrap(), Count(tag));
                    }
                }
                if !model.is_over {
                    wait_until_arrived(&actor);
                }
            }
            Op::Run => {
                drop(gate.take());
                model.run(&told);
                for call in calls.drain(..) {
                    settle(call, &model);
                }
                if model.is_over {
                    actor.shutdown(SOON).wait().unwrap();
                } else {
                    eventually("the queue is empty", || actor.pending() == 0);
                    gate = Some(Gate::hold(&actor));
                }
            }
            Op::Stop => {
                actor.stop();
                model.closed = true;
            }
            Op::Kill => {
                actor.kill();
                model.close_and_drop_queue(&told);
            }
        }
        if !model.is_over {
            let expected = model.queue.len() + 1;
            if !is_local {
                eventually("all that is over is known", || actor.pending() <= expected);
            }
            assert_eq!(actor.pending(), expected, "after {op:?}");
        }
        // Of what happens elsewhere, the end is heard of.
        let is_closed = if is_local {
            model.closed
        } else {
            model.is_over
        };
        assert_eq!(actor.is_alive(), !is_closed, "after {op:?}");
    }

    drop(gate);
    model.run(&told);
    for call in calls {
        settle(call, &model);
    }
    actor.shutdown(SOON).wait().unwrap();
    let handled: Vec<u64> = log
        .entries()
        .iter()
        .filter_map(|entry| entry.parse().ok())
        .collect();
    assert_eq!(handled, model.log);
    if is_local {
        assert_eq!(actor.restarts(), model.restarts);
    }
    assert_eq!(actor.dead_letters(), model.dead_letters);
}

/// Each call ends, with the outcome that its handler's fate asks for.
fn settle(call: Call, model: &Model) {
    match call {
        Call::Count(tag, reply) => match reply.wait_timeout(SOON) {
            Ok(_) => assert!(model.log.contains(&tag), "{tag} was not to run"),
            Err(error) => {
                assert!(!model.log.contains(&tag), "{tag} was to run: {error}");
                assert_eq!(error.into_message::<Count>().unwrap(), Count(tag));
            }
        },
        Call::Panic(reply) => match reply.wait_timeout(SOON) {
            Err(CallError::NotDelivered { .. }) => assert!(model.closed),
            result => assert_eq!(panic_of(result), "asked to"),
        },
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: if matches!(ON, Place::InProcess) { 200 } else { 60 },
        failure_persistence: None,
        rng_seed: proptest::test_runner::RngSeed::Fixed(20140),
        ..ProptestConfig::default()
    })]

    /// A-1, A-3, A-4, A-6, A-7, A-11 to A-15; R-1 and R-13 for an actor of another process
    #[test]
    fn any_sequence_of_operations_ends_as_the_model_says(
        ops in prop::collection::vec(op(), 1..40)
    ) {
        check(&ops);
    }
}
