//! What the driver knows of the faults of a run: which of them have happened, and what was applied around them.
//!
//! Every process tells the driver what it sees. The driver decides whether a fault happens, because only it knows
//! whether it has happened before: a process that was started again asks in vain.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use actix::{Actor, Context, Handler, Message, MessageResult};
use ps_actors::chaos::network::NetworkFaults;
use ps_actors::chaos::{Fault, Plan, Report};
use ps_actors::cluster::Hosted;
use ps_actors::remote::{Messages, Remote};
use serde::{Deserialize, Serialize};

/// The file in the directory of the checkpoints that says which faults have happened: one clause of the plan per line, and
/// after those that ended the driver, [`ENDED`] and the time. A line with [`RECOVERED`] follows when the run has gone on.
const MARKS: &str = "chaos-happened";

/// Comes before the microseconds since 1970.
const ENDED: &str = " ended the driver at ";

/// Comes before the microseconds that it took.
const RECOVERED: &str = "the next driver went on after ";

/// Something that a process has seen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Event {
    /// The first server was made.
    Made,
    /// The first server made an update of these gradients: worker and step.
    Applied {
        version: u64,
        gradients: Vec<(u32, u64)>,
    },
}

/// Events with their age in microseconds, and the network's faults until now.
#[derive(Clone, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "()")]
pub(super) struct Seen {
    /// The number of the process on its host, with its rank.
    pub(super) process: (u32, u32),
    /// Counts the messages of the process, from 1. One that was answered is not sent again.
    pub(super) number: u64,
    pub(super) events: Vec<(u64, Event)>,
    pub(super) num_cut: u64,
    pub(super) num_doubled: u64,
    pub(super) num_delayed: u64,
}

/// Asks whether a fault of the plan, named by its position, is to happen in the asking process now.
#[derive(Clone, Copy, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "bool")]
pub(super) struct Claim {
    pub(super) fault: u32,
}

/// The actor that other processes tell what they see.
pub(super) struct Monitor(pub(super) Arc<Ledger>);

impl Actor for Monitor {
    type Context = Context<Self>;
}

impl Remote for Monitor {
    fn messages(messages: &mut Messages<Self>) {
        messages.add::<Seen>().add::<Claim>();
    }
}

impl Hosted for Monitor {
    type Args = ();
}

impl Handler<Seen> for Monitor {
    type Result = ();

    fn handle(&mut self, seen: Seen, _: &mut Self::Context) {
        let now = Instant::now();
        let events = match self.0.is_new(seen.process, seen.number) {
            true => seen.events,
            false => Vec::new(),
        };
        for (age, event) in events {
            let at = now.checked_sub(Duration::from_micros(age)).unwrap_or(now);
            self.0.saw(event, at);
        }
        let faults = NetworkFaults {
            num_cut: seen.num_cut,
            num_doubled: seen.num_doubled,
            num_delayed: seen.num_delayed,
        };
        self.0.count_network(seen.process, faults);
    }
}

impl Handler<Claim> for Monitor {
    type Result = MessageResult<Claim>;

    fn handle(&mut self, claim: Claim, _: &mut Self::Context) -> Self::Result {
        MessageResult(self.0.claim(claim.fault as usize, false, Instant::now()))
    }
}

/// What the driver knows.
#[derive(Debug)]
pub(super) struct Ledger {
    plan: Plan,
    /// The directory of the checkpoints.
    directory: Option<PathBuf>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// By position in the plan.
    has_happened: Vec<bool>,
    /// Faults after which nothing was applied yet.
    open: Vec<Open>,
    recoveries: Vec<Duration>,
    /// When faults ended the drivers before this one, as long as nothing was applied since.
    driver_ends: Vec<SystemTime>,
    /// The gradients of each update. Updates that were made again replace the first ones.
    updates: BTreeMap<u64, Vec<(u32, u64)>>,
    num_repeated: u64,
    network: HashMap<(u32, u32), NetworkFaults>,
    /// The number of the last message of each process.
    numbers: HashMap<(u32, u32), u64>,
}

#[derive(Debug)]
struct Open {
    at: Instant,
    until: Until,
}

/// What ends the recovery from a fault.
#[derive(Debug, PartialEq, Eq)]
enum Until {
    /// A gradient of this worker is applied.
    Worker(u32),
    /// New servers were made, and apply a gradient.
    NewServers,
    /// A gradient is applied.
    Any,
}

/// What was applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Counts {
    /// Different steps whose gradients are in the weights.
    pub(super) num_steps: u64,
    /// Gradients in the weights beyond one for each step.
    pub(super) num_doubled: u64,
}

impl Ledger {
    /// Begins with the faults that have happened before in this run, if it `resumes`.
    pub(super) fn new(plan: Plan, directory: Option<&Path>, resumes: bool) -> Self {
        let marks = directory.filter(|_| resumes);
        let marks = marks.and_then(|path| fs::read_to_string(path.join(MARKS)).ok());
        let mut marks = Marks::read(&marks.unwrap_or_default());
        let has_happened = plan.faults.iter().map(|fault| {
            let text = fault.to_string();
            let mark = marks.faults.iter().position(|mark| *mark == text);
            mark.map(|mark| marks.faults.remove(mark)).is_some()
        });
        let state = State {
            has_happened: has_happened.collect(),
            driver_ends: marks.driver_ends.split_off(marks.recoveries.len()),
            recoveries: marks.recoveries,
            ..State::default()
        };
        // Those of another run. If there are checkpoints, this run is refused, and that one needs its marks to go on.
        let is_new = |path: &&Path| matches!(newest_checkpoint(path), Ok(None));
        if let Some(path) = directory.filter(|path| !resumes && is_new(path)) {
            let _ = fs::remove_file(path.join(MARKS));
        }
        Self {
            plan,
            directory: directory.map(Path::to_owned),
            state: Mutex::new(state),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the fault has happened before, in this process or in another one.
    pub(super) fn has_happened(&self, fault: usize) -> bool {
        self.lock().has_happened.get(fault) == Some(&true)
    }

    /// Whether the fault is to happen now. It then counts as happened. It is written down first, if there is a
    /// directory, so that it does not happen again to a driver that goes on with this run.
    /// `ends_driver`: it ends this process.
    pub(super) fn claim(&self, fault: usize, ends_driver: bool, now: Instant) -> bool {
        let mut state = self.lock();
        let State {
            has_happened, open, ..
        } = &mut *state;
        let (Some(has_happened), Some(fault)) =
            (has_happened.get_mut(fault), self.plan.faults.get(fault))
        else {
            return false;
        };
        if *has_happened {
            return false;
        }
        let mark = match ends_driver {
            true => format!(
                "{fault}{ENDED}{}",
                since_1970(SystemTime::now()).as_micros()
            ),
            false => fault.to_string(),
        };
        if let Err(error) = self.mark(&mark) {
            tracing::warn!(%fault, %error, "is left out: it cannot be written down");
            return false;
        }
        *has_happened = true;
        tracing::warn!(%fault, "a fault of the plan");
        let until = match *fault {
            Fault::KillWorker { worker, .. } | Fault::StopWorker { worker, .. } => {
                Until::Worker(worker)
            }
            Fault::KillServer { .. } => Until::NewServers,
            Fault::StopServer { .. } => Until::Any,
            _ => return true,
        };
        open.push(Open { at: now, until });
        true
    }

    fn mark(&self, line: &str) -> io::Result<()> {
        let Some(directory) = &self.directory else {
            return Ok(());
        };
        // The checkpoints make it later.
        fs::create_dir_all(directory)?;
        let mut options = OpenOptions::new();
        let mut file = options
            .create(true)
            .append(true)
            .open(directory.join(MARKS))?;
        // In one piece. The system has it then, whatever becomes of this process.
        file.write_all(format!("{line}\n").as_bytes())
    }

    /// Notes an event, and damages a checkpoint if the plan says so.
    pub(super) fn saw(&self, event: Event, at: Instant) {
        let version = {
            let mut state = self.lock();
            match event {
                Event::Made => {
                    for open in &mut state.open {
                        if open.until == Until::NewServers && open.at <= at {
                            open.until = Until::Any;
                        }
                    }
                    return;
                }
                Event::Applied { version, gradients } => {
                    state.applied(version, gradients, at);
                    self.note_recoveries(&mut state, at);
                    version
                }
            }
        };
        for (index, fault) in self.plan.faults.iter().enumerate() {
            if let Fault::DamageCheckpoint { version: from } = *fault
                && version >= from
                && !self.has_happened(index)
                && let Some(directory) = &self.directory
                && damage_newest(directory).unwrap_or(false)
            {
                self.claim(index, false, at);
            }
        }
    }

    /// The first update of this driver ends the recoveries from the ends of the drivers before it. They are written
    /// down for the report of another driver, should this one end, too.
    fn note_recoveries(&self, state: &mut State, at: Instant) {
        for ended in std::mem::take(&mut state.driver_ends) {
            // The clock of the system may have been set since.
            let until_now = SystemTime::now().duration_since(ended).unwrap_or_default();
            let took = until_now.saturating_sub(at.elapsed());
            state.recoveries.push(took);
            if let Err(error) = self.mark(&format!("{RECOVERED}{}", took.as_micros())) {
                tracing::warn!(%error, "the recovery of the driver cannot be written down");
            }
        }
    }

    /// Whether this is the first time that this message of a process has come.
    fn is_new(&self, process: (u32, u32), number: u64) -> bool {
        let mut state = self.lock();
        let last = state.numbers.entry(process).or_default();
        number > std::mem::replace(last, number.max(*last))
    }

    pub(super) fn count_network(&self, process: (u32, u32), faults: NetworkFaults) {
        self.lock().network.insert(process, faults);
    }

    pub(super) fn counts(&self) -> Counts {
        let state = self.lock();
        let all = || state.updates.values().flatten();
        let num_steps = all().collect::<BTreeSet<_>>().len() as u64;
        Counts {
            num_steps,
            num_doubled: all().count() as u64 - num_steps,
        }
    }

    /// Makes the part of the report that says what happened.
    pub(super) fn report(&self) -> Report {
        let state = self.lock();
        let mut report = Report {
            recoveries: state.recoveries.clone(),
            num_repeated: state.num_repeated,
            ..Report::default()
        };
        for (fault, &has_happened) in self.plan.faults.iter().zip(&state.has_happened) {
            report.plan(fault.kind());
            if has_happened {
                report.happened(fault.kind());
            }
        }
        // Any process can send any numbers.
        let sum = |count: fn(&NetworkFaults) -> u64| {
            let all = state.network.values().map(count);
            all.fold(0, u64::saturating_add)
        };
        for (is_planned, kind, num) in [
            (
                self.plan.drop_percent > 0.0,
                "drop",
                sum(|faults| faults.num_cut),
            ),
            (
                self.plan.dup_percent > 0.0,
                "dup",
                sum(|faults| faults.num_doubled),
            ),
            (
                self.plan.delay.is_some(),
                "delay",
                sum(|faults| faults.num_delayed),
            ),
        ] {
            if is_planned {
                report.happened_often(kind, num);
            }
        }
        report
    }
}

impl State {
    fn applied(&mut self, version: u64, gradients: Vec<(u32, u64)>, at: Instant) {
        let recoveries = &mut self.recoveries;
        self.open.retain(|open| {
            let is_over = open.at <= at
                && match open.until {
                    Until::Worker(worker) => gradients.iter().any(|&(other, _)| other == worker),
                    Until::Any => true,
                    Until::NewServers => false,
                };
            if is_over {
                recoveries.push(at - open.at);
            }
            !is_over
        });
        // Servers that went on from a checkpoint without a log make these updates again.
        let repeated = self.updates.split_off(&version);
        self.num_repeated += repeated.values().map(|gone| gone.len() as u64).sum::<u64>();
        self.updates.insert(version, gradients);
    }
}

/// What is written in the file [`MARKS`].
struct Marks {
    faults: Vec<String>,
    driver_ends: Vec<SystemTime>,
    /// As many of the drivers' ends, from the first one on, as were recovered from.
    recoveries: Vec<Duration>,
}

impl Marks {
    fn read(text: &str) -> Self {
        let mut marks = Self {
            faults: Vec::new(),
            driver_ends: Vec::new(),
            recoveries: Vec::new(),
        };
        let micros = |text: &str| text.parse().ok().map(Duration::from_micros);
        for line in text.lines() {
            if let Some(took) = line.strip_prefix(RECOVERED) {
                marks.recoveries.extend(micros(took));
            } else if let Some((fault, at)) = line.split_once(ENDED) {
                let at = micros(at).and_then(|since| UNIX_EPOCH.checked_add(since));
                marks.driver_ends.extend(at);
                marks.faults.push(fault.to_owned());
            } else {
                marks.faults.push(line.to_owned());
            }
        }
        // Somebody may have written to the file.
        marks.recoveries.truncate(marks.driver_ends.len());
        marks
    }
}

fn since_1970(time: SystemTime) -> Duration {
    time.duration_since(UNIX_EPOCH).unwrap_or_default()
}

fn newest_checkpoint(directory: &Path) -> io::Result<Option<String>> {
    let entries = fs::read_dir(directory)?.map_while(Result::ok);
    let names = entries.map(|entry| entry.file_name());
    let names = names.filter_map(|name| name.into_string().ok());
    Ok(names.filter(|name| name.starts_with("checkpoint-")).max())
}

/// Changes one byte in the newest checkpoint of the directory. Returns `false` if there is none.
fn damage_newest(directory: &Path) -> io::Result<bool> {
    let Some(newest) = newest_checkpoint(directory)? else {
        return Ok(false);
    };
    let path = directory.join(newest).join("model.safetensors");
    let mut file = File::options().read(true).write(true).open(path)?;
    let end = file.seek(SeekFrom::End(-1))?;
    let mut byte = [0];
    file.read_exact(&mut byte)?;
    file.seek(SeekFrom::Start(end))?;
    file.write_all(&[byte[0] ^ 1])?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ledger(plan: &str, directory: Option<&Path>, resumes: bool) -> Ledger {
        Ledger::new(plan.parse().unwrap(), directory, resumes)
    }

    fn applied(version: u64, gradients: &[(u32, u64)]) -> Event {
        let gradients = gradients.to_vec();
        Event::Applied { version, gradients }
    }

    fn after(start: Instant, millis: u64) -> Instant {
        start + Duration::from_millis(millis)
    }

    #[test]
    fn a_fault_happens_once() {
        let ledger = ledger(
            "kill worker 1 @ step 3; kill worker 1 @ step 3",
            None,
            false,
        );
        let now = Instant::now();
        assert!(ledger.claim(0, false, now) && !ledger.claim(0, false, now));
        assert!(ledger.claim(1, false, now) && !ledger.claim(2, false, now));
        assert!(ledger.report().is_complete());
    }

    #[test]
    fn a_fault_does_not_happen_again_when_the_run_goes_on() {
        let directory = tempfile::tempdir().unwrap();
        let path = Some(directory.path());
        let plan = "kill server 0 @ version 3; kill server 0 @ version 9";
        let now = Instant::now();
        let first = ledger(plan, path, false);
        assert!(first.claim(0, false, now));
        let next = ledger(plan, path, true);
        assert!(!next.claim(0, false, now) && next.claim(1, false, now));
        assert!(ledger(plan, path, true).report().is_complete());
        // One that is refused, because it does not say that it goes on.
        let checkpoint = directory.path().join("checkpoint-000000000004");
        fs::create_dir(&checkpoint).unwrap();
        ledger(plan, path, false);
        assert!(ledger(plan, path, true).report().is_complete());
        // Another run.
        fs::remove_dir(checkpoint).unwrap();
        assert!(ledger(plan, path, false).claim(0, false, now));
    }

    /// From the kill, over the time until somebody starts the next driver, to its first update.
    #[test]
    fn the_recoveries_of_drivers_are_in_the_report_of_the_last_one() {
        let directory = tempfile::tempdir().unwrap();
        let path = Some(directory.path());
        let plan = "kill worker 1 @ step 2; kill server 0 @ version 3; kill server 0 @ version 9";
        let first = ledger(plan, path, false);
        assert!(first.claim(0, false, Instant::now()) && first.claim(1, true, Instant::now()));

        // Half a minute passes.
        let marks = directory.path().join(MARKS);
        let text = fs::read_to_string(&marks).unwrap();
        let (before, at) = text.trim_end().rsplit_once(ENDED).unwrap();
        let earlier = at.parse::<u64>().unwrap() - 30_000_000;
        fs::write(&marks, format!("{before}{ENDED}{earlier}\n")).unwrap();

        let second = ledger(plan, path, true);
        assert!(second.report().recoveries.is_empty());
        for version in [3, 4] {
            second.saw(applied(version, &[(0, version)]), Instant::now());
        }
        let seconds = |ledger: &Ledger| {
            let recoveries = ledger.report().recoveries.into_iter();
            recoveries.map(|one| one.as_secs()).collect::<Vec<_>>()
        };
        assert_eq!(seconds(&second), [30]);
        assert!(second.claim(2, true, Instant::now()));

        let third = ledger(plan, path, true);
        third.saw(applied(9, &[(0, 9)]), Instant::now());
        assert_eq!(seconds(&third), [30, 0]);
        assert!(third.report().is_complete());
    }

    #[test]
    fn a_recovery_ends_with_a_gradient_of_the_worker_or_of_the_new_servers() {
        let plan = "kill worker 1 @ step 3; kill server 1 @ version 9";
        let (ledger, start) = (ledger(plan, None, false), Instant::now());
        ledger.claim(0, false, start);
        ledger.saw(applied(1, &[(0, 0)]), after(start, 10));
        ledger.saw(applied(2, &[(0, 1), (1, 0)]), after(start, 20));
        ledger.claim(1, false, after(start, 30));
        ledger.saw(applied(3, &[(0, 2)]), after(start, 31));
        ledger.saw(Event::Made, after(start, 70));
        ledger.saw(applied(3, &[(0, 2)]), after(start, 80));
        let report = ledger.report();
        assert_eq!(report.recoveries, [20, 50].map(Duration::from_millis));
        assert_eq!(report.num_repeated, 1);
    }

    #[test]
    fn only_what_is_in_the_weights_counts() {
        let (ledger, now) = (ledger("", None, false), Instant::now());
        for event in [
            applied(1, &[(0, 0), (1, 0)]),
            applied(2, &[(0, 1)]),
            applied(3, &[(1, 1)]),
            // Made again from version 1 on, in another order.
            applied(2, &[(1, 1)]),
            applied(3, &[(0, 1)]),
        ] {
            ledger.saw(event, now);
        }
        let counts = |num_steps, num_doubled| Counts {
            num_steps,
            num_doubled,
        };
        assert_eq!(ledger.counts(), counts(4, 0));
        ledger.saw(applied(4, &[(0, 1)]), now);
        assert_eq!(ledger.counts(), counts(4, 1));
    }

    #[test]
    fn the_newest_checkpoint_is_damaged_once_there_is_one() {
        let directory = tempfile::tempdir().unwrap();
        let ledger = ledger(
            "damage checkpoint @ version 2",
            Some(directory.path()),
            false,
        );
        let now = Instant::now();
        ledger.saw(applied(2, &[(0, 0)]), now);
        assert!(!ledger.report().is_complete());
        for name in ["checkpoint-000000000001", "checkpoint-000000000002"] {
            let checkpoint = directory.path().join(name);
            fs::create_dir(&checkpoint).unwrap();
            fs::write(checkpoint.join("model.safetensors"), [7, 8, 9]).unwrap();
        }
        ledger.saw(applied(3, &[(0, 1)]), now);
        ledger.saw(applied(4, &[(0, 2)]), now);
        assert!(ledger.report().is_complete());
        let read = |name: &str| fs::read(directory.path().join(name).join("model.safetensors"));
        assert_eq!(read("checkpoint-000000000001").unwrap(), [7, 8, 9]);
        assert_eq!(read("checkpoint-000000000002").unwrap(), [7, 8, 8]);
    }
}
