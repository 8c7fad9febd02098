//! Flags for faults on purpose.

use std::process::ExitCode;

use ps_actors::chaos::Plan;
use ps_actors::launch::{self, Launch, env};

use super::{CheckpointArgs, ClusterArgs, say};
use crate::chaos::{Chaos, ChaosError, Done, Setting};

// No doc comment on this type: `--help` would take it for the program's own text.

#[allow(missing_docs, reason = "see above")]
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Faults on purpose")]
pub struct ChaosArgs {
    /// Let these faults happen, and report at the end what they did, such as "kill worker 1 @ step 40; stop worker 0
    /// for 3s @ step 90; kill server 1 @ version 100; drop 1%; dup 2%; delay 1..5ms; seed 7".
    #[arg(long, value_name = "PLAN")]
    pub chaos: Option<Plan>,
    /// Also run the same command without faults, and compare. Not if the run is interrupted.
    #[arg(long, requires = "chaos")]
    pub chaos_control: bool,
}

/// Where the servers of a program are, and who calls them.
#[derive(Clone, Copy, Debug)]
pub struct ServerPlaces {
    /// How many servers there are.
    pub num_servers: usize,
    /// How many of them are in the driver's process, from the first one on.
    pub num_in_driver: usize,
    /// Whether workers call the servers. Otherwise the driver does it for them.
    pub workers_call: bool,
}

impl ServerPlaces {
    /// One server, in the driver, which workers call.
    pub const ONE: Self = Self {
        num_servers: 1,
        num_in_driver: 1,
        workers_call: true,
    };

    /// One server, in the driver, which alone calls it.
    pub const DRIVEN: Self = Self {
        num_servers: 1,
        num_in_driver: 1,
        workers_call: false,
    };
}

impl ChaosArgs {
    /// Begins to follow the plan in this process, if there is one. Call it before [`ClusterArgs::launch`].
    ///
    /// # Errors
    /// If the plan cannot be followed.
    pub fn begin(
        &self,
        num_workers: usize,
        cluster: &ClusterArgs,
        checkpoints: &CheckpointArgs,
        servers: ServerPlaces,
    ) -> Result<Chaos, ChaosError> {
        self.begin_in(num_workers, cluster, servers, |setting| Setting {
            checkpoint_dir: checkpoints.checkpoint_dir.clone(),
            resumes: checkpoints.resume,
            ..setting
        })
    }

    /// As [`begin`](Self::begin), for a training of burn's learner (`ps::learner`). Its server and a part of its workers
    /// are in the driver's process. A plan that kills the server, or a worker that begins there, is refused.
    ///
    /// # Errors
    /// If the plan cannot be followed.
    pub fn begin_learner(
        &self,
        num_workers: usize,
        cluster: &ClusterArgs,
    ) -> Result<Chaos, ChaosError> {
        let num_processes = cluster.world_size() as usize;
        let one = ServerPlaces::ONE;
        self.begin_in(num_workers, cluster, one, |setting| Setting {
            learner_processes: Some(num_processes),
            ..setting
        })
    }

    fn begin_in(
        &self,
        num_workers: usize,
        cluster: &ClusterArgs,
        servers: ServerPlaces,
        and: impl FnOnce(Setting) -> Setting,
    ) -> Result<Chaos, ChaosError> {
        let Some(plan) = &self.chaos else {
            return Ok(Chaos::off());
        };
        // `cli::main` has refused what cannot be resolved.
        let launch = launch::resolve(&cluster.options(), env::read).unwrap_or(Launch::Alone);
        let setting = Setting {
            rank: launch.rank(),
            is_alone: matches!(launch, Launch::Alone),
            num_workers,
            num_servers: servers.num_servers,
            num_servers_in_driver: servers.num_in_driver,
            workers_call_servers: servers.workers_call,
            learner_processes: None,
            checkpoint_dir: None,
            resumes: false,
            has_control: self.chaos_control,
        };
        Chaos::begin(plan.clone(), and(setting))
    }
}

impl Chaos {
    /// [Finishes](Self::finish), prints what the faults did, and returns the exit code of the program: `code`, or 1
    /// if a fault of the plan did not happen, or the run is not what it should be.
    ///
    /// # Errors
    /// If the run without faults fails.
    pub fn conclude(self, done: Option<&Done>, code: ExitCode) -> Result<ExitCode, ChaosError> {
        let report = match done {
            Some(done) => self.finish(done)?,
            None => None,
        };
        let Some(report) = report else {
            return Ok(code);
        };
        say!("{report}");
        match report.is_good() {
            true => Ok(code),
            false => Ok(ExitCode::FAILURE),
        }
    }
}
