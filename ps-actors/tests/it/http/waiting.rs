//! Clients that wait, go away while they wait, or never come back.

use std::time::Duration;

use ps_actors::ids::WorkerId;
use ps_actors::server::{Consistency, GetStatus, ServerConfig};

use super::asp;
use super::client::{LEN, Settings, World, bytes, caller, stamp};
use ps_runtime::test_util::eventually;

fn good() -> Vec<u8> {
    bytes(&[1.0; LEN])
}

#[test]
fn a_pull_waits_for_the_version_that_it_asks_for() {
    let world = World::new(Settings {
        server: asp(),
        num_servers: 2,
        ..Settings::default()
    });
    let mut worker = world.client();
    worker.join(0, 0).expect(200);
    let waiting = ["at-least:3", "exactly:3", "at-least:2", "at-least:1"].map(|wanted| {
        let mut client = world.client();
        client.send("GET", &format!("/v1/weights?version={wanted}"), "", &[]);
        (client, wanted)
    });
    for clock in 0..3 {
        worker
            .post("/v1/push", &stamp(0, 1, clock, clock), &good())
            .expect(200);
    }
    for (mut client, wanted) in waiting {
        let got: u64 = client
            .receive()
            .expect(200)
            .header("ps-version")
            .parse()
            .unwrap();
        let (_, least) = wanted.split_once(':').unwrap();
        assert!(
            (least.parse().unwrap()..=3).contains(&got),
            "{got} for {wanted}"
        );
    }
}

/// More than the server's queue has slots (A-7).
#[test]
fn clients_that_hang_up_while_they_wait_leave_nothing_behind() {
    const MANY: usize = 1100;
    let world = World::new(Settings {
        server: asp(),
        ..Settings::default()
    });
    for _ in 0..MANY {
        let mut client = world.client();
        client.get("/v1/layout").expect(200);
        client.send("GET", "/v1/weights?version=at-least:1000000", "", &[]);
    }
    let mut worker = world.client();
    worker.join(0, 0).expect(200);
    let pushed = worker.post("/v1/push-pull", &stamp(0, 1, 0, 0), &good());
    assert_eq!(pushed.expect(200).header("ps-version"), "1");
}

/// S-4: nobody has to say that a worker died, if the server has a lease.
#[test]
fn a_worker_that_dies_holds_up_its_round_no_longer_than_the_lease() {
    let world = World::new(Settings {
        server: ServerConfig {
            worker_lease: Some(Duration::from_secs(2)),
            ..ServerConfig::default()
        },
        ..Settings::default()
    });
    let (mut dies, mut lives) = (world.client(), world.client());
    dies.join(0, 0).expect(200);
    lives.join(1, 0).expect(200);
    drop(dies);
    let pushed = lives
        .post("/v1/push", &stamp(1, 1, 0, 0), &good())
        .expect(200);
    assert_eq!(pushed.header("ps-version"), "1");
    // A lost worker is told to join again, in another incarnation.
    let mut again = world.client();
    let fenced = again
        .post("/v1/push", &stamp(0, 1, 0, 0), &good())
        .expect(409);
    assert_eq!(fenced.header("ps-join-again"), "1");
    let late = again.join(0, 0).expect(409);
    assert_eq!(late.header("ps-join-again"), "1");
    let joined = again.join(0, 1).expect(200);
    assert_eq!(joined.header("ps-incarnation"), "2");
    assert_eq!(joined.header("ps-version"), "1");
}

#[test]
fn a_worker_that_leaves_lets_the_others_go_on() {
    let world = World::new(Settings::default());
    let (mut leaves, mut stays) = (world.client(), world.client());
    leaves.join(0, 0).expect(200);
    stays.join(1, 0).expect(200);
    stays.send("POST", "/v1/push-pull", &stamp(1, 1, 0, 0), &good());
    leaves.post("/v1/leave", &caller(0, 1), &[]).expect(200);
    assert_eq!(stays.receive().expect(200).header("ps-version"), "1");
}

/// A client may be at most `bound` steps ahead (PS-4).
#[test]
fn a_fast_worker_waits_for_a_slow_one() {
    let world = World::new(Settings {
        server: ServerConfig {
            consistency: Consistency::Ssp { bound: 1 },
            ..ServerConfig::default()
        },
        ..Settings::default()
    });
    let (mut fast, mut slow) = (world.client(), world.client());
    fast.join(0, 0).expect(200);
    slow.join(1, 0).expect(200);
    fast.post("/v1/push-pull", &stamp(0, 1, 0, 0), &good())
        .expect(200);
    fast.send("POST", "/v1/push-pull", &stamp(0, 1, 1, 1), &good());
    slow.post("/v1/push-pull", &stamp(1, 1, 0, 0), &good())
        .expect(200);
    // Applied third at the latest, answered after the slow one's.
    let version: u64 = fast
        .receive()
        .expect(200)
        .header("ps-version")
        .parse()
        .unwrap();
    assert_eq!(version, 3);
}

#[test]
fn requests_end_with_the_training_that_they_are_for() {
    let world = World::new(Settings::default());
    let (mut waits, mut other) = (world.client(), world.client());
    waits.join(0, 0).expect(200);
    other.join(1, 0).expect(200);
    waits.send("POST", "/v1/push", &stamp(0, 1, 0, 0), &good());
    let mut pulls = world.client();
    pulls.send("GET", "/v1/weights?version=at-least:1", "", &[]);
    world.api.close();
    waits.receive().expect(503);
    pulls.receive().expect(503);
    other.get("/v1/status").expect(503);
    world.api.open(world.group.clone());
    other.get("/v1/status").expect(200);
    for server in world.group.servers() {
        server.kill();
    }
    let text = other.get("/v1/weights").expect(503).text();
    assert!(text.contains("server 0"), "{text}");
}

/// PS-7, PS-9: one client that repeats itself shuts nobody out.
#[test]
fn repeats_of_a_push_that_is_held_are_told_so_and_everybody_else_is_served() {
    let world = World::new(Settings {
        server: ServerConfig {
            consistency: Consistency::Ssp { bound: 0 },
            ..ServerConfig::default()
        },
        ..Settings::default()
    });
    let (mut fast, mut slow) = (world.client(), world.client());
    fast.join(0, 0).expect(200);
    slow.join(1, 0).expect(200);
    let send = || {
        let mut client = world.client();
        client.send("POST", "/v1/push-pull", &stamp(0, 1, 0, 0), &good());
        client
    };
    let held: Vec<_> = (0..16).map(|_| send()).collect();
    // They arrive in any order: wait until all of them wait.
    let first = world.group.servers().next().unwrap();
    eventually("all wait", || {
        first.ask(GetStatus).wait().unwrap().num_waiting == 16
    });
    let refused = send().receive().expect(429);
    assert_eq!(refused.header("retry-after"), "1");
    fast.post("/v1/heartbeat", &caller(0, 1), &[]).expect(200);
    let status = world.status();
    assert!(status.contains(r#""awaited":[1]"#), "{status}");
    slow.post("/v1/push", &stamp(1, 1, 0, 0), &good())
        .expect(200);
    for mut client in held {
        client.receive().expect(200);
    }
}

/// S-4: who hung up does not wait, so its lease goes on.
#[test]
fn a_worker_that_dies_while_it_waits_is_lost_after_its_lease() {
    let world = World::new(Settings {
        server: ServerConfig {
            worker_lease: Some(Duration::from_secs(2)),
            wait_for_workers: 2,
            ..ServerConfig::default()
        },
        ..Settings::default()
    });
    let mut dies = world.client();
    dies.join(0, 0).expect(200);
    dies.send("POST", "/v1/push", &stamp(0, 1, 0, 0), &good());
    let first = world.group.servers().next().unwrap();
    let status = || first.ask(GetStatus).wait().unwrap();
    eventually("it waits", || status().num_waiting == 1);
    assert!(world.status().contains(r#""num_to_join":1"#));
    drop(dies);
    eventually("it is lost", || {
        !status().coordinator.unwrap().workers[&WorkerId(0)].is_member
    });
}
