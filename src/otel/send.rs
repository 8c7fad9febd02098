//! Sends spans to a collector: one HTTP request for each batch.

use std::fmt;
use std::io;
use std::pin::pin;
use std::str::FromStr;
use std::time::Duration;

use futures_util::future::{Either, select};
use http_body_util::Full;
use hyper::body::Bytes;
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Request, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// How long a request may take.
const PATIENCE: Duration = Duration::from_secs(3);

/// Where a collector takes spans: an address such as `http://127.0.0.1:4318`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    host: String,
    port: u16,
    path: String,
}

/// Why a text names no collector.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EndpointError {
    /// It is no URL.
    #[error("write a URL such as http://127.0.0.1:4318")]
    NoUrl,
    /// It asks for TLS or gRPC, which are not supported.
    #[error(
        "spans can be sent over plain HTTP only, as in http://127.0.0.1:4318: run a collector on this host, which sends \
         them on"
    )]
    NotHttp,
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        let uri: Uri = text.parse().map_err(|_| EndpointError::NoUrl)?;
        let (Some(scheme), Some(host)) = (uri.scheme_str(), uri.host()) else {
            return Err(EndpointError::NoUrl);
        };
        if scheme != "http" {
            return Err(EndpointError::NotHttp);
        }
        Ok(Self {
            host: host.to_owned(),
            port: uri.port_u16().unwrap_or(4318),
            path: format!("{}/v1/traces", uri.path().trim_end_matches('/')),
        })
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host, port, path } = self;
        write!(f, "http://{host}:{port}{path}")
    }
}

/// Why spans did not arrive.
#[derive(Debug, thiserror::Error)]
pub(super) enum SendError {
    #[error("no event loop")]
    EventLoop(#[source] io::Error),
    #[error("it cannot be reached")]
    Connect(#[source] io::Error),
    #[error("the connection failed")]
    Connection(#[from] hyper::Error),
    #[error("the request cannot be written")]
    Request(#[from] hyper::http::Error),
    #[error("it answered with status {0}")]
    Status(StatusCode),
    #[error("it did not answer within {PATIENCE:?}")]
    Timeout,
}

impl Endpoint {
    /// Sends a request and waits for the answer. Blocks for at most [`PATIENCE`].
    pub(super) fn post(&self, body: Vec<u8>) -> Result<(), SendError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(SendError::EventLoop)?;
        let done =
            runtime.block_on(async { tokio::time::timeout(PATIENCE, self.talk(body)).await });
        // A name that is still being looked up must not hold this thread up.
        runtime.shutdown_background();
        done.unwrap_or(Err(SendError::Timeout))
    }

    async fn talk(&self, body: Vec<u8>) -> Result<(), SendError> {
        let name = self.host.trim_start_matches('[').trim_end_matches(']');
        let stream = TcpStream::connect((name, self.port))
            .await
            .map_err(SendError::Connect)?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let request = Request::post(&self.path)
            .header(HOST, format!("{}:{}", self.host, self.port))
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))?;
        let asking = pin!(sender.send_request(request));
        let status = match select(asking, pin!(connection)).await {
            Either::Left((answer, _)) => answer?.status(),
            // The connection has ended, so the answer is there or does not come.
            Either::Right((ended, asking)) => {
                ended?;
                asking.await?.status()
            }
        };
        match status.is_success() {
            true => Ok(()),
            false => Err(SendError::Status(status)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_a_url_over_plain_http() {
        for (text, expected) in [
            ("http://127.0.0.1:4318", "http://127.0.0.1:4318/v1/traces"),
            ("http://collector", "http://collector:4318/v1/traces"),
            ("http://[::1]:9/a/", "http://[::1]:9/a/v1/traces"),
        ] {
            assert_eq!(text.parse::<Endpoint>().unwrap().to_string(), expected);
        }
        for (text, expected) in [
            ("https://collector:4318", "over plain HTTP"),
            ("grpc://collector:4317", "over plain HTTP"),
            ("", "such as http://127.0.0.1:4318"),
            ("127.0.0.1:4318", "such as http://127.0.0.1:4318"),
            ("/v1/traces", "such as http://127.0.0.1:4318"),
        ] {
            let error = text.parse::<Endpoint>().unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
