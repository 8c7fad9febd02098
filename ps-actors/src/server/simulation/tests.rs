//! Many seeds, and mistakes that are made on purpose.

use std::time::Duration;

use super::settings::Mistake;
use super::*;
use crate::server::Consistency;

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{variable} is no number: {text}")),
    )
}

#[test]
fn random_runs_keep_all_guarantees_and_reach_every_state() {
    let mut coverage = Coverage::default();
    let num_seeds = number("PS_SIM_SEEDS").unwrap_or(200);
    let first = number("PS_SIM_SEED");
    let seeds = first.map_or(0..num_seeds, |seed| seed..seed + 1);
    for seed in seeds {
        let settings = Settings::random(seed);
        let run = match first {
            Some(_) => simulate_with_trace(settings.clone()),
            None => simulate(settings.clone()),
        };
        let outcome = run.unwrap_or_else(|failure| {
            panic!(
                "seed {seed}: {failure}\nto see all events: PS_SIM_SEED={seed} cargo test --workspace \
                 random_runs_keep -- --nocapture"
            )
        });
        if seed % 10 == 0 {
            let again = simulate(settings).expect("it was right before");
            assert_eq!(
                again.trace_hash, outcome.trace_hash,
                "seed {seed} gives two traces"
            );
        }
        coverage.add(&outcome.coverage);
    }
    eprintln!("{coverage}");
    if first.is_none() && num_seeds >= 200 {
        assert_eq!(coverage.missing(), [], "never reached");
    }
}

/// Each mistake must be found by some seed. Returns what the first such seed says.
fn first_failure(mistake: Mistake) -> Option<(u64, String)> {
    (0..600).find_map(|seed| {
        let mut settings = Settings::random(seed);
        settings.mistake = Some(mistake);
        if mistake == Mistake::WritesBehindTornEnd {
            // This needs two losses, one after the other.
            let sync_every = std::time::Duration::from_millis(50);
            settings.saving = Saving::Log { sync_every };
            let plan = "lose power @ version 3; kill server 0 @ version 7";
            settings.plan = plan.parse().expect("a plan");
        }
        let failure = simulate(settings).err()?;
        Some((seed, failure.reason))
    })
}

#[test]
fn mistakes_that_are_made_on_purpose_are_found() {
    for (mistake, expected) in [
        (Mistake::AnswersBeforeLog, "acknowledged"),
        (Mistake::ForgetsLedger, "was applied by"),
        (Mistake::FollowsTwice, "waits for ever"),
        (Mistake::TornCheckpoint, "other weights"),
        (Mistake::WritesBehindTornEnd, "lost"),
        (Mistake::NeverRejoins, "waits for ever"),
    ] {
        let (seed, reason) = first_failure(mistake).unwrap_or_else(|| panic!("{mistake:?}"));
        eprintln!(
            "{mistake:?}: seed {seed}: {}",
            reason.lines().next().unwrap_or("")
        );
        assert!(
            reason.contains(expected),
            "{mistake:?}, seed {seed}: {reason}"
        );
    }
}

/// Li et al., OSDI 2014, figures 12 and 13: as the bound grows, workers wait less and compute on older weights, so the
/// time to a given loss is shortest in between. Everything is in virtual time, so the numbers are the same on every machine.
#[test]
fn a_bounded_delay_is_faster_than_none_and_than_no_bound() {
    const NUM_SEEDS: u64 = 5;
    const LENGTH: Duration = Duration::from_secs(4);
    let ssp = |bound| Consistency::Ssp { bound };
    let modes = [ssp(0), ssp(1), ssp(2), ssp(4), ssp(8), Consistency::Asp];
    // The idle share, the staleness, and the seconds to the loss. In a single run, which worker happens to be the slowest
    // matters more than the bound, so these are means.
    let shapes = modes.map(|consistency| {
        let outcomes = (0..NUM_SEEDS).map(|seed| {
            let mut settings = Settings::stragglers(60, 2, consistency, 1.8, 0.002);
            settings.seed = seed;
            (settings.num_steps, settings.run_for) = (u64::MAX, Some(LENGTH));
            simulate(settings).unwrap_or_else(|failure| panic!("seed {seed}: {failure}"))
        });
        let sums = outcomes.fold([0.0; 3], |[idle, staleness, time], outcome| {
            let reached = outcome.time_to_target.unwrap_or(LENGTH).as_secs_f64();
            [
                idle + outcome.idle,
                staleness + outcome.mean_staleness,
                time + reached,
            ]
        });
        sums.map(|sum| sum / NUM_SEEDS as f64)
    });
    for (pair, modes) in shapes.windows(2).zip(modes.windows(2)) {
        let [[idle, staleness, _], [next_idle, next_staleness, _]] = [pair[0], pair[1]];
        assert!(next_idle < idle, "idle, {modes:?}: {shapes:?}");
        assert!(
            next_staleness > staleness,
            "staleness, {modes:?}: {shapes:?}"
        );
    }
    let [[first_idle, _, first], .., [last_idle, _, last]] = shapes;
    assert!(first_idle > 0.5 && last_idle < 0.05, "{shapes:?}");
    let best = shapes[1..5].iter().map(|[_, _, time]| *time);
    let best = best.fold(f64::INFINITY, f64::min);
    assert!(best < 0.9 * first && best < 0.9 * last, "{shapes:?}");
}

#[test]
fn a_plan_is_followed_and_reported() {
    let plan = "kill worker 2 @ step 4; stop worker 1 for 3s @ step 2; kill server 1 @ version 10; \
                stop server 0 for 50ms @ version 15; drop 5%; dup 2%; delay 1..3ms; seed 7";
    let mut settings = Settings::new(4, 3, crate::server::Consistency::Asp);
    settings.worker_lease = Some(std::time::Duration::from_millis(200));
    let outcome = simulate(settings.with_plan(plan.parse().unwrap())).unwrap();
    let report = outcome.report;
    assert!(report.is_complete(), "{report}");
    assert_eq!(report.recoveries.len(), 1, "{report}");
    assert_eq!(
        (report.num_lost, report.work.num_applied),
        (Some(0), 40),
        "{report}"
    );
    assert!(report.faults["drop"].num_happened > 0 && report.faults["dup"].num_happened > 0);
}
