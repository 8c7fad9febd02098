//! How a training saves checkpoints, and how it goes on from one.

use ps_actors::checkpoint::{Checkpoint, CheckpointConfig, CheckpointError, Checkpoints, Found};
use ps_actors::ids::{Clock, Version, WorkerId};
use ps_actors::rule::UpdateRule;
use ps_actors::server::WorkerStatus;
use ps_actors::weights::Layout;

use crate::agreement::Facts;
use crate::data::leaves_out_end;

const NUM_WORKERS: &str = "the number of workers";

/// How the examples are dealt out to the workers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dealing {
    pub(crate) num_workers: usize,
    pub(crate) batch_size: usize,
    pub(crate) num_examples: usize,
}

impl Dealing {
    /// Returns how many examples all workers take in a step with full batches.
    fn block(self) -> usize {
        self.num_workers.saturating_mul(self.batch_size).max(1)
    }

    /// Whether the last step of an epoch has smaller batches, with the examples that fill no full ones.
    fn ends_in_part(self) -> bool {
        !leaves_out_end(self.num_examples, self.num_workers, self.batch_size)
    }

    fn steps_per_epoch(self) -> u64 {
        let full = (self.num_examples / self.block()) as u64;
        (full + u64::from(self.ends_in_part())).max(1)
    }

    /// Returns how many examples a worker has taken in this many steps, up to one per epoch.
    fn examples_of_worker(self, num_steps: u64) -> u64 {
        let per_epoch = match self.ends_in_part() {
            true => self.num_examples,
            false => self.num_examples - self.num_examples % self.block(),
        };
        let (epochs, steps) = (
            num_steps / self.steps_per_epoch(),
            num_steps % self.steps_per_epoch(),
        );
        let in_epochs = u128::from(epochs) * per_epoch as u128 / self.num_workers.max(1) as u128;
        let in_epochs = u64::try_from(in_epochs).unwrap_or(u64::MAX);
        in_epochs.saturating_add(steps.saturating_mul(self.batch_size as u64))
    }

    /// Returns the clock at which workers go on that share the data in this way, if workers that shared it
    /// in the way `before` have taken their steps before `clock`. No example is left out of the epoch
    /// under way. Some may come twice.
    fn clock_after(self, before: Self, clock: Clock) -> Clock {
        let (old, new) = (before.steps_per_epoch(), self.steps_per_epoch());
        let (epoch, step) = (clock.0 / old, clock.0 % old);
        let num_batches = u128::from(step) * before.num_workers as u128;
        let step = (num_batches / self.num_workers.max(1) as u128).min(u128::from(new)) as u64;
        Clock(epoch.saturating_mul(new).saturating_add(step))
    }

    /// Returns how many examples come twice if workers go on at `clock` after those that shared the data in the way
    /// `before` have arrived at `clocks`. An estimate, up to one for each worker and epoch.
    fn num_repeated(self, before: Self, clocks: &[Clock], clock: Clock) -> u64 {
        let taken = clocks.iter();
        let taken: u64 = taken.map(|clock| before.examples_of_worker(clock.0)).sum();
        let counted = self.examples_of_worker(clock.0);
        taken.saturating_sub(counted.saturating_mul(self.num_workers as u64))
    }
}

/// Where an earlier process of this training had arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resumed {
    /// The version of the weights.
    pub version: Version,
    /// How many gradients had been applied.
    pub num_applied: u64,
    /// How many gradients had been settled: applied, dropped as late, or refused.
    pub num_settled: u64,
    /// How many examples the batches of all these gradients had together, up to one for each worker and epoch. An
    /// estimate if the number of workers has changed.
    pub num_examples: u64,
}

/// What a checkpoint must be like, so that a training can go on from it.
pub(crate) struct Terms<'a> {
    pub(crate) layout: &'a Layout,
    pub(crate) facts: &'a Facts,
    /// `None`: the workers get their data from elsewhere.
    pub(crate) dealing: Option<Dealing>,
}

impl Terms<'_> {
    fn accept(&self, checkpoint: &Checkpoint) -> Result<(), String> {
        checkpoint.check_layout(self.layout)?;
        let mut facts = self.facts.iter();
        facts.try_for_each(|(name, here)| match checkpoint.facts().get(name) {
            Some(there) if there == here => Ok(()),
            Some(there) => Err(format!("{name} is `{there}` there, and `{here}` here")),
            None => Err(format!(
                "it does not say what {name} is, which is `{here}` here"
            )),
        })
    }

    /// Lets the workers go on at the right batches.
    fn deal(&self, found: Found) -> Checkpoint {
        match self.dealing {
            Some(dealing) => deal_again(found.checkpoint, dealing),
            None => found.checkpoint,
        }
    }
}

/// Opens the directory for checkpoints. If the training resumes, also returns the checkpoint from which it
/// goes on. `rule` is a new one, as the servers'.
pub(crate) fn open(
    config: Option<CheckpointConfig>,
    rule: Box<dyn UpdateRule>,
    terms: &Terms<'_>,
) -> Result<(Checkpoints, Option<Checkpoint>), CheckpointError> {
    let Some(config) = config else {
        return Ok((Checkpoints::off(), None));
    };
    let is_resumed = config.resume;
    let (checkpoints, found) = Checkpoints::open(config, rule, |found| terms.accept(found))?;
    let facts = terms.facts.iter();
    let facts = facts.map(|(name, value)| (name, value.to_owned()));
    let dealing = terms.dealing;
    let num_workers = dealing.map(|dealing| (NUM_WORKERS, dealing.num_workers.to_string()));
    let facts = facts.chain(num_workers);
    let checkpoints = facts.fold(checkpoints, |all, (name, value)| all.with_fact(name, value));
    if is_resumed {
        log_found(found.as_ref());
    }
    Ok((checkpoints, found.map(|found| terms.deal(found))))
}

/// Returns the newest checkpoint of this same training. `rule` is a new one, as the servers'.
pub(crate) fn again(
    checkpoints: &mut Checkpoints,
    rule: Box<dyn UpdateRule>,
    terms: &Terms<'_>,
) -> Result<Option<Checkpoint>, CheckpointError> {
    let found = checkpoints.newest(rule, |found| terms.accept(found))?;
    Ok(found.map(|found| terms.deal(found)))
}

/// Says from which checkpoint a run goes on.
fn log_found(found: Option<&Found>) {
    match found {
        Some(found) => {
            let (path, version) = (found.path.display(), found.checkpoint.version());
            tracing::info!(%path, %version, "going on from a checkpoint");
        }
        None => tracing::info!("there is no checkpoint yet; starting from the beginning"),
    }
}

/// Lets the workers go on at the right batches if there are more or fewer of them now.
fn deal_again(checkpoint: Checkpoint, dealing: Dealing) -> Checkpoint {
    let before = checkpoint.facts().get(NUM_WORKERS);
    let before = before.and_then(|number| number.parse().ok());
    let before = before
        .filter(|&number| number > 0)
        .unwrap_or(dealing.num_workers);
    if before == dealing.num_workers {
        return checkpoint;
    }
    let clocks = (0..before).map(|rank| checkpoint.next_clock(worker(rank)));
    let clocks: Vec<Clock> = clocks.collect();
    // A worker that was ahead had used some examples of the later batches already.
    let slowest = clocks.iter().copied().min().unwrap_or_default();
    let before = Dealing {
        num_workers: before,
        ..dealing
    };
    let clock = dealing.clock_after(before, slowest);
    let num_repeated = dealing.num_repeated(before, &clocks, clock);
    let (before, now) = (before.num_workers, dealing.num_workers);
    tracing::info!(before, now, %clock, num_repeated, "another number of workers; some examples may come twice");
    checkpoint.restart_workers_at(clock)
}

fn worker(rank: usize) -> WorkerId {
    WorkerId(u32::try_from(rank).unwrap_or(u32::MAX))
}

impl Resumed {
    pub(crate) fn of<'a>(
        version: Version,
        workers: impl Iterator<Item = &'a WorkerStatus> + Clone,
        dealing: Dealing,
    ) -> Self {
        let settled = workers.clone().map(WorkerStatus::num_settled);
        Self {
            version,
            num_applied: workers.map(|worker| worker.num_applied).sum(),
            num_settled: settled.clone().sum(),
            num_examples: settled.map(|steps| dealing.examples_of_worker(steps)).sum(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dealing(num_workers: usize, batch_size: usize, num_examples: usize) -> Dealing {
        Dealing {
            num_workers,
            batch_size,
            num_examples,
        }
    }

    /// The examples of an epoch that come before `clock`, in the order of the epoch.
    fn num_before(dealing: Dealing, clock: Clock) -> u64 {
        let step = clock.0 % dealing.steps_per_epoch();
        step * (dealing.num_workers * dealing.batch_size) as u64
    }

    #[test]
    fn another_number_of_workers_goes_on_at_the_same_place_of_the_epoch() {
        let (two, four, three) = (
            dealing(2, 10, 1200),
            dealing(4, 10, 1200),
            dealing(3, 10, 1200),
        );
        // 60 steps an epoch of two workers, 30 of four, 40 of three.
        assert_eq!(four.clock_after(two, Clock(60 + 20)), Clock(30 + 10));
        assert_eq!(two.clock_after(four, Clock(30 + 10)), Clock(60 + 20));
        assert_eq!(three.clock_after(two, Clock(60 + 20)), Clock(40 + 13));
        for step in 0..60 {
            for other in [four, three] {
                let clock = other.clock_after(two, Clock(step));
                let (before, after) = (num_before(two, Clock(step)), num_before(other, clock));
                assert!(after <= before, "no example is left out");
                let round = (other.num_workers * other.batch_size) as u64;
                assert!(before - after < round, "less than a round comes twice");
            }
        }
    }

    #[test]
    fn examples_that_come_twice_are_counted() {
        let (two, four) = (dealing(2, 10, 1200), dealing(4, 10, 1200));
        let repeated = |clocks: [u64; 2]| {
            let clocks = clocks.map(Clock);
            let clock = four.clock_after(two, clocks[0].min(clocks[1]));
            four.num_repeated(two, &clocks, clock)
        };
        assert_eq!(repeated([20, 20]), 0);
        // One was three batches ahead.
        assert_eq!(repeated([20, 23]), 30);
        // The round of four begins two batches earlier.
        assert_eq!(repeated([21, 21]), 20);
        assert_eq!(repeated([60 + 20, 60 + 23]), 30);
    }

    #[test]
    fn an_epoch_that_is_shorter_now_ends() {
        let (one, eight) = (dealing(1, 10, 100), dealing(8, 10, 100));
        assert_eq!(eight.clock_after(one, Clock(9)), Clock(1));
        // The second step of eight has the last 20 examples.
        assert_eq!(one.clock_after(eight, Clock(1)), Clock(8));
        assert_eq!(one.clock_after(eight, Clock(2)), Clock(10));
    }

    #[test]
    fn the_last_step_of_an_epoch_has_the_rest_if_it_is_enough_for_all() {
        for (num_examples, steps, in_three_epochs) in [
            (80, 2, 240 / 4),
            (83, 2, 240 / 4),
            (84, 3, 3 * 84 / 4),
            (119, 3, 3 * 119 / 4),
            (120, 3, 3 * 120 / 4),
        ] {
            let four = dealing(4, 10, num_examples);
            assert_eq!(four.steps_per_epoch(), steps, "{num_examples}");
            assert_eq!(
                four.examples_of_worker(3 * steps),
                in_three_epochs,
                "{num_examples}"
            );
            assert_eq!(four.examples_of_worker(3 * steps + 1), in_three_epochs + 10);
        }
    }
}
