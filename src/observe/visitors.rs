//! Tells observers of workers that come by themselves, over HTTP: who they are, what they push, and when they are gone.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ps_actors::group::ServerGroup;
use ps_actors::http::{Seen, SettledPush};
use ps_actors::ids::{Clock, Epoch, GradientId, Incarnation, WorkerId};
use ps_actors::server::{Outcome, ServerStatus, WorkerStatus};

use super::Observers;
use super::collector::seen;
use super::event::{
    Event, SettledStep, StepOutcome, StepsMissed, WorkerJoined, WorkerLeft, WorkerLost,
};

/// How often observers are told of the servers, in seconds.
const LOOK_AT_SERVERS: f64 = 1.0;

/// Tells the observers of a program that serves [HTTP](ps_actors::http) what its workers do. A clone is another handle
/// to the same workers. Nothing is known of how these workers spend their time. A clock that a worker leaves out counts
/// as a step that was missed.
///
/// ```
/// use ps::actors::http::{Api, HttpConfig};
/// use ps::observe::{Observers, Settings, Visitors};
/// use ps::prelude::*;
///
/// # let device = select_device(default_device_name())?;
/// # let initial = initial_weights(&ConvNet::init(0, &device), &device)?;
/// let server = ParameterServer::new(&initial, Sgd::new(), ServerConfig::default())?.spawn()?;
/// let servers = ServerGroup::from(server);
/// let observers = Observers::start(vec![Box::new(|event: &ps::observe::Event| println!("{event:?}"))]);
/// observers.run_started(Settings::default(), initial.version());
///
/// let visitors = Visitors::new(&observers, &servers, &run(servers.status())?);
/// let told = visitors.clone();
/// let api = Api::watched(HttpConfig::default(), move |seen| told.tell(seen));
/// api.open(servers.clone());
/// let _routes = api.routes(); // For `Cluster::listen_with`.
///
/// // Now and then:
/// visitors.look(&run(servers.status())?);
/// // At the end:
/// api.close();
/// visitors.last_look(&run(servers.status())?);
/// observers.run_ended();
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Visitors {
    observers: Observers,
    servers: ServerGroup,
    known: Arc<Mutex<Known>>,
}

#[derive(Debug)]
struct Known {
    workers: BTreeMap<WorkerId, Visitor>,
    /// When the observers were told of the servers, in seconds since the run started.
    looked: f64,
}

#[derive(Debug, Default)]
struct Visitor {
    /// The clock after its latest step.
    next: Clock,
    /// How many of its settled gradients the observers know of, or need not, because they are from before.
    num_known: u64,
    is_here: bool,
    /// The latest one that has joined.
    incarnation: Incarnation,
    /// The epoch that its joining began. A status of an earlier one does not know of it.
    epoch: Epoch,
}

impl Visitor {
    /// Takes in that steps were settled of which nothing else is known, and returns the event of it.
    fn miss(&mut self, worker: WorkerId, num_steps: u64, time: f64) -> Option<Event> {
        let first = self.next;
        self.num_known = self.num_known.saturating_add(num_steps);
        self.next = Clock(first.0.saturating_add(num_steps));
        (num_steps > 0).then_some(Event::StepsMissed(StepsMissed {
            time,
            worker,
            first,
            num_steps,
        }))
    }

    /// Returns how many of its steps, from the next one on, are settled and not known.
    fn num_unknown(&self, status: &WorkerStatus) -> u64 {
        let num_unknown = status.num_settled().saturating_sub(self.num_known);
        num_unknown.min(status.next_clock.0.saturating_sub(self.next.0))
    }
}

impl Visitors {
    /// Makes a handle. `status` is that of the servers, before any worker can reach them.
    #[must_use]
    pub fn new(observers: &Observers, servers: &ServerGroup, status: &[ServerStatus]) -> Self {
        let coordinator = status.iter().find_map(|status| status.coordinator.as_ref());
        let before = coordinator.into_iter().flat_map(|first| &first.workers);
        let workers = before.map(|(&worker, status)| {
            let visitor = Visitor {
                next: status.next_clock,
                num_known: status.num_settled(),
                ..Visitor::default()
            };
            (worker, visitor)
        });
        let known = Known {
            workers: workers.collect(),
            looked: f64::NEG_INFINITY,
        };
        Self {
            observers: observers.clone(),
            servers: servers.clone(),
            known: Arc::new(Mutex::new(known)),
        }
    }

    /// Tells the observers what a worker did. A push that came twice is one step. Ignores a leave of an incarnation
    /// that is not the latest one, or of somebody who never joined.
    pub fn tell(&self, seen: &Seen) {
        if self.observers.is_nobody() {
            return;
        }
        let mut known = self.lock();
        let time = self.observers.seconds();
        match *seen {
            Seen::Joined {
                worker,
                incarnation,
                clock,
                epoch,
            } => {
                let visitor = known.workers.entry(worker).or_insert_with(|| Visitor {
                    next: clock,
                    ..Visitor::default()
                });
                // A request to join may be repeated, or told late.
                if incarnation <= visitor.incarnation {
                    return;
                }
                (visitor.incarnation, visitor.epoch) = (incarnation, epoch);
                if !std::mem::replace(&mut visitor.is_here, true) {
                    self.observers.tell(Event::WorkerJoined(WorkerJoined {
                        time,
                        worker,
                        node: None,
                        next_clock: clock,
                    }));
                }
            }
            Seen::Left {
                worker,
                incarnation,
            } => {
                let visitor = known.workers.get_mut(&worker);
                let visitor = visitor.filter(|visitor| visitor.incarnation == incarnation);
                if visitor.is_some_and(|visitor| std::mem::take(&mut visitor.is_here)) {
                    self.observers
                        .tell(Event::WorkerLeft(WorkerLeft { time, worker }));
                }
            }
            Seen::Settled(ref push) => {
                let GradientId { worker, clock, .. } = push.id;
                let visitor = known.workers.entry(worker).or_insert_with(|| Visitor {
                    next: clock,
                    ..Visitor::default()
                });
                if clock >= visitor.next {
                    // The answers of the steps in between were cut off.
                    let missed = visitor.miss(worker, clock.0 - visitor.next.0, time);
                    visitor.next = clock.next();
                    visitor.num_known = visitor.num_known.saturating_add(1);
                    let events = missed.into_iter().chain([Event::Step(step(push, time))]);
                    events.for_each(|event| self.observers.tell(event));
                }
            }
            // What a later version of `ps-actors` may see.
            _ => {}
        }
    }

    /// Tells the observers what the status of the servers shows: workers that were lost, steps whose answers nobody
    /// waited for, and, once per second, the servers themselves. Call it now and then.
    pub fn look(&self, status: &[ServerStatus]) {
        self.look_at(status, false);
    }

    /// As [`look`](Self::look), at the end, when no answers are on their way any more: also tells of the steps of
    /// workers that have not left. Call it when the [`Api`](ps_actors::http::Api) is closed.
    pub fn last_look(&self, status: &[ServerStatus]) {
        self.look_at(status, true);
    }

    fn look_at(&self, status: &[ServerStatus], is_last: bool) {
        let coordinator = status.iter().find_map(|status| status.coordinator.as_ref());
        let Some(coordinator) = coordinator.filter(|_| !self.observers.is_nobody()) else {
            return;
        };
        let mut known = self.lock();
        let time = self.observers.seconds();
        let workers = coordinator.workers.iter();
        // While a worker is here, its answers may be on their way.
        for (&worker, status) in workers.filter(|(_, status)| is_last || !status.is_member) {
            let visitor = known.workers.entry(worker).or_insert_with(|| Visitor {
                next: Clock(status.next_clock.0.saturating_sub(status.num_settled())),
                ..Visitor::default()
            });
            if visitor.epoch > coordinator.epoch {
                continue;
            }
            if !status.is_member && std::mem::take(&mut visitor.is_here) {
                self.observers.tell(Event::WorkerLost(WorkerLost {
                    time,
                    worker,
                    node: None,
                    reason: "it was silent for longer than its lease".to_owned(),
                }));
            }
            let missed = visitor.miss(worker, visitor.num_unknown(status), time);
            missed
                .into_iter()
                .for_each(|event| self.observers.tell(event));
            if !status.is_member {
                // What it left out is over, too.
                visitor.next = visitor.next.max(status.next_clock);
            }
        }
        if time >= known.looked + LOOK_AT_SERVERS {
            known.looked = time;
            let seen = seen(time, status, &self.servers);
            self.observers.tell(Event::ServersSeen(seen));
        }
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn step(push: &SettledPush, time: f64) -> SettledStep {
    let version = push.outcome.version();
    let (outcome, staleness) = match push.outcome {
        Outcome::Applied { staleness, .. } => (StepOutcome::Applied, staleness),
        Outcome::DroppedLate { staleness, .. } => (StepOutcome::Late, staleness),
        Outcome::RefusedNorm { .. } => (
            StepOutcome::Refused,
            version.0.saturating_sub(push.computed_on.0),
        ),
    };
    SettledStep {
        time,
        worker: push.id.worker,
        incarnation: push.id.incarnation,
        clock: push.id.clock,
        computed_on: push.computed_on,
        outcome,
        version,
        staleness,
        loss: push.loss,
        norm: push.norm,
        num_examples: push.num_examples as u64,
        times: None,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, channel};

    use ps_actors::actor::run;
    use ps_actors::ids::{JoinRequest, Version};
    use ps_actors::rule::{Sgd, UpdateRule};
    use ps_actors::server::{Consistency, ServerConfig};
    use ps_actors::weights::{Gradient, GradientUpdate, Layout, Weights};

    use super::*;

    /// Servers without HTTP in between, and the events that are told.
    struct World {
        servers: ServerGroup,
        visitors: Visitors,
        events: Receiver<Event>,
    }

    impl World {
        fn new() -> Self {
            let initial = Weights::initial(Layout::flat(2), vec![0.0; 2]);
            let config = ServerConfig {
                consistency: Consistency::Asp,
                ..ServerConfig::default()
            };
            let sgd = |_| -> Box<dyn UpdateRule> { Box::new(Sgd::new()) };
            let servers = ServerGroup::spawn(&initial, 2, config, sgd).unwrap();
            let (sender, events) = channel();
            let told = move |event: &Event| sender.send(event.clone()).unwrap();
            let observers = Observers::start(vec![Box::new(told)]);
            let visitors = Visitors::new(&observers, &servers, &run(servers.status()).unwrap());
            Self {
                servers,
                visitors,
                events,
            }
        }

        /// Returns all events, and the names of those that do not depend on the time.
        fn end(self) -> (Vec<Event>, Vec<String>) {
            self.visitors.observers.run_ended();
            let events: Vec<Event> = self.events.iter().collect();
            // Looks at the servers do.
            let rare = events
                .iter()
                .map(name)
                .filter(|name| name != "servers_seen");
            let names = rare.collect();
            (events, names)
        }

        fn leave(&self, id: GradientId) {
            run(self.servers.leave(id.worker, id.incarnation)).unwrap();
            self.visitors.tell(&Seen::Left {
                worker: id.worker,
                incarnation: id.incarnation,
            });
        }

        fn status(&self) -> Vec<ServerStatus> {
            run(self.servers.status()).unwrap()
        }

        fn join(&self, request: u64) -> GradientId {
            let (worker, request) = (WorkerId(0), JoinRequest(request));
            let membership = run(self.servers.join(worker, request)).unwrap();
            self.visitors.tell(&Seen::Joined {
                worker,
                incarnation: membership.incarnation,
                clock: membership.next_clock,
                epoch: membership.epoch,
            });
            GradientId {
                worker,
                incarnation: membership.incarnation,
                clock: membership.next_clock,
            }
        }

        fn push(&self, id: GradientId) -> Seen {
            let computed_on = Version(0);
            let (loss, num_examples) = (0.5, 4);
            let update = GradientUpdate {
                id,
                computed_on,
                loss,
                num_examples,
                gradient: Gradient::new(vec![3.0, 4.0]),
            };
            Seen::Settled(SettledPush {
                id,
                computed_on,
                loss,
                norm: 5.0,
                num_examples,
                outcome: run(self.servers.push(update)).unwrap(),
            })
        }
    }

    fn name(event: &Event) -> String {
        let name = |event: &Event| serde_json::to_value(event).unwrap()["event"].clone();
        name(event).as_str().unwrap().to_owned()
    }

    #[test]
    fn each_step_of_a_visitor_is_told_once_and_a_loss_only_if_it_is_one() {
        let world = World::new();
        let mut id = world.join(1);
        // The request is repeated.
        world.join(1);
        let settled = world.push(id);
        world.visitors.tell(&settled);
        world.visitors.tell(&settled);
        // The connection of the next push ended before the answer.
        id.clock = id.clock.next();
        world.push(id);
        world.visitors.look(&world.status());
        world.leave(id);
        let while_away = world.status();
        world.visitors.look(&while_away);
        // It comes again after the servers were asked, and before they are looked at.
        world.join(2);
        world.visitors.look(&while_away);
        world.visitors.look(&world.status());
        // Now it is lost.
        run(world.servers.report_lost(id.worker)).unwrap();
        for _ in 0..3 {
            world.visitors.look(&world.status());
        }
        let (events, names) = world.end();
        assert_eq!(
            names,
            [
                "worker_joined",
                "step",
                "worker_left",
                "steps_missed",
                "worker_joined",
                "worker_lost",
                "run_ended"
            ]
        );
        for event in &events {
            match event {
                Event::Step(step) => {
                    assert_eq!((step.clock, step.loss, step.norm), (Clock(0), 0.5, 5.0));
                    assert_eq!((step.version, step.staleness), (Version(1), 0));
                }
                Event::StepsMissed(missed) => {
                    assert_eq!((missed.first, missed.num_steps), (Clock(1), 1));
                }
                Event::ServersSeen(seen) => assert_eq!(seen.servers.len(), 2),
                _ => {}
            }
        }
        assert!(
            events
                .iter()
                .any(|event| matches!(event, Event::ServersSeen(_)))
        );
    }

    #[test]
    fn a_leave_of_a_stranger_or_of_an_earlier_incarnation_is_not_believed() {
        let world = World::new();
        let early = world.join(1);
        world.join(2);
        world.leave(early);
        for rank in 1..1000 {
            let worker = WorkerId(rank);
            world.leave(GradientId { worker, ..early });
        }
        assert_eq!(world.visitors.lock().workers.len(), 1);
        world.visitors.look(&world.status());
        // What the earlier incarnation did is told late.
        let (worker, incarnation) = (early.worker, early.incarnation);
        let (clock, epoch) = (early.clock, Epoch(1));
        world.visitors.tell(&Seen::Joined {
            worker,
            incarnation,
            clock,
            epoch,
        });
        world.leave(early);
        assert!(world.visitors.lock().workers[&worker].is_here);
        assert_eq!(world.end().1, ["worker_joined", "run_ended"]);
    }

    #[test]
    fn a_join_that_is_told_again_after_the_leave_brings_nobody_back() {
        let world = World::new();
        let id = world.join(1);
        world.leave(id);
        world.visitors.tell(&Seen::Joined {
            worker: id.worker,
            incarnation: id.incarnation,
            clock: id.clock,
            epoch: Epoch(1),
        });
        world.visitors.look(&world.status());
        let (_, names) = world.end();
        assert_eq!(names, ["worker_joined", "worker_left", "run_ended"]);
    }

    #[test]
    fn steps_whose_answers_were_cut_off_are_missed_once_and_in_their_places() {
        let world = World::new();
        let tell = |id| world.visitors.tell(&world.push(id));
        let first = world.join(1);
        tell(first);
        // Nobody waits for the answer, and the worker comes back before the servers are looked at.
        let clock = first.clock.next();
        world.push(GradientId { clock, ..first });
        let second = world.join(2);
        assert_eq!(second.clock, Clock(2));
        tell(second);
        world.leave(second);
        world.visitors.look(&world.status());
        let third = world.join(3);
        assert_eq!(third.clock, Clock(3));
        tell(third);
        // It is still here at the end, and waits for no answer.
        let clock = third.clock.next();
        world.push(GradientId { clock, ..third });
        world.visitors.look(&world.status());
        world.visitors.last_look(&world.status());
        let (events, names) = world.end();
        assert_eq!(
            names,
            [
                "worker_joined",
                "step",
                "steps_missed",
                "step",
                "worker_left",
                "worker_joined",
                "step",
                "steps_missed",
                "run_ended"
            ]
        );
        let clocks = events.iter().filter_map(|event| match event {
            Event::Step(step) => Some((step.clock, 1)),
            Event::StepsMissed(missed) => Some((missed.first, missed.num_steps)),
            _ => None,
        });
        let clocks: Vec<(Clock, u64)> = clocks.collect();
        assert_eq!(clocks, [0, 1, 2, 3, 4].map(|clock| (Clock(clock), 1)));
    }

    #[test]
    fn steps_from_before_the_program_began_are_not_missed() {
        let status = WorkerStatus {
            num_applied: 7,
            ..Default::default()
        };
        let initial = Weights::initial(Layout::flat(1), vec![0.0]);
        let config = ServerConfig::default();
        let servers = ServerGroup::spawn(&initial, 1, config, |_| Box::new(Sgd::new())).unwrap();
        let mut before = run(servers.status()).unwrap();
        let coordinator = before[0].coordinator.as_mut().unwrap();
        coordinator.workers.insert(WorkerId(3), status);
        let (sender, events) = channel();
        let told = move |event: &Event| sender.send(event.clone()).unwrap();
        let observers = Observers::start(vec![Box::new(told)]);
        let visitors = Visitors::new(&observers, &servers, &before);
        visitors.look(&before);
        drop(visitors);
        observers.run_ended();
        let missed = |event: &Event| matches!(event, Event::StepsMissed(_));
        assert!(!events.iter().any(|event| missed(&event)));
    }
}
