//! The example `http_server` as a process: it does not go on when nothing can be learned any more.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Bounds every wait.
const SOON: Duration = Duration::from_secs(120);

/// The token of the dashboard.
const TOKEN: &str = "correct-horse-battery";

/// The server, and a worker that speaks HTTP.
struct World {
    server: Child,
    address: String,
    /// Where the dashboard is.
    page: Option<String>,
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
            .env("PS_DASHBOARD_TOKEN", TOKEN)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(server.stdout.take().unwrap()).lines();
        let mut lines = lines.map(Result::unwrap);
        let has_page = arguments.contains(&"--dashboard");
        let (mut page, mut address) = (None, None);
        while address.is_none() || (has_page && page.is_none()) {
            let line = lines.next().expect("it says where it listens");
            if let Some(place) = line.split("http://").nth(1) {
                let place = place.split('/').next().unwrap().to_owned();
                match line.contains("dashboard") {
                    true => page = Some(place),
                    false => address = Some(place),
                }
            }
        }
        let address = address.unwrap();
        // What else it says is read, so that it never waits for a reader.
        std::thread::spawn(move || lines.for_each(drop));
        let mut world = Self {
            server,
            address,
            page,
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

    /// Sends a request to the dashboard. Returns the status and the body of the answer.
    fn ask_page(&self, method: &str, path: &str, body: &str) -> (u16, serde_json::Value) {
        let page = self.page.as_ref().expect("there is a dashboard");
        let mut stream = TcpStream::connect(page).unwrap();
        let len = body.len();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nhost: {page}\r\nconnection: close\r\ncontent-length: {len}\r\n\
             content-type: application/json\r\nx-ps-dashboard: 1\r\nauthorization: Bearer {TOKEN}\r\n\r\n{body}"
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
        let body = answer.split_once("\r\n\r\n").unwrap().1;
        (status, serde_json::from_str(body).unwrap())
    }

    /// Waits until the page shows that something is so.
    fn shows(&self, what: &str, is_so: impl Fn(&serde_json::Value) -> bool) -> serde_json::Value {
        let deadline = Instant::now() + SOON;
        loop {
            let (_, mut answer) = self.ask_page("GET", "/api/state", "");
            let state = answer["state"].take();
            if is_so(&state) {
                return state;
            }
            assert!(Instant::now() < deadline, "{what}: {state:#}");
            // Between two looks: requests without a pause would take a core from the server.
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn push(&self, clock: u64, number: f32) -> Option<String> {
        let headers = format!(
            "ps-worker: 0\r\nps-incarnation: 1\r\nps-clock: {clock}\r\nps-version: 0\r\n\
             ps-loss: 1\r\nps-num-examples: 1\r\n"
        );
        let body = number.to_le_bytes().repeat(self.num_weights);
        self.post("/v1/push", &headers, &body)
    }

    /// Waits for its end. Returns its exit code, and what it said on standard error.
    fn end(mut self) -> (Option<i32>, String) {
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
        (status.code(), said)
    }

    fn check_success(self) {
        let (code, said) = self.end();
        assert_eq!(code, Some(0), "{said}");
        // The closing table.
        assert!(said.contains("worker 0"), "{said}");
    }

    /// Waits for its end, and checks that it says why.
    fn check_end(self, why: &str) {
        let (code, said) = self.end();
        assert_eq!(code, Some(1), "{said}");
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
    for clock in 0..100 {
        let answer = world.push(clock, f32::NAN).expect("not yet");
        assert!(answer.contains("ps-outcome: refused-norm"), "{answer}");
    }
    // With this one, it may end before it answers.
    let _ = world.push(100, f32::NAN);
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

#[test]
fn the_page_shows_workers_of_any_language_and_controls_what_the_servers_decide() {
    let world = World::new(&["--dashboard", "127.0.0.1:0"]);
    for clock in 0..3 {
        let answer = world.push(clock, 1e-3).expect("it lives");
        assert!(answer.contains("ps-outcome: applied"), "{answer}");
    }
    let state = world.shows("three steps", |state| state["num_applied"] == 3);
    let worker = &state["workers"][0];
    assert_eq!(
        (&worker["steps"], &worker["state"]),
        (&3.into(), &"live".into())
    );
    assert!(
        worker["shares"].is_null(),
        "nobody knows how it spends its time"
    );
    // Each gradient was computed on version 0.
    let counts = serde_json::json!([1, 1, 1]);
    assert_eq!(
        (&state["staleness"]["counts"], &state["version"]),
        (&counts, &3.into())
    );
    assert_eq!(
        (&state["loss"], &state["steps_all"]),
        (&1.0.into(), &0.into())
    );
    assert!(state["seconds_left"].is_null());
    world.shows("the servers", |state| state["servers"][0]["version"] == 3);
    let control = &state["control"];
    assert_eq!(control["changes_consistency"], true, "{control}");
    assert_eq!(control["removes_workers"], false, "{control}");

    let (status, answer) = world.ask_page("POST", "/api/remove-worker", r#"{"worker": 0}"#);
    assert_eq!(status, 409, "{answer}");
    assert!(
        answer["error"]
            .as_str()
            .unwrap()
            .contains("which workers there are"),
        "{answer}"
    );
    let (status, answer) =
        world.ask_page("POST", "/api/learning-rate", r#"{"learning_rate": 0.5}"#);
    assert_eq!(status, 200, "{answer}");
    world.shows("the rate", |state| state["learning_rate"] == 0.5);
    // A pause holds the push of the worker.
    let (status, answer) = world.ask_page("POST", "/api/pause", "{}");
    assert_eq!(status, 200, "{answer}");
    std::thread::scope(|scope| {
        let pushed = scope.spawn(|| world.push(3, 1e-3));
        let held = world.shows("it waits", |state| state["num_pending"] == 1);
        assert_eq!(
            (&held["status"], &held["num_applied"]),
            (&"paused".into(), &3.into())
        );
        let (status, answer) = world.ask_page("POST", "/api/resume", "{}");
        assert_eq!(status, 200, "{answer}");
        let answer = pushed.join().unwrap().expect("it lives");
        assert!(answer.contains("ps-outcome: applied"), "{answer}");
    });
    let me = "ps-worker: 0\r\nps-incarnation: 1\r\n";
    world.post("/v1/leave", me, &[]);
    world.check_success();
}

#[test]
fn the_trained_model_is_exported_when_all_workers_have_left() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("model.safetensors");
    let world = World::new(&["--export", file.to_str().unwrap()]);
    let answer = world.push(0, 1e-3).expect("it lives");
    assert!(answer.contains("ps-outcome: applied"), "{answer}");
    let me = "ps-worker: 0\r\nps-incarnation: 1\r\n";
    world.post("/v1/leave", me, &[]);
    world.check_success();
    assert!(file.is_file());
}
