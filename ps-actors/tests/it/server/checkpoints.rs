//! Checkpoints of running servers: one version in all parts, and a run that goes on as if nothing had
//! happened.

use ps_actors::checkpoint::Checkpoint;
use ps_actors::server::TakeCheckpoint;

use super::*;

fn momentum(_: std::ops::Range<usize>) -> Box<dyn UpdateRule> {
    Box::new(Sgd::with_momentum(0.5))
}

fn checkpoint(servers: &ServerGroup) -> Checkpoint {
    let servers = servers.clone();
    actor::run(async move { servers.checkpoint().await.unwrap() })
}

/// Through files, as a run does it.
fn written_and_read(checkpoint: &Checkpoint) -> Checkpoint {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("one");
    checkpoint.write(&path).unwrap();
    Checkpoint::read(&path).unwrap()
}

/// Counts the updates of each weight, beside the weights.
#[derive(Debug, Default)]
struct Counting {
    counts: Vec<f32>,
}

impl UpdateRule for Counting {
    fn update(&mut self, weights: &mut [f32], gradient: &[f32], _: f64) {
        self.counts.resize(weights.len(), 0.0);
        self.counts.iter_mut().for_each(|count| *count += 1.0);
        let pairs = weights.iter_mut().zip(gradient);
        pairs.for_each(|(weight, gradient)| *weight -= gradient);
    }

    fn save(&self) -> RuleState {
        match self.counts.first() {
            Some(&num) => RuleState {
                vectors: vec![("counts".to_owned(), self.counts.clone())],
                scalars: vec![("num".to_owned(), Scalar::Unsigned(num as u64))],
            },
            None => RuleState::default(),
        }
    }
}

/// S-13. Each update adds 1 to every weight and to every slot, so a part of another version shows.
#[test]
fn all_parts_of_a_checkpoint_are_of_one_version_while_workers_push() {
    let zero = Weights::initial(Layout::flat(LEN), vec![0.0; LEN]);
    let config = config(Consistency::Asp);
    let servers = ServerGroup::spawn(&zero, 3, config, |_| Box::new(Counting::default())).unwrap();
    let workers: Vec<_> = (0..4)
        .map(|id| {
            actor::spawn(move || {
                DataWorker::new(WorkerId(id), |_: Clock, _: &Weights| {
                    let gradient = Gradient::new(vec![-1.0; LEN]);
                    Ok(LocalGradient {
                        gradient,
                        loss: 0.0,
                        num_examples: 1,
                    })
                })
            })
        })
        .collect();
    let runs: Vec<_> = workers
        .iter()
        .map(|worker| {
            let servers = servers.clone();
            worker.ask(RunSteps {
                servers,
                num_steps: u64::MAX,
            })
        })
        .collect();
    let directory = tempfile::tempdir().unwrap();
    let mut versions = Vec::new();
    while versions.len() < 40 {
        let checkpoint = checkpoint(&servers);
        let version = checkpoint.version().0;
        if version == 0 || versions.last() == Some(&version) {
            continue;
        }
        assert_eq!(checkpoint.weights().to_vec(), vec![version as f32; LEN]);
        // Another program reads the slots from the files.
        let path = directory.path().join(version.to_string());
        checkpoint.write(&path).unwrap();
        let bytes = std::fs::read(path.join("optimizer.safetensors")).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let counts = tensors.tensor("counts/weights").unwrap();
        let counts: &[f32] = &bytemuck::pod_collect_to_vec(counts.data());
        assert_eq!(
            counts,
            vec![version as f32; LEN],
            "the slots of version {version}"
        );
        let settled: u64 = (0..4).map(|id| checkpoint.next_clock(WorkerId(id)).0).sum();
        assert_eq!(settled, version, "the ledger of version {version}");
        versions.push(version);
    }
    for worker in &workers {
        worker.ask(StopSteps).wait().unwrap();
    }
    for run in runs {
        run.wait().unwrap().unwrap();
    }
    let saved: u64 = versions.iter().sum();
    assert!(saved > 0 && versions.is_sorted());
}

/// S-13.
#[test]
fn a_run_that_goes_on_from_a_checkpoint_has_the_bits_of_one_that_was_never_interrupted() {
    let config = ServerConfig {
        wait_for_workers: 3,
        ..config(Consistency::Bsp)
    };
    // Step 3 is where a lost step counter or slot shows most.
    for num_before in [0, 3, 20] {
        for (num_servers_before, num_servers) in [(1, 1), (1, 3), (3, 2), (5, 1)] {
            let servers = group(num_servers_before, config);
            if num_before > 0 {
                run_all(&servers, 3, num_before);
            }
            let saved = written_and_read(&checkpoint(&servers));
            drop(servers);
            assert_eq!(saved.version(), Version(num_before));
            let servers = ServerGroup::spawn(&saved, num_servers, config, momentum).unwrap();
            let reports = run_all(&servers, 3, 40 - num_before);
            assert_eq!(reports[0].losses.len() as u64, 40 - num_before);
            let weights = final_weights(&servers);
            assert_eq!(weights.version(), Version(40));
            let what = format!("{num_servers_before}, then {num_servers} servers");
            assert_eq!(weights.to_vec(), expected_bsp(3, 40), "{what}");
            let status = coordinator(&servers);
            assert!(
                status
                    .workers
                    .values()
                    .all(|worker| worker.num_applied == 40),
                "{what}"
            );
        }
    }
}

/// PS-2, across the end of the servers.
#[test]
fn what_was_applied_before_a_checkpoint_is_not_applied_again_after_it() {
    let config = config(Consistency::Asp);
    let server = ParameterServer::new(&initial(), Sgd::new(), config).unwrap();
    let server = server.spawn().unwrap();
    let (worker, request) = (WorkerId(7), JoinRequest(1));
    let join = Join { worker, request };
    let incarnation = server.ask(join).wait().unwrap().unwrap().incarnation;
    let push = |incarnation, clock| {
        Push(GradientUpdate {
            id: GradientId {
                worker,
                incarnation,
                clock: Clock(clock),
            },
            computed_on: Version(0),
            loss: 0.0,
            num_examples: 1,
            gradient: Gradient::new(vec![1.0; LEN]),
        })
    };
    let applied = |server: &ActorRef<ParameterServer>, incarnation, clock| {
        server.ask(push(incarnation, clock)).wait().unwrap()
    };
    applied(&server, incarnation, 0).unwrap();
    // A driver applies the gradient of a worker that never joins.
    let ray_style = GradientUpdate {
        id: GradientId {
            worker: WorkerId(9),
            incarnation: Incarnation(5),
            clock: Clock(3),
        },
        ..push(incarnation, 0).0
    };
    let apply = ApplyGradients::mean([ray_style]);
    server.ask(apply.clone()).wait().unwrap().unwrap();

    let saved = Checkpoint::of(server.ask(TakeCheckpoint).wait().unwrap().unwrap()).unwrap();
    let saved = written_and_read(&saved);
    // This one is lost with the servers.
    applied(&server, incarnation, 1).unwrap();
    drop(server);

    let server = ParameterServer::new(&saved, Sgd::new(), config)
        .unwrap()
        .spawn()
        .unwrap();
    let before = server.ask(GetWeights).wait().unwrap();
    assert_eq!(before.version(), Version(2));
    let again = server.ask(apply).wait().unwrap().unwrap();
    assert_eq!(
        (again.version(), again.to_vec()),
        (Version(2), before.to_vec())
    );

    // The membership is over, and the request that began it begins no other.
    let refused = applied(&server, incarnation, 1).unwrap_err();
    assert!(
        matches!(refused, ServerError::Refused(Refusal::NotMember { .. })),
        "{refused}"
    );
    let refused = server.ask(join).wait().unwrap().unwrap_err();
    assert!(
        matches!(refused, ServerError::Refused(Refusal::Fenced { .. })),
        "{refused}"
    );
    let joined = server
        .ask(Join {
            worker,
            request: JoinRequest(2),
        })
        .wait()
        .unwrap()
        .unwrap();
    assert_eq!(
        (joined.incarnation, joined.next_clock),
        (incarnation.next(), Clock(1))
    );
    let outcome = applied(&server, joined.incarnation, 1).unwrap();
    assert_eq!(
        outcome,
        Outcome::Applied {
            version: Version(3),
            staleness: 2
        }
    );
    let refused = applied(&server, joined.incarnation, 0).unwrap_err();
    assert!(
        matches!(refused, ServerError::Refused(Refusal::Forgotten { .. })),
        "{refused}"
    );
}

#[test]
fn workers_that_share_the_data_anew_go_on_together_and_none_of_their_gradients_is_taken_for_an_old_one()
 {
    let config = config(Consistency::Asp);
    let servers = group(2, config);
    run_all(&servers, 2, 30);
    let saved = checkpoint(&servers).restart_workers_at(Clock(15));
    assert_eq!(saved.next_clock(WorkerId(0)), Clock(15));
    assert_eq!(saved.next_clock(WorkerId(3)), Clock(15), "a new worker");
    let saved = written_and_read(&saved);
    let servers = ServerGroup::spawn(&saved, 2, config, momentum).unwrap();
    // Clock 20 of worker 0 was applied before, as another batch.
    let reports = run_all(&servers, 4, 10);
    assert!(reports.iter().all(|report| report.num_applied == 10));
    assert_eq!(final_weights(&servers).version(), Version(60 + 40));
    let status = coordinator(&servers);
    assert!(
        status
            .workers
            .values()
            .all(|worker| worker.next_clock == Clock(25))
    );
}

#[test]
fn a_checkpoint_of_another_rule_or_of_one_server_of_several_is_refused() {
    let config = config(Consistency::Asp);
    let servers = group(2, config);
    run_all(&servers, 1, 3);
    let saved = checkpoint(&servers);
    let refused = ServerGroup::spawn(&saved, 2, config, |_| Box::new(Sgd::new())).unwrap_err();
    assert!(
        refused.to_string().contains("another update rule"),
        "{refused}"
    );
    let first = servers.servers().next().unwrap();
    let part = first.ask(TakeCheckpoint).wait().unwrap().unwrap();
    let refused = Checkpoint::of(part).unwrap_err();
    assert!(
        refused.to_string().contains("of the model are missing"),
        "{refused}"
    );
    let second = servers.servers().nth(1).unwrap();
    let refused = second.ask(TakeCheckpoint).wait().unwrap().unwrap_err();
    assert!(matches!(refused, ServerError::NotFirst), "{refused}");
}
