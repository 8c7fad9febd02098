use super::*;
use crate::observe::testing;

fn step(worker: u32, clock: u64, time: f64) -> SettledStep {
    match testing::step(worker, clock, time) {
        Event::Step(step) => step,
        other => panic!("{other:?}"),
    }
}

/// The entries, as a reader of the file gets them.
fn values(entries: Vec<Entry>) -> Vec<Value> {
    let value = |entry| serde_json::to_value(entry).expect("an entry is JSON");
    entries.into_iter().map(value).collect()
}

fn slices<'a>(entries: &'a [Value], name: &str) -> Vec<&'a Value> {
    let is_it = |entry: &&Value| entry["ph"] == "X" && entry["name"] == name;
    entries.iter().filter(is_it).collect()
}

fn ends(slice: &Value) -> (f64, f64) {
    let from = slice["ts"].as_f64().unwrap();
    (from, from + slice["dur"].as_f64().unwrap())
}

/// Two workers, whose gradients make one update.
#[test]
fn a_gradient_is_followed_from_its_batch_to_the_update() {
    let mut entries = Entries::default();
    let mut all = Vec::new();
    for worker in 0..2 {
        let node = NodeId {
            rank: worker + 1,
            incarnation: 1,
        };
        all.extend(values(entries.worker_at(WorkerId(worker), Some(node))));
    }
    for worker in 0..2 {
        let mut step = step(worker, 0, 10.0 + f64::from(worker));
        step.times = Some(StepTimes::new([1.0, 2.0, 0.5, 0.125, 0.125]));
        all.extend(values(entries.step(&step)));
    }
    assert!(entries.are_as_many_as(2) && !entries.are_as_many_as(3));
    assert_eq!(slices(&all, "version 1").len(), 1);
    // The update is drawn where the first gradient puts it. The other one comes later, so its arrow ends at the push.
    for (worker, end, expected) in [(0_u64, 10.0e6, "stf"), (1, 11.0e6, "sf")] {
        let of = |entry: &&Value| entry["pid"] == worker + 1 && entry["tid"] == worker + 1;
        let mine: Vec<Value> = all.iter().filter(of).cloned().collect();
        let mut at = end - 3.75e6;
        assert_eq!(ends(slices(&mine, "step 0")[0]), (at, end));
        for (name, micros) in [
            ("batch", 1.0e6),
            ("compute", 2.0e6),
            ("send", 0.25e6),
            ("the servers hold it", 0.25e6),
            ("receive", 0.25e6),
        ] {
            assert_eq!(ends(slices(&mine, name)[0]), (at, at + micros), "{name}");
            at += micros;
        }
        let id = mine.iter().find(|entry| entry["ph"] == "s").unwrap()["id"].clone();
        let arrows: Vec<&Value> = all.iter().filter(|entry| entry["id"] == id).collect();
        let phases: String = arrows.iter().filter_map(|one| one["ph"].as_str()).collect();
        assert_eq!(phases, expected);
    }
    check(&all);
}

/// It may have workers, too, and after a loss it is elsewhere.
#[test]
fn the_first_server_is_in_the_process_that_has_it() {
    use crate::observe::{ServerSeen, ServersSeen};

    let node = |rank| NodeId {
        rank,
        incarnation: 1,
    };
    let seen = |rank| {
        let server = |rank| ServerSeen {
            node: node(rank),
            version: Version(0),
            num_weights: 1,
            num_staged: 0,
            num_waiting: 0,
        };
        Event::ServersSeen(ServersSeen {
            time: 1.0,
            learning_rate: 0.1,
            consistency: "bsp".to_owned(),
            num_pending: 0,
            awaited: Vec::new(),
            members: Vec::new(),
            servers: vec![server(rank), server(rank + 1)],
            log: None,
        })
    };
    let mut entries = Entries::default();
    entries.worker_at(WorkerId(0), Some(node(1)));
    for (rank, clock) in [(1, 0), (2, 1)] {
        assert!(entries.of(&seen(rank)).is_empty());
        let all = values(entries.step(&step(0, clock, 10.0)));
        let at = |name: &str| {
            let slice = slices(&all, name)[0];
            let number = |key: &str| slice[key].as_u64().unwrap();
            (number("pid"), number("tid"))
        };
        let worker = at(&format!("step {clock}"));
        let pushes = at(&format!("gradient 0.1.{clock}"));
        let updates = at(&format!("version {}", clock + 1));
        assert_eq!([pushes.0, updates.0], [u64::from(rank); 2]);
        assert!(worker != pushes && worker != updates && pushes != updates);
        // Each thread of the server has a name.
        for (pid, tid) in [pushes, updates] {
            let is_name = |one: &&Value| {
                one["name"] == "thread_name" && one["pid"] == pid && one["tid"] == tid
            };
            assert_eq!(all.iter().filter(is_name).count(), 1);
        }
    }
}

fn drawn(entries: &mut Entries, events: &[Event]) -> Vec<Value> {
    let of_each = |event| values(entries.of(event));
    events.iter().flat_map(of_each).collect()
}

/// Checks that the points of each arrow come in the order of their times, each in a slice of its thread, and that no
/// two slices of a thread overlap unless one is within the other. Returns the slices of each arrow.
fn check(all: &[Value]) -> Vec<Vec<&Value>> {
    let is_slice = |one: &&Value| one["ph"] == "X" || (one["ph"] == "i" && one["s"] == "t");
    let slices: Vec<&Value> = all.iter().filter(is_slice).collect();
    let thread = |one: &Value| (one["pid"].as_u64().unwrap(), one["tid"].as_u64().unwrap());
    let ends = |one: &Value| {
        let from = one["ts"].as_f64().unwrap();
        (from, from + one["dur"].as_f64().unwrap_or(0.0))
    };
    for (index, one) in slices.iter().enumerate() {
        for other in &slices[index + 1..] {
            let ((a, b), (c, d)) = (ends(one), ends(other));
            // Times are rounded to a thousandth.
            let is_apart = b <= c + 0.01 || d <= a + 0.01;
            let is_within = (a <= c + 0.01 && d <= b + 0.01) || (c <= a + 0.01 && b <= d + 0.01);
            assert!(
                thread(one) != thread(other) || is_apart || is_within,
                "{one} {other}"
            );
        }
    }
    let mut arrows: BTreeMap<&str, Vec<(&str, f64, &Value)>> = BTreeMap::new();
    for point in all.iter().filter(|one| one["id"].is_string()) {
        let id = point["id"].as_str().unwrap();
        // Perfetto reads no other ones.
        assert!(u64::from_str_radix(id, 16).is_ok(), "{point}");
        let time = point["ts"].as_f64().unwrap();
        let here = slices.iter().filter(|slice| {
            let (from, to) = ends(slice);
            thread(slice) == thread(point) && from <= time && time <= to
        });
        // The innermost one.
        let slice = here.max_by(|a, b| ends(a).0.total_cmp(&ends(b).0));
        let slice = slice.unwrap_or_else(|| panic!("no slice at {point}"));
        let phase = point["ph"].as_str().unwrap();
        arrows.entry(id).or_default().push((phase, time, slice));
    }
    let arrows = arrows.into_values().map(|points| {
        assert!(points.is_sorted_by_key(|point| point.1), "{points:?}");
        let phases: String = points.iter().map(|point| point.0).collect();
        let middle = "t".repeat(points.len() - 2);
        assert_eq!(phases, format!("s{middle}f"));
        points.into_iter().map(|point| point.2).collect()
    });
    arrows.collect()
}

fn part(server: usize, rank: u32, of: &SettledStep, time: f64) -> Event {
    let gradient = of.gradient();
    Event::PartApplied(PartApplied {
        time,
        server,
        node: node(rank),
        worker: gradient.worker,
        incarnation: gradient.incarnation,
        clock: gradient.clock,
        version: of.version,
        held: 0.02,
        took: 0.01,
    })
}

fn node(rank: u32) -> NodeId {
    NodeId {
        rank,
        incarnation: 1,
    }
}

#[test]
fn a_gradient_is_followed_to_each_server() {
    let mut entries = Entries::default();
    let (one, mut two) = (step(0, 0, 10.0), step(1, 0, 10.01));
    two.version = one.version;
    let mut all = drawn(
        &mut entries,
        &[Event::Step(one.clone()), Event::Step(two.clone())],
    );
    // Two servers of one process, and one whose parts seem to have come before they were sent.
    for (server, rank, time) in [(1, 2, 9.99), (2, 2, 10.0), (3, 4, 9.5)] {
        let parts = [
            part(server, rank, &one, time),
            part(server, rank, &two, time),
        ];
        all.extend(drawn(&mut entries, &parts));
    }
    let arrows = check(&all);
    assert_eq!(arrows.len(), 2 * 4);
    for gradient in ["gradient 0.1.0", "gradient 1.1.0"] {
        let of_it = |arrow: &&Vec<&Value>| arrow[1]["name"] == gradient;
        let its: Vec<_> = arrows.iter().filter(of_it).collect();
        let pids = its
            .iter()
            .map(|arrow| [1, 2].map(|at| arrow[at]["pid"].as_u64().unwrap()));
        let expected = [[SERVERS; 2], [2; 2], [2; 2], [4; 2]];
        assert_eq!(pids.collect::<Vec<_>>(), expected);
        for arrow in &its {
            assert_eq!(arrow[2]["name"], "version 1");
            assert_eq!(arrow[0]["name"], "send");
            assert_eq!(arrow[0]["tid"], its[0][0]["tid"]);
        }
    }
    let versions = slices(&all, "version 1");
    assert_eq!(versions.len(), 4);
    let threads: BTreeMap<_, _> = versions
        .iter()
        .map(|one| (one["tid"].as_u64(), one))
        .collect();
    assert_eq!(threads.len(), 4);
}

/// Perfetto draws no arrow that does.
#[test]
fn no_arrow_goes_back_to_an_update_that_was_drawn_before_the_gradient_came() {
    let mut entries = Entries::default();
    let (one, mut two) = (step(0, 0, 10.0), step(1, 0, 10.06));
    two.version = one.version;
    let mut all = drawn(
        &mut entries,
        &[Event::Step(one.clone()), Event::Step(two.clone())],
    );
    for (server, rank, time) in [(1, 2, 9.99), (2, 3, 9.5)] {
        let parts = [
            part(server, rank, &one, time),
            part(server, rank, &two, time),
        ];
        all.extend(drawn(&mut entries, &parts));
    }
    let arrows = check(&all);
    // The second gradient was sent at 9.98. The update of the first server is drawn at 9.985, when it is on its way. That
    // of the second one is drawn until 9.99, and that of the third one until 9.95.
    for (gradient, num_points) in [("gradient 0.1.0", [3, 3, 3]), ("gradient 1.1.0", [2, 3, 2])] {
        let its = arrows.iter().filter(|arrow| arrow[1]["name"] == gradient);
        assert_eq!(its.map(Vec::len).collect::<Vec<_>>(), num_points);
    }
}

#[test]
fn slices_of_a_server_do_not_overlap_although_its_answers_take_shorter_and_longer() {
    let mut entries = Entries::default();
    let mut all = Vec::new();
    for (clock, time) in [(0, 10.0), (1, 10.02), (2, 10.021), (3, 10.021)] {
        let step = step(0, clock, time);
        let applied = part(1, 1, &step, time - 0.03);
        all.extend(drawn(&mut entries, &[Event::Step(step), applied]));
    }
    // The steps themselves are as the worker measured them, so these here overlap.
    all.retain(|one| one["pid"] == 1);
    all.retain(|one| one["id"].is_null());
    check(&all);
    assert_eq!(slices(&all, "gradient 0.1.3").len(), 1);
}

/// A server may say anything.
#[test]
fn a_gradient_that_nobody_knows_is_not_drawn() {
    let mut entries = Entries::default();
    let known = step(0, 0, 10.0);
    entries.step(&known);
    for (worker, clock) in [(0, 1), (1, 0)] {
        let unknown = part(1, 1, &step(worker, clock, 10.0), 10.0);
        assert!(entries.of(&unknown).is_empty());
    }
    assert!(!entries.of(&part(1, 1, &known, 10.0)).is_empty());
    // It counts, however often it comes.
    assert!(!entries.are_as_many_as(2));
    for _ in 0..STEP {
        entries.of(&part(1, 1, &known, 10.0));
    }
    assert!(entries.are_as_many_as(2));
    // After a recovery, it would be another one.
    let lost = crate::observe::ServersLost {
        time: 11.0,
        reason: "test".to_owned(),
    };
    entries.of(&Event::ServersLost(lost));
    assert!(entries.of(&part(1, 1, &known, 12.0)).is_empty());
}

#[test]
fn the_calls_of_a_drivers_own_loop_are_drawn() {
    let mut entries = Entries::default();
    entries.worker_at(WorkerId(1), Some(node(3)));
    let mut all = Vec::new();
    for worker in 0..2 {
        let mut step = step(worker, 0, 2.0);
        step.times = None;
        // A loop that tells of no calls, as that of `http_server`.
        assert!(entries.step(&step).is_empty());
        all.extend(values(entries.of(&Event::Computed(Computed {
            time: 1.5,
            seconds: 0.5,
            worker: step.worker,
            incarnation: step.incarnation,
            clock: step.clock,
            computed_on: step.computed_on,
        }))));
    }
    all.extend(values(entries.of(&Event::UpdateMade(UpdateMade {
        time: 2.0,
        seconds: 0.25,
        version: Version(1),
        num_gradients: 2,
    }))));
    for worker in 0..2 {
        let mut step = step(worker, 0, 2.0);
        step.times = None;
        all.extend(values(entries.step(&step)));
    }
    assert_eq!(entries.size, 5);
    let arrows = check(&all);
    for (worker, (arrow, pid)) in arrows.iter().zip([0, 3]).enumerate() {
        let [from, to] = arrow[..] else {
            panic!("{arrow:?}");
        };
        assert_eq!(from["name"], format!("compute gradient {worker}.1.0"));
        assert_eq!((&from["pid"], ends(from)), (&json!(pid), (1.0e6, 1.5e6)));
        assert_eq!(
            (&to["name"], ends(to)),
            (&json!("version 1"), (1.75e6, 2.0e6))
        );
    }
    assert_eq!(arrows.len(), 2);
    let steps = all
        .iter()
        .filter(|one| one["name"] == "step 0" && one["ph"] == "i");
    let losses = steps.map(|step| step["args"]["loss"].as_str().unwrap());
    assert_eq!(losses.collect::<Vec<_>>(), ["2", "2"]);
}

/// A loop may ask for several gradients before it takes one, apply none of them, and make several updates at once.
#[test]
fn calls_of_a_loop_count_without_a_step_and_do_not_overlap() {
    let mut entries = Entries::default();
    let mut all = Vec::new();
    for clock in 0..STEP {
        let of = step(0, clock, 2.0);
        let time = 1.0 + 0.25 * clock as f64;
        all.extend(values(entries.of(&Event::Computed(Computed {
            time,
            seconds: 1.0,
            worker: of.worker,
            incarnation: of.incarnation,
            clock: of.clock,
            computed_on: of.computed_on,
        }))));
        all.extend(values(entries.of(&Event::UpdateMade(UpdateMade {
            time,
            seconds: 1.0,
            version: of.version,
            num_gradients: 1,
        }))));
    }
    assert!(entries.are_as_many_as(2) && !entries.are_as_many_as(3));
    check(&all);
    for name in ["compute gradient 0.1.2", "version 3"] {
        assert_eq!(ends(slices(&all, name)[0]), (1.25e6, 1.5e6), "{name}");
    }
}

#[test]
fn what_is_remembered_is_bounded() {
    let mut entries = Entries::default();
    for clock in 0..2 * MAX_GRADIENTS as u64 {
        entries.step(&step(0, clock, clock as f64));
    }
    let is_known = |clock| {
        entries
            .origins
            .get(&step(0, clock, 0.0).gradient())
            .is_some()
    };
    let num = MAX_GRADIENTS as u64;
    assert_eq!([num - 1, num].map(is_known), [false, true]);
    let versions = &entries.updates[&0];
    let latest = 2 * num;
    let first = latest + 1 - MAX_VERSIONS as u64;
    assert_eq!(
        [first - 1, first].map(|version| versions.get(&Version(version)).is_some()),
        [false, true]
    );
}
