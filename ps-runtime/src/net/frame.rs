//! The format of frames. Each frame has a head of fixed size, lengths, a header, and bulk numbers.
//!
//! ```text
//! offset  size
//!      0     1  kind; 128 more when the buffers are lent
//!      1     1  always 0xA7
//!      2     2  number of bulk buffers, n
//!      4     4  length of the header in bytes, h
//!      8     8  number of the call, chosen by the caller, increasing; Ended: of the last one taken
//!     16     4  Ask, Tell: which message of the actor; Reply: 0 for a result, 1 for an error
//!     20     4  Ask: ms left for its handler to begin, plus 1; 0 for no limit; else always 0
//!     24    8n  length of each buffer, in f32
//!              if lent: 8n, the address of each buffer in the sender's memory
//!            h  header: bincode
//!               unless lent: the buffers, f32, one after the other
//! ```
//!
//! Lent buffers stay in the sender's memory until the receiver has copied them and sends `Taken`. Only a
//! peer that has sent `Readable` gets such frames.
//!
//! All numbers are little-endian. A time is the time that was left when the frame was written, because the
//! clocks of two hosts differ. [`Head::parse`] does no input or output. It checks everything that can be
//! checked before memory is allocated.

use std::time::Duration;

use crate::codec::{Encoded, MAX_HEADER};

/// The length of a frame's fixed part in bytes.
pub(crate) const HEAD_LEN: usize = 24;

/// The largest number of buffers in one frame. A message with more fails with `NotDelivered::TooLarge`.
pub(crate) const MAX_BUFFERS: usize = 4096;

const MARK: u8 = 0xA7;

/// The bit in the byte of the kind that says that the buffers are lent.
const LENT: u8 = 0x80;

/// The largest number of bytes that [`OutFrame::next_chunk`] copies.
const MAX_CHUNK: usize = 64 << 10;

/// The kind of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    /// A call. A `Reply` answers it.
    Ask = 1,
    /// A message that was sent with `tell`. A `Reply` without a result answers it.
    Tell = 2,
    /// The caller has given up.
    Cancel = 3,
    /// The end of a call.
    Reply = 4,
    /// A heartbeat.
    Ping = 5,
    /// The calling process has dropped its last reference.
    Release = 6,
    /// `ActorRef::stop`.
    Stop = 7,
    /// `ActorRef::kill`.
    Kill = 8,
    /// The actor has ended. It did not take calls with a higher number than this.
    Ended = 9,
    /// The address of a secret in the sender's memory, and the secret.
    Probe = 10,
    /// The secret was found: buffers may be lent.
    Readable = 11,
    /// The buffers lent with this call's frame have been copied.
    Taken = 12,
}

impl Kind {
    const ALL: [Self; 12] = [
        Self::Ask,
        Self::Tell,
        Self::Cancel,
        Self::Reply,
        Self::Ping,
        Self::Release,
        Self::Stop,
        Self::Kill,
        Self::Ended,
        Self::Probe,
        Self::Readable,
        Self::Taken,
    ];
}

/// The fixed part of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    /// The kind of the frame.
    pub kind: Kind,
    /// The number of the call that the frame belongs to.
    pub call: u64,
    /// The code of the message, or of the kind of result.
    pub code: u32,
    /// How many buffers the frame has.
    pub num_buffers: usize,
    /// Whether the buffers are lent. Then their addresses follow instead of their numbers.
    pub is_lent: bool,
    /// The header's length in bytes.
    pub header_len: usize,
    /// The time within which the handler of a call must begin, in whole ms. `None` means no limit.
    pub limit: Option<Duration>,
}

/// Why bytes are not a frame. The connection cannot go on after such an error.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FrameError {
    /// The first bytes cannot begin a frame.
    #[error("no frame begins with {0:02x?}")]
    NotAFrame([u8; 4]),
    /// The header is longer than any message needs.
    #[error("a header of {0} bytes is longer than {MAX_HEADER}: split the message")]
    HeaderTooLong(usize),
    /// There are more buffers than allowed.
    #[error("{0} buffers are more than the {MAX_BUFFERS} that a message may have: split it")]
    TooManyBuffers(usize),
    /// There are more numbers than allowed.
    #[error(
        "{len} numbers are more than the {max} that a message may have: split it, or raise \
         NetConfig::max_numbers where it arrives"
    )]
    TooLong {
        /// How many numbers the buffers hold together.
        len: u64,
        /// How many numbers are allowed.
        max: u64,
    },
}

impl Head {
    /// Reads the fixed part of a frame.
    ///
    /// # Errors
    /// When the bytes are not the beginning of a frame, or when the frame is too large.
    pub(crate) fn parse(bytes: &[u8; HEAD_LEN]) -> Result<Self, FrameError> {
        let [
            kind,
            mark,
            n0,
            n1,
            h0,
            h1,
            h2,
            h3,
            call @ ..,
            c0,
            c1,
            c2,
            c3,
            r0,
            r1,
            r2,
            r3,
        ] = bytes;
        let is_lent = *kind & LENT != 0;
        let number = *kind & !LENT;
        let found = Kind::ALL.into_iter().find(|known| *known as u8 == number);
        let limit = u32::from_le_bytes([*r0, *r1, *r2, *r3]);
        let (Some(kind), MARK, (Some(Kind::Ask), _) | (_, 0)) = (found, *mark, (found, limit))
        else {
            return Err(FrameError::NotAFrame([*kind, *mark, *n0, *n1]));
        };
        let num_buffers = usize::from(u16::from_le_bytes([*n0, *n1]));
        if num_buffers > MAX_BUFFERS {
            return Err(FrameError::TooManyBuffers(num_buffers));
        }
        let header_len = u32::from_le_bytes([*h0, *h1, *h2, *h3]) as usize;
        if header_len > MAX_HEADER {
            return Err(FrameError::HeaderTooLong(header_len));
        }
        Ok(Self {
            kind,
            call: u64::from_le_bytes(*call),
            code: u32::from_le_bytes([*c0, *c1, *c2, *c3]),
            num_buffers,
            is_lent,
            header_len,
            limit: limit
                .checked_sub(1)
                .map(|limit_ms| Duration::from_millis(limit_ms.into())),
        })
    }

    fn write(&self, out: &mut Vec<u8>) {
        let num_buffers = u16::try_from(self.num_buffers).unwrap_or(u16::MAX);
        let header_len = u32::try_from(self.header_len).unwrap_or(u32::MAX);
        let lent = if self.is_lent { LENT } else { 0 };
        out.extend([self.kind as u8 | lent, MARK]);
        out.extend(num_buffers.to_le_bytes());
        out.extend(header_len.to_le_bytes());
        out.extend(self.call.to_le_bytes());
        out.extend(self.code.to_le_bytes());
        out.extend(limit_bytes(self.limit));
    }
}

/// Returns a time limit as a frame contains it: rounded down to whole ms, plus 1, saturating. A limit that
/// is over is 1, and no limit is 0.
fn limit_bytes(limit: Option<Duration>) -> [u8; 4] {
    let limit_ms = limit.map_or(0, |limit| limit.as_millis().saturating_add(1));
    u32::try_from(limit_ms).unwrap_or(u32::MAX).to_le_bytes()
}

/// Checks whether a message can be sent to a peer that accepts `max_numbers` numbers in one message.
///
/// # Errors
/// The error with which the receiver would end the connection.
pub(crate) fn check(contents: &Encoded, max_numbers: u64) -> Result<(), FrameError> {
    let Encoded { header, bulk } = contents;
    if bulk.len() > MAX_BUFFERS {
        return Err(FrameError::TooManyBuffers(bulk.len()));
    }
    if header.len() > MAX_HEADER {
        return Err(FrameError::HeaderTooLong(header.len()));
    }
    let len = bulk.iter().map(|bulk| bulk.len() as u64).sum();
    match len > max_numbers {
        true => Err(FrameError::TooLong {
            len,
            max: max_numbers,
        }),
        false => Ok(()),
    }
}

/// Reads the lengths of a frame's buffers, each in numbers.
///
/// # Errors
/// When they hold more than `max` numbers together.
pub(crate) fn parse_lengths(bytes: &[u8], max: u64) -> Result<Vec<usize>, FrameError> {
    let (chunks, _) = bytes.as_chunks::<8>();
    let mut total = 0u64;
    let mut lengths = Vec::with_capacity(chunks.len());
    for chunk in chunks {
        let len = u64::from_le_bytes(*chunk);
        total = total.saturating_add(len);
        if total > max {
            return Err(FrameError::TooLong { len: total, max });
        }
        // No more than `max`, which is a length in this process.
        lengths.push(usize::try_from(len).unwrap_or(usize::MAX));
    }
    Ok(lengths)
}

/// Reads the addresses of lent buffers.
pub(crate) fn parse_addresses(bytes: &[u8]) -> impl Iterator<Item = u64> {
    let (chunks, _) = bytes.as_chunks::<8>();
    chunks.iter().map(|chunk| u64::from_le_bytes(*chunk))
}

mod out;

pub(crate) use out::OutFrame;

#[cfg(target_endian = "big")]
compile_error!("numbers travel as little-endian f32 and are not converted");

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::buffer::Buffer;
    use crate::codec::Bulk;
    use crate::deadline::Deadline;

    fn bulk(values: Vec<f32>) -> Bulk {
        Bulk::from(Buffer::from(values))
    }

    fn bytes_of(frame: &OutFrame) -> Vec<u8> {
        frame.rest().flatten().copied().collect()
    }

    proptest! {
        #[test]
        fn a_frame_is_read_as_it_was_written(
            kind in prop::sample::select(Kind::ALL.to_vec()),
            (call, code) in any::<(u64, u32)>(),
            header in proptest::collection::vec(any::<u8>(), 0..100),
            lengths in proptest::collection::vec(0usize..50, 0..4),
        ) {
            let contents = Encoded {
                header: header.clone(),
                bulk: lengths.iter().map(|&len| bulk(vec![1.5; len])).collect(),
            };
            let bytes = bytes_of(&OutFrame::new(kind, call, code, contents));
            let head = Head::parse(bytes.first_chunk().unwrap()).unwrap();
            let (is_lent, limit) = (false, None);
            let num_buffers = lengths.len();
            let expected = Head { kind, call, code, num_buffers, is_lent, header_len: header.len(), limit };
            prop_assert_eq!(head, expected);
            let (table, rest) = bytes[HEAD_LEN..].split_at(8 * lengths.len());
            prop_assert_eq!(parse_lengths(table, 1000).unwrap(), lengths);
            prop_assert_eq!(&rest[..header.len()], &header[..]);
        }

        /// However the system splits the writes.
        #[test]
        fn pieces_written_add_up(steps in proptest::collection::vec(1usize..40, 1..100)) {
            let contents = || Encoded { header: vec![7; 33], bulk: vec![bulk(vec![0.25; 9]), bulk(vec![]), bulk(vec![2.0; 5])] };
            let whole = bytes_of(&OutFrame::new(Kind::Ask, 5, 6, contents()));
            let mut frame = OutFrame::new(Kind::Ask, 5, 6, contents());
            let mut written = Vec::new();
            for step in steps {
                let next: Vec<u8> = bytes_of(&frame).into_iter().take(step).collect();
                written.extend(&next);
                prop_assert_eq!(frame.advance(next.len()), 0);
            }
            written.extend(bytes_of(&frame));
            prop_assert_eq!(written, whole);
        }

        /// On a connection to lend on, and after it broke on one to write on.
        #[test]
        fn a_lent_frame_has_addresses_in_place_of_numbers(
            lengths in proptest::collection::vec(0usize..50, 0..4),
        ) {
            let buffers: Vec<_> = lengths.iter().map(|&len| bulk(vec![1.5; len])).collect();
            let contents = Encoded { header: vec![7; 11], bulk: buffers.clone() };
            let mut frame = OutFrame::new(Kind::Reply, 5, 0, contents);
            let written = bytes_of(&frame);
            frame.lend();
            let lent = bytes_of(&frame);
            prop_assert_eq!(frame.len(), lent.len());
            let head = Head::parse(lent.first_chunk().unwrap()).unwrap();
            prop_assert!(head.is_lent && head.kind == Kind::Reply && head.num_buffers == lengths.len());
            let (table, rest) = lent[HEAD_LEN..].split_at(8 * lengths.len());
            prop_assert_eq!(parse_lengths(table, 1000).unwrap(), lengths);
            let (addresses, header) = rest.split_at(table.len());
            let places = buffers.iter().map(|buffer| buffer.as_ptr() as u64);
            prop_assert!(parse_addresses(addresses).eq(places));
            prop_assert_eq!(header, [7; 11]);
            frame.take_home();
            prop_assert_eq!(bytes_of(&frame), written);
        }

        /// PS-6.
        #[test]
        fn arbitrary_bytes_do_no_harm(bytes: [u8; HEAD_LEN], table in proptest::collection::vec(any::<u8>(), 0..100)) {
            if let Ok(head) = Head::parse(&bytes) {
                prop_assert!(head.header_len <= MAX_HEADER && head.num_buffers <= MAX_BUFFERS);
            }
            if let Ok(lengths) = parse_lengths(&table, 1_000_000) {
                prop_assert!(lengths.iter().sum::<usize>() <= 1_000_000);
            }
        }
    }

    #[test]
    fn a_time_limit_is_what_is_left_when_the_call_is_written() {
        let parse = |frame: &OutFrame| Head::parse(bytes_of(frame).first_chunk().unwrap());
        let asking = |kind, after| {
            let frame = OutFrame::signal(kind, 1).due(Deadline::within(after));
            parse(&{
                let mut frame = frame;
                frame.stamp();
                frame
            })
        };
        let limit = |after| asking(Kind::Ask, after).unwrap().limit;
        let hour = limit(Duration::from_secs(3600)).unwrap();
        assert!(hour < Duration::from_secs(3600), "{hour:?}");
        assert!(hour > Duration::from_secs(3500), "{hour:?}");
        assert_eq!(limit(Duration::ZERO), Some(Duration::ZERO));
        let longest = Duration::from_millis((u32::MAX - 1).into());
        assert_eq!(limit(2 * longest), Some(longest));
        assert_eq!(limit(Duration::MAX), None);
        // Nothing but an Ask has one.
        assert!(asking(Kind::Cancel, longest).is_err());
    }

    #[test]
    fn an_http_request_is_no_frame() {
        let error = Head::parse(b"GET / HTTP/1.1\r\nHost: x\r").unwrap_err();
        assert_eq!(error, FrameError::NotAFrame(*b"GET "));
    }

    #[test]
    fn giant_lengths_are_refused_before_anything_is_allocated() {
        let lengths = [u64::MAX, 1].map(u64::to_le_bytes).concat();
        let error = parse_lengths(&lengths, 100).unwrap_err();
        assert_eq!(
            error,
            FrameError::TooLong {
                len: u64::MAX,
                max: 100
            }
        );
    }
}
