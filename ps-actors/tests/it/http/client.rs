//! A client with nothing but a socket, as one in another language would be, and what it talks to.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use ps_actors::cluster::{Cluster, ClusterConfig, Hosts};
use ps_actors::group::ServerGroup;
use ps_actors::http::{Api, HttpConfig};
use ps_actors::net::Token;
use ps_actors::rule::{Sgd, UpdateRule};
use ps_actors::server::ServerConfig;
use ps_actors::weights::{Layout, Parameter, Weights};

/// Far longer than anything takes.
pub(crate) const SOON: Duration = Duration::from_secs(60);

/// Servers behind a port.
pub(crate) struct World {
    pub(crate) group: ServerGroup,
    pub(crate) api: Api,
    cluster: Cluster,
}

pub(crate) struct Settings {
    pub(crate) server: ServerConfig,
    pub(crate) http: HttpConfig,
    pub(crate) num_servers: usize,
    pub(crate) token: Option<&'static str>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            server: ServerConfig::default(),
            http: HttpConfig::default(),
            num_servers: 1,
            token: None,
        }
    }
}

/// Ten weights in two parameters.
pub(crate) const LEN: usize = 10;

pub(crate) fn initial() -> Vec<f32> {
    let odd = [-0.0, f32::MIN_POSITIVE / 8.0, f32::MAX, 1.0 / 3.0];
    let even = (0..).map(|i| i as f32 / 10.0);
    odd.into_iter().chain(even).take(LEN).collect()
}

impl World {
    pub(crate) fn new(settings: Settings) -> Self {
        let sgd = |_| -> Box<dyn UpdateRule> { Box::new(Sgd::new()) };
        Self::with_rule(settings, sgd)
    }

    pub(crate) fn with_rule(
        settings: Settings,
        rule: impl FnMut(std::ops::Range<usize>) -> Box<dyn UpdateRule>,
    ) -> Self {
        let parameter = |name: &str, shape: &[usize], range| Parameter {
            name: name.to_owned(),
            shape: shape.to_vec(),
            range,
        };
        let parameters = vec![
            parameter("fc.weight", &[2, 4], 0..8),
            parameter("fc.\"bias\"", &[2], 8..LEN),
        ];
        let weights = Weights::initial(Layout::new(parameters).unwrap(), initial());
        let num_servers = settings.num_servers;
        let group = ServerGroup::spawn(&weights, num_servers, settings.server, rule).unwrap();
        let api = Api::new(settings.http);
        api.open(group.clone());
        let config = ClusterConfig {
            token: settings.token.map(|token| Token::new(token).unwrap()),
            ..ClusterConfig::default()
        };
        let local = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0);
        let cluster = Cluster::listen_with(config, local, Hosts::new(), api.routes()).unwrap();
        Self {
            group,
            api,
            cluster,
        }
    }

    pub(crate) fn client(&self) -> Client {
        Client::new(self.cluster.address().expect("it listens on TCP"))
    }

    /// The version that the servers are at, and how often `worker` did what, from `/v1/status`.
    pub(crate) fn status(&self) -> String {
        self.client().get("/v1/status").text()
    }
}

/// One connection.
pub(crate) struct Client {
    pub(crate) stream: BufReader<TcpStream>,
}

#[derive(Debug)]
pub(crate) struct Response {
    pub(crate) status: u16,
    headers: BTreeMap<String, String>,
    pub(crate) body: Vec<u8>,
}

impl Response {
    #[track_caller]
    pub(crate) fn header(&self, name: &str) -> &str {
        self.find(name)
            .unwrap_or_else(|| panic!("no {name} in {self:?}: {}", self.text()))
    }

    pub(crate) fn find(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub(crate) fn numbers(&self) -> Vec<f32> {
        numbers(&self.body)
    }

    #[track_caller]
    pub(crate) fn expect(self, status: u16) -> Self {
        assert_eq!(self.status, status, "{self:?}: {}", self.text());
        self
    }
}

pub(crate) fn numbers(bytes: &[u8]) -> Vec<f32> {
    let (chunks, rest) = bytes.as_chunks::<4>();
    assert!(rest.is_empty(), "{} bytes", bytes.len());
    chunks
        .iter()
        .map(|&chunk| f32::from_le_bytes(chunk))
        .collect()
}

pub(crate) fn bytes(numbers: &[f32]) -> Vec<u8> {
    numbers
        .iter()
        .flat_map(|number| number.to_le_bytes())
        .collect()
}

/// The bits, because `NaN` is not equal to itself and `-0` is equal to `0`.
pub(crate) fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|number| number.to_bits()).collect()
}

/// The headers of a push.
pub(crate) fn stamp(worker: u32, incarnation: u64, clock: u64, version: u64) -> String {
    format!(
        "ps-worker: {worker}\r\nps-incarnation: {incarnation}\r\nps-clock: {clock}\r\n\
         ps-version: {version}\r\nps-loss: 0.5\r\nps-num-examples: 32\r\n"
    )
}

pub(crate) fn caller(worker: u32, incarnation: u64) -> String {
    format!("ps-worker: {worker}\r\nps-incarnation: {incarnation}\r\n")
}

impl Client {
    pub(crate) fn new(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        Self {
            stream: BufReader::new(stream),
        }
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) {
        self.stream.get_mut().write_all(bytes).unwrap();
    }

    /// Sends all of a request and does not wait for its answer.
    pub(crate) fn send(&mut self, method: &str, path: &str, headers: &str, body: &[u8]) {
        let len = body.len();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len}\r\n{headers}\r\n"
        );
        self.write(&[head.as_bytes(), body].concat());
    }

    pub(crate) fn receive(&mut self) -> Response {
        let mut line = String::new();
        self.stream.read_line(&mut line).unwrap();
        let status = line.split(' ').nth(1).and_then(|code| code.parse().ok());
        let status = status.unwrap_or_else(|| panic!("{line:?} is no answer"));
        let mut headers = BTreeMap::new();
        loop {
            line.clear();
            self.stream.read_line(&mut line).unwrap();
            let Some((name, value)) = line.split_once(':') else {
                break;
            };
            headers.insert(name.to_lowercase(), value.trim().to_owned());
        }
        // An answer without a length would end with the connection; there is none.
        let len = headers
            .get("content-length")
            .map_or(0, |len| len.parse().unwrap());
        let mut body = vec![0; len];
        self.stream.read_exact(&mut body).unwrap();
        Response {
            status,
            headers,
            body,
        }
    }

    pub(crate) fn get(&mut self, path: &str) -> Response {
        self.send("GET", path, "", &[]);
        self.receive()
    }

    pub(crate) fn post(&mut self, path: &str, headers: &str, body: &[u8]) -> Response {
        self.send("POST", path, headers, body);
        self.receive()
    }

    /// Joins by the request of this number. Incarnations are numbered from 1.
    pub(crate) fn join(&mut self, worker: u32, request: u64) -> Response {
        let headers = format!("ps-worker: {worker}\r\nps-request: {request}\r\n");
        self.post("/v1/join", &headers, &[])
    }

    /// Whether the other side has closed the connection.
    pub(crate) fn is_at_end(&mut self) -> bool {
        self.stream.fill_buf().is_ok_and(<[u8]>::is_empty)
    }
}
