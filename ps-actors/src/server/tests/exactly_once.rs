//! PS-2: a push is applied at most once, and its answer is always the same.

use proptest::prelude::*;

use super::*;
use crate::server::ledger::{Outcome, WINDOW};

proptest! {
    /// Every (worker, clock) is delivered 1–3 times, everything in any order. Gradients are
    /// small integers, so the sum is exact whatever the order.
    #[test]
    fn deliveries_in_any_order_and_number_sum_up_exactly(
        seed: u64, num_workers in 1u32..6, num_clocks in 1u64..15, num_shards in 1usize..4,
    ) {
        let mut dice = Dice(seed);
        let mut world = World::new(num_shards, Consistency::Asp, Reduction::Sum);
        let mut deliveries = Vec::new();
        let mut expected = vec![0.0f32; LEN];
        for worker in 0..num_workers {
            world.join(worker, 1).unwrap();
            for clock in 0..num_clocks {
                let values: Vec<f32> = (0..LEN).map(|_| dice.roll(21) as f32 - 10.0).collect();
                expected.iter_mut().zip(&values).for_each(|(sum, value)| *sum += value);
                for _ in 0..=dice.roll(3) {
                    deliveries.push((id(worker, 1, clock), values.clone()));
                }
            }
        }
        dice.shuffle(&mut deliveries);
        let mut first_answers = BTreeMap::new();
        for (id, values) in deliveries {
            let ticket = world.push(id, 0, values);
            if dice.roll(2) == 0 {
                world.deliver(dice.roll(num_shards));
            }
            let answer = world.outcome(ticket);
            prop_assert!(answer.is_some());
            prop_assert_eq!(first_answers.entry(id).or_insert(answer), &answer);
        }
        prop_assert_eq!(world.weights(), expected);
        prop_assert_eq!(world.coordinator.version().0, u64::from(num_workers) * num_clocks);
        for shard in &world.shards {
            prop_assert_eq!(shard.num_staged(), 0, "nothing is left behind");
        }
    }
}

#[test]
fn every_event_delivered_twice_gets_the_same_answer() {
    let mut world = World::new(2, Consistency::Bsp, Reduction::Mean);
    let joined = world.join(0, 1).unwrap();
    assert_eq!(world.join(0, 1).unwrap(), joined);
    world.join(1, 1).unwrap();

    // While the first is pending, and after it is settled.
    let tickets = [0, 1].map(|_| world.push(id(0, 1, 0), 0, vec![2.0; LEN]));
    assert_eq!(tickets.map(|ticket| world.outcome(ticket)), [None, None]);
    world.push(id(1, 1, 0), 0, vec![4.0; LEN]);
    let late = world.push(id(0, 1, 0), 0, vec![2.0; LEN]);
    let applied = Answer::Settled(Outcome::Applied {
        version: Version(1),
        staleness: 0,
    });
    for ticket in [tickets[0], tickets[1], late] {
        assert_eq!(world.outcome(ticket), Some(applied));
    }
    assert_eq!(world.weights(), vec![3.0; LEN]);

    for _ in 0..2 {
        let ticket = world.ticket();
        let (worker, incarnation) = (WorkerId(0), Incarnation(1));
        world.event(Event::Leave {
            ticket,
            worker,
            incarnation,
        });
        assert_eq!(world.outcome(ticket), Some(Answer::Left));
    }
    assert_eq!(world.coordinator.members().count(), 1);
}

#[test]
fn a_drivers_update_called_twice_is_applied_once() {
    let mut world = World::new(1, Consistency::Asp, Reduction::Mean);
    let gradient = Gradient::new(vec![1.0; LEN]);
    let ids = [id(0, 1, 0), id(1, 1, 0)];
    let stamps: Vec<_> = ids
        .map(|id| world.stamp(id, Version(0), &gradient))
        .to_vec();
    let mut answers = Vec::new();
    for _ in 0..2 {
        for id in ids {
            world.shards[0].stage(id, &gradient).unwrap();
        }
        let (ticket, stamps) = (world.ticket(), stamps.clone());
        world.event(Event::Apply {
            ticket,
            stamps,
            reduction: Reduction::Sum,
            newest: NEWEST,
        });
        answers.push(world.outcome(ticket));
    }
    assert_eq!(answers[0], answers[1]);
    assert_eq!(world.weights(), vec![2.0; LEN]);
    assert_eq!(world.shards[0].num_staged(), 0);

    // A new gradient beside an old one: nothing is applied, and the caller learns which it was.
    let fresh = id(2, 1, 0);
    let stamps = vec![world.stamp(fresh, Version(0), &gradient), stamps[0]];
    let ticket = world.ticket();
    world.event(Event::Apply {
        ticket,
        stamps,
        reduction: Reduction::Sum,
        newest: NEWEST,
    });
    assert_eq!(
        world.answers[&ticket],
        Err(Refusal::AlreadyPushed { id: ids[0] })
    );
    assert_eq!(world.weights(), vec![2.0; LEN]);
}

/// S-5
#[test]
fn a_zombie_is_fenced_off_and_its_next_incarnation_goes_on_where_it_was() {
    let mut world = World::new(2, Consistency::Bsp, Reduction::Sum);
    world.join(0, 1).unwrap();
    world.push(id(0, 1, 0), 0, vec![1.0; LEN]);
    world.join(1, 1).unwrap();
    let pending = world.push(id(0, 1, 1), 1, vec![10.0; LEN]);
    world.event(Event::Lost {
        worker: WorkerId(0),
    });
    let not_member = Refusal::NotMember {
        worker: WorkerId(0),
    };
    assert_eq!(world.answers[&pending], Err(not_member.clone()));

    let zombie = world.push(id(0, 1, 1), 1, vec![10.0; LEN]);
    assert_eq!(world.answers[&zombie], Err(not_member));
    let (worker, got, least) = (WorkerId(0), Incarnation(1), Incarnation(2));
    assert_eq!(
        world.join(0, 1),
        Err(Refusal::Fenced { worker, got, least })
    );

    // Clock 1 was pending, not applied. The next incarnation starts with it, and it counts once.
    assert_eq!(world.join(0, 2).unwrap().next_clock, Clock(1));
    let again = world.push(id(0, 2, 1), 1, vec![10.0; LEN]);
    let zombie = world.push(id(0, 1, 1), 1, vec![10.0; LEN]);
    assert_eq!(
        world.answers[&zombie],
        Err(Refusal::Fenced { worker, got, least })
    );
    world.push(id(1, 1, 0), 1, vec![100.0; LEN]);
    assert!(world.outcome(again).is_some());
    assert_eq!(world.weights(), vec![111.0; LEN]);
    assert!(world.shards.iter().all(|shard| shard.num_staged() == 0));
}

#[test]
fn bad_norms_are_refused_and_leave_the_weights_as_they_were() {
    let mut world = World::new(2, Consistency::Asp, Reduction::Mean);
    world.join(0, 1).unwrap();
    world.push(id(0, 1, 0), 0, vec![0.5; LEN]);
    let before = world.weights();
    for (clock, bad) in [f32::NAN, f32::INFINITY, 1e9].into_iter().enumerate() {
        let mut values = vec![0.0; LEN];
        values[LEN - 1] = bad;
        let ticket = world.push(id(0, 1, 1 + clock as u64), 1, values);
        let outcome = world.outcome(ticket);
        assert!(
            matches!(
                outcome,
                Some(Answer::Settled(Outcome::RefusedNorm { limit: 1e6, .. }))
            ),
            "{bad}: {outcome:?}"
        );
    }
    assert_eq!(world.weights(), before);
    let status = world.coordinator.status();
    assert_eq!(status.workers[&WorkerId(0)].num_refused, 3);
    assert_eq!(status.workers[&WorkerId(0)].num_applied, 1);
}

#[test]
fn what_makes_no_sense_is_refused() {
    let mut world = World::new(1, Consistency::Asp, Reduction::Mean);
    let ticket = world.push(id(7, 1, 0), 0, vec![0.0; LEN]);
    assert!(matches!(
        world.answers[&ticket],
        Err(Refusal::NotMember { .. })
    ));
    world.join(7, 1).unwrap();
    let ticket = world.push(id(7, 1, 0), 5, vec![0.0; LEN]);
    assert!(matches!(
        world.answers[&ticket],
        Err(Refusal::FromTheFuture { .. })
    ));
    let ticket = world.ticket();
    world.event(Event::Apply {
        ticket,
        stamps: Vec::new(),
        reduction: Reduction::Mean,
        newest: NEWEST,
    });
    assert_eq!(world.answers[&ticket], Err(Refusal::Empty));
    assert_eq!(world.coordinator.version(), Version(0));
}

#[test]
fn a_worker_cannot_fill_the_server_with_pushes() {
    let mut world = World::new(1, Consistency::Bsp, Reduction::Mean);
    world.join(0, 1).unwrap();
    world.join(1, 1).unwrap();
    let mut refused = 0;
    for clock in 0..100 {
        let ticket = world.push(id(0, 1, clock), 0, vec![1.0; LEN]);
        refused += usize::from(matches!(
            world.answers.get(&ticket),
            Some(Err(Refusal::TooManyPending { .. }))
        ));
    }
    assert_eq!(refused, 100 - 16);
    // Those that may come again stay staged, up to the bound.
    assert_eq!(world.shards[0].num_staged(), 32);
    assert_eq!(world.updates, []);
}

/// S-9, and the bound on what a worker may stage (PS-7).
#[test]
fn a_worker_that_dies_while_it_stages_leaves_nothing_behind() {
    let mut world = World::new(3, Consistency::Asp, Reduction::Sum);
    world.join(0, 1).unwrap();
    world.deliver_all();
    let gradient = Gradient::new(vec![1.0; LEN]);
    let mut refused = 0;
    for clock in 0..40 {
        let staged = world.shards[1].stage(id(0, 1, clock), &gradient);
        refused += usize::from(matches!(staged, Err(ShardError::TooManyStaged { .. })));
    }
    assert_eq!((world.shards[1].num_staged(), refused), (32, 8));
    world.event(Event::Lost {
        worker: WorkerId(0),
    });
    assert_eq!(world.weights(), vec![0.0; LEN]);
    assert_eq!(world.shards[1].num_staged(), 0);
    let late = world.shards[1].stage(id(0, 1, 40), &gradient);
    assert!(matches!(late, Err(ShardError::Fenced { .. })), "{late:?}");
}

/// PS-6: the numbers in a message may be anything, also the last that there is.
#[test]
fn no_number_of_a_peer_locks_a_worker_out() {
    for consistency in [Consistency::Asp, Consistency::Ssp { bound: u64::MAX }] {
        let mut world = World::new(2, consistency, Reduction::Sum);
        world.join(1, 1).unwrap();
        world.push(id(1, 1, 0), 0, vec![1.0; LEN]);
        // The number of a request does not matter: each new request begins the next incarnation.
        for (request, incarnation) in [(u64::MAX, 1), (0, 2), (7, 3)] {
            let joined = world.join(0, request).unwrap();
            assert_eq!(joined.incarnation, Incarnation(incarnation));
        }
        // The same holds for a request that arrives again after its incarnation, and for an incarnation
        // that was never assigned.
        let (worker, got, least) = (WorkerId(0), Incarnation(1), Incarnation(2));
        let over = Refusal::Fenced { worker, got, least };
        assert_eq!(world.join(0, u64::MAX), Err(over));
        for made_up in [0, 4, u64::MAX] {
            let ticket = world.push(id(0, made_up, 5), 1, vec![1.0; LEN]);
            assert!(world.answers[&ticket].is_err());
        }
        let most = Clock(1 << 32);
        for clock in [u64::MAX, most.0 + 1] {
            let id = id(0, 3, clock);
            let pushed = world.push(id, 1, vec![1.0; LEN]);
            let applied = world.apply(&[id], 1, |_| 1.0);
            for ticket in [pushed, applied] {
                let refused = Err(Refusal::ClockAhead { id, most });
                assert_eq!(world.answers[&ticket], refused);
            }
        }
        // A driver's worker chooses its incarnation itself, but it may not be in the future.
        for got in [NEWEST.next(), Incarnation(u64::MAX)] {
            let ticket = world.apply(&[id(2, got.0, 0)], 1, |_| 1.0);
            let (worker, newest) = (WorkerId(2), NEWEST);
            let refused = Err(Refusal::IncarnationAhead {
                worker,
                got,
                newest,
            });
            assert_eq!(world.answers[&ticket], refused);
        }
        let latest = world.apply(&[id(2, NEWEST.0, 0)], 1, |_| 1.0);
        assert!(world.outcome(latest).is_some());
        let joined = world.join(2, 0).unwrap();
        assert_eq!(joined.incarnation, NEWEST.next());
        // What is known, the servers have handed out themselves.
        let next = world.apply(&[id(2, NEWEST.0 + 1, 1)], 1, |_| 1.0);
        assert!(world.outcome(next).is_some());

        let own = world.push(id(0, 3, 0), 1, vec![1.0; LEN]);
        assert!(world.outcome(own).is_some(), "all the time it was a member");
        assert_eq!(world.weights(), vec![4.0; LEN]);
    }
}

/// S-5
#[test]
fn a_request_to_join_that_was_delayed_does_not_end_a_later_incarnation() {
    let mut world = World::new(1, Consistency::Asp, Reduction::Sum);
    let first = world.join(0, 1).unwrap();
    assert_eq!(world.join(0, 1), Ok(first), "repeated");
    let second = world.join(0, 2).unwrap();
    assert!(matches!(world.join(0, 1), Err(Refusal::Fenced { .. })));
    assert_eq!(world.join(0, 2), Ok(second));
    // Nor does it bring back a worker that has left, for which others would wait.
    let (ticket, worker) = (world.ticket(), WorkerId(0));
    let incarnation = second.incarnation;
    world.event(Event::Leave {
        ticket,
        worker,
        incarnation,
    });
    assert!(matches!(world.join(0, 2), Err(Refusal::Fenced { .. })));
    assert_eq!(world.coordinator.members().count(), 0);
}

fn any_consistency() -> impl Strategy<Value = Consistency> {
    prop_oneof![
        Just(Consistency::Bsp),
        Just(Consistency::Asp),
        (0u64..3).prop_map(|bound| Consistency::Ssp { bound }),
        (1usize..4).prop_map(|k| Consistency::KofN { k }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Workers run far ahead of their pending pushes. There are bursts longer than the ledger's window
    /// (mostly of gradients that are refused), jumps, repeats, deaths, and drivers that apply gradients
    /// of several incarnations at once. A gradient whose sender was told that it is applied is in the
    /// weights once. No other gradient is.
    #[test]
    fn what_is_applied_is_what_was_answered_however_far_a_worker_runs_ahead(
        seed: u64, consistency in any_consistency(), num_shards in 1usize..3,
    ) {
        let mut dice = Dice(seed);
        let mut world = World::new(num_shards, consistency, Reduction::Sum);
        let mut incarnations = [0u64; 3];
        let mut next = [0u64; 3];
        let mut calls: Vec<(Vec<GradientId>, Ticket)> = Vec::new();
        // Two gradients of one name are the same.
        let number = |id: GradientId| (1 + id.clock.0 % 7 + u64::from(id.worker.0)) as f32;
        for step in 0..60u64 {
            let worker = dice.roll(3);
            let version = world.coordinator.version().0;
            if incarnations[worker] == 0 {
                let joined = world.join(worker as u32, step).unwrap();
                (next[worker], incarnations[worker]) = (joined.next_clock.0, joined.incarnation.0);
                continue;
            }
            match dice.roll(12) {
                0 => {
                    world.event(Event::Lost { worker: WorkerId(worker as u32) });
                    incarnations[worker] = 0;
                }
                1 => next[worker] += dice.roll(2_000) as u64,
                2 => {
                    for _ in 0..dice.roll(WINDOW + 200) {
                        let id = id(worker as u32, incarnations[worker], next[worker]);
                        let ticket = world.push(id, version, vec![f32::NAN; LEN]);
                        // An answer may be held in `Ssp`, but no such gradient waits.
                        prop_assert!(!world.coordinator.is_pending(id), "{:?}", ticket);
                        next[worker] += 1;
                    }
                }
                3 => {
                    let ids: Vec<_> = (0..1 + dice.roll(3)).map(|_| {
                        let worker = dice.roll(3);
                        let incarnation = incarnations[worker].max(1) + dice.roll(2) as u64;
                        id(worker as u32, incarnation, next[worker] + dice.roll(2) as u64)
                    }).collect();
                    let before = (world.weights(), format!("{:?}", world.coordinator));
                    let ticket = world.apply(&ids, version, number);
                    if world.answers[&ticket].is_err() {
                        prop_assert_eq!(before, (world.weights(), format!("{:?}", world.coordinator)));
                    }
                    calls.push((ids, ticket));
                }
                repeats => {
                    let back = dice.roll(4).saturating_sub(2) as u64;
                    let clock = next[worker].saturating_sub(back);
                    let id = id(worker as u32, incarnations[worker], clock);
                    for _ in 0..1 + repeats / 11 {
                        let ticket = world.push(id, version, vec![number(id); LEN]);
                        calls.push((vec![id], ticket));
                    }
                    next[worker] = next[worker].max(clock + 1);
                }
            }
            if step % 7 == 0 {
                world.deliver_all();
            }
        }
        let mut told = std::collections::BTreeSet::new();
        for (ids, ticket) in calls {
            let answer = world.answers.get(&ticket);
            if let Some(Ok(Answer::Settled(Outcome::Applied { .. }))) = answer {
                told.extend(ids);
            }
        }
        let applied = world.updates.iter().flat_map(|update| &update.gradients);
        let applied: Vec<_> = applied.map(|one| one.id).collect();
        let distinct: std::collections::BTreeSet<_> = applied.iter().copied().collect();
        prop_assert_eq!(distinct.len(), applied.len(), "each gradient is in one update");
        prop_assert!(told.is_subset(&distinct), "{:?}", told.difference(&distinct));
        // Sums of integers this small are exact.
        let sum: f32 = applied.into_iter().map(number).sum();
        prop_assert_eq!(world.weights(), vec![sum; LEN]);
    }
}

/// The worker that does it is an ordinary one: what it pushes is refused, and one push waits.
#[test]
fn a_push_that_waits_is_applied_although_more_clocks_than_are_remembered_came_after_it() {
    for consistency in [
        Consistency::Bsp,
        Consistency::Ssp { bound: 1 },
        Consistency::KofN { k: 2 },
    ] {
        let mut world = World::new(2, consistency, Reduction::Sum);
        world.join(0, 1).unwrap();
        world.join(7, 1).unwrap();
        // In `Ssp`, a push waits if it is too far ahead.
        let clock = if let Consistency::Ssp { .. } = consistency {
            5
        } else {
            0
        };
        let waits = world.push(id(7, 1, clock), 0, vec![2.0; LEN]);
        assert_eq!(world.outcome(waits), None, "{consistency}");
        for refused in 0..=WINDOW as u64 {
            world.push(id(7, 1, clock + 1 + refused), 0, vec![f32::NAN; LEN]);
        }
        let again = world.push(id(7, 1, clock), 0, vec![2.0; LEN]);
        let own = world.push(id(0, 1, 0), 0, vec![1.0; LEN]);
        world.event(Event::SetConsistency(Consistency::Asp));
        for ticket in [waits, again, own] {
            let outcome = world.outcome(ticket);
            let applied = matches!(outcome, Some(Answer::Settled(Outcome::Applied { .. })));
            assert!(applied, "{consistency}: {outcome:?}");
        }
        assert_eq!(world.weights(), vec![3.0; LEN]);
        let late = world.push(id(7, 1, clock), 0, vec![2.0; LEN]);
        assert_eq!(world.outcome(late), world.outcome(waits), "{consistency}");
    }
}

/// S-5: a driver gathered gradients of a worker that was started again, without knowing of the restart.
#[test]
fn two_lives_of_a_worker_in_one_call_are_refused_and_nothing_changes() {
    // The same clock in both, and different ones: the silent half.
    for (earlier, later) in [(0, 0), (5, 0)] {
        let mut world = World::new(2, Consistency::Asp, Reduction::Sum);
        for order in [[0, 1], [1, 0]] {
            let incarnations = [id(3, 10, earlier), id(3, 11, later)];
            let ticket = world.apply(&order.map(|i| incarnations[i]), 0, |_| 1.0);
            let (one, other) = (Incarnation(10), Incarnation(11));
            let worker = WorkerId(3);
            let refused = Refusal::TwoIncarnations { worker, one, other };
            assert_eq!(world.answers[&ticket], Err(refused));
        }
        assert!(world.coordinator.status().workers.is_empty());
        // Each alone is applied. Then the earlier incarnation is over.
        for (id, sum) in [
            (id(3, 10, earlier), 1.0),
            (id(3, 11, later), 2.0),
            (id(3, 11, 5), 3.0),
        ] {
            let ticket = world.apply(&[id], 0, |_| 1.0);
            assert!(world.outcome(ticket).is_some());
            assert_eq!(world.weights(), vec![sum; LEN]);
        }
        let over = world.apply(&[id(4, 1, 0), id(3, 10, 6)], 0, |_| 1.0);
        let (worker, got, least) = (WorkerId(3), Incarnation(10), Incarnation(11));
        assert_eq!(
            world.answers[&over],
            Err(Refusal::Fenced { worker, got, least })
        );
        assert_eq!(world.weights(), vec![3.0; LEN]);
        assert!(
            !world
                .coordinator
                .status()
                .workers
                .contains_key(&WorkerId(4))
        );
        assert!(world.shards.iter().all(|shard| shard.num_staged() == 0));
    }
}

/// S-5
#[test]
fn a_driver_cannot_apply_for_a_member_in_another_incarnation() {
    let mut world = World::new(1, Consistency::Asp, Reduction::Sum);
    world.join(3, 1).unwrap();
    let ticket = world.apply(&[id(3, 2, 0)], 0, |_| 1.0);
    let refused = world.answers[&ticket].clone().unwrap_err().to_string();
    assert!(refused.contains("worker 3"), "{refused}");
    let pushed = world.push(id(3, 1, 0), 0, vec![1.0; LEN]);
    assert!(
        world.outcome(pushed).is_some(),
        "its own incarnation goes on"
    );
}

/// PS-7: callers of a push that is settled, and whose worker has to wait before its next step.
#[test]
fn repeats_of_a_push_whose_answer_is_held_are_bounded() {
    let mut world = World::new(1, Consistency::Ssp { bound: 0 }, Reduction::Sum);
    world.join(0, 1).unwrap();
    world.join(1, 1).unwrap();
    let tickets: Vec<_> = (0..100)
        .map(|_| world.push(id(0, 1, 0), 0, vec![1.0; LEN]))
        .collect();
    let refused = tickets.iter().filter(|ticket| {
        let answer = world.answers.get(ticket);
        matches!(answer, Some(Err(Refusal::TooManyPending { .. })))
    });
    assert_eq!(refused.count(), 100 - 16);
    world.push(id(1, 1, 0), 0, vec![1.0; LEN]);
    assert!(
        tickets
            .iter()
            .all(|ticket| world.answers.contains_key(ticket))
    );
}
