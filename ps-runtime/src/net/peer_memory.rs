//! Copies large numbers between two processes of one host: the receiver copies them from the sender's memory.
//!
//! A socket copies all bytes twice, into the kernel and out of it, and both processes work for that. Linux
//! allows a process to copy directly from another process of the same user (`process_vm_readv(2)`). MPI
//! libraries and TensorPipe use this, too. The frame contains the address of the numbers. The sender keeps
//! them unchanged until it hears that they were copied.
//!
//! The system may forbid it (containers, `ptrace_scope`), and a peer may see other process ids than this
//! process. So each side first tells the other where a secret is in its memory, and lends only to a peer
//! that has found the secret. To all other peers the numbers go through the socket.

use std::io;

use super::stream::Stream;
use crate::parallel::{PART, PART_LEN, for_each, sum_of_squares};

/// The length in bytes of a header with an address and the secret at it.
const PROBE_LEN: usize = 8 + SECRET_LEN;

const SECRET_LEN: usize = 16;

/// How many bytes are copied before other connections of the thread run. It takes some milliseconds.
const STEP: usize = 64 * PART;

/// A secret at a place in this process's memory.
#[derive(Debug)]
pub(crate) struct Probe(Box<[u8; SECRET_LEN]>);

impl Probe {
    /// Makes a secret. It fails if the system gives no random numbers.
    pub(crate) fn new() -> io::Result<Self> {
        let mut secret = Box::new([0; SECRET_LEN]);
        getrandom::fill(&mut *secret).map_err(io::Error::other)?;
        Ok(Self(secret))
    }

    /// Returns the address of the secret and the secret itself, for the peer.
    pub(crate) fn header(&self) -> Vec<u8> {
        let mut header = address(&*self.0).to_le_bytes().to_vec();
        header.extend(*self.0);
        header
    }
}

/// Returns the address of bytes in this process's memory.
pub(crate) fn address(bytes: &[u8]) -> u64 {
    bytes.as_ptr() as u64
}

/// The memory of the process at the other end of a connection.
pub(crate) struct PeerMemory(system::PeerMemory);

impl PeerMemory {
    /// Finds the process at the other end of a Unix socket. Returns `None` for other streams and systems.
    pub(crate) fn of(stream: &Stream) -> Option<Self> {
        match stream {
            Stream::Unix(stream) => system::PeerMemory::of(stream).map(Self),
            Stream::Tcp(_) | Stream::Memory(_) | Stream::Tls(_) => None,
        }
    }

    /// Whether the secret of a [`Probe`] is at its address in the peer's memory.
    pub(crate) fn shows(&self, header: &[u8]) -> bool {
        if header.len() != PROBE_LEN {
            return false;
        }
        let (address, secret) = header.split_at(8);
        let mut found = [0; SECRET_LEN];
        let address = address.try_into().map_or(0, u64::from_le_bytes);
        self.0.copy(address, &mut found).is_ok() && found == secret
    }

    /// Copies the numbers that the peer lends at an address. If `sums` is set, it returns the sum of their squares, which
    /// costs little while a part is in a core's cache. It fails if the peer has closed the connection.
    ///
    /// From time to time it lets the other connections of its thread run.
    pub(crate) async fn read(
        &self,
        address: u64,
        into: &mut [f32],
        sums: bool,
    ) -> io::Result<Option<f64>> {
        let mut from = address;
        let mut norm_squared = 0.0;
        for step in into.chunks_mut(STEP / size_of::<f32>()) {
            norm_squared += self.copy(from, step, sums)?;
            from = from.saturating_add(size_of_val(step) as u64);
            tokio::task::yield_now().await;
        }
        // A sender reuses its memory only after it has closed the connection.
        match self.0.has_hung_up() {
            false => Ok(sums.then_some(norm_squared)),
            true => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    fn copy(&self, address: u64, into: &mut [f32], sums: bool) -> io::Result<f64> {
        let num_bytes = size_of_val(into);
        let parts = into.chunks_mut(PART_LEN);
        let mut of_parts: Vec<io::Result<f64>> = parts.map(|_| Ok(0.0)).collect();
        let parts = into.chunks_mut(PART_LEN).zip(&mut of_parts);
        let parts = (0u64..).step_by(PART).zip(parts);
        for_each(num_bytes, parts, |(offset, (part, sum))| {
            let from = address.saturating_add(offset);
            let copied = self.0.copy(from, bytemuck::cast_slice_mut(part));
            *sum = copied.map(|()| if sums { sum_of_squares(part) } else { 0.0 });
        });
        of_parts.into_iter().sum()
    }
}

#[cfg(target_os = "linux")]
mod system {
    use std::io::{self, IoSliceMut};
    use std::os::fd::{AsFd, OwnedFd};

    use nix::errno::Errno;
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use nix::sys::uio::{RemoteIoVec, process_vm_readv};
    use nix::unistd::Pid;
    use tokio::net::UnixStream;

    pub(super) struct PeerMemory {
        peer: Pid,
        socket: OwnedFd,
    }

    impl PeerMemory {
        pub(super) fn of(stream: &UnixStream) -> Option<Self> {
            // The id comes from the system, not from the peer. It is 0 for processes that we cannot see.
            let peer = stream.peer_cred().ok()?.pid().filter(|pid| *pid > 0)?;
            let socket = stream.as_fd().try_clone_to_owned().ok()?;
            Some(Self {
                peer: Pid::from_raw(peer),
                socket,
            })
        }

        pub(super) fn copy(&self, address: u64, into: &mut [u8]) -> io::Result<()> {
            let mut done = 0;
            while done < into.len() {
                let from = RemoteIoVec {
                    base: usize::try_from(address)
                        .ok()
                        .and_then(|base| base.checked_add(done))
                        .ok_or(io::ErrorKind::InvalidData)?,
                    len: into.len() - done,
                };
                match process_vm_readv(
                    self.peer,
                    &mut [IoSliceMut::new(&mut into[done..])],
                    &[from],
                ) {
                    Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                    Ok(num_bytes) => done += num_bytes,
                    Err(Errno::EINTR) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            Ok(())
        }

        pub(super) fn has_hung_up(&self) -> bool {
            let hung_up = PollFlags::from_bits_retain(nix::libc::POLLRDHUP);
            let mut sockets = [PollFd::new(self.socket.as_fd(), hung_up)];
            // Any event that the system reports means that the connection has ended.
            !matches!(poll(&mut sockets, PollTimeout::ZERO), Ok(0))
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod system {
    use std::io;

    use tokio::net::UnixStream;

    /// There is none: other systems cannot read the memory of a peer.
    pub(super) enum PeerMemory {}

    impl PeerMemory {
        pub(super) fn of(_: &UnixStream) -> Option<Self> {
            None
        }

        pub(super) fn copy(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
            match *self {}
        }

        pub(super) fn has_hung_up(&self) -> bool {
            match *self {}
        }
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use tokio::net::UnixStream;

    use super::*;
    use crate::parallel::norm_squared;

    /// The memory of this very process, seen through a socket.
    fn own_memory() -> (PeerMemory, UnixStream) {
        let (ours, theirs) = UnixStream::pair().expect("the system gives sockets");
        let memory = PeerMemory::of(&Stream::Unix(ours)).expect("a process knows itself");
        (memory, theirs)
    }

    #[tokio::test]
    async fn what_is_lent_is_read_and_the_secret_found() {
        let (memory, _theirs) = own_memory();
        let probe = Probe::new().expect("the system has randomness");
        assert!(memory.shows(&probe.header()));
        // More than a step, so that it is read in pieces and by two threads.
        let len = STEP / size_of::<f32>() + 12_345;
        let lent: Vec<f32> = (0..len).map(|i| (i % 251) as f32).collect();
        let mut got = vec![0.0; len];
        let place = address(bytemuck::cast_slice(&lent));
        for sums in [true, false] {
            got.fill(0.0);
            let sum = memory
                .read(place, &mut got, sums)
                .await
                .expect("it is lent");
            assert_eq!(sum, sums.then(|| norm_squared(&lent)));
            assert!(got == lent);
        }
    }

    /// PS-6.
    #[tokio::test]
    async fn a_wrong_secret_or_address_is_noticed() {
        let (memory, _theirs) = own_memory();
        let probe = Probe::new().expect("the system has randomness");
        let mut header = probe.header();
        header[PROBE_LEN - 1] ^= 1;
        assert!(!memory.shows(&header), "another secret");
        assert!(!memory.shows(&header[1..]), "too short");
        header[..8].copy_from_slice(&8u64.to_le_bytes());
        assert!(!memory.shows(&header), "no memory there");
        for nowhere in [0, 8, u64::MAX - 3] {
            for len in [16, 4 << 20] {
                let read = memory.read(nowhere, &mut vec![0.0; len], true).await;
                assert!(read.is_err(), "{nowhere}");
            }
        }
    }

    /// the sender may have used the memory for something else by then.
    #[tokio::test]
    async fn nothing_is_taken_from_a_peer_that_has_hung_up() {
        let (memory, theirs) = own_memory();
        let lent = [7.0; 100];
        let place = address(bytemuck::cast_slice(&lent));
        let mut got = [0.0; 100];
        let taken = memory.read(place, &mut got, false).await;
        taken.expect("nobody has hung up yet");
        drop(theirs);
        assert!(memory.read(place, &mut got, false).await.is_err());
    }
}
