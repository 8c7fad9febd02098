//! A training as OpenTelemetry traces, sent to a collector that is a few lines here.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use ps::otel::OpenTelemetry;
use ps::prelude::*;
use serde_json::Value;

/// Takes requests, and answers them with this status.
struct Collector {
    address: SocketAddr,
    must_end: Arc<AtomicBool>,
    running: JoinHandle<Vec<Value>>,
}

impl Collector {
    fn start(status: &'static str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let must_end = Arc::new(AtomicBool::new(false));
        let ends = Arc::clone(&must_end);
        let running = std::thread::spawn(move || {
            let mut requests = Vec::new();
            for stream in listener.incoming() {
                if ends.load(Ordering::SeqCst) {
                    break;
                }
                let mut stream = BufReader::new(stream.unwrap());
                let (mut head, mut length) = (Vec::new(), 0);
                loop {
                    let mut line = String::new();
                    assert!(stream.read_line(&mut line).unwrap() > 0, "{head:?}");
                    let line = line.trim_end().to_ascii_lowercase();
                    if line.is_empty() {
                        break;
                    }
                    if let Some(text) = line.strip_prefix("content-length: ") {
                        length = text.parse().unwrap();
                    }
                    head.push(line);
                }
                assert_eq!(head[0], "post /base/v1/traces http/1.1");
                assert!(head.contains(&"content-type: application/json".to_owned()));
                let mut body = vec![0; length];
                stream.read_exact(&mut body).unwrap();
                requests.push(serde_json::from_slice(&body).unwrap());
                let answer = format!("HTTP/1.1 {status}\r\ncontent-length: 2\r\n\r\n{{}}");
                stream.get_mut().write_all(answer.as_bytes()).unwrap();
            }
            requests
        });
        Self {
            address,
            must_end,
            running,
        }
    }

    fn observer(&self) -> OpenTelemetry {
        let url = format!("http://{}/base", self.address);
        OpenTelemetry::new(url.parse().unwrap())
    }

    fn end(self) -> Vec<Value> {
        self.must_end.store(true, Ordering::SeqCst);
        drop(std::net::TcpStream::connect(self.address).unwrap());
        self.running.join().unwrap()
    }
}

fn train(observer: OpenTelemetry) -> Report {
    let device = select_device(default_device_name()).unwrap();
    let mnist = Mnist::bundled_sample();
    Trainer::new(ConvNet::init(1, &device), mnist.train)
        .device(&device)
        .test_data(mnist.test)
        .workers(2)
        .servers(2)
        .batch_size(8)
        .iterations(20)
        .heed_signals(false)
        .observe(observer)
        .run()
        .unwrap()
}

#[test]
fn each_step_is_a_trace_with_its_parts() {
    let collector = Collector::start("200 OK");
    train(collector.observer());
    let requests = collector.end();
    let scopes = requests
        .iter()
        .map(|request| &request["resourceSpans"][0]["scopeSpans"][0]);
    let spans: Vec<&Value> = scopes
        .flat_map(|scope| scope["spans"].as_array().unwrap())
        .collect();
    let named = |name: &str| {
        spans
            .iter()
            .filter(|span| span["name"] == name)
            .copied()
            .collect::<Vec<_>>()
    };
    let mut ids = BTreeSet::new();
    assert!(
        spans
            .iter()
            .all(|span| ids.insert(span["spanId"].as_str().unwrap()))
    );
    let roots: BTreeMap<&str, &Value> = named("step")
        .into_iter()
        .map(|step| (step["spanId"].as_str().unwrap(), step))
        .collect();
    assert_eq!(roots.len(), 2 * 20);
    let nanos = |span: &Value, key: &str| span[key].as_str().unwrap().parse::<u64>().unwrap();
    for name in ["batch", "compute", "send", "servers", "receive"] {
        let parts = named(name);
        assert_eq!(parts.len(), 2 * 20, "{name}");
        for part in parts {
            let root = roots[part["parentSpanId"].as_str().unwrap()];
            assert_eq!(part["traceId"], root["traceId"]);
            let (from, to) = (
                nanos(part, "startTimeUnixNano"),
                nanos(part, "endTimeUnixNano"),
            );
            assert!(from <= to, "{part}");
            // Each time is rounded to a nanosecond.
            assert!(
                from + 5 >= nanos(root, "startTimeUnixNano"),
                "{part} {root}"
            );
            assert!(to <= nanos(root, "endTimeUnixNano") + 5, "{part} {root}");
        }
    }
    // The second server's.
    let parts = named("part");
    let of: BTreeSet<&str> = parts
        .iter()
        .map(|part| part["parentSpanId"].as_str().unwrap())
        .collect();
    assert_eq!((parts.len(), of), (2 * 20, roots.keys().copied().collect()));
    assert_eq!((named("training").len(), named("evaluation").len()), (1, 1));
}

#[test]
fn a_collector_that_refuses_or_is_not_there_ends_no_training() {
    let collector = Collector::start("503 Service Unavailable");
    let began = Instant::now();
    let report = train(collector.observer());
    assert_eq!(report.num_applied, 40);
    // It is asked again after 10 s.
    let most = 1 + began.elapsed().as_secs() as usize / 10;
    let num_requests = collector.end().len();
    assert!((1..=most).contains(&num_requests), "{num_requests}");
    // Nobody listens on port 1.
    let observer = OpenTelemetry::new("http://127.0.0.1:1".parse().unwrap());
    assert_eq!(train(observer).num_applied, 40);
}
