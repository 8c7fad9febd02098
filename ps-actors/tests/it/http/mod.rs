//! Workers that speak HTTP only: what a Rust worker can rely on, they can rely on.

mod client;
mod refused;
mod waiting;

use ps_actors::actor::{self, ActorRef};
use ps_actors::group::ServerGroup;
use ps_actors::ids::{Clock, WorkerId};
use ps_actors::rule::{Sgd, UpdateRule};
use ps_actors::server::{Consistency, PullVersion, ServerConfig};
use ps_actors::weights::{Gradient, Layout, Weights};
use ps_actors::worker::{DataWorker, GradientSource, LocalGradient, RunSteps, SourceError};

use client::{LEN, Settings, World, bits, bytes, caller, initial, stamp};

/// The weights are what the last gradient was: shows each of its bits.
#[derive(Debug)]
struct Assign;

impl UpdateRule for Assign {
    fn update(&mut self, weights: &mut [f32], gradient: &[f32], _: f64) {
        weights.copy_from_slice(gradient);
    }
}

fn asp() -> ServerConfig {
    ServerConfig {
        consistency: Consistency::Asp,
        ..ServerConfig::default()
    }
}

#[test]
fn a_worker_joins_pulls_pushes_and_leaves() {
    for num_servers in [1, 3] {
        let world = World::with_rule(
            Settings {
                num_servers,
                server: asp(),
                ..Settings::default()
            },
            |_| Box::new(Assign),
        );
        let client = &mut world.client();
        let joined = client.join(7, 2).expect(200);
        assert_eq!(joined.header("ps-incarnation"), "1");
        assert_eq!(joined.header("ps-clock"), "0");
        assert_eq!(joined.header("ps-version"), "0");
        assert_eq!(joined.header("ps-num-weights"), "10");

        let layout = client.get("/v1/layout").expect(200);
        assert_eq!(layout.header("content-type"), "application/json");
        let expected = r#"{"num_weights":10,"num_trainable":10,"parameters":[{"name":"fc.weight","shape":[2,4],"start":0,"len":8},{"name":"fc.\"bias\"","shape":[2],"start":8,"len":2}]}"#;
        assert_eq!(layout.text().trim(), expected);

        let pulled = client.get("/v1/weights").expect(200);
        assert_eq!(pulled.header("ps-version"), "0");
        assert_eq!(pulled.header("content-length"), "40");
        assert_eq!(bits(&pulled.numbers()), bits(&initial()));

        let gradient: Vec<f32> = initial().iter().map(|w| -w).rev().collect();
        let pushed = client.post("/v1/push", &stamp(7, 1, 0, 0), &bytes(&gradient));
        let pushed = pushed.expect(200);
        assert_eq!(pushed.header("ps-outcome"), "applied");
        assert_eq!(pushed.header("ps-version"), "1");
        assert_eq!(pushed.header("ps-staleness"), "0");
        let pulled = client.get("/v1/weights?version=exactly:1").expect(200);
        assert_eq!(bits(&pulled.numbers()), bits(&gradient));

        let small = vec![f32::MIN_POSITIVE / 2.0; LEN];
        let pushed = client.post("/v1/push-pull", &stamp(7, 1, 1, 1), &bytes(&small));
        let pushed = pushed.expect(200);
        assert_eq!(pushed.header("ps-outcome"), "applied");
        assert_eq!(pushed.header("ps-version"), "2");
        assert_eq!(bits(&pushed.numbers()), bits(&small));

        client.post("/v1/heartbeat", &caller(7, 1), &[]).expect(200);
        let status = client.get("/v1/status").expect(200).text();
        for part in [
            r#""version":2"#,
            r#""num_weights":10"#,
            r#""consistency":"asp""#,
            r#""worker":7,"is_member":true,"next_clock":2,"num_applied":2"#,
            &format!(r#""num_servers":{num_servers}"#),
        ] {
            assert!(status.contains(part), "{part} in {status}");
        }
        client.post("/v1/leave", &caller(7, 1), &[]).expect(200);
        assert!(world.status().contains(r#""is_member":false"#));
    }
}

/// PS-2, for a client that does not know whether its push arrived.
#[test]
fn a_push_that_is_repeated_is_applied_once() {
    let world = World::new(Settings {
        server: asp(),
        ..Settings::default()
    });
    world.client().join(0, 0).expect(200);
    let body = bytes(&[1.0; LEN]);
    for _ in 0..3 {
        // On a connection of its own, as after one was lost.
        let pushed = world.client().post("/v1/push", &stamp(0, 1, 0, 0), &body);
        assert_eq!(pushed.expect(200).header("ps-version"), "1");
    }
    let status = world.status();
    assert!(status.contains(r#""version":1"#), "{status}");
    assert!(status.contains(r#""num_applied":1"#), "{status}");
    assert!(status.contains(r#""num_duplicates":2"#), "{status}");
}

/// The same while the first still waits for its round: it was sent, and the client hung up.
#[test]
fn a_push_whose_sender_hung_up_is_in_its_round_once() {
    let world = World::new(Settings::default());
    let (mut first, mut second) = (world.client(), world.client());
    first.join(0, 0).expect(200);
    second.join(1, 0).expect(200);
    let body = bytes(&[1.0; LEN]);
    first.send("POST", "/v1/push", &stamp(0, 1, 0, 0), &body);
    let is_pending = || world.status().contains(r#""num_pending":1"#);
    let started = std::time::Instant::now();
    while !is_pending() {
        assert!(started.elapsed() < client::SOON);
        std::thread::yield_now();
    }
    drop(first);
    let mut again = world.client();
    again.send("POST", "/v1/push-pull", &stamp(0, 1, 0, 0), &body);
    let other = second.post("/v1/push", &stamp(1, 1, 0, 0), &bytes(&[3.0; LEN]));
    assert_eq!(other.expect(200).header("ps-version"), "1");
    let pushed = again.receive().expect(200);
    assert_eq!(pushed.header("ps-outcome"), "applied");
    assert_eq!(pushed.header("ps-version"), "1");
    // The mean of the two, once, at the learning rate of 0.01.
    let expected: Vec<f32> = initial().iter().map(|w| w - 0.01 * 2.0).collect();
    assert_eq!(pushed.numbers(), expected);
}

/// What worker `worker` computes at step `clock`: towards a target of its own.
fn gradient(worker: u32, clock: u64, weights: &[f32]) -> Vec<f32> {
    let target = |i: usize| (worker as f32 + 1.0) * (i as f32).sin() + (clock % 7) as f32;
    weights
        .iter()
        .enumerate()
        .map(|(i, w)| w - target(i))
        .collect()
}

fn rust_worker(id: u32) -> ActorRef<DataWorker<impl GradientSource>> {
    actor::spawn(move || {
        let source = move |clock: Clock, weights: &Weights| -> Result<_, SourceError> {
            Ok(LocalGradient {
                gradient: Gradient::new(gradient(id, clock.0, &weights.to_vec())),
                loss: 0.5,
                num_examples: 32,
            })
        };
        DataWorker::new(WorkerId(id), source)
    })
}

/// PS-3: whoever computes the gradients, and over however many servers, the bits are the same.
#[test]
fn a_rust_worker_and_an_http_worker_train_together() {
    const STEPS: u64 = 20;
    let config = ServerConfig {
        wait_for_workers: 2,
        learning_rate: 0.1,
        ..ServerConfig::default()
    };
    let weights: Vec<f32> = (0..LEN).map(|i| i as f32 / 7.0).collect();
    let group = |num_servers| {
        let weights = Weights::initial(Layout::flat(LEN), weights.clone());
        let rule = |_| -> Box<dyn UpdateRule> { Box::new(Sgd::with_momentum(0.9)) };
        ServerGroup::spawn(&weights, num_servers, config, rule).unwrap()
    };
    let run = |servers: &ServerGroup| RunSteps {
        servers: servers.clone(),
        num_steps: STEPS,
    };

    let servers = group(1);
    let workers = [rust_worker(0), rust_worker(1)];
    let runs = workers.each_ref().map(|worker| worker.ask(run(&servers)));
    for run in runs {
        assert_eq!(run.wait().unwrap().unwrap().num_applied, STEPS);
    }
    let expected = pull(&servers);

    for num_servers in [1, 2] {
        let servers = group(num_servers);
        let world = World::new(Settings::default());
        world.api.open(servers.clone());
        let rust = rust_worker(0);
        let rust = rust.ask(run(&servers));
        let client = &mut world.client();
        client.join(1, 0).expect(200);
        let mut current = client.get("/v1/weights").expect(200);
        for clock in 0..STEPS {
            let version: u64 = current.header("ps-version").parse().unwrap();
            let body = bytes(&gradient(1, clock, &current.numbers()));
            current = client.post("/v1/push-pull", &stamp(1, 1, clock, version), &body);
            assert_eq!(current.header("ps-outcome"), "applied");
            assert_eq!(current.header("ps-staleness"), "0");
        }
        assert_eq!(rust.wait().unwrap().unwrap().num_applied, STEPS);
        assert_eq!(bits(&current.numbers()), bits(&expected));
        assert_eq!(bits(&pull(&servers)), bits(&expected));
    }
}

fn pull(servers: &ServerGroup) -> Vec<f32> {
    let servers = servers.clone();
    actor::run(async move { servers.pull(PullVersion::Latest).await.unwrap() }).to_vec()
}
