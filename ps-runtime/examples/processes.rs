//! An actor in another process, called as if it were in this one.
//!
//! ```text
//! cargo run -p ps-runtime --example processes
//! ```
//!
//! The program starts a second copy of itself. It prints two different process ids and `2 and 5`. With
//! `world_size` and `rank` instead of `processes`, the two copies run on two machines; see `LaunchOptions`.

use actix::{Actor, Context, Handler, Message};
use ps_runtime::cluster::{Cluster, ClusterConfig, Hosted, Hosts};
use ps_runtime::launch::LaunchOptions;
use ps_runtime::remote::{Messages, Remote};
use serde::{Deserialize, Serialize};

struct Counter(u64);

impl Actor for Counter {
    type Context = Context<Self>;
}

/// Adds a number, and answers with the count and the process that it is in.
#[derive(Message, Serialize, Deserialize)]
#[rtype(result = "(u64, u32)")]
struct Add(u64);

impl Handler<Add> for Counter {
    type Result = actix::MessageResult<Add>;

    fn handle(&mut self, Add(number): Add, _: &mut Context<Self>) -> Self::Result {
        self.0 += number;
        actix::MessageResult((self.0, std::process::id()))
    }
}

/// Lists the messages that may come from other processes.
impl Remote for Counter {
    fn messages(messages: &mut Messages<Self>) {
        messages.add::<Add>();
    }
}

/// The arguments from which each process makes an actor of this type.
impl Hosted for Counter {
    type Args = u64;
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let hosts = Hosts::new().host(|count| Ok(Counter(count)));
    let options = LaunchOptions {
        processes: Some(2),
        ..LaunchOptions::default()
    };
    // The driver gets the cluster. The other process makes actors for it, and returns when it is released.
    let Some(cluster) = Cluster::launch(&options, ClusterConfig::default(), hosts)? else {
        return Ok(());
    };
    let counter = cluster.spawn::<Counter>(0).wait()?;
    let (first, second) = (counter.ask(Add(2)), counter.ask(Add(3)));
    let ((first, there), (second, _)) = (first.wait()?, second.wait()?);
    println!(
        "process {} asked process {there}: {first} and {second}",
        std::process::id()
    );
    Ok(())
}
