use std::sync::mpsc;
use std::time::Duration;

use super::*;
use crate::group::ServerGroup;
use crate::ids::Version;
use crate::rule::Sgd;
use crate::server::{Consistency, GroupError, PullVersion, Refusal, ServerConfig};
use crate::weights::Layout;
use ps_runtime::actor::Reply;
use ps_runtime::codec::MAX_HEADER;
use ps_runtime::test_util::{check_error_crosses, transport};

const WORKER: WorkerId = WorkerId(3);

/// How long something may take that does not depend on the test.
const PATIENCE: Duration = Duration::from_secs(60);

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

/// Says which step it computes on which version, and waits until it may.
struct Gated {
    begins: mpsc::Sender<(Clock, Version)>,
    may_compute: mpsc::Receiver<()>,
}

impl GradientSource for Gated {
    fn gradient(&mut self, clock: Clock, weights: &Weights) -> Result<LocalGradient, SourceError> {
        self.begins.send((clock, weights.version()))?;
        self.may_compute.recv()?;
        Ok(LocalGradient {
            // Each step has a bit of its own, so the sum shows which were applied, and how often.
            gradient: Gradient::new(vec![(1_u64 << clock.0) as f32]),
            loss: clock.0 as f32,
            num_examples: 1,
        })
    }
}

/// A worker that overlaps its pushes with its next gradients, if the mode allows it.
struct Overlapping {
    servers: ServerGroup,
    worker: ActorRef<DataWorker<Gated>>,
    began: mpsc::Receiver<(Clock, Version)>,
    may_compute: mpsc::Sender<()>,
}

impl Overlapping {
    fn new(consistency: Consistency) -> Self {
        let initial = Weights::initial(Layout::flat(1), vec![0.0]);
        let config = ServerConfig {
            consistency,
            learning_rate: 1.0,
            overlap: true,
            ..ServerConfig::default()
        };
        let servers = ServerGroup::spawn(&initial, 1, config, |_| Box::new(Sgd::new())).unwrap();
        let ((begins, began), (may_compute, waits)) = (mpsc::channel(), mpsc::channel());
        let mut waits = Some(waits);
        let worker = ps_runtime::actor::spawn(move || {
            let source = Gated {
                begins: begins.clone(),
                may_compute: waits.take().expect("it does not panic"),
            };
            DataWorker::new(WorkerId(0), source)
        });
        Self {
            servers,
            worker,
            began,
            may_compute,
        }
    }

    fn run(&self, num_steps: u64) -> Reply<Result<RunReport, WorkerError>> {
        let servers = self.servers.clone();
        self.worker.ask(RunSteps { servers, num_steps })
    }

    /// Waits until this step begins, and returns the version of its weights.
    fn begins(&self, clock: u64) -> Version {
        let (began, version) = self.began.recv_timeout(PATIENCE).expect("a step begins");
        assert_eq!(began, Clock(clock));
        version
    }

    fn weight(&self) -> f32 {
        let weights = self.servers.pull(PullVersion::Latest);
        ps_runtime::actor::run(weights).unwrap().to_vec()[0]
    }
}

/// S-24
#[test]
fn a_gradient_is_computed_while_the_one_before_is_pushed() {
    for (consistency, overlaps) in [
        (Consistency::Asp, true),
        (Consistency::Ssp { bound: 0 }, true),
        (Consistency::Bsp, false),
        (Consistency::KofN { k: 1 }, false),
    ] {
        let test = Overlapping::new(consistency);
        let run = test.run(6);
        for _ in 0..6 {
            test.may_compute.send(()).unwrap();
        }
        let report = run.wait().unwrap().unwrap();
        assert_eq!(report.losses, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
        assert_eq!((report.num_applied, report.was_stopped), (6, false));
        assert_eq!(test.weight(), -63.0);
        // The answer to the first push tells the worker that it may.
        let versions = match overlaps {
            true => [0, 1, 1, 2, 3, 4],
            false => [0, 1, 2, 3, 4, 5],
        };
        let versions = versions.map(Version);
        let began: Vec<_> = (0..6).map(|clock| test.begins(clock)).collect();
        assert_eq!(began, versions, "{consistency}");
    }
}

/// S-24, S-19: the servers hold the push of step 1, and step 2 begins.
#[test]
fn a_worker_computes_while_its_push_is_held_and_no_more_when_the_mode_forbids_it() {
    let test = Overlapping::new(Consistency::Asp);
    let run = test.run(6);
    test.may_compute.send(()).unwrap();
    assert_eq!(test.begins(0), Version(0));
    assert_eq!(test.begins(1), Version(1));
    let pause = |is_paused| ps_runtime::actor::run(test.servers.set_paused(is_paused)).unwrap();
    pause(true);
    test.may_compute.send(()).unwrap();
    assert_eq!(test.begins(2), Version(1));
    let bsp = test.servers.set_consistency(Consistency::Bsp);
    ps_runtime::actor::run(bsp).unwrap();
    pause(false);
    (2..6).for_each(|_| test.may_compute.send(()).unwrap());
    assert_eq!(run.wait().unwrap().unwrap().num_applied, 6);
    let began: Vec<_> = (3..6).map(|clock| test.begins(clock)).collect();
    assert_eq!(began, [3, 4, 5].map(Version));
}

/// S-5, S-24: nothing is lost or applied twice. What was computed meanwhile is computed again.
#[test]
fn a_worker_that_is_declared_dead_while_it_overlaps_comes_back() {
    let test = Overlapping::new(Consistency::Asp);
    let run = test.run(5);
    test.may_compute.send(()).unwrap();
    test.begins(0);
    test.begins(1);
    let pause = |is_paused| ps_runtime::actor::run(test.servers.set_paused(is_paused)).unwrap();
    pause(true);
    test.may_compute.send(()).unwrap();
    // The push of step 1 waits, and its membership ends.
    test.begins(2);
    ps_runtime::actor::run(test.servers.report_lost(WorkerId(0))).unwrap();
    pause(false);
    (2..10).for_each(|_| test.may_compute.send(()).unwrap());
    let report = run.wait().unwrap().unwrap();
    assert_eq!((test.weight(), report.was_stopped), (-31.0, false));
    assert_eq!(test.begins(1), Version(1));
    assert_eq!(test.begins(2), Version(1));
}

/// S-24: a stopped worker waits for the push that is on its way, and the next run goes on behind it.
#[test]
fn a_stopped_worker_leaves_no_push_behind() {
    let test = Overlapping::new(Consistency::Asp);
    let run = test.run(8);
    (0..2).for_each(|_| test.may_compute.send(()).unwrap());
    for clock in 0..3 {
        test.begins(clock);
    }
    test.worker.tell(StopSteps).unwrap();
    test.may_compute.send(()).unwrap();
    let report = run.wait().unwrap().unwrap();
    assert!(report.was_stopped, "{report:?}");
    assert_eq!((report.losses.len(), report.num_applied), (3, 3));
    (3..8).for_each(|_| test.may_compute.send(()).unwrap());
    test.run(5).wait().unwrap().unwrap();
    assert_eq!(test.weight(), -255.0);
}
