//! Accepts connections, bounds them, and ends those that are too slow.

use std::convert::Infallible;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::future::{Either, select};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;

use super::answer::answer;
use super::shared::Shared;

/// How many connections may be open. A browser opens up to six.
const MAX_CONNECTIONS: usize = 128;

/// How long a client may take to send the head of a request, also of the next one on an open connection.
const HEAD: Duration = Duration::from_secs(10);

/// How long a client may take for a request and its answer, and for a part of the stream of events.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

/// How many bytes of a request are read ahead.
const MAX_BUFFERED: usize = 16 << 10;

/// How long the end of a training waits until clients have got the last state.
const GOODBYE: Duration = Duration::from_secs(1);

/// Until when a connection must have made progress.
#[derive(Debug)]
pub(super) struct Deadline(Mutex<Instant>);

impl Deadline {
    /// There was progress: the next one must come within the [patience](PATIENCE).
    pub(super) fn extend(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now() + PATIENCE;
    }

    /// Becomes ready when there was no progress for too long.
    async fn passed(&self) {
        loop {
            let until = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
            if until <= Instant::now() {
                return;
            }
            tokio::time::sleep_until(until.into()).await;
        }
    }
}

/// Listens at this address.
pub(super) fn listen(address: SocketAddr) -> io::Result<(TcpListener, SocketAddr)> {
    let listener = TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    Ok((listener, address))
}

/// Serves until the state is closed, and a little longer for clients that have not got its end.
pub(super) fn serve(listener: TcpListener, shared: &Arc<Shared>) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let accepting = pin!(accept(&listener, shared, &room));
        let ticking = pin!(shared.tick());
        let closed = pin!(shared.closed());
        select(select(accepting, ticking), closed).await;
        // Who reads gets the end. Connections that only wait for another request are not waited for.
        shared.publish();
        let said = pin!(shared.all_streams_ended());
        let _ = tokio::time::timeout(GOODBYE, said).await;
        Ok(())
    })
}

async fn accept(
    listener: &tokio::net::TcpListener,
    shared: &Arc<Shared>,
    room: &Arc<Semaphore>,
) -> Infallible {
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Usually there are no free file descriptors. The next try comes after a pause.
                tracing::debug!(%error, "the dashboard could not take a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        // One too many is closed without an answer.
        if let Ok(permit) = Arc::clone(room).try_acquire_owned() {
            let shared = Arc::clone(shared);
            tokio::spawn(async move {
                talk(stream, &shared).await;
                drop(permit);
            });
        }
    }
}

async fn talk(stream: TcpStream, shared: &Arc<Shared>) {
    let _ = stream.set_nodelay(true);
    let deadline = Arc::new(Deadline(Mutex::new(Instant::now() + PATIENCE)));
    let service = service_fn(|request| {
        deadline.extend();
        let (shared, deadline) = (Arc::clone(shared), Arc::clone(&deadline));
        async move { Ok::<_, Infallible>(answer(&shared, deadline, request).await) }
    });
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .max_buf_size(MAX_BUFFERED);
    let talking = builder.serve_connection(TokioIo::new(stream), service);
    match select(pin!(talking), pin!(deadline.passed())).await {
        Either::Left((Ok(()), _)) => {}
        Either::Left((Err(error), _)) => {
            tracing::debug!(%error, "a connection to the dashboard ended")
        }
        Either::Right(_) => {
            tracing::debug!("a client of the dashboard is too slow, and is dropped")
        }
    }
}
