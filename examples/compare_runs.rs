//! Several runs side by side, in one table and one picture.
//!
//! ```text
//! cargo run --release --example sharded_ps -- --run-dir runs/bsp
//! cargo run --release --example sharded_ps -- --run-dir runs/asp --consistency asp
//! cargo run --release --example compare_runs -- runs/bsp runs/asp --out runs
//! ```
//!
//! Prints a table, and draws the curves of all runs into `runs/compare.svg` and `runs/compare.png`. With a
//! single run, the table also says where that run stands before it has ended.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use ps::cli::{self, say};
use ps::runs::compare;

/// Compares trainings by the directories that they wrote with `--run-dir`.
#[derive(Parser)]
#[command(version, after_help = EXAMPLES)]
struct Args {
    /// The directories of the runs.
    #[arg(required = true)]
    runs: Vec<PathBuf>,
    /// Draw the picture into this directory. Without it, only the table is printed.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

const EXAMPLES: &str = "Examples:
  compare_runs runs/bsp runs/asp              a table of two runs
  compare_runs runs/bsp runs/asp --out runs   and their curves in runs/compare.svg
  compare_runs runs/bsp                       how far a run is that has not ended";

fn main() -> ExitCode {
    cli::main(|args: Args| -> Result<ExitCode> {
        say!("{}", compare(args.runs, args.out.as_deref())?);
        if let Some(directory) = &args.out {
            say!(
                "The curves are in {}.",
                directory.join("compare.svg").display()
            );
        }
        Ok(ExitCode::SUCCESS)
    })
}
