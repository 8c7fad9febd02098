//! What a run under a plan of faults did.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

/// How often a kind of fault was planned, and how often it happened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FaultCount {
    /// How often the plan names it. `None` for faults that are random, such as lost messages.
    pub num_planned: Option<u64>,
    /// How often it happened.
    pub num_happened: u64,
}

/// What was done in a run.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Work {
    /// How many gradients were applied.
    pub num_applied: u64,
    /// The time of the run.
    pub time: Duration,
}

impl Work {
    /// Returns how many gradients were applied per second.
    #[must_use]
    pub fn per_second(&self) -> f64 {
        self.num_applied as f64 / self.time.as_secs_f64().max(f64::MIN_POSITIVE)
    }
}

/// What a run under a [`Plan`](super::Plan) of faults did.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// How often each kind of fault was planned and happened, by the name of the kind.
    pub faults: BTreeMap<&'static str, FaultCount>,
    /// How many gradients the run applied, and how long it took.
    pub work: Work,
    /// How many gradients were acknowledged as applied and are not in the weights. `None` if the executor
    /// cannot know.
    pub num_lost: Option<u64>,
    /// How many gradients are in the weights more than once. `None` if the executor cannot know.
    pub num_doubled: Option<u64>,
    /// How many gradients were made again, because servers went on from a checkpoint that did not have them.
    pub num_repeated: u64,
    /// The times of the recoveries. Each is the time from a fault to the next gradient that is applied. After a
    /// loss of servers, the new servers must apply it; after a fault of a worker, it must be a gradient of this
    /// worker. The simulator reports only recoveries from lost servers.
    pub recoveries: Vec<Duration>,
    /// The same run without faults, if there was one.
    pub control: Option<Work>,
    /// Whether the weights have the same bits as those of the run without faults, if they should.
    pub has_same_weights: Option<bool>,
}

impl Report {
    /// Notes that a fault of the plan will happen.
    pub fn plan(&mut self, kind: &'static str) {
        *self.count(kind).num_planned.get_or_insert(0) += 1;
    }

    /// Notes that a fault happened.
    pub fn happened(&mut self, kind: &'static str) {
        self.count(kind).num_happened += 1;
    }

    /// Notes that a random fault happened so often.
    pub fn happened_often(&mut self, kind: &'static str, num: u64) {
        self.count(kind).num_happened += num;
    }

    /// Whether every fault of the plan happened, nothing is lost or doubled as far as is known, and the weights are
    /// those of the run without faults, if they should be.
    #[must_use]
    pub fn is_good(&self) -> bool {
        let is_none = |number: Option<u64>| number.is_none_or(|number| number == 0);
        self.is_complete()
            && is_none(self.num_lost)
            && is_none(self.num_doubled)
            && self.has_same_weights != Some(false)
    }

    fn count(&mut self, kind: &'static str) -> &mut FaultCount {
        self.faults.entry(kind).or_default()
    }

    /// Whether every fault of the plan happened.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        let mut counts = self.faults.values();
        counts.all(|count| count.num_planned.is_none_or(|n| count.num_happened >= n))
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<20} {:>8} {:>9}", "fault", "planned", "happened")?;
        for (kind, count) in &self.faults {
            let planned = count.num_planned.map_or("-".to_owned(), |n| n.to_string());
            writeln!(f, "{kind:<20} {planned:>8} {:>9}", count.num_happened)?;
        }
        let known = |number: Option<u64>| number.map_or("not known".to_owned(), |n| n.to_string());
        writeln!(
            f,
            "gradients: {} applied, lost: {}, doubled: {}",
            self.work.num_applied,
            known(self.num_lost),
            known(self.num_doubled)
        )?;
        if self.num_repeated > 0 {
            let num = self.num_repeated;
            writeln!(
                f,
                "made again: {num}, which no checkpoint had when servers were lost"
            )?;
        }
        if !self.recoveries.is_empty() {
            let mut sorted = self.recoveries.clone();
            sorted.sort_unstable();
            let (median, longest) = (sorted[sorted.len() / 2], sorted[sorted.len() - 1]);
            writeln!(
                f,
                "recoveries: {}, median {median:.3?}, longest {longest:.3?}",
                sorted.len()
            )?;
        }
        write!(f, "throughput: {:.1} gradients/s", self.work.per_second())?;
        if let Some(control) = &self.control {
            let share = 100.0 * self.work.per_second() / control.per_second();
            let control = control.per_second();
            write!(f, ", {share:.0} % of {control:.1} without faults")?;
        }
        match self.has_same_weights {
            Some(true) => write!(f, "\nthe weights have the bits of the run without faults"),
            Some(false) => write!(
                f,
                "\nTHE WEIGHTS DIFFER from those of the run without faults"
            ),
            None => Ok(()),
        }
    }
}
