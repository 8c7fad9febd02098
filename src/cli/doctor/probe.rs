//! The actor that the driver starts in every process.

use std::fs::File;
use std::io;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use actix::{Actor, Context, Handler, Message, MessageResult, ResponseFuture};
use ps_actors::ActorRef;
use ps_actors::actor::error_chain;
use ps_actors::cluster::{Cluster, Hosted, Placement};
use ps_actors::remote::{Messages, Remote};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::Findings;

/// For each call.
const LIMIT: Duration = Duration::from_secs(2);
/// Certificates and log lines of machines that differ by more are of no use.
const CLOCK_TOLERANCE: f64 = 1.0;
/// With more processes, each calls only the next.
const MANY: usize = 16;

pub(super) struct Probe;

impl Actor for Probe {
    type Context = Context<Self>;
}

impl Remote for Probe {
    fn messages(messages: &mut Messages<Self>) {
        messages.add::<Look>().add::<Call>();
    }
}

impl Hosted for Probe {
    type Args = ();
}

/// Returns what is to be compared: the program's hash, and the seconds since 1970.
#[derive(Clone, Message, Serialize, Deserialize)]
#[rtype(result = "(String, f64)")]
pub(super) struct Look;

/// Calls another probe, and returns what went wrong.
#[derive(Clone, Message, Serialize, Deserialize)]
#[rtype(result = "Result<(), String>")]
pub(super) struct Call(ActorRef<Probe>);

impl Handler<Look> for Probe {
    type Result = MessageResult<Look>;

    fn handle(&mut self, _: Look, _: &mut Context<Self>) -> Self::Result {
        MessageResult((program(), now()))
    }
}

impl Handler<Call> for Probe {
    type Result = ResponseFuture<Result<(), String>>;

    fn handle(&mut self, Call(other): Call, _: &mut Context<Self>) -> Self::Result {
        Box::pin(async move {
            let answer = other.ask_within(Look, LIMIT).await;
            answer.map(drop).map_err(|error| error_chain(&error))
        })
    }
}

fn program() -> String {
    let hash = || -> io::Result<String> {
        let mut hasher = Sha256::new();
        let mut file = File::open(std::env::current_exe()?)?;
        io::copy(&mut file, &mut HashWriter(&mut hasher))?;
        let digest = hasher.finalize();
        Ok(digest
            .iter()
            .take(6)
            .map(|byte| format!("{byte:02x}"))
            .collect())
    };
    hash().unwrap_or_else(|error| format!("unknown: {error}"))
}

struct HashWriter<'a>(&'a mut Sha256);

impl io::Write for HashWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn now() -> f64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.unwrap_or_default().as_secs_f64()
}

/// Looks at every process from inside, and lets them call each other.
pub(super) fn look_at_all(cluster: &Cluster, world_size: u32, findings: &mut Findings) {
    let nodes = cluster.nodes();
    let mut probes = Vec::new();
    let own = program();
    for rank in 0..world_size {
        let node = nodes.iter().find(|node| node.node.rank == rank);
        if rank > 0 && node.is_none() {
            findings.bad(&format!(
                "rank {rank} has not joined: it is not started, or it cannot reach this process; its own lines say why"
            ));
            continue;
        }
        let place = Placement::Rank(rank);
        match cluster.spawn_with::<Probe>(place.into(), ()).wait() {
            Ok(probe) => probes.push((rank, probe)),
            Err(error) => findings.bad(&format!(
                "rank {rank} has joined, but this process cannot call it: {}",
                error_chain(&error)
            )),
        }
        if let (Some(node), Some((_, probe))) = (node, probes.last()) {
            compare(rank, &node.host, probe, &own, findings);
        }
    }
    call_each_other(&probes, findings);
}

fn compare(rank: u32, host: &str, probe: &ActorRef<Probe>, own: &str, findings: &mut Findings) {
    let asked = now();
    let (program, clock) = match probe.ask(Look).wait_timeout(LIMIT) {
        Ok(answer) => answer,
        Err(error) => {
            findings.bad(&format!(
                "rank {rank} on {host} does not answer: {}",
                error_chain(&error)
            ));
            return;
        }
    };
    // Its clock was read between the two readings here.
    let ahead = (clock - now()).max(0.0) - (asked - clock).max(0.0);
    if program != own {
        findings.bad(&format!(
            "rank {rank} on {host} runs another build of the program ({program} there, {own} here): copy the same file \
             to all machines"
        ));
    } else if ahead.abs() > CLOCK_TOLERANCE {
        findings.bad(&format!(
            "the clock of rank {rank} on {host} differs by {ahead:+.1} s: set the clocks by NTP"
        ));
    } else {
        findings.good(&format!(
            "rank {rank} on {host} has joined, with the same program and clock"
        ));
    }
}

fn call_each_other(probes: &[(u32, ActorRef<Probe>)], findings: &mut Findings) {
    let num = probes.len();
    let reach = if num > MANY { 1 } else { num - 1 };
    let mut calls = Vec::new();
    for (index, (caller, probe)) in probes.iter().enumerate() {
        for step in 1..=reach {
            let (callee, other) = &probes[(index + step) % num];
            calls.push((*caller, *callee, probe.ask(Call(other.clone()))));
        }
    }
    let mut num_good = 0;
    for (caller, callee, call) in calls {
        match call.wait_timeout(2 * LIMIT) {
            Ok(Ok(())) => num_good += 1,
            Ok(Err(error)) => findings.bad(&format!(
                "rank {caller} cannot call rank {callee}, so workers and servers there cannot work together: {error}"
            )),
            Err(error) => findings.bad(&format!("rank {caller} does not answer: {}", error_chain(&error))),
        }
    }
    findings.good(&format!(
        "{num_good} connections between {num} processes work"
    ));
}
