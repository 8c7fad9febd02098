//! A tiny HTTP server on 127.0.0.1 for tests.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

/// What to send for one request.
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) body: Vec<u8>,
    /// `content-length` to claim in place of the body's.
    pub(super) length: Option<usize>,
    /// Close the connection without a word.
    pub(super) hang_up: bool,
    /// Send nothing until the client goes away.
    pub(super) silent: bool,
}

impl Answer {
    pub(super) fn body(body: Vec<u8>) -> Self {
        Self {
            status: 200,
            body,
            length: None,
            hang_up: false,
            silent: false,
        }
    }

    pub(super) fn status(status: u16) -> Self {
        Self {
            status,
            ..Self::body(Vec::new())
        }
    }
}

/// Serves until the test program ends; its thread waits in `accept` and owns nothing else.
pub(super) struct TestServer {
    address: SocketAddr,
    requests: Arc<Mutex<Vec<String>>>,
}

impl TestServer {
    pub(super) fn start(handler: impl Fn(&str) -> Answer + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("bound");
        let requests = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&requests);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                // A client that gives up is part of some tests.
                let _ = answer(stream, &handler, &seen);
            }
        });
        Self { address, requests }
    }

    pub(super) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Paths asked for so far.
    pub(super) fn requests(&self) -> Vec<String> {
        self.requests.lock().expect("no panic").clone()
    }
}

fn answer(
    mut stream: TcpStream,
    handler: &impl Fn(&str) -> Answer,
    seen: &Mutex<Vec<String>>,
) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut request = String::new();
    reader.read_line(&mut request)?;
    let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut header = String::new();
    while reader.read_line(&mut header)? > 2 {
        header.clear();
    }
    let answer = handler(&path);
    seen.lock().expect("no panic").push(path);
    if answer.hang_up {
        return Ok(());
    }
    if answer.silent {
        // Returns when the client closes the connection.
        reader.read_line(&mut header)?;
        return Ok(());
    }
    let length = answer.length.unwrap_or(answer.body.len());
    let status = answer.status;
    let head =
        format!("HTTP/1.1 {status} -\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n");
    stream.write_all(head.as_bytes())?;
    stream.write_all(&answer.body)
}
