//! A stream of bytes from a peer goes through all that such bytes go through: the frame reader, the codec, the
//! checks of each message, and the handlers of a server or of a worker (PS-6).

use std::cell::RefCell;

use ps_actors::actor::{ActorRef, CallError, NotDelivered, Spawn};
use ps_actors::group::ServerGroup;
use ps_actors::ids::{Clock, GradientId, Incarnation, JoinRequest, Version, WorkerId};
use ps_actors::net::NetConfig;
use ps_actors::rule::UpdateRule;
use ps_actors::server::{
    ApplyGradients, ApplyKept, Consistency, ForgetSavedStates, GetAppliedParts, GetSavedState,
    GetStatus, GetWeights, Heartbeat, Join, Leave, ParameterServer, Pull, PullVersion, Push,
    PushPull, ReportLost, ServerConfig, SetConsistency, SetLearningRate, SetPaused, Stage,
    TakeCheckpoint,
};
use ps_actors::weights::{Gradient, GradientUpdate, Layout, Parameter, Weights};
use ps_actors::worker::{
    ComputeGradients, DataWorker, GetProgress, GetSteps, GoOnAt, KeepMembership, LocalGradient,
    RunSteps, SourceError, StopSteps, WorkerError,
};
use ps_runtime::test_util::{CALLER_FRAMES, Fed, Sent, frame, offers_all};

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

/// Returns one input for each kind of frame and each message that a program can make.
///
/// # Panics
/// When a message is missing, or cannot be written.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    let actors = Actors::new();
    let (to_server, to_worker) = (actors.to_server(), actors.to_worker());
    let codes = |messages: &[Sent]| messages.iter().map(|(code, _)| *code).collect::<Vec<_>>();
    // `Follow` has the secret of a group. `ps-actors/src/server/fuzz.rs` sends it.
    offers_all::<ParameterServer>(codes(&to_server), 1);
    offers_all::<DataWorker<Compute>>(codes(&to_worker), 0);
    let seed = |which: u8, (code, message): &Sent| {
        [vec![which], frame(0, 1, *code, message.clone(), false)].concat()
    };
    let of_server = to_server.iter().map(|sent| seed(0, sent));
    let of_worker = to_worker.iter().map(|sent| seed(1, sent));
    let mut seeds: Vec<Vec<u8>> = of_server.chain(of_worker).collect();
    seeds.push([vec![2], actors.a_run()].concat());
    for kind in 0..CALLER_FRAMES {
        let (code, message) = actors.process.sent::<ParameterServer, _>(&GetWeights);
        seeds.push([vec![2], frame(kind, 7, code, message, kind == 0)].concat());
    }
    seeds
}

fn update() -> GradientUpdate {
    GradientUpdate {
        id: GradientId {
            worker: WorkerId(0),
            incarnation: Incarnation(1),
            clock: Clock(0),
        },
        computed_on: Version(0),
        loss: 1.0,
        num_examples: 4,
        gradient: Gradient::new(vec![0.5; NUM_WEIGHTS]),
    }
}

impl Actors {
    /// What a worker does in a run.
    fn a_run(&self) -> Vec<u8> {
        let (worker, incarnation) = (WorkerId(0), Incarnation(1));
        let request = JoinRequest(1);
        let sent = [
            self.server(&Join { worker, request }),
            self.server(&Push(update())),
            self.server(&PushPull::new(update())),
            self.server(&Leave {
                worker,
                incarnation,
            }),
        ];
        // A second call with the same number would end the connection.
        let frames = (1..).zip(sent);
        let frames = frames.map(|(call, (code, message))| frame(0, call, code, message, false));
        frames.flatten().collect()
    }

    fn server<M: actix::Message + 'static>(&self, message: &M) -> Sent {
        self.process.sent::<ParameterServer, M>(message)
    }

    fn worker<M: actix::Message + 'static>(&self, message: &M) -> Sent {
        self.process.sent::<DataWorker<Compute>, M>(message)
    }

    fn to_server(&self) -> Vec<Sent> {
        let GradientId {
            worker,
            incarnation,
            ..
        } = update().id;
        let (id, gradient, request) = (update().id, update().gradient, JoinRequest(1));
        let (version, until) = (Version(0), Version(0));
        let kept: Result<GradientUpdate, WorkerError> = Ok(update());
        let kept = self.process.keep(&kept);
        vec![
            self.server(&GetWeights),
            self.server(&Pull::new(PullVersion::AtLeast(version))),
            self.server(&ApplyGradients::mean([update()])),
            self.server(&ApplyKept::mean([kept])),
            self.server(&Join { worker, request }),
            self.server(&Leave {
                worker,
                incarnation,
            }),
            self.server(&ReportLost { worker }),
            self.server(&Heartbeat {
                worker,
                incarnation,
            }),
            self.server(&Stage { id, gradient }),
            self.server(&Push(update())),
            self.server(&PushPull::new(update())),
            self.server(&SetConsistency(Consistency::Ssp { bound: 1 })),
            self.server(&SetLearningRate(0.1)),
            self.server(&GetStatus),
            self.server(&TakeCheckpoint),
            self.server(&GetSavedState { version }),
            self.server(&ForgetSavedStates { until }),
            self.server(&SetPaused(false)),
            self.server(&GetAppliedParts { from: 0 }),
        ]
    }

    fn to_worker(&self) -> Vec<Sent> {
        let layout = Layout::new(vec![Parameter {
            name: "weight".to_owned(),
            shape: vec![2, 3],
            range: 0..6,
        }]);
        let weights = Weights::initial(layout.expect("it is whole"), vec![0.5; 6]);
        let servers = ServerGroup::from(self.server.clone());
        let (clock, after) = (Clock(3), Incarnation(1));
        let num_steps = 2;
        vec![
            self.worker(&ComputeGradients(weights)),
            self.worker(&RunSteps { servers, num_steps }),
            self.worker(&GoOnAt { clock, after }),
            self.worker(&StopSteps),
            self.worker(&KeepMembership),
            self.worker(&GetProgress),
            self.worker(&GetSteps { from: clock }),
        ]
    }
}
