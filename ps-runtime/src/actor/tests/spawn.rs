//! What happens where threads or file descriptors are lacking.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use std::time::Duration;

use actix::{Actor, Context};

use super::super::background;
use super::super::thread::{Body, hand_over};
use crate::actor::{ActorRef, Spawn, SpawnError};
use crate::cluster::{
    Cluster, ClusterConfig, ClusterError, Hosts, Node, SpawnOn, SpawnOnError, StartError,
};
use crate::cluster::{Owned, RemoteRef, Value};
use crate::launch::LaunchOptions;

#[derive(Clone, serde::Serialize, serde::Deserialize)]
struct Nothing;

impl Value for Nothing {}

struct Idle;

impl Actor for Idle {
    type Context = Context<Self>;
}

fn idle(options: Spawn) -> Result<ActorRef<Idle>, SpawnError> {
    options.start(|| Idle)
}

/// Allows `more` open files in addition to those that are open now.
fn allow_files(more: u64) {
    let open = std::fs::read_dir("/proc/self/fd").expect("Linux has it");
    let limit = Rlimit {
        // One of them was opened to list the directory.
        current: Some(open.count() as u64 - 1 + more),
        maximum: getrlimit(Resource::Nofile).maximum,
    };
    setrlimit(Resource::Nofile, limit).expect("the greatest limit stays");
}

/// tokio panics if a runtime is dropped in asynchronous code.
#[test]
fn asynchronous_code_gets_an_error_if_there_is_no_thread() {
    let event_loop = || background::event_loop(false).expect("it needs no descriptor");
    let no_thread = |body: Body| {
        drop(body);
        Err(std::io::ErrorKind::WouldBlock.into())
    };
    event_loop().block_on(async {
        let refused = hand_over(event_loop(), no_thread, |_| unreachable!("no thread"));
        let refused = refused.expect_err("there is no thread");
        assert_eq!(refused.kind(), std::io::ErrorKind::WouldBlock);
    });
}

/// In a process of its own, with few descriptors.
#[test]
fn without_descriptors_there_are_errors_and_actors_that_need_none() {
    const CHILD: &str = "PS_TEST_FEW_FILES";
    const NAME: &str =
        "actor::tests::spawn::without_descriptors_there_are_errors_and_actors_that_need_none";
    if std::env::var_os(CHILD).is_none() {
        let program = std::env::current_exe().expect("this test has a program");
        let mut child = std::process::Command::new(program);
        let child = child.args(["--exact", NAME, "--nocapture"]).env(CHILD, "1");
        let output = child.output().expect("the program runs");
        assert!(output.status.success(), "{output:?}");
        return;
    }
    // The background loop runs from the first actor on.
    let first = idle(Spawn::new()).expect("there is room");
    allow_files(2);
    let local = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
    let cluster = Cluster::listen(ClusterConfig::default(), local, Hosts::new());
    assert!(
        matches!(cluster, Err(ClusterError::Threads(_))),
        "{cluster:?}"
    );
    let node = Node::new(ClusterConfig::default(), 1, 0, "127.0.0.1:1", Hosts::new());
    let node = node.serve().wait();
    assert!(matches!(node, Err(ClusterError::Threads(_))), "{node:?}");
    let alone = Cluster::alone(Hosts::new());
    let value = RemoteRef::new_on(&alone, SpawnOn::new(), Nothing).wait();
    assert!(matches!(value, Err(SpawnOnError::Threads(_))), "{value:?}");
    let nodes = alone.wait_for_nodes(0, Duration::ZERO).wait();
    assert!(matches!(nodes, Err(ClusterError::Threads(_))), "{nodes:?}");
    assert!(
        crate::cluster::lookup::<Owned<Nothing>>("nobody")
            .wait()
            .is_none()
    );
    assert!(alone.lookup::<Owned<Nothing>>("nobody").wait().is_none());
    alone.release().wait();
    let launched = Cluster::launch(
        &LaunchOptions::default(),
        ClusterConfig::default(),
        Hosts::new(),
    );
    assert!(
        matches!(launched, Err(StartError::Cluster(ClusterError::Threads(_)))),
        "{launched:?}"
    );
    allow_files(20);
    let mut actors = Vec::new();
    let error = loop {
        match idle(Spawn::new()) {
            Ok(actor) => actors.push(actor),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, SpawnError::Thread { .. }), "{error}");
    assert!(error.to_string().contains("ulimit -n"), "{error}");
    assert!(actors.len() <= 10, "{} actors", actors.len());
    let mut values = Vec::new();
    for _ in 0..100 {
        actors.push(idle(Spawn::new().without_io()).expect("it needs no descriptor"));
        values.push(RemoteRef::new(Nothing).expect("it needs no descriptor"));
    }
    for value in &values {
        value.fetch().wait().expect("the value is there");
    }
    let error = idle(Spawn::new().with_io().without_io());
    assert!(error.is_err(), "it was asked for sockets");
    assert!(actors.iter().all(ActorRef::is_alive) && first.is_alive());
}
