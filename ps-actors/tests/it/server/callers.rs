//! Calls that wait: how many may, and what becomes of them when their callers have gone (PS-9).

use std::time::Instant;

use ps_actors::Reply;
use ps_actors::server::{Heartbeat, Leave, Pull, PushPull};
use ps_runtime::test_util::eventually;

use super::*;

const SOON: Duration = Duration::from_secs(60);

/// More than the default bound on an actor's calls.
const MANY: u32 = 1500;

fn first(servers: &ServerGroup) -> &ActorRef<ParameterServer> {
    servers.servers().next().unwrap()
}

fn join(servers: &ServerGroup, worker: u32) {
    let join = Join {
        worker: WorkerId(worker),
        request: JoinRequest(1),
    };
    first(servers).ask(join).wait().unwrap().unwrap();
}

fn gradients(worker: u32, clock: u64, version: u64) -> GradientUpdate {
    GradientUpdate {
        id: GradientId {
            worker: WorkerId(worker),
            incarnation: Incarnation(1),
            clock: Clock(clock),
        },
        computed_on: Version(version),
        loss: 0.0,
        num_examples: 1,
        gradient: Gradient::new(vec![1.0; LEN]),
    }
}

/// Polls until the server has as many calls that wait.
fn wait_until_waiting(servers: &ServerGroup, wanted: usize) {
    let start = Instant::now();
    loop {
        let status = first(servers).ask(GetStatus).wait().unwrap();
        if status.num_waiting == wanted && (wanted > 0 || first(servers).pending() == 0) {
            return;
        }
        let num_waiting = status.num_waiting;
        assert!(start.elapsed() < SOON, "{num_waiting} wait, not {wanted}");
        std::thread::yield_now();
    }
}

fn accept(push: Reply<Result<Outcome, ServerError>>) {
    let outcome = push.wait().unwrap().unwrap();
    assert!(matches!(outcome, Outcome::Applied { .. }), "{outcome:?}");
}

#[test]
fn pulls_that_were_given_up_leave_nothing_behind() {
    let servers = group(1, config(Consistency::Bsp));
    let never = Pull::new(PullVersion::AtLeast(Version(1000)));
    for _ in 0..2 {
        let pulls: Vec<_> = (0..MANY).map(|_| first(&servers).ask(never)).collect();
        wait_until_waiting(&servers, MANY as usize);
        drop(pulls);
        wait_until_waiting(&servers, 0);
    }
    assert_eq!(run_all(&servers, 1, 3)[0].num_applied, 3);
}

/// S-4: whoever hung up does not wait, and S-3: what it has pushed may be pushed again.
#[test]
fn a_push_that_was_given_up_is_in_its_round_and_its_worker_no_longer_waits() {
    let servers = group(1, config(Consistency::Bsp));
    join(&servers, 0);
    join(&servers, 1);
    let given_up = first(&servers).ask(PushPull::new(gradients(0, 0, 0)));
    wait_until_waiting(&servers, 1);
    drop(given_up);
    wait_until_waiting(&servers, 0);
    let again = first(&servers).ask(Push(gradients(0, 0, 0)));
    accept(first(&servers).ask(Push(gradients(1, 0, 0))));
    accept(again);
    let workers = coordinator(&servers).workers;
    assert_eq!(workers[&WorkerId(0)].num_applied, 1);
    assert_eq!(workers[&WorkerId(0)].num_duplicates, 1);
}

#[test]
fn more_synchronous_workers_than_an_actor_has_slots_close_a_round() {
    let servers = group(1, config(Consistency::Bsp));
    (0..MANY).for_each(|worker| join(&servers, worker));
    for round in 0..2 {
        let push = |worker| first(&servers).ask(PushPull::new(gradients(worker, round, round)));
        let pushes: Vec<_> = (1..MANY).map(push).collect();
        // Meanwhile everything that need not wait is answered.
        let status = coordinator(&servers);
        assert_eq!(status.num_pending, MANY as usize - 1);
        assert_eq!(status.awaited.workers, [WorkerId(0)]);
        assert_eq!(status.awaited.to_string(), "worker 0");
        let beat = Heartbeat {
            worker: WorkerId(0),
            incarnation: Incarnation(1),
        };
        first(&servers).ask(beat).wait().unwrap().unwrap();
        let visitor = MANY + round as u32;
        join(&servers, visitor);
        let leave = Leave {
            worker: WorkerId(visitor),
            incarnation: Incarnation(1),
        };
        first(&servers).ask(leave).wait().unwrap().unwrap();
        let last = push(0);
        for reply in pushes.into_iter().chain([last]) {
            let pushed = reply.wait().unwrap().unwrap();
            assert_eq!(pushed.outcome.version(), Version(round + 1));
            assert_eq!(pushed.weights.version(), Version(round + 1));
        }
    }
}

/// PS-7.
#[test]
fn repeats_of_a_push_whose_answer_is_held_are_bounded_and_shut_nobody_out() {
    let servers = group(1, config(Consistency::Ssp { bound: 0 }));
    join(&servers, 0);
    join(&servers, 1);
    let push = || first(&servers).ask(PushPull::new(gradients(0, 0, 0)));
    let held: Vec<_> = (0..16).map(|_| push()).collect();
    for _ in 0..5000 {
        let refused = push().wait().unwrap().unwrap_err();
        let refused = matches!(
            refused,
            ServerError::Refused(Refusal::TooManyPending { .. })
        );
        assert!(refused);
    }
    // Of the slow worker's own push they all wait.
    assert_eq!(coordinator(&servers).awaited.workers, [WorkerId(1)]);
    accept(first(&servers).ask(Push(gradients(1, 0, 0))));
    for reply in held {
        reply.wait().unwrap().unwrap();
    }
    // And there is room again.
    push().wait().unwrap().unwrap();
}

#[test]
fn a_server_says_for_how_many_it_waits() {
    let config = ServerConfig {
        wait_for_workers: 3,
        ..config(Consistency::Bsp)
    };
    let servers = group(1, config);
    join(&servers, 0);
    let _waits = first(&servers).ask(Push(gradients(0, 0, 0)));
    assert_eq!(coordinator(&servers).awaited.to_string(), "2 more to join");
    join(&servers, 1);
    let awaited = coordinator(&servers).awaited;
    assert_eq!(awaited.to_string(), "1 more to join, worker 1");
}

/// Who joined is seen, though it never pushed.
#[test]
fn a_worker_that_left_without_a_push_is_in_the_status() {
    let servers = group(1, config(Consistency::Bsp));
    join(&servers, 0);
    let leave = Leave {
        worker: WorkerId(0),
        incarnation: Incarnation(1),
    };
    first(&servers).ask(leave).wait().unwrap().unwrap();
    assert!(!coordinator(&servers).workers[&WorkerId(0)].is_member);
}

/// It panicked when the server started.
#[test]
fn the_longest_lease_is_as_good_as_none() {
    let config = ServerConfig {
        worker_lease: Some(Duration::MAX),
        ..config(Consistency::Bsp)
    };
    assert_eq!(run_all(&group(1, config), 1, 3)[0].num_applied, 3);
}

/// S-4: a member sends heartbeats while it computes, so a step may take many leases.
#[test]
fn a_step_of_ten_leases_is_no_loss() {
    let config = ServerConfig {
        worker_lease: Some(Duration::from_secs(1)),
        ..config(Consistency::Asp)
    };
    let servers = group(1, config);
    let (in_step, is_in_step) = std::sync::mpsc::channel();
    let (let_go, gate) = std::sync::mpsc::channel::<()>();
    let mut gate = Some(gate);
    let slow = actor::spawn(move || {
        let (in_step, gate) = (in_step.clone(), gate.take().expect("not restarted"));
        let source = move |clock: Clock, weights: &Weights| -> Result<_, SourceError> {
            if clock == Clock(1) {
                in_step.send(()).expect("the test waits");
                gate.recv().expect("the test lets go");
            }
            Ok(towards_target(0, clock, weights))
        };
        DataWorker::new(WorkerId(0), source)
    });
    let run = slow.ask(RunSteps {
        servers: servers.clone(),
        num_steps: 3,
    });
    is_in_step.recv().unwrap();
    // Each of these members is lost after a lease in which nothing is heard of it.
    let epoch = coordinator(&servers).epoch;
    for silent in 1..=10 {
        join(&servers, silent);
        eventually("a silent member is lost", || {
            !coordinator(&servers).workers[&WorkerId(silent)].is_member
        });
    }
    let status = coordinator(&servers);
    assert!(status.workers[&WorkerId(0)].is_member);
    assert_eq!(status.epoch.0, epoch.0 + 20, "nobody else came or went");
    let_go.send(()).unwrap();
    assert_eq!(run.wait().unwrap().unwrap().num_applied, 3);
    // Who was silent is told of the lease.
    let late = first(&servers).ask(Push(gradients(1, 0, 0)));
    let why = late.wait().unwrap().unwrap_err().to_string();
    assert!(why.contains("the lease of 1s"), "{why}");
}
