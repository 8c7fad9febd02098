//! The actor that the driver starts in every process.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use actix::clock::timeout;
use actix::{Actor, Context, Handler, Message, MessageResult, ResponseFuture};
use ps_actors::ActorRef;
use ps_actors::actor::{error_chain, run};
use ps_actors::cluster::{Cluster, Hosted, Placement};
use ps_actors::remote::{Messages, Remote};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::Findings;

/// For each call.
const LIMIT: Duration = Duration::from_secs(2);
/// For the start of all probes. A firewall before a node drops the packets, so nothing but the time says that the driver
/// cannot call it. The longest time that still names this cause within 5 s of the start of the processes.
const STARTS_WITHIN: Duration = Duration::from_secs(3);
/// Certificates and log lines of machines that differ by more are of no use.
const CLOCK_TOLERANCE: f64 = 1.0;
/// With more processes, each calls only the next.
const MANY: usize = 16;

pub(super) struct Probe {
    /// How many mistakes this process has found by itself.
    num_bad: u32,
    /// Becomes true when the driver has found nothing wrong in any process.
    all_is_well: Arc<AtomicBool>,
}

impl Probe {
    pub(super) fn new(num_bad: u32, all_is_well: Arc<AtomicBool>) -> Self {
        Self {
            num_bad,
            all_is_well,
        }
    }
}

impl Actor for Probe {
    type Context = Context<Self>;
}

impl Remote for Probe {
    fn messages(messages: &mut Messages<Self>) {
        messages
            .add::<Look>()
            .add::<Call>()
            .add::<Answer>()
            .add::<AllIsWell>();
    }
}

impl Hosted for Probe {
    type Args = ();
}

/// What is to be compared between processes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Seen {
    /// The hash of the program's file.
    program: String,
    /// The seconds since 1970.
    clock: f64,
    num_bad: u32,
}

#[derive(Clone, Message, Serialize, Deserialize)]
#[rtype(result = "Seen")]
pub(super) struct Look;

/// Any answer to it shows that the way is open.
#[derive(Clone, Message, Serialize, Deserialize)]
#[rtype(result = "()")]
pub(super) struct Answer;

/// Says that the driver has found nothing wrong in any process.
#[derive(Clone, Message, Serialize, Deserialize)]
#[rtype(result = "()")]
pub(super) struct AllIsWell;

/// Calls another probe, and returns what went wrong.
#[derive(Clone, Message, Serialize, Deserialize)]
#[rtype(result = "Result<(), String>")]
pub(super) struct Call(ActorRef<Probe>);

impl Handler<Look> for Probe {
    type Result = MessageResult<Look>;

    fn handle(&mut self, _: Look, _: &mut Context<Self>) -> Self::Result {
        MessageResult(Seen {
            program: program().to_owned(),
            clock: now(),
            num_bad: self.num_bad,
        })
    }
}

impl Handler<Answer> for Probe {
    type Result = ();

    fn handle(&mut self, _: Answer, _: &mut Context<Self>) {}
}

impl Handler<AllIsWell> for Probe {
    type Result = ();

    fn handle(&mut self, _: AllIsWell, _: &mut Context<Self>) {
        self.all_is_well.store(true, Ordering::Relaxed);
    }
}

impl Handler<Call> for Probe {
    type Result = ResponseFuture<Result<(), String>>;

    fn handle(&mut self, Call(other): Call, _: &mut Context<Self>) -> Self::Result {
        Box::pin(async move {
            let answer = other.ask_within(Answer, LIMIT).await;
            answer.map_err(|error| error_chain(&error))
        })
    }
}

/// The hash of this program's file. It is computed once, because that takes a while.
fn program() -> &'static str {
    static PROGRAM: OnceLock<String> = OnceLock::new();
    PROGRAM.get_or_init(hash_of_program)
}

fn hash_of_program() -> String {
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

/// The probes of all processes that have one, by rank.
pub(super) type Probes = Vec<(u32, ActorRef<Probe>)>;

/// Looks at every process from inside, and lets them call each other.
pub(super) fn look_at_all(cluster: &Cluster, world_size: u32, findings: &mut Findings) -> Probes {
    let nodes = cluster.nodes();
    let mut probes = Vec::new();
    let mut starting = Vec::new();
    for rank in 0..world_size {
        let node = nodes.iter().find(|node| node.node.rank == rank);
        if rank > 0 && node.is_none() {
            findings.bad(&format!(
                "rank {rank} has not joined: it is not started, or it cannot reach this process; its own lines say why"
            ));
            continue;
        }
        let place = Placement::Rank(rank);
        let host = node.map(|node| node.host.as_str());
        starting.push((rank, host, cluster.spawn_with::<Probe>(place.into(), ())));
    }
    let deadline = Instant::now() + STARTS_WITHIN;
    let own = program();
    for (rank, host, task) in starting {
        let left = deadline.saturating_duration_since(Instant::now());
        let reason = match run(async { timeout(left, task).await }) {
            Ok(Ok(probe)) => {
                if let Some(host) = host {
                    compare(rank, host, &probe, own, findings);
                }
                probes.push((rank, probe));
                continue;
            }
            Ok(Err(error)) => error_chain(&error),
            Err(_) => format!(
                "it has not answered for {STARTS_WITHIN:?}: a firewall before it drops packets (nodes listen on any \
                 free port), or it has no time to answer"
            ),
        };
        findings.bad(&format!(
            "rank {rank} has joined, but this process cannot call it: {reason}"
        ));
    }
    call_each_other(&probes, findings);
    probes
}

/// Tells every process that nothing wrong was found.
pub(super) fn tell_all(probes: &Probes, findings: &mut Findings) {
    for (rank, probe) in probes {
        if let Err(error) = probe.ask(AllIsWell).wait_timeout(LIMIT) {
            findings.bad(&format!(
                "rank {rank} does not answer any more: {}",
                error_chain(&error)
            ));
        }
    }
}

fn compare(rank: u32, host: &str, probe: &ActorRef<Probe>, own: &str, findings: &mut Findings) {
    let asked = now();
    let seen = match probe.ask(Look).wait_timeout(LIMIT) {
        Ok(answer) => answer,
        Err(error) => {
            findings.bad(&format!(
                "rank {rank} on {host} does not answer: {}",
                error_chain(&error)
            ));
            return;
        }
    };
    let Seen {
        program,
        clock,
        num_bad,
    } = seen;
    // Its clock was read between the two readings here.
    let ahead = (clock - now()).max(0.0) - (asked - clock).max(0.0);
    if num_bad > 0 {
        findings.bad(&format!(
            "rank {rank} on {host} has found something wrong on its own machine: see its lines"
        ));
    }
    if program != own {
        findings.bad(&format!(
            "rank {rank} on {host} runs another build of the program ({program} there, {own} here): copy the same file \
             to all machines"
        ));
    } else if ahead.abs() > CLOCK_TOLERANCE {
        findings.bad(&format!(
            "the clock of rank {rank} on {host} differs by {ahead:+.1} s: set the clocks by NTP"
        ));
    } else if num_bad == 0 {
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

#[cfg(test)]
mod tests {
    use ps_actors::actor::Spawn;
    use ps_runtime::test_util::Fuzz;

    use super::*;

    fn probe(all_is_well: &Arc<AtomicBool>) -> ActorRef<Probe> {
        let all_is_well = Arc::clone(all_is_well);
        let probe = Spawn::new().start(move || Probe::new(0, Arc::clone(&all_is_well)));
        probe.expect("the system gives a thread")
    }

    /// PS-6.
    #[test]
    fn nothing_that_a_peer_sends_harms_a_probe() {
        let all_is_well = Arc::new(AtomicBool::new(false));
        let other = probe(&all_is_well);
        let fuzz = Fuzz {
            one_in: 10,
            fresh_every: 100,
        };
        let num_told = fuzz.run::<Probe>(
            |_| probe(&all_is_well),
            |process, _| {
                vec![
                    process.sent::<Probe, _>(&Look),
                    process.sent::<Probe, _>(&Call(other.clone())),
                    process.sent::<Probe, _>(&Answer),
                    process.sent::<Probe, _>(&AllIsWell),
                ]
            },
            |probe| {
                probe.ask(Answer).wait()?;
                Ok(all_is_well.load(Ordering::Relaxed))
            },
        );
        assert!(num_told > 0, "no probe was told that all is well");
        assert!(other.ask(Look).wait().is_ok());
    }
}
