//! PS-6 for the actors of the runtime itself: whatever a peer sends to them, they go on. `tests/it/structure.rs`
//! of the crate `ps` looks after the list of all actors.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use tokio::sync::watch;

use super::super::agent::{AreYouThere, GetIncarnations, Leave, PrepareToLeave, Release, Resolve};
use super::super::members::Members;
use super::super::value::Fetch;
use super::*;
use crate::actor::Spawn;
use crate::net::Address;
use crate::remote::kept::tests::store_of;
use crate::remote::kept::{Discard, Take};
use crate::test_util::{Dice, Fed, Fuzz};

const FUZZ: Fuzz = Fuzz {
    one_in: 5,
    fresh_every: 100,
};

fn node(dice: &mut Dice) -> NodeId {
    NodeId {
        rank: dice.below(3) as u32,
        incarnation: dice.below(3),
    }
}

fn scope(process: &Fed, hosts: &Hosts) -> Arc<TaskScope> {
    let resources = Resources::none().cpus(2.0);
    TaskScope::new(Arc::clone(process.process()), hosts.clone(), resources)
}

fn start<A: Remote>(make: impl Fn() -> A + Send + 'static) -> ActorRef<A> {
    let started = Spawn::new().max_pending(1 << 16).start(make);
    started.expect("the system gives a thread")
}

#[test]
fn nothing_that_a_peer_sends_harms_the_agent_of_a_node() {
    let alive = Arc::new(AtomicUsize::new(0));
    let hosts = hosts(&alive);
    let fuzz = Fuzz {
        // What each agent makes stays until the test ends, and takes a thread.
        one_in: 20,
        ..FUZZ
    };
    let num_effects = fuzz.run::<NodeAgent>(
        |process| {
            let scope = scope(process, &hosts);
            start(move || NodeAgent {
                scope: Arc::clone(&scope),
                released: watch::Sender::new(false),
            })
        },
        |process, dice| {
            let make = Make {
                order: dice.below(8),
                type_name: hosted_name::<Porter>(),
                variant: dice.once_in(4).then(|| "small".to_owned()),
                args: Args::write(process.process(), &()).unwrap(),
                name: dice.once_in(4).then(|| "a porter of this test".to_owned()),
                needs: Resources::none().cpus(1.0),
            };
            let find = Find {
                type_name: hosted_name::<Porter>(),
                name: "a porter of this test".to_owned(),
            };
            vec![
                process.sent::<NodeAgent, _>(&make),
                process.sent::<NodeAgent, _>(&find),
                process.sent::<NodeAgent, _>(&Release),
                process.sent::<NodeAgent, _>(&AreYouThere),
            ]
        },
        |agent| {
            agent.ask(AreYouThere).wait()?;
            Ok(alive.load(Ordering::SeqCst) > 0)
        },
    );
    assert!(num_effects > 0, "no actor was ever made");
}

#[test]
fn nothing_that_a_peer_sends_harms_the_agent_of_the_driver() {
    let hosts = Hosts::new().must_agree("seed", 7);
    let num_effects = FUZZ.run::<DriverAgent>(
        |process| {
            let scope = scope(process, &hosts);
            let members = Arc::new(Members::new(Vec::new(), None, true, None));
            let process = Arc::clone(process.process());
            start(move || DriverAgent {
                process: Arc::clone(&process),
                scope: Arc::clone(&scope),
                members: Arc::clone(&members),
                takes_far_nodes: false,
            })
        },
        |process, dice| {
            let join = Join {
                rank: dice.below(3) as u32,
                attempt: dice.below(3),
                process: dice.below(3),
                run_id: dice.once_in(4).then(|| "one".to_owned()),
                user: dice.once_in(4).then_some(0),
                addresses: vec![Address::Memory(7)],
                resources: Resources::none().cpus(4.0),
                host: "a host".to_owned(),
                pid: 1,
                facts: [("seed".to_owned(), dice.one_of(&["7", "8"]).to_owned())].into(),
            };
            let find = Find {
                type_name: hosted_name::<Porter>(),
                name: "a porter of this test".to_owned(),
            };
            let newer_than = dice.once_in(2).then(|| dice.below(4));
            vec![
                process.sent::<DriverAgent, _>(&join),
                process.sent::<DriverAgent, _>(&PrepareToLeave(node(dice))),
                process.sent::<DriverAgent, _>(&Leave(node(dice))),
                process.sent::<DriverAgent, _>(&Resolve(node(dice))),
                process.sent::<DriverAgent, _>(&find),
                process.sent::<DriverAgent, _>(&GetIncarnations { newer_than }),
            ]
        },
        |agent| {
            for (rank, incarnation) in [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)] {
                let known = agent.ask(Resolve(NodeId { rank, incarnation })).wait()?;
                if known.is_some() {
                    return Ok(true);
                }
            }
            Ok(false)
        },
    );
    assert!(num_effects > 0, "no node was ever let in");
}

#[test]
fn nothing_that_a_peer_sends_harms_the_object_store() {
    const NUM_VALUES: u64 = 200;
    let num_kept = RefCell::new(None);
    let num_effects = FUZZ.run::<KeptResults>(
        |_| {
            let (store, num_left) = store_of(NUM_VALUES);
            num_kept.replace(Some(num_left));
            store
        },
        |process, dice| {
            let number = dice.below(NUM_VALUES);
            vec![
                process.sent::<KeptResults, _>(&Take(number)),
                process.sent::<KeptResults, _>(&Discard(number)),
            ]
        },
        |store| {
            let beyond = store.ask(Take(NUM_VALUES)).wait()?;
            assert!(beyond.is_none(), "nobody has kept this value");
            let num_kept = num_kept.borrow();
            let num_kept = num_kept.as_ref().expect("the store was made");
            Ok(num_kept() < NUM_VALUES as usize)
        },
    );
    assert!(num_effects > 0, "no value was ever taken");
}

#[derive(Clone, Serialize, Deserialize)]
struct Mean {
    sum: f64,
    count: u32,
}

#[derive(Message, Serialize, Deserialize)]
#[rtype(result = "f64")]
struct Add(f64);

impl Method<Mean> for Add {
    fn call(self, mean: &mut Mean) -> f64 {
        mean.sum += self.0;
        mean.count += 1;
        mean.sum / f64::from(mean.count)
    }
}

impl Value for Mean {
    fn methods(methods: &mut Messages<Owned<Self>>) {
        methods.add::<Add>();
    }
}

#[test]
fn nothing_that_a_peer_sends_harms_a_value_that_others_use() {
    let made = AtomicU64::new(0);
    let num_effects = FUZZ.run::<Owned<Mean>>(
        |_| {
            made.fetch_add(1, Ordering::Relaxed);
            start(|| Owned::new(Mean { sum: 0.0, count: 0 }))
        },
        |process, dice| {
            vec![
                process.sent::<Owned<Mean>, _>(&Fetch::<Mean>(PhantomData)),
                process.sent::<Owned<Mean>, _>(&Add(dice.below(3) as f64)),
            ]
        },
        |value| Ok(value.ask(Fetch::<Mean>(PhantomData)).wait()?.count > 0),
    );
    assert!(
        num_effects > made.load(Ordering::Relaxed),
        "few calls had an effect"
    );
}
