//! `--trace`: a gradient is followed by its name through all processes.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::Value;

use crate::run::Run;

/// What `--trace` has written.
struct Drawn(Vec<Value>);

/// A process and one of its threads.
type Thread = (u64, u64);

/// Times are rounded to a thousandth of a microsecond.
const ROUNDED: f64 = 0.01;

fn thread(entry: &Value) -> Thread {
    let number = |key: &str| entry[key].as_u64().unwrap();
    (number("pid"), number("tid"))
}

/// When a slice begins and ends, in microseconds.
fn from_to(slice: &Value) -> (f64, f64) {
    let from = slice["ts"].as_f64().unwrap();
    (from, from + slice["dur"].as_f64().unwrap())
}

/// Whether a point of an arrow is within this slice.
fn is_at(point: &Value, slice: &Value) -> bool {
    let ((from, to), time) = (from_to(slice), point["ts"].as_f64().unwrap());
    thread(point) == thread(slice) && from <= time && time <= to + ROUNDED
}

impl Drawn {
    fn read(file: &Path) -> Self {
        let text = std::fs::read_to_string(file).unwrap();
        Self(serde_json::from_str(&text).unwrap())
    }

    /// The names that processes or threads were given.
    fn names(&self, kind: &str) -> BTreeMap<Thread, &str> {
        let named = self.0.iter().filter(|entry| entry["name"] == kind);
        named
            .map(|entry| (thread(entry), entry["args"]["name"].as_str().unwrap()))
            .collect()
    }

    fn thread_of(&self, name: &str) -> Thread {
        let names = self.names("thread_name");
        let found: Vec<&Thread> = names
            .iter()
            .filter_map(|(thread, its)| (*its == name).then_some(thread))
            .collect();
        let [thread] = found[..] else {
            panic!("{name:?} in {names:?}");
        };
        *thread
    }

    fn slices(&self, of: Thread) -> impl Iterator<Item = &Value> {
        let slices = self.0.iter().filter(|entry| entry["ph"] == "X");
        slices.filter(move |slice| thread(slice) == of)
    }

    /// The only slice of this thread with this name.
    fn slice(&self, of: Thread, name: &str) -> &Value {
        let named = self.slices(of).filter(|slice| slice["name"] == name);
        let found: Vec<&Value> = named.collect();
        let [slice] = found[..] else {
            panic!("{name:?} of {of:?}: {found:?}");
        };
        slice
    }

    /// Finds the slice of this thread with this name that ends at this time. Returns when it begins.
    fn begin_of(&self, of: Thread, name: &str, end: f64) -> f64 {
        let mut named = self.slices(of).filter(|slice| slice["name"] == name);
        let found = named.find(|slice| (from_to(slice).1 - end).abs() < ROUNDED);
        let slice = found.unwrap_or_else(|| panic!("no {name:?} of {of:?} ends at {end}"));
        from_to(slice).0
    }

    /// The points of each arrow of a gradient: its beginning, what is between, and its end.
    fn arrows(&self, gradient: &str) -> Vec<Vec<&Value>> {
        let mut arrows: BTreeMap<&str, Vec<&Value>> = BTreeMap::new();
        for point in self.0.iter().filter(|point| point["name"] == gradient) {
            if let Some(id) = point["id"].as_str() {
                // Perfetto draws no other ones.
                assert!(u64::from_str_radix(id, 16).is_ok(), "{point}");
                arrows.entry(id).or_default().push(point);
            }
        }
        arrows.into_values().collect()
    }
}

/// The three servers are in three processes, none of which is the driver.
#[test]
fn each_gradient_is_followed_from_its_batch_to_the_update_at_every_server() {
    const NUM_STEPS: u64 = 15;
    let temporary = tempfile::tempdir().unwrap();
    let file = temporary.path().join("trace.json");
    let iterations = NUM_STEPS.to_string();
    let arguments = [
        "--iterations",
        &iterations,
        "--processes",
        "4",
        "--num-servers",
        "3",
        "--servers-on-nodes",
        "--consistency",
        "asp",
        "--trace",
        file.to_str().unwrap(),
    ];
    let (status, output) = Run::start("sharded_ps", &arguments).finish();
    assert!(status.success(), "{output}");
    let drawn = Drawn::read(&file);
    let servers = ["first server", "server 1", "server 2"];
    let updates = servers.map(|server| drawn.thread_of(&format!("{server}: updates")));
    let processes = drawn.names("process_name");
    for (server, updates) in servers.iter().zip(updates) {
        let name = processes[&(updates.0, 0)];
        assert!(name.starts_with("node "), "{server}: {name}");
        // In `asp`, each gradient makes an update.
        let num_updates = drawn.slices(updates).count() as u64;
        assert_eq!(num_updates, 2 * NUM_STEPS, "{server}");
    }
    let homes: BTreeSet<u64> = updates.iter().map(|updates| updates.0).collect();
    assert_eq!(homes.len(), servers.len());
    for worker in 0..2 {
        let computes = drawn.thread_of(&format!("worker {worker}"));
        let parts = ["first server: pushes", "server 1: parts", "server 2: parts"];
        let parts = parts.map(|parts| drawn.thread_of(&format!("{parts} of worker {worker}")));
        for clock in 0..NUM_STEPS {
            let step = drawn.slice(computes, &format!("step {clock}"));
            let name = format!("gradient {}", step["args"]["gradient"].as_str().unwrap());
            let version = format!("version {}", step["args"]["version"]);
            let arrows = drawn.arrows(&name);
            assert_eq!(arrows.len(), servers.len(), "{name}");
            for (parts, updates) in parts.into_iter().zip(updates) {
                let (part, update) = (drawn.slice(parts, &name), drawn.slice(updates, &version));
                let arrow = arrows.iter().find(|arrow| is_at(arrow[1], part));
                let arrow = arrow.unwrap_or_else(|| panic!("no arrow to {part}"));
                let phases: Vec<_> = arrow.iter().map(|point| point["ph"].as_str()).collect();
                assert_eq!(phases, ["s", "t", "f"].map(Some));
                assert!(is_at(arrow[2], update), "{} {update}", arrow[2]);
                // It begins where the worker sends the gradient, after the batch and the computation.
                let mut sends = drawn.slices(computes).filter(|one| one["name"] == "send");
                assert!(sends.any(|send| is_at(arrow[0], send)), "{}", arrow[0]);
                let sent = arrow[0]["ts"].as_f64().unwrap();
                let computed = drawn.begin_of(computes, "compute", sent);
                let asked = drawn.begin_of(computes, "batch", computed);
                assert!((asked - from_to(step).0).abs() < ROUNDED, "{step}");
                // It does not come before, and takes its time until it is applied.
                let (came, left) = from_to(part);
                assert!(sent <= came && came <= left, "{sent}: {part}");
            }
        }
    }
}

/// The driver knows when it makes a call, and when it gets the answer.
#[test]
fn the_trace_of_a_drivers_own_loop_has_its_calls() {
    const NUM_STEPS: u64 = 12;
    let temporary = tempfile::tempdir().unwrap();
    for (name, num_per_update) in [("sync_ps", 2), ("async_ps", 1)] {
        let file = temporary.path().join(format!("{name}.json"));
        let (iterations, path) = (NUM_STEPS.to_string(), file.to_str().unwrap());
        let arguments = ["--iterations", &iterations, "--processes", "3"];
        let arguments = [&arguments[..], &["--trace", path]].concat();
        let (status, output) = Run::start(name, &arguments).finish();
        assert!(status.success(), "{output}");
        let drawn = Drawn::read(&file);
        let updates = drawn.thread_of("updates of the loop");
        assert_eq!(updates.0, 0, "the driver makes the calls");
        let num_updates = drawn.slices(updates).count() as u64;
        assert_eq!(num_updates * num_per_update, 2 * NUM_STEPS);
        let mut num_steps = 0;
        for worker in 0..2 {
            let computes = drawn.thread_of(&format!("worker {worker}"));
            assert_ne!(computes.0, 0, "each worker has a process of its own");
            let steps = drawn.0.iter().filter(|entry| entry["ph"] == "i");
            let of_worker = steps.filter(|step| thread(step) == computes);
            for (clock, step) in of_worker.enumerate() {
                num_steps += 1;
                assert_eq!(step["name"], format!("step {clock}"));
                let about = &step["args"];
                assert_eq!(about["outcome"], "applied");
                let gradient = format!("gradient {}", about["gradient"].as_str().unwrap());
                let computed = drawn.slice(computes, &format!("compute {gradient}"));
                let made = drawn.slice(updates, &format!("version {}", about["version"]));
                // In this order, by the driver's clock.
                let (asked, taken) = from_to(computed);
                let (pushed, updated) = from_to(made);
                let times = [asked, taken, pushed + ROUNDED, updated + 2.0 * ROUNDED];
                assert!(times.is_sorted(), "{times:?}");
                let arrows = drawn.arrows(&gradient);
                let [arrow] = &arrows[..] else {
                    panic!("{gradient}: {arrows:?}");
                };
                let [from, to] = arrow[..] else {
                    panic!("{gradient}: {arrow:?}");
                };
                assert!(is_at(from, computed) && is_at(to, made), "{arrow:?}");
                assert_eq!([&from["ph"], &to["ph"]], ["s", "f"]);
            }
        }
        // In `async_ps`, a worker may take more of them than the other.
        assert_eq!(num_steps, 2 * NUM_STEPS, "{name}");
        let beside = drawn.slices((0, 0));
        let evaluations = beside.filter(|slice| slice["name"] == "evaluation");
        // The first one and the last one.
        assert!(evaluations.count() >= 2, "{name}");
    }
}
