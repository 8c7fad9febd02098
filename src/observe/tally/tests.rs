use super::*;
use ps_actors::ids::Incarnation;

fn step(worker: u32, clock: u64, time: f64, times: StepTimes) -> Event {
    Event::Step(SettledStep {
        time,
        worker: WorkerId(worker),
        incarnation: Incarnation(1),
        clock: Clock(clock),
        computed_on: Version(clock),
        outcome: StepOutcome::Applied,
        version: Version(clock + 1),
        staleness: clock % 3,
        loss: 2.0,
        norm: 1.0,
        num_examples: 10,
        times: Some(times),
    })
}

/// Ten steps of each worker with these times in milliseconds: data, compute, wire.
fn tally(workers: &[[f64; 3]]) -> Tally {
    let mut tally = Tally::default();
    for clock in 0..10 {
        for (worker, [data, compute, wire]) in workers.iter().enumerate() {
            let slow_start = if clock == 0 { 50.0 } else { 1.0 };
            let compute = compute * slow_start;
            let times = StepTimes::new([data / 1e3, compute / 1e3, wire / 1e3, 0.5, 0.25]);
            let time = (clock + 1) as f64;
            tally.count(&step(worker as u32, clock, time, times));
        }
    }
    tally
}

#[test]
fn the_straggler_is_named_with_its_cause() {
    for (workers, expected) in [
        (
            vec![[1.0, 20.0, 2.0], [1.0, 60.0, 2.0], [1.0, 21.0, 2.0]],
            Some((1, Cause::Compute)),
        ),
        (
            vec![[1.0, 20.0, 2.0], [1.0, 22.0, 30.0], [1.0, 21.0, 2.0]],
            Some((1, Cause::Link)),
        ),
        (
            vec![[1.0, 20.0, 2.0], [1.0, 22.0, 2.0], [40.0, 21.0, 2.0]],
            Some((2, Cause::Data)),
        ),
        // Nobody is much slower than the others.
        (vec![[1.0, 20.0, 2.0], [1.0, 24.0, 2.0]], None),
        // Most of them are slow: then no one is.
        (
            vec![
                [1.0, 20.0, 2.0],
                [1.0, 60.0, 2.0],
                [1.0, 62.0, 2.0],
                [1.0, 61.0, 2.0],
            ],
            None,
        ),
        (vec![[1.0, 20.0, 2.0]], None),
        (vec![], None),
    ] {
        let straggler = tally(&workers).straggler();
        let got = straggler.map(|straggler| (straggler.worker.0, straggler.cause));
        assert_eq!(got, expected, "{workers:?}");
    }
    let straggler = tally(&[[1.0, 20.0, 2.0], [1.0, 60.0, 2.0]])
        .straggler()
        .unwrap();
    assert_eq!(
        straggler.to_string(),
        "worker 1 takes 2.7 times as long as the others: it computes slowly (60.0 ms per step, others 20.0 ms)"
    );
}

#[test]
fn the_rate_of_a_worker_is_that_of_the_steps_within_a_known_time() {
    for times in [
        None,
        // Each step takes half a second.
        Some(StepTimes::new([0.1, 0.2, 0.1, 0.1, 0.0])),
    ] {
        let mut tally = Tally::default();
        for clock in 0..3 {
            let Event::Step(mut step) =
                step(0, clock, 4.0 + clock as f64 / 2.0, StepTimes::default())
            else {
                unreachable!("it is a step");
            };
            step.times = times;
            tally.count(&Event::Step(step));
        }
        let rate = tally.workers[&WorkerId(0)].gradients_per_second();
        assert!((rate - 2.0).abs() < 1e-9, "{rate} {times:?}");
    }
}

#[test]
fn a_worker_of_few_steps_is_not_judged() {
    let mut tally = tally(&[[1.0, 20.0, 2.0]]);
    for clock in 0..4 {
        tally.count(&step(
            1,
            clock,
            1.0,
            StepTimes::new([0.0, 9.0, 0.0, 0.0, 0.0]),
        ));
    }
    assert_eq!(tally.straggler(), None);
    tally.count(&step(1, 4, 1.0, StepTimes::new([0.0, 9.0, 0.0, 0.0, 0.0])));
    assert_eq!(tally.straggler().unwrap().worker, WorkerId(1));
}

#[test]
fn shares_add_up_to_one() {
    let tally = tally(&[[10.0, 20.0, 5.0]]);
    let shares = tally.workers[&WorkerId(0)].shares().unwrap();
    assert!((shares.total() - 1.0).abs() < 1e-12, "{shares:?}");
    // 10 ms of data in each of ten steps; 20 ms of computing in nine, and 1 s in the first; 0.5 s of waiting and 0.25 s of
    // the update.
    let total = 0.1 + 0.18 + 1.0 + 0.05 + 5.0 + 2.5;
    assert!((shares.data - 0.1 / total).abs() < 1e-12);
    assert!((shares.compute - 1.18 / total).abs() < 1e-12);
    assert!((shares.apply - 2.5 / total).abs() < 1e-12);
    assert_eq!(
        WorkerTally::default().shares().map(|shares| shares.total()),
        None
    );
}

#[test]
fn rates_are_those_of_the_last_seconds() {
    let mut rate = Rate::default();
    assert_eq!(rate.per_second(3.0), 0.0);
    // 100 per second for 10 s.
    (0..1000).for_each(|n| rate.count(f64::from(n) / 100.0));
    assert!(
        (rate.per_second(10.0) - 100.0).abs() < 3.0,
        "{}",
        rate.per_second(10.0)
    );
    assert!(rate.counts.len() <= 51);
    // Nothing in the 4 s after that.
    assert!(
        (rate.per_second(14.0) - 20.0).abs() < 3.0,
        "{}",
        rate.per_second(14.0)
    );
    assert_eq!(rate.per_second(30.0), 0.0);
    // At the beginning, the time since the first one counts.
    let mut rate = Rate::default();
    (0..50).for_each(|n| rate.count(2.0 + f64::from(n) / 100.0));
    assert!(
        (rate.per_second(2.5) - 100.0).abs() < 10.0,
        "{}",
        rate.per_second(2.5)
    );
}

/// Two workers, each of which is to take ten steps.
fn started() -> Tally {
    let mut tally = Tally::default();
    tally.count(&Event::RunStarted(Box::new(super::super::RunStarted {
        time: 0.0,
        unix_time: 0.0,
        settings: Settings {
            num_workers: 2,
            steps_per_worker: 10,
            ..Settings::default()
        },
        versions: super::super::Versions::here(),
        first_version: Version(0),
    })));
    tally
}

fn joined(worker: u32, next_clock: u64) -> Event {
    Event::WorkerJoined(super::super::WorkerJoined {
        time: 0.0,
        worker: WorkerId(worker),
        node: Some(NodeId::DRIVER),
        next_clock: Clock(next_clock),
    })
}

#[test]
fn a_run_that_goes_on_counts_the_steps_before_it() {
    let mut tally = started();
    // One had taken all its steps.
    tally.count(&joined(0, 10));
    tally.count(&joined(1, 4));
    assert_eq!(tally.steps_done(), (14, 20));
    tally.count(&step(1, 4, 1.0, StepTimes::default()));
    // It was lost, and goes on; the event is of an earlier version.
    tally.count(&joined(1, 0));
    assert_eq!(tally.steps_done(), (15, 20));
}

#[test]
fn a_worker_that_never_came_is_not_live() {
    let mut tally = started();
    assert_eq!((tally.num_workers_live(), tally.num_workers_lost()), (0, 0));
    tally.count(&joined(0, 0));
    assert_eq!(tally.num_workers_live(), 1);
    // The loop of a driver tells only of steps.
    tally.count(&step(1, 0, 1.0, StepTimes::default()));
    assert_eq!(tally.num_workers_live(), 2);
}

#[test]
fn a_worker_that_was_removed_is_not_waited_for() {
    let mut tally = started();
    tally.count(&joined(0, 0));
    for clock in 0..3 {
        tally.count(&step(1, clock, 1.0, StepTimes::default()));
    }
    assert_eq!(tally.steps_done(), (3, 20));
    let worker = WorkerId(1);
    tally.count(&Event::Controlled(super::super::Controlled {
        time: 2.0,
        change: Change::WorkerRemoved { worker },
    }));
    assert_eq!(tally.steps_done(), (3, 13));
    assert_eq!((tally.num_workers_live(), tally.num_workers_lost()), (1, 0));
}

#[test]
fn events_are_counted() {
    let mut tally = tally(&[[1.0, 20.0, 2.0], [1.0, 20.0, 2.0]]);
    assert_eq!((tally.num_steps(), tally.num_applied()), (20, 20));
    assert_eq!((tally.version, tally.staleness.max()), (Version(10), 2));
    assert_eq!(tally.loss(), Some(2.0));
    tally.count(&Event::StepsMissed(super::super::StepsMissed {
        time: 11.0,
        worker: WorkerId(1),
        first: Clock(10),
        num_steps: 3,
    }));
    tally.count(&Event::WorkerLost(super::super::WorkerLost {
        time: 12.0,
        worker: WorkerId(1),
        node: Some(NodeId::DRIVER),
        reason: "test".to_owned(),
    }));
    assert_eq!((tally.num_steps(), tally.num_workers_lost()), (23, 1));
    tally.count(&Event::WorkerJoined(super::super::WorkerJoined {
        time: 13.0,
        worker: WorkerId(1),
        node: Some(NodeId::DRIVER),
        next_clock: Clock(13),
    }));
    assert_eq!((tally.num_workers_lost(), tally.seconds), (0, 13.0));
    let worker = &tally.workers[&WorkerId(1)];
    assert_eq!((worker.num_losses, worker.num_steps()), (1, 13));
    assert!((worker.gradients_per_second() - 13.0 / 10.0).abs() < 0.1);
}
