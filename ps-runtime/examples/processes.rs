//! An actor in another process, called as if it were in this one: `cargo run -p ps-runtime --example processes`.
//! The program starts a second copy of itself. With `world_size` and `rank` in [`LaunchOptions`], the two copies run on
//! two machines.

use actix::{Actor, Context, Handler, Message};
use ps_runtime::cluster::{Cluster, ClusterConfig, Hosted, Hosts};
use ps_runtime::launch::LaunchOptions;
use ps_runtime::remote::{Messages, Remote};
use serde::{Deserialize, Serialize};

struct Counter(u64);

impl Actor for Counter {
    type Context = Context<Self>;
}

#[derive(Message, Serialize, Deserialize)]
#[rtype(u64)]
struct Add(u64);

impl Handler<Add> for Counter {
    type Result = u64;

    fn handle(&mut self, Add(number): Add, _: &mut Context<Self>) -> u64 {
        println!("process {} adds {number}", std::process::id());
        self.0 += number;
        self.0
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
    let options = LaunchOptions::processes(2);
    // The driver gets the cluster. The other process makes actors for it, and returns when it is released.
    if let Some(cluster) = Cluster::launch(&options, ClusterConfig::default(), hosts)? {
        let counter = cluster.spawn::<Counter>(0).wait()?;
        let (first, second) = (counter.ask(Add(2)), counter.ask(Add(3)));
        println!(
            "process {}: {} and {}",
            std::process::id(),
            first.wait()?,
            second.wait()?
        );
    }
    Ok(())
}
