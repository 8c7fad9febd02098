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
pub(super) struct Deadline {
    patience: Duration,
    until: Mutex<Instant>,
}

impl Deadline {
    fn new(patience: Duration) -> Self {
        let until = Mutex::new(Instant::now() + patience);
        Self { patience, until }
    }

    /// There was progress: the next one must come within the patience.
    pub(super) fn extend(&self) {
        *self.until.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now() + self.patience;
    }

    /// Becomes ready when there was no progress for too long.
    async fn passed(&self) {
        loop {
            let until = *self.until.lock().unwrap_or_else(PoisonError::into_inner);
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
/// `patience` is [`PATIENCE`].
pub(super) fn serve(
    listener: TcpListener,
    shared: &Arc<Shared>,
    patience: Duration,
) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let accepting = pin!(accept(&listener, shared, &room, patience));
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
    patience: Duration,
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
                talk(stream, &shared, patience).await;
                drop(permit);
            });
        }
    }
}

async fn talk(stream: TcpStream, shared: &Arc<Shared>, patience: Duration) {
    let _ = stream.set_nodelay(true);
    let deadline = Arc::new(Deadline::new(patience));
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

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, BufReader, Read as _, Write as _};
    use std::net::TcpStream;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::controls::Controls;
    use crate::dashboard::guard::Guard;
    use crate::dashboard::shared::MAX_STREAMS;
    use crate::observe::testing;

    /// Bounds every wait.
    const SOON: Duration = Duration::from_secs(60);

    /// Opens the stream of events, and reads the head of the answer, but nothing after it.
    fn watch(address: SocketAddr) -> BufReader<TcpStream> {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        write!(
            stream,
            "GET /api/events HTTP/1.1\r\nhost: {address}\r\n\r\n"
        )
        .unwrap();
        // A byte at a time, so that nothing of the stream is read ahead.
        let mut reader = BufReader::with_capacity(1, stream);
        let mut line = String::new();
        while line != "\r\n" {
            line.clear();
            assert!(reader.read_line(&mut line).unwrap() > 0);
        }
        reader
    }

    /// Two clients get states without a pause, as fast as they take them. One reads, and the other does not.
    #[test]
    fn a_client_that_reads_nothing_is_dropped_and_one_that_reads_is_not() {
        let guard = Guard {
            names: Vec::new(),
            token: None,
            reads_need_token: false,
        };
        let shared = Arc::new(Shared::new(guard, Controls::new(), None));
        // Large states fill the buffers of the system soon.
        for worker in 0..64 {
            let steps = (0..40).map(|clock| testing::step(worker, clock, clock as f64));
            steps.for_each(|step| shared.state().count(&step));
        }
        let (listener, address) = listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let for_thread = Arc::clone(&shared);
        let patience = Duration::from_secs(2);
        let serving = std::thread::spawn(move || serve(listener, &for_thread, patience).unwrap());
        let silent = watch(address);
        let reading = watch(address);
        let is_read = Arc::new(AtomicBool::new(false));
        let has_read = Arc::clone(&is_read);
        let reader = std::thread::spawn(move || {
            let mut stream = reading.into_inner();
            let mut bytes = vec![0; 1 << 16];
            loop {
                match stream.read(&mut bytes).unwrap() {
                    0 => return,
                    _ => has_read.store(true, Ordering::SeqCst),
                }
            }
        });
        assert_eq!(shared.streams.available_permits(), MAX_STREAMS - 2);
        let deadline = Instant::now() + SOON;
        while shared.streams.available_permits() < MAX_STREAMS - 1 {
            assert!(
                Instant::now() < deadline,
                "the silent client is still there"
            );
            shared.publish();
            // Between two states: the server's thread must be able to write them.
            std::thread::sleep(Duration::from_millis(1));
        }
        // The other one still gets what is new.
        is_read.store(false, Ordering::SeqCst);
        while !is_read.load(Ordering::SeqCst) {
            assert!(Instant::now() < deadline, "the other client gets nothing");
            shared.publish();
            // As above.
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(shared.streams.available_permits(), MAX_STREAMS - 1);
        shared.close();
        serving.join().unwrap();
        reader.join().unwrap();
        drop(silent);
    }
}
