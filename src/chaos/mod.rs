//! Follows a plan of faults in a run of real processes, and says what became of the run.
//!
//! A [`Plan`] has the same text for the simulator and for real processes; see [`ps_actors::chaos`]. The flags are
//! [`cli::ChaosArgs`](crate::cli::ChaosArgs):
//!
//! ```text
//! sharded_ps --processes 3 --num-servers 3 --servers-on-nodes --checkpoint-dir runs/one --update-log \
//!     --chaos "kill worker 1 @ step 40; stop worker 0 for 3s @ step 90; kill server 2 @ version 100; drop 1%; seed 7"
//! ```
//!
//! What the clauses do here:
//!
//! | clause | what happens |
//! |---|---|
//! | `kill worker 2 @ step 40` | the process that has worker 2 kills itself with SIGKILL when the worker is about to compute its step 40. Everything else in that process ends too |
//! | `stop worker 1 for 3s @ step 10` | that process stops itself with SIGSTOP, and gets SIGCONT 3 s later. A longer stop than the process lease makes it a lost process that comes back |
//! | `kill server 1 @ version 100` | the process that has server 1 kills itself when the server has made the update of version 100 and told nobody |
//! | `stop server 0 for 500ms @ version 7` | that process stops itself |
//! | `damage checkpoint @ version 30` | one bit of the newest checkpoint on the disk is changed, at version 30 or as soon as there is one |
//! | `lose power @ version 30` | refused: only the simulator can do it |
//! | `drop 5%`, `dup 2%`, `delay 20..80ms` | connections to servers are cut, calls are made twice, calls are made later; see [`ps_actors::chaos::network`] |
//! | `seed 7` | the seed of the dice. The order of events in real processes depends on time, so no run is like another |
//!
//! - A fault happens once in a run. The driver decides, because a process that was started again knows nothing. If its
//!   step or version has passed, it happens at the next one.
//! - A fault that would end the run for good is refused at the start. To kill a server, `--checkpoint-dir` is needed.
//!   To kill the driver, because the server or worker lives there, it is needed too. The run then ends with the driver,
//!   and the same command with `--resume` goes on. The directory notes which faults have happened, so they do not
//!   happen again. It also notes when a fault ended the driver. The recovery of the driver lasts from then to the first
//!   update after the restart. So it includes the time until somebody has started the driver again.
//! - Without such a directory, a worker that has moved into the driver is not killed as long as it is there. If it stays
//!   until the end, the fault does not happen, and the exit code is 1.
//! - With burn's learner (`ps::learner`), it is always so, because burn saves only between epochs. The server and a part of
//!   the workers are in the driver. A plan that kills the server, or a worker that begins there, is refused. Steps and
//!   versions are counted since the process of the driver began to train, also if it went on from a checkpoint.
//! - Steps are counted at the first server: which worker's gradient of which step was in which update. So a step that
//!   is lost or doubled is seen, even if a ledger is wrong.
//!
//! With the flags, a program calls [`ChaosArgs::begin`](crate::cli::ChaosArgs::begin). Without them:
//!
//! ```
//! use ps::actors::chaos::Plan;
//! use ps::chaos::{Chaos, ChaosError, Setting};
//! use ps::prelude::*;
//!
//! # let temporary = tempfile::tempdir()?;
//! # let directory = temporary.path();
//! let device = select_device(default_device_name())?;
//! let trainer = Trainer::new(ConvNet::init(1, &device), Mnist::bundled_sample().train)
//!     .device(&device)
//!     .workers(2)
//!     .iterations(40)
//!     .checkpoints(CheckpointConfig { every: 5, ..CheckpointConfig::new(directory) });
//! let setting = Setting {
//!     rank: 0, // The driver.
//!     is_alone: true,
//!     num_workers: 2,
//!     num_servers: 1,
//!     num_servers_in_driver: 1,
//!     workers_call_servers: true,
//!     learner_processes: None,
//!     checkpoint_dir: Some(directory.to_owned()),
//!     resumes: false,
//!     has_control: false,
//! };
//!
//! let plan: Plan = "kill worker 2 @ step 4".parse()?;
//! let refused = Chaos::begin(plan, setting.clone()).expect_err("there are two workers");
//! assert!(matches!(refused, ChaosError::Nobody { number: 2, last: 1, .. }));
//!
//! let mut chaos = Chaos::begin("damage checkpoint @ version 6".parse()?, setting)?;
//! let cluster = Cluster::alone(chaos.hosts(trainer.hosts(Hosts::new())?));
//! chaos.start(&cluster)?;
//! let report = trainer.run_on(&cluster)?;
//! let faults = chaos.finish(&report.done(40))?.expect("there is a plan");
//! println!("{faults}");
//! assert_eq!((faults.num_lost, faults.num_doubled), (Some(0), Some(0)));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ps_actors::actor::{ActorRef, CallError};
use ps_actors::chaos::network::{disturb, network_faults};
use ps_actors::chaos::points::{AlreadyWatched, watch};
use ps_actors::chaos::{Fault, Plan, Report, Work};
use ps_actors::cluster::{Cluster, Hosts, Placement, SpawnOn, SpawnOnError};
use ps_actors::server::{GetStatus, GetWeights, ParameterServer, WorkerStatus};
use ps_actors::weights::Weights;

mod control;
mod executor;
#[cfg(test)]
mod fuzz;
mod monitor;

pub use control::ControlError;
use executor::{Executor, Link, MONITOR, Role};
use monitor::{Ledger, Monitor};

/// How long the driver waits at the end for what nodes have not told it yet.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// The run in which a plan is followed, as one of its processes knows it. For an example, see the [module](self).
#[derive(Clone, Debug)]
pub struct Setting {
    /// This process's number; 0 is the driver.
    pub rank: u32,
    /// Whether there are no other processes.
    pub is_alone: bool,
    /// The number of workers of the run. A plan may name the workers from 0 to the one below this number.
    pub num_workers: usize,
    /// The number of servers of the run. A plan may name the servers from 0 to the one below this number.
    pub num_servers: usize,
    /// The servers that are in the driver's process, from the first one on; the others are on nodes.
    pub num_servers_in_driver: usize,
    /// Whether workers call the servers. Otherwise the driver does it for them.
    pub workers_call_servers: bool,
    /// How many processes share the workers of burn's learner (`ps::learner`), the driver included. `None`: it is
    /// another training.
    pub learner_processes: Option<usize>,
    /// Where checkpoints are saved.
    pub checkpoint_dir: Option<PathBuf>,
    /// Whether the run goes on from a checkpoint.
    pub resumes: bool,
    /// Whether the same command is to be run again without faults, to compare.
    pub has_control: bool,
}

/// Why a plan cannot be followed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChaosError {
    /// There is no such worker or server.
    #[error("`{fault}`: there is no {what} {number}; they are numbered from 0 to {last}")]
    Nobody {
        /// The clause of the plan that names it.
        fault: Fault,
        /// `worker` or `server`.
        what: &'static str,
        /// The number in the clause.
        number: usize,
        /// The greatest number of a worker, or of a server, in this run.
        last: usize,
    },
    /// Real processes cannot do it.
    #[error(
        "`{0}`: no program can do this to the machine that it runs on; the simulator can, with \
         `cargo run -p ps-actors --features simulation --example simulate -- --chaos \"..\"`"
    )]
    Simulator(Fault),
    /// The fault would end the run for good.
    #[error("`{fault}` would end the run, because {because}: add --checkpoint-dir")]
    NoCheckpoint {
        /// The clause of the plan that would end the run.
        fault: Fault,
        /// Why the run would end.
        because: &'static str,
    },
    /// The fault would end a training of burn's learner, or harm nothing that `ps` saves.
    #[error("`{fault}` is not for burn's learner: {because}")]
    Learner {
        /// The clause of the plan that asks for it.
        fault: Fault,
        /// Why it cannot be followed.
        because: &'static str,
    },
    /// There are no messages between processes and servers.
    #[error(
        "`{0}`: no process calls a server of another one, so there are no messages to lose, to double or to delay; \
         `sharded_ps --processes 3` has some"
    )]
    NoNetwork(&'static str),
    /// This system has no signal that stops a process.
    #[error("`{0}`: this system has no signal that stops a process")]
    NoStop(Fault),
    /// Only a driver that starts all processes can start them again.
    #[error("--chaos-control runs the command again: use --processes, or one process")]
    NoControl,
    /// Faults are planned already.
    #[error(transparent)]
    AlreadyWatched(#[from] AlreadyWatched),
    /// The system gives no thread.
    #[error("the system gives no thread")]
    Thread(#[source] std::io::Error),
    /// The monitor of the driver could not be started.
    #[error("the monitor of faults could not be started")]
    Monitor(#[from] SpawnOnError),
    /// The server of a driver's own loop cannot be asked.
    #[error("the server does not say what it has done")]
    Server(#[from] CallError),
    /// The run without faults failed.
    #[error("the run without faults failed")]
    Control(#[from] ControlError),
}

/// The plan of faults of a run, in one of its processes. Without a plan, it does nothing. For an example, see the
/// [module](self).
#[derive(Debug)]
pub struct Chaos {
    on: Option<On>,
}

#[derive(Debug)]
struct On {
    plan: Plan,
    setting: Setting,
    ledger: Arc<Ledger>,
    started: Instant,
    /// Lives as long as the run.
    monitor: Option<ActorRef<Monitor>>,
    /// How many gradients were applied when the driver's own loop began.
    num_applied_before: u64,
}

/// What a run has done at its end, as the servers know it.
#[derive(Clone, Debug)]
pub struct Done {
    /// How many gradients all workers together should have settled in the whole run. `None` if the run was
    /// interrupted, or if it is not known. Then the run is not compared with one without faults.
    pub num_expected: Option<u64>,
    /// How many gradients were settled: applied, dropped as late, or refused.
    pub num_settled: u64,
    /// How many of them were applied.
    pub num_applied: u64,
    /// How many were applied before this process went on with the run.
    pub num_applied_before: u64,
    /// The final weights.
    pub weights: Weights,
    /// Whether another run would have the same weights, to the bit.
    pub is_repeatable: bool,
}

impl Chaos {
    /// Makes a run without faults.
    #[must_use]
    pub fn off() -> Self {
        Self { on: None }
    }

    /// Checks the plan, and begins to follow it in this process. Call it before the processes find each other.
    ///
    /// # Errors
    /// If the plan cannot be followed in this setting, or another plan is followed already.
    pub fn begin(plan: Plan, setting: Setting) -> Result<Self, ChaosError> {
        check(&plan, &setting)?;
        if setting.has_control && !control::is_possible() {
            return Err(ChaosError::NoControl);
        }
        let directory = setting.checkpoint_dir.as_deref();
        // The driver alone reads and writes the marks.
        let directory = directory.filter(|_| setting.rank == 0);
        let ledger = Arc::new(Ledger::new(plan.clone(), directory, setting.resumes));
        let role = match setting.rank {
            0 => Role::Driver {
                ledger: Arc::clone(&ledger),
                may_die: directory.is_some(),
            },
            rank => Role::Node(Link::start(rank).map_err(ChaosError::Thread)?),
        };
        watch(Executor::new(&plan.faults, setting.num_servers, role))?;
        disturb(
            &plan,
            plan.seed.unwrap_or(0) ^ (u64::from(setting.rank) << 32),
        );
        Ok(Self {
            on: Some(On {
                plan,
                setting,
                ledger,
                started: Instant::now(),
                monitor: None,
                num_applied_before: 0,
            }),
        })
    }

    /// Adds what the driver hosts for the others, and lets all processes agree on the plan.
    #[must_use]
    pub fn hosts(&self, hosts: Hosts) -> Hosts {
        let Some(on) = &self.on else {
            return hosts;
        };
        let ledger = Arc::clone(&on.ledger);
        let hosts = hosts.host(move |()| Ok(Monitor(Arc::clone(&ledger))));
        hosts.must_agree("--chaos", &on.plan)
    }

    /// Begins the run in the driver, when the processes have found each other.
    ///
    /// # Errors
    /// If no actor can be started.
    pub fn start(&mut self, cluster: &Cluster) -> Result<(), ChaosError> {
        if let Some(on) = &mut self.on {
            let here = SpawnOn::new().name(MONITOR).place(Placement::Driver);
            on.monitor = Some(cluster.spawn_with(here, ()).wait()?);
            on.started = Instant::now();
        }
        Ok(())
    }

    /// As [`start`](Self::start), for a driver's own loop with this server.
    ///
    /// # Errors
    /// If no actor can be started, or the server has ended.
    pub fn start_loop(
        &mut self,
        cluster: &Cluster,
        server: &ActorRef<ParameterServer>,
    ) -> Result<(), ChaosError> {
        self.start(cluster)?;
        if let Some(on) = &mut self.on {
            (on.num_applied_before, _) = totals(server)?;
        }
        Ok(())
    }

    /// Returns what a driver's own loop has done with this server. `num_expected` and `is_repeatable` are those of
    /// [`Done`]. `None` without a plan.
    ///
    /// # Errors
    /// If the server has ended.
    pub fn done_in_loop(
        &self,
        server: &ActorRef<ParameterServer>,
        num_expected: Option<u64>,
        is_repeatable: bool,
    ) -> Result<Option<Done>, ChaosError> {
        let Some(on) = &self.on else {
            return Ok(None);
        };
        let (num_applied, num_settled) = totals(server)?;
        Ok(Some(Done {
            num_expected,
            num_settled,
            num_applied,
            num_applied_before: on.num_applied_before,
            weights: server.ask(GetWeights).wait()?,
            is_repeatable,
        }))
    }

    /// Ends the run in the driver. Returns what the faults did to the run. If the user asks for it, this call also
    /// makes a run without faults, and compares the two, but not if this run was interrupted. Returns `None` without a
    /// plan.
    ///
    /// # Errors
    /// If the run without faults fails.
    pub fn finish(self, done: &Done) -> Result<Option<Report>, ChaosError> {
        let Some(on) = self.on else {
            return Ok(None);
        };
        let time = on.started.elapsed();
        let num_new = done.num_applied.saturating_sub(done.num_applied_before);
        let deadline = Instant::now() + LAST_WORDS;
        while on.ledger.counts().num_steps < num_new && Instant::now() < deadline {
            // Nodes tell what they have seen by themselves, every few milliseconds.
            std::thread::sleep(Duration::from_millis(1));
        }
        on.ledger
            .count_network((0, std::process::id()), network_faults());
        let counts = on.ledger.counts();
        let mut report = on.ledger.report();
        report.work = Work {
            num_applied: num_new,
            time,
        };
        if let Some(num_expected) = done.num_expected {
            // In the weights, and by the servers' own count.
            let lost_steps = num_new.saturating_sub(counts.num_steps);
            let unsettled = num_expected.saturating_sub(done.num_settled);
            report.num_lost = Some(lost_steps.max(unsettled));
            let too_many = done.num_settled.saturating_sub(num_expected);
            report.num_doubled = Some(counts.num_doubled.max(too_many));
        }
        control::note(&report.work, &done.weights)?;
        // The whole run cannot be compared with a part of one. Who interrupts a run does not wait for another one.
        if on.setting.has_control && done.num_expected.is_some() {
            let (work, bits) = control::run()?;
            report.control = Some(work);
            let is_same = bits == control::bits(&done.weights);
            report.has_same_weights = done.is_repeatable.then_some(is_same);
        }
        Ok(Some(report))
    }
}

/// Returns how many gradients a server has applied, and how many it has settled.
fn totals(server: &ActorRef<ParameterServer>) -> Result<(u64, u64), CallError> {
    let status = server.ask(GetStatus).wait()?;
    let workers = status
        .coordinator
        .iter()
        .flat_map(|one| one.workers.values());
    let sums = workers.fold((0, 0), |(applied, settled), worker| {
        let num_settled = WorkerStatus::num_settled(worker);
        (applied + worker.num_applied, settled + num_settled)
    });
    Ok(sums)
}

fn check(plan: &Plan, setting: &Setting) -> Result<(), ChaosError> {
    let disturbances = [
        (plan.drop_percent > 0.0, "drop"),
        (plan.dup_percent > 0.0, "dup"),
        (plan.delay.is_some(), "delay"),
    ];
    if let Some((_, kind)) = disturbances
        .into_iter()
        .find(|(is_planned, _)| *is_planned && (setting.is_alone || !setting.workers_call_servers))
    {
        return Err(ChaosError::NoNetwork(kind));
    }
    plan.faults
        .iter()
        .try_for_each(|&fault| check_fault(fault, setting))
}

fn check_fault(fault: Fault, setting: &Setting) -> Result<(), ChaosError> {
    let exists = |what, number: usize, how_many: usize| match number < how_many {
        true => Ok(()),
        false => Err(ChaosError::Nobody {
            fault,
            what,
            number,
            last: how_many.saturating_sub(1),
        }),
    };
    let is_saved = setting.checkpoint_dir.is_some();
    let needs_checkpoint = |because| match is_saved {
        true => Ok(()),
        false => Err(ChaosError::NoCheckpoint { fault, because }),
    };
    let is_unix = cfg!(unix);
    if let Some(num_processes) = setting.learner_processes {
        let refused = |because| Err(ChaosError::Learner { fault, because });
        match fault {
            // The first worker is always there, and then each further one by the number of processes.
            Fault::KillWorker { worker, .. }
                if (worker as usize) < setting.num_workers
                    && (worker as usize).is_multiple_of(num_processes.max(1)) =>
            {
                return refused("this worker is in the driver's process");
            }
            Fault::KillServer { .. } => {
                return refused("its only server is in the driver's process");
            }
            Fault::DamageCheckpoint { .. } => {
                return refused("its checkpoints are burn's, which have no checksums");
            }
            _ => {}
        }
    }
    match fault {
        Fault::KillWorker { worker, .. } => {
            exists("worker", worker as usize, setting.num_workers)?;
            match setting.is_alone {
                true => needs_checkpoint("the worker is in the driver's process"),
                false => Ok(()),
            }
        }
        Fault::KillServer { server, .. } => {
            exists("server", server, setting.num_servers)?;
            match setting.is_alone || server < setting.num_servers_in_driver {
                true => needs_checkpoint("the server is in the driver's process"),
                false => needs_checkpoint("the weights of a server are lost with it"),
            }
        }
        Fault::StopWorker { .. } | Fault::StopServer { .. } if !is_unix => {
            Err(ChaosError::NoStop(fault))
        }
        Fault::StopWorker { worker, .. } => exists("worker", worker as usize, setting.num_workers),
        Fault::StopServer { server, .. } => exists("server", server, setting.num_servers),
        Fault::DamageCheckpoint { .. } => needs_checkpoint("there are no checkpoints"),
        other => Err(ChaosError::Simulator(other)),
    }
}

#[cfg(test)]
mod tests;
