//! Nodes that are asked to leave: their workers finish the step under way.

use std::sync::mpsc;
use std::time::Duration;

use ps_actors::actor::UnknownOutcome;
use ps_actors::cluster::{
    Cluster, ClusterConfig, ClusterError, Hosts, Node, NodeExit, Placement, SpawnOn, SpawnOnError,
    Task, Transport,
};
use ps_actors::group::ServerGroup;
use ps_actors::ids::{Clock, WorkerId};
use ps_actors::net::memory::MemoryNetwork;
use ps_actors::rule::Sgd;
use ps_actors::server::{Consistency, CoordinatorStatus, ServerConfig};
use ps_actors::weights::{Gradient, Layout, Weights};
use ps_actors::worker::{
    DataWorker, GradientSource, HostedSource, LocalGradient, RunReport, RunSteps, SourceError,
    WorkerError,
};
use ps_actors::{ActorRef, CallError, Reply};
use ps_runtime::test_util::{LOCAL, Parked, SOON, config, driver_address, eventually, transports};
use tokio::sync::oneshot;

const WORKER: WorkerId = WorkerId(7);

/// Says which step it is at, and goes on when it is told to, or when nobody is left who could.
struct Gated {
    at: mpsc::Sender<Clock>,
    go: mpsc::Receiver<()>,
}

impl Gated {
    fn new() -> (Parked<Self>, mpsc::Receiver<Clock>, mpsc::Sender<()>) {
        let (at, clocks) = mpsc::channel();
        let (sender, go) = mpsc::channel();
        (Parked::new(Self { at, go }), clocks, sender)
    }
}

impl GradientSource for Gated {
    fn gradient(&mut self, clock: Clock, _: &Weights) -> Result<LocalGradient, SourceError> {
        let _ = self.at.send(clock);
        let _ = self.go.recv();
        Ok(LocalGradient {
            gradient: Gradient::new(vec![1.0]),
            loss: 0.5,
            num_examples: 1,
        })
    }
}

impl HostedSource for Gated {
    type Args = Parked<Self>;
}

type Worker = ActorRef<DataWorker<Gated>>;

/// A driver with the servers, and a node with a worker that is in the middle of its first step.
struct Scene {
    cluster: Cluster,
    servers: ServerGroup,
    clocks: mpsc::Receiver<Clock>,
    go: mpsc::Sender<()>,
    run: Reply<Result<RunReport, WorkerError>>,
    leave: oneshot::Sender<()>,
    node: Task<Result<NodeExit, ClusterError>>,
}

fn hosts() -> Hosts {
    Hosts::new().host(|gated: Parked<Gated>| Ok(DataWorker::new(WORKER, gated.take())))
}

fn on_the_node(cluster: &Cluster, gated: Parked<Gated>) -> Result<Worker, SpawnOnError> {
    let options = SpawnOn::new().place(Placement::Rank(1));
    cluster.spawn_with(options, gated).wait()
}

impl Scene {
    fn new(config: ClusterConfig) -> Self {
        let cluster = Cluster::listen(config.clone(), LOCAL, hosts()).unwrap();
        let (leave, told_to_leave) = oneshot::channel();
        let node = Node::new(config, 1, 0, driver_address(&cluster), hosts());
        let node = node.serve_until(async move {
            let _ = told_to_leave.await;
        });
        cluster.wait_for_nodes(1, SOON).wait().unwrap();
        let server = ServerConfig {
            consistency: Consistency::Asp,
            ..ServerConfig::default()
        };
        let initial = Weights::initial(Layout::flat(1), vec![0.0]);
        let servers = ServerGroup::spawn(&initial, 1, server, |_| Box::new(Sgd::new())).unwrap();
        let (gated, clocks, go) = Gated::new();
        let run = on_the_node(&cluster, gated).unwrap().ask(RunSteps {
            servers: servers.clone(),
            num_steps: u64::MAX,
        });
        assert_eq!(clocks.recv_timeout(SOON), Ok(Clock(0)));
        Self {
            cluster,
            servers,
            clocks,
            go,
            run,
            leave,
            node,
        }
    }
}

fn status_of(servers: &ServerGroup) -> CoordinatorStatus {
    let servers = servers.clone();
    let status = ps_actors::actor::run(async move { servers.status().await.unwrap() });
    let mut coordinators = status.into_iter().filter_map(|status| status.coordinator);
    coordinators.next().expect("the first server coordinates")
}

///
#[test]
fn a_node_that_is_to_leave_finishes_the_step_under_way_and_begins_no_other() {
    for transport in transports() {
        let scene = Scene::new(ClusterConfig {
            leave_grace: SOON,
            ..config(transport)
        });
        scene.leave.send(()).unwrap();
        eventually("nothing more is started there", || {
            on_the_node(&scene.cluster, Gated::new().0).is_err()
        });
        assert_eq!(scene.cluster.nodes().len(), 1, "it is still there");
        // It is in its first step until now, and may begin another one before it is told.
        scene.go.send(()).unwrap();
        let mut num_steps = 1;
        for clock in &scene.clocks {
            assert_eq!(clock, Clock(num_steps), "no step is taken twice");
            num_steps += 1;
            scene.go.send(()).unwrap();
        }
        let report = scene.run.wait_timeout(SOON).unwrap().unwrap();
        assert!(report.was_stopped);
        assert_eq!(report.num_applied, num_steps);
        assert_eq!(scene.node.wait().unwrap(), NodeExit::Left);
        eventually("the driver knows", || scene.cluster.nodes().is_empty());
    }
}

/// R-18, PS-2: what was finished counts, and the worker goes on behind it.
#[test]
fn a_worker_goes_on_where_its_earlier_incarnation_was_stopped() {
    let transport = Transport::Memory(MemoryNetwork::new());
    let scene = Scene::new(config(transport));
    scene.leave.send(()).unwrap();
    drop(scene.go);
    let run = scene.run.wait_timeout(SOON).expect("the worker is there");
    let report = run.expect("the step under way is finished");
    assert_eq!(scene.node.wait().unwrap(), NodeExit::Left);
    let (gated, clocks, go) = Gated::new();
    drop(go);
    let here = scene.cluster.spawn::<DataWorker<Gated>>(gated).wait();
    let rest = here.unwrap().ask(RunSteps {
        servers: scene.servers.clone(),
        num_steps: 5,
    });
    let rest = rest.wait_timeout(SOON).unwrap().unwrap();
    assert!(!rest.was_stopped);
    assert_eq!(clocks.recv(), Ok(Clock(report.num_applied)));
    let status = status_of(&scene.servers);
    assert_eq!(status.version.0, report.num_applied + 5);
    assert_eq!(status.workers[&WORKER].num_duplicates, 0);
}

///
#[test]
fn a_node_waits_no_longer_than_its_grace_for_a_step() {
    let transport = Transport::Memory(MemoryNetwork::new());
    for leave_grace in [Duration::ZERO, Duration::from_millis(50)] {
        let scene = Scene::new(ClusterConfig {
            leave_grace,
            ..config(transport.clone())
        });
        scene.leave.send(()).unwrap();
        // Its thread is still at the gate.
        assert_eq!(scene.node.wait().unwrap(), NodeExit::Left);
        let error = scene.run.wait_timeout(SOON).unwrap_err();
        let lost = matches!(
            error,
            CallError::Unknown {
                reason: UnknownOutcome::ConnectionLost { .. } | UnknownOutcome::Stopped,
                ..
            }
        );
        assert!(lost, "{error:?}");
        drop(scene.go);
    }
}
