//! The command line of a training program: flags, logging, exit codes.
//!
//! A program takes the groups of flags that it needs into its own [`clap::Parser`], and gives its work to
//! [`main`]:
//!
//! ```no_run
//! use std::process::ExitCode;
//!
//! use ps::cli::{
//!     self, ChaosArgs, CheckpointArgs, ClusterArgs, DataArgs, RecordArgs, ScheduleArgs, ServerPlaces, ShowArgs, TrainArgs,
//!     say,
//! };
//! use ps::prelude::*;
//!
//! /// Trains a small network on MNIST.
//! #[derive(clap::Parser)]
//! struct Args {
//!     #[command(flatten)]
//!     train: TrainArgs,
//!     #[command(flatten)]
//!     schedule: ScheduleArgs,
//!     #[command(flatten)]
//!     data: DataArgs,
//!     #[command(flatten)]
//!     cluster: ClusterArgs,
//!     #[command(flatten)]
//!     checkpoints: CheckpointArgs,
//!     #[command(flatten)]
//!     record: RecordArgs,
//!     #[command(flatten)]
//!     show: ShowArgs,
//!     #[command(flatten)]
//!     chaos: ChaosArgs,
//! }
//!
//! fn main() -> ExitCode {
//!     cli::main(train)
//! }
//!
//! fn train(args: Args) -> Result<ExitCode, Box<dyn std::error::Error + Send + Sync>> {
//!     let (device, mnist) = (args.data.device()?, args.data.mnist()?);
//!     let model = ConvNet::init(args.train.seed, &device);
//!     let trainer = Trainer::new(model.clone(), mnist.train)
//!         .test_data(mnist.test)
//!         .device(&device)
//!         .workers(args.train.num_workers)
//!         .batch_size(args.train.batch_size)
//!         .iterations(args.train.iterations)
//!         .seed(args.train.seed)
//!         .checkpoints(args.checkpoints.config())
//!         .record(args.record.record.clone())
//!         .observe_all(args.show.observers())
//!         .controls(&args.show.controls);
//!     let (rate, num_updates) = (args.train.learning_rate, args.train.iterations);
//!     let trainer = args.schedule.apply(trainer, rate, num_updates)?;
//!     if let Some(file) = &args.record.replay {
//!         say!("{}", trainer.replay(file)?);
//!         return Ok(ExitCode::SUCCESS);
//!     }
//!     let (num_workers, servers) = (args.train.num_workers, ServerPlaces::ONE);
//!     let mut chaos = args.chaos.begin(num_workers, &args.cluster, &args.checkpoints, servers)?;
//!     // `None`: this process made workers for another one, and the training is over.
//!     let Some(cluster) = args.cluster.launch(chaos.hosts(trainer.hosts(Hosts::new())?)) else {
//!         return Ok(ExitCode::SUCCESS);
//!     };
//!     chaos.start(&cluster)?;
//!     let report = trainer.run_on(&cluster)?;
//!     say!("{report}");
//!     args.checkpoints.export(&model, &device, &report.weights)?;
//!     let code = cli::end_of_training(report.interrupted, report.saved_all().is_some());
//!     Ok(chaos.conclude(Some(&report.done(args.train.iterations)), code)?)
//! }
//! ```
//!
//! The groups are ordinary structs of clap, so a program can also read its flags by itself:
//!
//! ```
//! use ps::cli::clap::Parser;
//! use ps::cli::{CheckpointArgs, LrSchedule, RecordArgs, ScheduleArgs};
//!
//! #[derive(Parser)]
//! struct Args {
//!     #[command(flatten)]
//!     schedule: ScheduleArgs,
//!     #[command(flatten)]
//!     checkpoints: CheckpointArgs,
//!     #[command(flatten)]
//!     record: RecordArgs,
//! }
//!
//! let flags = "program --lr-schedule cosine --clip-norm 1 --checkpoint-dir runs/one --record run.schedule";
//! let args = Args::parse_from(flags.split(' '));
//! assert_eq!((args.schedule.lr_schedule, args.schedule.clip_norm), (LrSchedule::Cosine(0.0), Some(1.0)));
//! let checkpoints = args.checkpoints.config().expect("there is a directory");
//! assert_eq!((checkpoints.every, checkpoints.resume), (1000, false));
//! assert!(args.record.record.is_some());
//! ```
//!
//! | module | what it holds |
//! |---|---|
//! | `chaos` | [`ChaosArgs`]: faults on purpose |
//! | `checkpoints` | [`CheckpointArgs`]: where checkpoints are saved; how an interrupted training ends |
//! | `cluster` | [`ClusterArgs`]: which of several processes this one is |
//! | `data` | [`DataArgs`], [`DeviceArgs`], [`TrainArgs`]: MNIST, device, settings of a training |
//! | `doctor` | `--doctor`: checks whether the processes find and reach each other |
//! | `log` | log lines on standard error, with the role of the process; `RUST_LOG` |
//! | `record` | [`RecordArgs`]: record a training, and replay it |
//! | `schedule` | [`ScheduleArgs`]: the schedule of the learning rate, and clipping |
//! | `output` | [`say!`]: lines on standard output, above the progress bar |
//! | `show` | [`ShowArgs`]: progress, and what a training leaves behind; `DashboardArgs`, its flags of the dashboard |

mod chaos;
mod checkpoints;
mod cluster;
mod data;
mod doctor;
mod log;
mod output;
mod record;
mod schedule;
mod show;

use std::error::Error;
use std::process::ExitCode;
use std::sync::OnceLock;

pub use clap;
use clap::Parser;
use ps_actors::actor::error_chain;
use ps_actors::launch::log_prefix;

pub use chaos::{ChaosArgs, ServerPlaces};
pub use checkpoints::{CheckpointArgs, end_of_training, say_how_to_go_on};
pub use cluster::ClusterArgs;
pub use data::{DataArgs, DeviceArgs, TrainArgs};
#[doc(hidden)]
pub use output::print_line;
pub use output::say;
pub use record::RecordArgs;
pub use schedule::{LongWarmup, LrSchedule, NoSchedule, ScheduleArgs};
#[cfg(feature = "dashboard")]
pub use show::DashboardArgs;
pub use show::{Progress, ShowArgs, closing_table};

/// This process's number among all, once [`main`] knows it.
static RANK: OnceLock<u32> = OnceLock::new();

/// This process's number among those of its host, once [`main`] knows it.
static LOCAL_RANK: OnceLock<u32> = OnceLock::new();

/// Whether the user wants to see no progress, once [`main`] knows it.
static IS_QUIET: OnceLock<bool> = OnceLock::new();

/// Parses the command line, turns logging on, and does the program's work.
///
/// Log lines go to standard error and begin with the role of the process, such as `driver 0` or `node 2`.
/// `RUST_LOG` selects them: a level, or levels by module, such as `warn,ps_runtime=debug`. Without it they are
/// those of level `info` and above.
///
/// Returns what `work` does, or prints its error with all causes and returns 1. Ends the process with 2 for
/// flags that it does not know, and with 64 ([`EXIT_CONFIG`](ps_actors::launch::EXIT_CONFIG)) for flags of
/// [`ClusterArgs`] that contradict each other or the environment.
pub fn main<A, E>(work: impl FnOnce(A) -> Result<ExitCode, E>) -> ExitCode
where
    A: Parser,
    E: Into<Box<dyn Error + Send + Sync>>,
{
    let matches = A::command().get_matches();
    let args = A::from_arg_matches(&matches);
    let args = args.unwrap_or_else(|error| error.format(&mut A::command()).exit());
    let rank = ClusterArgs::rank_in(&matches);
    let (rank, local_rank) = rank.unzip();
    log::start(rank.map(log_prefix));
    let _ = RANK.set(rank.unwrap_or(0));
    let _ = LOCAL_RANK.set(local_rank.unwrap_or(0));
    // An error: the program has no such flag.
    let quiet = matches.try_get_one::<bool>("quiet").ok().flatten();
    let _ = IS_QUIET.set(quiet.copied().unwrap_or(false));
    if let Some(code) = ClusterArgs::doctor_in(&matches) {
        return code;
    }
    work(args).unwrap_or_else(|error| {
        output::complain(&error_chain(error.into().as_ref()));
        ExitCode::FAILURE
    })
}
