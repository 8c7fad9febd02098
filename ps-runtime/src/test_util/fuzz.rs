//! Fuzz targets: actors read streams of frames that were damaged on the way (PS-6).
//!
//! A stream is made of real messages. Then bytes are changed, cut out, doubled and put in, and the result goes
//! through everything that a peer's bytes go through: frames, buffers, codec, checks of each type, handlers.
//! `PS_FUZZ_INPUTS` and `PS_FUZZ_SEED` change how many streams there are, and the seed of the first. A failure
//! names the seed of its stream.

use std::any::type_name;
use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use actix::Message;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::actor::{ActorRef, CallError, NotDelivered};
use crate::codec::{self, Encoded};
use crate::net::NetConfig;
use crate::net::connection::Connection;
use crate::net::frame::{Kind, OutFrame};
use crate::net::outbox::Outbox;
use crate::net::stream::Stream;
use crate::remote::callee::Server;
use crate::remote::process::{NodeId, Process};
use crate::remote::reference::on_behalf_of;
use crate::remote::table::Table;
use crate::remote::{KEPT_FOR, Kept, Remote};

/// How many kinds of frames a caller can send.
pub const CALLER_FRAMES: usize = CALLER_KINDS.len();

const CALLER_KINDS: [Kind; 8] = [
    Kind::Ask,
    Kind::Ask,
    Kind::Ask,
    Kind::Tell,
    Kind::Tell,
    Kind::Cancel,
    Kind::Ping,
    Kind::Probe,
];

/// Returns the bytes of one frame of a caller. `kind` is the number of its kind, below [`CALLER_FRAMES`].
///
/// If the frame lends its numbers, they are freed before they can be read: a peer can claim to lend
/// anything.
///
/// # Panics
/// When there is no such kind.
#[must_use]
pub fn frame(kind: usize, call: u64, code: u32, message: Encoded, lends: bool) -> Vec<u8> {
    let mut frame = OutFrame::new(CALLER_KINDS[kind], call, code, message);
    if lends {
        frame.lend();
    }
    frame.rest().flatten().copied().collect()
}

/// A message as it is sent: its code in the table of the actor's type, and its bytes.
pub type Sent = (u32, Encoded);

/// Checks that these are the codes of all messages that other processes can send to an actor of type `A`, but for
/// `num_left_out` of them.
///
/// # Panics
/// When more are missing, or fewer.
pub fn offers_all<A: Remote>(offered: impl IntoIterator<Item = u32>, num_left_out: usize) {
    let offered: BTreeSet<u32> = offered.into_iter().collect();
    let all = 0..Table::<A>::get().num_messages();
    let missing: Vec<u32> = all.filter(|code| !offered.contains(code)).collect();
    let actor = type_name::<A>();
    assert!(
        missing.len() == num_left_out,
        "this fuzz target sends no message {missing:?} of {actor}, counted from 0 in `Remote::messages`: add it"
    );
}

/// The random numbers of one stream: `SplitMix64` (Steele, Lea and Flood, OOPSLA 2014).
#[derive(Debug)]
pub struct Dice(u64);

impl Dice {
    /// Makes the numbers of this seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Returns any number.
    pub fn any(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// Returns a number below `end`, or 0.
    pub fn below(&mut self, end: u64) -> u64 {
        self.any() % end.max(1)
    }

    /// Returns one of some values.
    ///
    /// # Panics
    /// When there is none.
    pub fn one_of<T: Copy>(&mut self, values: &[T]) -> T {
        values[self.place(values.len())]
    }

    /// Returns true once in so many times.
    pub fn once_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    fn place(&mut self, len: usize) -> usize {
        self.below(len as u64) as usize
    }
}

/// Changes, cuts out, doubles and puts in bytes here and there.
pub(crate) fn damage(dice: &mut Dice, bytes: &mut Vec<u8>) {
    for _ in 0..dice.below(4) {
        let at = dice.place(bytes.len());
        match dice.below(5) {
            0 => bytes[at] = dice.any() as u8,
            1 => bytes[at] ^= 1 << dice.below(8),
            2 => bytes.truncate(at),
            3 => {
                let end = at + dice.place(bytes.len() - at);
                let piece = bytes[at..end].to_vec();
                bytes.splice(at..at, piece);
            }
            _ => {
                let value = dice.one_of(&[0, 1, u64::from(u32::MAX), u64::MAX]);
                let end = bytes.len().min(at + 8);
                bytes.splice(at..end, value.to_le_bytes());
            }
        }
        if bytes.is_empty() {
            break;
        }
    }
}

/// How a fuzz target runs.
#[derive(Clone, Copy, Debug)]
pub struct Fuzz {
    /// One in so many of the streams that `PS_FUZZ_INPUTS` asks for.
    pub one_in: u64,
    /// After how many streams another actor is made. Some messages end all that could come after.
    pub fresh_every: u64,
}

impl Fuzz {
    /// Lets an actor read damaged streams. `fresh` makes the actor. `offered` returns messages to it, of which
    /// one is sent. Over all streams, it must offer each message of the table. `look` calls the actor after each
    /// stream, and says whether something that was sent has had an effect. Returns how often it had.
    ///
    /// # Panics
    /// When the actor panics, a connection stays open, or a message was never offered.
    pub fn run<A: Remote>(
        self,
        mut fresh: impl FnMut(&Fed) -> ActorRef<A>,
        mut offered: impl FnMut(&Fed, &mut Dice) -> Vec<Sent>,
        mut look: impl FnMut(&ActorRef<A>) -> Result<bool, CallError>,
    ) -> u64 {
        let num_inputs = number("PS_FUZZ_INPUTS", 5_000).div_ceil(self.one_in);
        let first_seed = number("PS_FUZZ_SEED", 1);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        let runtime = runtime.expect("the system gives an event loop");
        let process = Fed::new(NetConfig {
            max_numbers: 1 << 16,
            ..NetConfig::default()
        });
        let mut codes = BTreeSet::new();
        let mut actor = fresh(&process);
        let mut num_effects = 0;
        for index in 0..num_inputs {
            if index % self.fresh_every == self.fresh_every - 1 {
                actor.kill();
                actor = fresh(&process);
            }
            let seed = first_seed.wrapping_add(index);
            let dice = &mut Dice::new(seed);
            let mut bytes = Vec::new();
            for call in 0..1 + dice.below(6) {
                let mut messages = offered(&process, dice);
                codes.extend(messages.iter().map(|(code, _)| *code));
                let sent = dice.place(messages.len());
                let (mut code, message) = messages.swap_remove(sent);
                if dice.once_in(8) {
                    // Under another one's code, or one that nobody has.
                    code = dice.below(u64::from(Table::<A>::get().num_messages()) + 1) as u32;
                }
                let kind = dice.place(CALLER_FRAMES);
                bytes.extend(frame(kind, call, code, message, dice.once_in(8)));
            }
            damage(dice, &mut bytes);
            // A process can read its own memory, so this one's can be lent through a socket.
            let feeding = process.feed(&actor, &bytes, index.is_multiple_of(2));
            let is_closed = runtime.block_on(feeding);
            match look(&actor) {
                Ok(has_effect) => num_effects += u64::from(has_effect),
                // Damage can make a `Stop` or `Kill` of any frame. A panic is none of these.
                Err(CallError::NotDelivered {
                    reason: NotDelivered::Stopped { panic: None },
                    ..
                }) => {
                    actor = fresh(&process);
                    continue;
                }
                Err(error) => panic!("PS_FUZZ_SEED={seed}: {error}"),
            }
            // The actor has read all of it by now. A call that still waits must not keep a socket open.
            assert!(is_closed(), "PS_FUZZ_SEED={seed}: the connection lives on");
        }
        // With very few streams, chance decides what they have.
        if num_inputs >= 100 {
            offers_all::<A>(codes, 0);
        }
        num_effects
    }
}

pub(crate) fn number(name: &str, default: u64) -> u64 {
    let given = std::env::var(name).ok();
    given.map_or(default, |text| text.parse().expect("a whole number"))
}

/// A process that passes bytes to its actors as if they came from a peer.
pub struct Fed {
    process: Arc<Process>,
}

impl fmt::Debug for Fed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Fed")
    }
}

impl Fed {
    /// Makes a process with these settings.
    #[must_use]
    pub fn new(config: NetConfig) -> Self {
        let process = Process::new(config, None, None, None);
        process.enter(NodeId::DRIVER, 1);
        Self { process }
    }

    #[cfg(test)]
    pub(crate) fn process(&self) -> &Arc<Process> {
        &self.process
    }

    /// Writes a message to an actor of type `A`. References and kept values in it are this process's.
    ///
    /// # Panics
    /// When the actor takes no such message, or the message cannot be written.
    pub fn sent<A: Remote, M: Message + 'static>(&self, message: &M) -> Sent {
        let Some((code, codec)) = Table::<A>::get().codec::<M>() else {
            panic!("{} takes no {}", type_name::<A>(), type_name::<M>());
        };
        let encoded = on_behalf_of(&self.process, || (codec.encode)(message));
        (code, encoded.expect("each message can be written"))
    }

    /// Keeps a value in this process, and returns a ticket for it.
    ///
    /// # Panics
    /// When the value cannot be written.
    pub fn keep<T: Serialize + DeserializeOwned>(&self, value: &T) -> Kept<T> {
        let encoded = on_behalf_of(&self.process, || codec::encode(value));
        let encoded = encoded.expect("each value can be written");
        let ticket = match self.process.keep_result(encoded.clone()) {
            Ok(ticket) => ticket,
            Err(_) => {
                // It is full of values whose tickets were damaged.
                let later = Instant::now() + KEPT_FOR + Duration::from_secs(1);
                self.process.sweep_kept(later);
                self.process.keep_result(encoded).expect("it is empty")
            }
        };
        Kept::of_ticket(ticket, &self.process)
    }

    /// Lets an actor read the bytes through a socket or a pipe in memory, to their end or until it ends the
    /// connection. The returned function says whether the connection is closed.
    ///
    /// # Panics
    /// When the system gives no sockets.
    pub async fn feed<A: Remote>(
        &self,
        actor: &ActorRef<A>,
        bytes: &[u8],
        by_socket: bool,
    ) -> impl Fn() -> bool + use<A> {
        let socket = if by_socket {
            let (ours, theirs) = UnixStream::pair().expect("the system gives sockets");
            self.feed_through(actor, bytes, ours, Stream::Unix(theirs))
                .await
        } else {
            let (ours, theirs) = tokio::io::duplex(1 << 16);
            self.feed_through(actor, bytes, ours, Stream::Memory(theirs))
                .await
        };
        move || socket.strong_count() == 0
    }

    async fn feed_through<A: Remote>(
        &self,
        actor: &ActorRef<A>,
        bytes: &[u8],
        ours: impl AsyncRead + AsyncWrite,
        theirs: Stream,
    ) -> Weak<Outbox> {
        let process = &self.process;
        let number = process.export(actor).actor;
        let (callee, hold) = process.open(number).expect("it was just exported");
        let connection = Connection::new(theirs, process.config());
        let outbox = Arc::clone(&connection.outbox);
        let socket = Arc::downgrade(&outbox);
        let max_numbers = process.config().max_numbers;
        let peer = Server::new(
            process,
            callee,
            outbox,
            hold,
            Box::new(|| true),
            max_numbers,
        );
        let serving = connection.run(&[], process.config(), process.buffers(), peer);
        let (mut read, mut write) = tokio::io::split(ours);
        let calling = async {
            // The other side may have closed the connection already.
            let _ = write.write_all(bytes).await;
            let _ = write.shutdown().await;
        };
        let mut replies = Vec::new();
        let listening = read.read_to_end(&mut replies);
        let _ = tokio::join!(serving, calling, listening);
        socket
    }
}
