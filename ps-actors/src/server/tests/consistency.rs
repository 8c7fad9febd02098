//! PS-3 and PS-4: who is in a round, and how far workers drift apart.

use proptest::prelude::*;

use super::*;
use crate::server::ledger::Outcome;

proptest! {
    /// Workers push in any order, with duplicates and with pushes ahead of their round.
    #[test]
    fn a_bsp_round_has_one_gradient_of_each_member(seed: u64, num_workers in 1u32..6) {
        let mut dice = Dice(seed);
        let mut world = World::new(1, Consistency::Bsp, Reduction::Mean);
        (0..num_workers).for_each(|worker| { world.join(worker, 1).unwrap(); });
        for _ in 0..200 {
            let worker = dice.roll(num_workers as usize) as u32;
            let clock = world.coordinator.version().0 + dice.roll(3) as u64;
            world.push(id(worker, 1, clock), world.coordinator.version().0, vec![1.0; LEN]);
        }
        let everybody: Vec<_> = (0..num_workers).map(WorkerId).collect();
        for update in &world.updates {
            let workers: Vec<_> = update.gradients.iter().map(|one| one.id.worker).collect();
            prop_assert_eq!(&workers, &everybody);
        }
        prop_assert!(world.coordinator.version().0 > 0);
    }

    /// Workers take turns at random; the slowest dies on the way. PS-4 holds at each start of
    /// a step, and everybody else gets to the end.
    #[test]
    fn ssp_keeps_workers_within_the_bound_and_never_blocks_for_ever(
        seed: u64, num_workers in 2usize..6, bound in 0u64..4, death_after in 0usize..100,
    ) {
        const STEPS: u64 = 20;
        let mut dice = Dice(seed);
        let mut world = World::new(1, Consistency::Ssp { bound }, Reduction::Mean);
        (0..num_workers).for_each(|worker| { world.join(worker as u32, 1).unwrap(); });
        let mut clocks = vec![0u64; num_workers];
        let mut alive = vec![true; num_workers];
        let mut waiting: Vec<Option<Ticket>> = vec![None; num_workers];
        for turn in 0.. {
            prop_assert!(turn < 100_000, "blocked at clocks {:?}", clocks);
            if turn == death_after {
                let slowest = (0..num_workers).min_by_key(|&w| clocks[w]).expect("some");
                alive[slowest] = false;
                world.event(Event::Lost { worker: WorkerId(slowest as u32) });
            }
            // Even the pick is unfair: worker 0 is the fastest.
            let worker = dice.roll(num_workers).min(dice.roll(num_workers));
            if !alive[worker] || clocks[worker] == STEPS {
                if (0..num_workers).all(|w| !alive[w] || clocks[w] == STEPS) {
                    break;
                }
                continue;
            }
            if let Some(ticket) = waiting[worker] {
                if world.outcome(ticket).is_none() {
                    continue;
                }
                // The answer lets the next step start.
                clocks[worker] += 1;
                waiting[worker] = None;
                if clocks[worker] == STEPS {
                    // A worker that has finished leaves. Otherwise it would hold the others back.
                    let ticket = world.ticket();
                    let (worker, incarnation) = (WorkerId(worker as u32), Incarnation(1));
                    world.event(Event::Leave { ticket, worker, incarnation });
                    continue;
                }
                let members = (0..num_workers).filter(|&w| alive[w] && clocks[w] < STEPS);
                // A worker whose push is applied works on the next clock already.
                let slowest = members.map(|w| clocks[w] + u64::from(waiting[w].is_some())).min();
                prop_assert!(clocks[worker] <= slowest.expect("itself") + bound, "PS-4: {:?}", clocks);
            }
            let version = world.coordinator.version().0;
            let push = world.push(id(worker as u32, 1, clocks[worker]), version, vec![1.0; LEN]);
            waiting[worker] = Some(push);
        }
    }
}

/// Whoever meets in the rounds, there are no more than a schedule is told. Here as many.
#[test]
fn a_k_of_n_run_of_any_order_makes_no_more_updates_than_are_foreseen() {
    let (mode, num_steps) = (Consistency::KofN { k: 2 }, 4);
    let mut world = World::new(1, mode, Reduction::Mean);
    (0..4).for_each(|worker| {
        world.join(worker, 1).unwrap();
    });
    let mut clocks = [0; 4];
    for round in [[0, 2], [0, 2], [0, 1], [0, 1], [1, 2], [1, 2]]
        .iter()
        .map(|round| &round[..])
        .chain([&[3][..]; 4])
    {
        let version = world.coordinator.version();
        for &worker in round {
            let id = id(worker, 1, clocks[worker as usize]);
            world.push(id, version.0, vec![1.0; LEN]);
            clocks[worker as usize] += 1;
        }
        assert_eq!(world.coordinator.version(), version.next());
        for &worker in round {
            if clocks[worker as usize] == num_steps {
                let (worker, ticket) = (WorkerId(worker), world.ticket());
                world.event(Event::Leave {
                    ticket,
                    worker,
                    incarnation: Incarnation(1),
                });
            }
        }
    }
    assert_eq!(clocks, [num_steps; 4]);
    let num_updates = world.coordinator.version().0;
    assert_eq!(num_updates, mode.most_updates(num_steps, 4));
}

/// S-1, S-2
#[test]
fn one_workers_duplicates_do_not_close_a_k_of_n_round() {
    let mut world = World::new(1, Consistency::KofN { k: 2 }, Reduction::Mean);
    (0..3).for_each(|worker| {
        world.join(worker, 1).unwrap();
    });
    for _ in 0..3 {
        world.push(id(0, 1, 0), 0, vec![2.0; LEN]);
    }
    let ahead = world.push(id(0, 1, 1), 0, vec![9.0; LEN]);
    assert_eq!(world.updates, [], "one worker is no quorum of two");
    world.push(id(2, 1, 0), 0, vec![4.0; LEN]);
    assert_eq!(world.weights(), vec![3.0; LEN]);
    // What was computed on version 0 is late now, the straggler's gradient included.
    let straggler = world.push(id(1, 1, 0), 0, vec![9.0; LEN]);
    for ticket in [ahead, straggler] {
        let late = Outcome::DroppedLate {
            version: Version(1),
            staleness: 1,
        };
        assert_eq!(world.outcome(ticket), Some(Answer::Settled(late)));
    }
    assert_eq!(world.weights(), vec![3.0; LEN]);
    assert_eq!(
        world.coordinator.status().workers[&WorkerId(1)].num_dropped_late,
        1
    );
    assert_eq!(world.shards[0].num_staged(), 0);
}

/// S-2
#[test]
fn k_of_n_goes_on_with_fewer_than_k_workers() {
    let mut world = World::new(1, Consistency::KofN { k: 3 }, Reduction::Mean);
    (0..3).for_each(|worker| {
        world.join(worker, 1).unwrap();
    });
    let pushed = [0, 1].map(|worker| world.push(id(worker, 1, 0), 0, vec![1.0; LEN]));
    assert_eq!(pushed.map(|ticket| world.outcome(ticket)), [None, None]);
    world.event(Event::Lost {
        worker: WorkerId(2),
    });
    assert!(pushed.iter().all(|&ticket| world.outcome(ticket).is_some()));
}

/// S-3
#[test]
fn a_bsp_round_closes_without_a_worker_that_dies_in_it() {
    let mut world = World::new(1, Consistency::Bsp, Reduction::Mean);
    (0..3).for_each(|worker| {
        world.join(worker, 1).unwrap();
    });
    world.push(id(0, 1, 0), 0, vec![1.0; LEN]);
    world.push(id(1, 1, 0), 0, vec![100.0; LEN]);
    // Worker 1 dies with its gradient in the round: it is no live member, so it does not count.
    world.event(Event::Lost {
        worker: WorkerId(1),
    });
    assert_eq!(world.updates, []);
    world.push(id(2, 1, 0), 0, vec![3.0; LEN]);
    assert_eq!(world.weights(), vec![2.0; LEN]);
}

#[test]
fn a_late_joiner_does_not_hold_back_ssp_workers() {
    let mut world = World::new(1, Consistency::Ssp { bound: 1 }, Reduction::Mean);
    world.join(0, 1).unwrap();
    for clock in 0..50 {
        let ticket = world.push(id(0, 1, clock), clock, vec![1.0; LEN]);
        assert!(world.outcome(ticket).is_some());
    }
    world.join(1, 1).unwrap();
    let first = world.push(id(0, 1, 50), 50, vec![1.0; LEN]);
    assert!(
        world.outcome(first).is_some(),
        "one step ahead of the newcomer is allowed"
    );
    let second = world.push(id(0, 1, 51), 51, vec![1.0; LEN]);
    assert!(world.outcome(second).is_none(), "two are not");
    world.push(id(1, 1, 0), 50, vec![1.0; LEN]);
    assert!(world.outcome(second).is_some());
}

#[test]
fn switching_to_asp_releases_everything_that_waits() {
    let mut world = World::new(1, Consistency::Bsp, Reduction::Mean);
    world.join(0, 1).unwrap();
    world.join(1, 1).unwrap();
    let ticket = world.push(id(0, 1, 0), 0, vec![1.0; LEN]);
    assert!(world.outcome(ticket).is_none());
    world.event(Event::SetConsistency(Consistency::Asp));
    assert!(world.outcome(ticket).is_some());
    assert_eq!(world.weights(), vec![1.0; LEN]);
}

/// S-19.
#[test]
fn while_paused_no_mode_makes_an_update_and_then_goes_on_as_without_a_pause() {
    for mode in [
        Consistency::Asp,
        Consistency::Bsp,
        Consistency::Ssp { bound: 1 },
        Consistency::KofN { k: 2 },
    ] {
        let run = |is_paused: bool| {
            let mut world = World::new(2, mode, Reduction::Mean);
            world.join(0, 1).unwrap();
            world.join(1, 1).unwrap();
            world.event(Event::SetPaused(is_paused));
            let tickets = [0, 1].map(|worker| world.push(id(worker, 1, 0), 0, vec![1.0; LEN]));
            if is_paused {
                assert_eq!(world.weights(), vec![0.0; LEN], "{mode}");
                assert_eq!(tickets.map(|ticket| world.outcome(ticket)), [None, None]);
                let status = world.coordinator.status();
                assert!(status.is_paused && status.awaited.is_nobody(), "{mode}");
                world.event(Event::SetPaused(false));
            }
            let outcomes = tickets.map(|ticket| world.outcome(ticket));
            assert!(outcomes.iter().all(Option::is_some), "{mode}");
            assert!(!world.coordinator.status().is_paused);
            (world.weights(), outcomes)
        };
        assert_eq!(run(true), run(false), "{mode}");
    }
}

/// S-19.
#[test]
fn a_worker_that_is_lost_while_paused_leaves_nothing() {
    let mut world = World::new(1, Consistency::Bsp, Reduction::Mean);
    world.join(0, 1).unwrap();
    world.join(1, 1).unwrap();
    world.event(Event::SetPaused(true));
    let ticket = world.push(id(0, 1, 0), 0, vec![1.0; LEN]);
    world.push(id(1, 1, 0), 0, vec![5.0; LEN]);
    let worker = WorkerId(1);
    world.event(Event::Lost { worker });
    assert_eq!(world.weights(), vec![0.0; LEN]);
    world.event(Event::SetPaused(false));
    assert!(world.outcome(ticket).is_some());
    assert_eq!(world.weights(), vec![1.0; LEN]);
}

#[test]
fn staleness_is_the_number_of_updates_in_between() {
    let mut world = World::new(1, Consistency::Asp, Reduction::Mean);
    world.join(0, 1).unwrap();
    world.join(1, 1).unwrap();
    for clock in 0..5 {
        world.push(id(0, 1, clock), clock, vec![1.0; LEN]);
    }
    let ticket = world.push(id(1, 1, 0), 2, vec![1.0; LEN]);
    let applied = Outcome::Applied {
        version: Version(6),
        staleness: 3,
    };
    assert_eq!(world.outcome(ticket), Some(Answer::Settled(applied)));
    let status = world.coordinator.status();
    assert_eq!(status.workers[&WorkerId(1)].staleness.max(), 3);
    assert_eq!(status.workers[&WorkerId(0)].staleness.mean(), 0.0);
}

#[test]
fn the_first_round_waits_for_the_workers_that_are_expected() {
    let new = |consistency| {
        let mut world = World::new(1, consistency, Reduction::Mean);
        world.coordinator = world.coordinator.wait_for_workers(3);
        world
    };
    for consistency in [Consistency::Bsp, Consistency::KofN { k: 1 }] {
        let mut world = new(consistency);
        // A driver's update does not count as the coming of the worker that computed it.
        let (ticket, gradient) = (world.ticket(), Gradient::new(vec![1.0; LEN]));
        world.shards[0].stage(id(0, 0, 9), &gradient).unwrap();
        let stamps = vec![world.stamp(id(0, 0, 9), Version(0), &gradient)];
        let reduction = Reduction::Sum;
        world.event(Event::Apply {
            ticket,
            stamps,
            reduction,
            newest: NEWEST,
        });
        world.join(0, 1).unwrap();
        let first = world.push(id(0, 1, 10), 1, vec![1.0; LEN]);
        world.join(1, 1).unwrap();
        // Whoever comes back does not stand in for somebody else.
        world.join(1, 2).unwrap();
        assert_eq!(world.outcome(first), None, "{consistency}");
        // One will never come: then two are all.
        world.event(Event::Lost {
            worker: WorkerId(2),
        });
        world.push(id(1, 2, 0), 1, vec![3.0; LEN]);
        assert!(world.outcome(first).is_some(), "{consistency}");
    }
    let mut world = new(Consistency::Asp);
    world.join(0, 1).unwrap();
    let first = world.push(id(0, 1, 0), 0, vec![1.0; LEN]);
    assert!(world.outcome(first).is_some(), "nobody waits in asp");
}
