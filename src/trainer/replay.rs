//! Records the schedule of a training, and computes the same weights again from it.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;
use std::path::Path;

use ps_actors::group::ServerGroup;
use ps_actors::ids::{GradientId, Version, WorkerId};
use ps_actors::schedule::{
    Record, Schedule, ScheduleError, ScheduleWriter, ScheduledGradient, WeightsChecksum,
};
use ps_actors::server::{ApplyGradients, Clipping, ServerConfig, SetLearningRate};
use ps_actors::weights::{GradientUpdate, Weights};
use ps_actors::worker::{GradientSource, LocalGradient, SourceError};
use ps_model::{Evaluation, Model};

use super::{TrainError, Trainer};
use crate::data::Examples;
use crate::source::{Evaluator, ModelSource, initial_weights};

/// Why a training could not be recorded or replayed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReplayError {
    /// The file cannot be used.
    #[error(transparent)]
    Schedule(#[from] ScheduleError),
    /// The schedule does not begin with the first update.
    #[error("the schedule begins with {first}, and a replay needs it from version 1 on")]
    NoBeginning {
        /// The version that its first update makes.
        first: Version,
    },
    /// A gradient makes no sense in this training.
    #[error(
        "the schedule names {id}, computed on {computed_on}, in the update that makes {version}"
    )]
    Nonsense {
        /// The id of the gradient.
        id: GradientId,
        /// The version of the weights that it should be computed on.
        computed_on: Version,
        /// The version that its update makes.
        version: Version,
    },
    /// A gradient cannot be computed.
    #[error("the gradient of {id} cannot be computed")]
    Source {
        /// The id of the gradient.
        id: GradientId,
        /// What the model or its data said.
        #[source]
        source: SourceError,
    },
    /// A gradient differs from the one that was recorded.
    #[error(
        "the first difference is in the update that makes {version}: the gradient of {id}, computed on \
         {computed_on}, has the norm {got}, and had {recorded}; the program, the backend, the data or the \
         number of its threads may be others"
    )]
    Differs {
        /// The version that the update makes.
        version: Version,
        /// The id of the gradient.
        id: GradientId,
        /// The version of the weights that it was computed on.
        computed_on: Version,
        /// The norm when the training was recorded.
        recorded: f64,
        /// The norm of the gradient that the replay has computed.
        got: f64,
    },
    /// Weights differ from those that were recorded.
    #[error(
        "the first difference is in the weights of {version}; the program, the optimizer, the backend or the initial \
         weights may be others"
    )]
    WeightsDiffer {
        /// The version of the weights.
        version: Version,
    },
    /// The update could not be applied.
    #[error("the update that makes {version} cannot be applied: {reason}")]
    Update {
        /// The version that the update makes.
        version: Version,
        /// Why it cannot be applied, with all causes.
        reason: String,
    },
}

/// The result of [`Trainer::replay`].
#[derive(Clone, Debug)]
pub struct Replay {
    /// The weights after the last update. They have the bits that they had in the recorded training.
    pub weights: Weights,
    /// The result of these weights on the whole test set. `None` without test data.
    pub final_evaluation: Option<Evaluation>,
    /// How many gradients were computed again.
    pub num_gradients: u64,
    /// Whether the end of the schedule was cut, so that it is only the beginning of the training.
    pub is_cut: bool,
}

/// Says in one line what was computed again.
impl fmt::Display for Replay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (num_updates, num_gradients) = (self.weights.version().0, self.num_gradients);
        write!(
            f,
            "Replayed {num_updates} updates of {num_gradients} gradients, with the same bits"
        )?;
        match self.is_cut {
            true => f.write_str("; the end of the schedule is missing"),
            false => Ok(()),
        }
    }
}

impl<M, E> Trainer<M, E>
where
    M: Model,
    E: Examples<Batch = M::Batch>,
{
    /// What a recorded training and its replay must have in common.
    fn schedule_facts(&self) -> Result<BTreeMap<String, String>, TrainError> {
        let devices = self.devices_here()?;
        let facts = self
            .worker_facts(devices.first())
            .without("the model's type");
        let facts = facts
            .state("the optimizer", self.describe_optimizer())
            .state("the batch size", self.batch_size)
            .state("the seed", self.seed)
            .state("the number of workers", self.num_workers);
        let facts = match self.server.clipping {
            Clipping::Off => facts,
            clipping => facts.state("the clipping", clipping),
        };
        let facts = facts.iter();
        Ok(facts
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect())
    }

    /// Lets the servers record their updates from now on, if the user wants it. The weights are at version
    /// `from`.
    pub(super) fn record_schedule(
        &self,
        servers: &ServerGroup,
        from: Version,
        may_exist: bool,
    ) -> Result<(), TrainError> {
        let Some(path) = &self.record else {
            return Ok(());
        };
        let first = servers.servers().next().expect("a group has servers");
        let facts = self.schedule_facts()?;
        let writer = match from > Version(0) || (may_exist && path.exists()) {
            true => ScheduleWriter::resume(path, &facts, from),
            false => ScheduleWriter::create(path, &facts),
        };
        let recorded = first.ask(Record(writer.map_err(ReplayError::from)?)).wait();
        recorded.map_err(|source| {
            TrainError::Group(ps_actors::server::GroupError::Call { index: 0, source })
        })
    }

    /// Computes the weights of a [recorded](Self::record) training again, in this process and without any
    /// waiting, in whatever mode it ran and on however many processes. The settings must be those of the
    /// recorded training. The norm of each gradient is compared with the recorded one, to the bit, and a checksum of
    /// the first server's weights before each update.
    ///
    /// The bits are the same for the same program on the same backend, if each worker computes on one thread
    /// (the default of the backend `flex`), and under the conditions of M-4 in `docs/semantics`.
    ///
    /// ```
    /// use ps::prelude::*;
    ///
    /// let device = select_device(default_device_name())?;
    /// let trainer = || {
    ///     Trainer::new(ConvNet::init(1, &device), Mnist::bundled_sample().train)
    ///         .device(&device)
    ///         .workers(2)
    ///         .consistency(Consistency::Asp)
    ///         .iterations(5)
    /// };
    /// let directory = tempfile::tempdir()?;
    /// let file = directory.path().join("run.schedule");
    /// let report = trainer().record(file.clone()).run()?;
    /// let replay = trainer().replay(&file)?;
    /// assert_eq!(replay.weights.to_vec(), report.weights.to_vec());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// If the schedule is of another training, or does not begin with the first update. If a gradient or the weights
    /// before an update differ: the error names the first difference.
    #[expect(
        clippy::missing_panics_doc,
        reason = "a group that is spawned with one server has one"
    )]
    pub fn replay(&self, path: &Path) -> Result<Replay, TrainError> {
        let schedule = Schedule::read(path).map_err(ReplayError::from)?;
        schedule
            .check(&self.schedule_facts()?)
            .map_err(ReplayError::from)?;
        if let Some(update) = schedule.updates.first()
            && update.version != Version(1)
        {
            let first = update.version;
            return Err(ReplayError::NoBeginning { first }.into());
        }
        let device = self.devices_here()?.first().clone();
        let initial = initial_weights(&self.model, &device)?;
        self.check_groups(initial.layout())?;
        let rule = self.server_rule().make_without_schedule(&device)?;
        // The schedule has the learning rate of each update, and a clipping factor follows from its gradients.
        let config = ServerConfig {
            clipping: self.server.clipping,
            ..ServerConfig::default()
        };
        let servers = ServerGroup::spawn(&initial, 1, config, {
            let mut rule = Some(rule);
            move |_| rule.take().expect("there is one server")
        })?;
        let server = servers.servers().next().expect("there is one server");
        let mut weights = initial.clone();
        let mut replaying = Replaying {
            sources: BTreeMap::new(),
            history: BTreeMap::from([(Version(0), initial)]),
            learning_rate: ServerConfig::default().learning_rate,
        };
        let mut last_use: BTreeMap<Version, Version> = BTreeMap::new();
        for update in &schedule.updates {
            for gradient in &update.gradients {
                last_use.insert(gradient.computed_on, update.version);
            }
        }
        let mut num_gradients = 0;
        for update in &schedule.updates {
            let version = update.version;
            if let Some(recorded) = update.weights
                && WeightsChecksum::of(&weights, recorded.num_weights) != recorded
            {
                let version = weights.version();
                return Err(ReplayError::WeightsDiffer { version }.into());
            }
            let gradients = update
                .gradients
                .iter()
                .map(|recorded| self.compute_again(&mut replaying, recorded, version));
            let gradients = gradients.collect::<Result<Vec<_>, TrainError>>()?;
            num_gradients += gradients.len() as u64;
            let failed = |error: &dyn std::error::Error| ReplayError::Update {
                version,
                reason: ps_actors::actor::error_chain(error),
            };
            if update.learning_rate.to_bits() != replaying.learning_rate.to_bits() {
                let set = server.ask(SetLearningRate(update.learning_rate)).flatten();
                set.wait().map_err(|error| failed(&error))?;
                replaying.learning_rate = update.learning_rate;
            }
            let reduction = update.reduction;
            let apply = ApplyGradients {
                gradients,
                reduction,
            };
            let applied = server.ask(apply).flatten().wait();
            weights = applied.map_err(|error| failed(&error))?;
            replaying.history.insert(version, weights.clone());
            // Most versions are needed for the next few updates only.
            let is_needed = |of: &Version| last_use.get(of).is_some_and(|&last| last > version);
            replaying.history.retain(|of, _| is_needed(of));
        }
        let mut final_evaluation = None;
        if let Some(test) = &self.test {
            let mut evaluator = Evaluator::new(&self.model, &device, test)?;
            final_evaluation = Some(evaluator.evaluate(&weights)?);
        }
        Ok(Replay {
            weights,
            final_evaluation,
            num_gradients,
            is_cut: schedule.is_cut,
        })
    }

    /// Computes a recorded gradient of the update that makes `version`.
    fn compute_again(
        &self,
        replaying: &mut Replaying<M>,
        recorded: &ScheduledGradient,
        version: Version,
    ) -> Result<GradientUpdate, TrainError> {
        let &ScheduledGradient {
            id,
            computed_on,
            norm,
            ..
        } = recorded;
        let nonsense = ReplayError::Nonsense {
            id,
            computed_on,
            version,
        };
        let Replaying {
            sources, history, ..
        } = replaying;
        let weights = history.get(&computed_on);
        let rank = id.worker.0 as usize;
        let (Some(weights), true) = (weights, rank < self.num_workers) else {
            return Err(nonsense.into());
        };
        let source = match sources.entry(id.worker) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => {
                let device = self.devices_here()?.of(id.worker).device;
                let source = self.worker_source(rank, &device)?;
                new.insert(source)
            }
        };
        let computed = source.gradient(id.clock, weights);
        let LocalGradient {
            gradient,
            loss,
            num_examples,
        } = computed.map_err(|source| ReplayError::Source { id, source })?;
        if gradient.norm().to_bits() != norm.to_bits() {
            let (recorded, got) = (norm, gradient.norm());
            return Err(ReplayError::Differs {
                version,
                id,
                computed_on,
                recorded,
                got,
            }
            .into());
        }
        Ok(GradientUpdate {
            id,
            computed_on,
            loss,
            num_examples,
            gradient,
        })
    }
}

struct Replaying<M: Model> {
    sources: BTreeMap<WorkerId, ModelSource<M>>,
    /// The weights of the versions that gradients of later updates were computed on.
    history: BTreeMap<Version, Weights>,
    learning_rate: f64,
}
