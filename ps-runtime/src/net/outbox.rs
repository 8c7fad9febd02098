//! The frames that wait to be written to one connection.
//!
//! A thread that sends a small frame writes it to the socket itself, at once, if no other frame waits.
//! This saves waking the network thread, which costs more than the write. What the socket does not take
//! is left to the connection's [`write`](Outbox::write) task.
//!
//! The numbers of large frames are lent to a peer that can read this process's memory; see
//! [`peer_memory`](super::peer_memory). Lent frames are kept here until the peer has copied them.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::Notify;

use super::connection::Ended;
use super::frame::{Kind, OutFrame};
use super::peer_memory::Probe;
use super::stream::{Socket, WriteHalf};

/// The largest frame, in bytes, that the sending thread writes itself.
const MAX_DIRECT: usize = 64 << 10;

/// The numbers of frames with at least this many bytes are lent.
pub(super) const MIN_LENT: usize = 128 << 10;

/// How many replies may be lent at the same time. Further replies are written, which waits for the peer.
/// Calls are not limited, because they are kept until their replies arrive in any case.
pub(super) const MAX_LENT: usize = 4;

/// If this many frames wait for a peer, or a few with this many bytes, nothing more is read from the peer.
/// The limits allow more calls than a caller has under way by default, and some large snapshots.
const MAX_WAITING: usize = 2048;
const MAX_FEW: usize = 8;
const MAX_WAITING_BYTES: usize = 64 << 20;

/// How many pieces of memory, and how many bytes, one system call writes at most.
const MAX_PIECES: usize = 32;
const MAX_BYTES: usize = 1 << 20;

pub(crate) struct Outbox {
    // Declared before `state`, so that it is dropped first: lent memory must not be dropped before the
    // peer can see that the connection is closed.
    socket: Option<Socket>,
    state: Mutex<State>,
    more: Notify,
    /// Notified when frames were written.
    less: Notify,
}

struct State {
    queue: VecDeque<OutFrame>,
    peer: Borrower,
    /// Frames that are written except for their numbers, which the peer has not copied yet.
    lent: VecDeque<OutFrame>,
    last_write: Instant,
    /// Set when no more frames will come. The task ends when it has written the frames that wait.
    is_finished: bool,
    closed: Option<Arc<str>>,
}

/// Whether the peer can read this process's memory.
enum Borrower {
    /// The peer may be able to.
    Unknown,
    /// The peer was asked to look for a secret.
    Looks(#[expect(dead_code, reason = "kept where the peer looks for it")] Probe),
    /// The peer can.
    Able,
    /// Nothing is ever lent to the peer.
    Unable,
}

/// The writer of a connection that only one task can write to.
pub(crate) type TaskWriter = Option<Pin<Box<dyn AsyncWrite + Send>>>;

impl Outbox {
    /// `may_lend` says that the peer may be able to read this process's memory.
    pub(crate) fn new(write: WriteHalf, may_lend: bool) -> (Self, TaskWriter) {
        let (socket, task) = match write {
            WriteHalf::Tcp(socket) => (Some(Socket::Tcp(socket)), None),
            WriteHalf::Unix(socket) => (Some(Socket::Unix(socket)), None),
            WriteHalf::Task(writer) => (None, Some(writer)),
        };
        let outbox = Self {
            socket,
            state: Mutex::new(State {
                queue: VecDeque::new(),
                peer: match may_lend {
                    true => Borrower::Unknown,
                    false => Borrower::Unable,
                },
                lent: VecDeque::new(),
                last_write: Instant::now(),
                is_finished: false,
                closed: None,
            }),
            more: Notify::new(),
            less: Notify::new(),
        };
        (outbox, task)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code of the user runs under the lock, so a poisoned state is whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes a frame, or queues it. Returns the frame if the connection is closed.
    pub(crate) fn send(&self, mut frame: OutFrame) -> Result<(), OutFrame> {
        let mut state = self.lock();
        if state.closed.is_some() || state.is_finished {
            return Err(frame);
        }
        if frame.len() >= MIN_LENT {
            state.try_to_lend(&mut frame);
        }
        let may_write = state.queue.is_empty() && frame.len() <= MAX_DIRECT;
        state.queue.push_back(frame);
        let mut done = Vec::new();
        let progress = match &self.socket {
            // The task meets the same error again and reports it.
            Some(socket) if may_write => state.write_step(socket, &mut done).ok(),
            _ => None,
        };
        drop(state);
        drop(done);
        if progress != Some(Progress::Empty) {
            self.more.notify_one();
        }
        Ok(())
    }

    /// Waits until the frames that wait to be written are below the limits.
    ///
    /// # Errors
    /// When the peer has taken nothing for `patience`.
    pub(super) async fn room(&self, patience: Duration) -> Result<(), Ended> {
        let begin = Instant::now();
        loop {
            let silent_for = {
                let state = self.lock();
                if !state.is_full() {
                    return Ok(());
                }
                state.last_write.max(begin).elapsed()
            };
            let Some(left) = patience.checked_sub(silent_for) else {
                let why = format!("the peer has read no replies for {patience:?}");
                return Err(Ended::Peer(why));
            };
            // A notification that came earlier is kept. In any case the state is checked again.
            let left = left.max(Duration::from_millis(1));
            let _ = tokio::time::timeout(left, self.less.notified()).await;
        }
    }

    /// Records that the peer can read this process's memory.
    pub(crate) fn peer_can_read(&self) {
        let mut state = self.lock();
        if matches!(state.peer, Borrower::Looks(_)) {
            state.peer = Borrower::Able;
        }
    }

    /// Whether something is lent that the peer has not copied yet.
    pub(super) fn has_lent(&self) -> bool {
        !self.lock().lent.is_empty()
    }

    #[cfg(test)]
    pub(super) fn lends(&self) -> bool {
        matches!(self.lock().peer, Borrower::Able)
    }

    /// Records that the peer has copied the numbers that were lent with a call's frame. Returns `false` if
    /// that was not lent.
    pub(crate) fn taken(&self, call: u64) -> bool {
        let mut state = self.lock();
        let is_next = state.lent.front().is_some_and(|lent| lent.call() == call);
        let taken = if is_next {
            state.lent.pop_front()
        } else {
            None
        };
        let is_over = state.is_over();
        drop(state);
        drop(taken);
        if is_over {
            self.more.notify_one();
        }
        is_next
    }

    /// Takes no more frames. The connection ends when the frames that wait have been written.
    pub(crate) fn finish(&self) {
        self.lock().is_finished = true;
        self.more.notify_one();
    }

    /// Removes a frame of which nothing was written.
    pub(crate) fn take_back(&self, call: u64) -> Option<OutFrame> {
        let mut state = self.lock();
        let is_it =
            |frame: &OutFrame| frame.is_call() && frame.call() == call && !frame.has_begun();
        let place = state.queue.iter().position(is_it)?;
        state.queue.remove(place)
    }

    /// Closes the outbox and returns the frames of which nothing was written.
    pub(crate) fn close(&self, why: &Arc<str>) -> Vec<OutFrame> {
        let mut state = self.lock();
        state.closed.get_or_insert_with(|| Arc::clone(why));
        let queue = std::mem::take(&mut state.queue);
        let lent = std::mem::take(&mut state.lent);
        drop(state);
        self.more.notify_one();
        self.less.notify_one();
        if let Some(socket) = &self.socket {
            // Lent memory may be used for something else from now on. The peer must see that.
            socket.hang_up();
        }
        drop(lent);
        let (begun, mut whole): (Vec<_>, Vec<_>) = queue.into_iter().partition(OutFrame::has_begun);
        drop(begun);
        whole.iter_mut().for_each(OutFrame::take_home);
        whole
    }

    /// Writes queued frames until the outbox is finished and empty, or closed.
    pub(crate) async fn write(&self, writer: TaskWriter) -> io::Result<()> {
        match (&self.socket, writer) {
            (Some(socket), _) => self.write_to_socket(socket).await,
            (None, Some(writer)) => self.write_as_task(writer).await,
            (None, None) => Ok(()),
        }
    }

    async fn write_to_socket(&self, socket: &Socket) -> io::Result<()> {
        loop {
            let mut done = Vec::new();
            let (progress, is_over) = {
                let mut state = self.lock();
                let progress = state.write_step(socket, &mut done)?;
                (progress, state.is_over())
            };
            // Dropped outside the lock, because callers wait for the lock and this may free 100 MB.
            drop(done);
            self.less.notify_one();
            match (progress, is_over) {
                (_, true) => return Ok(()),
                (Progress::Empty, false) => self.more.notified().await,
                (Progress::Full, false) => socket.writable().await?,
                // Lets callers and other connections run within a long frame, too.
                (Progress::Some, false) => tokio::task::yield_now().await,
            }
        }
    }

    async fn write_as_task(&self, mut writer: Pin<Box<dyn AsyncWrite + Send>>) -> io::Result<()> {
        loop {
            // The bytes are copied once here. The pipe or the cipher that gets them copies them anyway.
            let chunk = self.lock().queue.front_mut().map(OutFrame::next_chunk);
            match chunk {
                Some(bytes) => {
                    writer.write_all(&bytes).await?;
                    let done = {
                        let mut state = self.lock();
                        state.last_write = Instant::now();
                        let is_done = state.queue.front().is_some_and(OutFrame::is_done);
                        is_done.then(|| state.queue.pop_front())
                    };
                    drop(done);
                    self.less.notify_one();
                }
                None => {
                    writer.flush().await?;
                    if self.lock().is_over() {
                        return writer.shutdown().await;
                    }
                    self.more.notified().await;
                }
            }
        }
    }

    /// Sends a heartbeat whenever nothing else was written for some time, until it is dropped.
    pub(crate) async fn ping(&self, every: Duration) -> Infallible {
        loop {
            let silent_for = self.lock().last_write.elapsed();
            match every.checked_sub(silent_for) {
                Some(left) if !left.is_zero() => tokio::time::sleep(left).await,
                _ => {
                    let is_idle = self.lock().queue.is_empty();
                    if is_idle {
                        // This fails if nothing more is to be written. Reading goes on for a moment.
                        let _ = self.send(OutFrame::signal(Kind::Ping, 0));
                    }
                    tokio::time::sleep(every).await;
                }
            }
        }
    }
}

impl State {
    fn is_over(&self) -> bool {
        let is_done = self.queue.is_empty() && self.lent.is_empty();
        self.closed.is_some() || (self.is_finished && is_done)
    }

    /// Whether so many frames wait that the peer must read first.
    fn is_full(&self) -> bool {
        let num_waiting = self.queue.len();
        let num_bytes = || self.queue.iter().map(OutFrame::len).sum::<usize>();
        num_waiting >= MAX_WAITING || (num_waiting >= MAX_FEW && num_bytes() >= MAX_WAITING_BYTES)
    }

    /// Lends the numbers of a large frame, or starts to find out whether the peer can read them.
    fn try_to_lend(&mut self, frame: &mut OutFrame) {
        match &self.peer {
            Borrower::Able => {
                let waiting = self.queue.iter().filter(|frame| frame.is_lent());
                if frame.is_call() || self.lent.len() + waiting.count() < MAX_LENT {
                    frame.lend();
                }
            }
            Borrower::Unknown => {
                self.peer = match Probe::new() {
                    Ok(probe) => {
                        self.queue.push_back(OutFrame::probe(&probe));
                        Borrower::Looks(probe)
                    }
                    Err(_no_randomness) => Borrower::Unable,
                };
            }
            Borrower::Looks(_) | Borrower::Unable => {}
        }
    }

    /// Writes as much as one system call takes. Puts finished frames into `finished`.
    fn write_step(
        &mut self,
        socket: &Socket,
        finished: &mut Vec<OutFrame>,
    ) -> io::Result<Progress> {
        if self.queue.is_empty() {
            return Ok(Progress::Empty);
        }
        self.queue
            .iter_mut()
            .take(MAX_PIECES)
            .for_each(OutFrame::stamp);
        let mut pieces = Vec::with_capacity(MAX_PIECES);
        let mut room = MAX_BYTES;
        for piece in self.queue.iter().flat_map(OutFrame::rest) {
            let piece = &piece[..piece.len().min(room)];
            room -= piece.len();
            pieces.push(IoSlice::new(piece));
            if room == 0 || pieces.len() == MAX_PIECES {
                break;
            }
        }
        let mut num_written = match socket.try_write(&pieces) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(num_written) => num_written,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Progress::Full),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(Progress::Some),
            Err(error) => return Err(error),
        };
        self.last_write = Instant::now();
        while num_written > 0 {
            let Some(front) = self.queue.front_mut() else {
                break;
            };
            num_written = front.advance(num_written);
            if front.is_done()
                && let Some(done) = self.queue.pop_front()
            {
                match done.is_lent() {
                    true => self.lent.push_back(done),
                    false => finished.push(done),
                }
            }
        }
        Ok(match self.queue.is_empty() {
            true => Progress::Empty,
            false => Progress::Some,
        })
    }
}

/// The result of writing to a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    /// Nothing is left to write.
    Empty,
    /// There is more, and the socket may take it.
    Some,
    /// The socket takes no more now.
    Full,
}
