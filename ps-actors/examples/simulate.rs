//! Simulates a training with many workers and servers in virtual time: the code that decides is that of real
//! servers, and nothing else is real.
//!
//! ```text
//! cargo run --release -p ps-actors --features simulation --example simulate
//! cargo run --release -p ps-actors --features simulation --example simulate -- --cost
//! cargo run -p ps-actors --features simulation --example simulate -- \
//!     --workers 4 --servers 3 --chaos "kill worker 2 @ step 4; kill server 1 @ version 10; drop 5%; seed 7"
//! ```
//!
//! The first prints one line per consistency mode. As the bound grows, workers wait less and compute on older
//! weights, so the time to a given loss is shortest in between (Li et al., OSDI 2014, figure 12). The second
//! prints what a push costs the first server, which should hardly depend on the number of workers. The third prints
//! which faults happened and what they cost, beside the same run without faults.

use std::error::Error;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use ps_actors::chaos::Plan;
use ps_actors::server::Consistency;
use ps_actors::simulation::{Settings, simulate, simulate_with_trace};

/// Simulates a training in virtual time.
#[derive(Parser)]
struct Args {
    /// The number of workers.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    workers: u32,
    /// The number of servers.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u16).range(1..=4096))]
    servers: u16,
    /// How many steps each worker takes, for --chaos.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    steps: u64,
    /// How many seconds of virtual time are simulated for each mode. A step takes 0.1 s on average.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=3600))]
    seconds: u64,
    /// The learning rate of one gradient, times the number of workers.
    #[arg(long, default_value_t = 1.8)]
    learning_rate: f64,
    /// The consistency mode, for --chaos: bsp, asp, ssp:BOUND or k-of-n:K.
    #[arg(long, default_value = "asp")]
    consistency: Consistency,
    /// Follows this plan of faults, such as "kill worker 2 @ step 40; drop 5%; seed 7".
    #[arg(long, conflicts_with = "cost")]
    chaos: Option<Plan>,
    /// Prints every event of the run with faults if it fails.
    #[arg(long)]
    trace: bool,
    /// Measures what a push costs with 10, 100 and 1,000 workers.
    #[arg(long)]
    cost: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let done = match &args.chaos {
        Some(plan) => chaos(&args, plan),
        None if args.cost => cost(),
        None => modes(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The loss that a run should reach, of 0.31 at first.
const TARGET: f64 = 0.002;

fn modes(args: &Args) -> Result<(), Box<dyn Error>> {
    let (workers, servers) = (args.workers, usize::from(args.servers));
    let time = Duration::from_secs(args.seconds);
    println!("{workers} workers, {servers} servers, {time:?} of virtual time for each mode");
    println!(
        "{:<12} {:>12} {:>7} {:>10} {:>10} {:>12}",
        "consistency",
        "gradients/s",
        "idle",
        "staleness",
        "largest",
        format!("to loss {TARGET}")
    );
    let ssp = |bound| Consistency::Ssp { bound };
    let most = (workers as usize * 9).div_ceil(10);
    for consistency in [
        Consistency::Bsp,
        Consistency::KofN { k: most },
        ssp(0),
        ssp(1),
        ssp(2),
        ssp(4),
        ssp(8),
        Consistency::Asp,
    ] {
        let rate = args.learning_rate;
        let mut settings = Settings::stragglers(workers, servers, consistency, rate, TARGET);
        (settings.num_steps, settings.run_for) = (u64::MAX, Some(time));
        let outcome = simulate(settings)?;
        let target = outcome.time_to_target;
        println!(
            "{:<12} {:>12.0} {:>5.1} % {:>10.1} {:>10} {:>12}",
            consistency.to_string(),
            outcome.report.work.per_second(),
            100.0 * outcome.idle,
            outcome.mean_staleness,
            outcome.max_staleness,
            target.map_or("not reached".to_owned(), |time| format!(
                "{:.2} s",
                time.as_secs_f64()
            )),
        );
    }
    Ok(())
}

fn cost() -> Result<(), Box<dyn Error>> {
    println!("What a push costs the first server, of 16 weights");
    println!(
        "{:<12} {:>9} {:>9} {:>9} {:>7}",
        "consistency", "10", "100", "1000", "ratio"
    );
    for consistency in [
        Consistency::Bsp,
        Consistency::KofN { k: 9 },
        Consistency::Ssp { bound: 2 },
        Consistency::Asp,
    ] {
        let mut times = Vec::new();
        for workers in [10, 100, 1000] {
            let consistency = match consistency {
                Consistency::KofN { k } => Consistency::KofN {
                    k: k * workers as usize / 10,
                },
                other => other,
            };
            let mut settings = Settings::stragglers(workers, 1, consistency, 0.2, TARGET);
            // About the same number of pushes for each.
            let time = Duration::from_millis(u64::from(2_000_000 / workers));
            (settings.num_steps, settings.run_for) = (u64::MAX, Some(time));
            times.push(simulate(settings)?.time_per_push.as_secs_f64() * 1e6);
        }
        let ratio = times[2] / times[0];
        let name = consistency.to_string();
        let name = name.split(':').next().unwrap_or_default();
        println!(
            "{name:<12} {:>6.2} µs {:>6.2} µs {:>6.2} µs {ratio:>7.2}",
            times[0], times[1], times[2]
        );
    }
    Ok(())
}

fn chaos(args: &Args, plan: &Plan) -> Result<(), Box<dyn Error>> {
    let mut settings = Settings::new(args.workers, usize::from(args.servers), args.consistency);
    settings.num_steps = args.steps;
    settings.worker_lease = Some(Duration::from_millis(500));
    let without = Plan {
        seed: plan.seed,
        ..Plan::default()
    };
    let control = simulate(settings.clone().with_plan(without))?;
    let settings = settings.with_plan(plan.clone());
    let run = match args.trace {
        true => simulate_with_trace(settings),
        false => simulate(settings),
    };
    let mut report = run?.report;
    report.control = Some(control.report.work);
    println!("{plan}\n{report}");
    match report.is_complete() {
        true => Ok(()),
        false => Err("a fault of the plan did not happen: the run ended before".into()),
    }
}
