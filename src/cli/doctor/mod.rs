//! `--doctor`: checks whether the processes find and reach each other. Each line says one thing that is right,
//! or one thing that is wrong and what to do.
//!
//! | module | what it holds |
//! |---|---|
//! | `machine` | what this process alone can see: limits, permissions, names, ports |
//! | `probe` | the actor that the driver starts in every process, to look at it from inside |

mod machine;
mod probe;

use std::process::ExitCode;
use std::time::Duration;

use ps_actors::actor::error_chain;
use ps_actors::cluster::{Cluster, Hosts};
use ps_actors::launch::{self, EXIT_CONFIG, Launch, Place, env, log_prefix};

use super::cluster::ClusterArgs;
use super::output::say;
use probe::Probe;

/// What was found so far.
pub(super) struct Findings {
    role: String,
    num_bad: u32,
}

impl Findings {
    fn good(&self, text: &str) {
        say!("ok   {}: {text}", self.role);
    }

    fn bad(&mut self, text: &str) {
        self.num_bad += 1;
        say!("BAD  {}: {text}", self.role);
    }

    fn exit_code(&self) -> ExitCode {
        match self.num_bad {
            0 => ExitCode::SUCCESS,
            _ => ExitCode::from(EXIT_CONFIG),
        }
    }
}

/// Examines this process, and the others together with them. All of them have the flag; each waits for the
/// others for the time `within`.
pub(super) fn examine(args: &ClusterArgs, within: Duration) -> ExitCode {
    let launch = match launch::resolve(&args.options(), env::read) {
        Ok(launch) => launch,
        Err(error) => {
            super::output::complain(&error_chain(&error));
            return ExitCode::from(EXIT_CONFIG);
        }
    };
    let mut findings = Findings {
        role: log_prefix(launch.rank()),
        num_bad: 0,
    };
    machine::limits(&mut findings);
    let world_size = match &launch {
        Launch::Alone => {
            findings.good("no flag and no launcher's variable says that there are other processes");
            return findings.exit_code();
        }
        Launch::StartProcesses { world_size } => *world_size,
        Launch::Rank(place) => {
            let Place {
                rank,
                world_size,
                launcher,
                ..
            } = place;
            findings.good(&format!("rank {rank} of {world_size}, from {launcher}"));
            if !machine::way_to_driver(place, within, &mut findings) {
                return findings.exit_code();
            }
            *world_size
        }
    };
    let mut config = args.config();
    config.join_timeout = within;
    let hosts = Hosts::new().host(|()| Ok(Probe));
    match Cluster::launch(&args.options(), config, hosts) {
        Err(error) => findings.bad(&error_chain(&error)),
        Ok(None) => findings.good("has joined, and the driver has looked at it"),
        Ok(Some(cluster)) => probe::look_at_all(&cluster, world_size, &mut findings),
    }
    findings.exit_code()
}
