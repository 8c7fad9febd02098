//! Nodes that join and leave while a training runs. Each example is in exactly as many gradients as the
//! training has epochs.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use ps::actors::cluster::{ClusterError, Node, NodeExit, Task, Transport};
use ps::actors::net::memory::MemoryNetwork;
use ps::model::burn;
use ps::model::burn::module::{Module, Param};
use ps::model::burn::tensor::{Device, Int, Tensor};
use ps::observe::Event as Observed;
use ps::prelude::*;
use tokio::sync::Notify;

use crate::nodes::{SOON, config};

const NUM_EXAMPLES: usize = 240;
const NUM_EPOCHS: u64 = 20;

/// How long a step waits at most for the first move of a worker.
const A_WHILE: Duration = Duration::from_millis(50);

/// Counts how often it sees each example: the gradient of a batch is 1 for each of its examples.
#[derive(Module, Debug)]
struct Counter {
    counts: Param<Tensor<1>>,
}

/// Called with the number of the step, counted over all workers.
#[derive(Clone)]
struct OnStep(Arc<dyn Fn(u64) + Send + Sync>);

impl fmt::Debug for OnStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OnStep")
    }
}

#[derive(Clone)]
struct Ids {
    num_steps: Arc<AtomicU64>,
    on_step: OnStep,
}

struct Batch {
    ids: Vec<i32>,
    from: Ids,
}

impl Examples for Ids {
    type Batch = Batch;

    fn num_examples(&self) -> usize {
        NUM_EXAMPLES
    }

    fn batch(&self, indices: &[usize]) -> Batch {
        Batch {
            ids: indices.iter().map(|&id| id as i32).collect(),
            from: self.clone(),
        }
    }
}

impl Model for Counter {
    type Batch = Batch;

    fn loss(&self, batch: &Batch, step: &mut Step) -> Tensor<1> {
        let ids = Tensor::<1, Int>::from_ints(batch.ids.as_slice(), step.device());
        self.counts.val().select(0, ids).sum()
    }

    // Runs once for each gradient, outside of what catches a model's panics.
    fn num_examples(batch: &Batch) -> usize {
        let number = batch.from.num_steps.fetch_add(1, Ordering::Relaxed) + 1;
        (batch.from.on_step.0)(number);
        batch.ids.len()
    }
}

fn device() -> Device {
    select_device(default_device_name()).unwrap()
}

fn trainer(consistency: Consistency, on_step: OnStep) -> Trainer<Counter, Ids> {
    let counts = Param::from_tensor(Tensor::zeros([NUM_EXAMPLES], &device()));
    let num_steps = Arc::default();
    Trainer::new(Counter { counts }, Ids { num_steps, on_step })
        .device(&device())
        .workers(4)
        .servers(2)
        .batch_size(4)
        .consistency(consistency)
        .reduction(Reduction::Sum)
        .learning_rate(1.0)
        .epochs(NUM_EPOCHS)
}

#[derive(Clone, Copy)]
enum Event {
    Join(u32),
    Leave(u32),
    End,
}

type Served = Task<Result<NodeExit, ClusterError>>;

/// Lets nodes join and leave at a step's request. An event is answered when it has begun.
struct Stage {
    cluster: Cluster,
    hosts: Hosts,
    config: ClusterConfig,
    nodes: Vec<(u32, Arc<Notify>, Served)>,
}

impl Stage {
    fn play(mut self, events: &Receiver<(Event, SyncSender<()>)>) {
        while let Ok((event, done)) = events.recv() {
            match event {
                Event::End => {
                    done.send(()).unwrap();
                    break;
                }
                Event::Join(rank) => self.join(rank),
                Event::Leave(rank) => {
                    let node = self.nodes.iter().find(|(other, ..)| *other == rank);
                    node.unwrap().1.notify_one();
                }
            }
            done.send(()).unwrap();
        }
        drop(self.cluster);
        for (_, _, node) in self.nodes {
            node.wait().unwrap();
        }
    }

    fn join(&mut self, rank: u32) {
        let leave = Arc::new(Notify::new());
        let told = Arc::clone(&leave);
        let driver = self.cluster.addresses()[0].to_string();
        let node = Node::new(self.config.clone(), rank, 0, driver, self.hosts.clone());
        let node = node.serve_until(async move { told.notified().await });
        let is_there = |cluster: &Cluster| cluster.nodes().iter().any(|n| n.node.rank == rank);
        while !is_there(&self.cluster) {
            let known: Vec<_> = self.cluster.nodes().iter().map(|n| n.node).collect();
            let cluster = self.cluster.clone();
            run(async move { cluster.nodes_other_than(&known).await });
        }
        self.nodes.push((rank, leave, node));
    }
}

/// Trains while nodes come and go, and a worker panics.
fn count(consistency: Consistency) -> Report {
    let (sender, events) = sync_channel::<(Event, SyncSender<()>)>(0);
    let sender = Mutex::new(sender);
    let tell = move |event| {
        let sender = sender.lock().unwrap().clone();
        let (done, answer) = sync_channel(1);
        sender.send((event, done)).unwrap();
        answer.recv_timeout(SOON).unwrap();
    };
    let told = Arc::new(tell);
    let moved = Arc::new((Mutex::new(false), Condvar::new()));
    let on_step = {
        let (tell, moved) = (Arc::clone(&told), Arc::clone(&moved));
        OnStep(Arc::new(move |step| match step {
            10 => tell(Event::Join(2)),
            60 => panic!("as planned"),
            90 => tell(Event::Leave(1)),
            130 => tell(Event::Join(3)),
            // The run must not end before a worker has moved. But no step waits for that for long: a worker that
            // moves may wait for this step.
            200.. => {
                let (has_moved, changed) = &*moved;
                let has_moved = has_moved.lock().unwrap();
                let _ = changed.wait_timeout_while(has_moved, A_WHILE, |has_moved| !*has_moved);
            }
            _ => {}
        }))
    };
    let config = config(Transport::Memory(MemoryNetwork::new()));
    let trainer = trainer(consistency, on_step).observe(move |event: &Observed| {
        if matches!(event, Observed::WorkerMoved(_)) {
            *moved.0.lock().unwrap() = true;
            moved.1.notify_all();
        }
    });
    let hosts = trainer.hosts(Hosts::new()).unwrap();
    let cluster = Cluster::listen(config.clone(), ([127, 0, 0, 1], 0).into(), hosts.clone());
    let cluster = cluster.unwrap();
    let mut stage = Stage {
        cluster: cluster.clone(),
        hosts,
        config,
        nodes: Vec::new(),
    };
    stage.join(1);
    let stage = std::thread::spawn(move || stage.play(&events));
    let report = trainer.run_on(&cluster).unwrap();
    drop(cluster);
    told(Event::End);
    stage.join().unwrap();
    report
}

/// S-16.
#[test]
fn each_example_counts_once_per_epoch_while_nodes_come_and_go() {
    for consistency in [
        Consistency::Bsp,
        Consistency::Ssp { bound: 2 },
        Consistency::Asp,
    ] {
        let report = count(consistency);
        let wanted = vec![-(NUM_EPOCHS as f32); NUM_EXAMPLES];
        assert_eq!(report.weights.to_vec(), wanted, "{consistency}: {report}");
        let num_steps = NUM_EPOCHS * NUM_EXAMPLES as u64 / 4;
        assert_eq!(report.num_applied, num_steps, "{consistency}: {report}");
        assert!(report.num_worker_restarts > 0, "{consistency}: {report}");
        assert!(report.num_worker_moves > 0, "{consistency}: {report}");
    }
}

/// S-16: in `KofN`, late gradients are dropped. Each step is settled once, and no example counts more often than once per
/// epoch.
#[test]
fn each_step_is_settled_once_in_k_of_n_while_nodes_come_and_go() {
    let report = count(Consistency::KofN { k: 3 });
    let num_steps = NUM_EPOCHS * NUM_EXAMPLES as u64 / 4;
    let num_settled = report.num_applied + report.num_dropped_late;
    assert_eq!(num_settled, num_steps, "{report}");
    let weights = report.weights.to_vec();
    let is_possible = |weight: &f32| (-(NUM_EPOCHS as f32)..=0.0).contains(weight);
    assert!(weights.iter().all(is_possible), "{weights:?}");
    let num_examples = -weights.iter().sum::<f32>();
    assert_eq!(num_examples, 4.0 * report.num_applied as f32, "{report}");
    assert!(report.num_worker_restarts > 0, "{report}");
    assert!(report.num_worker_moves > 0, "{report}");
}
