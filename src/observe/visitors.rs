//! Tells observers of workers that come by themselves, over HTTP: who they are, what they push, and when they are gone.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ps_actors::group::ServerGroup;
use ps_actors::http::{Seen, SettledPush};
use ps_actors::ids::{Clock, Epoch, WorkerId};
use ps_actors::server::{Outcome, ServerStatus};

use super::Observers;
use super::collector::seen;
use super::event::{
    Event, SettledStep, StepOutcome, StepsMissed, WorkerJoined, WorkerLeft, WorkerLost,
};

/// How often observers are told of the servers, in seconds.
const LOOK_AT_SERVERS: f64 = 1.0;

/// Tells the observers of a program that serves [HTTP](ps_actors::http) what its workers do. A clone is another handle
/// to the same workers. Nothing is known of how these workers spend their time.
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
    /// How many of its gradients were settled that the observers need not know of, or know.
    num_known: u64,
    is_here: bool,
    /// The epoch that its joining began. A status of an earlier one does not know of it.
    epoch: Epoch,
}

impl Visitors {
    /// Makes a handle. `status` is that of the servers, before any worker can reach them.
    #[must_use]
    pub fn new(observers: &Observers, servers: &ServerGroup, status: &[ServerStatus]) -> Self {
        let coordinator = status.iter().find_map(|status| status.coordinator.as_ref());
        let before = coordinator.into_iter().flat_map(|first| &first.workers);
        let workers = before.map(|(&worker, status)| {
            let visitor = Visitor {
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

    /// Tells the observers what a worker did. A push that came twice is one step.
    pub fn tell(&self, seen: &Seen) {
        if self.observers.is_nobody() {
            return;
        }
        let mut known = self.lock();
        let time = self.observers.seconds();
        match *seen {
            Seen::Joined { worker, epoch } => {
                let visitor = known.workers.entry(worker).or_default();
                visitor.epoch = epoch;
                // A request to join may be repeated.
                if !std::mem::replace(&mut visitor.is_here, true) {
                    self.observers.tell(Event::WorkerJoined(WorkerJoined {
                        time,
                        worker,
                        node: None,
                    }));
                }
            }
            Seen::Left(worker) => {
                let visitor = known.workers.entry(worker).or_default();
                if std::mem::take(&mut visitor.is_here) {
                    self.observers
                        .tell(Event::WorkerLeft(WorkerLeft { time, worker }));
                }
            }
            Seen::Settled(ref push) => {
                let visitor = known.workers.entry(push.id.worker).or_default();
                if push.id.clock >= visitor.next {
                    visitor.next = push.id.clock.next();
                    visitor.num_known += 1;
                    self.observers.tell(Event::Step(step(push, time)));
                }
            }
            // What a later version of `ps-actors` may see.
            _ => {}
        }
    }

    /// Tells the observers what the status of the servers shows: workers that were lost, steps whose answers nobody
    /// waited for, and, once per second, the servers themselves. Call it now and then.
    pub fn look(&self, status: &[ServerStatus]) {
        let coordinator = status.iter().find_map(|status| status.coordinator.as_ref());
        let Some(coordinator) = coordinator.filter(|_| !self.observers.is_nobody()) else {
            return;
        };
        let mut known = self.lock();
        let time = self.observers.seconds();
        let gone = coordinator.workers.iter();
        for (&worker, status) in gone.filter(|(_, status)| !status.is_member) {
            let visitor = known.workers.entry(worker).or_default();
            if visitor.epoch > coordinator.epoch {
                continue;
            }
            if std::mem::take(&mut visitor.is_here) {
                self.observers.tell(Event::WorkerLost(WorkerLost {
                    time,
                    worker,
                    node: None,
                    reason: "it was silent for longer than its lease".to_owned(),
                }));
            }
            // While it is here, its answers may be on their way.
            let num_steps = status.num_settled().saturating_sub(visitor.num_known);
            if num_steps > 0 {
                visitor.num_known += num_steps;
                let first = visitor.next;
                visitor.next = Clock(first.0.saturating_add(num_steps));
                self.observers.tell(Event::StepsMissed(StepsMissed {
                    time,
                    worker,
                    first,
                    num_steps,
                }));
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
    use std::sync::mpsc::channel;

    use ps_actors::actor::run;
    use ps_actors::ids::{GradientId, JoinRequest, Version};
    use ps_actors::rule::Sgd;
    use ps_actors::server::{Consistency, ServerConfig};
    use ps_actors::weights::{Gradient, GradientUpdate, Layout, Weights};

    use super::*;

    /// Servers without HTTP in between, and the events that are told.
    struct World {
        servers: ServerGroup,
        visitors: Visitors,
    }

    impl World {
        fn status(&self) -> Vec<ServerStatus> {
            run(self.servers.status()).unwrap()
        }

        fn join(&self, request: u64) -> GradientId {
            let (worker, request) = (WorkerId(0), JoinRequest(request));
            let membership = run(self.servers.join(worker, request)).unwrap();
            let epoch = membership.epoch;
            self.visitors.tell(&Seen::Joined { worker, epoch });
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
        let initial = Weights::initial(Layout::flat(2), vec![0.0; 2]);
        let config = ServerConfig {
            consistency: Consistency::Asp,
            ..ServerConfig::default()
        };
        let servers = ServerGroup::spawn(&initial, 2, config, |_| Box::new(Sgd::new())).unwrap();
        let (sender, events) = channel();
        let told = move |event: &Event| sender.send(event.clone()).unwrap();
        let observers = Observers::start(vec![Box::new(told)]);
        let status = run(servers.status()).unwrap();
        let visitors = Visitors::new(&observers, &servers, &status);
        let world = World { servers, visitors };

        let mut id = world.join(1);
        let (worker, epoch) = (id.worker, Epoch(0));
        world.visitors.tell(&Seen::Joined { worker, epoch });
        let settled = world.push(id);
        world.visitors.tell(&settled);
        world.visitors.tell(&settled);
        // The connection of the next push ended before the answer.
        id.clock = id.clock.next();
        world.push(id);
        world.visitors.look(&world.status());
        run(world.servers.leave(id.worker, id.incarnation)).unwrap();
        world.visitors.tell(&Seen::Left(id.worker));
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
        drop(world);
        observers.run_ended();
        let events: Vec<Event> = events.iter().collect();
        let names: Vec<String> = events.iter().map(name).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        // Looks at the servers depend on the time.
        let rare: Vec<&str> = names
            .into_iter()
            .filter(|name| *name != "servers_seen")
            .collect();
        assert_eq!(
            rare,
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
    fn steps_from_before_the_program_began_are_not_missed() {
        let status = ps_actors::server::WorkerStatus {
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
