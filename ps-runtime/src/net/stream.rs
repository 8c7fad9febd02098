//! Byte streams of all kinds: TCP, Unix sockets, and pipes in memory.

use std::io::{self, IoSlice};
use std::net::Shutdown;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};
use tokio::net::{TcpStream, UnixStream, tcp, unix};
use tokio_rustls::TlsStream;

/// The longest time limit for unacknowledged bytes that the system accepts: it counts ms in 31 bits.
#[cfg(target_os = "linux")]
const LONGEST: Duration = Duration::from_millis(i32::MAX as u64);

/// A connected byte stream.
#[derive(Debug)]
pub(crate) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
    Memory(DuplexStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl Stream {
    /// Takes the stream off its event loop, to move it to another one.
    pub(crate) fn detach(self) -> io::Result<Detached> {
        Ok(match self {
            Self::Tcp(stream) => Detached::Tcp(stream.into_std()?),
            Self::Unix(stream) => Detached::Unix(stream.into_std()?),
            Self::Memory(stream) => Detached::Memory(stream),
            // Only sockets that were just accepted are moved, and TLS begins later.
            Self::Tls(_) => return Err(io::ErrorKind::Unsupported.into()),
        })
    }

    pub(crate) fn split(self) -> (ReadHalf, WriteHalf) {
        match self {
            Self::Tcp(stream) => {
                let (read, write) = stream.into_split();
                (Box::pin(read), WriteHalf::Tcp(write))
            }
            Self::Unix(stream) => {
                let (read, write) = stream.into_split();
                (Box::pin(read), WriteHalf::Unix(write))
            }
            Self::Memory(stream) => {
                let (read, write) = tokio::io::split(stream);
                (Box::pin(read), WriteHalf::Task(Box::pin(write)))
            }
            Self::Tls(stream) => {
                let (read, write) = tokio::io::split(*stream);
                (Box::pin(read), WriteHalf::Task(Box::pin(write)))
            }
        }
    }
}

/// Makes the system notice a peer that is cut off, and send small messages at once.
///
/// The heartbeat also notices such a peer. This setting is for bytes that stay in the send buffer.
pub(crate) fn tune(stream: &TcpStream, lease: Duration) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    // The system takes whole seconds, from 1 to 32,767.
    let seconds = |time: Duration| time.clamp(Duration::from_secs(1), Duration::from_secs(32_767));
    let keepalive = socket2::TcpKeepalive::new()
        .with_time(seconds(lease))
        .with_interval(seconds(lease / 4));
    socket.set_tcp_keepalive(&keepalive)?;
    #[cfg(target_os = "linux")]
    socket.set_tcp_user_timeout(Some(lease.clamp(Duration::from_millis(1), LONGEST)))?;
    Ok(())
}

/// A stream that belongs to no event loop.
pub(crate) enum Detached {
    Tcp(std::net::TcpStream),
    Unix(std::os::unix::net::UnixStream),
    Memory(DuplexStream),
}

impl Detached {
    /// Puts the stream on the event loop that runs this.
    pub(crate) fn attach(self) -> io::Result<Stream> {
        Ok(match self {
            Self::Tcp(stream) => Stream::Tcp(TcpStream::from_std(stream)?),
            Self::Unix(stream) => Stream::Unix(UnixStream::from_std(stream)?),
            Self::Memory(stream) => Stream::Memory(stream),
        })
    }
}

pub(crate) type ReadHalf = Pin<Box<dyn AsyncRead + Send>>;

/// The writing half. Sockets can be written to by any thread, without a task.
pub(crate) enum WriteHalf {
    Tcp(tcp::OwnedWriteHalf),
    Unix(unix::OwnedWriteHalf),
    Task(Pin<Box<dyn AsyncWrite + Send>>),
}

/// A socket that any thread may write to.
pub(crate) enum Socket {
    Tcp(tcp::OwnedWriteHalf),
    Unix(unix::OwnedWriteHalf),
}

impl Socket {
    pub(crate) fn try_write(&self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Self::Tcp(socket) => socket.try_write_vectored(pieces),
            Self::Unix(socket) => socket.try_write_vectored(pieces),
        }
    }

    /// Lets the peer see that nothing more will come.
    pub(crate) fn hang_up(&self) {
        // An error means that the peer has already closed the connection.
        let _ = match self {
            Self::Tcp(socket) => SockRef::from(socket.as_ref()).shutdown(Shutdown::Write),
            Self::Unix(socket) => SockRef::from(socket.as_ref()).shutdown(Shutdown::Write),
        };
    }

    pub(crate) async fn writable(&self) -> io::Result<()> {
        match self {
            Self::Tcp(socket) => socket.writable().await,
            Self::Unix(socket) => socket.writable().await,
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Unix(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Memory(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Unix(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Memory(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Self::Unix(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Self::Memory(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Self::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    /// Without this, hyper copies a body behind its head before it writes both.
    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Tcp(stream) => stream.is_write_vectored(),
            Self::Unix(stream) => stream.is_write_vectored(),
            Self::Memory(stream) => stream.is_write_vectored(),
            Self::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            Self::Unix(stream) => Pin::new(stream).poll_flush(cx),
            Self::Memory(stream) => Pin::new(stream).poll_flush(cx),
            Self::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Memory(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_lease_of_any_length_suits_a_socket() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        for millis in [1, 500, 3_000, 5_000, 86_400_000, u64::MAX / 2] {
            let stream = TcpStream::connect(listener.local_addr().unwrap()).await;
            tune(&stream.unwrap(), Duration::from_millis(millis)).unwrap();
        }
    }
}
