//! A frame on its way out.

use std::sync::Arc;

use super::{HEAD_LEN, Head, Kind, LENT, MAX_CHUNK, limit_bytes};
use crate::codec::{Bulk, Encoded};
use crate::deadline::Deadline;
use crate::net::admission::{Admission, Sending};
use crate::net::peer_memory::{Probe, address};

/// A frame on its way out. Its bulk is shared with the message, not copied.
#[derive(Debug)]
pub(crate) struct OutFrame {
    /// Fixed part, lengths and header.
    head: Vec<u8>,
    /// The addresses of the buffers, if they are lent.
    addresses: Option<Box<[u8]>>,
    bulk: Vec<Bulk>,
    num_written: usize,
    len: usize,
    /// Counts the frame as a large reply that is not written yet.
    sending: Option<Sending>,
    deadline: Option<Deadline>,
}

impl OutFrame {
    /// Makes a frame without contents.
    pub(crate) fn signal(kind: Kind, call: u64) -> Self {
        Self::new(kind, call, 0, Encoded::default())
    }

    /// Makes a frame around an encoded message, result or error that passes [`check`].
    pub(crate) fn new(kind: Kind, call: u64, code: u32, contents: Encoded) -> Self {
        let Encoded { header, bulk } = contents;
        let fixed = Head {
            kind,
            call,
            code,
            num_buffers: bulk.len(),
            is_lent: false,
            header_len: header.len(),
            limit: None,
        };
        let mut head = Vec::with_capacity(HEAD_LEN + 8 * bulk.len() + header.len());
        fixed.write(&mut head);
        for buffer in &bulk {
            head.extend((buffer.len() as u64).to_le_bytes());
        }
        head.extend(header);
        let mut frame = Self {
            head,
            addresses: None,
            bulk,
            num_written: 0,
            len: 0,
            sending: None,
            deadline: None,
        };
        frame.len = frame.num_bytes();
        frame
    }

    /// Makes a frame that tells the peer where to look for a secret.
    pub(crate) fn probe(probe: &Probe) -> Self {
        let contents = Encoded {
            header: probe.header(),
            bulk: Vec::new(),
        };
        Self::new(Kind::Probe, 0, 0, contents)
    }

    /// How many numbers the message has, whether they are lent or not.
    pub(crate) fn num_numbers(&self) -> u64 {
        self.bulk.iter().map(|bulk| bulk.len() as u64).sum()
    }

    fn num_bytes(&self) -> usize {
        self.rest().map(<[u8]>::len).sum()
    }

    /// Lends the buffers instead of writing them. Nothing of the frame may have been written yet.
    pub(crate) fn lend(&mut self) {
        let addresses = self.bulk.iter().map(|bulk| address(bytes_of(bulk)));
        self.addresses = Some(addresses.flat_map(u64::to_le_bytes).collect());
        self.head[0] |= LENT;
        self.len = self.num_bytes();
    }

    /// Turns a frame with lent buffers into a frame that can be written to any connection.
    pub(crate) fn take_home(&mut self) {
        self.addresses = None;
        self.head[0] &= !LENT;
        self.len = self.num_bytes();
    }

    pub(crate) fn is_lent(&self) -> bool {
        self.addresses.is_some()
    }

    /// Sets the time by which the handler of the call must have begun.
    pub(crate) fn due(mut self, deadline: Option<Deadline>) -> Self {
        self.deadline = deadline;
        self
    }

    /// Writes the time that is left into the head. Must be called before the frame is written.
    pub(crate) fn stamp(&mut self) {
        if let (Some(deadline), 0) = (&self.deadline, self.num_written) {
            self.head[20..HEAD_LEN].copy_from_slice(&limit_bytes(Some(deadline.remaining())));
        }
    }

    /// Counts the frame for admission until it is written or dropped.
    pub(crate) fn counted(mut self, admission: &Arc<Admission>) -> Self {
        let num_numbers = self.bulk.iter().map(|bulk| bulk.len()).sum();
        self.sending = admission.sending(num_numbers);
        self
    }

    /// Sets the call's number. Nothing of the frame may have been written yet.
    pub(crate) fn set_call(&mut self, call: u64) {
        self.head[8..16].copy_from_slice(&call.to_le_bytes());
    }

    pub(crate) fn call(&self) -> u64 {
        let mut call = [0; 8];
        call.copy_from_slice(&self.head[8..16]);
        u64::from_le_bytes(call)
    }

    pub(crate) fn is_call(&self) -> bool {
        [Kind::Ask as u8, Kind::Tell as u8].contains(&self.kind())
    }

    fn kind(&self) -> u8 {
        self.head[0] & !LENT
    }

    /// Whether the frame must be sent on the next connection if this one is lost.
    pub(crate) fn must_arrive(&self) -> bool {
        self.is_call() || [Kind::Stop as u8, Kind::Kill as u8].contains(&self.kind())
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn has_begun(&self) -> bool {
        self.num_written > 0
    }

    pub(crate) fn is_done(&self) -> bool {
        self.num_written == self.len
    }

    /// Records that `num_bytes` more bytes were written. Returns how many of them belong to the next frame.
    pub(crate) fn advance(&mut self, num_bytes: usize) -> usize {
        let step = num_bytes.min(self.len - self.num_written);
        self.num_written += step;
        num_bytes - step
    }

    /// Returns a copy of the next bytes. They count as written.
    pub(crate) fn next_chunk(&mut self) -> Vec<u8> {
        self.stamp();
        let chunk = self.rest().next().unwrap_or_default();
        let chunk = chunk[..chunk.len().min(MAX_CHUNK)].to_vec();
        self.advance(chunk.len());
        chunk
    }

    /// Returns the bytes that are not written yet, in order.
    pub(crate) fn rest(&self) -> impl Iterator<Item = &[u8]> {
        let (heads, bulk) = match &self.addresses {
            Some(addresses) => {
                let (table, header) = self.head.split_at(HEAD_LEN + 8 * self.bulk.len());
                ([table, addresses, header], &[][..])
            }
            None => ([&self.head[..], &[], &[]], &self.bulk[..]),
        };
        let pieces = heads.into_iter().chain(bulk.iter().map(bytes_of));
        let mut skip = self.num_written;
        pieces.filter_map(move |piece| {
            let skipped = skip.min(piece.len());
            skip -= skipped;
            (skipped < piece.len()).then(|| &piece[skipped..])
        })
    }
}

fn bytes_of(bulk: &Bulk) -> &[u8] {
    bytemuck::cast_slice(bulk)
}
