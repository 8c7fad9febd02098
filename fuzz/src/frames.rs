//! A stream of bytes from a peer goes through all that such bytes go through: the frame reader, the codec, the
//! checks of each message, and the handlers of a server or of a worker (PS-6).

use std::cell::RefCell;

use ps_actors::actor::{ActorRef, CallError, NotDelivered, Spawn};
use ps_actors::codec::{CodecError, Encoded, encode};
use ps_actors::ids::{Clock, GradientId, Incarnation, JoinRequest, Version, WorkerId};
use ps_actors::net::NetConfig;
use ps_actors::rule::UpdateRule;
use ps_actors::server::{
    ApplyGradients, Consistency, ForgetSavedStates, GetSavedState, GetStatus, GetWeights,
    Heartbeat, Join, Leave, ParameterServer, Pull, PullVersion, Push, PushPull, ReportLost,
    ServerConfig, SetConsistency, SetLearningRate, SetPaused, Stage, TakeCheckpoint,
};
use ps_actors::weights::{Gradient, GradientUpdate, Layout, Parameter, Weights};
use ps_actors::worker::{
    ComputeGradients, DataWorker, GetProgress, GoOnAt, LocalGradient, SourceError, StopSteps,
};
use ps_runtime::test_util::{CALLER_FRAMES, Fed, frame};

const NUM_WEIGHTS: usize = 9;

/// Gives the bytes behind the first one to the server or to the worker, which the first byte chooses.
///
/// # Panics
/// When a peer could do harm with these bytes.
pub fn run(input: &[u8]) {
    thread_local! {
        static ACTORS: RefCell<Actors> = RefCell::new(Actors::new());
    }
    if let Some((which, bytes)) = input.split_first() {
        ACTORS.with_borrow_mut(|actors| actors.feed(*which, bytes));
    }
}

type Compute = fn(Clock, &Weights) -> Result<LocalGradient, SourceError>;

struct Actors {
    process: Fed,
    runtime: tokio::runtime::Runtime,
    server: ActorRef<ParameterServer>,
    worker: ActorRef<DataWorker<Compute>>,
}

impl Actors {
    fn new() -> Self {
        let config = NetConfig {
            max_numbers: 1 << 16,
            ..NetConfig::default()
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        Self {
            process: Fed::new(config),
            runtime: runtime.expect("the system gives an event loop"),
            server: server(),
            worker: worker(),
        }
    }

    fn feed(&mut self, which: u8, bytes: &[u8]) {
        let by_socket = which & 2 != 0;
        if which & 1 == 0 {
            let feeding = self.process.feed(&self.server, bytes, by_socket);
            let is_closed = self.runtime.block_on(feeding);
            match is_well(self.server.ask(GetWeights).wait()) {
                true => assert!(is_closed(), "the connection lives on"),
                false => self.server = server(),
            }
        } else {
            let feeding = self.process.feed(&self.worker, bytes, by_socket);
            let is_closed = self.runtime.block_on(feeding);
            match is_well(self.worker.ask(GetProgress).wait()) {
                true => assert!(is_closed(), "the connection lives on"),
                false => self.worker = worker(),
            }
        }
    }
}

/// False for an actor that a frame has stopped, as any peer may. A panic is something else.
fn is_well<T>(answer: Result<T, CallError>) -> bool {
    match answer {
        Ok(_) => true,
        Err(CallError::NotDelivered {
            reason: NotDelivered::Stopped { panic: None },
            ..
        }) => false,
        Err(error) => panic!("{error}"),
    }
}

/// Looks at what the server's checks let through. The weights stay small whatever arrives.
#[derive(Debug)]
struct Checked;

impl UpdateRule for Checked {
    fn update(&mut self, weights: &mut [f32], gradient: &[f32], learning_rate: f64) {
        assert_eq!((weights.len(), gradient.len()), (NUM_WEIGHTS, NUM_WEIGHTS));
        assert!(learning_rate.is_finite() && learning_rate >= 0.0);
        for (weight, slope) in weights.iter_mut().zip(gradient) {
            assert!(slope.is_finite(), "{gradient:?}");
            *weight -= 0.1 * slope.signum();
        }
    }
}

fn server() -> ActorRef<ParameterServer> {
    let initial = Weights::initial(Layout::flat(NUM_WEIGHTS), vec![1.0; NUM_WEIGHTS]);
    let config = ServerConfig {
        consistency: Consistency::Asp,
        ..ServerConfig::default()
    };
    let server = ParameterServer::new(&initial, Checked, config).expect("the settings work");
    server.spawn().expect("there is a thread")
}

fn worker() -> ActorRef<DataWorker<Compute>> {
    let worker = Spawn::new().start(|| DataWorker::new(WorkerId(0), compute as Compute));
    worker.expect("there is a thread")
}

/// Checks that whatever weights a worker gets are those of a model.
fn compute(_: Clock, weights: &Weights) -> Result<LocalGradient, SourceError> {
    let mut end = 0;
    for Parameter { shape, range, .. } in weights.layout().parameters() {
        assert_eq!(range.start, end);
        assert_eq!(range.len(), shape.iter().product::<usize>());
        end = range.end;
    }
    assert!(weights.range().end <= end);
    Ok(LocalGradient {
        gradient: Gradient::new(weights.to_vec()),
        loss: 1.0,
        num_examples: 1,
    })
}

/// Returns one input for each kind of frame and each message that can be made outside of a cluster.
///
/// # Panics
/// When a message cannot be written.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    let to_server = server_messages().map(|(code, message)| (0, code, message));
    let to_worker = worker_messages().map(|(code, message)| (1, code, message));
    let all = to_server.into_iter().chain(to_worker);
    let mut seeds: Vec<Vec<u8>> = all
        .map(|(which, code, message)| {
            let message = message.expect("each can be written");
            let mut input = vec![which];
            input.extend(frame(0, 1, code, message, false));
            input
        })
        .collect();
    // What a worker does in a run.
    let run: Vec<u8> = [4, 9, 10, 5]
        .iter()
        .flat_map(|&code| seeds[place(code)][1..].to_vec())
        .collect();
    seeds.push([vec![2], run].concat());
    for kind in 0..CALLER_FRAMES {
        let message = encode(&GetWeights).expect("it can be written");
        seeds.push([vec![2], frame(kind, 7, 0, message, kind == 0)].concat());
    }
    seeds
}

/// Where the message of the server with this code is among the seeds. Code 3 needs a cluster.
fn place(code: u32) -> usize {
    let is_it = |(known, _): &(u32, _)| *known == code;
    server_messages()
        .iter()
        .position(is_it)
        .expect("it is there")
}

/// With the codes that `ParameterServer`'s list of messages gives them.
fn server_messages() -> [(u32, Result<Encoded, CodecError>); 17] {
    let (worker, incarnation) = (WorkerId(0), Incarnation(1));
    let id = GradientId {
        worker,
        incarnation,
        clock: Clock(0),
    };
    let gradient = Gradient::new(vec![0.5; NUM_WEIGHTS]);
    let update = GradientUpdate {
        id,
        computed_on: Version(0),
        loss: 1.0,
        num_examples: 4,
        gradient: gradient.clone(),
    };
    [
        (0, encode(&GetWeights)),
        (1, encode(&Pull(PullVersion::AtLeast(Version(0))))),
        (2, encode(&ApplyGradients::mean([update.clone()]))),
        (
            4,
            encode(&Join {
                worker,
                request: JoinRequest(1),
            }),
        ),
        (
            5,
            encode(&Leave {
                worker,
                incarnation,
            }),
        ),
        (6, encode(&ReportLost { worker })),
        (
            7,
            encode(&Heartbeat {
                worker,
                incarnation,
            }),
        ),
        (8, encode(&Stage { id, gradient })),
        (9, encode(&Push(update.clone()))),
        (10, encode(&PushPull(update))),
        (11, encode(&SetConsistency(Consistency::Ssp { bound: 1 }))),
        (12, encode(&SetLearningRate(0.1))),
        (13, encode(&GetStatus)),
        (14, encode(&TakeCheckpoint)),
        (
            15,
            encode(&GetSavedState {
                version: Version(0),
            }),
        ),
        (16, encode(&ForgetSavedStates { until: Version(0) })),
        (18, encode(&SetPaused(false))),
    ]
}

/// With the codes that `DataWorker`'s list of messages gives them.
fn worker_messages() -> [(u32, Result<Encoded, CodecError>); 4] {
    let layout = Layout::new(vec![Parameter {
        name: "weight".to_owned(),
        shape: vec![2, 3],
        range: 0..6,
    }]);
    let weights = Weights::initial(layout.expect("it is whole"), vec![0.5; 6]);
    let go_on = GoOnAt {
        clock: Clock(3),
        after: Incarnation(1),
    };
    [
        (0, encode(&ComputeGradients(weights))),
        (2, encode(&go_on)),
        (3, encode(&StopSteps)),
        (4, encode(&GetProgress)),
    ]
}
