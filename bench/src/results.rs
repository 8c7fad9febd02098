//! What all runs showed: kept as JSON, and asked for summaries and ratios.

use std::collections::BTreeMap;

use ps::prelude::default_device_name;
use serde::Serialize;

use crate::contenders::{Contender, Metric, STARTUP_BELOW_S, TARGETS, Work};
use crate::measure::Metrics;
use crate::stats::{Summary, summary, times_better};

/// All runs of one contender, by round.
#[derive(Debug)]
pub(crate) struct Runs {
    pub(crate) contender: Contender,
    pub(crate) rounds: Vec<Result<Metrics, String>>,
}

impl Runs {
    /// One number per round; `None` where the run failed or has no such number.
    pub(crate) fn numbers(&self, key: &str) -> Vec<Option<f64>> {
        let number = |round: &Result<Metrics, String>| round.as_ref().ok()?.get(key).copied();
        self.rounds.iter().map(number).collect()
    }

    pub(crate) fn summary(&self, key: &str) -> Option<Summary> {
        summary(self.numbers(key).into_iter().flatten())
    }

    pub(crate) fn num_failed(&self) -> usize {
        self.rounds.iter().filter(|round| round.is_err()).count()
    }

    /// How many times better this is than `rival`.
    pub(crate) fn times_better(&self, rival: &Self, metric: &Metric) -> Option<Summary> {
        let (ours, theirs) = (self.numbers(metric.key), rival.numbers(metric.key));
        times_better(&ours, &theirs, metric.better)
    }
}

/// One work, done by all its contenders.
#[derive(Debug)]
pub(crate) struct Results {
    pub(crate) work: Work,
    pub(crate) runs: Vec<Runs>,
}

/// A target, and what there is beside it.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Verdict {
    pub(crate) what: String,
    pub(crate) wanted: String,
    pub(crate) measured: Option<Summary>,
    pub(crate) is_met: Option<bool>,
}

impl Results {
    pub(crate) fn new(work: Work, contenders: Vec<Contender>) -> Self {
        let runs = contenders.into_iter().map(|contender| Runs {
            contender,
            rounds: Vec::new(),
        });
        Self {
            work,
            runs: runs.collect(),
        }
    }

    pub(crate) fn ours(&self) -> impl Iterator<Item = &Runs> {
        self.runs.iter().filter(|runs| runs.contender.is_ours())
    }

    pub(crate) fn rivals(&self) -> impl Iterator<Item = &Runs> {
        self.runs.iter().filter(|runs| !runs.contender.is_ours())
    }

    /// The devices of ours, in order; `None` if there is nothing to choose.
    pub(crate) fn devices(&self) -> Vec<Option<&str>> {
        let mut devices: Vec<_> = self.ours().map(|runs| runs.contender.device()).collect();
        devices.dedup();
        devices
    }

    /// Compares with what we want to reach, on the default device.
    pub(crate) fn verdicts(&self) -> Vec<Verdict> {
        let mut verdicts = Vec::new();
        for target in TARGETS.iter().filter(|target| target.work == self.work) {
            let mut metrics = self.work.metrics().iter();
            let Some(metric) = metrics.find(|metric| metric.key == target.key) else {
                continue;
            };
            let mut rivals = self.rivals();
            let Some(rival) = rivals.find(|runs| runs.contender.name == target.rival) else {
                continue;
            };
            for ours in self.ours().filter(|runs| is_judged(runs, target.ours)) {
                let measured = ours.times_better(rival, metric);
                let (ours, rival) = (&ours.contender, &rival.contender);
                verdicts.push(Verdict {
                    what: format!("{}: {} beside {}", metric.title, ours.what, rival.what),
                    wanted: format!("at least {:.2} ×", target.at_least),
                    measured,
                    is_met: measured.map(|ratio| ratio.median >= target.at_least),
                });
            }
        }
        for ours in self.ours().filter(|runs| is_judged(runs, "ps-sync")) {
            let measured = ours.summary("startup_s");
            verdicts.push(Verdict {
                what: format!("start-up, s: {}", ours.contender.what),
                wanted: format!("below {STARTUP_BELOW_S} s"),
                measured,
                is_met: measured.map(|startup| startup.median < STARTUP_BELOW_S),
            });
        }
        verdicts
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        let contenders = self.runs.iter().map(|runs| {
            let rounds = runs.rounds.iter().map(|round| match round {
                Ok(metrics) => serde_json::json!(metrics),
                Err(error) => serde_json::json!({ "error": error }),
            });
            let metrics = self.work.metrics().iter();
            let summaries: BTreeMap<_, _> = metrics
                .filter_map(|metric| Some((metric.key, runs.summary(metric.key)?)))
                .collect();
            serde_json::json!({
                "name": runs.contender.name,
                "what": runs.contender.what,
                "is_ours": runs.contender.is_ours(),
                "arguments": runs.contender.arguments,
                "rounds": rounds.collect::<Vec<_>>(),
                "summaries": summaries,
                "ratios": self.ratios(runs),
            })
        });
        serde_json::json!({
            "work": self.work.title(),
            "contenders": contenders.collect::<Vec<_>>(),
            "targets": self.verdicts(),
        })
    }

    /// By metric and rival: how many times better one of ours is.
    fn ratios(&self, runs: &Runs) -> BTreeMap<&str, BTreeMap<&str, Summary>> {
        if !runs.contender.is_ours() {
            return BTreeMap::new();
        }
        let metrics = self.work.metrics().iter();
        metrics
            .map(|metric| {
                let ratio = |rival: &'_ Runs| runs.times_better(rival, metric);
                let rivals = self.rivals();
                let ratios = rivals
                    .filter_map(|rival| Some((rival.contender.name.as_str(), ratio(rival)?)))
                    .collect();
                (metric.key, ratios)
            })
            .collect()
    }
}

fn is_judged(ours: &Runs, kind: &str) -> bool {
    let device = ours.contender.device();
    ours.contender.kind() == kind && device.is_none_or(|device| device == default_device_name())
}
