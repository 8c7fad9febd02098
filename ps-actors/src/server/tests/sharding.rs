//! PS-3 and PS-5: any number of shards computes the bits of one, and snapshots do not change.

use proptest::prelude::*;

use super::*;

fn any_consistency() -> impl Strategy<Value = Consistency> {
    prop_oneof![
        Just(Consistency::Bsp),
        Just(Consistency::Asp),
        (0u64..3).prop_map(|bound| Consistency::Ssp { bound }),
        (1usize..4).prop_map(|k| Consistency::KofN { k }),
    ]
}

/// A random run with duplicates, deaths, late gradients and lagging shards. Everything but the
/// lag depends on the seed only.
fn run(seed: u64, num_shards: usize, consistency: Consistency, momentum: f32) -> Vec<f32> {
    let rule = || Sgd::with_momentum(momentum);
    let mut world = World::with_rule(num_shards, consistency, Reduction::Mean, 0.01, rule);
    let (mut dice, mut lag) = (Dice(seed), Dice(seed ^ 1));
    let mut incarnations = [1u64; 4];
    let mut clocks = [0u64; 4];
    (0..4).for_each(|worker| {
        world.join(worker, 1).unwrap();
    });
    for _ in 0..150 {
        let worker = dice.roll(4);
        match dice.roll(20) {
            0 => {
                world.event(Event::Lost {
                    worker: WorkerId(worker as u32),
                });
                incarnations[worker] += 1;
                let joined = world.join(worker as u32, incarnations[worker]).unwrap();
                clocks[worker] = joined.next_clock.0;
            }
            repeats => {
                let id = id(worker as u32, incarnations[worker], clocks[worker]);
                let version = world.coordinator.version().0;
                let computed_on = version.saturating_sub(dice.roll(3) as u64);
                let values = dice.values();
                for _ in 0..1 + repeats / 18 {
                    world.push(id, computed_on, values.clone());
                }
                clocks[worker] += 1;
            }
        }
        world.deliver(lag.roll(num_shards));
    }
    assert!(world.coordinator.version().0 > 0, "something happened");
    world.weights()
}

proptest! {
    #[test]
    fn any_number_of_shards_gives_the_bits_of_one(
        seed: u64, num_shards in 2usize..6, consistency in any_consistency(), momentum in prop_oneof![Just(0.0f32), Just(0.9)],
    ) {
        let one = run(seed, 1, consistency, momentum);
        let several = run(seed, num_shards, consistency, momentum);
        let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        prop_assert_eq!(bits(&one), bits(&several));
    }

    /// N workers with the mean of their gradients are one worker with the mean gradient.
    #[test]
    fn bsp_with_mean_equals_one_worker_on_the_joined_batch(
        seed: u64, num_workers in 1u32..5, momentum in prop_oneof![Just(0.0f32), Just(0.9)],
    ) {
        let mut dice = Dice(seed);
        let rule = || Sgd::with_momentum(momentum);
        let mut many = World::with_rule(1, Consistency::Bsp, Reduction::Mean, 0.1, rule);
        let mut single = World::with_rule(1, Consistency::Bsp, Reduction::Mean, 0.1, rule);
        (0..num_workers).for_each(|worker| { many.join(worker, 1).unwrap(); });
        single.join(0, 1).unwrap();
        for round in 0..20 {
            let mut joined = vec![0.0f32; LEN];
            for worker in 0..num_workers {
                let values = dice.values();
                joined.iter_mut().zip(&values).for_each(|(j, v)| *j += v / num_workers as f32);
                many.push(id(worker, 1, round), round, values);
            }
            single.push(id(0, 1, round), round, joined);
        }
        for (a, b) in many.weights().iter().zip(single.weights()) {
            // The two add up in another order: a few units in the last place per round.
            prop_assert!((a - b).abs() <= 1e-5 * (1.0 + b.abs()), "{} and {}", a, b);
        }
    }
}

fn one(id: GradientId) -> Summand {
    Summand {
        id,
        computed_on: Version(0),
        norm: Gradient::new(vec![1.0; LEN]).norm(),
        num_examples: 32,
    }
}

/// Gradients whose mean over two batches is known: the gradient of a batch is the mean of its examples'.
fn batch(examples: &[Vec<f32>]) -> Vec<f32> {
    let mean = |i| examples.iter().map(|e| e[i]).sum::<f32>() / examples.len() as f32;
    (0..LEN).map(mean).collect()
}

proptest! {
    /// PS-3, for batches of different size; and the same bits over any number of servers.
    #[test]
    fn batches_of_different_size_count_by_their_examples(
        seed: u64, sizes in proptest::collection::vec(1usize..6, 2..5), num_shards in 2usize..5,
    ) {
        let mut dice = Dice(seed);
        let examples: Vec<Vec<Vec<f32>>> = sizes
            .iter()
            .map(|&size| (0..size).map(|_| dice.values()).collect())
            .collect();
        let mean = || World::new(1, Consistency::Bsp, Reduction::Mean);
        let several = World::new(num_shards, Consistency::Bsp, Reduction::Mean);
        let mut weights = Vec::new();
        for mut world in [mean(), several] {
            (0..sizes.len()).for_each(|worker| { world.join(worker as u32, 1).unwrap(); });
            for (worker, examples) in examples.iter().enumerate() {
                world.num_examples = examples.len() as u64;
                world.push(id(worker as u32, 1, 0), 0, batch(examples));
            }
            weights.push(world.weights());
        }
        let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        prop_assert_eq!(bits(&weights[0]), bits(&weights[1]));
        let mut single = mean();
        single.join(0, 1).unwrap();
        single.push(id(0, 1, 0), 0, batch(&examples.concat()));
        for (a, b) in weights[0].iter().zip(single.weights()) {
            prop_assert!((a - b).abs() <= 1e-5, "{} and {}", a, b);
        }
    }
}

/// S-7: the numbers are such that each order of a sum has other bits.
#[test]
fn the_bits_of_a_sum_do_not_depend_on_the_order_of_arrival() {
    let numbers = [1e5f32, 0.003, -1e5, 0.7];
    let sum = |order: [usize; 4]| -> f32 { order.iter().map(|&worker| numbers[worker]).sum() };
    assert_ne!(sum([0, 1, 2, 3]), sum([0, 2, 1, 3]));
    for num_shards in [1, 3] {
        for seed in 0..50 {
            let mut order = [0, 1, 2, 3];
            Dice(seed).shuffle(&mut order);
            let mut world = World::new(num_shards, Consistency::Bsp, Reduction::Sum);
            (0..4).for_each(|worker| {
                world.join(worker, 1).unwrap();
            });
            for worker in order {
                world.push(id(worker as u32, 1, 0), 0, vec![numbers[worker]; LEN]);
            }
            let expected = sum([0, 1, 2, 3]).to_bits();
            let weights = world.weights();
            assert!(
                weights.iter().all(|weight| weight.to_bits() == expected),
                "{num_shards} shards, order {order:?}"
            );
        }
    }
}

#[test]
fn a_batch_of_three_examples_weighs_three_times_one_of_one() {
    // What 1 and 3 examples give, whose gradients are 8 and 4; then known sizes, and unknown ones.
    for (sizes, expected) in [
        ([1, 3], 5.0),
        ([3, 1], 7.0),
        ([32, 32], 6.0),
        ([0, 0], 6.0),
        ([0, 3], 6.0),
        ([1 << 32, 1 << 32], 6.0),
    ] {
        let mut world = World::new(2, Consistency::Bsp, Reduction::Mean);
        (0..2).for_each(|worker| {
            world.join(worker, 1).unwrap();
        });
        world.num_examples = sizes[0];
        world.push(id(0, 1, 0), 0, vec![8.0; LEN]);
        world.num_examples = sizes[1];
        world.push(id(1, 1, 0), 0, vec![4.0; LEN]);
        assert_eq!(world.weights(), vec![expected; LEN], "{sizes:?}");

        let mut driver = World::new(2, Consistency::Asp, Reduction::Sum);
        let mut stamps = Vec::new();
        for (worker, (size, number)) in (0..).zip(sizes.into_iter().zip([8.0, 4.0])) {
            let (id, gradient) = (id(worker, 1, 0), Gradient::new(vec![number; LEN]));
            driver.num_examples = size;
            stamps.push(driver.stamp(id, Version(0), &gradient));
            for shard in &mut driver.shards {
                shard.stage(id, &gradient).unwrap();
            }
        }
        let ticket = driver.ticket();
        driver.event(Event::Apply {
            ticket,
            stamps,
            reduction: Reduction::Mean,
            newest: NEWEST,
        });
        assert_eq!(driver.weights(), vec![expected; LEN], "{sizes:?}");
    }
    let mut world = World::new(1, Consistency::Asp, Reduction::Mean);
    world.join(0, 1).unwrap();
    for claimed in [(1 << 32) + 1, u64::MAX] {
        world.num_examples = claimed;
        let id = id(0, 1, 0);
        let pushed = world.push(id, 0, vec![1.0; LEN]);
        let applied = world.apply(&[id], 0, |_| 1.0);
        for ticket in [pushed, applied] {
            let refused = Err(Refusal::TooManyExamples { id, claimed });
            assert_eq!(world.answers[&ticket], refused);
        }
    }
    world.num_examples = 0;
    world.push(id(0, 1, 0), 0, vec![1.0; LEN]);
    assert_eq!(world.weights(), vec![1.0; LEN]);
}

#[test]
fn a_snapshot_does_not_change_and_unshared_weights_are_updated_in_place() {
    let mut world = World::new(1, Consistency::Asp, Reduction::Mean);
    let initial = Weights::initial(Layout::flat(LEN), vec![0.0; LEN]);
    world.shards[0] = Shard::new(&initial, 0..LEN, Box::new(Sgd::new()), -1.0, 0);
    world.join(0, 1).unwrap();
    world.push(id(0, 1, 0), 0, vec![1.0; LEN]);
    let snapshot = world.shards[0].weights().clone();
    let address = snapshot.segments()[0].data().as_ptr();
    world.push(id(0, 1, 1), 1, vec![1.0; LEN]);
    assert_eq!(snapshot.to_vec(), vec![1.0; LEN], "PS-5");
    assert_eq!(world.weights(), vec![2.0; LEN]);
    let now = || world.shards[0].weights().segments()[0].data().as_ptr();
    let copied = now();
    assert_ne!(copied, address);
    drop(snapshot);
    world.push(id(0, 1, 2), 2, vec![1.0; LEN]);
    assert_eq!(
        world.shards[0].weights().segments()[0].data().as_ptr(),
        copied,
        "in place"
    );
    assert_eq!(world.weights(), vec![3.0; LEN]);
}

#[test]
fn a_pull_of_one_version_waits_for_it_and_says_when_it_is_gone() {
    let mut world = World::new(2, Consistency::Asp, Reduction::Mean);
    world.join(0, 1).unwrap();
    let wanted = PullVersion::Exactly(Version(1));
    assert!(world.shards[1].pull(Ticket(1), wanted).is_none());
    let update = |world: &mut World, clock| {
        world.push(id(0, 1, clock), clock, vec![1.0; LEN]);
    };
    update(&mut world, 0);
    update(&mut world, 1);
    // Shard 1 hears of both updates late, and still hands out version 1 to whom it is due.
    let Some(Effect::Fence { .. }) = world.undelivered[1].pop_front() else {
        panic!("the join")
    };
    let Some(Effect::Update(first)) = world.undelivered[1].pop_front() else {
        panic!("update")
    };
    let answers = world.shards[1].update(first, -1.0).unwrap();
    let [ShardAnswer::Pull(Ticket(1), Ok(weights))] = &answers[..] else {
        panic!("{answers:?}")
    };
    assert_eq!(weights.version(), Version(1));
    assert_eq!(weights.to_vec(), vec![1.0; 8]);
    world.deliver_all();
    (2..5).for_each(|clock| update(&mut world, clock));
    world.deliver_all();
    let answer = world.shards[1].pull(Ticket(2), wanted).expect("at once");
    let gone = ShardError::VersionGone {
        asked: Version(1),
        oldest: Version(3),
    };
    assert_eq!(answer.unwrap_err(), gone);
}

#[test]
fn an_update_waits_for_the_gradients_that_it_names() {
    let mut world = World::new(1, Consistency::Asp, Reduction::Sum);
    let shard = &mut world.shards[0];
    let gradient = Gradient::new(vec![1.0; LEN]);
    let update = |version, clock| Update {
        version: Version(version),
        gradients: vec![one(id(0, 1, clock))],
        reduction: Reduction::Sum,
        clip: Clip::None,
    };
    shard.stage(id(0, 1, 1), &gradient).unwrap();
    assert!(shard.update(update(1, 0), -1.0).unwrap().is_empty());
    shard.update(update(2, 1), -1.0).unwrap();
    shard.discard(id(0, 1, 1));
    shard.fence(WorkerId(0), Incarnation(2));
    assert_eq!(shard.weights().version(), Version(0));
    assert!(
        shard
            .pull(Ticket(5), PullVersion::AtLeast(Version(2)))
            .is_none()
    );
    let fenced = shard.stage(id(0, 1, 0), &gradient);
    assert!(fenced.is_ok(), "an awaited gradient is let in: {fenced:?}");
    assert_eq!(shard.weights().version(), Version(2));
}

/// PS-6: what was judged is applied, not what somebody staged under its name before.
#[test]
fn an_update_is_made_of_the_numbers_that_were_judged() {
    let mut world = World::new(2, Consistency::Asp, Reduction::Sum);
    world.join(0, 1).unwrap();
    world.deliver_all();
    let id = id(0, 1, 0);
    let forged = Gradient::new(vec![9.0; LEN]);
    world.shards[1].stage(id, &forged).unwrap();
    world.push(id, 0, vec![1.0; LEN]);
    world.deliver_all();
    let shard = &mut world.shards[1];
    assert_eq!(shard.lacking(usize::MAX), [id]);
    assert_eq!(shard.lacking(0), []);
    shard.complete(id, &Gradient::new(vec![1.0; LEN])).unwrap();
    assert_eq!(shard.lacking(usize::MAX), []);
    // Once more, too late.
    shard.complete(id, &Gradient::new(vec![1.0; LEN])).unwrap();
    assert_eq!(shard.num_staged(), 0);
    assert_eq!(world.weights(), vec![1.0; LEN]);
}

/// PS-6: longer is as wrong as shorter, and so is another part of the model.
#[test]
fn a_gradient_over_other_weights_is_refused() {
    let mut world = World::new(2, Consistency::Asp, Reduction::Mean);
    let whole = Gradient::new(vec![1.0; LEN]);
    for (len, cut) in [
        (LEN - 1, 0..LEN - 1),
        (LEN + 2, 0..LEN + 2),
        (LEN + 2, 32..LEN + 2),
        (LEN, 1..LEN),
        (LEN, 32..LEN - 1),
        (LEN, 0..32),
    ] {
        let other = Gradient::new(vec![1.0; len]).slice(cut.clone());
        let error = world.shards[1].stage(id(0, 1, 0), &other).unwrap_err();
        assert!(
            error.to_string().contains("over 32..40"),
            "{cut:?}: {error}"
        );
    }
    for (clock, right) in [(0, whole.clone()), (1, whole.slice(32..LEN))] {
        world.shards[1].stage(id(0, 1, clock), &right).unwrap();
    }
}

#[test]
fn an_update_that_cannot_be_the_next_one_is_refused_and_changes_nothing() {
    let mut world = World::new(1, Consistency::Asp, Reduction::Sum);
    let shard = &mut world.shards[0];
    let gradient = Gradient::new(vec![1.0; LEN]);
    let (first, second) = (id(0, 1, 0), id(0, 1, 1));
    for id in [first, second] {
        shard.stage(id, &gradient).unwrap();
    }
    let update = |version, gradients: &[GradientId]| Update {
        version: Version(version),
        gradients: gradients.iter().copied().map(one).collect(),
        reduction: Reduction::Sum,
        clip: Clip::None,
    };
    for bad in [
        update(0, &[first]),
        update(2, &[first]),
        update(u64::MAX, &[first]),
        update(1, &[]),
        update(1, &[first, first]),
    ] {
        let refused = shard.update(bad.clone(), -1.0);
        assert!(
            matches!(
                refused,
                Err(ShardError::WrongUpdate { .. } | ShardError::BadUpdate { .. })
            ),
            "{bad:?}"
        );
    }
    shard.update(update(1, &[first, second]), -1.0).unwrap();
    // One that waits for its gradient is the last one, too.
    shard.update(update(2, &[id(0, 1, 2)]), -1.0).unwrap();
    assert!(shard.update(update(2, &[first]), -1.0).is_err());
    assert_eq!(shard.weights().to_vec(), vec![2.0; LEN]);
}
