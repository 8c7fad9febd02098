//! The example `http_server` as a process: it does not go on when nothing can be learned any more.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Bounds every wait.
const SOON: Duration = Duration::from_secs(120);

/// The server, and a worker that speaks HTTP.
struct World {
    server: Child,
    address: String,
    num_weights: usize,
}

fn example() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let profile = test.parent().and_then(|deps| deps.parent()).unwrap();
    let path = profile.join("examples").join("http_server");
    let hint = "run `cargo build --examples` with the same profile";
    assert!(path.exists(), "{} is missing: {hint}", path.display());
    path
}

impl World {
    fn new(arguments: &[&str]) -> Self {
        let mut server = Command::new(example())
            .args(["--listen", "127.0.0.1:0", "--consistency", "asp"])
            .args(arguments)
            .env("PS_OFFLINE", "1")
            .env_remove("PS_TOKEN")
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(server.stdout.take().unwrap()).lines();
        let mut lines = lines.map(Result::unwrap);
        let line = lines.find(|line| line.contains("http://"));
        let line = line.expect("it says where it listens");
        // What else it says is read, so that it never waits for a reader.
        std::thread::spawn(move || lines.for_each(drop));
        let address = line.split("http://").nth(1).unwrap();
        let address = address.split('/').next().unwrap().to_owned();
        let mut world = Self {
            server,
            address,
            num_weights: 0,
        };
        let joined = world.post("/v1/join", "ps-worker: 0\r\nps-request: 1\r\n", &[]);
        let joined = joined.expect("it lives");
        let header = joined
            .lines()
            .find_map(|line| line.strip_prefix("ps-num-weights: "));
        world.num_weights = header.expect("the answer to a join").parse().unwrap();
        world
    }

    /// Returns the head of the answer; none if the server has ended.
    fn post(&self, path: &str, headers: &str, body: &[u8]) -> Option<String> {
        let mut stream = TcpStream::connect(&self.address).ok()?;
        let len = body.len();
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: ps\r\nconnection: close\r\ncontent-length: {len}\r\n{headers}\r\n"
        );
        stream.write_all(head.as_bytes()).ok()?;
        stream.write_all(body).ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        (!answer.is_empty()).then_some(answer)
    }

    fn push(&self, clock: u64, number: f32) -> Option<String> {
        let headers = format!(
            "ps-worker: 0\r\nps-incarnation: 1\r\nps-clock: {clock}\r\nps-version: 0\r\n\
             ps-loss: 1\r\nps-num-examples: 1\r\n"
        );
        let body = number.to_le_bytes().repeat(self.num_weights);
        self.post("/v1/push", &headers, &body)
    }

    /// Waits for its end, and checks that it says why.
    fn check_end(mut self, why: &str) {
        let deadline = Instant::now() + SOON;
        let status = loop {
            match self.server.try_wait().unwrap() {
                Some(status) => break status,
                None if Instant::now() < deadline => std::thread::yield_now(),
                None => panic!("the server goes on"),
            }
        };
        let mut said = String::new();
        let stderr = self.server.stderr.as_mut().unwrap();
        stderr.read_to_string(&mut said).unwrap();
        assert_eq!(status.code(), Some(1), "{said}");
        assert!(said.contains("training has diverged"), "{said}");
        assert!(said.contains(why), "{said}");
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // Of a test that has failed.
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

/// S-11
#[test]
fn a_server_whose_workers_have_all_gradients_refused_ends_and_says_so() {
    let world = World::new(&[]);
    for clock in 0..=100 {
        let answer = world.push(clock, f32::NAN).expect("not yet");
        assert!(answer.contains("ps-outcome: refused-norm"), "{answer}");
    }
    world.check_end("were refused, and nobody's was applied");
}

#[test]
fn a_run_of_which_every_gradient_was_refused_ends_with_an_error() {
    let world = World::new(&[]);
    world.push(0, f32::INFINITY).expect("it lives");
    let me = "ps-worker: 0\r\nps-incarnation: 1\r\n";
    world.post("/v1/leave", me, &[]);
    world.check_end("all 1 gradients were refused");
}

#[test]
fn a_server_whose_weights_are_not_finite_ends_and_says_so() {
    let world = World::new(&["--learning-rate", "1e30"]);
    let answer = world.push(0, 1e30).expect("it lives");
    assert!(answer.contains("ps-outcome: applied"), "{answer}");
    world.check_end("the weights are not finite");
}
