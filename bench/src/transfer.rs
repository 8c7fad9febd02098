//! Our own contender in calls between two processes: an empty call, and a gradient there and the
//! weights back.

use actix::{Actor, Context, Handler, Message};
use anyhow::{Result, ensure};
use ps::actors::buffer::BufferPool;
use ps::actors::group::ServerArgs;
use ps::actors::ids::{GradientId, JoinRequest};
use ps::prelude::*;
use serde::{Deserialize, Serialize};

use crate::measure::{Metrics, measure_call, say, say_result};

/// Calls another process and measures: what `compare` starts once per run.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Transfer {
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
}

struct Peer;

impl Actor for Peer {
    type Context = Context<Self>;
}

impl Remote for Peer {
    fn messages(messages: &mut Messages<Self>) {
        messages.add::<Empty>();
    }
}

impl Hosted for Peer {
    type Args = ();
}

#[derive(Message, Serialize, Deserialize)]
#[rtype(result = "()")]
struct Empty;

impl Handler<Empty> for Peer {
    type Result = ();

    fn handle(&mut self, _: Empty, _: &mut Context<Self>) {}
}

impl Transfer {
    pub(crate) fn run(&self) -> Result<()> {
        let hosts = Hosts::new()
            .host(|()| Ok(Peer))
            .host(|args: ServerArgs| Ok(args.into_server(Box::new(Sgd::new()))?));
        let options = LaunchOptions::processes(2);
        let Some(cluster) = Cluster::launch(&options, ClusterConfig::default(), hosts)? else {
            return Ok(());
        };
        let mut metrics = Metrics::new();
        let place = SpawnOn::new().place(Placement::Rank(1));
        let peer = cluster.spawn_with::<Peer>(place, ()).wait()?;
        let call = || Ok(peer.ask(Empty).wait()?);
        measure_call(&mut metrics, "call", self.seconds, call)?;
        say("first");
        for (name, len) in [("8kb", 2_000), ("4.8mb", 1_200_000), ("100mb", 25_000_000)] {
            self.push_pull(&mut metrics, &cluster, name, len)?;
            let milliseconds = metrics[&format!("{name}_p50_ms")];
            let throughput = 8e-9 * len as f64 / (1e-3 * milliseconds);
            metrics.insert(format!("{name}_gb_per_s"), throughput);
        }
        say_result(&metrics)
    }

    fn push_pull(
        &self,
        metrics: &mut Metrics,
        cluster: &Cluster,
        name: &str,
        len: usize,
    ) -> Result<()> {
        let config = ServerConfig {
            consistency: Consistency::Asp,
            learning_rate: 1.0,
            ..ServerConfig::default()
        };
        let initial = Weights::initial(Layout::flat(len), vec![0.0; len]);
        let places = [Placement::Rank(1)];
        let server = run(ServerGroup::spawn_on(cluster, places, &initial, config))?;
        let worker = WorkerId(0);
        let incarnation = run(server.join(worker, JoinRequest(1)))?.incarnation;
        // Where workers keep theirs, too.
        let mut gradient = BufferPool::new(1).take(len);
        gradient.fill(1.0);
        // Without a number that needs 32 bits, it would travel with 16.
        gradient[1] = 0.1;
        let gradient = Gradient::new(gradient);
        let mut clock = 0;
        measure_call(metrics, name, self.seconds, || {
            let gradients = GradientUpdate {
                id: GradientId {
                    worker,
                    incarnation,
                    clock: Clock(clock),
                },
                computed_on: Version(clock),
                loss: 1.0,
                num_examples: 1,
                gradient: gradient.clone(),
            };
            clock += 1;
            let (_, weights) = run(server.push_pull(gradients))?;
            // Every update took 1 from every weight.
            let ends = [0..1, len - 1..len].map(|end| weights.read(end)[0]);
            ensure!(ends == [-(clock as f32); 2], "wrong weights: {ends:?}");
            Ok(())
        })
    }
}
