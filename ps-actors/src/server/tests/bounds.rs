//! PS-7: nothing that anybody can make up lets a server grow for ever.

use actix::{Handler, Message, MessageResult};
use ps_runtime::actor::ActorRef;

use super::*;
use crate::server::actor::{ParameterServer, Role};
use crate::server::coordinator::Coordinator;
use crate::server::protocol::MAX_WORKERS;
use crate::server::shard::MAX_STAGED_OF_STRANGERS;
use crate::server::{ApplyGradients, Heartbeat, Leave, Push, ReportLost, ServerConfig, Stage};
use crate::weights::GradientUpdate;

/// More workers than a server keeps books of.
const MANY: u32 = 70_000;

fn event(kind: usize, worker: u32, ticket: Ticket) -> Event {
    let stamp = Stamp {
        id: id(worker, 0, 0),
        computed_on: Version(0),
        norm: f64::NAN,
        num_examples: 1,
    };
    let worker = WorkerId(worker);
    match kind {
        0 => Event::Lost { worker },
        1 => Event::Leave {
            ticket,
            worker,
            incarnation: Incarnation(1),
        },
        2 => Event::Push {
            ticket,
            stamp,
            then_start: true,
        },
        3 => Event::Apply {
            ticket,
            stamps: vec![stamp],
            reduction: Reduction::Sum,
            newest: NEWEST,
        },
        _ => Event::Join {
            ticket,
            worker,
            request: JoinRequest(0),
        },
    }
}

/// Each kind of event on a new server, and all on one.
#[test]
fn made_up_workers_do_not_fill_the_books() {
    let new = || {
        let coordinator = Coordinator::new(Consistency::Bsp, Reduction::Mean, f64::INFINITY);
        coordinator.wait_for_workers(3)
    };
    let mut all = new();
    for kind in 0..5 {
        let mut alone = new();
        let mut fences = Vec::new();
        for made_up in 0..MANY {
            let worker = WorkerId(made_up);
            for coordinator in [&mut alone, &mut all] {
                let mut effects = coordinator.step(event(kind, made_up, Ticket(0)));
                // A worker that has joined is lost again. Its record stays.
                effects.extend(coordinator.step(Event::Lost { worker }));
                let fence = |effect: &Effect| matches!(effect, Effect::Fence { .. });
                if effects.iter().any(fence) {
                    fences.push(worker);
                }
            }
        }
        // Only workers that were accepted have records.
        let most = if kind < 3 { 3 } else { MAX_WORKERS };
        assert!(alone.largest_book() <= most, "kind {kind}");
        assert!(all.largest_book() <= MAX_WORKERS, "kind {kind}");
        fences.sort();
        fences.dedup();
        assert!(fences.len() <= MAX_WORKERS, "kind {kind}");
    }
    // Who is in the books goes on.
    let answer = all.step(event(2, 0, Ticket(1)));
    let answered = |effect: &Effect| {
        matches!(
            effect,
            Effect::Answer {
                ticket: Ticket(1),
                ..
            }
        )
    };
    assert!(answer.iter().any(answered), "{answer:?}");
}

#[test]
fn gradients_of_made_up_workers_do_not_fill_a_shard() {
    let mut world = World::new(2, Consistency::Asp, Reduction::Sum);
    let gradient = Gradient::new(vec![1.0; LEN]);
    for made_up in 0..MANY {
        let staged = world.shards[1].stage(id(made_up, 1, 0), &gradient);
        assert_eq!(staged.is_ok(), made_up < MAX_STAGED_OF_STRANGERS as u32);
    }
    assert_eq!(world.shards[1].num_staged(), MAX_STAGED_OF_STRANGERS);
    assert_eq!(world.shards[1].num_fences(), 0);
    // A member is none of them, as soon as its join is known there.
    world.join(MANY, 1).unwrap();
    let first = id(MANY, 1, 0);
    let early = world.shards[1].stage(first, &gradient).unwrap_err();
    assert_eq!(early, ShardError::TooManyStrangers { id: first });
    world.deliver_all();
    world.push(first, 0, vec![2.0; LEN]);
    assert_eq!(world.weights(), vec![2.0; LEN]);
    // Nor does whoever joins late leave its place taken.
    world.join(0, 1).unwrap();
    world.deliver_all();
    let freed = world.shards[1].stage(id(MANY + 1, 1, 0), &gradient);
    assert!(freed.is_ok(), "{freed:?}");
}

/// How many entries the largest book of a server has.
#[derive(Message)]
#[rtype(result = "usize")]
struct GetLargestBook;

impl Handler<GetLargestBook> for ParameterServer {
    type Result = MessageResult<GetLargestBook>;

    fn handle(&mut self, _: GetLargestBook, _: &mut Self::Context) -> Self::Result {
        let Role::First(first) = &self.role else {
            return MessageResult(0);
        };
        let books = [
            first.leases.len(),
            first.coordinator.largest_book(),
            self.waiting.len(),
            self.shard.num_staged(),
            self.shard.num_fences(),
        ];
        MessageResult(books.into_iter().fold(0, usize::max))
    }
}

#[test]
fn messages_of_made_up_workers_do_not_fill_a_server() {
    let initial = Weights::initial(Layout::flat(LEN), vec![0.0; LEN]);
    let server = ParameterServer::new(&initial, Sgd::new(), ServerConfig::default()).unwrap();
    let server: ActorRef<_> = server.spawn().unwrap();
    let (incarnation, gradient) = (Incarnation(1), Gradient::new(vec![1.0; LEN]));
    for made_up in 0..MANY {
        let worker = WorkerId(made_up);
        let id = id(made_up, 1, 0);
        let gradients = GradientUpdate {
            id,
            // From the future: nothing of it is applied, whoever pushes it.
            computed_on: Version(9),
            loss: f32::NAN,
            num_examples: 1,
            gradient: gradient.clone(),
        };
        let gradient = gradient.clone();
        // In turn, so that the test is quick; each is sent for more workers than there is room for strangers.
        let refused = match made_up % 6 {
            0 => server
                .ask(Leave {
                    worker,
                    incarnation,
                })
                .wait()
                .unwrap()
                .is_err(),
            1 => server.ask(ReportLost { worker }).wait().unwrap().is_err(),
            2 => server
                .ask(Heartbeat {
                    worker,
                    incarnation,
                })
                .wait()
                .unwrap()
                .is_err(),
            3 => server.ask(Push(gradients)).wait().unwrap().is_err(),
            4 => server
                .ask(ApplyGradients::sum([gradients]))
                .wait()
                .unwrap()
                .is_err(),
            _ => server.ask(Stage { id, gradient }).wait().unwrap().is_err(),
        };
        assert!(refused || made_up % 6 < 2 || made_up < 6 * MAX_STAGED_OF_STRANGERS as u32);
    }
    let largest = server.ask(GetLargestBook).wait().unwrap();
    assert_eq!(largest, MAX_STAGED_OF_STRANGERS);
}
