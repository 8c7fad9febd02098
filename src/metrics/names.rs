//! The names of all metrics: one table, which the feed, the docs and the Grafana dashboard are checked against.

/// What kind of metric it is.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Kind {
    /// A number that only rises while the process runs.
    Counter,
    /// The current value of a number that may rise and fall.
    Gauge,
    /// Counts of values by buckets, which have these upper bounds.
    Histogram(&'static [f64]),
}

impl Kind {
    /// Returns the word that Prometheus has for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram(_) => "histogram",
        }
    }
}

/// One metric: a name, which has a series for each combination of its labels.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Metric {
    /// The name, with its unit.
    pub name: &'static str,
    /// What kind of metric it is.
    pub kind: Kind,
    /// The names of its labels.
    pub labels: &'static [&'static str],
    /// What it says, in one sentence.
    pub help: &'static str,
}

/// From 0.5 ms to 30 s: a small model on one machine, and a large one over a slow network.
const SECONDS: &[f64] = &[
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
];

/// From 10 ms to 10 minutes: what happens now and then, and may be large.
const LONG_SECONDS: &[f64] = &[
    0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 600.0,
];

const UPDATES: &[f64] = &[0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0];

const NORMS: &[f64] = &[0.001, 0.01, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 100.0, 1000.0];

macro_rules! metrics {
    ($($constant:ident = $name:literal $kind:expr, [$($label:literal),*], $help:literal;)*) => {
        $(pub(super) const $constant: Metric = Metric {
            name: $name,
            kind: $kind,
            labels: &[$($label),*],
            help: $help,
        };)*

        /// All metrics.
        pub const ALL: &[Metric] = &[$($constant),*];
    };
}

metrics! {
    BUILD = "ps_build_info" Kind::Gauge, ["version", "burn"],
        "1, with the versions of ps and of burn.";
    RUN = "ps_run_info" Kind::Gauge, ["name", "model", "consistency", "optimizer", "device"],
        "1, with the settings that the training began with; 0 when it has ended and another one has begun.";
    RUNNING = "ps_running" Kind::Gauge, [],
        "1 while the training runs, 0 when it has ended.";
    STARTED = "ps_run_start_time_seconds" Kind::Gauge, [],
        "When the training began, in seconds since 1970.";
    STEPS_PLANNED = "ps_steps_planned" Kind::Gauge, [],
        "How many steps all workers take together, with those before a resume.";
    STEPS_DONE = "ps_steps_done" Kind::Gauge, [],
        "How many of these steps are done.";
    GRADIENTS = "ps_gradients_total" Kind::Counter, ["worker", "outcome"],
        "Settled gradients: applied, late, refused, or missed if only the servers know of them.";
    EXAMPLES = "ps_examples_total" Kind::Counter, ["worker"],
        "Examples in the batches of the settled gradients.";
    STALENESS = "ps_staleness_updates" Kind::Histogram(UPDATES), [],
        "Updates between the weights that an applied gradient was computed on and its own update.";
    NORM = "ps_gradient_norm" Kind::Histogram(NORMS), [],
        "The Euclidean norms of the gradients, without those that are not finite.";
    STEP = "ps_step_seconds" Kind::Histogram(SECONDS), ["part"],
        "How long the parts of a step took: data, compute, wire, waiting, apply.";
    WORKER_STEP = "ps_worker_step_seconds" Kind::Gauge, ["worker", "part"],
        "How long the parts of a worker's step take: the mean of about the latest 20 steps.";
    LOSS = "ps_loss" Kind::Gauge, [],
        "The mean loss of about the latest 20 batches.";
    EVALUATION_LOSS = "ps_evaluation_loss" Kind::Gauge, [],
        "The mean loss of the test data in the latest evaluation.";
    ACCURACY = "ps_evaluation_accuracy_ratio" Kind::Gauge, [],
        "The part of right answers in the latest evaluation, from 0 to 1.";
    EVALUATION = "ps_evaluation_seconds" Kind::Histogram(LONG_SECONDS), [],
        "How long the evaluations took.";
    LEARNING_RATE = "ps_learning_rate" Kind::Gauge, [],
        "The learning rate of the next update.";
    WORKERS = "ps_workers" Kind::Gauge, ["state"],
        "Workers that are live or lost.";
    AWAITED = "ps_awaited_workers" Kind::Gauge, [],
        "Workers that the waiting pushes wait for.";
    NODES = "ps_nodes" Kind::Gauge, [],
        "Nodes that have joined: all processes but the driver.";
    VERSION = "ps_server_version" Kind::Gauge, ["server"],
        "The version of a server's weights. After a recovery it is lower than before.";
    WEIGHTS = "ps_server_weights_bytes" Kind::Gauge, ["server"],
        "The size of the weights that a server holds.";
    STAGED = "ps_server_staged_gradients" Kind::Gauge, ["server"],
        "Gradients that wait at a server for a decision.";
    WAITING = "ps_server_waiting_calls" Kind::Gauge, ["server"],
        "Calls that wait at a server for their answers.";
    PENDING = "ps_pending_pushes" Kind::Gauge, [],
        "Pushes that wait for their round, or for slower workers.";
    CHECKPOINTS = "ps_checkpoints_total" Kind::Counter, ["outcome"],
        "Checkpoints: saved, or failed if one could not be written or was skipped.";
    CHECKPOINT = "ps_checkpoint_seconds" Kind::Histogram(LONG_SECONDS), [],
        "How long it took to write a checkpoint.";
    FAULTS = "ps_faults_total" Kind::Counter, ["kind"],
        "Losses: worker_lost, node_lost, servers_lost.";
    MOVES = "ps_worker_moves_total" Kind::Counter, [],
        "How often a worker went on at another node.";
    RECOVERY = "ps_recovery_seconds" Kind::Histogram(LONG_SECONDS), [],
        "How long it took from the loss of servers until the workers could go on.";
    SKIPPED = "ps_events_skipped_total" Kind::Counter, [],
        "Events that are not counted here, because there were too many.";
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_table_in_the_docs_is_this_one() {
        let rows = ALL.iter().map(|metric| {
            let labels = metric.labels.iter().map(|label| format!("`{label}`"));
            let labels = labels.collect::<Vec<_>>().join(", ");
            let (name, kind) = (metric.name, metric.kind.name());
            format!("| `{name}` | {kind} | {labels} | {} |", metric.help)
        });
        let docs = include_str!("../../docs/metrics.md");
        let in_docs = docs.lines().filter(|line| line.starts_with("| `ps_"));
        let in_docs: Vec<&str> = in_docs.collect();
        assert_eq!(rows.collect::<Vec<_>>(), in_docs);
    }

    #[test]
    fn names_have_their_units_and_are_there_once() {
        let names: BTreeSet<&str> = ALL.iter().map(|metric| metric.name).collect();
        assert_eq!(names.len(), ALL.len());
        for metric in ALL {
            let name = metric.name;
            assert!(name.starts_with("ps_"), "{name}");
            let is_counter = metric.kind == Kind::Counter;
            assert_eq!(name.ends_with("_total"), is_counter, "{name}");
            if let Kind::Histogram(buckets) = metric.kind {
                assert!(buckets.is_sorted_by(|one, other| one < other), "{name}");
            }
        }
    }

    /// Returns all names in the queries of the dashboard, without the suffixes of histograms.
    fn names_in_dashboard() -> BTreeSet<String> {
        let dashboard = include_str!("../../deploy/grafana/ps.json");
        let dashboard: serde_json::Value = serde_json::from_str(dashboard).unwrap();
        let mut names = BTreeSet::new();
        for panel in dashboard["panels"].as_array().unwrap() {
            for target in panel["targets"].as_array().unwrap() {
                let query = target["expr"].as_str().unwrap();
                let words = query.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
                for word in words.filter(|word| word.starts_with("ps_")) {
                    let suffixes = ["_bucket", "_sum", "_count"].iter();
                    let mut bases = suffixes.filter_map(|suffix| word.strip_suffix(suffix));
                    names.insert(bases.next().unwrap_or(word).to_owned());
                }
            }
        }
        names
    }

    #[test]
    fn the_dashboard_uses_each_of_these_names_and_no_other() {
        let names: BTreeSet<String> = ALL.iter().map(|metric| metric.name.to_owned()).collect();
        assert_eq!(names_in_dashboard(), names);
    }

    #[test]
    fn the_dashboard_groups_by_labels_that_are_there() {
        let labels: BTreeSet<&str> = ALL
            .iter()
            .flat_map(|metric| metric.labels)
            .copied()
            .collect();
        let dashboard = include_str!("../../deploy/grafana/ps.json");
        let mut num_seen = 0;
        for part in dashboard.split("sum by (").skip(1) {
            let (groups, _) = part.split_once(')').unwrap();
            for group in groups.split(", ") {
                assert!(group == "le" || labels.contains(group), "{group}");
                num_seen += 1;
            }
        }
        for part in dashboard.split("{{").skip(1) {
            let (label, _) = part.split_once("}}").unwrap();
            assert!(labels.contains(label), "{label}");
            num_seen += 1;
        }
        assert!(num_seen > 20, "{num_seen}");
    }
}
