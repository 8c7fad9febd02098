//! Workers and servers that panic, fail, fall silent or send nonsense.

use std::sync::mpsc;

use ps_actors::server::{Pull, ReportLost};

use super::*;

/// S-3: a worker that panics leaves by itself.
#[test]
fn the_others_go_on_when_a_worker_panics_in_the_middle_of_its_run() {
    let servers = group(2, config(Consistency::Bsp));
    let healthy = [worker(0), worker(1)];
    let dying = actor::spawn(|| {
        let source = |clock: Clock, weights: &Weights| -> Result<_, SourceError> {
            assert_ne!(clock, Clock(5), "as planned");
            Ok(towards_target(2, clock, weights))
        };
        DataWorker::new(WorkerId(2), source)
    });
    let run = || RunSteps {
        servers: servers.clone(),
        num_steps: 30,
    };
    let healthy_runs: Vec<_> = healthy.iter().map(|worker| worker.ask(run())).collect();
    let panicked = dying.ask(run()).wait();
    assert!(
        matches!(panicked, Err(CallError::Failed { .. })),
        "{panicked:?}"
    );
    for reply in healthy_runs {
        assert_eq!(reply.wait().unwrap().unwrap().num_applied, 30);
    }
    let status = coordinator(&servers);
    // The panic comes before the sixth gradient, and the worker leaves then.
    assert_eq!(status.workers[&WorkerId(2)].num_applied, 5);
}

/// S-3: a worker whose run fails leaves by itself.
#[test]
fn a_source_that_fails_ends_its_run_with_the_reason_and_lets_the_others_go_on() {
    let servers = group(1, config(Consistency::Bsp));
    let failing = actor::spawn(|| {
        let source = |clock: Clock, weights: &Weights| -> Result<_, SourceError> {
            match clock {
                Clock(3) => Err("the disk is full".into()),
                _ => Ok(towards_target(1, clock, weights)),
            }
        };
        DataWorker::new(WorkerId(1), source)
    });
    let good = worker(0);
    let run = || RunSteps {
        servers: servers.clone(),
        num_steps: 10,
    };
    let (good, failed) = (good.ask(run()), failing.ask(run()));
    match failed.wait().unwrap() {
        Err(WorkerError::Source {
            worker: WorkerId(1),
            clock: Clock(3),
            source,
        }) => {
            assert_eq!(source.to_string(), "the disk is full");
        }
        other => panic!("expected the source's error, got {other:?}"),
    }
    assert_eq!(good.wait().unwrap().unwrap().num_applied, 10);
}

/// S-4
#[test]
fn a_silent_member_holds_a_round_up_no_longer_than_its_lease() {
    let lease = Some(Duration::from_millis(40));
    for consistency in [Consistency::Bsp, Consistency::Ssp { bound: 0 }] {
        let servers = group(
            1,
            ServerConfig {
                worker_lease: lease,
                ..config(consistency)
            },
        );
        let joined = servers.clone();
        actor::run(async move { joined.join(WorkerId(1), JoinRequest(1)).await.unwrap() });
        // Without the lease this would wait for worker 1 for ever.
        let report = run_all(&servers, 1, 20).remove(0);
        assert_eq!(report.num_applied, 20);
        let workers = coordinator(&servers).workers;
        assert!(
            workers
                .get(&WorkerId(1))
                .is_none_or(|worker| !worker.is_member)
        );
    }
}

/// S-5: `RunSteps` joins again by itself.
#[test]
fn a_worker_declared_dead_by_mistake_comes_back_and_nothing_is_lost_or_counted_twice() {
    let servers = group(2, config(Consistency::Bsp));
    let (reached, at_step) = mpsc::channel();
    let (let_go, gate) = mpsc::channel::<()>();
    let mut gate = Some(gate);
    let slow = actor::spawn(move || {
        let (reached, gate) = (reached.clone(), gate.take().expect("not restarted"));
        let mut has_waited = false;
        let source = move |clock: Clock, weights: &Weights| -> Result<_, SourceError> {
            if clock == Clock(7) && !has_waited {
                has_waited = true;
                reached.send(()).expect("the test waits");
                gate.recv().expect("the test lets go");
            }
            Ok(towards_target(0, clock, weights))
        };
        DataWorker::new(WorkerId(0), source)
    });
    let run = slow.ask(RunSteps {
        servers: servers.clone(),
        num_steps: 20,
    });
    at_step.recv().unwrap();
    let group = servers.clone();
    actor::run(async move { group.report_lost(WorkerId(0)).await.unwrap() });
    let_go.send(()).unwrap();
    assert_eq!(run.wait().unwrap().unwrap().num_applied, 20);
    assert_eq!(final_weights(&servers).to_vec(), expected_bsp(1, 20));
}

/// S-5: ten losses in a row are made good, but not one more. A settled gradient begins a new row.
#[test]
fn a_worker_joins_again_at_most_ten_times_without_a_settled_gradient() {
    for (num_losses, num_steps, computed, succeeds) in
        [(10, 1, 11, true), (10, 3, 33, true), (11, 3, 11, false)]
    {
        let servers = group(1, config(Consistency::Asp));
        let server = servers.servers().next().unwrap().clone();
        let (sender, calls) = mpsc::channel();
        let unlucky = actor::spawn(move || {
            let (server, sender) = (server.clone(), sender.clone());
            let mut num_lost = 0;
            let source = move |clock: Clock, weights: &Weights| -> Result<_, SourceError> {
                sender.send(clock).expect("the test counts");
                num_lost = (num_lost + 1) % (num_losses + 1);
                if num_lost > 0 {
                    let worker = WorkerId(0);
                    server.tell(ReportLost { worker }).expect("it has room");
                }
                Ok(towards_target(0, clock, weights))
            };
            DataWorker::new(WorkerId(0), source)
        });
        let run = unlucky.ask(RunSteps {
            servers: servers.clone(),
            num_steps,
        });
        match (run.wait().unwrap(), succeeds) {
            (Ok(report), true) => assert_eq!(report.num_applied, num_steps),
            (Err(WorkerError::Servers { .. }), false) => {}
            other => panic!("{num_losses} losses end with {other:?}"),
        }
        drop(unlucky);
        assert_eq!(calls.iter().count(), computed);
    }
}

#[test]
fn a_gradient_with_nan_is_refused_and_the_weights_stay() {
    let servers = group(2, config(Consistency::Bsp));
    let bad = actor::spawn(|| {
        let source = |clock: Clock, weights: &Weights| -> Result<_, SourceError> {
            let mut computed = towards_target(0, clock, weights);
            if clock.0 % 2 == 1 {
                let mut values = computed.gradient.values().to_vec();
                values[LEN - 1] = f32::NAN;
                computed.gradient = Gradient::new(values);
            }
            Ok(computed)
        };
        DataWorker::new(WorkerId(0), source)
    });
    let run = RunSteps {
        servers: servers.clone(),
        num_steps: 10,
    };
    let report = bad.ask(run).wait().unwrap().unwrap();
    assert_eq!((report.num_applied, report.num_refused), (5, 5));
    assert!(
        final_weights(&servers)
            .to_vec()
            .iter()
            .all(|w| w.is_finite())
    );

    let server = servers.servers().next().unwrap();
    let weights = final_weights(&servers);
    let mut gradients = bad
        .ask(ComputeGradients(weights.clone()))
        .wait()
        .unwrap()
        .unwrap();
    gradients.gradient = Gradient::new(vec![f32::INFINITY; LEN]);
    let error = server
        .ask(ApplyGradients::mean([gradients]))
        .wait()
        .unwrap()
        .unwrap_err();
    assert!(matches!(error, ServerError::BadNorm { .. }), "{error}");
    assert_eq!(final_weights(&servers).to_vec(), weights.to_vec());
}

/// PS-6, whichever way it comes: shorter or longer, nothing of it is applied.
#[test]
fn a_gradient_of_another_model_is_refused() {
    for (num_servers, len) in [(1, LEN - 1), (1, LEN + 2), (2, LEN - 1), (2, LEN + 2)] {
        let servers = group(num_servers, config(Consistency::Asp));
        let other_model = actor::spawn(move || {
            let source = move |_: Clock, _: &Weights| -> Result<_, SourceError> {
                let gradient = Gradient::new(vec![1.0; len]);
                Ok(LocalGradient {
                    gradient,
                    loss: 0.0,
                    num_examples: 1,
                })
            };
            DataWorker::new(WorkerId(0), source)
        });
        let run = RunSteps {
            servers: servers.clone(),
            num_steps: 1,
        };
        let error = other_model.ask(run).wait().unwrap().unwrap_err();
        let chain = format!("{error:?}");
        assert!(chain.contains("WrongRange"), "{chain}");

        let gradients = other_model.ask(ComputeGradients(initial())).wait();
        let gradients = gradients.unwrap().unwrap();
        let (id, gradient) = (gradients.id, gradients.gradient.clone());
        let first = servers.servers().next().unwrap();
        let refused = [
            first.ask(Push(gradients.clone())).wait().unwrap().err(),
            first
                .ask(PushPull::new(gradients.clone()))
                .wait()
                .unwrap()
                .err(),
            first
                .ask(ApplyGradients::sum([gradients]))
                .wait()
                .unwrap()
                .err(),
        ];
        let staged = servers.servers().map(|server| {
            let (id, gradient) = (id, gradient.clone());
            server.ask(Stage { id, gradient }).wait().unwrap().err()
        });
        for error in staged.chain(refused) {
            let error = error.expect("it does not fit");
            let wrong = matches!(error, ServerError::Shard(ShardError::WrongRange { .. }));
            assert!(wrong, "{error}");
        }
        assert_eq!(final_weights(&servers).version(), Version(0));
        for server in servers.servers() {
            assert_eq!(server.ask(GetStatus).wait().unwrap().num_staged, 0);
        }
    }
}

#[test]
fn a_group_that_lost_a_server_says_so_instead_of_hanging() {
    let servers = group(2, config(Consistency::Bsp));
    run_all(&servers, 1, 3);
    let second = servers.servers().nth(1).unwrap().clone();
    second.kill();
    actor::run(async move { second.stopped().await });
    let worker = worker(0);
    let run = RunSteps {
        servers: servers.clone(),
        num_steps: 3,
    };
    let error = worker.ask(run).wait().unwrap().unwrap_err();
    assert!(matches!(error, WorkerError::Servers { .. }), "{error:?}");
}

/// How long a call may take that is answered at all.
const SOON: Duration = Duration::from_secs(20);

fn gradients_of(worker: u32, incarnation: Incarnation, clock: u64) -> GradientUpdate {
    let computed = towards_target(worker, Clock(clock), &initial());
    GradientUpdate {
        id: GradientId {
            worker: WorkerId(worker),
            incarnation,
            clock: Clock(clock),
        },
        computed_on: Version(0),
        loss: computed.loss,
        num_examples: 1,
        gradient: computed.gradient,
    }
}

fn join(servers: &ServerGroup, worker: u32) -> Incarnation {
    let (worker, request) = (WorkerId(worker), JoinRequest(1));
    let first = servers.servers().next().unwrap();
    let joined = first.ask(Join { worker, request }).wait_timeout(SOON);
    joined.unwrap().unwrap().incarnation
}

fn stage_everywhere(servers: &ServerGroup, gradients: &GradientUpdate) {
    for server in servers.servers().skip(1) {
        let (id, gradient) = (gradients.id, gradients.gradient.clone());
        let staged = server.ask(Stage { id, gradient }).wait_timeout(SOON);
        staged.unwrap().unwrap();
    }
}

/// What else a client can do wrong with a gradient before it pushes it to the first server.
type Mistake = fn(&ServerGroup, &GradientUpdate);

/// S-9: the first server sends what the others lack, and nobody waits for it.
#[test]
fn a_push_whose_parts_the_other_servers_lack_is_applied_as_any_other() {
    let never_staged: Mistake = |_, _| {};
    let staged_on_one: Mistake = |servers, gradients| {
        let (id, gradient) = (gradients.id, gradients.gradient.clone());
        let last = servers.servers().last().unwrap();
        last.ask(Stage { id, gradient }).wait().unwrap().unwrap();
    };
    // A refused push of the same name lets all servers forget what is staged under it.
    let forgotten: Mistake = |servers, gradients| {
        stage_everywhere(servers, gradients);
        let ahead = GradientUpdate {
            computed_on: Version(9),
            ..gradients.clone()
        };
        let first = servers.servers().next().unwrap();
        let refused = first.ask(Push(ahead)).wait_timeout(SOON).unwrap();
        let error = refused.unwrap_err();
        let refusal = ServerError::Refused(Refusal::FromTheFuture {
            id: gradients.id,
            claimed: Version(9),
            version: Version(0),
        });
        assert_eq!(error.to_string(), refusal.to_string());
    };
    // Whoever it is that staged them: the right ones come too late.
    let other_numbers: Mistake = |servers, gradients| {
        let gradient = Gradient::new(vec![7.0; LEN]);
        let other = GradientUpdate {
            gradient,
            ..gradients.clone()
        };
        stage_everywhere(servers, &other);
        stage_everywhere(servers, gradients);
    };
    for consistency in [
        Consistency::Bsp,
        Consistency::Asp,
        Consistency::Ssp { bound: 1 },
        Consistency::KofN { k: 2 },
    ] {
        let pushed = |num_servers, mistake: Mistake| {
            let servers = group(num_servers, config(consistency));
            let [zero, one] = [0, 1].map(|worker| join(&servers, worker));
            let (bad, good) = (gradients_of(0, zero, 0), gradients_of(1, one, 0));
            mistake(&servers, &bad);
            let first = servers.servers().next().unwrap();
            let bad = first.ask(Push(bad));
            stage_everywhere(&servers, &good);
            let good = first.ask(Push(good));
            for reply in [bad, good] {
                let outcome = reply.wait_timeout(SOON).unwrap().unwrap();
                assert!(matches!(outcome, Outcome::Applied { .. }), "{outcome:?}");
            }
            let version = first.ask(GetWeights).wait().unwrap().version();
            for server in servers.servers() {
                let pull = server.ask(Pull::new(PullVersion::AtLeast(version)));
                pull.wait_timeout(SOON).expect("nobody waits").unwrap();
            }
            let weights = final_weights(&servers);
            for server in servers.servers() {
                let status = server.ask(GetStatus).wait().unwrap();
                assert_eq!(status.num_staged, 0);
            }
            // The group goes on, also without these two.
            for worker in [0, 1].map(WorkerId) {
                first.ask(ReportLost { worker }).wait().unwrap().unwrap();
            }
            run_all(&servers, 1, 3);
            weights.to_vec()
        };
        let expected = pushed(1, never_staged);
        for mistake in [never_staged, staged_on_one, forgotten, other_numbers] {
            assert_eq!(pushed(3, mistake), expected, "{consistency}");
        }
    }
}

/// Applies some updates and then panics.
#[derive(Debug)]
struct BreaksAfter(u32);

impl UpdateRule for BreaksAfter {
    fn update(&mut self, _: &mut [f32], _: &[f32], _: f64) {
        self.0 = self.0.checked_sub(1).expect("as planned");
    }
}

/// S-8: a restart would silently go back to the initial weights.
#[test]
fn a_server_that_panics_is_not_restarted_and_its_calls_fail() {
    let config = config(Consistency::Asp);
    let server = ParameterServer::new(&initial(), BreaksAfter(1), config).unwrap();
    let server = server.spawn().unwrap();
    let worker = worker(0);
    let apply = || {
        let gradients = worker
            .ask(ComputeGradients(initial()))
            .wait()
            .unwrap()
            .unwrap();
        server.ask(ApplyGradients::mean([gradients])).wait()
    };
    assert!(apply().unwrap().is_ok());
    let error = apply().unwrap_err();
    assert!(
        matches!(&error, CallError::Failed { panic, .. } if panic.contains("as planned")),
        "{error}"
    );
    let error = server.ask(GetWeights).wait().unwrap_err();
    assert!(!error.may_have_run(), "{error}");

    let mut rules = [BreaksAfter(100), BreaksAfter(2)].into_iter();
    let servers = ServerGroup::spawn(&initial(), 2, config, |_| {
        Box::new(rules.next().expect("one for each server"))
    });
    let run = RunSteps {
        servers: servers.unwrap(),
        num_steps: 10,
    };
    let error = worker.ask(run).wait().unwrap().unwrap_err();
    assert!(matches!(error, WorkerError::Servers { .. }), "{error:?}");
}
