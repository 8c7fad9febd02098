//! A small HTTP server on a thread of its own: a few connections at a time, and no patience with slow ones.

use std::future::ready;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::http::header::{AUTHORIZATION, WWW_AUTHENTICATE};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use futures_util::future::{AbortHandle, Abortable};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use ps_actors::actor::try_run;
use ps_actors::net::Token;
use subtle::ConstantTimeEq as _;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

/// How many connections are served at a time. A further one waits until one of them is over.
const MAX_CONNECTIONS: usize = 16;

/// How long a peer may take for the head of a request.
const HEAD: Duration = Duration::from_secs(5);

/// How long a connection may last. Prometheus opens another one.
const CONNECTION: Duration = Duration::from_secs(60);

/// How long nothing is accepted after that has failed.
const PAUSE: Duration = Duration::from_millis(100);

/// Serves metrics until it is dropped.
#[derive(Debug)]
pub struct MetricsListener {
    address: SocketAddr,
    abort: AbortHandle,
    thread: Option<JoinHandle<()>>,
}

impl MetricsListener {
    pub(super) fn start(
        address: SocketAddr,
        token: Option<Token>,
        routes: Router,
    ) -> io::Result<Self> {
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let hint = || ready("the metrics are at /metrics\n");
        let routes = routes.route("/", get(hint));
        let routes = match token {
            Some(token) => routes.layer(middleware::from_fn_with_state(token, check)),
            None => routes,
        };
        let (abort, registration) = AbortHandle::new_pair();
        let thread = std::thread::Builder::new().name("metrics".to_owned());
        let thread = thread.spawn(move || {
            let served = try_run(Abortable::new(serve(listener, routes), registration));
            if let Ok(Ok(Err(error))) | Err(error) = served {
                tracing::warn!(%error, "the metrics cannot be served; the training goes on");
            }
        })?;
        Ok(Self {
            address,
            abort,
            thread: Some(thread),
        })
    }

    /// Returns the address, with the port that was taken.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for MetricsListener {
    fn drop(&mut self) {
        self.abort.abort();
        if let Some(thread) = self.thread.take() {
            // If it panicked, that was logged.
            let _ = thread.join();
        }
    }
}

async fn serve(listener: TcpListener, routes: Router) -> io::Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        // It is never closed.
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else {
            return Ok(());
        };
        while connections.try_join_next().is_some() {}
        match listener.accept().await {
            Ok((stream, _)) => {
                let routes = routes.clone();
                connections.spawn(async move {
                    // A peer that violates HTTP or is slow gets no answer.
                    let _ = tokio::time::timeout(CONNECTION, answer(stream, routes)).await;
                    drop(permit);
                });
            }
            // Usually there are no free file descriptors.
            Err(error) => {
                tracing::debug!(%error, "could not take a connection for metrics");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

async fn answer(stream: TcpStream, routes: Router) -> Result<(), hyper::Error> {
    hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(routes))
        .await
}

async fn check(State(token): State<Token>, request: Request, next: Next) -> Response {
    let given = request.headers().get(AUTHORIZATION);
    let given = given.and_then(|given| given.as_bytes().strip_prefix(b"Bearer "));
    let is_right = given.is_some_and(|given| token.reveal().as_bytes().ct_eq(given).into());
    if is_right {
        return next.run(request).await;
    }
    let text = "these metrics ask for a token (Authorization: Bearer …), and this is not it\n";
    let header = [(WWW_AUTHENTICATE, "Bearer")];
    (StatusCode::UNAUTHORIZED, header, text).into_response()
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};

    use super::super::Exporter;
    use super::*;

    fn listen(token: Option<&str>) -> MetricsListener {
        let token = token.map(|token| Token::new(token).unwrap());
        let address = "127.0.0.1:0".parse().unwrap();
        Exporter::new().listen(address, token).unwrap()
    }

    fn ask(listener: &MetricsListener, head: &str) -> String {
        let mut stream = std::net::TcpStream::connect(listener.address()).unwrap();
        let request = format!("{head}host: ps\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    #[test]
    fn only_the_metrics_are_there() {
        let listener = listen(None);
        let answer = ask(&listener, "GET /metrics HTTP/1.1\r\n");
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        let kind = "content-type: text/plain; version=0.0.4; charset=utf-8\r\n";
        assert!(answer.contains(kind), "{answer}");
        let hint = ask(&listener, "GET / HTTP/1.1\r\n");
        assert!(hint.ends_with("the metrics are at /metrics\n"), "{hint}");
        for (head, status) in [
            ("GET /v1/status HTTP/1.1\r\n", "404"),
            ("POST /metrics HTTP/1.1\r\n", "405"),
            ("nonsense\r\n", "400"),
        ] {
            let answer = ask(&listener, head);
            assert_eq!(answer.get(9..12), Some(status), "{answer}");
        }
    }

    #[test]
    fn a_token_is_asked_for() {
        let listener = listen(Some("0123456789abcdef"));
        let get = "GET /metrics HTTP/1.1\r\n";
        for authorization in [
            "",
            "authorization: Bearer 0123456789abcdeg\r\n",
            "authorization: Bearer \r\n",
            "authorization: 0123456789abcdef\r\n",
        ] {
            let answer = ask(&listener, &format!("{get}{authorization}"));
            assert!(answer.starts_with("HTTP/1.1 401"), "{answer}");
            assert!(!answer.contains("0123456789abcdef"), "{answer}");
        }
        let right = format!("{get}authorization: Bearer 0123456789abcdef\r\n");
        let answer = ask(&listener, &right);
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }

    #[test]
    fn a_port_that_is_taken_is_an_error_and_a_dropped_listener_gives_it_back() {
        let first = listen(None);
        let address = first.address();
        let error = Exporter::new().listen(address, None).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        // It ends although a peer keeps a connection open.
        let open = std::net::TcpStream::connect(address).unwrap();
        drop(first);
        Exporter::new().listen(address, None).unwrap();
        drop(open);
    }

    #[test]
    fn peers_that_say_nothing_do_not_keep_others_out() {
        let listener = listen(None);
        let silent =
            (0..MAX_CONNECTIONS).map(|_| std::net::TcpStream::connect(listener.address()).unwrap());
        let silent: Vec<_> = silent.collect();
        // It is answered as soon as their time for the head is over.
        let answer = ask(&listener, "GET /metrics HTTP/1.1\r\n");
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        drop(silent);
    }
}
