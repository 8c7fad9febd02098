//! The same work on this project and on what people use today, in turn, in one run.
//!
//! ```text
//! cargo run --release -p ps-bench --bin compare
//! cargo run --release -p ps-bench --bin compare -- --quick --only ps
//! ```
//!
//! Installs the rivals into a virtual environment of their own, runs every contender once per round,
//! each round in another order, and writes `results.json`, `results.md` and `results.svg`.
//!
//! | module | what it holds |
//! |---|---|
//! | `contenders` | works, contenders, metrics, and what we want to reach |
//! | `run`, `processes` | one run, watched from outside: start-up, memory, processor time |
//! | `rivals` | their virtual environment; the programs are in `rivals/` |
//! | `measure`, `ours`, `remote_forward`, `transfer` | our own contenders, each in a process of its own |
//! | `stats`, `results`, `table`, `picture` | what came out |

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};
use ps::dataset::DataSource;
use ps::prelude::{Mnist, MnistOptions};

mod contenders;
mod measure;
mod ours;
mod picture;
mod processes;
mod remote_forward;
mod results;
mod rivals;
mod run;
mod stats;
mod table;
mod transfer;

use contenders::{Contender, Lengths, Work};
use results::Results;
use run::Surroundings;

/// Runs the same work on this project and on its rivals, in turn.
#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    part: Option<Part>,
    /// What is done.
    #[arg(long, value_delimiter = ',', default_values = ["convnet", "net", "transfer"])]
    works: Vec<Work>,
    /// Only contenders whose name begins like one of these, such as `ps`, `ray`, `torch-single`.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// How many times everything is done.
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// Length of the timed part of a training, in seconds; twice that for `net`, half for each size
    /// of a transfer.
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// Accuracy up to which `convnet` is trained first, in percent: times to 90, 95 and 97 % are
    /// reported if they do not exceed it. 0: none.
    #[arg(long, default_value_t = 95.0)]
    target: f64,
    /// Longest time for that, in seconds.
    #[arg(long, default_value_t = 40.0)]
    max_seconds: f64,
    /// Parts of seconds for everything: shows that it runs, measures nothing.
    #[arg(long)]
    quick: bool,
    /// Directory with the four MNIST files. Default: as in the examples.
    #[arg(long)]
    data_dir: Option<PathBuf>,
    /// The rivals' virtual environment, made if it is not there. Default: in the user's cache.
    #[arg(long)]
    venv: Option<PathBuf>,
    /// Where the results are written.
    #[arg(long, default_value = "target/compare")]
    out: PathBuf,
}

#[derive(Subcommand)]
enum Part {
    /// One run of ours in training; used by `compare` itself.
    #[command(hide = true)]
    Train(ours::Ours),
    /// One run of ours through a served model; used by `compare` itself.
    #[command(hide = true)]
    RemoteForward(remote_forward::RemoteForward),
    /// One run of ours in calls; used by `compare` itself.
    #[command(hide = true)]
    Transfer(transfer::Transfer),
}

fn main() -> Result<()> {
    let mut args = Args::parse();
    match args.part.take() {
        Some(Part::Train(ours)) => ours.run(),
        Some(Part::RemoteForward(ours)) => ours.run(),
        Some(Part::Transfer(transfer)) => transfer.run(),
        None => compare(&args),
    }
}

fn compare(args: &Args) -> Result<()> {
    ensure!(args.runs > 0, "--runs must be at least 1");
    let seconds = args.seconds;
    ensure!(
        seconds.is_finite() && seconds > 0.0,
        "--seconds must be above 0"
    );
    let lengths = Lengths {
        is_quick: args.quick,
        seconds: if args.quick { 0.2 } else { seconds },
        target: if args.quick { 0.0 } else { args.target },
        max_seconds: args.max_seconds,
    };
    let (surroundings, no_rivals) = surroundings(args, &lengths)?;
    let is_wanted = |contender: &Contender| {
        (contender.is_ours() || no_rivals.is_none()) && is_named(&args.only, contender)
    };
    let works = args.works.iter();
    let mut all: Vec<_> = works
        .map(|work| {
            let mut contenders = work.contenders(&lengths);
            contenders.retain(is_wanted);
            Results::new(*work, contenders)
        })
        .collect();
    for round in 0..args.runs {
        for results in &mut all {
            run_round(round, results, args.quick, &surroundings);
        }
        // What is there is kept if the next round is cut off.
        write(args, &all, no_rivals.as_deref(), round + 1)?;
    }
    let failed = |results: &Results| results.ours().any(|runs| runs.num_failed() > 0);
    ensure!(!all.iter().any(failed), "a run of ours failed");
    Ok(())
}

fn is_named(only: &[String], contender: &Contender) -> bool {
    only.is_empty() || only.iter().any(|name| contender.name.starts_with(name))
}

/// Returns what runs need, and why there are no rivals if there are none.
fn surroundings(args: &Args, lengths: &Lengths) -> Result<(Surroundings, Option<String>)> {
    let bench = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut surroundings = Surroundings {
        python: PathBuf::new(),
        rivals: bench.join("rivals"),
        data_dir: args.data_dir.clone(),
    };
    let mut works = args.works.iter();
    let has_rivals = works.any(|work| {
        let contenders = work.contenders(lengths);
        let mut rivals = contenders.iter().filter(|contender| !contender.is_ours());
        rivals.any(|rival| is_named(&args.only, rival))
    });
    if !has_rivals {
        return Ok((surroundings, None));
    }
    // All contenders read the same files.
    let mnist = Mnist::load(&MnistOptions {
        directory: args.data_dir.clone(),
        ..MnistOptions::default()
    })?;
    let directory = match mnist.source {
        DataSource::Directory(path) | DataSource::Cache(path) | DataSource::Downloaded(path) => {
            Ok(path)
        }
        // Calls need no data.
        _ if args.works.iter().all(|work| *work == Work::Transfer) => Ok(PathBuf::from(".")),
        source => Err(format!("there is no MNIST for them, but {source}")),
    };
    let venv = args
        .venv
        .clone()
        .unwrap_or_else(rivals::default_environment);
    let ready = directory.and_then(|directory| {
        let python = rivals::install(&venv, &bench.join("requirements.txt"));
        Ok((directory, python.map_err(|error| format!("{error:#}"))?))
    });
    match ready {
        Ok((directory, python)) => {
            // A folder given by the user may be relative to where we are.
            surroundings.data_dir = Some(directory.canonicalize().context("the data has moved")?);
            surroundings.python = python;
            Ok((surroundings, None))
        }
        Err(reason) => {
            eprintln!("The rivals cannot run, ours does alone: {reason}");
            Ok((surroundings, Some(reason)))
        }
    }
}

/// Runs everybody once, each round beginning with another.
fn run_round(round: usize, results: &mut Results, is_quick: bool, surroundings: &Surroundings) {
    let work = results.work;
    let (key, count) = (work.metrics()[0].key, results.runs.len());
    for turn in 0..count {
        let runs = &mut results.runs[(round + turn) % count];
        let least_accuracy = contenders::least_accuracy(work, is_quick);
        let outcome = run::run(&runs.contender, surroundings, least_accuracy);
        let outcome = outcome.map_err(|error| format!("{error:#}"));
        let said = match &outcome {
            Ok(metrics) => format!("{key} {:.2}", metrics.get(key).unwrap_or(&f64::NAN)),
            Err(error) => error.clone(),
        };
        let (title, name) = (work.title(), &runs.contender.name);
        println!("round {}, {title}, {name}: {said}", round + 1);
        runs.rounds.push(outcome);
    }
}

fn write(args: &Args, all: &[Results], no_rivals: Option<&str>, num_runs: usize) -> Result<()> {
    fs::create_dir_all(&args.out).context("the folder for the results cannot be made")?;
    let requirements = include_str!("../requirements.txt");
    let versions: Vec<_> = requirements
        .lines()
        .filter(|line| !line.starts_with('#'))
        .collect();
    let machine = machine();
    let mut markdown = format!(
        "# ps beside other frameworks\n\n{machine}. ps {}, {}. Medians of {} runs in turn, in \
         brackets the least and the most. \"Times better\" pairs the runs of one round.\n\n",
        env!("CARGO_PKG_VERSION"),
        versions.join(", "),
        num_runs,
    );
    if let Some(reason) = no_rivals {
        markdown.push_str(&format!("No rivals took part: {reason}\n\n"));
    }
    for results in all {
        markdown.push_str(&table::markdown(results));
    }
    let works: Vec<_> = all.iter().map(Results::json).collect();
    let json = serde_json::json!({
        "machine": machine,
        "ps": env!("CARGO_PKG_VERSION"),
        "rivals": versions,
        "no_rivals": no_rivals,
        "num_runs": num_runs,
        "works": works,
    });
    fs::write(
        args.out.join("results.json"),
        serde_json::to_string_pretty(&json)?,
    )?;
    fs::write(args.out.join("results.md"), &markdown)?;
    picture::draw(&args.out.join("results.svg"), all)?;
    if num_runs == args.runs {
        println!(
            "\n{markdown}\nIn {}: results.md, results.json, results.svg",
            args.out.display()
        );
    }
    Ok(())
}

/// Names the machine: other numbers mean nothing without it.
fn machine() -> String {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name"));
    let model = model.map_or("an unknown processor", |rest| {
        rest.trim_matches([' ', '\t', ':'])
    });
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    format!("{model}, {cores} cores")
}
