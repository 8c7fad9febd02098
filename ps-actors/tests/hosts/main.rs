//! Training over three hosts whose network fails: cut, one way only, lossy, slow.
//!
//! The hosts are network namespaces of this machine ([`network`]). On each runs this very test
//! program once more, as driver or node ([`program`]); `play_a_role` is what they all run. They say
//! what happens, a line each, and the tests wait for that ([`world`]). Where a test may not make
//! namespaces it says so and does nothing.

#![cfg(target_os = "linux")]

mod network;
mod program;
mod world;

use std::path::PathBuf;
use std::process::exit;
use std::thread;
use std::time::{Duration, Instant};

use ps_actors::launch;
use ps_actors::server::Consistency;

use program::{PLAN, Plan};
use world::{TOKEN, World, certificates, skip};

const LEASE: Duration = Duration::from_millis(1500);

/// Not a test: what this program does when a test starts it on a host.
#[test]
fn play_a_role() {
    if let Ok(plan) = std::env::var(PLAN) {
        exit(program::play(&serde_json::from_str(&plan).unwrap()).into());
    }
}

/// Trains until told to stop, with two servers in the driver.
fn endless(consistency: Consistency) -> Plan {
    Plan {
        consistency,
        len: 32,
        num_steps: u64::MAX,
        servers: vec![0, 0],
        lease: LEASE,
        node_lease: LEASE,
        certificates: None,
    }
}

/// Both nodes have joined and both workers train.
fn wait_for_training(world: &mut World) {
    world.wait_for(0, "@nodes 1.1 2.1");
    world.wait_for_steps(0, 20);
    world.wait_for_steps(1, 20);
    world.forget();
}

/// Waits until the driver knows that node 1 is lost. Its worker is, within the lease; the node
/// itself when it could not be reached for another one.
fn wait_for_loss(world: &mut World, since: Instant) {
    world.wait_for(0, "@worker 0 is lost");
    // What a busy machine adds is allowed for; for ever is not.
    assert!(since.elapsed() < 5 * LEASE, "{:?}", since.elapsed());
    world.wait_for(0, "@nodes 2.1");
    assert!(since.elapsed() < 8 * LEASE, "{:?}", since.elapsed());
}

/// Waits until node 1 has ended its worker, is there in this incarnation, and trains again.
fn wait_for_return(world: &mut World, incarnation: u64) {
    world.wait_for(1, "@worker 0 has ended");
    world.wait_for(0, &format!("@nodes 1.{incarnation} 2.1"));
    world.wait_for(0, "@worker 0 begins");
    world.wait_for_steps(0, 20);
    world.wait_for_steps(1, 20);
}

/// Plain, then with TLS.
fn with_and_without_tls(check: impl Fn(Option<PathBuf>) + Sync) {
    thread::scope(|scope| {
        scope.spawn(|| check(None));
        scope.spawn(|| {
            let directory = certificates();
            check(Some(directory.path().to_owned()));
        });
    });
}

#[test]
fn training_on_three_hosts_applies_every_gradient_once() {
    with_and_without_tls(|certificates| {
        let plan = Plan {
            num_steps: 200,
            // So nodes speak to the driver and to each other.
            servers: vec![0, 1, 2],
            certificates,
            ..endless(Consistency::Bsp)
        };
        if let Some(mut world) = World::start(plan) {
            world.finish();
        }
    });
}

#[test]
fn a_host_that_is_cut_off_is_lost_and_comes_back_in_another_incarnation() {
    with_and_without_tls(|certificates| {
        let plan = Plan {
            certificates,
            ..endless(Consistency::Bsp)
        };
        let Some(mut world) = World::start(plan) else {
            return;
        };
        wait_for_training(&mut world);
        world.network.cut(1);
        wait_for_loss(&mut world, Instant::now());
        world.wait_for_steps(1, 20);
        world.network.mend(1);
        wait_for_return(&mut world, 2);
        world.tell_driver("stop");
        world.finish();
    });
}

#[test]
fn a_host_that_has_not_noticed_is_told_that_it_was_declared_lost() {
    let plan = Plan {
        node_lease: Duration::from_secs(60),
        ..endless(Consistency::Asp)
    };
    let Some(mut world) = World::start(plan) else {
        return;
    };
    wait_for_training(&mut world);
    world.network.cut(1);
    wait_for_loss(&mut world, Instant::now());
    assert!(!world.has_said(1, "@worker 0 has ended"));
    world.network.mend(1);
    world.wait_for(1, "was declared lost; it must join again");
    wait_for_return(&mut world, 2);
    world.tell_driver("stop");
    world.finish();
}

#[test]
fn a_host_that_is_heard_but_does_not_hear_is_lost_and_the_other_way_round() {
    let Some(mut world) = World::start(endless(Consistency::Asp)) else {
        return;
    };
    wait_for_training(&mut world);
    // What comes from it, then what goes to it.
    for (incarnation, direction) in [(2, "iifname h1"), (3, "oifname h1")] {
        if let Err(why) = world.network.drop_frames(direction) {
            return skip(&why);
        }
        wait_for_loss(&mut world, Instant::now());
        world.wait_for_steps(1, 20);
        world.network.drop_no_frames();
        wait_for_return(&mut world, incarnation);
        world.forget();
    }
    world.tell_driver("stop");
    world.finish();
}

#[test]
fn a_driver_that_is_cut_off_goes_on_with_the_next_incarnations_of_its_nodes() {
    let Some(mut world) = World::start(endless(Consistency::Bsp)) else {
        return;
    };
    wait_for_training(&mut world);
    world.network.cut(0);
    for worker in 0..2 {
        world.wait_for(0, &format!("@worker {worker} is lost"));
        world.wait_for(worker + 1, &format!("@worker {worker} has ended"));
    }
    world.network.mend(0);
    world.wait_for(0, "@nodes 1.2 2.2");
    world.wait_for_steps(0, 20);
    world.wait_for_steps(1, 20);
    world.tell_driver("stop");
    world.finish();
}

#[test]
fn training_over_a_lossy_network_applies_every_gradient_once() {
    let plan = Plan {
        num_steps: 50,
        // More than one packet each way.
        len: 10_000,
        // A connection whose first packet is lost takes a second longer: Linux waits that long.
        lease: 3 * LEASE,
        node_lease: 3 * LEASE,
        ..endless(Consistency::Asp)
    };
    let Some(mut world) = World::empty(plan) else {
        return;
    };
    if let Err(why) = world.network.drop_frames("numgen random mod 100 < 5") {
        return skip(&why);
    }
    (0..3).for_each(|rank| world.launch(rank, Some(TOKEN)));
    world.finish();
    let num_dropped = world.network.num_dropped();
    assert!(num_dropped >= 5, "{num_dropped}");
}

/// On a link on which a message takes longer than the lease.
#[test]
fn a_host_with_a_slow_link_is_not_taken_for_lost() {
    const MBIT: u32 = 40;
    with_and_without_tls(|certificates| {
        let plan = Plan {
            num_steps: 2,
            len: 3_000_000,
            certificates,
            ..endless(Consistency::Bsp)
        };
        let message = Duration::from_secs_f64(plan.len as f64 * 32.0 / (f64::from(MBIT) * 1e6));
        assert!(message > LEASE);
        let Some(mut world) = World::empty(plan) else {
            return;
        };
        if let Err(why) = world.network.slow_down(1, MBIT) {
            return skip(&why);
        }
        (0..3).for_each(|rank| world.launch(rank, Some(TOKEN)));
        world.wait_for(0, "@worker 0 begins");
        let begin = Instant::now();
        world.finish();
        // It pulls; it pushes, then pulls, twice. Some of it was under way at the beginning.
        assert!(begin.elapsed() > 3 * message, "{:?}", begin.elapsed());
        assert!(!world.has_said(0, "is lost"));
        assert!(!world.has_said(0, "@nodes 2.1"));
        assert!(!world.has_said(0, "@nodes 1.2"));
    });
}

#[test]
fn a_driver_without_a_token_does_not_listen_to_other_hosts() {
    let Some(mut world) = World::empty(endless(Consistency::Asp)) else {
        return;
    };
    world.launch(0, None);
    world.wait_for(0, "needs a token");
    assert_eq!(world.exit_code(0), Some(launch::EXIT_CONFIG.into()));
}

#[test]
fn a_node_with_a_wrong_token_does_not_try_again_and_the_driver_takes_others() {
    let plan = Plan {
        num_steps: 20,
        ..endless(Consistency::Bsp)
    };
    let Some(mut world) = World::empty(plan) else {
        return;
    };
    world.launch(0, Some(TOKEN));
    world.launch(1, Some(TOKEN));
    world.launch(2, Some("token-of-other-hosts"));
    world.wait_for(2, "@could not start");
    assert_eq!(world.exit_code(2), Some(launch::EXIT_CONFIG.into()));
    world.launch(2, Some(TOKEN));
    world.finish();
}
