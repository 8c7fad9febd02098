use ps_actors::ids::Incarnation;

use super::*;

fn step() -> SettledStep {
    SettledStep {
        time: 1.5,
        worker: WorkerId(2),
        incarnation: Incarnation(1),
        clock: Clock(7),
        computed_on: Version(10),
        outcome: StepOutcome::Applied,
        version: Version(13),
        staleness: 2,
        loss: 0.1,
        norm: 3.25,
        num_examples: 32,
        times: Some(StepTimes::new([0.001, 0.25, 0.002, 0.125, 0.5])),
    }
}

fn check(event: &Event) -> String {
    let text = serde_json::to_string(event).unwrap();
    assert!(!text.contains('\n'), "{text}");
    let read: Event = serde_json::from_str(&text).unwrap();
    // NaN is not equal to itself.
    assert_eq!(format!("{read:?}"), format!("{event:?}"));
    text
}

#[test]
fn an_event_is_one_line_of_json_and_comes_back() {
    let text = check(&Event::Step(step()));
    assert_eq!(
        text,
        r#"{"event":"step","time":1.5,"worker":2,"incarnation":1,"clock":7,"computed_on":10,"outcome":"applied","version":13,"staleness":2,"loss":0.1,"norm":3.25,"num_examples":32,"times":{"data":0.001,"compute":0.25,"wire":0.002,"waiting":0.125,"apply":0.5}}"#
    );
    check(&Event::RunStarted(Box::new(RunStarted {
        time: 0.0,
        unix_time: 1.7e9,
        settings: Settings::default(),
        versions: Versions::here(),
        first_version: Version(0),
    })));
    check(&Event::WorkerMoved(WorkerMoved {
        time: 2.0,
        worker: WorkerId(0),
        from: NodeId::DRIVER,
        to: NodeId {
            rank: 2,
            incarnation: 3,
        },
    }));
}

#[test]
fn a_worker_of_an_earlier_version_joins_at_clock_0() {
    let text = r#"{"event":"worker_joined","time":0.5,"worker":1,"node":null}"#;
    let expected = Event::WorkerJoined(WorkerJoined {
        time: 0.5,
        worker: WorkerId(1),
        node: None,
        next_clock: Clock(0),
    });
    assert_eq!(serde_json::from_str::<Event>(text).unwrap(), expected);
}

#[test]
fn an_event_of_an_earlier_version_has_no_size_and_no_log() {
    let read = |text| serde_json::from_str::<Event>(text).unwrap();
    let saved =
        read(r#"{"event":"checkpoint_saved","time":1.0,"version":3,"path":"one","seconds":0.5}"#);
    assert!(matches!(saved, Event::CheckpointSaved(saved) if saved.bytes == 0));
    let seen = read(
        r#"{"event":"servers_seen","time":1.0,"learning_rate":0.1,"consistency":"bsp","num_pending":0,"awaited":[],"members":[],"servers":[]}"#,
    );
    assert!(matches!(&seen, Event::ServersSeen(seen) if seen.log.is_none()));
    check(&seen);
}

#[test]
fn numbers_that_are_not_finite_come_back() {
    for (loss, norm, expected) in [
        (f32::NAN, f64::NAN, r#""loss":"NaN","norm":"NaN""#),
        (
            f32::INFINITY,
            f64::NEG_INFINITY,
            r#""loss":"Infinity","norm":"-Infinity""#,
        ),
        (2.0, 1e300, r#""loss":2.0,"norm":1e+300"#),
    ] {
        let text = check(&Event::Step(SettledStep {
            loss,
            norm,
            times: None,
            ..step()
        }));
        assert!(text.contains(expected), "{text}");
    }
    let bad = serde_json::from_str::<Event>(
        r#"{"event":"evaluated","time":0,"seconds":1,"version":0,"loss":"low","accuracy":null,"is_final":true}"#,
    );
    let error = bad.unwrap_err().to_string();
    assert!(error.contains("\"low\" is not a number"), "{error}");
}

#[test]
fn the_version_of_burn_is_that_of_the_lock_file() {
    let lock = include_str!("../../../Cargo.lock");
    let entry = format!("name = \"burn\"\nversion = \"{}\"\n", Versions::here().burn);
    assert!(lock.contains(&entry), "not in Cargo.lock: {entry}");
}
