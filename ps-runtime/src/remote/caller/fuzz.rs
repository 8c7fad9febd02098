//! PS-6 for the calling side: whatever an actor of another process answers, the caller goes on. Each call ends, and
//! nothing of it stays.

use std::time::{Duration, Instant};

use actix::{Context, Handler};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;

use super::connecting::call_over;
use super::*;
use crate::actor::{ActorRef, CallError, Reply};
use crate::codec::{self, Bulk, BulkBytes, Encoded};
use crate::net::NetConfig;
use crate::net::connection::Connection;
use crate::net::stream::Stream;
use crate::remote::{Messages, NodeId, Remote};
use crate::test_util::{Dice, Fed, damage, number};

/// All kinds of frames that a called actor's process can send.
const CALLEE_KINDS: [Kind; 10] = [
    Kind::Reply,
    Kind::Reply,
    Kind::Reply,
    Kind::Reply,
    Kind::Reply,
    Kind::Ended,
    Kind::Ping,
    Kind::Probe,
    Kind::Readable,
    Kind::Taken,
];

/// How many numbers the caller accepts in one message.
const MAX_NUMBERS: u64 = 1 << 16;

/// Each call ends much earlier, because its connection ends.
const LONG: Duration = Duration::from_secs(60);

/// The actor of the other process. Only its messages and their results matter here: no handler runs.
struct Elsewhere;

impl Actor for Elsewhere {
    type Context = Context<Self>;
}

#[derive(Message, Serialize, Deserialize)]
#[rtype(result = "Result<Bulk, String>")]
struct GetNumbers;

#[derive(Message, Serialize, Deserialize)]
#[rtype(result = "Result<BulkBytes, String>")]
struct GetBytes;

#[derive(Message, Serialize, Deserialize)]
#[rtype(result = "Result<Vec<ActorRef<Elsewhere>>, String>")]
struct GetOthers;

impl Handler<GetNumbers> for Elsewhere {
    type Result = Result<Bulk, String>;

    fn handle(&mut self, _: GetNumbers, _: &mut Self::Context) -> Self::Result {
        Err("it is elsewhere".to_owned())
    }
}

impl Handler<GetBytes> for Elsewhere {
    type Result = Result<BulkBytes, String>;

    fn handle(&mut self, _: GetBytes, _: &mut Self::Context) -> Self::Result {
        Err("it is elsewhere".to_owned())
    }
}

impl Handler<GetOthers> for Elsewhere {
    type Result = Result<Vec<ActorRef<Self>>, String>;

    fn handle(&mut self, _: GetOthers, _: &mut Self::Context) -> Self::Result {
        Err("it is elsewhere".to_owned())
    }
}

impl Remote for Elsewhere {
    fn messages(messages: &mut Messages<Self>) {
        messages.add::<GetNumbers>();
        messages.add::<GetBytes>();
        messages.add::<GetOthers>();
    }
}

/// A call that was made. It waits for the end of the call.
type Made = Box<dyn FnOnce() -> Result<(), CallError>>;

fn asked<M, R: Send + 'static>(called: Called<M, R>, look: impl FnOnce(R) + 'static) -> Made
where
    M: Send + 'static,
{
    let reply = Reply::started(called);
    Box::new(move || reply.wait_timeout(LONG).map(look))
}

/// Makes one of the calls. Returns how to wait for its end, and a right answer.
fn make_call(
    actor: &Arc<RemoteActor>,
    process: &Fed,
    local: &ActorRef<Elsewhere>,
    dice: &mut Dice,
) -> (Option<Made>, Encoded) {
    let table = Table::<Elsewhere>::get();
    let numbers = || Bulk::from(vec![0.5; 300]);
    let check_len = |result: Result<Bulk, String>| {
        let len = result.map_or(0, |numbers| numbers.len() as u64);
        assert!(len <= MAX_NUMBERS, "{len} numbers");
    };
    let ask = How::Ask(None);
    let (made, result) = on_behalf_of(process.process(), || match dice.below(5) {
        0 => (
            Some(asked(actor.call(&table, GetNumbers, ask), check_len)),
            codec::encode(&Ok::<_, String>(numbers())),
        ),
        1 => (
            Some(asked(actor.call(&table, GetBytes, ask), drop)),
            codec::encode(&Ok::<_, String>(BulkBytes::from(vec![7; 5000]))),
        ),
        2 => (
            Some(asked(actor.call(&table, GetOthers, ask), drop)),
            codec::encode(&Ok::<_, String>(vec![local.clone(); 3])),
        ),
        3 => (
            Some(asked(actor.call_kept(&table, GetNumbers), drop)),
            codec::encode(&process.keep(&Ok::<_, String>(numbers()))),
        ),
        _ => {
            let told = actor.call(&table, GetNumbers, How::Tell);
            drop(told.expect("there is a slot"));
            (None, Ok(Encoded::default()))
        }
    });
    (made, result.expect("each result can be written"))
}

/// An error as an actor's process sends it.
fn error(actor: &RemoteActor, dice: &mut Dice) -> Encoded {
    let reason = match dice.below(3) {
        0 => {
            let reason = UnknownOutcome::NoReply;
            let actor = Arc::clone(actor.name());
            return codec::encode(&CallError::Unknown { actor, reason })
                .expect("it can be written");
        }
        1 => NotDelivered::QueueFull { limit: 8 },
        _ => NotDelivered::TimedOut { after: LONG },
    };
    let error = actor.book().undelivered((), reason);
    codec::encode(&error).expect("it can be written")
}

/// How often something happened in all streams.
#[derive(Debug, Default)]
struct Counts {
    results: u64,
    errors_of_the_actor: u64,
    unreadable: u64,
    ends: u64,
}

/// Makes some calls, and lets the caller read damaged answers to them through this connection.
async fn run(
    actor: &Arc<RemoteActor>,
    answers: &[u8],
    ours: impl AsyncRead + AsyncWrite,
    theirs: Stream,
) {
    let connection = Connection::new(theirs, actor.process.config());
    let calling = call_over(Arc::clone(actor), connection, MAX_NUMBERS, &[]);
    let (mut read, mut write) = tokio::io::split(ours);
    let answering = async {
        // The caller may have closed the connection already.
        let _ = write.write_all(answers).await;
        let _ = write.shutdown().await;
    };
    let mut sent = Vec::new();
    let listening = read.read_to_end(&mut sent);
    let _ = tokio::join!(calling, answering, listening);
}

#[test]
fn nothing_that_a_called_actor_answers_harms_its_caller() {
    let num_inputs = number("PS_FUZZ_INPUTS", 5_000);
    let first_seed = number("PS_FUZZ_SEED", 1);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("the system gives an event loop");
    // It is part of no cluster, so a lost connection is not opened again.
    let process = Fed::new(NetConfig {
        max_numbers: MAX_NUMBERS,
        ..NetConfig::default()
    });
    let local = crate::spawn(|| Elsewhere);
    let mut counts = Counts::default();
    for index in 0..num_inputs {
        let seed = first_seed.wrapping_add(index);
        let dice = &mut Dice::new(seed);
        let actor = RemoteActor::new(
            Arc::clone(process.process()),
            Wire {
                node: NodeId {
                    rank: 1,
                    incarnation: 0,
                },
                actor: 1,
                name: "elsewhere".into(),
                max_pending: 16,
                schema: 0,
            },
        );
        // The calls wait for the connection of this test.
        actor.lock().link = Link::Connecting;
        let (made, results): (Vec<_>, Vec<_>) = (0..1 + dice.below(6))
            .map(|_| make_call(&actor, &process, &local, dice))
            .unzip();
        let mut bytes = Vec::new();
        let mut frames = Vec::new();
        for (index, result) in results.into_iter().enumerate() {
            let kind = dice.one_of(&CALLEE_KINDS);
            let (code, contents) = match kind {
                Kind::Reply if dice.once_in(4) => (1, error(&actor, dice)),
                Kind::Reply => (0, result),
                _ => (0, Encoded::default()),
            };
            // Sometimes of a call that nobody has made.
            let call = 1 + index as u64 + u64::from(dice.once_in(8));
            let mut frame = OutFrame::new(kind, call, code, contents);
            if dice.once_in(4) {
                frame.lend();
            }
            bytes.extend(frame.rest().flatten());
            frames.push(frame);
        }
        if dice.once_in(2) {
            // What is lent can be read until then: a process can read its own memory.
            frames.clear();
        }
        damage(dice, &mut bytes);
        if index.is_multiple_of(2) {
            runtime.block_on(async {
                let (ours, theirs) = UnixStream::pair().expect("the system gives sockets");
                run(&actor, &bytes, ours, Stream::Unix(theirs)).await;
            });
        } else {
            let (ours, theirs) = tokio::io::duplex(1 << 16);
            runtime.block_on(run(&actor, &bytes, ours, Stream::Memory(theirs)));
        }
        let begun = Instant::now();
        for wait in made.into_iter().flatten() {
            match wait() {
                Ok(()) => counts.results += 1,
                Err(CallError::Unknown {
                    reason: UnknownOutcome::BadReply { .. },
                    ..
                }) => counts.unreadable += 1,
                Err(CallError::Unknown {
                    reason: UnknownOutcome::NoReply,
                    ..
                }) => counts.errors_of_the_actor += 1,
                Err(_) => {}
            }
        }
        counts.ends += u64::from(actor.has_ended());
        // The last connection that the actor asks for is refused on another thread.
        let is_idle = || {
            let state = actor.lock();
            let is_down = matches!(state.link, Link::Down | Link::Ended);
            is_down && state.calls.is_empty() && state.unsent.is_empty()
        };
        while !is_idle() && begun.elapsed() < LONG {
            std::thread::yield_now();
        }
        assert!(begun.elapsed() < LONG, "PS_FUZZ_SEED={seed}: a call hangs");
        assert!(
            actor.has_ended() || actor.book().pending() == 0,
            "PS_FUZZ_SEED={seed}: a slot is lost"
        );
    }
    // With very few streams, chance decides what they have.
    let reached = [
        counts.results,
        counts.errors_of_the_actor,
        counts.unreadable,
        counts.ends,
    ];
    assert!(
        num_inputs < 100 || reached.iter().all(|count| *count > 0),
        "not all was reached: {counts:?}"
    );
}
