//! The text of a plan reads back, and what is no plan is refused with its place.

use std::time::Duration;

use proptest::prelude::*;

use super::*;

fn fault() -> impl Strategy<Value = Fault> {
    let micros = prop_oneof![0..1_000_000_000u64, (0..10_000u64).prop_map(|ms| ms * 1000)];
    (0..6u8, any::<u32>(), any::<u64>(), micros).prop_map(|(kind, who, at, micros)| {
        let (worker, server) = (who, who as usize);
        let (step, version) = (at, at);
        let pause = Duration::from_micros(micros);
        match kind {
            0 => Fault::KillWorker { worker, step },
            1 => Fault::StopWorker {
                worker,
                pause,
                step,
            },
            2 => Fault::KillServer { server, version },
            3 => Fault::StopServer {
                server,
                pause,
                version,
            },
            4 => Fault::LosePower { version },
            _ => Fault::DamageCheckpoint { version },
        }
    })
}

fn plan() -> impl Strategy<Value = Plan> {
    let share = || prop_oneof![Just(0.0), 0.0..=MAX_PERCENT, (1..90u8).prop_map(f64::from)];
    let times = (any::<u32>(), any::<u32>(), prop_oneof![Just(1), Just(1000)]);
    let delay = times.prop_map(|(a, b, unit)| {
        let time = |n: u32| Duration::from_micros(u64::from(n) * unit);
        (time(a.min(b)), time(a.max(b)))
    });
    (
        proptest::collection::vec(fault(), 0..6),
        share(),
        share(),
        proptest::option::of(delay),
        proptest::option::of(any::<u64>()),
    )
        .prop_map(|(faults, drop_percent, dup_percent, delay, seed)| Plan {
            faults,
            drop_percent,
            dup_percent,
            delay,
            seed,
        })
}

/// Pieces of plans, so that random texts come far into the parser.
fn almost_a_plan() -> impl Strategy<Value = String> {
    const PIECES: [&str; 30] = [
        "kill",
        "stop",
        "lose",
        "damage",
        "drop",
        "dup",
        "delay",
        "seed",
        "worker",
        "server",
        "power",
        "checkpoint",
        "for",
        "@",
        "step",
        "version",
        "5%",
        "100%",
        "1e9%",
        "20..80ms",
        "80..20ms",
        "1s..2min",
        "3s",
        "0us",
        "-1",
        "18446744073709551616",
        "7",
        ";",
        "..",
        "é",
    ];
    proptest::collection::vec(0..PIECES.len(), 0..12).prop_map(|words| {
        let words: Vec<&str> = words.into_iter().map(|index| PIECES[index]).collect();
        words.join(" ")
    })
}

proptest! {
    #[test]
    fn every_plan_reads_back_what_it_prints(plan in plan()) {
        prop_assert_eq!(plan.to_string().parse(), Ok(plan));
    }

    #[test]
    fn any_text_is_a_plan_or_an_error_that_names_a_clause(
        text in prop_oneof![any::<String>(), almost_a_plan()]
    ) {
        match text.parse::<Plan>() {
            Ok(plan) => prop_assert_eq!(plan.to_string().parse(), Ok(plan)),
            Err(error) => {
                let clause = text.split(';').nth(error.number - 1);
                prop_assert_eq!(clause.map(str::trim), Some(&error.clause[..]));
                prop_assert!(!error.reason.is_empty());
            }
        }
    }
}

#[test]
fn the_whole_grammar_in_one_plan() {
    let text = "kill worker 2 @ step 40; stop worker 1 for 3s @ step 10; kill server 1 @ version 100; \
                stop server 0 for 500ms @ version 7; lose power @ version 30; \
                damage checkpoint @ version 30; drop 5%; dup 2.5%; delay 20..80ms; seed 7";
    let plan: Plan = text.parse().unwrap();
    assert_eq!(plan.to_string(), text);
    assert_eq!(plan.faults.len(), 6);
    // Spaces do not matter, and the last clause may end like the others.
    assert_eq!(
        " kill  worker 2@step 40 ;delay 20ms..80ms; ".parse(),
        Ok(Plan {
            faults: vec![plan.faults[0]],
            delay: plan.delay,
            ..Plan::default()
        })
    );
    assert_eq!("".parse(), Ok(Plan::default()));
}

#[test]
fn errors_point_at_the_clause_and_say_how_to_write_it() {
    for (text, number, part) in [
        (
            "drop 5",
            1,
            "`5` has no percent sign; write it as `drop 5%`",
        ),
        ("seed 7; drop 95%", 2, "from 0 to 90"),
        ("drop NaN%", 1, "from 0 to 90"),
        ("drop 5%; seed 1; drop 6%", 3, "there is a `drop` already"),
        (
            "kill worker @ step 4",
            1,
            "the worker's number instead of `@`",
        ),
        ("kill worker -1 @ step 4", 1, "instead of `-1`"),
        (
            "kill process 1 @ step 4",
            1,
            "`worker` or `server` instead of `process`",
        ),
        ("kill server 1 @ step 4", 1, "`version` instead of `step`"),
        ("kill worker 1 @ step 4 hard", 1, "`hard` is too much"),
        ("stop worker 1 @ step 4", 1, "expected `for` instead of `@`"),
        (
            "stop worker 1 for 3 @ step 4",
            1,
            "with us, ms, s or min instead of `3`",
        ),
        (
            "stop worker 1 for 99999999999999999min @ step 4",
            1,
            "instead of",
        ),
        ("delay 80..20ms", 1, "the first delay is longer"),
        ("delay 20ms", 1, "a range instead of `20ms`"),
        ("; seed 7", 1, "it is empty"),
        ("seed 7;;", 2, "it is empty"),
        ("sneeze", 1, "begins with kill, stop"),
        ("seed", 1, "a seed at the end"),
    ] {
        let error = text.parse::<Plan>().unwrap_err();
        assert_eq!(error.number, number, "{text}: {error}");
        assert!(error.to_string().contains(part), "{text}: {error}");
    }
}

#[test]
fn a_report_shows_what_happened_and_what_did_not() {
    let mut report = Report::default();
    report.plan("kill worker");
    assert!(!report.is_complete());
    report.happened("kill worker");
    report.happened("drop");
    assert!(report.is_complete());
    report.work = Work {
        num_applied: 50,
        time: Duration::from_secs(10),
    };
    report.control = Some(Work {
        num_applied: 50,
        time: Duration::from_secs(5),
    });
    report.num_lost = Some(0);
    report.recoveries = vec![Duration::from_millis(300), Duration::from_millis(100)];
    let text = report.to_string();
    for part in [
        "kill worker                 1         1",
        "drop                        -         1",
        "50 applied, lost: 0, doubled: not known",
        "recoveries: 2, median 300.000ms, longest 300.000ms",
        "5.0 gradients/s, 50 % of 10.0 without faults",
    ] {
        assert!(text.contains(part), "{part}\n{text}");
    }
}
