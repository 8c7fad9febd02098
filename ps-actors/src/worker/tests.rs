use std::time::Duration;

use super::*;
use crate::group::ServerGroup;
use crate::rule::Sgd;
use crate::server::{GroupError, PullVersion, Refusal, ServerConfig};
use crate::weights::Layout;
use ps_runtime::codec::MAX_HEADER;
use ps_runtime::test_util::{check_error_crosses, transport};

const WORKER: WorkerId = WorkerId(3);

/// An error with a source, as a library's would be.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Layered(&'static str, #[source] Option<Box<Self>>);

fn failed(source: impl Into<SourceError>) -> WorkerError {
    WorkerError::Source {
        worker: WORKER,
        clock: Clock(7),
        source: source.into(),
    }
}

#[test]
fn every_worker_error_crosses_a_wire() {
    let source = GroupError::Server {
        index: 0,
        source: Refusal::Empty.into(),
    };
    let worker = WORKER;
    for sent in [
        failed("the file is gone"),
        WorkerError::Servers { worker, source },
        WorkerError::Busy { worker },
        WorkerError::Diverged {
            worker,
            num_refused: 101,
            norm: f64::INFINITY,
            limit: 1e3,
        },
    ] {
        check_error_crosses(&sent);
    }
}

#[test]
fn a_source_of_any_type_crosses_as_the_text_of_its_chain() {
    let disk = Layered("disk full", None);
    let file = Layered("cannot write a.bin", Some(Box::new(disk)));
    let got = transport(&failed(Layered("no batch", Some(Box::new(file))))).unwrap();
    let WorkerError::Source { source, .. } = check_error_crosses(&got) else {
        panic!("{got:?}");
    };
    assert_eq!(
        source.to_string(),
        "no batch: cannot write a.bin: disk full"
    );
    assert!(source.source().is_none());
}

#[test]
fn a_report_of_more_steps_than_fit_into_a_header_crosses_a_wire() {
    let losses = (0..MAX_HEADER)
        .map(|step| 1.0 / (step + 1) as f32)
        .collect();
    let sent = RunReport {
        losses,
        num_applied: u64::MAX,
        num_dropped_late: 2,
        num_refused: 1,
        num_examples: 32,
        was_stopped: true,
        compute_time: Duration::MAX,
        wait_time: Duration::from_nanos(1),
        unfetched: Steps::default(),
    };
    assert_eq!(transport(&sent).unwrap(), sent);
    let empty = RunReport::default();
    assert_eq!(transport(&empty).unwrap(), empty);
}

#[test]
fn progress_crosses_a_wire() {
    let sent = Progress {
        num_computed: 12,
        latest_loss: 0.25,
    };
    assert_eq!(transport(&sent).unwrap(), sent);
}

/// Has 3 steps.
struct Three;

impl GradientSource for Three {
    fn gradient(&mut self, clock: Clock, weights: &Weights) -> Result<LocalGradient, SourceError> {
        assert!(clock.0 < 3, "there is no step {clock}");
        Ok(LocalGradient {
            gradient: Gradient::new(vec![1.0; weights.len()]),
            loss: 0.0,
            num_examples: 1,
        })
    }

    fn has_step(&mut self, clock: Clock) -> bool {
        clock.0 < 3
    }
}

#[test]
fn a_run_ends_when_the_source_has_no_more_steps() {
    let initial = Weights::initial(Layout::flat(1), vec![0.0]);
    let config = ServerConfig {
        wait_for_workers: 2,
        learning_rate: 1.0,
        ..ServerConfig::default()
    };
    let servers = ServerGroup::spawn(&initial, 1, config, |_| Box::new(Sgd::new())).unwrap();
    let workers =
        [0, 1].map(|rank| ps_runtime::actor::spawn(move || DataWorker::new(WorkerId(rank), Three)));
    // The first one is asked for fewer steps. It leaves, so that the other one does not wait for it.
    let runs = [2, 100].map(|num_steps| RunSteps {
        servers: servers.clone(),
        num_steps,
    });
    let [one, other] = runs;
    let replies = [workers[0].ask(one), workers[1].ask(other)];
    let [one, other] = replies.map(|reply| reply.wait().unwrap().unwrap());
    assert_eq!((one.losses.len(), one.was_stopped), (2, false));
    assert_eq!((other.losses.len(), other.was_stopped), (3, false));
    let weights = servers.pull(PullVersion::Latest);
    assert_eq!(ps_runtime::actor::run(weights).unwrap().to_vec(), [-3.0]);
}
