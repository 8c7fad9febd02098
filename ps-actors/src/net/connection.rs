//! One connection after its handshake: reads frames, writes frames, notices when the peer is gone.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncReadExt, BufReader, ReadBuf};
use tokio::time::Sleep;

use super::config::NetConfig;
use super::frame::{FrameError, HEAD_LEN, Head, Kind, parse_lengths};
use super::outbox::{Outbox, TaskWriter};
use super::stream::{ReadHalf, Stream};
use crate::buffer::{Buffer, BufferPool};

/// Bytes read at once; larger pieces go straight to their buffer.
const READ_BUFFER: usize = 16 << 10;

/// A frame that has arrived.
#[derive(Debug)]
pub(crate) struct Frame {
    pub(crate) kind: Kind,
    pub(crate) call: u64,
    pub(crate) code: u32,
    pub(crate) header: Vec<u8>,
    pub(crate) bulk: Vec<Buffer>,
}

/// What a connection does with the frames that arrive, and at its end.
pub(crate) trait Peer: Send + 'static {
    /// Handles a frame, pings included; an error ends the connection.
    fn receive(&mut self, frame: Frame) -> Result<(), String>;

    /// The connection is over. Called exactly once.
    fn disconnected(&mut self, why: &Arc<str>);
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("the peer does not keep to the protocol: {0}")]
    Frame(#[from] FrameError),
    #[error("{0}")]
    Peer(String),
}

/// A connection whose reading side is not running yet.
pub(crate) struct Connection {
    pub(crate) outbox: Arc<Outbox>,
    read: ReadHalf,
    write: TaskWriter,
}

impl Connection {
    pub(crate) fn new(stream: Stream) -> Self {
        let (read, write) = stream.split();
        let (outbox, write) = Outbox::new(write);
        Self {
            outbox: Arc::new(outbox),
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
        let mut peer = Farewell {
            peer,
            is_said: false,
        };
        let Self {
            outbox,
            read,
            write,
        } = self;
        let read = already_read.chain(Watched::new(read, config.lease));
        let mut read = BufReader::with_capacity(READ_BUFFER, read);
        let reading = async {
            loop {
                let Some(frame) = read_frame(&mut read, buffers, config.max_numbers).await? else {
                    return Ok(());
                };
                peer.peer.receive(frame).map_err(Ended::Peer)?;
            }
        };
        let result = both_ways(reading, &outbox, write, config).await;
        let why: Arc<str> = match result {
            Ok(()) => "the connection was closed".into(),
            Err(error) => error.to_string().into(),
        };
        peer.say(&why);
    }
}

/// Reads and writes until one of the two sides has had enough.
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
            // What the peer sent before it closed is still to be read: mostly it says why.
            // And a socket closed with something unread would lose what was written last.
            let rest = tokio::time::timeout(config.lease, reading).await;
            result.map_err(Ended::Io).and(rest.unwrap_or(Ok(())))
        }
        never = outbox.ping(config.heartbeat) => match never {},
    }
}

/// Says that the connection is over even if its task is dropped or panics.
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

/// Reads one frame, or `None` at the end of the stream.
async fn read_frame(
    read: &mut (impl AsyncRead + Unpin),
    pool: &BufferPool,
    max_numbers: u64,
) -> Result<Option<Frame>, Ended> {
    let mut fixed = [0; HEAD_LEN];
    let first = read.read(&mut fixed).await?;
    if first == 0 {
        return Ok(None);
    }
    read.read_exact(&mut fixed[first..]).await?;
    let head = Head::parse(&fixed)?;
    let mut table = vec![0; 8 * head.num_buffers];
    read.read_exact(&mut table).await?;
    let lengths = parse_lengths(&table, max_numbers)?;
    let mut header = vec![0; head.header_len];
    read.read_exact(&mut header).await?;
    let mut bulk = Vec::with_capacity(lengths.len());
    for len in lengths {
        // Fresh memory costs nothing before something is written to it, so an announcement
        // that nothing follows takes none.
        let mut buffer = pool.take_filled(len);
        read.read_exact(bytemuck::cast_slice_mut(&mut buffer))
            .await?;
        bulk.push(buffer);
    }
    let Head {
        kind, call, code, ..
    } = head;
    Ok(Some(Frame {
        kind,
        call,
        code,
        header,
        bulk,
    }))
}

/// A reader that fails when nothing has arrived for the length of the lease.
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
        // The timer is moved on only when it fires, not with every piece that arrives.
        while this.timer.as_mut().poll(cx).is_ready() {
            let until = this.last_heard + this.lease;
            if Instant::now() >= until {
                let silence = format!("nothing was heard for {:?}", this.lease);
                return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, silence)));
            }
            this.timer.as_mut().reset(until.into());
        }
        Poll::Pending
    }
}
