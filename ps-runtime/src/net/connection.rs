//! One connection after its handshake: reads frames, writes frames, notices when the peer is gone.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::io::{AsyncBufRead, AsyncRead, AsyncReadExt, BufReader, ReadBuf};
use tokio::time::Sleep;

use super::admission::{Admission, Admitted};
use super::arrivals::Arrivals;
use super::config::NetConfig;
use super::frame::{FrameError, Kind};
use super::outbox::{Outbox, TaskWriter};
use super::peer_memory::PeerMemory;
use super::quiet::Quiet;
use super::stream::{ReadHalf, Stream};
use crate::buffer::{Buffer, BufferPool, OutOfMemory};
use crate::busy_poll::BusyPoll;
use crate::deadline::{Deadline, latest};

/// How many bytes are read at once. Larger pieces are read directly into their buffer.
const READ_BUFFER: usize = 16 << 10;

/// After a frame of at most this many numbers, the connection busy-polls for the next one.
const SMALL: usize = 16 << 10;

/// A frame that has arrived.
#[derive(Debug)]
pub(crate) struct Frame {
    pub(crate) kind: Kind,
    pub(crate) call: u64,
    pub(crate) code: u32,
    pub(crate) header: Vec<u8>,
    pub(crate) bulk: Vec<Buffer>,
    /// The admission of a large call, kept until its handler has returned.
    pub(crate) admitted: Option<Admitted>,
    /// The handler does not begin after this time.
    pub(crate) deadline: Option<Deadline>,
}

impl Frame {
    /// Whether the frame takes no longer than waking a thread.
    pub(super) fn is_small(&self) -> bool {
        let num_numbers: usize = self.bulk.iter().map(|buffer| buffer.len()).sum();
        num_numbers <= SMALL
    }
}

/// Handles the frames that arrive on a connection, and its end.
pub(crate) trait Peer: Send + 'static {
    /// The name of the actor that the connection leads to.
    fn actor(&self) -> Arc<str>;

    /// Handles a frame. Pings are passed, too. An error ends the connection.
    fn receive(&mut self, frame: Frame) -> Result<(), Ended>;

    /// The admission control for large calls on this connection, if there is one.
    fn admission(&self) -> Option<Arc<Admission>> {
        None
    }

    /// Called exactly once, when the connection is over.
    fn disconnected(&mut self, why: &Arc<str>);
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Ended {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("the peer does not keep to the protocol: {0}")]
    Frame(#[from] FrameError),
    #[error("{0}")]
    NoMemory(#[from] OutOfMemory),
    #[error("{0}")]
    Peer(String),
    /// The connection ended as planned.
    #[error("{0}")]
    Done(&'static str),
}

impl Ended {
    /// Logs the reason if a user may have to act. The other side learns only that the connection is lost.
    fn log(&self, actor: &str) {
        static QUIET: Quiet = Quiet::new();

        let is_fault = match self {
            Self::Io(_) | Self::Done(_) => false,
            Self::Frame(_) | Self::NoMemory(_) | Self::Peer(_) => true,
        };
        if is_fault && let Some(num_suppressed) = QUIET.may_speak() {
            tracing::warn!(actor, why = %self, num_suppressed, "ended a connection");
        }
    }
}

/// A connection whose reading side is not running yet.
pub(crate) struct Connection {
    pub(crate) outbox: Arc<Outbox>,
    memory: Option<PeerMemory>,
    read: ReadHalf,
    write: TaskWriter,
}

impl Connection {
    pub(crate) fn new(stream: Stream, config: &NetConfig) -> Self {
        let memory = PeerMemory::of(&stream).filter(|_| config.read_peer_memory);
        let (read, write) = stream.split();
        let (outbox, write) = Outbox::new(write, memory.is_some());
        Self {
            outbox: Arc::new(outbox),
            memory,
            read,
            write,
        }
    }

    /// Runs the connection to its end.
    pub(crate) async fn run(
        self,
        already_read: &[u8],
        config: &NetConfig,
        buffers: &BufferPool,
        peer: impl Peer,
    ) {
        let admission = peer.admission();
        let is_called = admission.is_some();
        let mut peer = Farewell {
            peer,
            is_said: false,
        };
        let Self {
            outbox,
            memory,
            read,
            write,
        } = self;
        let arrivals = Arrivals {
            buffers,
            max_numbers: config.max_numbers,
            admission,
            outbox: &outbox,
            memory,
            patience: is_called.then_some(config.process_lease),
        };
        let read = already_read.chain(Watched::new(read, config.process_lease));
        let mut read = BufReader::with_capacity(READ_BUFFER, read);
        let reading = arrivals.read_all(&mut read, |frame| peer.peer.receive(frame));
        let result = both_ways(reading, &outbox, write, config).await;
        let why: Arc<str> = match result {
            Ok(()) => "the connection was closed".into(),
            Err(ended) => {
                ended.log(&peer.peer.actor());
                ended.to_string().into()
            }
        };
        peer.say(&why);
    }
}

/// Reads and writes until one of the two ends.
async fn both_ways(
    reading: impl Future<Output = Result<(), Ended>>,
    outbox: &Outbox,
    write: TaskWriter,
    config: &NetConfig,
) -> Result<(), Ended> {
    tokio::pin!(reading);
    tokio::select! {
        result = &mut reading => result,
        result = outbox.write(write) => {
            // The peer's last frames are still read, because they usually say why it closed. Also, if a
            // socket is closed with unread bytes, the last bytes that were written can be lost.
            let rest = tokio::time::timeout(config.process_lease, reading).await;
            result.map_err(Ended::Io).and(rest.unwrap_or(Ok(())))
        }
        never = outbox.ping(config.heartbeat) => match never {},
    }
}

/// Reports the end of the connection even if its task is dropped or panics.
struct Farewell<P: Peer> {
    peer: P,
    is_said: bool,
}

impl<P: Peer> Farewell<P> {
    fn say(&mut self, why: &Arc<str>) {
        if !std::mem::replace(&mut self.is_said, true) {
            self.peer.disconnected(why);
        }
    }
}

impl<P: Peer> Drop for Farewell<P> {
    fn drop(&mut self) {
        self.say(&"the connection's task ended".into());
    }
}

/// Busy-polls for something to read.
pub(super) async fn busy_poll(read: &mut (impl AsyncBufRead + Unpin)) {
    let busy_polling = BusyPoll::begin();
    loop {
        // An error or the end of the stream also counts: the reader will get it.
        let is_there = poll_fn(|cx| Poll::Ready(Pin::new(&mut *read).poll_fill_buf(cx).is_ready()));
        if is_there.await || !busy_polling.goes_on() {
            return;
        }
        // The event loop now checks for bytes that have arrived, on its other connections, too.
        tokio::task::yield_now().await;
    }
}

/// A reader that fails when nothing has arrived for one process lease.
struct Watched {
    inner: ReadHalf,
    lease: Duration,
    last_heard: Instant,
    timer: Pin<Box<Sleep>>,
}

impl Watched {
    fn new(inner: ReadHalf, lease: Duration) -> Self {
        Self {
            inner,
            lease,
            last_heard: Instant::now(),
            timer: Box::pin(tokio::time::sleep(lease)),
        }
    }
}

impl AsyncRead for Watched {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if let Poll::Ready(result) = this.inner.as_mut().poll_read(cx, buf) {
            this.last_heard = Instant::now();
            return Poll::Ready(result);
        }
        // The timer is reset only when it fires, not with every piece that arrives.
        while this.timer.as_mut().poll(cx).is_ready() {
            let until = latest(this.last_heard, this.lease);
            if Instant::now() >= until {
                let silence = format!("nothing was heard for {:?}", this.lease);
                return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, silence)));
            }
            this.timer.as_mut().reset(until.into());
        }
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::io::{AsyncWriteExt, DuplexStream};
    use tokio::sync::mpsc;

    use super::*;
    use crate::buffer::Buffer;
    use crate::codec::{Bulk, Encoded};
    use crate::net::frame::{HEAD_LEN, OutFrame};

    /// Numbers in a large message.
    const LARGE: usize = 1 << 20;

    struct Receiver {
        arrived: mpsc::UnboundedSender<Frame>,
        admission: Arc<Admission>,
    }

    impl Peer for Receiver {
        fn actor(&self) -> Arc<str> {
            "a receiver".into()
        }

        fn receive(&mut self, frame: Frame) -> Result<(), Ended> {
            let sent = self.arrived.send(frame);
            sent.map_err(|error| Ended::Peer(error.to_string()))
        }

        fn admission(&self) -> Option<Arc<Admission>> {
            Some(Arc::clone(&self.admission))
        }

        fn disconnected(&mut self, _: &Arc<str>) {}
    }

    /// Runs the called side of a connection; returns the caller's pipe, and what arrives.
    fn accept(
        admission: &Arc<Admission>,
        config: NetConfig,
    ) -> (DuplexStream, mpsc::UnboundedReceiver<Frame>) {
        let (ours, theirs) = tokio::io::duplex(1 << 16);
        let (sender, arrived) = mpsc::unbounded_channel();
        let admission = Arc::clone(admission);
        tokio::spawn(async move {
            let connection = Connection::new(Stream::Memory(theirs), &config);
            let receiver = Receiver {
                arrived: sender,
                admission,
            };
            let buffers = BufferPool::new(0);
            connection.run(&[], &config, &buffers, receiver).await;
        });
        (ours, arrived)
    }

    /// The beginning of a call with so many numbers.
    fn announcement(num_numbers: usize) -> Vec<u8> {
        let mut bytes = vec![Kind::Ask as u8, 0xa7, 1, 0];
        bytes.resize(HEAD_LEN, 0);
        bytes.extend((num_numbers as u64).to_le_bytes());
        bytes
    }

    /// Answers each call with these numbers.
    struct Replier {
        bulk: Vec<Bulk>,
        outbox: Arc<Outbox>,
        admission: Arc<Admission>,
        num_calls: Arc<AtomicUsize>,
        ended: mpsc::UnboundedSender<Arc<str>>,
    }

    impl Peer for Replier {
        fn actor(&self) -> Arc<str> {
            "a replier".into()
        }

        fn receive(&mut self, frame: Frame) -> Result<(), Ended> {
            self.num_calls.fetch_add(1, Ordering::SeqCst);
            let contents = Encoded {
                header: vec![0; 1000],
                bulk: self.bulk.clone(),
            };
            let reply = OutFrame::new(Kind::Reply, frame.call, 0, contents);
            self.outbox.send(reply).map_err(|_| Ended::Done("closed"))
        }

        fn admission(&self) -> Option<Arc<Admission>> {
            Some(Arc::clone(&self.admission))
        }

        fn disconnected(&mut self, why: &Arc<str>) {
            let _ = self.ended.send(Arc::clone(why));
        }
    }

    /// Asks without an end and reads nothing. Returns how many calls were taken until the end.
    async fn ask_and_read_nothing(bulk: Vec<Bulk>) -> usize {
        let (mut ours, theirs) = tokio::io::duplex(1 << 16);
        let config = NetConfig::default().with_process_lease(Duration::from_millis(300));
        let connection = Connection::new(Stream::Memory(theirs), &config);
        let (sender, mut ended) = mpsc::unbounded_channel();
        let num_calls = Arc::new(AtomicUsize::new(0));
        let replier = Replier {
            bulk,
            outbox: Arc::clone(&connection.outbox),
            admission: Admission::new(Duration::MAX),
            num_calls: Arc::clone(&num_calls),
            ended: sender,
        };
        tokio::spawn(async move {
            let buffers = BufferPool::new(0);
            connection.run(&[], &config, &buffers, replier).await;
        });
        let ask = OutFrame::signal(Kind::Ask, 1);
        let ask: Vec<u8> = ask.rest().flatten().copied().collect();
        while ours.write_all(&ask).await.is_ok() {}
        let why = ended.recv().await.expect("it says why");
        assert!(why.contains("has read no replies for 300ms"), "{why}");
        num_calls.load(Ordering::SeqCst)
    }

    ///
    #[tokio::test]
    async fn a_peer_that_asks_and_does_not_read_binds_little_and_is_cut_off() {
        let num_calls = ask_and_read_nothing(Vec::new()).await;
        assert!(
            num_calls > 1_024,
            "a good caller may have {num_calls} under way"
        );
        assert!(num_calls < 4_096, "{num_calls}");
    }

    /// at least 8 replies, and at least 64 MiB.
    #[tokio::test]
    async fn a_peer_that_does_not_read_large_replies_binds_eight_of_them_or_64_mib() {
        for (mib, expected) in [(32, 8), (8, 8), (4, 16), (1, 64)] {
            // All replies share the numbers.
            let bulk = Bulk::from(Buffer::from(vec![0.5; mib << 18]));
            let num_calls = ask_and_read_nothing(vec![bulk]).await;
            assert_eq!(num_calls, expected, "replies of {mib} MiB");
        }
    }

    #[tokio::test]
    async fn busy_polling_ends_without_traffic_and_loses_nothing() {
        let (mut write, read) = tokio::io::duplex(64);
        let mut read = BufReader::new(read);
        busy_poll(&mut read).await;
        write.write_all(b"here").await.unwrap();
        busy_poll(&mut read).await;
        drop(write);
        busy_poll(&mut read).await;
        let mut all = Vec::new();
        read.read_to_end(&mut all).await.unwrap();
        assert_eq!(all, b"here");
    }

    ///
    #[tokio::test(start_paused = true)]
    async fn large_calls_are_read_one_after_the_other() {
        let admission = Admission::new(Duration::MAX);
        let before = admission
            .admit(usize::MAX)
            .await
            .expect("nobody is before it");
        let (mut caller, mut arrived) = accept(&admission, NetConfig::default());
        let call = [announcement(LARGE), vec![0; 4 * LARGE]].concat();
        let mut writing = tokio::spawn(async move {
            caller.write_all(&call).await.unwrap();
            caller
        });
        // What is not read yet waits in the network.
        let wait = tokio::time::timeout(Duration::from_millis(10), &mut writing);
        assert!(wait.await.is_err());
        drop(before);
        let frame = arrived
            .recv()
            .await
            .expect("it is read once it is admitted");
        assert_eq!(frame.bulk[0].len(), LARGE);
        assert!(frame.admitted.is_some());
        writing.await.unwrap();
    }

    ///
    #[tokio::test(start_paused = true)]
    async fn a_stalled_sender_does_not_stop_the_others() {
        let admission = Admission::new(NetConfig::default().process_lease / 2);
        let (mut stalled, _never) = accept(&admission, NetConfig::default());
        stalled.write_all(&announcement(LARGE)).await.unwrap();
        let (mut caller, mut arrived) = accept(&admission, NetConfig::default());
        let call = [announcement(LARGE), vec![0; 4 * LARGE]].concat();
        for _ in 0..3 {
            let begin = tokio::time::Instant::now();
            caller.write_all(&call).await.unwrap();
            arrived
                .recv()
                .await
                .expect("it goes on without being admitted");
            assert!(begin.elapsed() < NetConfig::default().heartbeat);
        }
        drop(stalled);
    }

    ///
    #[tokio::test]
    async fn a_connection_that_waits_for_admission_sends_heartbeats() {
        let admission = Admission::new(Duration::MAX);
        let config = NetConfig::default().with_process_lease(Duration::from_millis(50));
        let _before = admission
            .admit(usize::MAX)
            .await
            .expect("nobody is before it");
        let (mut caller, _never) = accept(&admission, config);
        // So much that its wait is longer than the lease.
        let call = announcement(1 << 30);
        caller.write_all(&call).await.unwrap();
        let begin = Instant::now();
        for _ in 0..10 {
            let mut frame = [0; HEAD_LEN];
            caller.read_exact(&mut frame).await.unwrap();
            assert_eq!(frame[0], Kind::Ping as u8);
        }
        assert!(begin.elapsed() > config.process_lease);
    }
}
