//! `--doctor`: checks whether the processes find and reach each other, and have the same data. Each line says one thing
//! that is right, or one thing that is wrong and what to do.
//!
//! It has two parts. [`examine`] runs before the program has loaded anything, so a mistake in the network is named at
//! once, however long the data take. [`compare`] runs where the program would begin to train, with what it has loaded.
//! Between them, the driver tells each process whether all is well so far; if not, all end. With `--processes`, the first
//! part is only what each process can see alone.
//!
//! | module | what it holds |
//! |---|---|
//! | `machine` | what this process alone can see: limits, permissions, names, ports |
//! | `probe` | the actor that the driver starts in every process, to look at it from inside |

mod machine;
mod probe;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ps_actors::actor::error_chain;
use ps_actors::cluster::{Cluster, ClusterError, Hosts, StartError};
use ps_actors::launch::{self, EXIT_CONFIG, EXIT_OK, Launch, LaunchError, Place, env, log_prefix};

use super::cluster::ClusterArgs;
use super::output::say;
use probe::Probe;

/// What was found so far.
pub(super) struct Findings {
    role: String,
    num_bad: u32,
}

impl Findings {
    fn new(rank: u32) -> Self {
        Self {
            role: log_prefix(rank),
            num_bad: 0,
        }
    }

    fn good(&self, text: &str) {
        say!("ok   {}: {text}", self.role);
    }

    fn waits(&self, text: &str) {
        say!("wait {}: {text}", self.role);
    }

    fn bad(&mut self, text: &str) {
        self.num_bad += 1;
        say!("BAD  {}: {text}", self.role);
    }

    fn is_well(&self) -> bool {
        self.num_bad == 0
    }
}

/// Examines this process, and the others together with them. All of them have the flag; each waits for the
/// others for the time `within`. Returns `None` if all is well so far, and what the processes load is to be compared.
pub(super) fn examine(args: &ClusterArgs, within: Duration) -> Option<ExitCode> {
    let launch = match resolve(args) {
        Ok(launch) => launch,
        Err(error) => {
            super::output::complain(&error_chain(&error));
            return Some(ExitCode::from(EXIT_CONFIG));
        }
    };
    let mut findings = Findings::new(launch.rank());
    machine::limits(&mut findings);
    let world_size = match &launch {
        Launch::Alone => {
            findings.good("no flag and no launcher's variable says that there are other processes");
            return Some(ExitCode::from(exit_code(&findings)));
        }
        // All processes are this program on this machine, and the driver starts them where they compare their data.
        Launch::StartProcesses { world_size } => {
            findings.good(&format!("starts all {world_size} processes itself"));
            return end_of_first_look(&findings);
        }
        Launch::Rank(_) if env::read(env::PARENT_PID).is_some() => {
            return end_of_first_look(&findings);
        }
        Launch::Rank(place) => {
            let Place {
                rank,
                world_size,
                launcher,
                ..
            } = place;
            findings.good(&format!("rank {rank} of {world_size}, from {launcher}"));
            if !machine::way_to_driver(place, within, &mut findings) {
                return Some(ExitCode::from(EXIT_CONFIG));
            }
            *world_size
        }
    };
    let mut config = args.config();
    config.join_timeout = within;
    let all_is_well = Arc::new(AtomicBool::new(false));
    let hosts = {
        let (all_is_well, num_bad) = (Arc::clone(&all_is_well), findings.num_bad);
        Hosts::new().host(move |()| Ok(Probe::new(num_bad, Arc::clone(&all_is_well))))
    };
    match Cluster::launch(&args.options(), config, hosts) {
        Err(error) => findings.bad(&error_chain(&error)),
        Ok(None) => findings.good("has joined, and the driver has looked at it"),
        Ok(Some(cluster)) => {
            let probes = probe::look_at_all(&cluster, world_size, &mut findings);
            if findings.is_well() {
                probe::tell_all(&probes, &mut findings);
            }
            all_is_well.store(findings.is_well(), Ordering::Relaxed);
            cluster.release().wait();
        }
    }
    match all_is_well.load(Ordering::Relaxed) {
        true => end_of_first_look(&findings),
        false => Some(ExitCode::from(exit_code(&findings))),
    }
}

/// `None`, so that the program goes on, if this process has found nothing wrong.
fn end_of_first_look(findings: &Findings) -> Option<ExitCode> {
    (!findings.is_well()).then(|| ExitCode::from(exit_code(findings)))
}

/// How long a process that has loaded its data waits for the driver to end its first look.
const FIRST_LOOK_ENDS: Duration = Duration::from_secs(5);

/// Whether a process that loads quickly asked the driver of the first look, which ends.
fn is_of_first_look(error: &StartError) -> bool {
    matches!(error, StartError::Cluster(ClusterError::RunOver { .. }))
}

/// Compares what the processes have loaded, by letting them join each other with it. Returns the exit code.
pub(super) fn compare(args: &ClusterArgs, hosts: Hosts) -> u8 {
    let Ok(launch) = resolve(args) else {
        return EXIT_CONFIG;
    };
    let mut findings = Findings::new(launch.rank());
    let agreed = hosts.agreed().collect::<Vec<_>>().join(", ");
    let agreed = match agreed.is_empty() {
        true => "nothing, because the program states nothing that must be the same".to_owned(),
        false => agreed,
    };
    let deadline = Instant::now() + FIRST_LOOK_ENDS;
    let launched = loop {
        match Cluster::launch(&args.options(), args.config(), hosts.clone()) {
            Err(error) if is_of_first_look(&error) && Instant::now() < deadline => {
                // The driver ends its first look, and nobody else knows when.
                std::thread::sleep(Duration::from_millis(100));
            }
            other => break other,
        }
    };
    match launched {
        Err(error) => findings.bad(&differences(&error)),
        Ok(None) => findings.good(&format!("has the same as the driver: {agreed}")),
        Ok(Some(cluster)) => {
            let nodes = cluster.nodes();
            for rank in 1..launch.world_size() {
                if !nodes.iter().any(|node| node.node.rank == rank) {
                    findings.bad(&format!(
                        "rank {rank} has other data or settings, or could not load its data: its own lines say what, and \
                         so does the log of this process"
                    ));
                }
            }
            if findings.is_well() {
                findings.good(&format!("all processes have the same: {agreed}"));
            }
            cluster.release().wait();
        }
    }
    exit_code(&findings)
}

fn differences(error: &StartError) -> String {
    format!(
        "the processes have not loaded the same: {}",
        error_chain(error)
    )
}

fn resolve(args: &ClusterArgs) -> Result<Launch, LaunchError> {
    launch::resolve(&args.options(), env::read)
}

fn exit_code(findings: &Findings) -> u8 {
    match findings.is_well() {
        true => EXIT_OK,
        false => EXIT_CONFIG,
    }
}
