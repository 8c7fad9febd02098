use ps_actors::ids::Clock;

use super::*;
use crate::observe::{EventsSkipped, Settings, StepsMissed, testing};

fn begun() -> Spans {
    let mut spans = Spans::default();
    spans.of(&Event::RunStarted(Box::new(testing::started(
        1_700_000_000.25,
        Settings::default(),
    ))));
    spans
}

/// A whole number among the attributes of a span.
fn attribute<'a>(span: &'a Value, key: &str) -> &'a Value {
    let mut attributes = span["attributes"].as_array().unwrap().iter();
    let found = attributes.find(|attribute| attribute["key"] == key);
    &found.unwrap()["value"]["intValue"]
}

fn nanos(span: &Value, key: &str) -> u64 {
    span[key].as_str().unwrap().parse().unwrap()
}

#[test]
fn the_parts_of_a_step_follow_one_another_within_it() {
    let mut spans = begun();
    // 0.11 s: data 0.01, compute 0.02, wire 0.03, waiting 0.04, apply 0.01.
    let step = spans.of(&testing::step(3, 7, 2.0));
    let names: Vec<&str> = step
        .iter()
        .map(|span| span["name"].as_str().unwrap())
        .collect();
    assert_eq!(
        names,
        ["step", "batch", "compute", "send", "servers", "receive"]
    );
    let (root, parts) = step.split_first().unwrap();
    let end = nanos(root, "endTimeUnixNano");
    // The start of the run is an `f64`, which has steps of 256 ns there. It is the same for all spans.
    assert!(end.abs_diff(1_700_000_002_250_000_000) <= 256, "{root}");
    assert!(nanos(root, "startTimeUnixNano").abs_diff(end - 110_000_000) <= 2);
    assert!(root["parentSpanId"].is_null());
    let mut at = nanos(root, "startTimeUnixNano");
    for (part, millis) in parts.iter().zip([10, 20, 15, 50, 15]) {
        assert_eq!(part["traceId"], root["traceId"]);
        assert_eq!(part["parentSpanId"], root["spanId"]);
        assert!(nanos(part, "startTimeUnixNano").abs_diff(at) <= 2, "{part}");
        at += millis * 1_000_000;
        assert!(nanos(part, "endTimeUnixNano").abs_diff(at) <= 2, "{part}");
    }
    let worker = &root["attributes"][0];
    assert_eq!(worker["key"], "ps.worker");
    assert_eq!(worker["value"]["intValue"], "3");
}

#[test]
fn the_parts_of_other_servers_belong_to_the_step_of_their_gradient() {
    let mut spans = Spans::default();
    let settings = Settings {
        num_servers: 3,
        ..Settings::default()
    };
    let started = testing::started(1_700_000_000.25, settings);
    spans.of(&Event::RunStarted(Box::new(started)));
    let Event::Step(step) = testing::step(3, 7, 2.0) else {
        panic!("a step");
    };
    let applied_at = |time| {
        Event::PartApplied(PartApplied {
            time,
            server: 1,
            node: ps_actors::cluster::NodeId::DRIVER,
            worker: step.worker,
            incarnation: step.incarnation,
            clock: step.clock,
            version: step.version,
            held: 0.02,
            took: 0.01,
        })
    };
    let part = applied_at(1.99);
    assert!(spans.of(&part).is_empty(), "its step is not known");
    let told = Event::Step(step.clone());
    let root = spans.of(&told)[0].clone();
    // There are two other servers. Whoever says more has made it up.
    let [one, _] = [spans.of(&part), spans.of(&part)].map(|mut of_one| of_one.remove(0));
    assert!(spans.of(&part).is_empty());
    assert_eq!(one["name"], "part");
    assert_eq!(one["traceId"], root["traceId"]);
    assert_eq!(one["parentSpanId"], root["spanId"]);
    let end = nanos(&root, "endTimeUnixNano");
    for (key, millis) in [("startTimeUnixNano", 40), ("endTimeUnixNano", 10)] {
        assert!(
            nanos(&one, key).abs_diff(end - millis * 1_000_000) <= 2,
            "{one}"
        );
    }
    // A part that seems to have come before it was sent is moved. The step sent it at 1.92.
    spans.of(&told);
    let moved = spans.of(&applied_at(1.9)).remove(0);
    for (key, millis) in [("startTimeUnixNano", 80), ("endTimeUnixNano", 50)] {
        assert!(
            nanos(&moved, key).abs_diff(end - millis * 1_000_000) <= 2,
            "{moved}"
        );
    }
    // After a recovery, its gradient would be another one.
    let lost = crate::observe::ServersLost {
        time: 3.0,
        reason: "test".to_owned(),
    };
    spans.of(&Event::ServersLost(lost));
    assert!(spans.of(&part).is_empty());
}

#[test]
fn a_step_of_a_drivers_own_loop_consists_of_its_calls() {
    let mut spans = begun();
    let Event::Step(mut step) = testing::step(3, 7, 2.0) else {
        panic!("a step");
    };
    step.times = None;
    let told = Event::Step(step.clone());
    assert!(spans.of(&told).is_empty(), "the loop tells of no calls");
    let calls = [
        Event::Computed(Computed {
            time: 1.75,
            seconds: 0.5,
            worker: step.worker,
            incarnation: step.incarnation,
            clock: step.clock,
            computed_on: step.computed_on,
        }),
        Event::UpdateMade(UpdateMade {
            time: 2.0,
            seconds: 0.125,
            version: step.version,
            num_gradients: 1,
        }),
    ];
    assert!(calls.iter().all(|call| spans.of(call).is_empty()));
    let of_step = spans.of(&told);
    let end = nanos(&of_step[0], "endTimeUnixNano");
    for (span, (name, from, to)) in
        of_step
            .iter()
            .zip([("step", 750, 0), ("compute", 750, 250), ("servers", 125, 0)])
    {
        assert_eq!(span["name"], name);
        for (key, millis) in [("startTimeUnixNano", from), ("endTimeUnixNano", to)] {
            assert!(
                nanos(span, key).abs_diff(end - millis * 1_000_000) <= 2,
                "{span}"
            );
        }
    }
    assert_eq!(of_step.len(), 3);
}

#[test]
fn ids_are_as_long_as_they_must_be_and_no_two_are_the_same() {
    let mut spans = begun();
    let all: Vec<Value> = (0..50)
        .flat_map(|clock| spans.of(&testing::step(0, clock, 1.0)))
        .collect();
    let ids = |key: &str, len: usize| {
        let ids = all
            .iter()
            .map(|span| span[key].as_str().unwrap().to_owned());
        let ids: std::collections::BTreeSet<String> = ids.collect();
        let is_id = |id: &String| {
            id.len() == len
                && id.bytes().all(|b| b.is_ascii_hexdigit())
                && id.bytes().any(|b| b != b'0')
        };
        assert!(ids.iter().all(is_id), "{ids:?}");
        ids.len()
    };
    assert_eq!((ids("spanId", 16), ids("traceId", 32)), (300, 50));
}

#[test]
fn so_many_steps_of_each_second_have_spans() {
    let mut spans = begun();
    let mut num_spans = 0;
    for clock in 0..1000 {
        num_spans += spans
            .of(&testing::step(0, clock, 1.0 + clock as f64 / 500.0))
            .len();
    }
    assert_eq!(num_spans, 6 * 2 * MAX_STEPS_PER_SECOND as usize);
    for _ in 0..MAX_EVENTS + 3 {
        assert!(spans.of(&testing::worker_lost(3.0)).is_empty());
    }
    let error = Some("it failed".to_owned());
    let end = spans.of(&Event::RunEnded(Box::new(RunEnded::new(3.5, error))));
    let [end] = &end[..] else { panic!("{end:?}") };
    assert_eq!(attribute(end, "ps.steps_left_out"), "800");
    assert_eq!(end["events"].as_array().unwrap().len(), MAX_EVENTS);
    assert_eq!(end["events"][0]["name"], "worker_lost");
    assert_eq!(
        (&end["droppedEventsCount"], &end["status"]["code"]),
        (&json!(3), &json!(2))
    );
}

#[test]
fn each_worker_has_its_share_of_the_spans_and_all_steps_without_any_are_counted() {
    let settings = Settings {
        num_workers: 4,
        ..Settings::default()
    };
    let mut spans = Spans::default();
    spans.of(&Event::RunStarted(Box::new(testing::started(
        1_700_000_000.0,
        settings,
    ))));
    let mut num_steps = |worker, num: u64, time| {
        let steps = (0..num).map(|clock| spans.of(&testing::step(worker, clock, time)));
        steps.filter(|spans| !spans.is_empty()).count()
    };
    // The driver learns of many steps of one worker at once.
    assert_eq!(num_steps(0, 300, 1.5), 25);
    assert_eq!(num_steps(1, 20, 1.2), 20);
    assert_eq!(num_steps(0, 1, 2.0), 1);
    // There are more workers than there were to be: each has at least one.
    for worker in 2..500 {
        assert!((1..=25).contains(&num_steps(worker, 30, 3.0)));
    }
    assert_eq!(num_steps(500, 30, 3.0), 1);

    let mut spans = begun();
    let Event::Step(step) = testing::step(0, 0, 1.0) else {
        unreachable!("it is a step");
    };
    let untimed = Event::Step(SettledStep {
        times: None,
        ..step
    });
    let missed = Event::StepsMissed(StepsMissed {
        time: 1.0,
        worker: WorkerId(0),
        first: Clock(1),
        num_steps: 10,
    });
    let skipped = Event::EventsSkipped(EventsSkipped {
        time: 1.0,
        num_events: 100,
    });
    for event in [untimed, missed, skipped] {
        assert!(spans.of(&event).is_empty());
    }
    let end = spans.of(&Event::RunEnded(Box::new(RunEnded::new(2.0, None))));
    assert_eq!(attribute(&end[0], "ps.steps_left_out"), "11");
    assert_eq!(attribute(&end[0], "ps.events_skipped"), "100");
}

#[test]
fn numbers_that_are_not_finite_are_texts() {
    for (value, expected) in [
        (0.5, json!(0.5)),
        (f64::NAN, json!("NaN")),
        (f64::INFINITY, json!("Infinity")),
        (f64::NEG_INFINITY, json!("-Infinity")),
    ] {
        assert_eq!(number("x", value)["value"]["doubleValue"], expected);
    }
}
