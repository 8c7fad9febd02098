//! A fuzz target: a server, and a worker that gets weights, read streams of frames that were damaged on the
//! way.
//!
//! Whole exchanges are made of real messages, then bytes are changed, cut out, doubled and put in,
//! and the result goes through everything that a peer's bytes go through: frames, buffers, codec,
//! checks of each type, handlers. Runs a fixed number of inputs of a fixed seed; `PS_FUZZ_INPUTS` and
//! `PS_FUZZ_SEED` change them. A failure names the seed of the input.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::Rng;
use proptest::test_runner::{RngAlgorithm, TestRng};
use ps_runtime::actor::{CallError, NotDelivered, Spawn};
use ps_runtime::codec::{Encoded, encode};
use ps_runtime::net::NetConfig;
use ps_runtime::test_util::{CALLER_FRAMES, Fed, frame};

use crate::checkpoint::Rest;
use crate::ids::{Clock, GradientId, Incarnation, JoinRequest, Version, WorkerId};
use crate::rule::UpdateRule;
use crate::server::messages::{Decision, Follow};
use crate::server::protocol::{Summand, Update};
use crate::server::{
    ApplyGradients, Consistency, ForgetSavedStates, GetSavedState, GetStatus, GetWeights,
    GroupSecret, Heartbeat, Join, Leave, ParameterServer, Pull, PullVersion, Push, PushPull,
    Reduction, ReportLost, ServerConfig, SetConsistency, SetLearningRate, SetPaused, Stage, TakeCheckpoint,
};
use crate::weights::{Gradient, GradientUpdate, Layout, Parameter, Weights};
use crate::worker::{ComputeGradients, DataWorker, GetProgress, LocalGradient, SourceError};

const NUM_WEIGHTS: usize = 9;

fn number(name: &str, default: u64) -> u64 {
    let given = std::env::var(name).ok();
    given.map_or(default, |text| text.parse().expect("a whole number"))
}

fn rng(seed: u64) -> TestRng {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    TestRng::from_seed(RngAlgorithm::ChaCha, &bytes)
}

fn below(rng: &mut TestRng, end: usize) -> usize {
    (rng.next_u64() % end.max(1) as u64) as usize
}

/// What a follower is told, in all that may be wrong with it.
fn follow(rng: &mut TestRng, secret: &GroupSecret, id: GradientId, gradient: Gradient) -> Follow {
    // Mostly of its own group, as if the first server had lost its wits.
    let secret = match rng.next_u32().is_multiple_of(4) {
        true => GroupSecret::made_of(rng.next_u64()),
        false => secret.clone(),
    };
    let num_named = [0, 1, 1, 1, 2][below(rng, 5)];
    let summand = Summand {
        id,
        computed_on: Version(0),
        norm: [gradient.norm(), gradient.norm(), 0.0, f64::NAN][below(rng, 4)],
        num_examples: rng.next_u64() % 3,
    };
    let update = Update {
        version: Version([0, 1, 1, 2][below(rng, 4)]),
        gradients: vec![summand; num_named],
        reduction: Reduction::Mean,
    };
    let fence = Decision::Fence {
        worker: id.worker,
        below: id.incarnation,
    };
    let decisions = vec![
        fence,
        Decision::Discard(id),
        Decision::Stage(id, gradient.clone()),
        Decision::Update {
            update,
            learning_rate: 0.1,
        },
        Decision::Save(Version(rng.next_u64() % 3)),
        Decision::Complete(id, gradient),
    ];
    let kept = |_: &Decision| !rng.next_u32().is_multiple_of(4);
    Follow {
        secret,
        decisions: decisions.into_iter().filter(kept).collect(),
        number: [0, 0, 1][below(rng, 3)],
    }
}

/// One of each message that a server takes, in the order of its codes.
fn messages(rng: &mut TestRng, secret: &GroupSecret) -> Vec<Encoded> {
    let worker = WorkerId(rng.next_u32() % 3);
    let incarnation = Incarnation(u64::from(rng.next_u32() % 3));
    let clock = Clock(u64::from(rng.next_u32() % 4));
    let id = GradientId {
        worker,
        incarnation,
        clock,
    };
    let gradient = Gradient::new(vec![0.5; NUM_WEIGHTS]);
    let gradients = GradientUpdate {
        id,
        computed_on: Version(0),
        loss: 1.0,
        num_examples: 4,
        gradient: gradient.clone(),
    };
    let follow = follow(rng, secret, id, gradient.clone());
    let all = [
        encode(&GetWeights),
        encode(&Pull(PullVersion::AtLeast(Version(rng.next_u64() % 4)))),
        encode(&ApplyGradients::mean([gradients.clone()])),
        encode(&GetWeights), // `ApplyKept` has references in it, which only a cluster can write.
        encode(&Join {
            worker,
            request: JoinRequest(u64::from(rng.next_u32() % 3)),
        }),
        encode(&Leave {
            worker,
            incarnation,
        }),
        encode(&ReportLost { worker }),
        encode(&Heartbeat {
            worker,
            incarnation,
        }),
        encode(&Stage { id, gradient }),
        encode(&Push(gradients.clone())),
        encode(&PushPull(gradients)),
        encode(&SetConsistency(Consistency::Ssp { bound: 1 })),
        encode(&SetLearningRate(0.1)),
        encode(&GetStatus),
        encode(&TakeCheckpoint),
        encode(&GetSavedState {
            version: Version(rng.next_u64() % 4),
        }),
        encode(&ForgetSavedStates {
            until: Version(rng.next_u64() % 4),
        }),
        encode(&follow),
        encode(&SetPaused(rng.next_u32().is_multiple_of(4))),
    ];
    all.map(|message| message.expect("each can be written"))
        .into()
}

/// A stream of frames as a caller sends them, damaged here and there.
///
/// One for a follower mostly has what only followers take.
fn input(rng: &mut TestRng, secret: &GroupSecret, is_first: bool) -> Vec<u8> {
    let mut bytes = Vec::new();
    for call in 0..1 + below(rng, 6) as u64 {
        let mut messages = messages(rng, secret);
        // Now and then a message under another one's code.
        let (mut code, sent) = (below(rng, messages.len()), below(rng, messages.len()));
        if !is_first && !rng.next_u32().is_multiple_of(4) {
            code = messages.len() - 1;
        }
        let sent = if rng.next_u32().is_multiple_of(4) {
            sent
        } else {
            code
        };
        let kind = below(rng, CALLER_FRAMES);
        let (code, message) = (code as u32, messages.swap_remove(sent));
        let lends = rng.next_u32().is_multiple_of(8);
        bytes.extend(frame(kind, call, code, message, lends));
    }
    damage(rng, &mut bytes);
    bytes
}

/// Changes, cuts out, doubles and puts in bytes here and there.
fn damage(rng: &mut TestRng, bytes: &mut Vec<u8>) {
    for _ in 0..below(rng, 4) {
        let at = below(rng, bytes.len());
        match rng.next_u32() % 5 {
            0 => bytes[at] = rng.next_u32() as u8,
            1 => bytes[at] ^= 1 << (rng.next_u32() % 8),
            2 => bytes.truncate(at),
            3 => {
                let end = at + below(rng, bytes.len() - at);
                let piece = bytes[at..end].to_vec();
                bytes.splice(at..at, piece);
            }
            _ => {
                let value = [0, 1, u64::from(u32::MAX), u64::MAX][below(rng, 4)];
                let end = bytes.len().min(at + 8);
                bytes.splice(at..end, value.to_le_bytes());
            }
        }
        if bytes.is_empty() {
            break;
        }
    }
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

/// A process that is fed, and the event loop that feeds it.
fn fed() -> (Fed, tokio::runtime::Runtime) {
    let config = NetConfig {
        max_numbers: 1 << 16,
        ..NetConfig::default()
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = runtime.expect("the system gives an event loop");
    (Fed::new(config), runtime)
}

/// PS-6.
#[test]
fn nothing_that_a_peer_sends_harms_a_server() {
    let (num_inputs, seed) = (number("PS_FUZZ_INPUTS", 5_000), number("PS_FUZZ_SEED", 1));
    let (process, runtime) = fed();
    let secret = GroupSecret::made_of(seed);
    // The first server of a group, and another one.
    let fresh = |is_first| {
        let initial = Weights::initial(Layout::flat(NUM_WEIGHTS), vec![1.0; NUM_WEIGHTS]);
        let config = ServerConfig {
            consistency: Consistency::Asp,
            ..ServerConfig::default()
        };
        let fresh = match is_first {
            true => ParameterServer::new(&initial, Checked, config).expect("the settings work"),
            false => {
                let (range, rest, rule) = (0..NUM_WEIGHTS, Rest::default(), Box::new(Checked));
                let secret = secret.clone();
                let follower =
                    ParameterServer::follower(&initial, range, rest, rule, config, secret);
                follower.expect("the settings work")
            }
        };
        fresh.spawn().expect("there is a thread")
    };
    let mut servers = [true, false].map(fresh);
    let mut num_trained = [0, 0];
    for index in 0..num_inputs {
        // Every fourth goes to the follower.
        let which = usize::from(index % 4 == 3);
        let is_first = which == 0;
        // Some messages end all that could come after; a follower takes nothing after an error.
        if index % 500 == 498 || (!is_first && index % 32 == 31) {
            servers[which] = fresh(is_first);
        }
        let server = servers[which].clone();
        let seed = seed.wrapping_add(index);
        let bytes = input(&mut rng(seed), &secret, is_first);
        // A process can read its own memory, so this one's can be lent through a socket.
        let feeding = process.feed(&server, &bytes, index.is_multiple_of(2));
        let is_closed = runtime.block_on(feeding);
        let weights = match server.ask(GetWeights).wait() {
            Ok(weights) => weights,
            // Damage can make a `Stop` or `Kill` of any frame. A panic is none of these.
            Err(CallError::NotDelivered {
                reason: NotDelivered::Stopped { panic: None },
                ..
            }) => {
                servers[which] = fresh(is_first);
                continue;
            }
            Err(error) => panic!("PS_FUZZ_SEED={seed}: {error}"),
        };
        // The server has read all of it by now. A call that still waits must not keep a socket open.
        assert!(is_closed(), "PS_FUZZ_SEED={seed}: the connection lives on");
        num_trained[which] += u64::from(weights.version() > Version(0));
    }
    // Not everything is damaged: what is intact has to work. Few inputs are intact and make sense to a follower. On
    // a busy machine some of them are handled after the look.
    for (num_trained, least) in num_trained
        .into_iter()
        .zip([num_inputs / 10, num_inputs / 5000])
    {
        assert!(
            num_trained > least,
            "trained after {num_trained} inputs only"
        );
    }
}

/// Some parameters whose names differ from seed to seed.
fn layout(rng: &mut TestRng) -> Layout {
    let mut start = 0;
    let parameters = (0..below(rng, 5)).map(|_| {
        let (rows, columns) = (below(rng, 4), below(rng, 4));
        let range = start..start + rows * columns;
        start = range.end;
        Parameter {
            name: format!("p{}", rng.next_u32() % 8),
            shape: vec![rows, columns],
            range,
        }
    });
    Layout::new(parameters.collect()).expect("they follow one another")
}

/// PS-6: whatever weights a worker gets are those of a model.
#[test]
fn nothing_that_a_peer_sends_as_weights_harms_a_worker() {
    let (num_inputs, seed) = (number("PS_FUZZ_INPUTS", 5_000), number("PS_FUZZ_SEED", 1));
    let (process, runtime) = fed();
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
    let fresh = || {
        let compute = compute.clone();
        let worker = Spawn::new().start(move || DataWorker::new(WorkerId(0), compute.clone()));
        worker.expect("there is a thread")
    };
    let mut worker = fresh();
    for index in 0..num_inputs {
        let seed = seed.wrapping_add(index);
        let rng = &mut rng(seed);
        let mut bytes = Vec::new();
        for call in 0..1 + below(rng, 6) as u64 {
            let layout = layout(rng);
            let values = vec![0.5; layout.num_weights()];
            let message = encode(&ComputeGradients(Weights::initial(layout, values)));
            let message = message.expect("it can be written");
            let lends = rng.next_u32().is_multiple_of(8);
            // Mostly the first kind, which asks.
            let kind = [0, 0, 0, below(rng, CALLER_FRAMES)][below(rng, 4)];
            bytes.extend(frame(kind, call, 0, message, lends));
        }
        damage(rng, &mut bytes);
        let feeding = process.feed(&worker, &bytes, index.is_multiple_of(2));
        let is_closed = runtime.block_on(feeding);
        match worker.ask(GetProgress).wait() {
            Ok(_) => {}
            // Damage can make a `Stop` or `Kill` of any frame. A panic is none of these.
            Err(CallError::NotDelivered {
                reason: NotDelivered::Stopped { panic: None },
                ..
            }) => {
                worker = fresh();
                continue;
            }
            Err(error) => panic!("PS_FUZZ_SEED={seed}: {error}"),
        }
        assert!(is_closed(), "PS_FUZZ_SEED={seed}: the connection lives on");
    }
    let num_computed = num_computed.load(Ordering::Relaxed);
    // Not everything is damaged: what is intact has to work.
    assert!(
        num_computed > num_inputs / 10,
        "computed {num_computed} times only"
    );
}
