//! Values that live in one process, and handles to them in others.

use std::time::Duration;

use actix::{Actor, Context, Handler, Message};
use ps_runtime::cluster::{Hosted, Placement, SpawnOn, SpawnOnError, Transport};
use ps_runtime::cluster::{Method, Owned, RemoteRef, Value};
use ps_runtime::net::memory::{Faults, MemoryNetwork, Outage};
use ps_runtime::remote::{Messages, Remote};
use ps_runtime::{ActorRef, CallError};
use serde::{Deserialize, Serialize};

use super::world::{SOON, World, config, transports};
use crate::actor::probe::{Census, Citizen, eventually, panic_of};
use ps_runtime::test_util::Parked;

/// A sum that only grows.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Tally {
    total: i64,
    /// Counts whether the value exists. Copies do not have it.
    #[serde(skip)]
    citizen: Option<Citizen>,
}

impl Clone for Tally {
    fn clone(&self) -> Self {
        Self {
            total: self.total,
            citizen: None,
        }
    }
}

#[derive(Debug, Message, Serialize, Deserialize)]
#[rtype(result = "i64")]
struct Add(i64);

impl Method<Tally> for Add {
    fn call(self, tally: &mut Tally) -> i64 {
        assert!(self.0 >= 0, "a tally never falls");
        tally.total += self.0;
        tally.total
    }
}

#[derive(Message, Serialize, Deserialize)]
#[rtype(result = "()")]
struct BeCounted(Parked<Citizen>);

impl Method<Tally> for BeCounted {
    fn call(self, tally: &mut Tally) {
        tally.citizen = Some(self.0.take());
    }
}

impl Value for Tally {
    fn methods(methods: &mut Messages<Owned<Self>>) {
        methods.add::<Add>().add::<BeCounted>();
    }
}

/// Keeps a handle until it is told to drop it.
#[derive(Debug, Default)]
pub(crate) struct Holder {
    held: Option<RemoteRef<Tally>>,
}

impl Actor for Holder {
    type Context = Context<Self>;
}

impl Remote for Holder {
    fn messages(messages: &mut Messages<Self>) {
        messages.add::<Hold>().add::<AddToHeld>();
    }
}

impl Hosted for Holder {
    type Args = ();
}

#[derive(Debug, Message, Serialize, Deserialize)]
#[rtype(result = "()")]
struct Hold(Option<RemoteRef<Tally>>);

impl Handler<Hold> for Holder {
    type Result = ();

    fn handle(&mut self, Hold(held): Hold, _: &mut Context<Self>) {
        self.held = held;
    }
}

/// Uses the handle that it holds.
#[derive(Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Result<i64, CallError>")]
struct AddToHeld(i64);

impl Handler<AddToHeld> for Holder {
    type Result = actix::ResponseFuture<Result<i64, CallError>>;

    fn handle(&mut self, AddToHeld(amount): AddToHeld, _: &mut Context<Self>) -> Self::Result {
        let held = self.held.clone().expect("it was given one");
        Box::pin(async move { held.call(Add(amount)).await })
    }
}

fn on(rank: u32) -> SpawnOn {
    SpawnOn::new().place(Placement::Rank(rank))
}

fn holder(world: &World, rank: u32) -> ActorRef<Holder> {
    world.cluster.spawn_with(on(rank), ()).wait().unwrap()
}

fn tally(total: i64) -> Tally {
    Tally {
        total,
        citizen: None,
    }
}

///
#[test]
fn a_value_is_used_where_it_lives_by_all_who_have_a_handle() {
    for transport in transports() {
        let world = World::new(config(transport), 2);
        for rank in [0, 1] {
            let value = RemoteRef::new_on(&world.cluster, on(rank), tally(5));
            let value = value.wait().unwrap();
            let owner = value.owner().map_or(0, |node| node.rank);
            assert_eq!(owner, rank);
            // Handles go to other nodes, and to the value's own.
            for holder in [1, 2].map(|rank| holder(&world, rank)) {
                let hold = Hold(Some(value.clone()));
                holder.ask(hold).wait_timeout(SOON).unwrap();
                let total = holder.ask(AddToHeld(1)).wait_timeout(SOON).unwrap();
                total.unwrap();
            }
            assert_eq!(value.call(Add(10)).wait_timeout(SOON).unwrap(), 17);
            assert_eq!(value.fetch().wait_timeout(SOON).unwrap().total, 17);
        }
    }
}

///
#[test]
fn a_value_goes_with_its_last_handle() {
    let here = RemoteRef::new(tally(0)).unwrap();
    let census = Census::default();
    let be_counted = |value: &RemoteRef<Tally>| {
        let counted = BeCounted(Parked::new(census.citizen()));
        value.call(counted).wait_timeout(SOON).unwrap();
        assert_eq!(census.count(), 1);
    };
    be_counted(&here);
    let other = here.clone();
    drop(here);
    assert_eq!(other.call(Add(1)).wait_timeout(SOON).unwrap(), 1);
    drop(other);
    eventually("the value here is gone", || census.count() == 0);

    let world = World::new(impatient(Transport::Tcp), 2);
    let there = RemoteRef::new_on(&world.cluster, on(1), tally(0));
    let there = there.wait().unwrap();
    be_counted(&there);
    let holder = holder(&world, 2);
    holder.ask(Hold(Some(there))).wait_timeout(SOON).unwrap();
    // The driver has no handle any more.
    let total = holder.ask(AddToHeld(4)).wait_timeout(SOON).unwrap();
    assert_eq!(total.unwrap(), 4);
    holder.ask(Hold(None)).wait_timeout(SOON).unwrap();
    eventually("the value there is gone", || census.count() == 0);
}

fn impatient(transport: Transport) -> ps_runtime::cluster::ClusterConfig {
    let mut config = config(transport);
    config.net.heartbeat = Duration::from_millis(100);
    config.net.process_lease = Duration::from_secs(1);
    config.net.handshake = Duration::from_secs(1);
    config
}

///
#[test]
fn a_lost_process_holds_no_values() {
    let network = MemoryNetwork::with_faults(0, Faults::default());
    let world = World::new(impatient(Transport::Memory(network.clone())), 1);
    let census = Census::default();
    let value = RemoteRef::new(tally(0)).unwrap();
    let counted = BeCounted(Parked::new(census.citizen()));
    value.call(counted).wait_timeout(SOON).unwrap();
    let holder = holder(&world, 1);
    holder.ask(Hold(Some(value))).wait_timeout(SOON).unwrap();
    let total = holder.ask(AddToHeld(4)).wait_timeout(SOON).unwrap();
    assert_eq!(total.unwrap(), 4);
    assert_eq!(census.count(), 1);
    network.set_outage(Some(Outage::Silent));
    eventually("the value is gone", || census.count() == 0);
    network.set_outage(None);
}

///
#[test]
fn a_method_that_panics_takes_the_value_with_it() {
    let world = World::new(config(Transport::Tcp), 1);
    for rank in [0, 1] {
        let value = RemoteRef::new_on(&world.cluster, on(rank), tally(5));
        let value = value.wait().unwrap();
        let panic = panic_of(value.call(Add(-1)).wait_timeout(SOON));
        assert!(panic.contains("never falls"), "{panic}");
        let error = value.fetch().wait_timeout(SOON).unwrap_err();
        assert!(matches!(error, CallError::NotDelivered { .. }), "{error:?}");
    }
}

#[test]
fn a_process_that_does_not_host_a_type_of_values_says_so() {
    #[derive(Clone, Debug, Serialize, Deserialize)]
    struct Unhosted;
    impl Value for Unhosted {}
    let world = World::new(config(Transport::Tcp), 1);
    let error = RemoteRef::new_on(&world.cluster, on(1), Unhosted).wait();
    let error = error.unwrap_err();
    assert!(matches!(error, SpawnOnError::Refused { .. }), "{error:?}");
    assert!(format!("{error:?}").contains("Unhosted"), "{error:?}");
}
