//! What the observers are told of work that takes a while: evaluations and checkpoints.

use ps_actors::checkpoint::{Checkpoints, SaveEvent};
use ps_actors::weights::Weights;
use ps_model::{Evaluation, Model, ModelError};

use super::Observers;
use super::event::{CheckpointFailed, CheckpointSaved, Evaluating, Event};
use crate::source::{Evaluator, TestResult};

/// Observers learn how far an evaluation is after so many seconds, and again whenever as many have passed.
const TELL_EVERY: f64 = 0.25;

impl Observers {
    /// Evaluates weights in a driver's own loop, and tells all observers of the result. Returns the percentage
    /// of right answers, from 0 to 100. NaN for a model that does not classify.
    ///
    /// # Errors
    /// As [`Evaluator::evaluate`].
    pub fn accuracy_percent<M: Model>(
        &self,
        evaluator: &mut Evaluator<M>,
        weights: &Weights,
    ) -> Result<f64, ModelError> {
        let evaluation = self.evaluate(evaluator, weights, false)?;
        Ok(evaluation.accuracy().map_or(f64::NAN, |part| 100.0 * part))
    }

    /// Evaluates weights, and tells all observers of the result, and if it takes long, how far it is. `is_final`
    /// says whether these are the final weights.
    ///
    /// # Errors
    /// As [`Evaluator::evaluate`].
    pub fn evaluate<M: Model>(
        &self,
        evaluator: &mut Evaluator<M>,
        weights: &Weights,
        is_final: bool,
    ) -> Result<Evaluation, ModelError> {
        let result = self.evaluate_while(evaluator, weights, is_final, || true)?;
        Ok(result.unwrap_or_default().evaluation)
    }

    /// As [`evaluate`](Self::evaluate). Also returns the metrics of the user's program. There is no result if
    /// `is_wanted` returns `false` after a batch.
    pub(crate) fn evaluate_while<M: Model>(
        &self,
        evaluator: &mut Evaluator<M>,
        weights: &Weights,
        is_final: bool,
        is_wanted: impl Fn() -> bool,
    ) -> Result<Option<TestResult>, ModelError> {
        let (began, version) = (self.seconds(), weights.version());
        let mut told = Told(began);
        let result = evaluator.evaluate_in_steps(weights, |num_done, num_batches| {
            let time = self.seconds();
            if told.is_due(time) {
                self.tell_with(|_| {
                    Event::Evaluating(Evaluating {
                        time,
                        version,
                        num_done,
                        num_batches,
                        is_final,
                    })
                });
            }
            is_wanted()
        })?;
        if let Some(result) = &result {
            self.tell_with(|now| Event::evaluated(began, now, version, result, is_final));
        }
        Ok(result)
    }

    /// Returns `checkpoints` such that all observers are told what becomes of each of them.
    #[must_use]
    pub fn see_checkpoints(&self, checkpoints: Checkpoints) -> Checkpoints {
        if self.is_nobody() {
            return checkpoints;
        }
        let observers = self.clone();
        checkpoints.on_save(move |saved| observers.tell_with(|time| of_checkpoint(time, saved)))
    }
}

fn of_checkpoint(time: f64, saved: SaveEvent) -> Event {
    let failed = |reason| Event::CheckpointFailed(CheckpointFailed { time, reason });
    match saved {
        SaveEvent::Saved {
            version,
            path,
            took,
            bytes,
        } => Event::CheckpointSaved(CheckpointSaved {
            time,
            version,
            path: path.display().to_string(),
            seconds: took.as_secs_f64(),
            bytes,
        }),
        SaveEvent::Skipped { version } => failed(format!(
            "skipped at {version}: the one before was still being written"
        )),
        SaveEvent::Failed { reason } => failed(reason),
    }
}

/// When the observers were told last, in seconds since the run began.
struct Told(f64);

impl Told {
    fn is_due(&mut self, now: f64) -> bool {
        let is_due = now >= self.0 + TELL_EVERY;
        if is_due {
            self.0 = now;
        }
        is_due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_evaluation_that_is_quick_is_not_told_of_and_a_long_one_four_times_per_second() {
        let times = |until: i32| {
            let mut told = Told(10.0);
            let times = (1..=until).map(|n| 10.0 + f64::from(n) / 100.0);
            times.filter(|&time| told.is_due(time)).count()
        };
        assert_eq!([times(24), times(100)], [0, 4]);
    }
}
