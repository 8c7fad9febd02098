//! Our own contender in the form of PyTorch's RPC guide: the model lives in one process, the trainer
//! in another.

use std::path::PathBuf;

use anyhow::{Context, Result};
use ps::actors::actor::RestartPolicy;
use ps::actors::cluster::Placement;
use ps::actors::group::ServerArgs;
use ps::model::burn::tensor::Tensor;
use ps::prelude::*;
use ps::served::{DistributedOptimizer, PartConfig, PartServer, host_parts, infer};

use crate::measure::{Training, measure};

/// Trains through a served model: what `compare` starts once per run.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct RemoteForward {
    #[command(flatten)]
    training: Training,
    #[arg(long, default_value = default_device_name())]
    device: String,
    #[arg(long)]
    data_dir: Option<PathBuf>,
}

impl RemoteForward {
    pub(crate) fn run(self) -> Result<()> {
        let device = select_device(&self.device)?;
        let mnist = Mnist::load(&MnistOptions {
            directory: self.data_dir.clone(),
            ..MnistOptions::default()
        })?;
        match self.training.model.as_str() {
            "net" => self.train(Net::init(0, &device), &mnist),
            _ => self.train(ConvNet::init(0, &device), &mnist),
        }
    }

    fn train<P>(self, model: P, mnist: &Mnist) -> Result<()>
    where
        P: Part<Input = Tensor<4>, Output = Tensor<2>>,
    {
        let device = select_device(&self.device)?;
        let options = LaunchOptions::processes(2);
        let hosts = host_parts(Hosts::new(), &model, &device, PartConfig::default());
        let rule = |args: ServerArgs| Ok(args.into_server(Box::new(Sgd::new()))?);
        let hosts = hosts.host_with(Spawn::new().restart(RestartPolicy::NEVER), rule);
        let Some(cluster) = Cluster::launch(&options, ClusterConfig::default(), hosts)? else {
            return Ok(());
        };
        let config = ServerConfig {
            consistency: Consistency::Asp,
            learning_rate: self.training.learning_rate,
            ..ServerConfig::default()
        };
        let weights = initial_weights(&model, &device)?;
        let servers = ServerGroup::spawn_on(&cluster, [Placement::Rank(1)], &weights, config);
        let servers = run(servers)?;
        let beside = SpawnOn::new().place(Placement::Rank(1));
        let part = cluster
            .spawn_with::<PartServer<P>>(beside, servers)
            .wait()?;

        let worker = WorkerConfig {
            worker: WorkerId(0),
            num_workers: 1,
            batch_size: self.training.batch_size,
            seed: 0,
        };
        let mut batches = WorkerBatches::new(&mnist.train, worker)?;
        let mut optimizer = DistributedOptimizer::new(worker.worker, worker.seed);
        run(optimizer.add(&part))?;
        let train = |num_steps| {
            run(async {
                for _ in 0..num_steps {
                    let batch = batches.batch(optimizer.clock())?;
                    let mut context = optimizer.begin();
                    let output = context.forward(&part, batch.images_on(&device)).await?;
                    let labels = batch.labels_on(&output.device());
                    context.backward(&nll_loss(output, labels)).await?;
                    optimizer.step(context).await?;
                }
                Ok(())
            })
        };
        let num_test = self.training.num_test.min(mnist.test.len());
        let indices: Vec<usize> = (0..num_test).collect();
        let evaluate = || {
            run(async {
                let mut evaluation = Evaluation::default();
                for indices in indices.chunks(256) {
                    let batch = Examples::batch(&mnist.test, indices);
                    let output = infer(&part, batch.images_on(&device)).await?;
                    evaluation += Evaluation::of_classifier(output, batch.labels_on(&device));
                }
                Ok(100.0 * evaluation.accuracy().context("there is no test data")?)
            })
        };
        measure(&self.training, 1, train, evaluate)
    }
}
