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
    assert_eq!(answers.len(), 1);
    assert_eq!(answers[0].weights.as_ref().unwrap().version(), Version(1));
    assert_eq!(answers[0].weights.as_ref().unwrap().to_vec(), vec![1.0; 8]);
    world.deliver_all();
    (2..5).for_each(|clock| update(&mut world, clock));
    world.deliver_all();
    let answer = world.shards[1].pull(Ticket(2), wanted).expect("at once");
    let gone = ShardError::VersionGone {
        asked: Version(1),
        oldest: Version(3),
    };
    assert_eq!(answer.weights.unwrap_err(), gone);
}

#[test]
fn an_update_waits_for_the_gradients_that_it_names() {
    let mut world = World::new(1, Consistency::Asp, Reduction::Sum);
    let shard = &mut world.shards[0];
    let gradient = Gradient::new(vec![1.0; LEN]);
    let update = |version, clock| Update {
        version: Version(version),
        gradients: vec![id(0, 1, clock)],
        reduction: Reduction::Sum,
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

#[test]
fn a_gradient_over_other_weights_is_refused() {
    let mut world = World::new(2, Consistency::Asp, Reduction::Mean);
    let short = Gradient::new(vec![1.0; LEN - 1]);
    let error = world.shards[1].stage(id(0, 1, 0), &short).unwrap_err();
    assert!(error.to_string().contains("holds 32..40"), "{error}");
}
