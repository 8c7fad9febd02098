//! What a push costs the coordinator does not grow with the number of workers. Counted, in virtual time.

use std::collections::BinaryHeap;

use super::super::coordinator::cost::num_looked_at;
use super::*;

/// Workers that take steps of different lengths, until all together have pushed so often. One in twenty takes twice as
/// long. Returns how many entries of its lists the coordinator looked at, per push.
fn looks_per_push(consistency: Consistency, num_workers: u32, num_pushes: u32) -> f64 {
    let mut coordinator = Coordinator::new(consistency, Reduction::Mean, f64::INFINITY);
    let mut dice = 1_u64;
    let mut time_of_step = |worker: u32| {
        // The generator of Knuth's MMIX.
        dice = dice
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let slow = if worker % 20 == 7 { 2 } else { 1 };
        slow * (500 + (dice >> 33) % 1_000)
    };
    // Whoever is the next to push: the heap has the largest time in front.
    let mut coming = BinaryHeap::new();
    for worker in 0..num_workers {
        let (ticket, request) = (Ticket(u64::from(worker)), JoinRequest(u64::from(worker)));
        let worker = WorkerId(worker);
        coordinator.step(Event::Join {
            ticket,
            worker,
            request,
        });
        coming.push((std::cmp::Reverse(time_of_step(worker.0)), worker));
    }
    // The next step of each worker, and the version that its gradient is computed on.
    let mut steps = vec![(Clock(0), Version(0)); num_workers as usize];
    num_looked_at();
    for _ in 0..num_pushes {
        let (std::cmp::Reverse(now), worker) = coming.pop().expect("somebody may push");
        let (clock, computed_on) = steps[worker.0 as usize];
        let incarnation = coordinator.incarnation(worker).expect("a member");
        let stamp = Stamp {
            id: GradientId {
                worker,
                incarnation,
                clock,
            },
            computed_on,
            norm: 1.0,
            num_examples: 1,
        };
        let ticket = Ticket(u64::from(worker.0));
        for effect in coordinator.step(Event::Push {
            ticket,
            stamp,
            then_start: true,
        }) {
            if let Effect::Answer { ticket, answer } = effect {
                answer.expect("it is taken");
                let worker = WorkerId(u32::try_from(ticket.0).unwrap());
                let (clock, computed_on) = &mut steps[worker.0 as usize];
                (*clock, *computed_on) = (clock.next(), coordinator.version());
                coming.push((std::cmp::Reverse(now + time_of_step(worker.0)), worker));
            }
        }
    }
    num_looked_at() as f64 / f64::from(num_pushes)
}

#[test]
fn what_a_push_costs_does_not_grow_with_the_number_of_workers() {
    let most = |num_workers: u32| num_workers as usize * 9 / 10;
    type MakeMode = fn(usize) -> Consistency;
    let modes: [(&str, MakeMode); 5] = [
        ("bsp", |_| Consistency::Bsp),
        ("k-of-n", |k| Consistency::KofN { k }),
        ("ssp:0", |_| Consistency::Ssp { bound: 0 }),
        ("ssp:2", |_| Consistency::Ssp { bound: 2 }),
        ("asp", |_| Consistency::Asp),
    ];
    for (name, mode) in modes {
        let looks = [10, 100, 1_000].map(|num_workers| {
            looks_per_push(
                mode(most(num_workers)),
                num_workers,
                40 * num_workers.max(100),
            )
        });
        // To look at all workers, or at all that wait, would be hundreds.
        assert!(
            looks[2] < 12.0 && looks[2] < 2.0 * looks[0] + 1.0,
            "{name}: {looks:?}"
        );
    }
}
