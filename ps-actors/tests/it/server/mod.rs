//! Servers and workers as actors, on a problem whose answer is known: worker i pulls the
//! weights towards its own target, `loss = ½‖w − t_i‖²`, `gradient = w − t_i`.

use std::time::Duration;

use futures_util::future::join3;
use ps_actors::actor::{self, ActorRef, CallError};
use ps_actors::group::ServerGroup;
use ps_actors::ids::{Clock, GradientId, Incarnation, JoinRequest, Version, WorkerId};
use ps_actors::rule::{RuleState, Scalar, Sgd, UpdateRule};
use ps_actors::server::{
    ApplyGradients, Clipping, ConfigError, Consistency, CoordinatorStatus, GetStatus, GetWeights,
    Join, Outcome, ParameterServer, PullVersion, Push, PushPull, Reduction, Refusal, ServerConfig,
    ServerError, SetLearningRate, ShardError, Stage,
};
use ps_actors::weights::{Gradient, GradientUpdate, Layout, Weights};
use ps_actors::worker::{
    ComputeGradients, DataWorker, GetProgress, GradientSource, LocalGradient, RunReport, RunSteps,
    SourceError, StopSteps, WorkerError,
};

mod buffers;
mod callers;
mod checkpoints;
mod faults;
mod links;
mod schedules;

const LEN: usize = 100;

fn initial() -> Weights {
    Weights::initial(
        Layout::flat(LEN),
        (0..LEN).map(|i| i as f32 / 10.0).collect(),
    )
}

fn target(worker: u32, clock: Clock, index: usize) -> f32 {
    // Differs by step as batches do, so that a step repeated or left out shows.
    (worker as f32 + 1.0) * (index as f32).sin() + (clock.0 % 7) as f32
}

fn towards_target(worker: u32, clock: Clock, weights: &Weights) -> LocalGradient {
    let weights = weights.to_vec();
    let gradient: Vec<f32> = weights
        .iter()
        .enumerate()
        .map(|(i, w)| w - target(worker, clock, i))
        .collect();
    let loss = gradient.iter().map(|g| g * g).sum::<f32>() / 2.0;
    LocalGradient {
        gradient: Gradient::new(gradient),
        loss,
        num_examples: 1,
    }
}

fn worker(id: u32) -> ActorRef<DataWorker<impl GradientSource>> {
    actor::spawn(move || {
        let source = move |clock: Clock, weights: &Weights| -> Result<_, SourceError> {
            Ok(towards_target(id, clock, weights))
        };
        DataWorker::new(WorkerId(id), source)
    })
}

fn group(num_servers: usize, config: ServerConfig) -> ServerGroup {
    let rule = |_| -> Box<dyn UpdateRule> { Box::new(Sgd::with_momentum(0.5)) };
    ServerGroup::spawn(&initial(), num_servers, config, rule).unwrap()
}

fn config(consistency: Consistency) -> ServerConfig {
    ServerConfig {
        consistency,
        learning_rate: 0.1,
        ..ServerConfig::default()
    }
}

/// What one thread computes: in each round the mean of all workers' gradients.
fn expected_bsp(num_workers: u32, num_rounds: u64) -> Vec<f32> {
    let mut weights = initial().to_vec();
    let mut velocity = vec![0.0f32; LEN];
    for clock in (0..num_rounds).map(Clock) {
        for i in 0..LEN {
            let sum: f32 = (0..num_workers)
                .map(|w| weights[i] - target(w, clock, i))
                .sum();
            let mean = sum * (1.0 / num_workers as f32);
            velocity[i] = if clock.0 == 0 {
                mean
            } else {
                0.5 * velocity[i] + mean
            };
            weights[i] -= 0.1 * velocity[i];
        }
    }
    weights
}

fn run_all(servers: &ServerGroup, num_workers: u32, num_steps: u64) -> Vec<RunReport> {
    let workers: Vec<_> = (0..num_workers).map(worker).collect();
    let replies: Vec<_> = workers
        .iter()
        .map(|worker| {
            worker.ask(RunSteps {
                servers: servers.clone(),
                num_steps,
            })
        })
        .collect();
    replies
        .into_iter()
        .map(|reply| reply.wait().unwrap().unwrap())
        .collect()
}

fn final_weights(servers: &ServerGroup) -> Weights {
    let servers = servers.clone();
    actor::run(async move { servers.pull(PullVersion::Latest).await.unwrap() })
}

/// What the first server of a group knows about the run.
fn coordinator(servers: &ServerGroup) -> CoordinatorStatus {
    let first = servers.servers().next().unwrap();
    first.ask(GetStatus).wait().unwrap().coordinator.unwrap()
}

/// S-7: the gradients arrive in any order, and the sum is that of the order of the workers.
#[test]
fn synchronous_workers_compute_what_one_thread_computes_on_any_number_of_servers() {
    for num_servers in [1, 2, 5] {
        let config = ServerConfig {
            wait_for_workers: 3,
            ..config(Consistency::Bsp)
        };
        let servers = group(num_servers, config);
        let reports = run_all(&servers, 3, 40);
        let weights = final_weights(&servers);
        assert_eq!(
            weights.to_vec(),
            expected_bsp(3, 40),
            "{num_servers} servers"
        );
        for report in reports {
            assert_eq!((report.num_applied, report.losses.len()), (40, 40));
        }
    }
}

#[test]
fn every_mode_applies_every_gradient_that_it_says_it_applied() {
    let modes = ["bsp", "asp", "ssp:0", "ssp:2", "k-of-n:2"];
    for mode in modes {
        for num_servers in [1, 3] {
            let servers = group(num_servers, config(mode.parse().unwrap()));
            let reports = run_all(&servers, 3, 30);
            let num_applied: u64 = reports.iter().map(|report| report.num_applied).sum();
            let status = coordinator(&servers);
            let counted: u64 = status.workers.values().map(|w| w.num_applied).sum();
            assert_eq!(counted, num_applied, "{mode}");
            let total: u64 = reports
                .iter()
                .map(|r| r.num_applied + r.num_dropped_late + r.num_refused)
                .sum();
            assert_eq!(total, 90, "{mode}");
            if matches!(mode, "asp" | "ssp:0" | "ssp:2") {
                assert_eq!(status.version, Version(90), "{mode}");
            }
            assert!(
                status.workers.values().all(|worker| !worker.is_member),
                "all have left"
            );
            // Everybody pulls towards targets around 2·sin + 3: training has gone somewhere.
            let weights = final_weights(&servers);
            assert!(
                weights
                    .to_vec()
                    .iter()
                    .all(|w| w.is_finite() && w.abs() < 20.0),
                "{mode}"
            );
        }
    }
}

#[test]
fn a_drivers_own_loop_gives_the_same_as_the_workers_loop() {
    let config = config(Consistency::Asp);
    let server = ParameterServer::new(&initial(), Sgd::with_momentum(0.5), config).unwrap();
    let server = server.spawn().unwrap();
    let workers: Vec<_> = (0..3).map(worker).collect();
    let mut weights = server.ask(GetWeights).wait().unwrap();
    for round in 1..=40 {
        let replies: Vec<_> = workers
            .iter()
            .map(|worker| worker.ask(ComputeGradients(weights.clone())))
            .collect();
        let gradients: Vec<_> = replies
            .into_iter()
            .map(|reply| reply.wait().unwrap().unwrap())
            .collect();
        let apply = ApplyGradients::mean(gradients);
        weights = server.ask(apply.clone()).wait().unwrap().unwrap();
        assert_eq!(weights.version(), Version(round));
        // A retry of a call whose answer was lost changes nothing.
        let again = server.ask(apply).wait().unwrap().unwrap();
        assert_eq!(again.version(), Version(round));
    }
    assert_eq!(weights.to_vec(), expected_bsp(3, 40));
}

#[test]
fn a_group_applies_a_drivers_gradients_on_all_servers() {
    let servers = group(3, config(Consistency::Asp));
    let worker = worker(0);
    let applied = servers.clone();
    let weights = actor::run(async move {
        let mut weights = applied.pull(PullVersion::Latest).await.unwrap();
        for _ in 0..10 {
            let gradients = worker
                .ask(ComputeGradients(weights))
                .await
                .unwrap()
                .unwrap();
            weights = applied
                .apply(vec![gradients], Reduction::Sum)
                .await
                .unwrap();
        }
        weights
    });
    assert_eq!(weights.to_vec(), expected_bsp(1, 10));
    assert_eq!(weights.segments().len(), 3);
}

#[test]
fn a_run_can_be_stopped_and_continued() {
    let servers = group(1, config(Consistency::Asp));
    let worker = worker(0);
    let endless = worker.ask(RunSteps {
        servers: servers.clone(),
        num_steps: u64::MAX,
    });
    let busy = worker
        .ask(RunSteps {
            servers: servers.clone(),
            num_steps: 1,
        })
        .wait()
        .unwrap();
    assert!(matches!(busy, Err(WorkerError::Busy { .. })), "{busy:?}");
    let reached = servers.clone();
    actor::run(async move {
        reached
            .pull(PullVersion::AtLeast(Version(50)))
            .await
            .unwrap();
    });
    worker.ask(StopSteps).wait().unwrap();
    let first = endless.wait().unwrap().unwrap().num_applied;
    assert!(first >= 50);
    let more = worker
        .ask(RunSteps {
            servers: servers.clone(),
            num_steps: 5,
        })
        .wait();
    assert_eq!(more.unwrap().unwrap().num_applied, 5);
    assert_eq!(
        worker.ask(GetProgress).wait().unwrap().num_computed,
        first + 5
    );
    // The second run goes on with the next batch, not with the first.
    assert_eq!(final_weights(&servers).to_vec(), expected_bsp(1, first + 5));
}

#[test]
fn settings_that_cannot_work_are_refused_with_the_reason() {
    let good = ServerConfig::default();
    let bad = [
        (
            ServerConfig {
                learning_rate: f64::NAN,
                ..good
            },
            "learning rate",
        ),
        (
            ServerConfig {
                learning_rate: f64::INFINITY,
                ..good
            },
            "learning rate",
        ),
        (
            ServerConfig {
                learning_rate: 1e39, // Infinite as an `f32`.
                ..good
            },
            "from 0 to 3.4e38, but is 1e39",
        ),
        (
            ServerConfig {
                learning_rate: -0.1,
                ..good
            },
            "learning rate",
        ),
        (
            ServerConfig {
                max_norm: 0.0,
                ..good
            },
            "norm",
        ),
        (
            ServerConfig {
                max_norm: f64::NAN,
                ..good
            },
            "norm",
        ),
        (
            ServerConfig {
                worker_lease: Some(Duration::from_nanos(1)),
                ..good
            },
            "at least 10ms, but is 1ns",
        ),
        (
            ServerConfig {
                clipping: Clipping::Norm(0.0),
                ..good
            },
            "clipped to a positive number, but the limit is 0",
        ),
        (
            ServerConfig {
                clipping: Clipping::Value(f32::NAN),
                ..good
            },
            "clipped to a positive number, but the limit is NaN",
        ),
        (
            ServerConfig {
                consistency: Consistency::KofN { k: 0 },
                ..good
            },
            "k of at least 1",
        ),
    ];
    for (config, expected) in bad {
        let error: ConfigError = ParameterServer::new(&initial(), Sgd::new(), config).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
    let server = ParameterServer::new(&initial(), Sgd::new(), good)
        .unwrap()
        .spawn()
        .unwrap();
    assert!(
        server
            .ask(SetLearningRate(f64::NAN))
            .wait()
            .unwrap()
            .is_err()
    );
    assert!(server.ask(SetLearningRate(0.5)).wait().unwrap().is_ok());
    assert_eq!(server.ask(GetStatus).wait().unwrap().learning_rate, 0.5);
    let no_servers = ServerGroup::spawn(&initial(), 0, good, |_| Box::new(Sgd::new()));
    assert!(no_servers.is_err());
}

/// PS-6: nobody judged what was staged under the name of a gradient before that was pushed.
#[test]
fn what_is_pushed_is_applied_and_not_what_was_staged_before() {
    let staged = [f32::NAN, 1e30, 7.0].map(|number| Gradient::new(vec![number; LEN]));
    for (gradient, is_applied_at_once) in staged.iter().flat_map(|g| [(g, false), (g, true)]) {
        let config = ServerConfig {
            max_norm: 100.0,
            learning_rate: 1.0,
            ..config(Consistency::Asp)
        };
        let server = ParameterServer::new(&initial(), Sgd::new(), config).unwrap();
        let server = server.spawn().unwrap();
        let (worker, request) = (WorkerId(0), JoinRequest(5));
        let joined = server.ask(Join { worker, request }).wait();
        let incarnation = joined.unwrap().unwrap().incarnation;
        let id = GradientId {
            worker,
            incarnation,
            clock: Clock(0),
        };
        let gradient = gradient.clone();
        server.ask(Stage { id, gradient }).wait().unwrap().unwrap();
        let gradients = GradientUpdate {
            id,
            computed_on: Version(0),
            loss: 0.0,
            num_examples: 1,
            gradient: Gradient::new(vec![0.5; LEN]),
        };
        if is_applied_at_once {
            let apply = ApplyGradients::mean([gradients]);
            server.ask(apply).wait().unwrap().unwrap();
        } else {
            server.ask(Push(gradients)).wait().unwrap().unwrap();
        }
        let expected: Vec<f32> = initial().to_vec().iter().map(|w| w - 0.5).collect();
        let weights = server.ask(GetWeights).wait().unwrap();
        assert_eq!(weights.to_vec(), expected);
    }
}

/// A driver's own loop, with a worker whose number was made up to be later than any other.
#[test]
fn nobody_takes_a_workers_place_for_ever() {
    let servers = group(1, config(Consistency::Asp));
    let first = servers.servers().next().unwrap();
    let worker = worker(0);
    let compute = || {
        worker
            .ask(ComputeGradients(initial()))
            .wait()
            .unwrap()
            .unwrap()
    };
    let mut made_up = compute();
    let hour = 3_600_000_000;
    for ahead in [2 * hour, u64::MAX / 2] {
        made_up.id.incarnation = Incarnation(compute().id.incarnation.0 + ahead);
        let refused = first.ask(ApplyGradients::sum([made_up.clone()])).wait();
        let refused = refused.unwrap().unwrap_err();
        let ahead = matches!(
            refused,
            ServerError::Refused(Refusal::IncarnationAhead { .. })
        );
        assert!(ahead, "{refused}");
    }
    for request in [JoinRequest(u64::MAX), JoinRequest(0)] {
        let (servers, worker) = (servers.clone(), WorkerId(0));
        actor::run(async move { servers.join(worker, request).await.unwrap() });
    }
    // Who joins next has the place, by its own number or by the servers'.
    let run = |servers: &ServerGroup| {
        let (servers, num_steps) = (servers.clone(), 3);
        let run = worker.ask(RunSteps { servers, num_steps });
        assert_eq!(run.wait().unwrap().unwrap().num_applied, 3);
    };
    run(&servers);
    let applied = |server: &ActorRef<ParameterServer>| {
        let apply = ApplyGradients::sum([compute()]);
        server.ask(apply).wait().unwrap().unwrap().version()
    };
    assert_eq!(applied(first), Version(4));
    // On other servers its incarnations have other numbers. That does not matter.
    let others = group(1, config(Consistency::Asp));
    let other = others.servers().next().unwrap();
    assert_eq!(applied(other), Version(1));
    run(&others);
    run(&servers);
    assert_eq!(applied(first), Version(8));
    assert_eq!(applied(other), Version(5));
    run(&others);
}

#[test]
fn pushing_without_being_a_member_is_refused() {
    let servers = group(1, config(Consistency::Bsp));
    let worker = worker(0);
    let gradients = worker
        .ask(ComputeGradients(initial()))
        .wait()
        .unwrap()
        .unwrap();
    let pushed = servers.clone();
    let error = actor::run(async move { pushed.push(gradients).await.unwrap_err() });
    assert!(
        matches!(error.refusal(), Some(Refusal::NotMember { .. })),
        "{error}"
    );
}

#[test]
fn a_push_that_is_sent_again_gets_the_same_answer_also_while_the_first_one_waits() {
    let servers = group(2, config(Consistency::Bsp));
    let a = worker(0);
    let b = worker(1);
    let group = servers.clone();
    actor::run(async move {
        let mut gradients = Vec::new();
        for (id, worker) in [(0, a), (1, b)] {
            let joined = group.join(WorkerId(id), JoinRequest(1_000_000)).await;
            let incarnation = joined.unwrap().incarnation;
            let weights = group.pull(PullVersion::Latest).await.unwrap();
            let mut computed = worker
                .ask(ComputeGradients(weights))
                .await
                .unwrap()
                .unwrap();
            computed.id.incarnation = incarnation;
            gradients.push(computed);
        }
        let (first, second) = (gradients.remove(0), gradients.remove(0));
        let (once, twice, other) = join3(
            group.push(first.clone()),
            group.push(first.clone()),
            group.push(second),
        )
        .await;
        let outcome = once.unwrap();
        assert_eq!(
            outcome,
            Outcome::Applied {
                version: Version(1),
                staleness: 0
            }
        );
        assert_eq!(twice.unwrap(), outcome);
        assert_eq!(other.unwrap(), outcome);
        assert_eq!(group.push(first).await.unwrap(), outcome);
    });
    assert_eq!(final_weights(&servers).to_vec(), expected_bsp(2, 1));
}
