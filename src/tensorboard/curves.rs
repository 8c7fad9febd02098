//! Makes points of curves from the events of a training. Pure.
//!
//! Steps of different workers come in the order in which the driver learns of them. TensorBoard wants the points of
//! a tag in the order of their steps. So the losses of an update wait until no more of them can come.

use std::collections::BTreeMap;

use ps_actors::ids::Version;
use ps_actors::server::Histogram;

use super::record::When;
use crate::observe::{Change, Controlled, Event, RunStarted, SettledStep, StepOutcome, Tally};

/// How long losses wait for those of other workers, in seconds. Times of events may go back by up to a second.
const WAIT: f64 = 1.5;

/// How often there are points of what changes with time, in seconds.
const TICK: f64 = 1.0;

/// After how many points of a tag there is one for half as many updates.
const POINTS: u64 = 4096;

/// A histogram is as large as many points.
const HISTOGRAMS: u64 = 256;

/// Makes the points of one run.
#[derive(Debug)]
pub(super) struct Curves {
    /// When the run started, in seconds since 1970.
    began: f64,
    tally: Tally,
    /// The losses of updates that may not be complete.
    waiting: BTreeMap<u64, Losses>,
    /// The losses of updates since the last point.
    losses: Losses,
    /// The time of the latest point of the losses. Workers learn of their updates in any order, and a curve against time
    /// must not go back.
    loss_time: f64,
    loss: Series,
    evaluation_loss: Series,
    accuracy: Series,
    learning_rate: Series,
    rate: Series,
    staleness: Series,
    /// The staleness of the gradients since the last histogram.
    stale: Histogram,
    /// The learning rate, as far as it is known.
    latest_rate: f64,
    next_tick: f64,
    /// When the latest gradient was settled.
    latest_step: f64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Losses {
    /// When the first of them was settled, in seconds since the run started.
    time: f64,
    sum: f64,
    num: u64,
}

impl Losses {
    fn add(&mut self, other: Self) {
        self.time = match self.num {
            0 => other.time,
            _ => self.time.max(other.time),
        };
        self.sum += other.sum;
        self.num += other.num;
    }
}

/// A tag: decides which updates get a point.
#[derive(Debug)]
struct Series {
    tag: &'static str,
    /// The step of the last point.
    last: Option<u64>,
    /// Every so many updates get a point.
    every: u64,
    num_passed: u64,
    num_points: u64,
    /// After how many points `every` doubles.
    doubles_after: u64,
}

impl Series {
    fn new(tag: &'static str, doubles_after: u64) -> Self {
        Self {
            tag,
            last: None,
            every: 1,
            num_passed: 0,
            num_points: 0,
            doubles_after,
        }
    }

    /// Whether there is to be a point at this step. It must be later than that of the last one.
    fn takes(&mut self, step: u64, is_last: bool) -> bool {
        if self.last.is_some_and(|last| step <= last) {
            return false;
        }
        self.num_passed += 1;
        if self.num_passed < self.every && !is_last {
            return false;
        }
        self.num_passed = 0;
        self.last = Some(step);
        self.num_points += 1;
        if self.num_points.is_multiple_of(self.doubles_after) {
            self.every = self.every.saturating_mul(2);
        }
        true
    }

    /// The steps after this one come again.
    fn go_back(&mut self, step: u64) {
        self.last = self.last.map(|last| last.min(step));
    }
}

impl Curves {
    pub(super) fn new(started: &RunStarted) -> Self {
        let scalar = |tag| Series::new(tag, POINTS);
        Self {
            began: started.unix_time,
            tally: Tally::default(),
            waiting: BTreeMap::new(),
            losses: Losses::default(),
            loss_time: 0.0,
            loss: scalar("loss/batches"),
            evaluation_loss: scalar("loss/evaluation"),
            accuracy: scalar("accuracy"),
            learning_rate: scalar("learning_rate"),
            rate: scalar("gradients_per_second"),
            staleness: Series::new("staleness", HISTOGRAMS),
            stale: Histogram::default(),
            latest_rate: started.settings.learning_rate,
            next_tick: TICK,
            latest_step: 0.0,
        }
    }

    fn at(&self, time: f64, step: u64) -> When {
        When {
            unix_time: self.began + time,
            step,
        }
    }

    /// Takes in an event, and adds the records that are due.
    pub(super) fn observe(&mut self, event: &Event, out: &mut Vec<u8>) {
        self.tally.count(event);
        match event {
            Event::RunStarted(started) => {
                let first = started.first_version.0;
                self.at(0.0, first).add_header(out);
                if first > 0 {
                    self.go_on(0.0, first, out);
                }
                self.tick(0.0, false, out);
            }
            Event::Step(step) if step.outcome == StepOutcome::Applied => self.take(step),
            Event::Evaluated(evaluated) => {
                let when = self.at(evaluated.time, evaluated.version.0);
                if self.evaluation_loss.takes(when.step, evaluated.is_final) {
                    when.add_scalar(self.evaluation_loss.tag, evaluated.loss, out);
                    for (name, &value) in &evaluated.metrics {
                        when.add_scalar(&format!("metrics/{name}"), value, out);
                    }
                }
                if let Some(accuracy) = evaluated.accuracy
                    && self.accuracy.takes(when.step, evaluated.is_final)
                {
                    when.add_scalar(self.accuracy.tag, accuracy, out);
                }
            }
            Event::ServersSeen(seen) => self.latest_rate = seen.learning_rate,
            // Nobody looks at the servers of a driver's own loop.
            Event::Controlled(Controlled {
                change: Change::LearningRate { learning_rate },
                ..
            }) => self.latest_rate = *learning_rate,
            Event::ServersRecovered(recovered) => {
                self.settle(f64::INFINITY, out);
                self.losses = Losses::default();
                self.go_on(recovered.time, recovered.version.0, out);
            }
            Event::RunEnded(end) => {
                self.settle(f64::INFINITY, out);
                self.add_loss(self.tally.version.0, true, out);
                self.tick(end.time, true, out);
                return;
            }
            _ => {}
        }
        let now = self.tally.seconds;
        self.settle(now - WAIT, out);
        if now >= self.next_tick {
            self.next_tick = now + TICK;
            self.tick(now, false, out);
        }
    }

    /// The weights are those of this step again. What came after it is dropped.
    fn go_on(&mut self, time: f64, step: u64, out: &mut Vec<u8>) {
        self.at(time, step.saturating_add(1)).add_restart(out);
        self.tally.version = Version(step);
        for series in [
            &mut self.loss,
            &mut self.evaluation_loss,
            &mut self.accuracy,
            &mut self.learning_rate,
            &mut self.rate,
            &mut self.staleness,
        ] {
            series.go_back(step);
        }
    }

    fn take(&mut self, step: &SettledStep) {
        self.stale.record(step.staleness);
        self.latest_step = self.latest_step.max(step.time);
        let waiting = self.waiting.entry(step.version.0).or_insert(Losses {
            time: step.time,
            ..Losses::default()
        });
        waiting.sum += f64::from(step.loss);
        waiting.num += 1;
    }

    /// Adds points for the updates whose losses have waited since `until`.
    fn settle(&mut self, until: f64, out: &mut Vec<u8>) {
        while let Some(entry) = self.waiting.first_entry() {
            if entry.get().time > until {
                break;
            }
            let (step, losses) = entry.remove_entry();
            self.losses.add(losses);
            self.add_loss(step, false, out);
        }
    }

    fn add_loss(&mut self, step: u64, is_last: bool, out: &mut Vec<u8>) {
        if self.losses.num > 0 && self.loss.takes(step, is_last) {
            let losses = std::mem::take(&mut self.losses);
            let mean = losses.sum / losses.num as f64;
            self.loss_time = self.loss_time.max(losses.time);
            self.at(self.loss_time, step)
                .add_scalar(self.loss.tag, mean, out);
        }
    }

    /// Adds points of what changes with time.
    fn tick(&mut self, time: f64, is_last: bool, out: &mut Vec<u8>) {
        let when = self.at(time, self.tally.version.0);
        if self.latest_rate.is_finite() && self.learning_rate.takes(when.step, is_last) {
            when.add_scalar(self.learning_rate.tag, self.latest_rate, out);
        }
        if self.tally.num_applied() == 0 {
            return;
        }
        if self.rate.takes(when.step, is_last) {
            // The end may come long after the last step.
            let until = if is_last { self.latest_step } else { time };
            let rate = self.tally.gradients_per_second(until);
            when.add_scalar(self.rate.tag, rate, out);
        }
        if self.stale.num_values() > 0 && self.staleness.takes(when.step, is_last) {
            when.add_histogram(self.staleness.tag, self.stale.counts(), out);
            self.stale = Histogram::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::record::reading::{Read, What, read};
    use super::*;
    use crate::observe::{
        Evaluated, RunEnded, ServersRecovered, Settings, Versions, testing::step as settled,
    };

    fn started(first_version: u64) -> Event {
        Event::RunStarted(Box::new(RunStarted {
            time: 0.0,
            unix_time: 1000.0,
            settings: Settings {
                learning_rate: 0.5,
                ..Settings::default()
            },
            versions: Versions::here(),
            first_version: Version(first_version),
        }))
    }

    /// A step of a worker whose gradient made this version.
    fn step(worker: u32, version: u64, time: f64, loss: f32) -> Event {
        let Event::Step(step) = settled(worker, version - 1, time) else {
            unreachable!("it is a step");
        };
        Event::Step(SettledStep { loss, ..step })
    }

    fn ended(time: f64) -> Event {
        Event::RunEnded(Box::new(RunEnded::new(time, None)))
    }

    fn records(events: impl IntoIterator<Item = Event>) -> Vec<Read> {
        let (mut out, mut curves) = (Vec::new(), None::<Curves>);
        for event in events {
            let curves = curves.get_or_insert_with(|| match &event {
                Event::RunStarted(started) => Curves::new(started),
                event => panic!("no start: {event:?}"),
            });
            curves.observe(&event, &mut out);
        }
        read(&out)
    }

    /// The step, the time and the value of each point.
    fn points(records: &[Read], wanted: &str) -> Vec<(u64, f64, f32)> {
        let of = |read: &Read| match &read.what {
            What::Scalar(tag, value) if tag == wanted => {
                Some((read.when.step, read.when.unix_time, *value))
            }
            _ => None,
        };
        records.iter().filter_map(of).collect()
    }

    fn evaluated(time: f64, version: u64, is_final: bool) -> Event {
        Event::Evaluated(Evaluated {
            time,
            seconds: 0.1,
            version: Version(version),
            loss: 0.25,
            accuracy: Some(0.75),
            metrics: BTreeMap::new(),
            is_final,
        })
    }

    #[test]
    fn the_times_of_losses_do_not_go_back() {
        // The worker of update 1 learned of it later.
        let records = records([
            started(0),
            step(1, 2, 0.1, 1.0),
            step(0, 1, 0.2, 1.0),
            ended(0.3),
        ]);
        let times = points(&records, "loss/batches");
        let times: Vec<(u64, f64)> = times
            .into_iter()
            .map(|(step, time, _)| (step, time))
            .collect();
        assert_eq!(times, [(1, 1000.2), (2, 1000.2)]);
    }

    #[test]
    fn the_losses_of_one_update_are_one_point_and_points_are_in_order() {
        // Worker 1 is told of later.
        let records = records([
            started(0),
            step(0, 1, 0.1, 1.0),
            step(0, 2, 0.2, 2.0),
            step(0, 4, 0.3, 4.0),
            step(1, 1, 0.1, 3.0),
            step(1, 3, 0.2, 5.0),
            evaluated(0.4, 4, true),
            ended(0.5),
        ]);
        assert_eq!(records[0].what, What::Header("brain.Event:2".to_owned()));
        let losses: Vec<(u64, f32)> = points(&records, "loss/batches")
            .iter()
            .map(|&(step, _, loss)| (step, loss))
            .collect();
        assert_eq!(losses, [(1, 2.0), (2, 2.0), (3, 5.0), (4, 4.0)]);
        assert_eq!(points(&records, "accuracy"), [(4, 1000.4, 0.75)]);
        assert_eq!(points(&records, "loss/evaluation"), [(4, 1000.4, 0.25)]);
        let rates = points(&records, "learning_rate");
        assert_eq!(rates, [(0, 1000.0, 0.5), (4, 1000.5, 0.5)]);
        assert_eq!(points(&records, "gradients_per_second").len(), 1);
        // Of clocks 0, 1, 3, 0, 2, modulo 3.
        let What::Histogram(tag, counts) = &records.last().unwrap().what else {
            panic!("no histogram: {records:?}");
        };
        assert_eq!(
            (tag.as_str(), &counts[..]),
            ("staleness", &[3.0, 1.0, 1.0][..])
        );
        assert!(!records.iter().any(|read| read.what == What::Restart));
    }

    #[test]
    fn points_come_while_the_training_goes_on() {
        let steps = (1..=100).map(|version| step(0, version, version as f64 / 10.0, 1.0));
        let records = records([started(0)].into_iter().chain(steps));
        let losses = points(&records, "loss/batches");
        let last = losses.last().unwrap();
        assert!(last.0 >= 80, "{last:?}");
        assert!(points(&records, "gradients_per_second").len() >= 8);
    }

    #[test]
    fn the_learning_rate_is_the_one_that_somebody_has_set() {
        let change = Change::LearningRate {
            learning_rate: 0.125,
        };
        let records = records([
            started(0),
            step(0, 1, 0.1, 1.0),
            Event::Controlled(Controlled { time: 0.2, change }),
            step(0, 2, 0.3, 1.0),
            ended(0.5),
        ]);
        let rates = points(&records, "learning_rate");
        assert_eq!(rates, [(0, 1000.0, 0.5), (2, 1000.5, 0.125)]);
    }

    #[test]
    fn a_run_that_goes_on_says_which_points_are_no_more() {
        let restarts = |records: &[Read]| {
            let restarts = records.iter().filter(|read| read.what == What::Restart);
            restarts.map(|read| read.when.step).collect::<Vec<_>>()
        };
        // The checkpoint has update 50, so only the points after it are no more.
        let records_of = [started(50), step(0, 51, 0.1, 1.0), ended(0.2)];
        let resumed = records(records_of);
        assert_eq!(restarts(&resumed), [51]);
        assert_eq!(points(&resumed, "loss/batches")[0].0, 51);

        let recovered = Event::ServersRecovered(ServersRecovered {
            time: 0.5,
            version: Version(1),
            seconds: 0.1,
        });
        let records = records([
            started(0),
            step(0, 1, 0.1, 1.0),
            step(0, 2, 0.2, 2.0),
            recovered,
            step(0, 2, 0.6, 3.0),
            ended(0.7),
        ]);
        assert_eq!(restarts(&records), [2]);
        let losses: Vec<(u64, f32)> = points(&records, "loss/batches")
            .iter()
            .map(|&(step, _, loss)| (step, loss))
            .collect();
        assert_eq!(losses, [(1, 1.0), (2, 2.0), (2, 3.0)]);
    }

    #[test]
    fn many_updates_get_few_points_and_no_loss_is_left_out() {
        let num_updates = 200_000;
        let steps = (1..=num_updates).map(|version| {
            let loss = if version > num_updates / 2 { 1.0 } else { 3.0 };
            step(0, version, version as f64 / 1000.0, loss)
        });
        let last = num_updates as f64 / 1000.0;
        let records = records([started(0)].into_iter().chain(steps).chain([ended(last)]));
        let losses = points(&records, "loss/batches");
        // 4,096 points each for every update, every second one, every fourth, ...
        assert!(
            (4096 * 5..4096 * 6).contains(&losses.len()),
            "{}",
            losses.len()
        );
        assert_eq!(losses.last().unwrap().0, num_updates);
        assert!(losses.is_sorted_by(|one, other| one.0 < other.0));
        let mean = |losses: &[(u64, f64, f32)]| {
            let (mut sum, mut before) = (0.0, 0);
            for &(step, _, loss) in losses {
                sum += f64::from(loss) * (step - before) as f64;
                before = step;
            }
            sum / before as f64
        };
        assert!((mean(&losses) - 2.0).abs() < 1e-6, "{}", mean(&losses));
    }
}
