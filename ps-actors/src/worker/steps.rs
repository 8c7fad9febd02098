//! What a worker remembers of its latest steps, for those who observe a training.
//!
//! A worker records nothing until somebody asks for the first time. From then on it keeps the records of its
//! latest [`MAX_RECORDS`] steps. Clocks of settled steps rise, so the observer sees a gap if the worker took
//! more steps than that in between. A record is kept until the next question says that it has arrived.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use actix::Message;
use ps_runtime::codec::{BulkValue, CodecError};
use serde::{Deserialize, Serialize};

use crate::ids::{Clock, GradientId, Incarnation, Version};
use crate::server::Outcome;
use crate::session::Session;
use crate::weights::GradientUpdate;

/// How many records a worker keeps, of about 150 bytes each.
pub const MAX_RECORDS: usize = 1 << 13;

/// One settled step of a worker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// The incarnation of the worker.
    pub incarnation: Incarnation,
    /// The clock of the step.
    pub clock: Clock,
    /// The version of the weights that the gradient was computed on.
    pub computed_on: Version,
    /// The outcome of the gradient.
    pub outcome: Outcome,
    /// The mean loss of the batch.
    pub loss: f32,
    /// The Euclidean norm of the gradient.
    pub norm: f64,
    /// How many examples the batch had.
    pub num_examples: u64,
    /// How long the batch was waited for.
    pub data: Duration,
    /// How long the gradient was computed.
    pub compute: Duration,
    /// How long the gradient and the next weights were on their way, with the queues in between.
    pub wire: Duration,
    /// How long the servers held the push, until the next step could start, without `apply`.
    pub waiting: Duration,
    /// How long the first server took to make the update that the gradient became part of.
    pub apply: Duration,
    /// How long ago the step ended, when the records were sent. Clocks of machines need not agree.
    pub ago: Duration,
}

/// Returns the records of settled steps from this clock on, and forgets the earlier ones. From the first such
/// question on, the worker records its steps.
///
/// ```
/// use ps_actors::group::ServerGroup;
/// use ps_actors::ids::{Clock, WorkerId};
/// use ps_actors::rule::Sgd;
/// use ps_actors::server::ServerConfig;
/// use ps_actors::weights::{Gradient, Layout, Weights};
/// use ps_actors::worker::{DataWorker, GetSteps, LocalGradient, RunSteps};
///
/// let initial = Weights::initial(Layout::flat(1), vec![4.0]);
/// let servers = ServerGroup::spawn(&initial, 1, ServerConfig::default(), |_| Box::new(Sgd::new()))?;
/// let worker = ps_actors::spawn(|| {
///     DataWorker::new(WorkerId(0), |clock: Clock, _: &Weights| {
///         let gradient = Gradient::new(vec![1.0]);
///         Ok(LocalGradient { gradient, loss: clock.0 as f32, num_examples: 8 })
///     })
/// });
/// worker.tell(GetSteps { from: Clock(0) })?;
/// worker.ask(RunSteps { servers, num_steps: 3 }).wait()??;
/// let steps = worker.ask(GetSteps { from: Clock(1) }).wait()?.read()?;
/// assert_eq!(steps.iter().map(|step| step.loss).collect::<Vec<_>>(), [1.0, 2.0]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Steps")]
pub struct GetSteps {
    /// The clock of the first step that is wanted.
    pub from: Clock,
}

/// The records of some steps of a worker, in the order of their clocks.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Steps {
    /// `None`: no steps. They travel beside the header, because they may be many.
    records: Option<BulkValue<Vec<StepRecord>>>,
}

impl Steps {
    /// No steps.
    const NONE: Self = Self { records: None };

    fn of(records: &Vec<StepRecord>) -> Self {
        if records.is_empty() {
            return Self::NONE;
        }
        let encoded = BulkValue::new(records);
        Self {
            records: Some(encoded.expect("records are plain data, and their number is bounded")),
        }
    }

    /// Returns the records.
    ///
    /// # Errors
    /// If they come from a peer that did not send records of steps.
    pub fn read(self) -> Result<Vec<StepRecord>, CodecError> {
        self.records.map_or(Ok(Vec::new()), BulkValue::read)
    }
}

/// Compares what was sent.
impl PartialEq for Steps {
    fn eq(&self, other: &Self) -> bool {
        let bytes = |steps: &Self| {
            steps
                .records
                .as_ref()
                .map(|records| records.bytes().to_vec())
        };
        bytes(self) == bytes(other)
    }
}

impl Default for Steps {
    fn default() -> Self {
        Self::NONE
    }
}

/// A step whose gradient is computed and not yet settled.
#[derive(Clone, Copy, Debug)]
pub(super) struct UnsettledStep {
    id: GradientId,
    computed_on: Version,
    loss: f32,
    norm: f64,
    num_examples: u64,
    data: Duration,
    compute: Duration,
}

impl UnsettledStep {
    /// `took` is the time of the gradient, of which `data` was spent on waiting for the batch.
    pub(super) fn new(gradients: &GradientUpdate, took: Duration, data: Duration) -> Self {
        let data = data.min(took);
        Self {
            id: gradients.id,
            computed_on: gradients.computed_on,
            loss: gradients.loss,
            norm: gradients.gradient.norm(),
            num_examples: gradients.num_examples as u64,
            data,
            compute: took - data,
        }
    }

    /// The servers answered after `took`. The first one says that it held the push for `held`, of which it took
    /// `applied` for the update.
    pub(super) fn settled(
        self,
        outcome: Outcome,
        took: Duration,
        held: Duration,
        applied: Duration,
    ) -> StepRecord {
        // They come from a peer. A push that came again after its update did not wait for all of it.
        let held = held.min(took);
        let apply = applied.min(held);
        StepRecord {
            incarnation: self.id.incarnation,
            clock: self.id.clock,
            computed_on: self.computed_on,
            outcome,
            loss: self.loss,
            norm: self.norm,
            num_examples: self.num_examples,
            data: self.data,
            compute: self.compute,
            wire: took - held,
            waiting: held - apply,
            apply,
            ago: Duration::ZERO,
        }
    }

    /// Returns the outcome, if the membership that follows this step knows it.
    pub(super) fn outcome_in(&self, next: &Session) -> Option<Outcome> {
        let outcome = next.latest_outcome();
        outcome.filter(|_| next.next_clock() == self.id.clock.next())
    }
}

/// The latest steps of a worker.
#[derive(Debug, Default)]
pub(super) struct Recorder {
    /// `None` until somebody asks for the first time.
    latest: Option<VecDeque<(Instant, StepRecord)>>,
}

impl Recorder {
    /// Keeps the record of a step that has just ended.
    pub(super) fn record(&mut self, record: StepRecord) {
        let Some(latest) = &mut self.latest else {
            return;
        };
        if latest.len() == MAX_RECORDS {
            latest.pop_front();
        }
        latest.push_back((Instant::now(), record));
    }

    /// Answers a question.
    pub(super) fn from(&mut self, from: Clock) -> Steps {
        let latest = self.latest.get_or_insert_default();
        // Usually they are the first ones. After a recovery, clocks come again in a new worker.
        latest.retain(|(_, record)| record.clock >= from);
        self.kept()
    }

    /// Returns all records that are kept.
    pub(super) fn kept(&self) -> Steps {
        let Some(latest) = &self.latest else {
            return Steps::NONE;
        };
        let now = Instant::now();
        let records = latest.iter().map(|(ended, record)| StepRecord {
            ago: now.saturating_duration_since(*ended),
            ..record.clone()
        });
        Steps::of(&records.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ps_runtime::test_util::transport;

    fn step(clock: u64) -> StepRecord {
        StepRecord {
            incarnation: Incarnation(1),
            clock: Clock(clock),
            computed_on: Version(clock),
            outcome: Outcome::Applied {
                version: Version(clock + 1),
                staleness: 0,
            },
            loss: 0.5,
            norm: 2.0,
            num_examples: 32,
            data: Duration::from_millis(1),
            compute: Duration::from_millis(20),
            wire: Duration::from_millis(3),
            waiting: Duration::from_millis(4),
            apply: Duration::from_millis(2),
            ago: Duration::ZERO,
        }
    }

    fn clocks(steps: Steps) -> Vec<u64> {
        let records = transport(&steps).unwrap().read().unwrap();
        records.iter().map(|record| record.clock.0).collect()
    }

    #[test]
    fn the_times_of_a_step_add_up_whatever_a_server_says() {
        let gradients = GradientUpdate {
            id: GradientId {
                worker: crate::ids::WorkerId(1),
                incarnation: Incarnation(2),
                clock: Clock(3),
            },
            computed_on: Version(4),
            loss: 0.5,
            num_examples: 6,
            gradient: crate::weights::Gradient::new(vec![3.0, 4.0]),
        };
        let ms = Duration::from_millis;
        let outcome = step(0).outcome;
        let max = Duration::MAX;
        for (data, held, applied, expected) in [
            (ms(2), ms(5), ms(0), [ms(2), ms(8), ms(15), ms(5), ms(0)]),
            (ms(2), ms(5), ms(3), [ms(2), ms(8), ms(15), ms(2), ms(3)]),
            (ms(2), ms(5), ms(7), [ms(2), ms(8), ms(15), ms(0), ms(5)]),
            (ms(99), max, ms(4), [ms(10), ms(0), ms(0), ms(16), ms(4)]),
            (ms(99), max, max, [ms(10), ms(0), ms(0), ms(0), ms(20)]),
        ] {
            let unsettled = UnsettledStep::new(&gradients, ms(10), data);
            let record = unsettled.settled(outcome, ms(20), held, applied);
            let parts = [record.data, record.compute, record.wire];
            let times = [&parts[..], &[record.waiting, record.apply]].concat();
            assert_eq!(times, expected);
            assert_eq!(
                (record.norm, record.clock, record.num_examples),
                (5.0, Clock(3), 6)
            );
        }
    }

    #[test]
    fn nothing_is_recorded_until_somebody_asks() {
        let mut recorder = Recorder::default();
        recorder.record(step(0));
        assert!(recorder.latest.is_none());
        assert!(clocks(recorder.kept()).is_empty());
        assert!(clocks(recorder.from(Clock(0))).is_empty());
        recorder.record(step(1));
        assert_eq!(clocks(recorder.kept()), [1]);
    }

    #[test]
    fn a_record_is_kept_until_it_has_arrived() {
        let mut recorder = Recorder::default();
        recorder.from(Clock(0));
        (0..4).for_each(|clock| recorder.record(step(clock)));
        assert_eq!(clocks(recorder.from(Clock(1))), [1, 2, 3]);
        // The answer was lost.
        assert_eq!(clocks(recorder.from(Clock(1))), [1, 2, 3]);
        assert_eq!(clocks(recorder.from(Clock(3))), [3]);
        assert_eq!(clocks(recorder.kept()), [3]);
    }

    #[test]
    fn the_latest_steps_are_kept_and_fit_into_a_message() {
        let mut recorder = Recorder::default();
        recorder.from(Clock(0));
        let num_steps = 2 * MAX_RECORDS as u64 + 3;
        (0..num_steps).for_each(|clock| recorder.record(step(u64::MAX - num_steps + clock)));
        let kept = clocks(recorder.kept());
        assert_eq!(kept.len(), MAX_RECORDS);
        assert_eq!(kept.last(), Some(&(u64::MAX - 1)));
    }
}
