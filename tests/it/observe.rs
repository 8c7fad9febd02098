//! Observers see every settled step exactly once, wherever the workers are, and harm no training.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::mpsc::{Receiver, channel};

use ps::observe::{Event, Observer, RunSummary, SettledStep, StepOutcome};
use ps::prelude::*;

use crate::nodes::{transports, with_two_nodes};

const NUM_STEPS: u64 = 12;

fn trainer() -> Trainer<ConvNet, ImageDataset> {
    let device = select_device(default_device_name()).unwrap();
    let Mnist { train, test, .. } = Mnist::bundled_sample();
    Trainer::new(ConvNet::init(3, &device), train)
        .device(&device)
        .test_data(test)
        .workers(2)
        .batch_size(16)
        .iterations(NUM_STEPS)
}

/// An observer, and what it saw.
fn observer() -> (impl Observer, Receiver<Event>) {
    let (sender, events) = channel();
    let observer = move |event: &Event| {
        // A test that has failed takes no more.
        let _ = sender.send(event.clone());
    };
    (observer, events)
}

fn steps(events: &[Event]) -> Vec<&SettledStep> {
    let steps = events.iter().filter_map(|event| match event {
        Event::Step(step) => Some(step),
        _ => None,
    });
    steps.collect()
}

/// Checks that each worker's steps are there once, in order, and that the numbers fit the report.
fn check(events: &[Event], report: &Report, what: &str) {
    assert!(
        matches!(events.first(), Some(Event::RunStarted(_))),
        "{what}: {:?}",
        events.first()
    );
    let Some(Event::RunEnded(end)) = events.last() else {
        panic!("{what}: {:?}", events.last());
    };
    assert_eq!(end.error, None, "{what}");
    assert_eq!(
        end.report.as_ref(),
        Some(&RunSummary::from(report)),
        "{what}"
    );
    let mut clocks: BTreeMap<WorkerId, Vec<u64>> = BTreeMap::new();
    let mut latest: BTreeMap<WorkerId, f64> = BTreeMap::new();
    let mut outcomes = BTreeMap::new();
    let mut staleness = vec![0; report.staleness.counts().len()];
    for step in steps(events) {
        clocks.entry(step.worker).or_default().push(step.clock.0);
        *outcomes.entry(format!("{:?}", step.outcome)).or_insert(0) += 1;
        let losses = &report.losses[step.worker.0 as usize];
        assert_eq!(step.loss, losses[step.clock.0 as usize], "{what}: {step:?}");
        assert!(step.norm > 0.0 && step.norm.is_finite(), "{what}: {step:?}");
        assert_eq!(step.num_examples, 16, "{what}: {step:?}");
        let times = step.times.expect("the workers measure them");
        let parts = times.parts();
        assert!(parts.iter().all(|&part| part >= 0.0), "{what}: {step:?}");
        assert!(times.compute > 0.0 && times.wire > 0.0, "{what}: {step:?}");
        assert!(times.total() < end.time, "{what}: {step:?}");
        let is_applied = step.outcome == StepOutcome::Applied;
        assert_eq!(times.apply > 0.0, is_applied, "{what}: {step:?}");
        let before = latest.insert(step.worker, step.time).unwrap_or_default();
        assert!(
            step.time >= before && step.time <= end.time,
            "{what}: {step:?}"
        );
        if step.outcome == StepOutcome::Applied {
            assert_eq!(
                step.version.0,
                step.computed_on.0 + step.staleness + 1,
                "{what}: {step:?}"
            );
            staleness[step.staleness as usize] += 1;
        }
    }
    let expected: Vec<u64> = (0..NUM_STEPS).collect();
    for rank in 0..report.num_workers as u32 {
        assert_eq!(clocks[&WorkerId(rank)], expected, "{what}: worker {rank}");
    }
    let count = |name: &str| outcomes.get(name).copied().unwrap_or(0);
    assert_eq!(count("Applied"), report.num_applied, "{what}");
    assert_eq!(count("Late"), report.num_dropped_late, "{what}");
    assert_eq!(staleness, report.staleness.counts(), "{what}");
    assert!(
        !events
            .iter()
            .any(|event| matches!(event, Event::StepsMissed(_))),
        "{what}"
    );
}

#[test]
fn every_settled_step_is_one_event_in_every_mode() {
    for mode in ["bsp", "asp", "ssp:1", "k-of-n:1"] {
        let (observer, events) = observer();
        let report = trainer()
            .servers(2)
            .consistency(mode.parse().unwrap())
            .evaluate_every(5)
            .observe(observer)
            .run()
            .unwrap();
        let events: Vec<Event> = events.iter().collect();
        check(&events, &report, mode);
        let evaluations = events.iter().filter_map(|event| match event {
            Event::Evaluated(evaluated) => Some(evaluated),
            _ => None,
        });
        let evaluations: Vec<_> = evaluations.collect();
        let (last, before) = evaluations.split_last().unwrap();
        assert!(last.is_final && last.version == report.weights.version());
        assert_eq!(last.accuracy, report.final_accuracy());
        assert_eq!(before.len(), report.curve.len());
        let Event::RunStarted(started) = &events[0] else {
            unreachable!("it was checked");
        };
        assert_eq!(started.settings.consistency, mode);
        assert_eq!(started.settings.num_workers, 2);
        assert_eq!(started.settings.steps_per_worker, NUM_STEPS);
        assert_eq!(started.settings.num_weights, report.weights.len());
    }
}

#[test]
fn observing_changes_no_bit() {
    let (observer, events) = observer();
    let observed = trainer().observe(observer).run().unwrap();
    let alone = trainer().run().unwrap();
    assert!(observed.weights.to_vec() == alone.weights.to_vec());
    assert_eq!(observed.losses, alone.losses);
    check(&events.iter().collect::<Vec<_>>(), &observed, "bsp");
}

#[test]
fn workers_and_servers_of_other_processes_are_observed() {
    for transport in transports() {
        let (observer, events) = observer();
        let trainer = trainer()
            .servers(2)
            .servers_on_nodes(true)
            .observe(observer);
        let hosts = trainer.hosts(Hosts::new()).unwrap();
        let report = with_two_nodes(transport.clone(), hosts, |cluster| {
            trainer.run_on(cluster).unwrap()
        });
        let events: Vec<Event> = events.iter().collect();
        let what = format!("{transport:?}");
        check(&events, &report, &what);
        let nodes = events.iter().filter_map(|event| match event {
            Event::NodeJoined(joined) => Some(joined.node.rank),
            _ => None,
        });
        assert_eq!(nodes.collect::<Vec<_>>(), [1, 2], "{what}");
        let mut workers: Vec<_> = events
            .iter()
            .filter_map(|event| match event {
                Event::WorkerJoined(joined) => Some((joined.worker.0, joined.node?.rank)),
                _ => None,
            })
            .collect();
        workers.sort_unstable();
        let ranks: Vec<u32> = workers.iter().map(|(rank, _)| *rank).collect();
        assert_eq!(ranks, [0, 1], "{what}");
        assert!(
            workers.iter().all(|(_, node)| [1, 2].contains(node)),
            "{what}"
        );
    }
}

/// Follows each gradient.
struct Follower<O>(O);

impl<O: Observer> Observer for Follower<O> {
    fn observe(&mut self, event: &Event) {
        self.0.observe(event);
    }

    fn follows_gradients(&self) -> bool {
        true
    }
}

/// The others learn nothing of it.
#[test]
fn who_follows_each_gradient_learns_when_each_server_had_applied_it() {
    for (transport, mode) in transports().into_iter().zip(["asp", "bsp"].iter().cycle()) {
        let ((follower, followed), (observer, events)) = (observer(), observer());
        let trainer = trainer()
            .servers(3)
            .servers_on_nodes(true)
            .consistency(mode.parse().unwrap())
            .observe(Follower(follower))
            .observe(observer);
        let hosts = trainer.hosts(Hosts::new()).unwrap();
        let report = with_two_nodes(transport.clone(), hosts, |cluster| {
            trainer.run_on(cluster).unwrap()
        });
        let what = format!("{transport:?} {mode}");
        let events: Vec<Event> = events.iter().collect();
        check(&events, &report, &what);
        let is_part = |event: &&Event| matches!(event, Event::PartApplied(_));
        assert_eq!(events.iter().filter(is_part).count(), 0, "{what}");
        let followed: Vec<Event> = followed.iter().collect();
        check(&followed, &report, &what);
        let (mut versions, mut parts) = (BTreeMap::new(), BTreeSet::new());
        let mut nodes = Vec::new();
        let mut latest: BTreeMap<usize, f64> = BTreeMap::new();
        for event in &followed {
            match event {
                Event::ServersSeen(seen) => {
                    nodes = seen.servers.iter().map(|server| server.node).collect();
                }
                Event::Step(step) => _ = versions.insert(step.gradient(), step.version),
                Event::PartApplied(part) => {
                    // Its step is known, and where the server is.
                    let version = versions.get(&part.gradient());
                    assert_eq!(version, Some(&part.version), "{what}: {part:?}");
                    assert_eq!(part.node, nodes[part.server], "{what}: {part:?}");
                    let is_new = parts.insert((part.server, part.gradient()));
                    assert!(is_new, "{what}: {part:?}");
                    assert!(part.took > 0.0 && part.held >= 0.0, "{what}: {part:?}");
                    let before = latest.entry(part.server).or_default();
                    *before = before.max(part.time);
                }
                _ => {}
            }
        }
        let expected = [1, 2].map(|server| versions.keys().map(move |&id| (server, id)));
        let expected: BTreeSet<_> = expected.into_iter().flatten().collect();
        assert_eq!(parts, expected, "{what}");
        let end = followed.last().unwrap().time();
        assert!(latest.values().all(|&time| time <= end), "{what}");
    }
}

#[test]
fn an_observer_that_panics_or_waits_harms_neither_the_training_nor_others() {
    let (observer, events) = observer();
    let (ended, end) = channel();
    let panics = |_: &Event| panic!("on purpose");
    // Handles its first event only when the other one has seen the end.
    let waits = move |_: &Event| _ = end.recv();
    let last = move |event: &Event| {
        if matches!(event, Event::RunEnded(_)) {
            let _ = ended.send(());
        }
    };
    let report = trainer()
        .observe(panics)
        .observe(waits)
        .observe(observer)
        .observe(last)
        .run()
        .unwrap();
    check(&events.iter().collect::<Vec<_>>(), &report, "beside others");
}

#[test]
fn a_training_that_fails_ends_with_its_error() {
    let (observer, events) = observer();
    let error = trainer()
        .max_gradient_norm(1e-9)
        .iterations(200)
        .observe(observer)
        .run()
        .unwrap_err();
    let events: Vec<Event> = events.iter().collect();
    let steps = steps(&events);
    assert!(steps.len() >= 100, "{}", steps.len());
    assert!(
        steps
            .iter()
            .all(|step| step.outcome == StepOutcome::Refused)
    );
    let Some(Event::RunEnded(end)) = events.last() else {
        panic!("{:?}", events.last());
    };
    let message = end.error.as_deref().unwrap();
    assert!(message.contains("diverged"), "{message}");
    assert_eq!(end.report.is_some(), error.report().is_some());
}

#[test]
fn a_training_that_cannot_start_says_so() {
    let (observer, events) = observer();
    trainer().workers(0).observe(observer).run().unwrap_err();
    let events: Vec<Event> = events.iter().collect();
    assert!(
        matches!(&events[..], [Event::RunEnded(end)] if end.error.is_some()),
        "{events:?}"
    );
}

#[test]
fn checkpoints_are_events() {
    let directory = tempfile::tempdir().unwrap();
    let (observer, events) = observer();
    let config = CheckpointConfig {
        every: 5,
        ..CheckpointConfig::new(directory.path())
    };
    let report = trainer()
        .checkpoints(config)
        .observe(observer)
        .run()
        .unwrap();
    let saved = events
        .iter()
        .filter(|event| matches!(event, Event::CheckpointSaved(_)));
    assert_eq!(saved.count() as u64, report.checkpoints.unwrap().num_saved);
}
