//! The calling side of the handshake.

use std::io;
use std::sync::Arc;

use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper::header::{AUTHORIZATION, CONNECTION, HOST, HeaderValue, UPGRADE};
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpStream, UnixStream};

use super::process::Process;
use super::reference::Wire;
use crate::net::address::Address;
use crate::net::stream::{Stream, tune};
use crate::net::tls;

/// The protocol's name in the upgrade, and its version.
pub(crate) const PROTOCOL: &str = "ps/1";

/// The headers of the handshake. All answers of a process of ps have the first one.
pub(crate) const VERSION: &str = "ps-protocol";
pub(crate) const SCHEMA: &str = "ps-schema";
pub(crate) const SESSION: &str = "ps-session";
pub(crate) const NODE: &str = "ps-node";
/// The rank that a caller wants that has not joined yet.
pub(crate) const JOINING: &str = "ps-joining";
/// How many numbers the sender of this header accepts in one message.
pub(crate) const MAX_NUMBERS: &str = "ps-max-numbers";

/// How many bytes of a refusal's text are read.
const MAX_REFUSAL: usize = 4096;

/// A connection whose handshake is over.
pub(crate) struct Dialled {
    pub(crate) stream: Stream,
    /// Bytes that arrived right after the handshake.
    pub(crate) already_read: Vec<u8>,
    /// How many numbers the other side accepts in one message.
    pub(crate) max_numbers: Option<u64>,
}

/// Why there is no connection.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum DialError {
    /// Trying again may help.
    #[error("{0}")]
    Unreachable(String),
    /// Nobody listens at any address of the other side: its host was reached and said so. Either the process
    /// has not begun to listen, or it has ended.
    #[error("{0}")]
    Deserted(String),
    /// The other side refused this process.
    #[error("{0}")]
    Refused(String),
    /// The actor or the node has ended for good.
    #[error("{0}")]
    Ended(String),
}

impl From<io::Error> for DialError {
    fn from(error: io::Error) -> Self {
        if let Some(why) = tls::explain(&error) {
            return Self::Refused(format!("{REFUSED_BY_TLS}: {why}"));
        }
        match error.kind() {
            // The second is the answer for a socket in the file system that was removed.
            io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound => {
                Self::Deserted(error.to_string())
            }
            _ => Self::Unreachable(error.to_string()),
        }
    }
}

impl From<hyper::Error> for DialError {
    fn from(error: hyper::Error) -> Self {
        // The side that answers checks the other's certificate last, so its verdict comes in place of an answer.
        if let Some(why) = tls::explain(&error) {
            return Self::Refused(format!("{REFUSED_BY_TLS}: {why}"));
        }
        match error.is_parse() {
            true => Self::Refused(format!(
                "{NOT_OURS}: it does not answer in HTTP ({error}); does it use TLS?"
            )),
            false => Self::Unreachable(format!("the handshake failed: {error}")),
        }
    }
}

/// What the reason begins with if TLS fails.
const REFUSED_BY_TLS: &str = "refused by TLS";

/// A part of the reason if the program that answers is not a process of ps.
const NOT_OURS: &str = "what listens there is not a process of ps";

/// Whether another try after this [`DialError::Refused`] cannot succeed.
pub(crate) fn is_refusal(reason: &str) -> bool {
    reason.starts_with("refused") || reason.contains(NOT_OURS)
}

/// Connects to an actor at the first address that answers.
pub(crate) async fn dial(
    process: &Arc<Process>,
    wire: &Wire,
    addresses: &[Address],
) -> Result<Dialled, DialError> {
    let mut last = format!("{} has no address", wire.node);
    let mut is_deserted = !addresses.is_empty();
    for address in addresses {
        let attempt = async {
            let stream = open(process, address).await?;
            shake_hands(process, wire, stream).await
        };
        let outcome = tokio::time::timeout(process.config().handshake, attempt).await;
        match outcome {
            Ok(Ok(dialled)) => return Ok(dialled),
            Ok(Err(DialError::Deserted(why))) => last = format!("{address}: {why}"),
            Ok(Err(DialError::Unreachable(why))) => {
                last = format!("{address}: {why}");
                is_deserted = false;
            }
            Ok(Err(DialError::Refused(why))) if why.starts_with(NOT_OURS) => {
                return Err(DialError::Refused(format!("{address}: {why}")));
            }
            Ok(Err(error)) => return Err(error),
            Err(_elapsed) => {
                let limit = process.config().handshake;
                last = format!("{address}: no answer within {limit:?}");
                is_deserted = false;
            }
        }
    }
    Err(match is_deserted {
        true => DialError::Deserted(last),
        false => DialError::Unreachable(last),
    })
}

/// Opens a byte stream.
pub(crate) async fn open(process: &Process, address: &Address) -> io::Result<Stream> {
    match address {
        Address::Tcp(address) => {
            let stream = TcpStream::connect(address).await?;
            tune(&stream, process.config().process_lease)?;
            Ok(match process.tls() {
                Some(tls) => Stream::Tls(Box::new(tls.connect(stream).await?)),
                None => Stream::Tcp(stream),
            })
        }
        Address::Unix(path) => Ok(Stream::Unix(UnixStream::connect(path).await?)),
        Address::Memory(place) => {
            let network = process.memory().ok_or(io::ErrorKind::Unsupported)?;
            Ok(Stream::Memory(network.connect(*place)?))
        }
    }
}

async fn shake_hands(process: &Process, wire: &Wire, stream: Stream) -> Result<Dialled, DialError> {
    let (mut requests, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    // The task ends by itself: with the upgrade, or when `requests` is dropped.
    tokio::spawn(connection.with_upgrades());
    let me = process.id();
    let mut request = Request::get(format!("/ps/v1/actors/{}", wire.actor))
        .header(HOST, "ps")
        .header(CONNECTION, "upgrade")
        .header(UPGRADE, PROTOCOL)
        .header(SCHEMA, format!("{:016x}", wire.schema))
        .header(SESSION, format!("{:016x}", process.session()))
        .header(NODE, format!("{}.{}", me.rank, me.incarnation))
        .header(MAX_NUMBERS, process.config().max_numbers);
    if let Some(place) = process.joining() {
        request = request.header(JOINING, place.to_string());
    }
    if let Some(token) = process.token() {
        request = request.header(AUTHORIZATION, format!("Bearer {}", token.reveal()));
    }
    let request = request
        .body(Empty::<Bytes>::new())
        .map_err(|error| DialError::Refused(error.to_string()))?;
    let response = requests.send_request(request).await?;
    let status = response.status();
    let version = response.version();
    let is_ours = response.headers().contains_key(VERSION);
    let max_numbers = response.headers().get(MAX_NUMBERS).and_then(number);
    if status != StatusCode::SWITCHING_PROTOCOLS {
        let body = Limited::new(response.into_body(), MAX_REFUSAL)
            .collect()
            .await;
        let text = body.map(|body| body.to_bytes()).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).trim().to_owned();
        if !is_ours {
            let line = text.lines().next().unwrap_or_default();
            let line: String = line.chars().take(80).collect();
            let why = format!("{NOT_OURS}: it answered {version:?} {status} {line}");
            // A proxy answers so while the process behind it does not run.
            return Err(match status.is_server_error() {
                true => DialError::Unreachable(why),
                false => DialError::Refused(why.trim_end().to_owned()),
            });
        }
        return Err(match status {
            StatusCode::NOT_FOUND | StatusCode::GONE => DialError::Ended(text),
            StatusCode::SERVICE_UNAVAILABLE => DialError::Unreachable(text),
            _ => DialError::Refused(format!("refused ({status}): {text}")),
        });
    }
    if !is_ours {
        let why = format!("{NOT_OURS}: it upgrades to something else");
        return Err(DialError::Refused(why));
    }
    let upgraded = hyper::upgrade::on(response).await?;
    let parts = upgraded
        .downcast::<TokioIo<Stream>>()
        .map_err(|_| DialError::Refused("the connection cannot be upgraded".to_owned()))?;
    Ok(Dialled {
        stream: parts.io.into_inner(),
        already_read: parts.read_buf.to_vec(),
        max_numbers,
    })
}

/// Reads the number in a header.
pub(crate) fn number(value: &HeaderValue) -> Option<u64> {
    value.to_str().ok()?.parse().ok()
}
