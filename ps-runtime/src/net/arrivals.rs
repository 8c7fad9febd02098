//! Reads the frames that arrive on a connection, in their order. The numbers of large calls are read when
//! they are admitted.
//!
//! The numbers of a lent call are not in the stream. So the frames behind it are read while it waits for
//! admission. This is necessary because one of these frames can say that the peer has taken what this side
//! lends, and admission waits for that.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncBufRead, AsyncRead, AsyncReadExt};
use tokio::sync::mpsc;

use super::admission::{Admission, Admitted};
use super::connection::{Ended, Frame, busy_poll};
use super::frame::{HEAD_LEN, Head, Kind, OutFrame, parse_addresses, parse_lengths};
use super::outbox::Outbox;
use super::peer_memory::PeerMemory;
use crate::buffer::{Buffer, BufferPool};
use crate::deadline::Deadline;

/// How many frames are read ahead behind a lent call that waits for admission.
const MAX_WAITING: usize = 64;

/// The reading side of a connection.
pub(super) struct Arrivals<'a> {
    pub(super) buffers: &'a BufferPool,
    pub(super) max_numbers: u64,
    pub(super) admission: Option<Arc<Admission>>,
    pub(super) outbox: &'a Outbox,
    /// The memory that lent numbers are copied from.
    pub(super) memory: Option<PeerMemory>,
    /// While too much waits to be written, nothing more is read. If the peer takes nothing for this long, it
    /// is lost. `None` on the calling side, where frames that are read do not cause frames to be written.
    pub(super) patience: Option<Duration>,
}

/// A frame without the numbers that are lent with it.
struct Arrival {
    frame: Frame,
    lent: Option<Lent>,
}

/// Buffers in the peer's memory.
struct Lent {
    lengths: Vec<usize>,
    addresses: Vec<u8>,
}

impl Arrivals<'_> {
    /// Reads frames to the end of the stream and passes them on, in their order.
    pub(super) async fn read_all(
        &self,
        read: &mut (impl AsyncBufRead + Unpin),
        receive: impl FnMut(Frame) -> Result<(), Ended>,
    ) -> Result<(), Ended> {
        let receive = Mutex::new(receive);
        let hand_on = |frame| {
            let mut receive = receive.lock().unwrap_or_else(PoisonError::into_inner);
            receive(frame)
        };
        let (sender, mut waiting) = mpsc::channel(MAX_WAITING);
        let num_waiting = AtomicUsize::new(0);
        let reading = async {
            let sender = sender;
            loop {
                if let Some(patience) = self.patience {
                    self.outbox.room(patience).await?;
                }
                let Some(arrival) = self.next(read).await? else {
                    break;
                };
                let may_have_successor = arrival.may_have_successor();
                if let Some(arrival) = self.look_after(arrival)? {
                    if arrival.lent.is_none() && num_waiting.load(Ordering::Relaxed) == 0 {
                        hand_on(arrival.frame)?;
                    } else {
                        num_waiting.fetch_add(1, Ordering::Relaxed);
                        // The channel is open until this future is over: one task polls both.
                        let _ = sender.send(arrival).await;
                    }
                }
                if may_have_successor {
                    busy_poll(read).await;
                }
            }
            Ok(())
        };
        let taking = async {
            while let Some(Arrival { mut frame, lent }) = waiting.recv().await {
                if let Some(lent) = lent {
                    frame.admitted = self.admit(frame.kind, &lent.lengths).await;
                    frame.bulk = self.take(&frame, lent).await?;
                }
                hand_on(frame)?;
                num_waiting.fetch_sub(1, Ordering::Relaxed);
            }
            Ok(())
        };
        tokio::try_join!(reading, taking).map(|((), ())| ())
    }

    /// Handles frames about lent memory, and returns all others.
    fn look_after(&self, arrival: Arrival) -> Result<Option<Arrival>, Ended> {
        let frame = &arrival.frame;
        match frame.kind {
            Kind::Probe => {
                let memory = self.memory.as_ref();
                if memory.is_some_and(|memory| memory.shows(&frame.header)) {
                    // This fails if nothing more is to be written. Then nothing will be lent either.
                    let _ = self.outbox.send(OutFrame::signal(Kind::Readable, 0));
                }
            }
            Kind::Readable => self.outbox.peer_can_read(),
            Kind::Taken => {
                if !self.outbox.taken(frame.call) {
                    let why = "the peer took something that was not lent to it";
                    return Err(Ended::Peer(why.to_owned()));
                }
            }
            _ => return Ok(Some(arrival)),
        }
        Ok(None)
    }

    /// Waits until a large call is admitted.
    async fn admit(&self, kind: Kind, lengths: &[usize]) -> Option<Admitted> {
        match (kind, &self.admission) {
            (Kind::Ask | Kind::Tell, Some(admission)) => {
                admission.admit(lengths.iter().sum()).await
            }
            _ => None,
        }
    }

    /// Copies lent numbers, and tells their sender so.
    async fn take(&self, frame: &Frame, lent: Lent) -> Result<Vec<Buffer>, Ended> {
        let Some(memory) = &self.memory else {
            let why = "the peer lends memory that cannot be read";
            return Err(Ended::Peer(why.to_owned()));
        };
        let addresses = parse_addresses(&lent.addresses);
        // Most large calls bring gradients, whose norms are checked. Most large replies bring weights.
        let sums = matches!(frame.kind, Kind::Ask | Kind::Tell);
        let mut bulk = Filling::default();
        for (len, address) in lent.lengths.into_iter().zip(addresses) {
            let buffer = bulk.begin(self.buffers.try_take(len)?);
            if let Some(norm_squared) = memory.read(address, buffer, sums).await? {
                buffer.set_norm_squared(norm_squared);
            }
        }
        let bulk = bulk.done();
        // This fails if nothing more is to be written. The sender then notices the end of the connection.
        let _ = self.outbox.send(OutFrame::signal(Kind::Taken, frame.call));
        Ok(bulk)
    }

    /// Reads one frame, or `None` at the end of the stream.
    async fn next(&self, read: &mut (impl AsyncRead + Unpin)) -> Result<Option<Arrival>, Ended> {
        let mut fixed = [0; HEAD_LEN];
        let first = read.read(&mut fixed).await?;
        if first == 0 {
            return Ok(None);
        }
        read.read_exact(&mut fixed[first..]).await?;
        let head = Head::parse(&fixed)?;
        // The deadline counts from here, before the wait for the rest of a large call.
        let deadline = head.limit.and_then(Deadline::within);
        let mut table = vec![0; 8 * head.num_buffers];
        read.read_exact(&mut table).await?;
        let lengths = parse_lengths(&table, self.max_numbers)?;
        let mut addresses = vec![0; if head.is_lent { table.len() } else { 0 }];
        read.read_exact(&mut addresses).await?;
        let mut header = vec![0; head.header_len];
        read.read_exact(&mut header).await?;
        let mut frame = Frame {
            kind: head.kind,
            call: head.call,
            code: head.code,
            header,
            bulk: Vec::new(),
            admitted: None,
            deadline,
        };
        if head.is_lent {
            let lent = Some(Lent { lengths, addresses });
            return Ok(Some(Arrival { frame, lent }));
        }
        // The peer reports behind this frame that it has taken what is lent to it. So while something is lent,
        // this frame does not wait for admission.
        if !self.outbox.has_lent() {
            frame.admitted = self.admit(head.kind, &lengths).await;
        }
        let mut bulk = Filling::default();
        for len in lengths {
            // New memory costs nothing before it is written to. So numbers that are announced and never
            // arrive take no memory.
            let buffer = bulk.begin(self.buffers.try_take(len)?);
            read.read_exact(bytemuck::cast_slice_mut(buffer)).await?;
        }
        frame.bulk = bulk.done();
        Ok(Some(Arrival { frame, lent: None }))
    }
}

/// Buffers that are being filled. If they are not filled, their memory is freed and does not go back to
/// the pool: later messages need not have the announced size.
#[derive(Default)]
struct Filling(Vec<Buffer>);

impl Filling {
    fn begin(&mut self, buffer: Buffer) -> &mut Buffer {
        self.0.push(buffer);
        self.0.last_mut().expect("it was just pushed")
    }

    fn done(mut self) -> Vec<Buffer> {
        std::mem::take(&mut self.0)
    }
}

impl Drop for Filling {
    fn drop(&mut self) {
        self.0.iter_mut().for_each(Buffer::leave_pool);
    }
}

impl Arrival {
    /// Whether the next frame may arrive within the time that waking a thread takes.
    fn may_have_successor(&self) -> bool {
        self.lent.is_none() && self.frame.is_small() && self.frame.kind != Kind::Ping
    }
}
