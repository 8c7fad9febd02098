//! Compares `ask` with actix's own `Addr::send`. Caller and actor each have a thread.
//!
//! Run it with `cargo bench -p ps-runtime`. Both actors run the same handler, and both callers use the same
//! event loop. Target: a round trip takes at most 1.3 times as long as actix's, with 1 and with 64 calls in
//! flight.

use std::time::Instant;

use actix::{Actor, Addr, Arbiter, Context, Handler, Message};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use futures_util::stream::{FuturesUnordered, StreamExt};
use ps_runtime::{ActorRef, spawn};

struct Counter(u64);

impl Actor for Counter {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        // actix's own bound would make 64 senders wait for 16 places.
        ctx.set_mailbox_capacity(1024);
    }
}

#[derive(Message)]
#[rtype(result = "u64")]
struct Add(u64);

impl Handler<Add> for Counter {
    type Result = u64;

    fn handle(&mut self, Add(amount): Add, _: &mut Context<Self>) -> u64 {
        self.0 += amount;
        self.0
    }
}

async fn one_at_a_time<F, R, E>(calls: u64, call: impl Fn() -> F)
where
    F: Future<Output = Result<R, E>>,
    E: std::fmt::Debug,
{
    for _ in 0..calls {
        call().await.expect("the actor lives");
    }
}

async fn in_flight<F, R, E>(window: u64, calls: u64, call: impl Fn() -> F)
where
    F: Future<Output = Result<R, E>>,
    E: std::fmt::Debug,
{
    let mut replies: FuturesUnordered<F> = (0..window.min(calls)).map(|_| call()).collect();
    for sent in window.min(calls).. {
        let Some(reply) = replies.next().await else {
            break;
        };
        reply.expect("the actor lives");
        if sent < calls {
            replies.push(call());
        }
    }
}

fn bench(criterion: &mut Criterion) {
    let system = actix::System::new();
    let (actix, ours): (Addr<Counter>, ActorRef<Counter>) = system.block_on(async {
        let arbiter = Arbiter::new().handle();
        let actix = Counter::start_in_arbiter(&arbiter, |_| Counter(0));
        (actix, spawn(|| Counter(0)))
    });

    let mut group = criterion.benchmark_group("round_trip");
    group.throughput(Throughput::Elements(1));
    group.bench_function("one_at_a_time/actix_send", |bencher| {
        bencher.iter_custom(|calls| {
            let start = Instant::now();
            system.block_on(one_at_a_time(calls, || actix.send(Add(1))));
            start.elapsed()
        });
    });
    group.bench_function("one_at_a_time/ask", |bencher| {
        bencher.iter_custom(|calls| {
            let start = Instant::now();
            system.block_on(one_at_a_time(calls, || ours.ask(Add(1))));
            start.elapsed()
        });
    });
    group.bench_function("64_in_flight/actix_send", |bencher| {
        bencher.iter_custom(|calls| {
            let start = Instant::now();
            system.block_on(in_flight(64, calls, || actix.send(Add(1))));
            start.elapsed()
        });
    });
    group.bench_function("64_in_flight/ask", |bencher| {
        bencher.iter_custom(|calls| {
            let start = Instant::now();
            system.block_on(in_flight(64, calls, || ours.ask(Add(1))));
            start.elapsed()
        });
    });
    group.bench_function("one_at_a_time/ask_and_blocking_wait", |bencher| {
        bencher.iter_custom(|calls| {
            let start = Instant::now();
            for _ in 0..calls {
                ours.ask(Add(1)).wait().expect("the actor lives");
            }
            start.elapsed()
        });
    });
    group.finish();
}

criterion_group!(benches, bench);
criterion_main!(benches);
