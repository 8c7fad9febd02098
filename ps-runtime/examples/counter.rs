//! An actor in this process: an ordinary actix actor, called through a typed reference.
//!
//! ```text
//! cargo run -p ps-runtime --example counter
//! ```
//!
//! It prints `2 and 5`, then the error of a call that fails, and then `restarted, counts from 1`.

use actix::{Actor, Context, Handler, Message};
use ps_runtime::{ActorRef, CallError, Spawn};

struct Counter(u64);

impl Actor for Counter {
    type Context = Context<Self>;
}

/// Adds a number, and answers with the count.
#[derive(Message)]
#[rtype(result = "u64")]
struct Add(u64);

impl Handler<Add> for Counter {
    type Result = u64;

    fn handle(&mut self, Add(number): Add, _: &mut Context<Self>) -> u64 {
        assert!(number > 0, "there is nothing to add");
        self.0 += number;
        self.0
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // The actor has a thread of its own. After a panic the closure makes a new actor, and the reference stays
    // valid.
    let counter: ActorRef<Counter> = Spawn::new().name("counter").start(|| Counter(0))?;
    // Both calls are under way before either is waited for.
    let (first, second) = (counter.ask(Add(2)), counter.ask(Add(3)));
    println!("{} and {}", first.wait()?, second.wait()?);
    match counter.ask(Add(0)).wait() {
        Err(error @ CallError::Failed { .. }) => println!("{error}"),
        other => println!("unexpected: {other:?}"),
    }
    let count = counter.ask(Add(1)).wait()?;
    println!("restarted, counts from {count}");
    Ok(())
}
