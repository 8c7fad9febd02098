//! how long a driver waits for those that it has refused itself.

use std::io::{Read, Write};
use std::net::TcpStream;

use super::super::launched::gather;
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
    assert!(cluster.refusal(2).is_none());
    drop(cluster);
    for node in [first, second] {
        assert_eq!(node.wait().unwrap(), NodeExit::Released);
    }
}

#[test]
fn another_build_is_refused_for_good_too() {
    let config = driver_config();
    let (cluster, address) = listen(&config, &facts(60_000));
    let place = Joining::new(1, None);
    assert_eq!(knock_as_another_build(&address, "wrong", place), "401");
    assert!(cluster.refusal(1).is_none());
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
    let open = ClusterConfig {
        token: None,
        ..driver_config()
    };
    for (driver, stranger, what) in [
        (named("ours"), named("theirs"), "another run"),
        (
            config.clone(),
            named("theirs"),
            "a run that we cannot compare",
        ),
        (config, with_token("the-token-of-others"), "another token"),
        (open.clone(), open, "somebody who shows nothing"),
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
        Joining::new(7, None),
        Joining::new(u32::MAX, Some("a run, in any writing: \u{e9}\n")),
    ] {
        assert_eq!(place.to_string().parse(), Ok(place));
    }
    for wrong in ["", "x", "1.", "1.xyz", "-1", "1.2.3", "4294967296"] {
        assert!(wrong.parse::<Joining>().is_err(), "{wrong}");
    }
}
