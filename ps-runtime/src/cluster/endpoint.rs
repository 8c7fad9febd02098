//! The sockets that a process listens on.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use axum::Router;
use tokio::net::{TcpListener, TcpSocket, UnixListener};
use tokio::task::JoinHandle;

use super::config::{ClusterConfig, ClusterError, Transport};
use super::socket_directory::SocketDirectory;
use crate::net::{Address, threads};
use crate::remote::listen::{Front, Incarnations, Listener};
use crate::remote::process::Process;

/// Sockets that are bound but not served yet. Their addresses are known before a process can connect.
pub(crate) struct Bound {
    listeners: Vec<Listener>,
    /// The addresses of this process, the fastest one first.
    pub(crate) addresses: Vec<Address>,
    /// Removes the Unix socket from the file system.
    directory: Option<SocketDirectory>,
}

/// The tasks that accept connections. Dropping it ends them and all their connections.
pub(crate) struct Endpoint {
    tasks: Vec<JoinHandle<()>>,
    _directory: Option<SocketDirectory>,
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl Bound {
    /// Binds the sockets of the transport. `address` is for TCP. Must be called on an event loop.
    pub(crate) fn bind(config: &ClusterConfig, address: SocketAddr) -> Result<Self, ClusterError> {
        let failed =
            |address: String| move |source: io::Error| ClusterError::Listen { address, source };
        if let Transport::Memory(network) = &config.transport {
            let (place, listener) = network.listen();
            return Ok(Self {
                listeners: vec![Listener::Memory(listener)],
                addresses: vec![Address::Memory(place)],
                directory: None,
            });
        }
        if !address.ip().is_loopback() && !config.is_guarded() && !config.insecure {
            return Err(ClusterError::NoToken(address));
        }
        let tcp = listen(address);
        let tcp = tcp.map_err(failed(address.to_string()))?;
        let bound_to = tcp.local_addr().map_err(failed(address.to_string()))?;
        let mut bound = Self {
            listeners: vec![Listener::Tcp(tcp)],
            addresses: vec![Address::Tcp(bound_to)],
            directory: None,
        };
        if let Transport::Sockets = config.transport
            && let Ok((directory, path, unix)) = unix()
        {
            // It comes first: within one host it is faster. On other hosts the file does not exist.
            bound.addresses.insert(0, Address::Unix(path));
            bound.listeners.push(Listener::Unix(unix));
            bound.directory = Some(directory);
        }
        Ok(bound)
    }

    /// Starts to accept connections.
    pub(crate) fn serve(
        self,
        process: &Arc<Process>,
        incarnations: &Arc<dyn Incarnations>,
        routes: &Router,
    ) -> Endpoint {
        let mut tasks = Vec::new();
        for listener in self.listeners {
            let front = Front {
                process: Arc::clone(process),
                incarnations: Arc::clone(incarnations),
                routes: routes.clone(),
            };
            tasks.push(tokio::spawn(listener.serve(front)));
        }
        let sweeping = Arc::downgrade(process);
        let every = process.config().process_lease;
        tasks.push(threads::next().spawn(async move {
            while let Some(process) = sweeping.upgrade() {
                process.sweep();
                process.sweep_kept(Instant::now());
                drop(process);
                tokio::time::sleep(every).await;
            }
        }));
        Endpoint {
            tasks,
            _directory: self.directory,
        }
    }
}

/// How many connections may wait to be accepted, if the system allows as many. With the usual 128, a
/// process that connects at the same time as many others tries again only after a second.
const BACKLOG: u32 = 4096;

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    // A port is free as soon as its last listener has ended, even if old connections are still closing.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// A socket in a directory that only this user can enter.
fn unix() -> io::Result<(SocketDirectory, PathBuf, UnixListener)> {
    let directory = SocketDirectory::new()?;
    let path = directory.socket();
    let listener = UnixListener::bind(&path)?;
    Ok((directory, path, listener))
}
