//! Tests of lent memory. One end is a whole connection. The other end is a connection, or a peer that the
//! test plays itself.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};

use super::NetConfig;
use super::admission::Admission;
use super::connection::{Connection, Ended, Frame, Peer};
use super::frame::{HEAD_LEN, Head, Kind, OutFrame, parse_lengths};
use super::outbox::{MAX_LENT, MIN_LENT, Outbox};
use super::stream::Stream;
use crate::buffer::{Buffer, BufferPool};
use crate::codec::{Bulk, Encoded};

/// How many numbers a frame must have to be lent.
const LARGE: usize = MIN_LENT / 4;

struct Receiver {
    arrived: mpsc::UnboundedSender<Frame>,
    ended: Option<oneshot::Sender<Arc<str>>>,
    admission: Arc<Admission>,
}

impl Peer for Receiver {
    fn actor(&self) -> Arc<str> {
        "a receiver".into()
    }

    fn receive(&mut self, frame: Frame) -> Result<(), Ended> {
        // Heartbeats can come at any time.
        if frame.kind != Kind::Ping {
            let _ = self.arrived.send(frame);
        }
        Ok(())
    }

    fn admission(&self) -> Option<Arc<Admission>> {
        Some(Arc::clone(&self.admission))
    }

    fn disconnected(&mut self, why: &Arc<str>) {
        if let Some(ended) = self.ended.take() {
            let _ = ended.send(Arc::clone(why));
        }
    }
}

/// One end of a connection that runs.
struct End {
    outbox: Arc<Outbox>,
    arrived: mpsc::UnboundedReceiver<Frame>,
    ended: oneshot::Receiver<Arc<str>>,
    admission: Arc<Admission>,
}

impl End {
    fn run(stream: Stream) -> Self {
        let (sender, arrived) = mpsc::unbounded_channel();
        let (end, ended) = oneshot::channel();
        let config = NetConfig::default();
        let connection = Connection::new(stream, &config);
        let outbox = Arc::clone(&connection.outbox);
        let admission = Admission::new(Duration::MAX);
        let receiver = Receiver {
            arrived: sender,
            ended: Some(end),
            admission: Arc::clone(&admission),
        };
        tokio::spawn(async move {
            let buffers = BufferPool::new(0);
            connection.run(&[], &config, &buffers, receiver).await;
        });
        Self {
            outbox,
            arrived,
            ended,
            admission,
        }
    }

    /// Returns the next frame that arrives.
    async fn next(&mut self) -> Frame {
        self.arrived.recv().await.expect("the connection goes on")
    }

    fn send(&self, kind: Kind, call: u64, bulk: &Bulk) {
        let contents = Encoded {
            header: vec![call as u8; 3],
            bulk: vec![bulk.clone()],
        };
        let sent = self.outbox.send(OutFrame::new(kind, call, 0, contents));
        assert!(sent.is_ok());
    }
}

fn large(first: f32) -> Bulk {
    let mut values = vec![0.5; LARGE];
    values[0] = first;
    Bulk::from(Buffer::from(values))
}

/// How many `Bulk`s share the numbers, including this one.
fn num_holders(bulk: &Bulk) -> usize {
    Arc::strong_count(&bulk.data)
}

/// Reads a frame as a peer sees it, and returns its head.
async fn read_raw(stream: &mut UnixStream) -> Head {
    loop {
        let mut fixed = [0; HEAD_LEN];
        stream.read_exact(&mut fixed).await.unwrap();
        let head = Head::parse(&fixed).unwrap();
        let mut table = vec![0; 8 * head.num_buffers];
        stream.read_exact(&mut table).await.unwrap();
        let len: usize = parse_lengths(&table, u64::MAX).unwrap().iter().sum();
        let rest = match head.is_lent {
            true => table.len() + head.header_len,
            false => head.header_len + 4 * len,
        };
        stream.read_exact(&mut vec![0; rest]).await.unwrap();
        if head.kind != Kind::Ping {
            return head;
        }
    }
}

fn bytes_of(frame: &OutFrame) -> Vec<u8> {
    frame.rest().flatten().copied().collect()
}

async fn write_signal(stream: &mut UnixStream, kind: Kind, call: u64) {
    let bytes = bytes_of(&OutFrame::signal(kind, call));
    stream.write_all(&bytes).await.unwrap();
}

/// Returns an end and a peer. The peer was told the secret, has answered that it found it, and has the first
/// frame.
async fn lends_to() -> (End, UnixStream) {
    let (ours, mut peer) = UnixStream::pair().expect("the system gives sockets");
    let mut end = End::run(Stream::Unix(ours));
    end.send(Kind::Ask, 0, &large(0.0));
    assert_eq!(read_raw(&mut peer).await.kind, Kind::Probe);
    let first = read_raw(&mut peer).await;
    assert!(first.kind == Kind::Ask && !first.is_lent);
    write_signal(&mut peer, Kind::Readable, 0).await;
    // The end has read the answer when it has read a later frame.
    write_signal(&mut peer, Kind::Cancel, 0).await;
    assert_eq!(end.next().await.kind, Kind::Cancel);
    (end, peer)
}

///
#[tokio::test]
async fn large_numbers_are_lent_as_soon_as_the_peer_can_read_them_and_until_it_has_them() {
    let (ours, theirs) = UnixStream::pair().expect("the system gives sockets");
    let (mut sender, mut receiver) = (End::run(Stream::Unix(ours)), End::run(Stream::Unix(theirs)));
    for call in 0..20 {
        let bulk = large(call as f32);
        sender.send(Kind::Ask, call, &bulk);
        let got = receiver.arrived.recv().await.expect("it arrives");
        assert_eq!((got.call, &got.header[..]), (call, &[call as u8; 3][..]));
        assert_eq!(&got.bulk[0][..], &bulk[..]);
        // The frame that comes back shows that the sender has read all earlier frames of the receiver.
        receiver
            .outbox
            .send(OutFrame::signal(Kind::Cancel, call))
            .unwrap();
        assert_eq!(sender.next().await.call, call);
        assert_eq!(num_holders(&bulk), 1);
        assert!(sender.outbox.lends(), "from the first large frame on");
    }
}

/// the system may forbid it.
#[tokio::test]
async fn a_peer_that_cannot_read_gets_everything_by_the_socket() {
    let (ours, mut peer) = UnixStream::pair().expect("the system gives sockets");
    let end = End::run(Stream::Unix(ours));
    let bulk = large(1.0);
    for call in 0..3 {
        end.send(Kind::Ask, call, &bulk);
        if call == 0 {
            assert_eq!(read_raw(&mut peer).await.kind, Kind::Probe);
        }
        let head = read_raw(&mut peer).await;
        assert_eq!((head.call, head.is_lent), (call, false));
    }
}

///
#[tokio::test]
async fn a_peer_that_takes_nothing_gets_the_rest_by_the_socket() {
    let (mut end, mut peer) = lends_to().await;
    let bulks: Vec<_> = (0..=MAX_LENT).map(|i| large(i as f32)).collect();
    for (call, bulk) in (1..).zip(&bulks) {
        end.send(Kind::Reply, call, bulk);
    }
    for call in 1..=MAX_LENT as u64 + 1 {
        let head = read_raw(&mut peer).await;
        let is_lent = call <= MAX_LENT as u64;
        assert_eq!((head.call, head.is_lent), (call, is_lent));
    }
    assert!(bulks[..MAX_LENT].iter().all(|bulk| num_holders(bulk) == 2));
    // Only now does it take the first one: there is room to lend again.
    write_signal(&mut peer, Kind::Taken, 1).await;
    write_signal(&mut peer, Kind::Cancel, 0).await;
    assert_eq!(end.next().await.kind, Kind::Cancel);
    assert_eq!(num_holders(&bulks[0]), 1);
    end.send(Kind::Reply, 100, &large(100.0));
    assert!(read_raw(&mut peer).await.is_lent);
}

/// at most four are lent at a time.
#[tokio::test]
async fn replies_that_still_wait_to_be_written_count_as_lent() {
    let (mut end, mut peer) = lends_to().await;
    let numbers = large(1.0);
    for call in 1..=20 {
        end.send(Kind::Reply, call, &numbers);
    }
    // The peer takes what is lent to it, and reads nothing of the rest, which fills the socket.
    for call in 1..=4 {
        let head = read_raw(&mut peer).await;
        assert_eq!((head.call, head.is_lent), (call, true));
        write_signal(&mut peer, Kind::Taken, call).await;
    }
    write_signal(&mut peer, Kind::Cancel, 0).await;
    assert_eq!(end.next().await.kind, Kind::Cancel);
    assert!(!end.outbox.has_lent());
    for call in 21..=30 {
        end.send(Kind::Reply, call, &numbers);
    }
    for call in 5..=30 {
        let head = read_raw(&mut peer).await;
        let is_lent = (21..=24).contains(&call);
        assert_eq!((head.call, head.is_lent), (call, is_lent));
    }
}

/// admission waits until replies were taken, and the frame that says so comes behind the next
/// call.
#[tokio::test]
async fn what_comes_behind_a_lent_call_is_read_while_that_waits_for_its_turn() {
    let (mut end, mut peer) = lends_to().await;
    let reply = large(1.0);
    end.send(Kind::Reply, 1, &reply);
    assert!(read_raw(&mut peer).await.is_lent);

    let admitted = end
        .admission
        .admit(1 << 20)
        .await
        .expect("nobody is before it");
    let bulk = Bulk::from(Buffer::from(vec![0.5; 1 << 20]));
    let contents = Encoded {
        header: vec![],
        bulk: vec![bulk.clone()],
    };
    let mut call = OutFrame::new(Kind::Ask, 7, 0, contents);
    call.lend();
    let written = peer.write_all(&bytes_of(&call)).await;
    written.expect("the connection goes on");
    write_signal(&mut peer, Kind::Taken, 1).await;
    write_signal(&mut peer, Kind::Cancel, 7).await;
    while num_holders(&reply) > 1 {
        tokio::task::yield_now().await;
    }
    assert!(end.arrived.try_recv().is_err(), "it is not admitted");
    drop(admitted);
    let got = end.next().await;
    assert_eq!((got.kind, got.call), (Kind::Ask, 7));
    assert!(got.admitted.is_some() && got.bulk[0][..] == bulk[..]);
    assert_eq!(end.next().await.kind, Kind::Cancel);
}

///
#[tokio::test]
async fn a_connection_that_is_finished_waits_until_everything_lent_was_taken() {
    let (mut end, mut peer) = lends_to().await;
    end.send(Kind::Reply, 1, &large(1.0));
    end.outbox.finish();
    assert!(read_raw(&mut peer).await.is_lent);
    write_signal(&mut peer, Kind::Cancel, 0).await;
    assert_eq!(end.next().await.kind, Kind::Cancel);
    assert!(end.ended.try_recv().is_err(), "the peer has not read it");
    write_signal(&mut peer, Kind::Taken, 1).await;
    drop(peer);
    let why = end.ended.await.expect("it says why");
    assert!(why.contains("closed"), "{why}");
}

/// PS-6.
#[tokio::test]
async fn a_peer_that_takes_what_was_not_lent_is_cut_off() {
    let (end, mut peer) = lends_to().await;
    let bulk = large(1.0);
    end.send(Kind::Reply, 1, &bulk);
    write_signal(&mut peer, Kind::Taken, 2).await;
    let why = end.ended.await.expect("it says why");
    assert!(why.contains("not lent"), "{why}");
    end.outbox.close(&why);
    assert_eq!(num_holders(&bulk), 1);
}

/// PS-6: what a peer claims to lend is read or refused, and costs no memory if it is not there.
#[tokio::test]
async fn memory_that_is_not_there_ends_the_connection() {
    for over_unix in [true, false] {
        let (ours, mut peer) = UnixStream::pair().expect("the system gives sockets");
        let (pipe, mut other) = tokio::io::duplex(1 << 10);
        let mut end = End::run(match over_unix {
            true => Stream::Unix(ours),
            false => Stream::Memory(pipe),
        });
        let head = [Kind::Ask as u8 | 0x80, 0xa7, 1, 0];
        let mut bytes = head.to_vec();
        bytes.resize(HEAD_LEN, 0);
        bytes.extend((1u64 << 29).to_le_bytes());
        bytes.extend(8u64.to_le_bytes());
        match over_unix {
            true => peer.write_all(&bytes).await.unwrap(),
            false => other.write_all(&bytes).await.unwrap(),
        }
        let why = end.ended.await.expect("it says why");
        assert!(
            why.contains("cannot be read") || why.contains("Bad address"),
            "{why}"
        );
        assert!(end.arrived.recv().await.is_none());
    }
}

/// PS-6, in a process of its own, which may have little memory. Nothing may abort it.
#[test]
fn numbers_that_there_is_no_memory_for_end_their_connection_only() {
    const CHILD: &str = "PS_TEST_LITTLE_MEMORY";
    const NAME: &str =
        "net::lending::numbers_that_there_is_no_memory_for_end_their_connection_only";
    if std::env::var_os(CHILD).is_none() {
        let program = std::env::current_exe().expect("this test has a program");
        let mut child = std::process::Command::new(program);
        let child = child.args(["--exact", NAME, "--nocapture"]).env(CHILD, "1");
        let output = child.output().expect("the program runs");
        assert!(output.status.success(), "{output:?}");
        return;
    }
    use rustix::process::{Resource, Rlimit, setrlimit};
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux has it");
    let line = status.lines().find(|line| line.starts_with("VmSize:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1));
    let kib: u64 = kib
        .and_then(|kib| kib.parse().ok())
        .expect("a number of kB");
    let limit = Some((kib << 10) + (1 << 30));
    let limit = Rlimit {
        current: limit,
        maximum: limit,
    };
    setrlimit(Resource::As, limit).expect("less is always allowed");
    let runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = { runtime }
        .enable_all()
        .build()
        .expect("there is room for that");
    runtime.block_on(async {
        for lent in [0, 0x80] {
            let (ours, mut peer) = UnixStream::pair().expect("the system gives sockets");
            let mut end = End::run(Stream::Unix(ours));
            let mut bytes = vec![Kind::Ask as u8 | lent, 0xa7, 1, 0];
            bytes.resize(HEAD_LEN, 0);
            bytes.extend((1u64 << 30).to_le_bytes());
            bytes.extend(8u64.to_le_bytes());
            peer.write_all(&bytes).await.unwrap();
            let why = end.ended.await.expect("it says why");
            assert!(why.contains("no memory for 1073741824 numbers"), "{why}");
            assert!(end.arrived.recv().await.is_none());
        }
        let (ours, mut peer) = UnixStream::pair().expect("the system gives sockets");
        let mut end = End::run(Stream::Unix(ours));
        write_signal(&mut peer, Kind::Ask, 1).await;
        assert_eq!(end.next().await.kind, Kind::Ask, "others are served");
    });
}

/// What was never written can go by any other connection.
#[tokio::test]
async fn frames_of_a_lost_connection_are_no_longer_lent() {
    let (end, peer) = lends_to().await;
    let bulk = large(1.0);
    // The peer reads nothing, so some of these stay in the queue.
    let filler = Bulk::from(Buffer::from(vec![0.0; MIN_LENT / 4 - 100]));
    for call in 1..20 {
        end.send(Kind::Ask, call, &filler);
    }
    end.send(Kind::Ask, 20, &bulk);
    let unwritten = end.outbox.close(&"a test".into());
    let last = unwritten.last().expect("it was not written");
    assert!(!last.is_lent() && last.call() == 20);
    let bytes = bytes_of(last);
    assert!(bytes.ends_with(bytemuck::cast_slice(&bulk)));
    drop(peer);
}
