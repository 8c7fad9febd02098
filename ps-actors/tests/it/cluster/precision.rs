//! Weights for a worker that rounds them to 16 bits, and gradients of such numbers.

use std::sync::mpsc;

use half::{bf16, f16};
use ps_actors::actor::{run, spawn};
use ps_actors::cluster::{Cluster, Hosts, Node, Placement, SpawnOn};
use ps_actors::codec::encode;
use ps_actors::group::ServerGroup;
use ps_actors::ids::{Clock, WorkerId};
use ps_actors::rule::Sgd;
use ps_actors::server::{PullVersion, ServerConfig};
use ps_actors::weights::{Gradient, Layout, Precision, Weights};
use ps_actors::worker::{
    DataWorker, GradientSource, HostedSource, LocalGradient, RunSteps, SourceError,
};
use ps_runtime::test_util::{LOCAL, Parked, SOON, config, driver_address, transports};

const NUM_STEPS: u64 = 3;

const INITIAL: [f32; 5] = [0.1, -1.0 / 3.0, 1e-3, 123.456, 0.0];

/// Tells which weights it gets. Its gradient has the same numbers in every precision.
struct Rounding {
    precision: Precision,
    seen: mpsc::Sender<Vec<f32>>,
}

impl GradientSource for Rounding {
    fn gradient(&mut self, _: Clock, weights: &Weights) -> Result<LocalGradient, SourceError> {
        let _ = self.seen.send(weights.to_vec());
        Ok(LocalGradient {
            gradient: Gradient::new(vec![0.5, -0.25, 3.0, 2.0, 1.0]),
            loss: 0.0,
            num_examples: 1,
        })
    }

    fn precision(&self) -> Precision {
        self.precision
    }
}

impl HostedSource for Rounding {
    type Args = Parked<Self>;
}

fn servers() -> ServerGroup {
    let initial = Weights::initial(Layout::flat(INITIAL.len()), INITIAL.to_vec());
    let config = ServerConfig {
        learning_rate: 0.1,
        ..ServerConfig::default()
    };
    ServerGroup::spawn(&initial, 2, config, |_| Box::new(Sgd::new())).unwrap()
}

fn final_weights(servers: &ServerGroup) -> Vec<f32> {
    run(servers.pull(PullVersion::Latest)).unwrap().to_vec()
}

/// S-23: the worker sees rounded weights, and the servers' own are those of a run in which nothing is rounded.
#[test]
fn a_worker_gets_weights_in_its_precision_and_the_servers_keep_theirs() {
    let rounded = |precision: Precision, number: f32| match precision {
        Precision::F32 => number,
        Precision::Bf16 => bf16::from_f32(number).to_f32(),
        Precision::F16 => f16::from_f32(number).to_f32(),
    };
    let message = |servers: &ServerGroup| RunSteps {
        servers: servers.clone(),
        num_steps: NUM_STEPS,
    };
    for transport in transports() {
        for precision in [Precision::F32, Precision::Bf16, Precision::F16] {
            let (seen, weights_here) = mpsc::channel();
            let here = servers();
            let worker = spawn(move || {
                let seen = seen.clone();
                DataWorker::new(WorkerId(0), Rounding { precision, seen })
            });
            worker.ask(message(&here)).wait().unwrap().unwrap();

            let hosts = || {
                let worker =
                    |source: Parked<Rounding>| Ok(DataWorker::new(WorkerId(0), source.take()));
                Hosts::new().host(worker)
            };
            let config = config(transport.clone());
            let cluster = Cluster::listen(config.clone(), LOCAL, hosts()).unwrap();
            let node = Node::new(config, 1, 0, driver_address(&cluster), hosts()).serve();
            cluster.wait_for_nodes(1, SOON).wait().unwrap();
            let (seen, weights_there) = mpsc::channel();
            let there = servers();
            let on_the_node = SpawnOn::new().place(Placement::Rank(1));
            let source = Parked::new(Rounding { precision, seen });
            let worker = cluster
                .spawn_with::<DataWorker<Rounding>>(on_the_node, source)
                .wait()
                .unwrap();
            worker.ask(message(&there)).wait().unwrap().unwrap();

            for _ in 0..NUM_STEPS {
                let exact = weights_here.recv_timeout(SOON).unwrap();
                let expected: Vec<_> = exact.iter().map(|&one| rounded(precision, one)).collect();
                assert_eq!(
                    weights_there.recv_timeout(SOON),
                    Ok(expected),
                    "{precision:?}"
                );
            }
            assert_eq!(final_weights(&there), final_weights(&here), "{precision:?}");
            drop(cluster);
            node.wait().unwrap();
        }
    }
}

/// S-23
#[test]
fn a_gradient_of_16_bit_numbers_takes_half_the_bytes() {
    let num_words = |values: Vec<f32>| {
        let encoded = encode(&Gradient::new(values)).unwrap();
        encoded.bulk.iter().map(|bulk| bulk.len()).sum::<usize>()
    };
    assert_eq!(num_words(vec![0.5; 1000]), 500);
    assert_eq!(num_words(vec![f16::EPSILON.to_f32() + 1.0; 1001]), 501);
    assert_eq!(num_words(vec![0.1; 1000]), 1000);
}
