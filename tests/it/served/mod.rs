//! Models that live with a server: remote forward and backward, and the distributed optimizer.

mod exactly_once;
mod fuzz;
mod limits;
mod local_training;
mod split;

use ps::actors::remote::untraced;
use ps::actors::server::Outcome;
use ps::model::burn::tensor::{Device, Tensor};
use ps::model::{Array, LocalModel, Part, StepSeed};
use ps::prelude::*;
use ps::served::{Context, ContextError, DistributedOptimizer, PartConfig, PartServer, serve_part};
use ps::source::ModelWorker;

const SEED: u64 = 11;

fn device() -> Device {
    select_device(default_device_name()).unwrap()
}

/// Asynchronous, and remembers all versions of a test.
fn config() -> ServerConfig {
    ServerConfig {
        consistency: Consistency::Asp,
        learning_rate: 0.05,
        num_kept_versions: 100,
        ..ServerConfig::default()
    }
}

fn sgd_servers<P: Part>(part: &P, num_servers: usize, config: ServerConfig) -> ServerGroup {
    let weights = initial_weights(part, &device()).unwrap();
    let rule = |_| -> Box<dyn UpdateRule> { Box::new(Sgd::new()) };
    ServerGroup::spawn(&weights, num_servers, config, rule).unwrap()
}

fn serve<P: Part>(part: &P, servers: &ServerGroup) -> ActorRef<PartServer<P>> {
    serve_part(part, &device(), servers, PartConfig::default()).unwrap()
}

///
#[test]
fn the_fields_of_all_messages_are_compared() {
    let none: [&str; 0] = [];
    assert_eq!(untraced::<PartServer<ConvNet>>(), none);
    assert_eq!(untraced::<ModelWorker<ConvNet>>(), none);
}

/// A trainer's batch of a step.
fn batch(trainer: u32, clock: u64) -> ImageBatch {
    let first = 40 * u64::from(trainer) + 4 * (clock % 10);
    let indices: Vec<usize> = (first..first + 4).map(|index| index as usize).collect();
    Examples::batch(&Mnist::bundled_sample().train, &indices)
}

/// Forward and backward through a classifier that lives elsewhere; returns the loss.
async fn compute<P>(
    context: &mut Context,
    part: &ActorRef<PartServer<P>>,
    batch: &ImageBatch,
) -> Result<f32, ContextError>
where
    P: Part<Input = Tensor<4>, Output = Tensor<2>>,
{
    let output = context.forward(part, batch.images_on(&device())).await?;
    let loss = nll_loss(output.clone(), batch.labels_on(&output.device()));
    context.backward(&loss).await?;
    Ok(loss.into_scalar())
}

/// The same on a model that is here.
fn locally<M>(model: &LocalModel<M>, batch: &ImageBatch, seed: StepSeed) -> (f32, Vec<f32>)
where
    M: Model<Batch = ImageBatch>,
{
    let mut gradient = vec![0.0; model.num_weights()];
    let loss = model.gradient(batch, seed, &mut gradient).unwrap();
    (loss, gradient)
}

fn seed(trainer: u32, clock: u64) -> StepSeed {
    StepSeed {
        seed: SEED,
        worker: trainer.into(),
        clock,
    }
}

async fn optimizer<P: Part>(trainer: u32, part: &ActorRef<PartServer<P>>) -> DistributedOptimizer {
    let mut optimizer = DistributedOptimizer::new(WorkerId(trainer), SEED);
    optimizer.add(part).await.unwrap();
    optimizer
}

/// The version that an applied gradient was computed on.
fn computed_on(outcome: Outcome) -> Version {
    let Outcome::Applied { version, staleness } = outcome else {
        panic!("not applied: {outcome:?}");
    };
    Version(version.0 - 1 - staleness)
}
