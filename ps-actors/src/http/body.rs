//! Numbers in and out: from a request's body into a recycled buffer, and from a snapshot into a reply's
//! body.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::Request;
use axum::http::StatusCode;
use axum::http::header::CONTENT_LENGTH;
use http_body_util::BodyExt;
use hyper::body::{Frame, SizeHint};
use ps_runtime::buffer::{Buffer, BufferPool};
use tokio::sync::{Notify, Semaphore, SemaphorePermit};
use tokio::time::{Instant, timeout};

use super::HttpConfig;
use super::problem::Problem;
use crate::weights::Weights;

/// How many idle receive buffers are kept: enough for one round of a few workers.
const NUM_IDLE_BUFFERS: usize = 16;

/// How long a body is measured before it can count as too slow.
const TRIAL: Duration = Duration::from_secs(1);

/// A gradient of the right length that a client is about to send.
#[derive(Debug)]
pub(super) struct Upload {
    body: Body,
    /// The length, counted in numbers.
    len: usize,
}

impl Upload {
    /// Checks the declared length first. A wrong request takes neither a place nor memory.
    pub(super) fn new(request: Request, len: usize) -> Result<Self, Problem> {
        check_length(&request, len)?;
        let body = request.into_body();
        Ok(Self { body, len })
    }
}

/// Receives gradients.
#[derive(Debug)]
pub(super) struct Uploads {
    config: HttpConfig,
    room: Semaphore,
    buffers: BufferPool,
    /// The uploads that have a place.
    under_way: Mutex<Vec<Arc<Progress>>>,
}

/// The progress of an upload.
#[derive(Debug)]
struct Progress {
    since: Instant,
    num_bytes: usize,
    filled: AtomicUsize,
    /// Tells the upload that it must give its place to another one.
    must_go: Notify,
}

impl Progress {
    /// Returns how many seconds the whole upload will take at its current speed. Returns `None` at the
    /// beginning.
    fn expected(&self, now: Instant) -> Option<f64> {
        let took = now.saturating_duration_since(self.since);
        let filled = self.filled.load(Ordering::Relaxed) as f64;
        (took >= TRIAL).then(|| took.as_secs_f64() * self.num_bytes as f64 / filled)
    }
}

/// A place for an upload. Dropping it frees the place.
struct Place<'a> {
    uploads: &'a Uploads,
    progress: Arc<Progress>,
    _room: SemaphorePermit<'a>,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut under_way = self.uploads.under_way();
        under_way.retain(|other| !Arc::ptr_eq(other, &self.progress));
    }
}

impl Uploads {
    pub(super) fn new(config: HttpConfig) -> Self {
        Self {
            config,
            room: Semaphore::new(config.max_uploads),
            buffers: BufferPool::new(NUM_IDLE_BUFFERS),
            under_way: Mutex::default(),
        }
    }

    fn under_way(&self) -> MutexGuard<'_, Vec<Arc<Progress>>> {
        // Each operation on the list is whole.
        let under_way = self.under_way.lock();
        under_way.unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a place. If none is free, the slowest upload loses its place, provided that it could not
    /// be finished in time at its current speed.
    async fn place(&self, num_bytes: usize) -> Result<Place<'_>, Problem> {
        let HttpConfig {
            silence,
            max_uploads,
            ..
        } = self.config;
        let room = async {
            loop {
                let room = timeout(TRIAL / 2, self.room.acquire()).await;
                match room {
                    Ok(room) => break room.expect("the semaphore is never closed"),
                    Err(_elapsed) => self.evict(Instant::now()),
                }
            }
        };
        let room = timeout(silence, room).await.map_err(|_| {
            let why = format!("{max_uploads} gradients are on their way in already");
            Problem::unavailable(why).retry_soon()
        })?;
        let progress = Arc::new(Progress {
            since: Instant::now(),
            num_bytes,
            filled: AtomicUsize::new(0),
            must_go: Notify::new(),
        });
        self.under_way().push(Arc::clone(&progress));
        Ok(Place {
            uploads: self,
            progress,
            _room: room,
        })
    }

    fn evict(&self, now: Instant) {
        let under_way = self.under_way();
        let expected = under_way
            .iter()
            .filter_map(|upload| Some((upload.expected(now)?, upload)));
        let slowest = expected.max_by(|(a, _), (b, _)| a.total_cmp(b));
        if let Some((expected, slowest)) = slowest
            && expected > self.config.max_upload_time.as_secs_f64()
        {
            slowest.must_go.notify_one();
        }
    }

    /// Receives exactly the announced number of numbers.
    pub(super) async fn receive(&self, upload: Upload) -> Result<Buffer, Problem> {
        let Upload { mut body, len } = upload;
        let num_bytes = len.saturating_mul(4);
        let HttpConfig {
            silence,
            max_upload_time,
            ..
        } = self.config;
        let place = self.place(num_bytes).await?;
        let progress = &place.progress;
        let mut buffer = self.buffers.try_take(len).map_err(|_| {
            let why = format!(
                "there is no memory for the {len} numbers of a gradient now; try again, or let the server \
                 take fewer at once (`HttpConfig::max_uploads`)"
            );
            Problem::unavailable(why).retry_soon()
        })?;
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut buffer);
        let mut filled = 0;
        loop {
            let left = max_upload_time.saturating_sub(progress.since.elapsed());
            let frame = tokio::select! {
                biased;
                () = progress.must_go.notified() => Err("too slow, and others wait"),
                frame = timeout(left.min(silence), body.frame()) => frame.map_err(|_| "too slow"),
            };
            let frame = frame.map_err(|why| {
                let why = format!("gave up after {filled} of {num_bytes} bytes: {why}");
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
                // Trailers contain nothing that the API asks for.
                Some(Ok(frame)) => frame.into_data().unwrap_or_default(),
            };
            let Some(place) = bytes.get_mut(filled..filled + data.len()) else {
                return Err(cut(", more than it said"));
            };
            place.copy_from_slice(&data);
            filled += data.len();
            progress.filled.store(filled, Ordering::Relaxed);
        }
        to_native(&mut buffer);
        Ok(buffer)
    }
}

/// Checks the declared length of the body.
fn check_length(request: &Request, len: usize) -> Result<(), Problem> {
    let expected = (len as u64).saturating_mul(4);
    let what = format!("a gradient of the {len} weights has {expected} bytes");
    // Without a length and without chunks, HTTP/1.1 takes a body to be empty.
    let is_declared = request.headers().contains_key(CONTENT_LENGTH);
    let given = request.body().size_hint().exact();
    match given.filter(|_| is_declared) {
        Some(given) if given == expected => Ok(()),
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

/// Makes the body from all numbers of a snapshot, without copying them out of the server's memory.
pub(super) fn of_weights(weights: &Weights) -> Body {
    let segments = weights.segments().iter();
    let pieces: VecDeque<Bytes> = segments
        .map(|segment| in_bytes(&segment.data))
        .filter(|bytes| !bytes.is_empty())
        .collect();
    Body::new(Pieces { pieces })
}

/// Returns the numbers as bytes. Other readers may share them.
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

/// A body in pieces with a known length.
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

#[cfg(test)]
mod tests {
    use axum::response::IntoResponse;

    use super::*;

    /// without memory for what a client sends, that request fails and nothing else.
    #[tokio::test]
    async fn a_gradient_that_there_is_no_memory_for_is_refused_for_now() {
        let uploads = Uploads::new(HttpConfig::default());
        for len in [1 << 50, usize::MAX / 4] {
            let body = Body::empty();
            let problem = uploads.receive(Upload { body, len }).await.unwrap_err();
            let response = problem.into_response();
            assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
            assert!(response.headers().contains_key("retry-after"));
        }
        // The place is free again.
        assert!(uploads.under_way().is_empty());
        let (body, len) = (Body::from(vec![0; 8]), 2);
        let buffer = uploads.receive(Upload { body, len }).await.unwrap();
        assert_eq!(buffer[..], [0.0; 2]);
    }
}
