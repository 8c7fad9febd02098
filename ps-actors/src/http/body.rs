//! Numbers in and out: a request's body into a recycled buffer, a snapshot into a reply's body.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::Request;
use axum::http::StatusCode;
use axum::http::header::CONTENT_LENGTH;
use http_body_util::BodyExt;
use hyper::body::{Frame, SizeHint};
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout, timeout_at};

use super::HttpConfig;
use super::problem::Problem;
use crate::buffer::{Buffer, BufferPool};
use crate::weights::Weights;

/// Idle receive buffers that are kept: those of one round of a few workers.
const NUM_IDLE_BUFFERS: usize = 16;

/// Takes gradients in.
#[derive(Debug)]
pub(super) struct Uploads {
    config: HttpConfig,
    room: Semaphore,
    buffers: BufferPool,
}

impl Uploads {
    pub(super) fn new(config: HttpConfig) -> Self {
        Self {
            config,
            room: Semaphore::new(config.max_uploads),
            buffers: BufferPool::new(NUM_IDLE_BUFFERS),
        }
    }

    /// Receives exactly `len` numbers.
    ///
    /// Nothing is taken, neither room nor memory, before the declared length is right.
    pub(super) async fn receive(&self, request: Request, len: usize) -> Result<Buffer, Problem> {
        let num_bytes = check_length(&request, len)?;
        let mut body = request.into_body();
        let HttpConfig {
            silence,
            max_upload_time,
            max_uploads,
        } = self.config;
        let _room = timeout(silence, self.room.acquire()).await.map_err(|_| {
            let why = format!("{max_uploads} gradients are on their way in already");
            Problem::unavailable(why).retry_soon()
        })?;
        let mut buffer = self.buffers.take(len);
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut buffer);
        let latest = Instant::now() + max_upload_time;
        let mut filled = 0;
        loop {
            let deadline = latest.min(Instant::now() + silence);
            let frame = timeout_at(deadline, body.frame()).await;
            let frame = frame.map_err(|_| {
                let why = format!("gave up after {filled} of {num_bytes} bytes: too slow");
                Problem::new(StatusCode::REQUEST_TIMEOUT, why)
            })?;
            let cut = |why: &str| {
                let why = format!("the body ended after {filled} of {num_bytes} bytes{why}");
                Problem::new(StatusCode::BAD_REQUEST, why)
            };
            let data = match frame {
                None if filled == bytes.len() => break,
                None => return Err(cut("")),
                Some(Err(error)) => return Err(cut(&format!(": {error}"))),
                // Trailers say nothing that is asked for.
                Some(Ok(frame)) => frame.into_data().unwrap_or_default(),
            };
            let Some(place) = bytes.get_mut(filled..filled + data.len()) else {
                return Err(cut(", more than it said"));
            };
            place.copy_from_slice(&data);
            filled += data.len();
        }
        to_native(&mut buffer);
        Ok(buffer)
    }
}

/// Checks what the client says about its body against what it has to be.
fn check_length(request: &Request, len: usize) -> Result<u64, Problem> {
    let expected = 4 * len as u64;
    let what = format!("a gradient of the {len} weights has {expected} bytes");
    // Without a length and without chunks, HTTP/1.1 takes a body to be empty.
    let is_declared = request.headers().contains_key(CONTENT_LENGTH);
    let given = request.body().size_hint().exact();
    match given.filter(|_| is_declared) {
        Some(given) if given == expected => Ok(expected),
        Some(given) => {
            let status = match given > expected {
                true => StatusCode::PAYLOAD_TOO_LARGE,
                false => StatusCode::UNPROCESSABLE_ENTITY,
            };
            Err(Problem::new(status, format!("{what}, not {given}")))
        }
        None => {
            let why = format!("content-length is missing; {what}");
            Err(Problem::new(StatusCode::LENGTH_REQUIRED, why))
        }
    }
}

/// Turns little-endian numbers into this machine's.
fn to_native(numbers: &mut [f32]) {
    if cfg!(target_endian = "big") {
        for number in numbers {
            *number = f32::from_bits(number.to_bits().swap_bytes());
        }
    }
}

/// The body that consists of all numbers of a snapshot, in the server's own memory.
pub(super) fn of_weights(weights: &Weights) -> Body {
    let segments = weights.segments().iter();
    let pieces: VecDeque<Bytes> = segments
        .map(|segment| in_bytes(&segment.data))
        .filter(|bytes| !bytes.is_empty())
        .collect();
    Body::new(Pieces { pieces })
}

/// Shares the numbers with whoever else reads them.
fn in_bytes(numbers: &Arc<Buffer>) -> Bytes {
    struct Numbers(Arc<Buffer>);

    impl AsRef<[u8]> for Numbers {
        fn as_ref(&self) -> &[u8] {
            bytemuck::cast_slice(&self.0)
        }
    }

    if cfg!(target_endian = "big") {
        let mut copy = numbers.to_vec();
        to_native(&mut copy);
        return Bytes::from_owner(Numbers(Arc::new(Buffer::from(copy))));
    }
    Bytes::from_owner(Numbers(Arc::clone(numbers)))
}

/// A body in pieces, whose length is known.
struct Pieces {
    pieces: VecDeque<Bytes>,
}

impl HttpBody for Pieces {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.pieces.pop_front().map(|piece| Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.pieces.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.pieces.iter().map(|piece| piece.len() as u64).sum())
    }
}
