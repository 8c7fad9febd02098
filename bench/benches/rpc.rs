//! A training step of `Net` through a model that lives in another process, over loopback TCP, beside
//! the same step in one process: `cargo bench -p ps-bench --bench rpc`.
//!
//! One step: forward, backward, and the update of all weights by plain SGD, batch 32. The kinds of
//! step take turns; each line is a median, and the median of the ratios to the local step before.

use std::error::Error;
use std::time::{Duration, Instant};

use ps::actors::cluster::{Placement, Transport};
use ps::actors::group::ServerArgs;
use ps::model::burn::tensor::Device;
use ps::model::{LocalModel, StepSeed};
use ps::prelude::*;
use ps::served::{DistributedOptimizer, PartConfig, PartServer, host_parts, serve_part};

const BATCH: usize = 32;
const RATE: f64 = 0.03;

type Part = ActorRef<PartServer<Net>>;

fn main() -> Result<(), Box<dyn Error>> {
    let device = std::env::var("PS_BENCH_DEVICE").unwrap_or(default_device_name().to_owned());
    let device = select_device(&device)?;
    let net = Net::init(1, &device);
    let hosts = host_parts(Hosts::new(), &net, &device, PartConfig::default());
    let hosts = hosts.host(|args: ServerArgs| Ok(args.into_server(Box::new(Sgd::new()))?));
    let config = ClusterConfig {
        transport: Transport::Tcp,
        ..ClusterConfig::default()
    };
    let options = LaunchOptions::processes(2);
    let Some(cluster) = Cluster::launch(&options, config, hosts)? else {
        return Ok(());
    };
    let rounds = std::env::var("PS_BENCH_ROUNDS").map_or(Ok(30), |rounds| rounds.parse())?;
    let data = Mnist::bundled_sample().train;
    let batch = |clock: u64| {
        let first = BATCH * (clock as usize % (data.len() / BATCH));
        let indices: Vec<usize> = (first..first + BATCH).collect();
        Examples::batch(&data, &indices)
    };

    let mut local = Local::new(&net, &device)?;
    // The weights live beside the part, as in the guide.
    let weights = initial_weights(&net, &device)?;
    let servers = |rank| {
        let config = ServerConfig {
            consistency: Consistency::Asp,
            learning_rate: RATE,
            ..ServerConfig::default()
        };
        let places = [Placement::Rank(rank)];
        run(ServerGroup::spawn_on(&cluster, places, &weights, config))
    };
    let here = serve_part(&net, &device, &servers(0)?, PartConfig::default())?;
    let on_node = SpawnOn::new().place(Placement::Rank(1));
    let there = cluster.spawn_with::<PartServer<Net>>(on_node, servers(1)?);
    let there = there.wait()?;
    let (mut here_steps, mut there_steps) = (Vec::new(), Vec::new());
    let mut local_steps = Vec::new();
    run(async {
        let mut here = Served::new(here, &device).await?;
        let mut there = Served::new(there, &device).await?;
        for clock in 0..rounds + 2 {
            let batch = batch(clock);
            local_steps.push(local.step(&batch, clock)?);
            there_steps.push(there.step(&batch).await?);
            here_steps.push(here.step(&batch).await?);
        }
        Ok::<(), Box<dyn Error>>(())
    })?;
    // The first ones warm up.
    for steps in [&mut local_steps, &mut there_steps, &mut here_steps] {
        steps.drain(..2);
    }
    println!("A step of Net, batch {BATCH}, {rounds} rounds:");
    print("local", &local_steps, &local_steps);
    print("through another process", &there_steps, &local_steps);
    print("through another actor", &here_steps, &local_steps);
    Ok(())
}

/// What a program without servers does.
struct Local {
    model: LocalModel<Net>,
    weights: Vec<f32>,
    gradient: Vec<f32>,
}

impl Local {
    fn new(net: &Net, device: &Device) -> Result<Self, Box<dyn Error>> {
        let model = LocalModel::new(net.clone(), device)?;
        Ok(Self {
            weights: model.weights()?,
            gradient: vec![0.0; model.num_weights()],
            model,
        })
    }

    fn step(&mut self, batch: &ImageBatch, clock: u64) -> Result<Duration, Box<dyn Error>> {
        let started = Instant::now();
        let seed = StepSeed {
            seed: 1,
            worker: 0,
            clock,
        };
        self.model.gradient(batch, seed, &mut self.gradient)?;
        Sgd::new().update(&mut self.weights, &self.gradient, RATE);
        self.model.load(&self.weights)?;
        Ok(started.elapsed())
    }
}

struct Served {
    part: Part,
    device: Device,
    optimizer: DistributedOptimizer,
}

impl Served {
    async fn new(part: Part, device: &Device) -> Result<Self, Box<dyn Error>> {
        let mut optimizer = DistributedOptimizer::new(WorkerId(0), 1);
        optimizer.add(&part).await?;
        Ok(Self {
            part,
            device: device.clone(),
            optimizer,
        })
    }

    async fn step(&mut self, batch: &ImageBatch) -> Result<Duration, Box<dyn Error>> {
        let started = Instant::now();
        let mut context = self.optimizer.begin();
        let output = context
            .forward(&self.part, batch.images_on(&self.device))
            .await?;
        let labels = batch.labels_on(&output.device());
        context.backward(&nll_loss(output, labels)).await?;
        self.optimizer.step(context).await?;
        Ok(started.elapsed())
    }
}

fn print(what: &str, steps: &[Duration], local: &[Duration]) {
    let ms = |steps: &[Duration]| median(steps.iter().map(|step| 1e3 * step.as_secs_f64()));
    let ratios = steps.iter().zip(local);
    let ratio = median(ratios.map(|(step, local)| step.as_secs_f64() / local.as_secs_f64()));
    println!("  {what:<26} {:8.2} ms   {ratio:.3}", ms(steps));
}

fn median(numbers: impl Iterator<Item = f64>) -> f64 {
    let mut numbers: Vec<f64> = numbers.collect();
    numbers.sort_by(f64::total_cmp);
    numbers[numbers.len() / 2]
}
