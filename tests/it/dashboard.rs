//! The page of a training over plain HTTP: events arrive, controls do what they say, strangers are refused.

use std::cell::RefCell;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ps::actors::net::Token;
use ps::controls::Controls;
use ps::dashboard::{Dashboard, DashboardConfig};
use ps::observe::{Change, Event};
use ps::prelude::*;
use serde_json::{Value, json};

use crate::gate::{Gate, Gated};

const TOKEN: &str = "correct-horse-battery";
const PATIENCE: Duration = Duration::from_secs(60);

type Training = Trainer<ConvNet, Gated<ImageDataset>>;

/// A training with a dashboard. It waits after a few steps, until the test opens the gate: the page is served only
/// while the training runs.
struct Shown {
    address: SocketAddr,
    controls: Controls,
    gate: Gate,
    events: Receiver<Event>,
    /// The events that were looked at.
    seen: RefCell<Vec<Event>>,
    running: Option<JoinHandle<Result<Report, TrainError>>>,
}

fn trainer(iterations: u64, gate: &Gate) -> Training {
    let device = select_device(default_device_name()).unwrap();
    let Mnist { train, .. } = Mnist::bundled_sample();
    Trainer::new(ConvNet::init(3, &device), Gated::new(train, gate))
        .device(&device)
        .workers(2)
        .batch_size(8)
        .iterations(iterations)
        .heed_signals(false)
}

fn begin(token: Option<&str>, make: impl FnOnce(&Gate) -> Training + Send + 'static) -> Shown {
    begin_with(token, DashboardConfig::default(), make)
}

fn begin_with(
    token: Option<&str>,
    config: DashboardConfig,
    make: impl FnOnce(&Gate) -> Training + Send + 'static,
) -> Shown {
    let controls = Controls::new();
    let ((ready, address), (tell, events)) = (channel(), channel());
    let config = DashboardConfig {
        address: "127.0.0.1:0".parse().unwrap(),
        token: token.map(|token| Token::new(token).unwrap()),
        on_ready: Arc::new(move |address| ready.send(address).unwrap()),
        ..config
    };
    let dashboard = Dashboard::new(config, &controls).unwrap();
    let listened = controls.clone();
    let tell: Sender<Event> = tell;
    let gate = Gate::new();
    let closed = gate.clone();
    let running = std::thread::spawn(move || {
        let told = move |event: &Event| _ = tell.send(event.clone());
        make(&closed)
            .observe(dashboard)
            .observe(told)
            .controls(&listened)
            .run()
    });
    Shown {
        address: address.recv_timeout(PATIENCE).expect("the page is served"),
        controls,
        gate,
        events,
        seen: RefCell::default(),
        running: Some(running),
    }
}

/// An answer to a request.
#[derive(Debug)]
struct Answer {
    status: u16,
    head: String,
    body: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

impl Shown {
    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// Sends a request with exactly these headers.
    fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Answer {
        let mut stream = self.connect();
        let mut text = format!("{method} {path} HTTP/1.1\r\nconnection: close\r\n");
        for (name, value) in headers {
            text += &format!("{name}: {value}\r\n");
        }
        let length = body.len();
        text += &format!("content-length: {length}\r\n\r\n{body}");
        stream.write_all(text.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Answer {
            status,
            head: head.to_ascii_lowercase(),
            body: body.to_owned(),
        }
    }

    fn get(&self, path: &str) -> Answer {
        self.send("GET", path, &[("host", &self.address.to_string())], "")
    }

    fn state(&self) -> Value {
        self.get("/api/state").json()["state"].take()
    }

    /// Sends a change, as our own page does.
    fn post(&self, path: &str, body: &Value) -> Answer {
        let host = self.address.to_string();
        let origin = format!("http://{host}");
        let token = format!("Bearer {TOKEN}");
        let headers = [
            ("host", host.as_str()),
            ("origin", &origin),
            ("sec-fetch-site", "same-origin"),
            ("content-type", "application/json"),
            ("x-ps-dashboard", "1"),
            ("authorization", &token),
        ];
        self.send("POST", path, &headers, &body.to_string())
    }

    fn done(&self, path: &str, body: &Value) {
        let answer = self.post(path, body);
        assert_eq!(answer.status, 200, "{path}: {answer:?}");
        assert!(answer.json()["done"].is_string());
    }

    /// Waits until something is so.
    fn eventually(&self, what: &str, is_so: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let state = self.state();
            if is_so(&state) {
                return state;
            }
            assert!(Instant::now() < deadline, "{what}: {state:#}");
            // Between two looks: requests without a pause would take a core from the training that is looked at.
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Lets the training take all its steps.
    fn go_on(&self) {
        self.gate.let_pass(usize::MAX);
    }

    /// Waits for the next event that is so.
    fn wait_for<T>(&self, what: &str, is_so: impl Fn(&Event) -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let event = self.events.recv_timeout(left).expect(what);
            let found = is_so(&event);
            self.seen.borrow_mut().push(event);
            if let Some(found) = found {
                return found;
            }
        }
    }

    /// Waits for a look at the servers that has begun after a pause. Returns their version.
    fn look_at_paused(&self) -> u64 {
        self.wait_for("it is paused", |event| match event {
            Event::Controlled(controlled) => (controlled.change == Change::Paused).then_some(()),
            _ => None,
        });
        // This one may have begun before.
        self.look();
        self.look()
    }

    /// Waits for the next look at the servers. Returns their version.
    fn look(&self) -> u64 {
        self.wait_for("the servers are looked at", |event| match event {
            Event::ServersSeen(seen) => Some(seen.servers[0].version.0),
            _ => None,
        })
    }

    fn end(mut self) -> (Report, Vec<Event>) {
        self.go_on();
        let report = self.running.take().unwrap().join().unwrap().unwrap();
        let mut events = self.seen.take();
        events.extend(self.events.iter());
        (report, events)
    }
}

/// Reads server-sent events.
struct Stream(BufReader<TcpStream>);

impl Stream {
    fn open(training: &Shown, last_id: Option<&str>) -> Self {
        let mut stream = training.connect();
        let id = last_id.map_or(String::new(), |id| format!("last-event-id: {id}\r\n"));
        let host = training.address;
        write!(
            stream,
            "GET /api/events HTTP/1.1\r\nhost: {host}\r\n{id}\r\n"
        )
        .unwrap();
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        while line != "\r\n" {
            line.clear();
            assert!(
                reader.read_line(&mut line).unwrap() > 0,
                "the head has an end"
            );
        }
        Self(reader)
    }

    /// Returns the next event's id and data. `None` at the end.
    fn next(&mut self) -> Option<(String, Value)> {
        let (mut id, mut line) = (String::new(), String::new());
        loop {
            line.clear();
            if self.0.read_line(&mut line).unwrap() == 0 {
                return None;
            }
            if let Some(rest) = line.strip_prefix("id: ") {
                id = rest.trim().to_owned();
            }
            if let Some(data) = line.strip_prefix("data: ") {
                return Some((id, serde_json::from_str(data.trim()).unwrap()));
            }
        }
    }
}

fn num_points(data: &Value) -> usize {
    data["curves"]["loss"]["points"].as_array().unwrap().len()
}

#[test]
fn events_arrive_until_the_end_and_go_on_where_a_client_was_cut_off() {
    let training = begin(Some(TOKEN), |gate| trainer(300, gate));
    while training.look() < 20 {}
    // A worker that waits for a batch does not tell of its steps. One that waits for the answer to a push does.
    training.done("/api/pause", &json!({}));
    training.gate.let_pass(30);
    let mut stream = Stream::open(&training, None);
    let (mut id, mut seen) = (String::new(), 0);
    while seen < 20 {
        let (next, data) = stream.next().expect("it goes on");
        if data["curves"]["loss"]["replaces"] == true {
            seen = 0;
        }
        seen += num_points(&data);
        id = next;
    }
    drop(stream);
    // The training goes on until no more batches pass. So there is more that the client does not know.
    training.done("/api/resume", &json!({}));
    while training.look() < 50 {}
    training.done("/api/pause", &json!({}));
    training.go_on();
    let version = training.look_at_paused();
    // Each update has a step of each worker.
    let all = training.eventually("all steps are known", |state| {
        state["steps_done"] == 2 * version
    });
    // The curve gets a step 0.6 s later. While it is paused, the looks at the servers tell the time.
    let known = all["seconds"].as_f64().unwrap();
    training.eventually("all steps are in their places", |state| {
        state["seconds"].as_f64().unwrap() > known + 1.0
    });
    // Now the curve stands still: the client gets what is new, and not what it has.
    let whole = num_points(&training.get("/api/state").json());
    let mut again = Stream::open(&training, Some(&id));
    let (_, data) = again.next().unwrap();
    let curve = &data["curves"]["loss"];
    if curve["replaces"] == false {
        assert_eq!(num_points(&data), whole - seen, "{seen} of {whole}");
    } else {
        assert!(
            whole < 600 && num_points(&data) == whole,
            "it was thinned meanwhile"
        );
    }
    // A client of another run gets everything.
    let (_, data) = Stream::open(&training, Some("other-0.3-0.0-0.0"))
        .next()
        .unwrap();
    assert_eq!(
        (num_points(&data), &data["curves"]["loss"]["replaces"]),
        (whole, &json!(true))
    );
    training.done("/api/resume", &json!({}));
    let mut last = Value::Null;
    while let Some((_, data)) = again.next() {
        last = data;
    }
    assert_eq!(last["state"]["status"], "ended", "{last:#}");
    assert_eq!(last["state"]["steps_done"], 600);
    let (report, _) = training.end();
    assert_eq!(report.num_applied, 600);
}

#[test]
fn a_pause_really_pauses_in_every_mode_and_changes_no_bit_of_a_synchronous_run() {
    let plain = trainer(300, &Gate::open()).run().unwrap();
    for mode in ["bsp", "asp", "ssp:2", "k-of-n:1"] {
        let training = begin(Some(TOKEN), move |gate| {
            trainer(300, gate)
                .servers(2)
                .consistency(mode.parse().unwrap())
        });
        training.done("/api/pause", &json!({}));
        assert!(training.controls.is_paused());
        training.eventually("paused", |state| state["status"] == "paused");
        // Nothing but the pause holds it now.
        training.go_on();
        let version = training.look_at_paused();
        assert_eq!(training.look(), version, "{mode}");
        training.eventually("the page shows it", |state| {
            state["servers"][0]["version"] == version
        });
        training.done("/api/resume", &json!({}));
        let (report, events) = training.end();
        if mode != "k-of-n:1" {
            assert_eq!(report.num_applied, 600, "{mode}");
        }
        if mode == "bsp" {
            assert_eq!(report.weights.to_vec(), plain.weights.to_vec());
        }
        let changes = events.iter().filter_map(|event| match event {
            Event::Controlled(controlled) => Some(&controlled.change),
            _ => None,
        });
        assert_eq!(
            changes.collect::<Vec<_>>(),
            [&Change::Paused, &Change::Resumed],
            "{mode}"
        );
    }
}

#[test]
fn learning_rate_and_mode_change_for_all_servers_and_a_recorded_run_replays_to_the_bit() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("schedule");
    let schedule = file.clone();
    let training = begin(Some(TOKEN), move |gate| {
        trainer(300, gate).servers(3).record(schedule)
    });
    training.done("/api/pause", &json!({}));
    training.done("/api/learning-rate", &json!({"learning_rate": 0.05}));
    training.done("/api/consistency", &json!({"consistency": "asp"}));
    let bad = training.post("/api/learning-rate", &json!({"learning_rate": -1.0}));
    assert_eq!(bad.status, 409, "{bad:?}");
    assert!(bad.body.contains("learning rate"), "{bad:?}");
    for body in [
        json!({"consistency": "often"}),
        json!({"consistency": "k-of-n:9"}),
        json!({}),
        json!(3),
    ] {
        assert_eq!(
            training.post("/api/consistency", &body).status,
            400,
            "{body}"
        );
    }
    training.eventually("changed", |state| {
        state["learning_rate"] == 0.05 && state["consistency"] == "asp"
    });
    training.done("/api/resume", &json!({}));
    let (report, _) = training.end();
    assert_eq!(report.consistency, Consistency::Asp);
    assert_eq!(report.num_applied, 600);
    let replay = trainer(300, &Gate::open()).replay(&file).unwrap();
    assert_eq!(replay.weights.to_vec(), report.weights.to_vec());
}

#[test]
fn a_checkpoint_is_saved_when_it_is_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let directory = folder.path().to_owned();
    let training = begin(Some(TOKEN), move |gate| {
        let config = CheckpointConfig {
            every: 0,
            ..CheckpointConfig::new(directory)
        };
        trainer(200, gate).servers(2).checkpoints(config)
    });
    training.done("/api/pause", &json!({}));
    training.done("/api/checkpoint", &json!({}));
    let state = training.eventually("saved", |state| state["num_checkpoints"] == 1);
    let version = state["checkpoints"][0]["version"].as_u64().unwrap();
    // The same version again is not saved again.
    training.done("/api/checkpoint", &json!({}));
    training.done("/api/resume", &json!({}));
    let (report, _) = training.end();
    let saved = report.checkpoints.unwrap();
    assert_eq!(
        saved.num_saved,
        if version == report.num_updates { 1 } else { 2 }
    );
    assert_eq!(saved.num_failed, 0);
}

#[test]
fn without_a_directory_no_checkpoint_is_promised() {
    let training = begin(Some(TOKEN), |gate| trainer(300, gate));
    training.done("/api/pause", &json!({}));
    let answer = training.post("/api/checkpoint", &json!({}));
    assert_eq!(answer.status, 409);
    assert!(answer.body.contains("--checkpoint-dir"), "{answer:?}");
    training.done("/api/resume", &json!({}));
    training.end();
}

#[test]
fn a_worker_that_is_removed_leaves_and_the_others_go_on() {
    for mode in ["bsp", "asp"] {
        let training = begin(Some(TOKEN), move |gate| {
            trainer(1000, gate)
                .workers(3)
                .consistency(mode.parse().unwrap())
        });
        training.done("/api/remove-worker", &json!({"worker": 1}));
        // It takes its last step, with the others. None of them takes all steps before the page has shown it.
        training.gate.let_pass(20);
        training.eventually("removed", |state| state["workers"][1]["state"] == "removed");
        assert_eq!(
            training
                .post("/api/remove-worker", &json!({"worker": 1}))
                .status,
            400
        );
        assert_eq!(
            training
                .post("/api/remove-worker", &json!({"worker": 7}))
                .status,
            400
        );
        let (report, events) = training.end();
        let steps: Vec<usize> = report.losses.iter().map(Vec::len).collect();
        assert_eq!((steps[0], steps[2]), (1000, 1000), "{mode}");
        assert!(steps[1] < 1000, "{mode}: {steps:?}");
        assert_eq!(report.removed_workers, [WorkerId(1)], "{mode}");
        let text = report.to_string();
        assert!(text.contains("Removed while it ran: worker 1\n"), "{text}");
        let ended = events.iter().find_map(|event| match event {
            Event::RunEnded(ended) => ended.report.as_ref(),
            _ => None,
        });
        assert_eq!(ended.unwrap().removed_workers, [WorkerId(1)], "{mode}");
        assert_eq!(
            report.num_applied,
            steps.iter().sum::<usize>() as u64,
            "{mode}"
        );
        assert!(
            !events
                .iter()
                .any(|event| matches!(event, Event::WorkerLost(_)))
        );
    }
}

/// Also a training that is paused: its workers finish their step.
#[test]
fn a_training_that_is_told_to_end_finishes_its_steps() {
    for mode in ["bsp", "asp"] {
        let training = begin(Some(TOKEN), move |gate| {
            trainer(1_000_000, gate).consistency(mode.parse().unwrap())
        });
        training.done("/api/pause", &json!({}));
        training.done("/api/end", &json!({}));
        let (report, events) = training.end();
        assert!(report.ended_by_controls, "{mode}");
        assert_eq!((report.interrupted, report.stopped_early), (None, None));
        let steps: usize = report.losses.iter().map(Vec::len).sum();
        assert_eq!(report.num_applied, steps as u64, "{mode}");
        let text = report.to_string();
        assert!(text.contains("Ended as asked after "), "{text}");
        let changes: Vec<_> = events
            .iter()
            .filter_map(|event| match event {
                Event::Controlled(controlled) => Some(&controlled.change),
                _ => None,
            })
            .collect();
        let expected = [Change::Paused, Change::EndAsked, Change::Resumed];
        assert_eq!(changes, expected.each_ref(), "{mode}");
    }
}

#[test]
fn the_last_worker_cannot_be_removed() {
    let training = begin(Some(TOKEN), |gate| trainer(200, gate));
    training.done("/api/pause", &json!({}));
    training.done("/api/remove-worker", &json!({"worker": 0}));
    let answer = training.post("/api/remove-worker", &json!({"worker": 1}));
    assert_eq!(answer.status, 409, "{answer:?}");
    assert!(answer.body.contains("last one"), "{answer:?}");
    training.done("/api/resume", &json!({}));
    let (report, _) = training.end();
    assert_eq!(report.losses[1].len(), 200);
}

#[test]
fn strangers_and_pages_of_other_sites_are_refused() {
    let training = begin(Some(TOKEN), |gate| trainer(400, gate));
    training.done("/api/pause", &json!({}));
    let host = training.address.to_string();
    let origin = format!("http://{host}");
    let good: [(&str, &str); 6] = [
        ("host", &host),
        ("origin", &origin),
        ("sec-fetch-site", "same-origin"),
        ("content-type", "application/json"),
        ("x-ps-dashboard", "1"),
        ("authorization", "Bearer correct-horse-battery"),
    ];
    for (name, value, expected) in [
        ("host", "evil.example", 421),
        ("origin", "http://evil.example", 403),
        ("sec-fetch-site", "cross-site", 403),
        ("content-type", "text/plain", 415),
        ("x-ps-dashboard", "no", 403),
        ("authorization", "Bearer correct-horse-batterz", 401),
    ] {
        let headers: Vec<_> = good
            .iter()
            .map(|&(other, kept)| (other, if other == name { value } else { kept }))
            .collect();
        let answer = training.send("POST", "/api/resume", &headers, "{}");
        assert_eq!(answer.status, expected, "{name}: {answer:?}");
        assert!(!answer.head.contains("access-control-"), "{answer:?}");
    }
    // Nobody may ask whether a page of another site may send it.
    let preflight = training.send(
        "OPTIONS",
        "/api/resume",
        &[("host", &host), ("origin", "http://evil.example")],
        "",
    );
    assert_eq!(preflight.status, 405);
    // A site that lets its name point to this address reads nothing.
    for path in ["/", "/api/state", "/api/events"] {
        assert_eq!(
            training
                .send("GET", path, &[("host", "evil.example:80")], "")
                .status,
            421,
            "{path}"
        );
    }
    assert_eq!(
        training.state()["status"],
        "paused",
        "none of them had an effect"
    );
    let large = "1".repeat(10_000);
    assert_eq!(
        training
            .post("/api/learning-rate", &json!({ "learning_rate": large }))
            .status,
        400
    );
    let page = training.get("/");
    assert_eq!(page.status, 200);
    assert!(
        page.head
            .contains("content-security-policy: default-src 'none'"),
        "{}",
        page.head
    );
    assert_eq!(training.get("/nothing").status, 404);
    training.done("/api/resume", &json!({}));
    training.end();
}

#[test]
fn without_a_token_the_page_only_shows() {
    let training = begin(None, |gate| trainer(300, gate));
    let answer = training.post("/api/pause", &json!({}));
    assert_eq!(answer.status, 403);
    assert!(answer.body.contains("read-only"), "{answer:?}");
    assert_eq!(training.state()["control"]["is_allowed"], false);
    training.end();
}

#[test]
fn metrics_are_there_beside_the_page_if_somebody_counts_them() {
    let training = begin(None, |gate| trainer(300, gate));
    let answer = training.get("/metrics");
    assert_eq!(answer.status, 404);
    assert!(answer.body.contains("counts no metrics"), "{answer:?}");
    training.end();

    let exporter = ps::metrics::Exporter::new();
    let (counting, text) = (exporter.observer(), exporter.clone());
    let config = DashboardConfig {
        metrics: Some(Arc::new(move || text.render())),
        ..DashboardConfig::default()
    };
    let training = begin_with(Some(TOKEN), config, move |gate| {
        trainer(300, gate).observe(counting)
    });
    training.done("/api/pause", &json!({}));
    training.eventually("paused", |state| state["status"] == "paused");
    // The exporter's thread may be behind that of the page.
    let deadline = Instant::now() + PATIENCE;
    let answer = loop {
        let answer = training.get("/metrics");
        assert_eq!(answer.status, 200);
        if answer.body.contains("\nps_running 1\n") {
            break answer;
        }
        assert!(Instant::now() < deadline, "{}", answer.body);
        std::thread::yield_now();
    };
    let kind = "content-type: text/plain; version=0.0.4; charset=utf-8";
    assert!(answer.head.contains(kind), "{}", answer.head);
    let strange = [("host", "evil.example")];
    assert_eq!(training.send("GET", "/metrics", &strange, "").status, 421);
    training.done("/api/resume", &json!({}));
    training.end();
}

/// Whether the server has closed the connection.
fn is_closed(stream: &TcpStream) -> bool {
    stream.set_nonblocking(true).unwrap();
    match (&*stream).read(&mut [0]) {
        Ok(num_bytes) => num_bytes == 0,
        Err(error) => error.kind() != std::io::ErrorKind::WouldBlock,
    }
}

#[test]
fn clients_that_read_nothing_do_not_hold_up_a_training() {
    let mut training = begin(None, |gate| trainer(200, gate));
    let streams: Vec<_> = (0..40)
        .map(|_| {
            let mut stream = training.connect();
            write!(
                stream,
                "GET /api/events HTTP/1.1\r\nhost: {}\r\n\r\n",
                training.address
            )
            .unwrap();
            stream
        })
        .collect();
    let answers = streams.iter().map(|stream| {
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).unwrap();
        line
    });
    let num_refused = answers.filter(|line| line.contains("503")).count();
    assert_eq!(num_refused, 40 - 32);
    // More than may be served, and each of them is silent. The last ones are closed at once, and the first ones are
    // kept: a limit of the time would close the first ones first.
    let silent: Vec<_> = (0..200).map(|_| training.connect()).collect();
    let deadline = Instant::now() + PATIENCE;
    while !is_closed(&silent[199]) {
        assert!(Instant::now() < deadline, "all of them are served");
        std::thread::yield_now();
    }
    assert!(!is_closed(&silent[0]), "none of them is served");
    training.gate.let_pass(usize::MAX);
    let mut events = training.events.iter();
    assert!(events.any(|event| matches!(event, Event::RunEnded(_))));
    let ended = Instant::now();
    let running = training.running.take().unwrap();
    assert_eq!(running.join().unwrap().unwrap().num_applied, 400);
    // They may take 10 s for a request, and 20 s for a part of the stream. The end waits for neither.
    assert!(ended.elapsed() < Duration::from_secs(8), "{ended:?}");
    drop((silent, streams));
}
