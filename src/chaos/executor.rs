//! Does in this process what the plan says, and tells the driver what this process sees.

use std::mem;
use std::ops::Range;
use std::process;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use ps_actors::actor::ActorRef;
use ps_actors::chaos::Fault;
use ps_actors::chaos::network::{NetworkFaults, network_faults};
use ps_actors::chaos::points::{Point, Watch};
use ps_actors::cluster::lookup;
use ps_actors::launch::harm;
use ps_actors::server::partition;

use super::monitor::{Claim, Event, Ledger, Monitor, Seen};

/// The name under which processes find the driver's monitor.
pub(super) const MONITOR: &str = "chaos monitor";

/// How often a node tells the driver what it has seen. So a recovery is measured to this precision if the first
/// server is on a node.
const TELL: Duration = Duration::from_millis(5);

/// How long a process waits for the driver's answer before it gives a fault up for now.
const ANSWER: Duration = Duration::from_secs(2);

/// The pause before a fault is tried again, or the monitor looked for again.
const AGAIN: Duration = Duration::from_millis(200);

/// Does the faults of this process.
pub(super) struct Executor {
    faults: Vec<Planned>,
    /// How many of them may still happen here.
    num_left: AtomicUsize,
    num_servers: usize,
    role: Role,
}

struct Planned {
    fault: Fault,
    /// It has happened, here or elsewhere, or it cannot happen here.
    is_over: AtomicBool,
    /// When it was tried in vain.
    tried: Mutex<Option<Instant>>,
}

pub(super) enum Role {
    Driver {
        ledger: Arc<Ledger>,
        /// Whether this process may be killed, because a checkpoint has what it knows.
        may_die: bool,
    },
    Node(Arc<Link>),
}

impl Executor {
    pub(super) fn new(faults: &[Fault], num_servers: usize, role: Role) -> Self {
        let faults: Vec<_> = faults
            .iter()
            .map(|&fault| Planned {
                fault,
                is_over: AtomicBool::new(false),
                tried: Mutex::new(None),
            })
            .collect();
        Self {
            num_left: AtomicUsize::new(faults.len()),
            faults,
            num_servers,
            role,
        }
    }

    /// Lets all faults happen for which it is time.
    fn look(&self, is_time: impl Fn(&Fault) -> bool) {
        if self.num_left.load(Relaxed) == 0 {
            return;
        }
        for (index, planned) in self.faults.iter().enumerate() {
            if !planned.is_over.load(Relaxed) && is_time(&planned.fault) {
                self.attempt(index, planned);
            }
        }
    }

    fn attempt(&self, index: usize, planned: &Planned) {
        let now = Instant::now();
        let is_first_try;
        {
            let mut tried = planned.tried.lock().unwrap_or_else(PoisonError::into_inner);
            // Another thread asks the driver, or has just asked in vain.
            if tried.is_some_and(|tried| now < tried + AGAIN) {
                return;
            }
            is_first_try = tried.replace(now).is_none();
        }
        let fault = planned.fault;
        let is_last = matches!(fault, Fault::KillWorker { .. } | Fault::KillServer { .. });
        let is_granted = match &self.role {
            // The worker may get a place elsewhere.
            Role::Driver {
                ledger,
                may_die: false,
            } if is_last => {
                let has_happened = ledger.has_happened(index);
                if is_first_try && !has_happened {
                    tracing::warn!(%fault, "must wait: it would end the driver, and there is no checkpoint");
                }
                has_happened.then_some(false)
            }
            Role::Driver { ledger, .. } => Some(ledger.claim(index, is_last, now)),
            Role::Node(link) => link.claim(index),
        };
        let Some(is_granted) = is_granted else {
            return;
        };
        if !planned.is_over.swap(true, Relaxed) {
            self.num_left.fetch_sub(1, Relaxed);
        }
        if !is_granted {
            return;
        }
        match fault {
            Fault::KillWorker { .. } | Fault::KillServer { .. } => harm::kill_this_process(),
            Fault::StopWorker { pause, .. } | Fault::StopServer { pause, .. } => {
                if let Err(error) = harm::stop_this_process(pause) {
                    tracing::warn!(%fault, %error, "this process cannot be stopped");
                }
            }
            // Nothing that a process does to itself.
            _ => {}
        }
    }

    fn see(&self, event: Event) {
        match &self.role {
            Role::Driver { ledger, .. } => ledger.saw(event, Instant::now()),
            Role::Node(link) => link.see(event),
        }
    }

    /// The index of the server with this part of the weights.
    fn index_of(&self, range: &Range<usize>, num_weights: usize) -> Option<usize> {
        let ranges = partition(num_weights, self.num_servers.max(1));
        ranges.iter().position(|other| other == range)
    }
}

impl Watch for Executor {
    fn reached(&self, point: &Point<'_>) {
        match point {
            Point::WorkerComputes { worker, clock } => self.look(|fault| match fault {
                Fault::KillWorker { worker: hit, step }
                | Fault::StopWorker {
                    worker: hit, step, ..
                } => *hit == worker.0 && clock.0 >= *step,
                _ => false,
            }),
            Point::ServerMade { range, .. } if range.start == 0 => self.see(Event::Made),
            Point::ServerApplied {
                range,
                num_weights,
                version,
                gradients,
            } => {
                if range.start == 0 {
                    let named = gradients.iter().map(|id| (id.worker.0, id.clock.0));
                    self.see(Event::Applied {
                        version: version.0,
                        gradients: named.collect(),
                    });
                }
                self.look(|fault| match fault {
                    Fault::KillServer {
                        server,
                        version: from,
                    }
                    | Fault::StopServer {
                        server,
                        version: from,
                        ..
                    } => version.0 >= *from && self.index_of(range, *num_weights) == Some(*server),
                    _ => false,
                });
            }
            _ => {}
        }
        if let Role::Node(link) = &self.role {
            link.look_for_monitor();
        }
    }
}

/// A node's connection to the driver's monitor.
#[derive(Default)]
pub(super) struct Link {
    process: (u32, u32),
    state: Mutex<LinkState>,
    /// Held by the thread that tells.
    telling: Mutex<()>,
}

#[derive(Default)]
struct LinkState {
    monitor: Option<ActorRef<Monitor>>,
    looked: Option<Instant>,
    seen: Vec<(Instant, Event)>,
    /// What was sent, or will be, and has no answer.
    unanswered: Vec<(Instant, Event)>,
    /// The number of the last message that has an answer.
    number: u64,
    told: NetworkFaults,
}

impl Link {
    /// Begins to tell the driver what this process sees, on a thread of its own.
    ///
    /// # Errors
    /// If the system gives no thread.
    pub(super) fn start(rank: u32) -> std::io::Result<Arc<Self>> {
        let link = Arc::new(Self {
            process: (rank, process::id()),
            ..Self::default()
        });
        let telling = Arc::clone(&link);
        let thread = thread::Builder::new().name("chaos".to_owned());
        thread.spawn(move || {
            loop {
                // Nobody wakes this thread: it collects what was seen meanwhile.
                thread::sleep(TELL);
                telling.tell();
            }
        })?;
        Ok(link)
    }

    fn lock(&self) -> MutexGuard<'_, LinkState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn see(&self, event: Event) {
        self.lock().seen.push((Instant::now(), event));
    }

    /// Looks for the driver's monitor. This works on the threads of actors that the driver has started only, and
    /// those reach points.
    fn look_for_monitor(&self) {
        let now = Instant::now();
        {
            let mut state = self.lock();
            let is_early = state.looked.is_some_and(|looked| now < looked + AGAIN);
            if state.monitor.is_some() || is_early {
                return;
            }
            state.looked = Some(now);
        }
        let found = lookup::<Monitor>(MONITOR).wait();
        self.lock().monitor = found;
    }

    /// Asks the driver. Returns `None` if there is no answer.
    fn claim(&self, fault: usize) -> Option<bool> {
        self.look_for_monitor();
        // The process may have no other occasion to tell it.
        self.tell();
        let monitor = self.lock().monitor.clone()?;
        let fault = u32::try_from(fault).ok()?;
        let answer = monitor.ask(Claim { fault }).wait_timeout(ANSWER);
        if answer.is_err() {
            self.lock().monitor = None;
        }
        answer.ok()
    }

    /// Tells the driver what was seen until now. What is told twice, because the answer was lost, counts once.
    fn tell(&self) {
        let _turn = self.telling.lock().unwrap_or_else(PoisonError::into_inner);
        let faults = network_faults();
        let (monitor, message) = {
            let mut state = self.lock();
            let Some(monitor) = state.monitor.clone() else {
                return;
            };
            if state.unanswered.is_empty() {
                state.unanswered = mem::take(&mut state.seen);
            }
            if state.unanswered.is_empty() && state.told == faults {
                return;
            }
            let age = |at: &Instant| u64::try_from(at.elapsed().as_micros()).unwrap_or(u64::MAX);
            let events = state.unanswered.iter();
            let message = Seen {
                process: self.process,
                number: state.number + 1,
                events: events.map(|(at, event)| (age(at), event.clone())).collect(),
                num_cut: faults.num_cut,
                num_doubled: faults.num_doubled,
                num_delayed: faults.num_delayed,
            };
            (monitor, message)
        };
        let told = monitor.ask(message).wait_timeout(ANSWER);
        let mut state = self.lock();
        match told {
            Ok(()) => {
                state.unanswered.clear();
                state.number += 1;
                state.told = faults;
            }
            Err(_) => state.monitor = None,
        }
    }
}

#[cfg(test)]
mod tests {
    use ps_actors::chaos::Plan;
    use ps_actors::ids::{Clock, WorkerId};

    use super::*;

    /// As when a worker is killed on a node, and goes on in the driver.
    #[test]
    fn a_fault_that_would_end_the_driver_waits_until_it_has_happened_elsewhere() {
        let plan: Plan = "kill worker 1 @ step 3".parse().unwrap();
        let ledger = Arc::new(Ledger::new(plan.clone(), None, false));
        let new = || {
            let role = Role::Driver {
                ledger: Arc::clone(&ledger),
                may_die: false,
            };
            Executor::new(&plan.faults, 1, role)
        };
        let num_left_after_step = |executor: &Executor| {
            let (worker, clock) = (WorkerId(1), Clock(4));
            executor.reached(&Point::WorkerComputes { worker, clock });
            executor.num_left.load(Relaxed)
        };
        assert_eq!(num_left_after_step(&new()), 1);
        assert!(ledger.claim(0, false, Instant::now()));
        assert_eq!(num_left_after_step(&new()), 0);
    }
}
