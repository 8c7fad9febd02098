//! An actor for the scenarios, its thread, and the loop over schedules.

use std::env;
use std::fmt::Debug;
use std::future::poll_fn;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Poll;

use actix::dev::{MessageResponse, OneshotSender};
use actix::{Actor, Context, Handler, Message};
use shuttle::scheduler::{PctScheduler, RandomScheduler, Scheduler};
use shuttle::sync::Mutex;
use shuttle::thread::{self, JoinHandle};
use shuttle::{Config, Runner};

use crate::actor::caller_gone::{CallerGone, caller_gone};
use crate::actor::mailbox::{Mailbox, Next, Phase};
use crate::actor::queued::{InFlight, Loss};
use crate::actor::{ActorId, CallError, NotDelivered};

/// How many schedules each scenario runs under, if `PS_SCHEDULES` does not say.
const NUM_SCHEDULES: usize = 20_000;
const SEED: u64 = 20_261_129;
/// How many times a schedule of the second kind changes which thread goes first.
const DEPTH: usize = 4;

/// Runs a scenario under many schedules.
pub(crate) fn under_many_schedules(scenario: fn()) {
    if let Ok(schedule) = env::var("PS_SCHEDULE") {
        return shuttle::replay(scenario, &schedule);
    }
    let seed = number("PS_SCHEDULE_SEED", SEED);
    let half = number("PS_SCHEDULES", NUM_SCHEDULES).div_ceil(2);
    // Shown if the test fails.
    println!("seed {seed}: PS_SCHEDULE_SEED={seed} runs the same schedules");
    // At each step any thread may run, or the one with the highest priority, which changes a few times.
    run(scenario, RandomScheduler::new_from_seed(seed, half));
    run(scenario, PctScheduler::new_from_seed(seed, DEPTH, half));
}

fn run(scenario: fn(), scheduler: impl Scheduler + 'static) {
    let mut config = Config::new();
    config.stack_size = 256 << 10;
    Runner::new(scheduler, config).run(scenario);
}

fn number<T: FromStr<Err: Debug>>(variable: &str, default: T) -> T {
    env::var(variable).map_or(default, |text| text.parse().expect("it is a number"))
}

/// Counts the calls that it has begun.
pub(crate) struct Counter {
    num_begun: Arc<AtomicU64>,
}

impl Actor for Counter {
    type Context = Context<Self>;
}

/// Answered at once, with how many calls have begun.
#[derive(Message)]
#[rtype(result = "u64")]
pub(crate) struct Count;

impl Handler<Count> for Counter {
    type Result = u64;

    fn handle(&mut self, _: Count, _: &mut Context<Self>) -> u64 {
        self.num_begun.fetch_add(1, Ordering::Relaxed) + 1
    }
}

/// Answered by the thread that takes the sender.
#[derive(Message)]
#[rtype(result = "u64")]
pub(crate) struct CountLater(pub(crate) Parking<(OneshotSender<u64>, CallerGone)>);

/// Where one thread leaves something for another.
pub(crate) type Parking<T> = Arc<Mutex<Option<T>>>;

pub(crate) struct Parked(Parking<(OneshotSender<u64>, CallerGone)>, CallerGone);

impl Handler<CountLater> for Counter {
    type Result = Parked;

    fn handle(&mut self, CountLater(parking): CountLater, _: &mut Context<Self>) -> Parked {
        self.num_begun.fetch_add(1, Ordering::Relaxed);
        Parked(parking, caller_gone())
    }
}

impl MessageResponse<Counter, CountLater> for Parked {
    fn handle(self, _: &mut Context<Counter>, sender: Option<OneshotSender<u64>>) {
        let sender = sender.expect("the product always asks for the result");
        *self.0.lock().unwrap() = Some((sender, self.1));
    }
}

/// An actor whose thread takes calls from the product's queue, as `pump` and `supervisor` do.
pub(crate) struct Stage {
    pub(crate) mailbox: Arc<Mailbox<Counter>>,
    num_begun: Arc<AtomicU64>,
    thread: JoinHandle<()>,
}

impl Stage {
    pub(crate) fn new(limit: usize) -> Self {
        let mailbox = Arc::new(Mailbox::new(ActorId::next(), "counter".into(), limit));
        let num_begun = Arc::new(AtomicU64::new(0));
        let (queue, begun) = (Arc::clone(&mailbox), Arc::clone(&num_begun));
        let thread = thread::spawn(move || serve(&queue, begun));
        Self {
            mailbox,
            num_begun,
            thread,
        }
    }

    pub(crate) fn num_begun(&self) -> u64 {
        self.num_begun.load(Ordering::Relaxed)
    }

    /// Ends an actor whose calls are all over, and checks that each of them gave back one slot.
    pub(crate) fn close(self) {
        let (book, limit) = (self.mailbox.book(), self.mailbox.book().limit());
        let stopped = || unreachable!("it takes calls");
        for taken in 0..limit {
            let slot = book.take_slot(Count, stopped);
            assert!(slot.is_ok(), "{taken} of {limit} slots came back");
        }
        match book.take_slot(Count, stopped) {
            Err(CallError::NotDelivered { reason, .. }) => {
                assert_eq!(reason, NotDelivered::QueueFull { limit });
            }
            _ => panic!("a slot was given back twice"),
        }
        self.mailbox.close();
        self.end();
    }

    /// Waits until the actor has ended, and returns how many calls have begun.
    pub(crate) fn end(self) -> u64 {
        self.thread.join().unwrap();
        assert!(self.mailbox.has_ended());
        self.num_begun.load(Ordering::Relaxed)
    }
}

fn serve(mailbox: &Mailbox<Counter>, num_begun: Arc<AtomicU64>) {
    let (mut actor, mut ctx) = (Counter { num_begun }, Context::new());
    let mut waiting: Vec<(u64, InFlight<Counter>)> = Vec::new();
    let mut next_key = 0;
    shuttle::future::block_on(poll_fn(|cx| {
        mailbox.register(cx.waker());
        loop {
            let is_drained = match mailbox.next() {
                Next::Call(call) => {
                    if let Some(response) = call.start(&mut actor, &mut ctx) {
                        mailbox.set_in_flight(next_key);
                        waiting.push((next_key, response));
                        next_key += 1;
                    }
                    continue;
                }
                Next::Nothing => false,
                Next::Drained => true,
            };
            waiting.retain_mut(|(key, response)| match response.as_mut().poll(cx) {
                Poll::Pending => true,
                Poll::Ready(outcome) => {
                    mailbox.remove_in_flight(*key);
                    if let Err(call) = outcome {
                        call.fail(&Loss::NoReply);
                    }
                    false
                }
            });
            let is_over = mailbox.phase() == Phase::Killed || (is_drained && waiting.is_empty());
            return if is_over {
                Poll::Ready(())
            } else {
                Poll::Pending
            };
        }
    }));
    mailbox.finish();
}
