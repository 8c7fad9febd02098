//! Calls to an actor in another process of this machine, beside a bare TCP connection that moves
//! the same bytes: `cargo bench -p ps-actors --bench remote`.
//!
//! Each line is the median of interleaved rounds, and its ratio to the bare connection's. The bare
//! connection writes from and reads into buffers that it keeps, on one thread per process.

use std::error::Error;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::Command;
use std::time::{Duration, Instant};

use actix::{Actor, Context, Handler, Message};
use ps_actors::cluster::{Cluster, ClusterConfig, Hosted, Hosts, Placement, SpawnOn, Transport};
use ps_actors::group::{ServerArgs, ServerGroup};
use ps_actors::ids::{Clock, GradientId, Incarnation, JoinRequest, WorkerId};
use ps_actors::launch::LaunchOptions;
use ps_actors::remote::{Messages, Remote};
use ps_actors::rule::Sgd;
use ps_actors::server::{Consistency, ServerConfig};
use ps_actors::weights::{Gradient, GradientUpdate, Layout, Weights};
use ps_actors::{ActorRef, RestartPolicy, Spawn};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// In the process that is called: answers, and runs the bare TCP server.
struct Peer;

impl Actor for Peer {
    type Context = Context<Self>;
}

impl Remote for Peer {
    fn messages(messages: &mut Messages<Self>) {
        messages
            .add::<Empty>()
            .add::<Echo>()
            .add::<StartBare>()
            .add::<PeakMemory>();
    }
}

impl Hosted for Peer {
    type Args = ();
}

#[derive(Message, Serialize, Deserialize)]
#[rtype(result = "()")]
struct Empty;

impl Handler<Empty> for Peer {
    type Result = ();

    fn handle(&mut self, _: Empty, _: &mut Context<Self>) {}
}

#[derive(Message, Serialize, Deserialize)]
#[rtype(result = "Gradient")]
struct Echo(Gradient);

impl Handler<Echo> for Peer {
    type Result = actix::MessageResult<Echo>;

    fn handle(&mut self, Echo(gradient): Echo, _: &mut Context<Self>) -> Self::Result {
        actix::MessageResult(gradient)
    }
}

/// Starts a bare TCP server that sends `len` bytes back for each `len` that have arrived.
#[derive(Message, Serialize, Deserialize)]
#[rtype(result = "SocketAddr")]
struct StartBare(usize);

impl Handler<StartBare> for Peer {
    type Result = actix::MessageResult<StartBare>;

    fn handle(&mut self, StartBare(len): StartBare, _: &mut Context<Self>) -> Self::Result {
        let (sender, address) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            runtime().block_on(async {
                let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
                sender.send(listener.local_addr().unwrap()).unwrap();
                let (mut stream, _) = listener.accept().await.unwrap();
                stream.set_nodelay(true).unwrap();
                let mut buffer = vec![1; len];
                while stream.read_exact(&mut buffer).await.is_ok() {
                    stream.write_all(&buffer).await.unwrap();
                }
            });
        });
        actix::MessageResult(address.recv().expect("the server starts"))
    }
}

/// The most memory that the process ever had, in bytes.
#[derive(Message, Serialize, Deserialize)]
#[rtype(result = "u64")]
struct PeakMemory;

impl Handler<PeakMemory> for Peer {
    type Result = u64;

    fn handle(&mut self, _: PeakMemory, _: &mut Context<Self>) -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let line = status.lines().find(|line| line.starts_with("VmHWM:"));
        let kib = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
        1024 * kib.unwrap_or(0)
    }
}

fn runtime() -> tokio::runtime::Runtime {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder
        .enable_all()
        .build()
        .expect("the system gives an event loop")
}

fn hosts() -> Hosts {
    Hosts::new().host(|()| Ok(Peer)).host_with(
        Spawn::new().restart(RestartPolicy::NEVER),
        |args: ServerArgs| Ok(args.into_server(Box::new(Sgd::new()))?),
    )
}

/// A bare connection, and the rounds that it was asked for.
struct Bare {
    runtime: tokio::runtime::Runtime,
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Bare {
    fn new(peer: &ActorRef<Peer>, len: usize) -> Result<Self, Box<dyn Error>> {
        let address = peer.ask(StartBare(len)).wait()?;
        let runtime = runtime();
        let stream = runtime.block_on(TcpStream::connect(address))?;
        stream.set_nodelay(true)?;
        Ok(Self {
            runtime,
            stream,
            buffer: vec![1; len],
        })
    }

    fn round(&mut self) {
        let Self {
            runtime,
            stream,
            buffer,
        } = self;
        runtime.block_on(async {
            stream.write_all(buffer).await.expect("the peer is there");
            stream.read_exact(buffer).await.expect("the peer is there");
        });
    }
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

/// Times the subjects in turn, a few rounds each, so that all meet the same weather.
fn compare(num_rounds: usize, subjects: &mut [(&str, &mut dyn FnMut())]) -> Vec<Duration> {
    let mut times = vec![Vec::new(); subjects.len()];
    let at_once = (num_rounds / 20).max(1);
    for turn in 0..num_rounds / at_once + 2 {
        for (index, (_, subject)) in subjects.iter_mut().enumerate() {
            for _ in 0..at_once {
                let start = Instant::now();
                subject();
                // The first rounds fill caches and buffers.
                if turn > 1 {
                    times[index].push(start.elapsed());
                }
            }
        }
    }
    times.into_iter().map(median).collect()
}

fn main() -> Result<(), Box<dyn Error>> {
    // A node is a copy of this program with the same arguments, so each transport has a run of its own.
    for (name, transport) in [("tcp", Transport::Tcp), ("unix", Transport::Sockets)] {
        if !std::env::args().any(|arg| arg == name) {
            continue;
        }
        let config = ClusterConfig {
            transport,
            ..ClusterConfig::default()
        };
        let options = LaunchOptions::processes(3);
        return match Cluster::launch(&options, config, hosts())? {
            Some(cluster) => run(name, &cluster),
            None => Ok(()),
        };
    }
    for name in ["tcp", "unix"] {
        let status = Command::new(std::env::current_exe()?).arg(name).status()?;
        if !status.success() {
            return Err(format!("{name}: {status}").into());
        }
    }
    Ok(())
}

fn run(name: &str, cluster: &Cluster) -> Result<(), Box<dyn Error>> {
    let on_first = || SpawnOn::new().place(Placement::Rank(1));
    let peer = cluster.spawn_with::<Peer>(on_first(), ()).wait()?;
    println!("{name}:");

    // A frame of an empty call has 25 bytes, its reply 24.
    let mut bare = Bare::new(&peer, 25)?;
    let mut in_thread = || bare.round();
    let mut ask = || peer.ask(Empty).wait().expect("the peer answers");
    let caller = runtime();
    let mut awaited = || caller.block_on(peer.ask(Empty)).expect("the peer answers");
    let times = compare(
        3000,
        &mut [
            ("bare", &mut in_thread),
            ("ask, blocking", &mut ask),
            ("ask, awaited", &mut awaited),
        ],
    );
    for (what, time) in ["bare ping-pong", "ask, wait()", "ask, .await"]
        .iter()
        .zip(&times)
    {
        let ratio = time.as_secs_f64() / times[0].as_secs_f64();
        println!(
            "  {what:<30} {:8.1} µs  {ratio:5.2} × bare",
            1e6 * time.as_secs_f64()
        );
    }

    for (len, num_rounds) in [(6_500, 1000), (1_200_000, 60), (25_000_000, 10)] {
        let num_bytes = 4 * len;
        let mut bare = Bare::new(&peer, num_bytes)?;
        let gradient = Gradient::new(vec![1e-3; len]);
        let mut echo = || {
            let echoed = peer.ask(Echo(gradient.clone())).wait();
            assert_eq!(echoed.expect("the peer answers").values().len(), len);
        };
        let server = server(cluster, len, 1)?;
        let mut clock = 0;
        let mut push_pull = || {
            // The first incarnation of a worker.
            let (worker, incarnation) = (WorkerId(0), Incarnation(1));
            let gradients = GradientUpdate {
                id: GradientId {
                    worker,
                    incarnation,
                    clock: Clock(clock),
                },
                computed_on: ps_actors::ids::Version(clock),
                loss: 1.0,
                num_examples: 1,
                gradient: gradient.clone(),
            };
            let pushed = caller.block_on(server.push_pull(gradients));
            assert_eq!(pushed.expect("the server applies it").1.len(), len);
            clock += 1;
        };
        ps_actors::actor::run(server.join(WorkerId(0), JoinRequest(1)))?;
        let times = compare(
            num_rounds,
            &mut [
                ("bare", &mut || bare.round()),
                ("echo", &mut echo),
                ("push_pull", &mut push_pull),
            ],
        );
        println!("  {:.1} MB there and back:", num_bytes as f64 / 1e6);
        for (what, time) in ["bare copy", "ask", "push_pull, with its update"]
            .iter()
            .zip(&times)
        {
            let throughput = 2.0 * num_bytes as f64 / time.as_secs_f64() / 1e9;
            let ratio = times[0].as_secs_f64() / time.as_secs_f64();
            println!(
                "    {what:<28} {:8.3} ms  {throughput:5.2} GB/s  {:3.0} % of bare",
                1e3 * time.as_secs_f64(),
                100.0 * ratio
            );
        }
    }
    memory(cluster)
}

/// Four workers push and pull 100 MB at the same time.
fn memory(cluster: &Cluster) -> Result<(), Box<dyn Error>> {
    let len = 25_000_000;
    let peer = SpawnOn::new().place(Placement::Rank(2));
    let peer = cluster.spawn_with::<Peer>(peer, ()).wait()?;
    let before = peer.ask(PeakMemory).wait()?;
    let server = server(cluster, len, 2)?;
    std::thread::scope(|scope| {
        for worker in 0..4 {
            let server = server.clone();
            scope.spawn(move || {
                let worker = WorkerId(worker);
                let push = async {
                    let joined = server.join(worker, JoinRequest(1)).await?;
                    let incarnation = joined.incarnation;
                    for clock in 0..5 {
                        let id = GradientId {
                            worker,
                            incarnation,
                            clock: Clock(clock),
                        };
                        server
                            .push_pull(GradientUpdate {
                                id,
                                computed_on: ps_actors::ids::Version(0),
                                loss: 1.0,
                                num_examples: 1,
                                gradient: Gradient::new(vec![1e-3; len]),
                            })
                            .await?;
                    }
                    Ok::<(), ps_actors::server::GroupError>(())
                };
                ps_actors::actor::run(push).expect("the server applies it");
            });
        }
    });
    let peak = peer.ask(PeakMemory).wait()? - before;
    let ratio = peak as f64 / (4 * len) as f64;
    println!("  peak memory of a server of 100 MB with four workers: {ratio:.1} × the model");
    Ok(())
}

fn server(cluster: &Cluster, len: usize, rank: u32) -> Result<ServerGroup, Box<dyn Error>> {
    let config = ServerConfig {
        consistency: Consistency::Asp,
        ..ServerConfig::default()
    };
    let initial = Weights::initial(Layout::flat(len), vec![0.0; len]);
    let places = [Placement::Rank(rank)];
    let group = ServerGroup::spawn_on(cluster, places, &initial, config);
    Ok(ps_actors::actor::run(group)?)
}
