//! The called side of the handshake: accepts connections, checks the callers, and serves HTTP or an actor.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::Router;
use axum::extract::{Path, Request, State};
use axum::http::header::{AUTHORIZATION, CONNECTION, UPGRADE};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use futures_util::future::BoxFuture;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;

use super::callee::Server;
use super::dial::{JOINING, MAX_NUMBERS, NODE, PROTOCOL, SCHEMA, SESSION, VERSION};
use super::guests::Guest;
use super::process::{Joining, NodeId, Process};
use super::strangers::{Stranger, Strangers};
use crate::net::access::may_pass;
use crate::net::connection::Connection;
use crate::net::quiet::Quiet;
use crate::net::stream::{Detached, Stream, tune};
use crate::net::threads;
use crate::net::tls;

/// A socket or pipe that accepts connections.
pub(crate) enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
    Memory(mpsc::Receiver<tokio::io::DuplexStream>),
}

/// Decides which nodes may send frames. Nodes that were declared lost may not.
pub(crate) trait Incarnations: Send + Sync {
    /// Whether a node may send frames. `None` if this process does not know.
    fn may_speak(&self, node: NodeId) -> Option<bool>;

    /// Asks the driver. `None` if it does not answer.
    fn ask(&self, node: NodeId) -> BoxFuture<'static, Option<bool>>;

    /// Is told that a process that wants to join was refused for good, before it could ask the driver's
    /// agent. The process knows the token, if there is one. This happens only in a driver.
    fn note_refusal(&self, _: Joining, _reason: &str) {}
}

/// The state that all connections of a listener share.
pub(crate) struct Front {
    pub(crate) process: Arc<Process>,
    pub(crate) incarnations: Arc<dyn Incarnations>,
    /// HTTP routes that are served on the same port, behind the same token.
    pub(crate) routes: Router,
}

impl Listener {
    async fn accept(&mut self) -> io::Result<(Stream, Peer)> {
        match self {
            Self::Tcp(listener) => {
                let (stream, address) = listener.accept().await?;
                Ok((Stream::Tcp(stream), Peer(Some(address))))
            }
            Self::Unix(listener) => Ok((Stream::Unix(listener.accept().await?.0), Peer(None))),
            Self::Memory(listener) => match listener.recv().await {
                Some(stream) => Ok((Stream::Memory(stream), Peer(None))),
                None => std::future::pending().await,
            },
        }
    }

    /// Accepts connections for as long as it is polled. Dropping it ends all of them.
    pub(crate) async fn serve(mut self, front: Front) {
        let Front {
            process,
            incarnations,
            routes,
        } = front;
        let config = *process.config();
        let shared = Arc::new(Shared {
            process: Arc::clone(&process),
            incarnations,
        });
        let routes = Router::new()
            .route("/ps/v1/actors/{number}", get(upgrade))
            .with_state(Arc::clone(&shared))
            .merge(routes)
            .layer(middleware::from_fn_with_state(shared, check_token))
            // Health probes of an orchestrator have no token.
            .route("/healthz", get(|| async { last("ok\n") }))
            .layer(middleware::map_response(introduce));
        let room = Arc::new(Semaphore::new(config.max_connections));
        let mut strangers = Strangers::new(config.max_connections);
        let mut connections = JoinSet::new();
        loop {
            let (stream, peer) = match self.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Usually there are no free file descriptors. The next try comes after a pause.
                    if let Some(num_suppressed) = NOT_TAKEN.may_speak() {
                        tracing::warn!(%error, num_suppressed, "could not take a connection");
                    }
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            while connections.try_join_next().is_some() {}
            let Ok(permit) = Arc::clone(&room).try_acquire_owned() else {
                if let Some(num_suppressed) = TOO_MANY.may_speak() {
                    let limit = config.max_connections;
                    tracing::warn!(
                        limit,
                        num_suppressed,
                        "refused a connection: NetConfig::max_connections are open"
                    );
                }
                continue;
            };
            let Ok(stream) = stream.detach() else {
                continue;
            };
            let routes = routes.clone();
            let handshake = config.handshake;
            let process = Arc::clone(&process);
            let on = threads::next();
            let stranger = Stranger::new();
            let entering = stranger.clone();
            let task = connections.spawn_on(
                async move {
                    let begun = tokio::time::timeout(handshake, begin(stream, &process));
                    // A peer that fails in the first steps gets no answer.
                    match begun.await {
                        Ok(Ok(stream)) => {
                            greet(stream, peer, entering, routes, handshake, permit).await
                        }
                        Ok(Err(error)) if !has_gone(&error) => {
                            let why = tls::explain(&error);
                            refuse(&NO_TLS, peer, &why.unwrap_or_else(|| error.to_string()));
                        }
                        Ok(Err(_)) | Err(_) => {}
                    }
                },
                &on,
            );
            strangers.add(stranger, task);
        }
    }
}

/// How many bytes are read ahead from a peer that speaks HTTP, including the head of a request. Strangers
/// can make each connection in its handshake take this much. With less, a gradient over HTTP needs more
/// reads.
const MAX_BUFFERED: usize = 64 << 10;

static NOT_TAKEN: Quiet = Quiet::new();
static TOO_MANY: Quiet = Quiet::new();
static NO_TLS: Quiet = Quiet::new();
static NO_TOKEN: Quiet = Quiet::new();
static OTHER_TOKEN: Quiet = Quiet::new();
static OTHER_BUILD: Quiet = Quiet::new();

/// The address of the process at the other end, if it has one.
#[derive(Clone, Copy, Debug)]
struct Peer(Option<SocketAddr>);

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(address) => address.fmt(f),
            None => f.write_str("a process of this host"),
        }
    }
}

/// Logs that a process was refused, because a user may wonder why it does not join.
fn refuse(kind: &Quiet, peer: Peer, reason: &dyn fmt::Display) {
    if let Some(num_suppressed) = kind.may_speak() {
        tracing::warn!(%peer, %reason, num_suppressed, "refused a connection");
    }
}

/// Whether the peer has only closed the connection, as port checks do.
fn has_gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::NotConnected
            | io::ErrorKind::InvalidInput
    )
}

/// An answer after which the connection is closed. A peer that has not shown the token must not keep a
/// connection by repeated requests.
fn last(text: &'static str) -> impl IntoResponse {
    ([(CONNECTION, "close")], text)
}

/// Adds the header that shows that a process of ps answers.
async fn introduce(mut response: Response) -> Response {
    let protocol = HeaderValue::from_static(PROTOCOL);
    response.headers_mut().insert(VERSION, protocol);
    response
}

struct Shared {
    process: Arc<Process>,
    incarnations: Arc<dyn Incarnations>,
}

/// Passes an upgrade from the request to the connection's task.
type Upgrades = mpsc::Sender<Upgrade>;

/// Marks a connection as that of a process that asks to join.
#[derive(Clone, Default)]
struct Visit(Arc<OnceLock<Guest>>);

struct Upgrade {
    on: hyper::upgrade::OnUpgrade,
    server: MakeServer,
    process: Arc<Process>,
}

/// Moves an accepted stream to the event loop that runs this, and does the TLS handshake if TLS is used.
async fn begin(stream: Detached, process: &Process) -> io::Result<Stream> {
    let stream = match stream.attach()? {
        Stream::Tcp(stream) => stream,
        // Only processes of this host can connect here.
        local => return Ok(local),
    };
    tune(&stream, process.config().process_lease)?;
    Ok(match process.tls() {
        Some(tls) => Stream::Tls(Box::new(tls.accept(stream).await?)),
        None => Stream::Tcp(stream),
    })
}

/// Serves HTTP on a connection until it ends or becomes a connection to an actor.
async fn greet(
    stream: Stream,
    peer: Peer,
    stranger: Stranger,
    routes: Router,
    limit: Duration,
    permit: OwnedSemaphorePermit,
) {
    let (sender, mut upgrades) = mpsc::channel::<Upgrade>(1);
    // Held here until the peer has read its answer and closes the connection.
    let visit = Visit::default();
    let routes = routes
        .layer(axum::Extension(visit.clone()))
        .layer(axum::Extension(sender))
        .layer(axum::Extension(stranger))
        .layer(axum::Extension(peer));
    let serving = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limit)
        .max_buf_size(MAX_BUFFERED)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(routes))
        .with_upgrades();
    // A peer that violates HTTP gets no answer.
    let _ = serving.await;
    if let Ok(upgrade) = upgrades.try_recv() {
        run(upgrade).await;
    }
    drop(visit);
    drop(permit);
}

async fn run(upgrade: Upgrade) {
    let Ok(upgraded) = upgrade.on.await else {
        return;
    };
    let Ok(parts) = upgraded.downcast::<TokioIo<Stream>>() else {
        return;
    };
    let connection = Connection::new(parts.io.into_inner(), upgrade.process.config());
    let server = (upgrade.server)(Arc::clone(&connection.outbox));
    let watch = server.watch();
    let process = upgrade.process;
    let (config, buffers) = (process.config(), process.buffers());
    let running = connection.run(&parts.read_buf, config, buffers, server);
    tokio::pin!(running);
    tokio::select! {
        () = &mut running => return,
        () = watch => {}
    }
    // The last replies are still being written.
    running.await;
}

async fn check_token(
    State(shared): State<Arc<Shared>>,
    axum::Extension(peer): axum::Extension<Peer>,
    axum::Extension(stranger): axum::Extension<Stranger>,
    request: Request,
    next: Next,
) -> Response {
    let given = request
        .headers()
        .get(AUTHORIZATION)
        .map(HeaderValue::as_bytes);
    if may_pass(shared.process.token(), given) {
        stranger.end();
        return next.run(request).await;
    }
    let (kind, reason) = match given {
        None => (
            &NO_TOKEN,
            "it brings no token: start it with the PS_TOKEN of this process",
        ),
        Some(_) => (
            &OTHER_TOKEN,
            "it brings another token: start it with the PS_TOKEN of this process",
        ),
    };
    refuse(kind, peer, &reason);
    let text = "this cluster asks for a token (Authorization: Bearer …), and this is not it\n";
    (StatusCode::UNAUTHORIZED, last(text)).into_response()
}

async fn upgrade(
    State(shared): State<Arc<Shared>>,
    Path(number): Path<u64>,
    axum::Extension(upgrades): axum::Extension<Upgrades>,
    axum::Extension(peer): axum::Extension<Peer>,
    axum::Extension(visit): axum::Extension<Visit>,
    mut request: Request,
) -> Response {
    let on = hyper::upgrade::on(&mut request);
    match admit(&shared, peer, &visit, number, request.headers()).await {
        Ok(server) => {
            let process = Arc::clone(&shared.process);
            let upgrade = Upgrade {
                on,
                server,
                process,
            };
            if upgrades.try_send(upgrade).is_err() {
                return StatusCode::BAD_REQUEST.into_response();
            }
            let headers = [("connection", "upgrade"), ("upgrade", PROTOCOL)];
            let limit = [(MAX_NUMBERS, shared.process.config().max_numbers.to_string())];
            (StatusCode::SWITCHING_PROTOCOLS, headers, limit).into_response()
        }
        Err((status, why)) => (status, why + "\n").into_response(),
    }
}

type MakeServer = Box<dyn FnOnce(Arc<crate::net::outbox::Outbox>) -> Server + Send>;

/// Checks a caller: its token, its run, its build and its incarnation.
async fn admit(
    shared: &Arc<Shared>,
    peer: Peer,
    visit: &Visit,
    number: u64,
    headers: &HeaderMap,
) -> Result<MakeServer, (StatusCode, String)> {
    let process = &shared.process;
    let header = |name| {
        headers
            .get(name)
            .and_then(|value: &HeaderValue| value.to_str().ok())
    };
    let hex = |name| header(name).and_then(|text| u64::from_str_radix(text, 16).ok());
    let protocol = headers.get(UPGRADE).and_then(|value| value.to_str().ok());
    if protocol != Some(PROTOCOL) {
        let why = format!("this is a connection for programs that speak {PROTOCOL}");
        return Err((StatusCode::UPGRADE_REQUIRED, why));
    }
    let session = hex(SESSION).unwrap_or(0);
    // A process that has not joined yet may only connect to the driver.
    let is_driver = process.id() == NodeId::DRIVER;
    let is_joining = session == 0 && number == super::process::AGENT && is_driver;
    if is_joining {
        visit.0.get_or_init(|| process.guests().enter());
    }
    if session != process.session() && !is_joining {
        let why = "the caller belongs to another run of the program";
        return Err((StatusCode::GONE, why.to_owned()));
    }
    let node = header(NODE).and_then(parse_node);
    let node = node.filter(|_| !is_joining);
    if let Some(node) = node {
        let may_speak = match shared.incarnations.may_speak(node) {
            None => shared.incarnations.ask(node).await,
            known => known,
        };
        match may_speak {
            Some(true) => {}
            Some(false) => {
                let why = format!("{node} was declared lost; it must join again");
                return Err((StatusCode::GONE, why));
            }
            None => {
                let why = format!("the driver does not say whether {node} is lost");
                return Err((StatusCode::SERVICE_UNAVAILABLE, why));
            }
        }
    }
    let Some((callee, hold)) = process.open(number) else {
        let why = format!("actor {number} has ended");
        return Err((StatusCode::NOT_FOUND, why));
    };
    if hex(SCHEMA) != Some(callee.schema()) {
        let why = format!(
            "the caller has another version of {}: start the same build everywhere",
            callee.type_name()
        );
        let joining = header(JOINING).and_then(|place| place.parse::<Joining>().ok());
        match joining.filter(|_| is_joining) {
            Some(place) => {
                let rank = place.rank;
                shared.incarnations.note_refusal(place, &why);
                refuse(&OTHER_BUILD, peer, &format_args!("rank {rank}: {why}"));
            }
            None => refuse(&OTHER_BUILD, peer, &why),
        }
        return Err((StatusCode::CONFLICT, why));
    }
    let max_numbers = headers.get(MAX_NUMBERS).and_then(super::dial::number);
    let max_numbers = max_numbers.unwrap_or(process.config().max_numbers);
    let (process, shared) = (Arc::clone(process), Arc::clone(shared));
    // Checked again for each frame: a node may be declared lost while it is connected.
    let may_speak = Box::new(move || {
        node.is_none_or(|node| shared.incarnations.may_speak(node) != Some(false))
    });
    Ok(Box::new(move |outbox| {
        Server::new(&process, callee, outbox, hold, may_speak, max_numbers)
    }))
}

fn parse_node(text: &str) -> Option<NodeId> {
    let (rank, incarnation) = text.split_once('.')?;
    Some(NodeId {
        rank: rank.parse().ok()?,
        incarnation: incarnation.parse().ok()?,
    })
}
