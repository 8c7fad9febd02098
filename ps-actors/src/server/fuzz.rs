//! Fuzz targets: the first server of a group, another one, and a worker read streams of frames that were damaged
//! on the way. [`Fuzz`] says how, and which variables change it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ps_runtime::actor::{ActorRef, Spawn};
use ps_runtime::test_util::{Dice, Fed, Fuzz, Sent};

use crate::checkpoint::Rest;
use crate::group::ServerGroup;
use crate::ids::{Clock, GradientId, Incarnation, JoinRequest, Version, WorkerId};
use crate::rule::UpdateRule;
use crate::server::messages::{Decision, Follow};
use crate::server::protocol::{Clip, Summand, Update};
use crate::server::{
    ApplyGradients, ApplyKept, Consistency, ForgetSavedStates, GetAppliedParts, GetSavedState,
    GetStatus, GetWeights, GroupSecret, Heartbeat, Join, Leave, ParameterServer, Pull, PullVersion,
    Push, PushPull, Reduction, ReportLost, ServerConfig, SetConsistency, SetLearningRate,
    SetPaused, Stage, TakeCheckpoint,
};
use crate::weights::{Gradient, GradientUpdate, Layout, Parameter, Weights};
use crate::worker::{
    ComputeGradients, DataWorker, GetProgress, GetSteps, GoOnAt, GradientSource, KeepMembership,
    LocalGradient, RunSteps, SourceError, StopSteps, WorkerError,
};

const NUM_WEIGHTS: usize = 9;

fn id(dice: &mut Dice) -> GradientId {
    GradientId {
        worker: WorkerId(dice.below(3) as u32),
        incarnation: Incarnation(dice.below(3)),
        clock: Clock(dice.below(4)),
    }
}

fn gradient() -> Gradient {
    Gradient::new(vec![0.5; NUM_WEIGHTS])
}

/// What a follower is told, in all that may be wrong with it.
fn follow(dice: &mut Dice, secret: &GroupSecret) -> Follow {
    // Mostly of its own group, as if the first server made mistakes.
    let secret = match dice.once_in(4) {
        true => GroupSecret::made_of(dice.any()),
        false => secret.clone(),
    };
    let (id, gradient) = (id(dice), gradient());
    let summand = Summand {
        id,
        computed_on: Version(0),
        norm: dice.one_of(&[gradient.norm(), gradient.norm(), 0.0, f64::NAN]),
        num_examples: dice.below(3),
    };
    let update = Update {
        version: Version(dice.one_of(&[0, 1, 1, 2])),
        gradients: vec![summand; dice.one_of(&[0, 1, 1, 1, 2])],
        reduction: Reduction::Mean,
        clip: dice.one_of(&[
            Clip::None,
            Clip::Scale(0.5),
            Clip::Value(0.5),
            Clip::Value(f32::NAN),
        ]),
    };
    let fence = Decision::Fence {
        worker: id.worker,
        below: id.incarnation,
    };
    let mut decisions = vec![
        fence,
        Decision::Discard(id),
        Decision::Stage(id, gradient.clone()),
        Decision::Update {
            update,
            learning_rate: 0.1,
        },
        Decision::Save(Version(dice.below(3))),
        Decision::Complete(id, gradient),
    ];
    decisions.retain(|_| !dice.once_in(4));
    Follow {
        secret,
        decisions,
        number: dice.one_of(&[0, 0, 1]),
    }
}

/// One of each message that a server takes.
fn messages(process: &Fed, dice: &mut Dice, secret: &GroupSecret) -> Vec<Sent> {
    let id = id(dice);
    let (worker, incarnation) = (id.worker, id.incarnation);
    let gradients = GradientUpdate {
        id,
        computed_on: Version(0),
        loss: 1.0,
        num_examples: 4,
        gradient: gradient(),
    };
    let kept: Result<GradientUpdate, WorkerError> = match dice.once_in(4) {
        true => Err(WorkerError::Busy { worker }),
        false => Ok(gradients.clone()),
    };
    let request = JoinRequest(dice.below(3));
    let at_least = PullVersion::AtLeast(Version(dice.below(4)));
    let saved = GetSavedState {
        version: Version(dice.below(4)),
    };
    let forgotten = ForgetSavedStates {
        until: Version(dice.below(4)),
    };
    fn server<M: actix::Message + 'static>(process: &Fed, message: &M) -> Sent {
        process.sent::<ParameterServer, M>(message)
    }
    vec![
        server(process, &GetWeights),
        server(process, &Pull::new(at_least)),
        server(process, &ApplyGradients::mean([gradients.clone()])),
        server(process, &ApplyKept::mean([process.keep(&kept)])),
        server(process, &Join { worker, request }),
        server(
            process,
            &Leave {
                worker,
                incarnation,
            },
        ),
        server(process, &ReportLost { worker }),
        server(
            process,
            &Heartbeat {
                worker,
                incarnation,
            },
        ),
        server(
            process,
            &Stage {
                id,
                gradient: gradient(),
            },
        ),
        server(process, &Push(gradients.clone())),
        server(process, &PushPull::new(gradients)),
        server(process, &SetConsistency(Consistency::Ssp { bound: 1 })),
        server(process, &SetLearningRate(0.1)),
        server(process, &GetStatus),
        server(process, &TakeCheckpoint),
        server(process, &saved),
        server(process, &forgotten),
        server(process, &follow(dice, secret)),
        server(process, &SetPaused(dice.once_in(4))),
        server(
            process,
            &GetAppliedParts {
                from: dice.below(4),
            },
        ),
    ]
}

/// An update rule that looks at what the server's checks let through.
///
/// The weights stay small whatever arrives: a gradient of 1e38 is a legal one, and plain SGD would
/// leave the range of `f32` with it.
#[derive(Debug)]
struct Checked;

impl UpdateRule for Checked {
    fn update(&mut self, weights: &mut [f32], gradient: &[f32], learning_rate: f64) {
        assert_eq!((weights.len(), gradient.len()), (NUM_WEIGHTS, NUM_WEIGHTS));
        let rate = learning_rate as f32;
        assert!(rate.is_finite() && rate >= 0.0, "rate {learning_rate}");
        for (weight, slope) in weights.iter_mut().zip(gradient) {
            assert!(slope.is_finite(), "{gradient:?}");
            *weight -= 0.1 * slope.signum();
        }
    }
}

fn initial() -> Weights {
    Weights::initial(Layout::flat(NUM_WEIGHTS), vec![1.0; NUM_WEIGHTS])
}

fn config() -> ServerConfig {
    ServerConfig {
        consistency: Consistency::Asp,
        ..ServerConfig::default()
    }
}

fn first_server() -> ActorRef<ParameterServer> {
    let server = ParameterServer::new(&initial(), Checked, config()).expect("the settings work");
    server.spawn().expect("there is a thread")
}

fn has_trained(server: &ActorRef<ParameterServer>) -> Result<bool, ps_runtime::CallError> {
    Ok(server.ask(GetWeights).wait()?.version() > Version(0))
}

/// PS-6.
#[test]
fn nothing_that_a_peer_sends_harms_a_server() {
    let secret = GroupSecret::made_of(1);
    let fuzz = Fuzz {
        one_in: 1,
        fresh_every: 500,
    };
    let num_trained = fuzz.run(
        |_| first_server(),
        |process, dice| messages(process, dice, &secret),
        has_trained,
    );
    // Not everything is damaged: what is intact has to work.
    assert!(num_trained > 5, "trained after {num_trained} streams only");
}

/// PS-6, PS-10.
#[test]
fn nothing_that_a_peer_sends_harms_a_server_that_follows() {
    let secret = GroupSecret::made_of(1);
    let fuzz = Fuzz {
        one_in: 3,
        // It takes nothing after an error.
        fresh_every: 32,
    };
    let num_trained = fuzz.run(
        |_| {
            let (range, rest, rule) = (0..NUM_WEIGHTS, Rest::default(), Box::new(Checked));
            let secret = secret.clone();
            let follower =
                ParameterServer::follower(&initial(), range, rest, rule, config(), secret);
            let follower = follower.expect("the settings work");
            follower.spawn().expect("there is a thread")
        },
        |process, dice| match dice.once_in(4) {
            true => messages(process, dice, &secret),
            // Mostly what only followers take.
            false => vec![process.sent::<ParameterServer, _>(&follow(dice, &secret))],
        },
        has_trained,
    );
    assert!(num_trained > 5, "trained after {num_trained} streams only");
}

/// Some parameters whose names differ from seed to seed.
fn layout(dice: &mut Dice) -> Layout {
    let mut start = 0;
    let parameters = (0..dice.below(5)).map(|_| {
        let (rows, columns) = (dice.below(4) as usize, dice.below(4) as usize);
        let range = start..start + rows * columns;
        start = range.end;
        Parameter {
            name: format!("p{}", dice.below(8)),
            shape: vec![rows, columns],
            range,
        }
    });
    let parameters: Vec<_> = parameters.collect();
    let num_buffers = dice.below(parameters.len() as u64 + 1) as usize;
    Layout::with_buffers(parameters, num_buffers).expect("they follow one another")
}

fn to_worker<S: GradientSource>(
    process: &Fed,
    dice: &mut Dice,
    servers: &ServerGroup,
) -> Vec<Sent> {
    let layout = layout(dice);
    let values = vec![0.5; layout.num_weights()];
    let compute = ComputeGradients(Weights::initial(layout, values));
    if dice.once_in(2) {
        return vec![process.sent::<DataWorker<S>, _>(&compute)];
    }
    let run = RunSteps {
        servers: servers.clone(),
        num_steps: dice.below(4),
    };
    let go_on = GoOnAt {
        clock: Clock(dice.below(4)),
        after: Incarnation(dice.below(3)),
    };
    let from = Clock(dice.below(4));
    vec![
        process.sent::<DataWorker<S>, _>(&compute),
        process.sent::<DataWorker<S>, _>(&run),
        process.sent::<DataWorker<S>, _>(&go_on),
        process.sent::<DataWorker<S>, _>(&StopSteps),
        process.sent::<DataWorker<S>, _>(&KeepMembership),
        process.sent::<DataWorker<S>, _>(&GetProgress),
        process.sent::<DataWorker<S>, _>(&GetSteps { from }),
    ]
}

/// PS-6: whatever weights a worker gets are those of a model.
#[test]
fn nothing_that_a_peer_sends_harms_a_worker() {
    let num_computed = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&num_computed);
    let compute = move |_: Clock, weights: &Weights| -> Result<LocalGradient, SourceError> {
        let mut end = 0;
        for Parameter { shape, range, .. } in weights.layout().parameters() {
            assert_eq!(range.start, end);
            assert_eq!(range.len(), shape.iter().product::<usize>());
            end = range.end;
        }
        assert!(weights.range().end <= end);
        counter.fetch_add(1, Ordering::Relaxed);
        Ok(LocalGradient {
            gradient: Gradient::new(weights.to_vec()),
            loss: 1.0,
            num_examples: 1,
        })
    };
    fuzz_worker(compute);
    let num_computed = num_computed.load(Ordering::Relaxed);
    // Not everything is damaged: what is intact has to work.
    assert!(num_computed > 5, "computed {num_computed} times only");
}

fn fuzz_worker<S: GradientSource + Clone + Send>(source: S) {
    let server = first_server();
    let servers = ServerGroup::from(server.clone());
    let fuzz = Fuzz {
        one_in: 1,
        // A run with a damaged number of steps goes on until its worker is killed.
        fresh_every: 100,
    };
    let num_run = fuzz.run::<DataWorker<S>>(
        |_| {
            let source = source.clone();
            let worker = Spawn::new().start(move || DataWorker::new(WorkerId(0), source.clone()));
            worker.expect("there is a thread")
        },
        |process, dice| to_worker::<S>(process, dice, &servers),
        |worker| {
            worker.ask(GetProgress).wait()?;
            has_trained(&server)
        },
    );
    assert!(num_run > 5, "no run of a worker changed the weights");
}
