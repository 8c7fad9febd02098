//! burn's training loop: epochs, validation, events, checkpoints, early stopping.
//!
//! It is that of burn's strategy for one device. Only the steps of an epoch are taken by workers.

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use burn::train::train::WorkerFailure;
use burn::train::{
    EventProcessorTraining, InferenceStep, Interrupter, Learner, LearnerEvent, LearnerModel,
    SupervisedLearningStrategy, SupervisedTrainingEventProcessor, TrainLoader, TrainingComponents,
    TrainingError, TrainingItem, ValidLoader,
};
use ps_actors::actor::error_chain;
use ps_actors::cluster::{Cluster, Hosts};
use ps_actors::launch::StopSignal;
use ps_actors::server::ServerConfig;
use ps_actors::worker::WorkerError;
use ps_model::burn::data::dataloader::Progress;

use super::epoch::Epochs;
use super::progress::JointProgress;
use super::source::{Input, Shared, lock};
use crate::agreement::Facts;
use crate::trainer::TrainError;

/// A strategy with a cluster to train on.
pub(super) struct OnCluster<M: LearnerModel> {
    pub(super) shared: Arc<Shared<M>>,
    pub(super) cluster: Cluster,
    /// Makes the workers of this process.
    pub(super) hosts: Hosts,
    pub(super) variant: String,
    /// The facts about the model that the nodes have.
    pub(super) model: Facts,
    pub(super) config: ServerConfig,
    pub(super) num_workers: Option<u32>,
    pub(super) heeds_signals: bool,
    /// The order of the examples is used up.
    pub(super) is_used: AtomicBool,
}

impl<M: LearnerModel> SupervisedLearningStrategy<M> for OnCluster<M>
where
    Input<M>: Clone,
{
    fn fit(
        &self,
        training_components: TrainingComponents<M>,
        mut learner: Learner<M>,
        dataloader_train: TrainLoader<M>,
        dataloader_valid: ValidLoader<M>,
        starting_epoch: usize,
    ) -> (M, SupervisedTrainingEventProcessor<M>) {
        let TrainingComponents {
            num_epochs,
            mut checkpointer,
            grad_accumulation,
            interrupter,
            mut early_stopping,
            mut event_processor,
            event_store,
            ..
        } = training_components;
        learner.fork(&self.shared.device);
        let num_processes = 1 + self.cluster.nodes().len();
        let num_workers = (self.num_workers).unwrap_or(u32::try_from(num_processes).unwrap_or(1));
        let model = learner.model();
        if let Err(reason) = self.check(&model, &dataloader_train, num_workers) {
            interrupter.fail(failure(0, reason));
            return (model, event_processor);
        }
        // A checkpoint may have brought other values of what is not trained.
        *lock(&self.shared.model) = model;
        let stop = self.heed();
        let must_stop = || {
            if let Some(signal) = stop.as_ref().and_then(StopSignal::received)
                && !interrupter.should_stop()
            {
                interrupter.stop(Some(&signal.to_string()));
            }
            interrupter.should_stop()
        };
        let num_train = dataloader_train.num_items();
        let dataloader_valid = dataloader_valid.to_device(&self.shared.device.clone().inner());
        let learner = Arc::new(Mutex::new(learner));
        let epochs = Epochs {
            shared: &self.shared,
            cluster: &self.cluster,
            hosts: &self.hosts,
            variant: &self.variant,
            // Each `RandomState` has other keys.
            training: RandomState::new().hash_one("training"),
            config: ServerConfig {
                wait_for_workers: num_workers as usize,
                ..self.config
            },
            num_workers,
            num_accumulated: grad_accumulation.map_or(1, |num| num.try_into().unwrap_or(u32::MAX)),
            learner: &learner,
            before: Mutex::new(None),
        };
        for epoch in starting_epoch..=num_epochs {
            interrupter.fail_on_error(event_processor.process_train(LearnerEvent::StartSplit {
                epoch_number: epoch,
                total_items: num_train,
            }));
            let mut progress = JointProgress::new(num_train, num_workers);
            let on_output = |output: super::source::Output<M>| {
                let (progress, iteration) = progress.after(output.worker, &output.progress);
                let rate = lock(&learner).lr_current();
                let item = TrainingItem::new(output.item, progress, Some(iteration), Some(rate));
                let event = LearnerEvent::ProcessedItem(item);
                interrupter.fail_on_error(event_processor.process_train(event));
            };
            // burn counts from 1. A training that goes on takes the examples in the order of an uninterrupted one.
            let number = (epoch - 1) as u64;
            if let Err(error) = epochs.train(number, on_output, must_stop) {
                interrupter.fail(failure(rank_of(&error), error_chain(&error)));
            }
            interrupter.fail_on_error(event_processor.process_train(LearnerEvent::EndSplit(epoch)));
            if must_stop() {
                break;
            }
            validate(
                &lock(&learner).model().valid(),
                &dataloader_valid,
                epoch,
                &mut event_processor,
                &interrupter,
                must_stop,
            );
            interrupter.fail_on_error(event_processor.process_train(LearnerEvent::EndEpoch(epoch)));
            if checkpointer.is_some() || early_stopping.is_some() {
                interrupter.fail_on_error(event_processor.flush());
            }
            if must_stop() {
                break;
            }
            if let Some(checkpointer) = &mut checkpointer {
                checkpointer.checkpoint(&lock(&learner), epoch, &event_store);
            }
            if let Some(early_stopping) = &mut early_stopping
                && early_stopping.should_stop(epoch, &event_store)
            {
                break;
            }
        }
        let model = lock(&learner).model();
        (model, event_processor)
    }
}

impl<M: LearnerModel> OnCluster<M>
where
    Input<M>: Clone,
{
    fn check(
        &self,
        model: &M,
        dataloader_train: &TrainLoader<M>,
        num_workers: u32,
    ) -> Result<(), String> {
        if num_workers == 0 {
            return Err(TrainError::NoWorkers.to_string());
        }
        let mode = self.config.consistency.check(num_workers as usize);
        mode.map_err(|error| error.to_string())?;
        let own = self.shared.shares.loader();
        if !std::ptr::addr_eq(Arc::as_ptr(own), Arc::as_ptr(dataloader_train)) {
            return Err(
                "the strategy and the training have different data loaders: give the same one to both"
                    .to_owned(),
            );
        }
        let facts = Facts::default().model(model, &self.shared.device);
        if facts != self.model && !self.cluster.nodes().is_empty() {
            return Err(
                "the learner has another model than when the strategy was made, or other values of what is not \
                 trained, and the other processes do not have them: if they are those of a checkpoint, load them \
                 in all processes before the strategy is made"
                    .to_owned(),
            );
        }
        if self.is_used.swap(true, Ordering::Relaxed) {
            return Err(
                "the strategy has trained already, and its data loader is used up: make a new one"
                    .to_owned(),
            );
        }
        Ok(())
    }

    fn heed(&self) -> Option<StopSignal> {
        if !self.heeds_signals {
            return None;
        }
        match StopSignal::heed() {
            Ok(stop) => Some(stop),
            Err(error) => {
                tracing::warn!(%error, "signals end the process at once");
                None
            }
        }
    }
}

/// Evaluates the weights on the whole validation set, in the driver.
fn validate<M: LearnerModel>(
    model: &M,
    dataloader: &ValidLoader<M>,
    epoch: usize,
    event_processor: &mut SupervisedTrainingEventProcessor<M>,
    interrupter: &Interrupter,
    must_stop: impl Fn() -> bool,
) {
    interrupter.fail_on_error(event_processor.process_valid(LearnerEvent::StartSplit {
        epoch_number: epoch,
        total_items: dataloader.num_items(),
    }));
    let mut batches = dataloader.iter();
    let mut iteration = 0;
    while let Some(batch) = batches.next() {
        let batch = match batch {
            Ok(batch) => batch,
            Err(error) => {
                interrupter.fail(error);
                break;
            }
        };
        iteration += 1;
        let progress: Progress = batches.progress();
        let item = InferenceStep::step(model, batch);
        let item = TrainingItem::new(item, progress, Some(iteration), None);
        interrupter.fail_on_error(event_processor.process_valid(LearnerEvent::ProcessedItem(item)));
        if must_stop() {
            break;
        }
    }
    interrupter.fail_on_error(event_processor.process_valid(LearnerEvent::EndSplit(epoch)));
}

/// burn's errors of training have no place for others than its own. This one says which worker failed.
fn failure(rank: usize, message: String) -> TrainingError {
    let failure = WorkerFailure {
        device_id: rank,
        message,
    };
    TrainingError::Workers(vec![failure])
}

fn rank_of(error: &TrainError) -> usize {
    let worker = match error {
        TrainError::WorkerLost { worker, .. }
        | TrainError::Worker(
            WorkerError::Source { worker, .. }
            | WorkerError::Servers { worker, .. }
            | WorkerError::Diverged { worker, .. },
        ) => worker.0,
        _ => 0,
    };
    worker as usize
}
