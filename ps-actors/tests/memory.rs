//! PS-8: in one process no copy of weights or gradients is made on the way between actors; and
//! memory does not grow with the number of rounds.
//!
//! A binary of its own, because it counts what the whole process allocates; its tests take turns.

use std::alloc::System;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use ps_actors::actor;
use ps_actors::buffer::BufferPool;
use ps_actors::cluster::{Cluster, ClusterConfig, Hosts};
use ps_actors::group::ServerGroup;
use ps_actors::http;
use ps_actors::ids::{Clock, WorkerId};
use ps_actors::rule::Sgd;
use ps_actors::server::{Consistency, PullVersion, ServerConfig};
use ps_actors::weights::{Gradient, Layout, Weights};
use ps_actors::worker::{DataWorker, GradientSource, LocalGradient, RunSteps, SourceError};
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

static TURN: Mutex<()> = Mutex::new(());

/// A worker whose gradient is the weights themselves, in recycled buffers.
fn worker(id: u32) -> actor::ActorRef<DataWorker<impl GradientSource>> {
    actor::spawn(move || {
        let pool = BufferPool::new(4);
        let source = move |_: Clock, weights: &Weights| -> Result<_, SourceError> {
            let mut buffer = pool.take(weights.len());
            for segment in weights.segments() {
                buffer[segment.range()].copy_from_slice(segment.data());
            }
            let gradient = Gradient::new(buffer);
            Ok(LocalGradient {
                gradient,
                loss: 0.0,
                num_examples: 1,
            })
        };
        DataWorker::new(WorkerId(id), source)
    })
}

fn servers(num_weights: usize, num_servers: usize, consistency: Consistency) -> ServerGroup {
    let initial = Weights::initial(Layout::flat(num_weights), vec![0.5; num_weights]);
    let config = ServerConfig {
        consistency,
        ..ServerConfig::default()
    };
    ServerGroup::spawn(&initial, num_servers, config, |_| Box::new(Sgd::new())).unwrap()
}

/// Lets two workers take steps, twice: to warm up, and to be measured from the moment on at which
/// `between` is called.
fn run_twice<T>(
    servers: &ServerGroup,
    [warm_up, measured]: [u64; 2],
    between: impl FnOnce() -> T,
) -> T {
    let workers = [worker(0), worker(1)];
    let run = |num_steps| {
        let run = || RunSteps {
            servers: servers.clone(),
            num_steps,
        };
        for reply in workers.each_ref().map(|worker| worker.ask(run())) {
            reply.wait().unwrap().unwrap();
        }
    };
    run(warm_up);
    let result = between();
    run(measured);
    result
}

#[test]
fn a_steady_run_allocates_nothing_of_the_size_of_the_model() {
    // Larger buffers have pages of their own, which the allocator knows nothing of.
    const LEN: usize = 3 << 18;
    const STEPS: u64 = 50;
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    for consistency in [Consistency::Bsp, Consistency::Asp] {
        for num_servers in [1, 2] {
            let servers = servers(LEN, num_servers, consistency);
            let before = run_twice(&servers, [STEPS, STEPS], || {
                ALLOCATOR.stats().bytes_allocated
            });
            let allocated = ALLOCATOR.stats().bytes_allocated - before;
            // 100 gradients and 100 snapshots of 4 MiB went back and forth: 800 MiB.
            assert!(
                allocated < LEN * size_of::<f32>(),
                "{consistency}, {num_servers} servers: {allocated} bytes"
            );
            let last = actor::run(async move { servers.pull(PullVersion::Latest).await.unwrap() });
            assert!(last.version().0 >= 2 * STEPS);
        }
    }
}

#[test]
fn memory_does_not_grow_over_ten_thousand_rounds() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let live_bytes = || {
        let stats = ALLOCATOR.stats();
        stats.bytes_allocated as isize - stats.bytes_deallocated as isize
    };
    let servers = servers(500, 2, Consistency::Bsp);
    // The ledgers fill up to their bound first.
    let before = run_twice(&servers, [2_000, 10_000], live_bytes);
    let grown = live_bytes() - before;
    // A leak of one small allocation per gradient would be more.
    assert!(
        grown < 256 << 10,
        "{grown} bytes more, {} per round",
        grown / 10_000
    );
}

/// A gradient that comes over HTTP is received into a recycled buffer, and a snapshot is sent from
/// where it is.
#[test]
fn a_steady_run_of_http_workers_allocates_no_models() {
    const LEN: usize = 1 << 20;
    const NUM_BYTES: usize = LEN * size_of::<f32>();
    const STEPS: u64 = 20;
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    for num_servers in [1, 2] {
        let routes = http::routes(servers(LEN, num_servers, Consistency::Asp));
        let (config, any) = (ClusterConfig::default(), (Ipv4Addr::LOCALHOST, 0).into());
        let cluster = Cluster::listen_with(config, any, Hosts::new(), routes).unwrap();
        let stream = TcpStream::connect(cluster.address().unwrap()).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        let mut stream = BufReader::new(stream);
        let mut body = vec![0; NUM_BYTES];
        let who = "ps-worker: 0\r\nps-request: 0\r\nps-incarnation: 1\r\n";
        let mut exchange = |head: String, sent: usize, received: usize| {
            stream.get_mut().write_all(head.as_bytes()).unwrap();
            stream.get_mut().write_all(&body[..sent]).unwrap();
            let mut line = String::new();
            stream.read_line(&mut line).unwrap();
            assert!(line.contains("200"), "{line}");
            while line != "\r\n" {
                line.clear();
                stream.read_line(&mut line).unwrap();
            }
            stream.read_exact(&mut body[..received]).unwrap();
        };
        let join = "POST /v1/join HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n";
        exchange(format!("{join}{who}\r\n"), 0, 0);
        let mut push = |clock| {
            let head = format!(
                "POST /v1/push-pull HTTP/1.1\r\nhost: x\r\ncontent-length: {NUM_BYTES}\r\n{who}\
                 ps-clock: {clock}\r\nps-version: {clock}\r\nps-loss: 1\r\n\
                 ps-num-examples: 1\r\n\r\n"
            );
            exchange(head, NUM_BYTES, NUM_BYTES);
        };
        (0..STEPS).for_each(&mut push);
        let before = ALLOCATOR.stats().bytes_allocated;
        (STEPS..2 * STEPS).for_each(&mut push);
        let allocated = ALLOCATOR.stats().bytes_allocated - before;
        // 20 gradients and 20 snapshots of 4 MiB went back and forth. hyper takes a new read buffer
        // of 400 KB whenever the last one is not free yet.
        assert!(
            allocated < STEPS as usize * NUM_BYTES / 2,
            "{num_servers} servers: {allocated} bytes"
        );
    }
}
