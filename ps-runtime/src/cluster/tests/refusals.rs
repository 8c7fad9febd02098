//! how long a driver waits for those that it has refused itself.

use std::io::{Read, Write};
use std::net::TcpStream;

use super::super::agent::AreYouThere;
use super::super::launched::{gather, refusal};
use super::*;
use crate::net::Token;
use crate::remote::process::Joining;
use crate::remote::table::Table;

const TOKEN: &str = "the-token-of-the-refusals";

/// A test that passes does not wait for this timeout.
const FOREVER: Duration = Duration::from_secs(600);

/// Long enough to be refused.
const A_WHILE: Duration = Duration::from_secs(2);

fn driver_config() -> ClusterConfig {
    ClusterConfig {
        token: Some(Token::new(TOKEN).unwrap()),
        transport: Transport::Tcp,
        net: NetConfig::default().with_process_lease(patient(90)),
        join_timeout: Duration::from_millis(1),
        ..ClusterConfig::default()
    }
}

fn facts(examples: u32) -> Hosts {
    Hosts::new().must_agree("the number of examples", examples)
}

/// Serves in the background.
fn start(
    config: &ClusterConfig,
    address: &str,
    rank: u32,
    examples: u32,
) -> Task<Result<NodeExit, ClusterError>> {
    Node::new(config.clone(), rank, 0, address, facts(examples)).serve()
}

/// Joins and expects to be refused.
fn knock(config: &ClusterConfig, address: &str, rank: u32, examples: u32) {
    let refused = start(config, address, rank, examples).wait();
    assert!(
        matches!(refused, Err(ClusterError::Refused { .. })),
        "{refused:?}"
    );
}

/// Knocks as another build of the program would, and returns the status.
fn knock_as_another_build(address: &str, token: &str, place: Joining) -> String {
    let schema = Table::<super::super::agent::DriverAgent>::get().schema() ^ 1;
    let mut stream = TcpStream::connect(address).unwrap();
    let request = format!(
        "GET /ps/v1/actors/0 HTTP/1.1\r\nhost: ps\r\nconnection: upgrade\r\nupgrade: ps/1\r\n\
         ps-schema: {schema:016x}\r\nps-session: 0\r\nps-joining: {place}\r\n\
         authorization: Bearer {token}\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).unwrap();
    let mut status = [0; 12];
    stream.read_exact(&mut status).unwrap();
    String::from_utf8_lossy(&status[9..]).into_owned()
}

#[test]
fn a_driver_does_not_wait_for_those_that_it_has_refused() {
    let config = driver_config();
    let (cluster, address) = listen(&config, &facts(60_000));
    knock(&config, &address, 2, 4_000);
    // Only the first one counts.
    knock(&config, &address, 2, 5_000);
    thread::scope(|scope| {
        scope.spawn(|| knock(&config, &address, 1, 6_000));
        let error = gather(&cluster, 3, FOREVER, None).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("0 of 2 nodes have joined") && text.contains("rank 2 was told"),
            "{text}"
        );
        assert!(
            text.contains("the number of examples is 4000 here") && error.is_permanent(),
            "{text}"
        );
    });
}

/// The wait for the one that was refused must not keep the cluster alive.
#[test]
fn a_run_that_goes_on_without_a_refused_node_releases_the_others_at_its_end() {
    let config = driver_config();
    let (cluster, address) = listen(&config, &facts(60_000));
    knock(&config, &address, 2, 4_000);
    let node = start(&config, &address, 1, 60_000);
    gather(&cluster, 3, FOREVER, None).unwrap();
    drop(cluster);
    let node = thread::spawn(move || node.wait().unwrap());
    eventually("the node is released", || node.is_finished());
    assert_eq!(node.join().unwrap(), NodeExit::Released);
}

#[test]
fn it_goes_on_with_those_that_have_joined_and_the_others_may_still_come() {
    let config = driver_config();
    let (cluster, address) = listen(&config, &facts(60_000));
    knock(&config, &address, 2, 4_000);
    let first = start(&config, &address, 1, 60_000);
    gather(&cluster, 3, FOREVER, None).unwrap();
    assert_eq!(cluster.nodes().len(), 1);
    let second = start(&config, &address, 2, 60_000);
    cluster.wait_for_nodes(2, SOON).wait().unwrap();
    // A node that has joined must not be refused afterwards.
    knock(&config, &address, 2, 4_000);
    assert!(refusal(cluster.members(), 2).is_none());
    drop(cluster);
    for node in [first, second] {
        assert_eq!(node.wait().unwrap(), NodeExit::Released);
    }
}

#[test]
fn another_build_is_refused_for_good_too() {
    let config = driver_config();
    let (cluster, address) = listen(&config, &facts(60_000));
    let place = Joining::new(1, None, None);
    assert_eq!(knock_as_another_build(&address, "wrong", place), "401");
    assert!(refusal(cluster.members(), 1).is_none());
    assert_eq!(knock_as_another_build(&address, TOKEN, place), "409");
    let error = gather(&cluster, 2, FOREVER, None).unwrap_err().to_string();
    assert!(error.contains("start the same build everywhere"), "{error}");
}

#[test]
fn who_states_the_same_run_is_of_this_run_also_without_a_token() {
    let config = ClusterConfig {
        token: None,
        run_id: Some("a run".to_owned()),
        ..driver_config()
    };
    let (cluster, address) = listen(&config, &facts(60_000));
    knock(&config, &address, 1, 4_000);
    let error = gather(&cluster, 2, FOREVER, None).unwrap_err();
    assert!(
        matches!(error, ClusterError::NodesRefused { rank: 1, .. }),
        "{error}"
    );
}

/// A driver on the loopback address, which asks for no secret and was told no run.
fn open() -> ClusterConfig {
    ClusterConfig {
        token: None,
        ..driver_config()
    }
}

#[test]
fn without_a_token_a_process_of_the_same_user_and_host_is_of_this_run() {
    let (cluster, address) = listen(&open(), &facts(60_000));
    knock(&open(), &address, 1, 4_000);
    let error = gather(&cluster, 2, FOREVER, None).unwrap_err();
    assert!(
        matches!(error, ClusterError::NodesRefused { rank: 1, .. }),
        "{error}"
    );
}

#[test]
fn without_a_token_another_user_and_another_build_of_one_are_strangers() {
    let me = rustix::process::geteuid().as_raw();
    let (cluster, address) = listen(&open(), &facts(60_000));
    for (user, is_ours) in [(None, false), (Some(me ^ 1), false), (Some(me), true)] {
        let place = Joining::new(1, None, user);
        assert_eq!(knock_as_another_build(&address, TOKEN, place), "409");
        assert_eq!(refusal(cluster.members(), 1).is_some(), is_ours, "{user:?}");
    }
    // A driver that was told its run expects that its nodes were told, too.
    let config = ClusterConfig {
        run_id: Some("a run".to_owned()),
        ..open()
    };
    let (cluster, address) = listen(&config, &facts(60_000));
    knock(&open(), &address, 1, 4_000);
    assert!(refusal(cluster.members(), 1).is_none());
}

/// It must not have to try again until its own timeout, which here is 1 ms.
#[test]
fn a_driver_that_ends_tells_those_that_it_has_refused_first() {
    let config = driver_config();
    for _ in 0..20 {
        let (cluster, address) = listen(&config, &facts(60_000));
        thread::scope(|scope| {
            scope.spawn(|| knock(&config, &address, 1, 4_000));
            let error = gather(&cluster, 2, FOREVER, None).unwrap_err();
            assert!(
                matches!(error, ClusterError::NodesRefused { .. }),
                "{error}"
            );
            drop(cluster);
        });
    }
}

/// What its driver states says nothing about the next one at the same address.
#[test]
fn after_the_end_of_the_run_that_is_the_reason_whatever_a_process_states() {
    let config = driver_config();
    let (cluster, address) = listen(&config, &facts(60_000));
    cluster.release().wait();
    for examples in [60_000, 4_000] {
        let refused = start(&config, &address, 1, examples).wait();
        assert!(
            matches!(refused, Err(ClusterError::RunOver { .. })),
            "{refused:?}"
        );
    }
}

/// Its driver was killed, and somebody starts another training at the same address.
#[test]
fn without_a_token_a_node_of_an_earlier_driver_is_a_stranger() {
    let (cluster, address) = listen(&open(), &facts(4_000));
    let config = ClusterConfig {
        join_timeout: SOON,
        ..open()
    };
    let node = start(&config, &address, 1, 4_000);
    cluster.wait_for_nodes(1, SOON).wait().unwrap();
    // Without members nobody is told of the end.
    let members = cluster.inside().1.close();
    // A node that answers knows that it has joined.
    members[0].agent.ask(AreYouThere).wait().unwrap();
    drop(members);
    drop(cluster);
    // The port is free when the task of the listener has ended.
    let began = Instant::now();
    let next = loop {
        match Cluster::listen(open(), address.parse().unwrap(), facts(60_000)) {
            Err(ClusterError::Listen { .. }) if began.elapsed() < SOON => thread::yield_now(),
            listening => break listening.unwrap(),
        }
    };
    let refused = node.wait();
    assert!(
        matches!(refused, Err(ClusterError::Refused { .. })),
        "{refused:?}"
    );
    assert!(refusal(next.members(), 1).is_none());
}

/// Otherwise any process that can connect could end the driver's wait.
#[test]
fn strangers_do_not_end_the_wait() {
    let config = driver_config();
    let named = |run_id: &str| ClusterConfig {
        run_id: Some(run_id.to_owned()),
        ..driver_config()
    };
    let with_token = |token: &str| ClusterConfig {
        token: Some(Token::new(token).unwrap()),
        ..driver_config()
    };
    // Other hosts can reach it, and a user of the same number there is somebody else.
    let insecure = ClusterConfig {
        insecure: true,
        ..open()
    };
    for (driver, stranger, what) in [
        (named("ours"), named("theirs"), "another run"),
        (
            config.clone(),
            named("theirs"),
            "a run that we cannot compare",
        ),
        (config, with_token("the-token-of-others"), "another token"),
        (insecure.clone(), insecure, "somebody who shows nothing"),
    ] {
        let (cluster, address) = listen(&driver, &facts(60_000));
        knock(&stranger, &address, 1, 4_000);
        let began = Instant::now();
        let error = gather(&cluster, 2, A_WHILE, None).unwrap_err();
        assert!(
            matches!(error, ClusterError::NotAllJoined { joined: 0, .. }),
            "{what}: {error}"
        );
        assert!(began.elapsed() >= A_WHILE, "{what}");
    }
}

#[test]
fn a_place_reads_as_it_is_written() {
    for place in [
        Joining::new(7, None, None),
        Joining::new(7, None, Some(1000)),
        Joining::new(u32::MAX, Some("a run, in any writing: \u{e9}\n"), None),
        Joining::new(1, Some("a run"), Some(u32::MAX)),
    ] {
        assert_eq!(place.to_string().parse(), Ok(place));
    }
    for wrong in [
        "",
        "x",
        "1.",
        "1.xyz",
        "-1",
        "1.2.3",
        "4294967296",
        "1@",
        "1@x",
        "1@2@3",
        "1@2.3",
    ] {
        assert!(wrong.parse::<Joining>().is_err(), "{wrong}");
    }
}
