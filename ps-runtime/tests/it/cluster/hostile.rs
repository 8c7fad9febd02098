//! strangers and broken peers connect to a real listener, which serves another client meanwhile.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::time::Duration;

use ps_runtime::ActorRef;
use ps_runtime::cluster::{ClusterConfig, Placement, SpawnOn, Transport};
use ps_runtime::net::{NetConfig, Token};

use super::world::{Add, Ask, Counter, SOON, World};
use crate::actor::probe::eventually;

const MAX_CONNECTIONS: usize = 64;

/// 256 MiB.
const MAX_NUMBERS: u64 = 1 << 26;

const TOKEN: &str = "a-token-for-the-hostile-tests";

/// A driver with an actor that is attacked, and a node with an actor that is a client of it.
struct Server {
    world: World,
    here: ActorRef<Counter>,
    client: ActorRef<Counter>,
}

impl Server {
    fn new() -> Self {
        Self::with(NetConfig {
            heartbeat: Duration::from_millis(200),
            process_lease: Duration::from_secs(2),
            handshake: Duration::from_secs(1),
            max_numbers: MAX_NUMBERS,
            max_connections: MAX_CONNECTIONS,
            ..NetConfig::default()
        })
    }

    fn with(net: NetConfig) -> Self {
        let config = ClusterConfig {
            token: Some(Token::new(TOKEN).unwrap()),
            transport: Transport::Tcp,
            net,
            join_timeout: SOON,
            ..ClusterConfig::default()
        };
        let world = World::new(config, 1);
        let spawn = |rank| {
            let options = SpawnOn::new().place(Placement::Rank(rank));
            world
                .cluster
                .spawn_with::<Counter>(options, 0)
                .wait()
                .unwrap()
        };
        let (here, client) = (spawn(0), spawn(1));
        let server = Self {
            here,
            client,
            world,
        };
        server.assert_serves_its_client();
        server
    }

    /// The client calls through the listener.
    fn assert_serves_its_client(&self) {
        let ask = self.client.ask(Ask(self.here.clone(), Add(1)));
        ask.wait_timeout(SOON).unwrap().unwrap();
    }

    fn connect(&self, bytes: &[u8]) -> TcpStream {
        connect(&self.world.driver(), bytes)
    }

    /// Connects as a process that wants to join, with all that is asked of one.
    fn upgraded(&self) -> TcpStream {
        let mut stream = self.connect(self.knock().as_bytes());
        let answer = head_of(&mut stream);
        assert!(answer.starts_with("HTTP/1.1 101 "), "{answer}");
        stream
    }

    /// The beginning of an honest connection, taken from one.
    fn knock(&self) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        // It gives up at once, because nobody answers.
        let config = ClusterConfig {
            join_timeout: Duration::from_millis(1),
            ..self.world.config.clone()
        };
        let hosts = super::world::hosts();
        let _node = ps_runtime::cluster::Node::new(config, 2, 0, address, hosts).serve();
        // The first connection only looks at the way.
        let heads = listener
            .incoming()
            .map(|stream| head_of(&mut stream.unwrap()));
        let mut heads = heads.filter(|head| !head.is_empty());
        heads.next().expect("the listener goes on")
    }
}

fn connect(address: &str, bytes: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    // The other side may close the connection before everything is written.
    let _ = stream.write_all(bytes);
    stream
}

/// Reads up to the first empty line, or the end.
pub(super) fn head_of(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).is_ok_and(|len| len == 1) {
        head.push(byte[0]);
    }
    String::from_utf8_lossy(&head).into_owned()
}

/// The status that a request gets.
pub(super) fn status_of(address: &str, request: &[u8]) -> String {
    let answer = head_of(&mut connect(address, request));
    answer.split(' ').nth(1).unwrap_or("none").to_owned()
}

/// Waits until the other side has closed the connection.
fn assert_closes(mut stream: TcpStream, what: &str) {
    let mut bytes = [0; 4096];
    loop {
        match stream.read(&mut bytes) {
            Ok(0) => return,
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return,
            Err(error) => panic!("{what}: the connection stays open ({error})"),
        }
    }
}

/// Memory in use, in MiB.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1));
    kib.unwrap().parse::<u64>().unwrap() >> 10
}

///
#[test]
fn only_who_knows_the_token_the_build_and_the_run_gets_in() {
    let server = Server::new();
    let knock = server.knock();
    let line = |name: &str| {
        let mut lines = knock.lines();
        let line = lines.find(|line| line.starts_with(name));
        line.expect("each connection says it").to_owned() + "\r\n"
    };
    let status = |replaced: &str, by: &str| {
        let request = knock.replace(replaced, by);
        status_of(&server.world.driver(), request.as_bytes())
    };
    let (token, schema) = (line("authorization"), line("ps-schema"));
    let (session, upgrade) = (line("ps-session"), line("upgrade"));
    assert_eq!(status("", ""), "101");
    assert_eq!(status(&token, ""), "401");
    assert_eq!(status(TOKEN, "a-token-for-the-hostile-testt"), "401");
    assert_eq!(status(TOKEN, ""), "401");
    assert_eq!(status("Bearer", "Basic"), "401");
    assert_eq!(status(&schema, ""), "409");
    assert_eq!(status(&schema, "ps-schema: 0123456789abcdef\r\n"), "409");
    assert_eq!(status(&session, "ps-session: 0123456789abcdef\r\n"), "410");
    assert_eq!(status(&upgrade, "upgrade: h2c\r\n"), "426");
    assert_eq!(status("/actors/0", "/actors/12345"), "410");
    assert_eq!(status("/actors/0", "/actors/-1"), "400");
    assert_eq!(status("/ps/v1/actors/0", "/"), "404");
    server.assert_serves_its_client();
}

/// A frame's fixed part.
fn head(kind: u8, num_buffers: u16, header_len: u32) -> Vec<u8> {
    let mut head = vec![kind, 0xa7];
    head.extend(num_buffers.to_le_bytes());
    head.extend(header_len.to_le_bytes());
    head.extend([1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    head
}

#[test]
fn a_peer_that_breaks_the_protocol_or_falls_silent_is_cut_off() {
    const ASK: u8 = 1;
    const REPLY: u8 = 4;
    let server = Server::new();
    let giant = [head(ASK, 1, 0), u64::MAX.to_le_bytes().to_vec()].concat();
    let too_many = [head(ASK, 1, 0), (MAX_NUMBERS + 1).to_le_bytes().to_vec()].concat();
    let cases = [
        ("a giant length", giant),
        ("one number too many", too_many),
        ("a giant header", head(ASK, 0, u32::MAX)),
        ("too many buffers", head(ASK, u16::MAX, 0)),
        ("no frame", vec![0xff; 4096]),
        (
            "HTTP again",
            b"GET /healthz HTTP/1.1\r\nhost: ps\r\n\r\n".to_vec(),
        ),
        ("a reply that nobody waits for", head(REPLY, 0, 0)),
        ("two calls of one number", head(ASK, 0, 0).repeat(2)),
        ("half a frame, then silence", head(ASK, 0, 0)[..11].to_vec()),
        ("a header that does not come", head(ASK, 0, 1000)),
        ("silence", Vec::new()),
    ];
    let streams = cases.map(|(what, bytes)| {
        let mut stream = server.upgraded();
        stream.write_all(&bytes).unwrap();
        server.assert_serves_its_client();
        (what, stream)
    });
    for (what, stream) in streams {
        assert_closes(stream, what);
    }
    // What is sound but makes no sense is answered, and the connection goes on.
    let mut stream = server.upgraded();
    for (call, garbage) in [(1, 0), (2, 3), (3, 1000)] {
        let mut frame = head(ASK, 0, garbage);
        frame[8] = call;
        frame.extend(vec![0xff; garbage as usize]);
        stream.write_all(&frame).unwrap();
        let mut reply = [0; 24];
        while reply[0] != REPLY {
            stream.read_exact(&mut reply).unwrap();
        }
        let len = u32::from_le_bytes([reply[4], reply[5], reply[6], reply[7]]);
        stream.read_exact(&mut vec![0; len as usize]).unwrap();
    }
    server.assert_serves_its_client();
}

#[test]
fn a_peer_that_does_not_speak_http_is_cut_off() {
    let server = Server::new();
    let giant = format!("GET / HTTP/1.1\r\nx: {}\r\n\r\n", "x".repeat(4 << 20));
    let many = format!("GET / HTTP/1.1\r\n{}\r\n", "x: y\r\n".repeat(10_000));
    let cases: [(_, &[u8]); 8] = [
        ("silence", b""),
        ("half a request", b"GET /ps/v1/act"),
        ("garbage", &[0xff; 4096]),
        ("zeros", &[0; 4096]),
        ("TLS", &[0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3]),
        ("a giant HTTP header", giant.as_bytes()),
        ("many HTTP headers", many.as_bytes()),
        (
            "a body that does not come",
            b"POST /healthz HTTP/1.1\r\nhost: ps\r\ncontent-length: 1000\r\n\r\n",
        ),
    ];
    let streams = cases.map(|(what, bytes)| (what, server.connect(bytes)));
    server.assert_serves_its_client();
    for (what, stream) in streams {
        assert_closes(stream, what);
    }
    server.assert_serves_its_client();
}

/// Otherwise a stranger could keep a connection with a request from time to time, and others need it.
#[test]
fn who_has_no_token_is_answered_once() {
    let server = Server::new();
    for (path, expected) in [("healthz", "200"), ("v1/status", "401")] {
        let request = format!("GET /{path} HTTP/1.1\r\nhost: ps\r\n\r\n");
        let mut stream = server.connect(request.repeat(3).as_bytes());
        let mut answers = String::new();
        // The other two are thrown away, which can show as a reset.
        let _ = stream.read_to_string(&mut answers);
        assert_eq!(answers.matches("HTTP/1.1").count(), 1, "{answers}");
        assert!(
            answers.starts_with(&format!("HTTP/1.1 {expected} ")),
            "{answers}"
        );
        assert!(answers.contains("connection: close"), "{answers}");
    }
    server.assert_serves_its_client();
}

#[test]
fn announced_numbers_take_no_memory_before_they_come() {
    let server = Server::new();
    let before = resident();
    let announced = [head(1, 1, 0), MAX_NUMBERS.to_le_bytes().to_vec()].concat();
    let streams: Vec<_> = (0..20)
        .map(|_| {
            let mut stream = server.upgraded();
            stream.write_all(&announced).unwrap();
            stream
        })
        .collect();
    server.assert_serves_its_client();
    let taken = resident().saturating_sub(before);
    // 5 GiB are announced; other tests run at the same time.
    assert!(taken < 500, "{taken} MiB");
    for stream in streams {
        assert_closes(stream, "numbers that do not come");
    }
    server.assert_serves_its_client();
}

#[test]
fn a_thousand_connections_leave_room_for_those_who_are_in() {
    let server = Server::new();
    let before = resident();
    let streams: Vec<_> = (0..1000).map(|_| server.connect(b"")).collect();
    server.assert_serves_its_client();
    let taken = resident().saturating_sub(before);
    assert!(taken < 500, "{taken} MiB");
    for stream in streams {
        assert_closes(stream, "one of a thousand");
    }
    let driver = server.world.driver();
    let probe = b"GET /healthz HTTP/1.1\r\nhost: ps\r\n\r\n";
    eventually("there is room again", || status_of(&driver, probe) == "200");
    server.assert_serves_its_client();
}

/// The driver is in a process of its own, which may have few open files. The strangers are in this one.
#[test]
fn silent_strangers_leave_file_descriptors_to_the_process() {
    const CHILD: &str = "PS_TEST_STRANGERS";
    const NAME: &str = "cluster::hostile::silent_strangers_leave_file_descriptors_to_the_process";
    const ADDRESS: &str = "the driver listens at ";
    const MAX_FILES: usize = 256;
    if std::env::var_os(CHILD).is_some() {
        let server = Server::with(NetConfig {
            process_lease: SOON,
            // Longer than the test: no stranger leaves by itself.
            handshake: SOON * 10,
            ..NetConfig::default()
        });
        println!("{ADDRESS}{}", server.world.driver());
        std::io::stdin().read_line(&mut String::new()).unwrap();
        // The process works as before, although the strangers are still there.
        let open = || std::fs::File::open("/dev/null");
        let files: Vec<_> = (0..80).map(|_| open().unwrap()).collect();
        server.assert_serves_its_client();
        drop(files);
        let _another = server.world.node(2, 0).serve();
        let both = server.world.cluster.wait_for_nodes(2, SOON);
        both.wait().unwrap();
        return;
    }
    // A shell sets the limit.
    let script = format!("ulimit -n {MAX_FILES} && exec \"$0\" --exact \"$1\" --nocapture");
    let mut shell = Command::new("sh");
    let program = std::env::current_exe().unwrap();
    let shell = shell.args(["-c", &script]).arg(program).arg(NAME);
    let shell = shell.env(CHILD, "1").stdin(Stdio::piped());
    let mut driver = shell.stdout(Stdio::piped()).spawn().unwrap();
    // It is read to its end, because the driver goes on to write.
    let mut said = BufReader::new(driver.stdout.take().unwrap()).lines();
    let mut lines = said.by_ref().map(|line| line.unwrap());
    let address = lines.find_map(|line| Some(line.split_once(ADDRESS)?.1.to_owned()));
    let address = address.expect("the driver listens");
    let strangers: Vec<_> = (0..MAX_FILES + 44)
        .map(|_| connect(&address, b""))
        .collect();
    let is_closed = |mut stranger: &TcpStream| match stranger.read(&mut [0]) {
        Ok(len) => len == 0,
        Err(error) => error.kind() == ErrorKind::ConnectionReset,
    };
    for stranger in &strangers {
        stranger.set_nonblocking(true).unwrap();
    }
    let num_open = || strangers.iter().filter(|one| !is_closed(one)).count();
    eventually("all but a quarter are closed", || {
        num_open() <= MAX_FILES / 4
    });
    assert!(num_open() > MAX_FILES / 8, "some have their time");
    writeln!(driver.stdin.take().unwrap()).unwrap();
    let rest: Vec<_> = lines.collect();
    assert!(driver.wait().unwrap().success(), "{rest:?}");
}
