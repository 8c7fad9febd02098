//! S-20: what the servers make of running statistics when workers compute on old weights.

use std::ops::Range;

use ps_actors::weights::Parameter;

use super::*;

const NUM_TRAINABLE: usize = 20;

/// The variance of the data, which a batch shows only roughly.
const TRUE: f32 = 0.05;

/// The statistics begin at 1, as those of a batch normalization. Three servers cut them.
fn with_statistics() -> Weights {
    let parameter = |name: &str, range: Range<usize>| Parameter {
        name: name.to_owned(),
        shape: vec![range.len()],
        range,
    };
    let parameters = vec![
        parameter("weight", 0..NUM_TRAINABLE),
        parameter("variance", NUM_TRAINABLE..LEN),
    ];
    let layout = Layout::with_buffers(parameters, 1).unwrap();
    Weights::initial(layout, vec![1.0; LEN])
}

/// A number from -1 to 1 that differs from step to step, and from channel to channel.
fn noise(step: u64, channel: usize) -> f32 {
    let x = (step * 1_000 + channel as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (x >> 40) as f32 / (1 << 23) as f32 - 1.0
}

/// Which worker takes a step.
type Turn = fn(u64) -> usize;

/// Workers take steps with this momentum, and each computes on the weights that its step before returned. Returns the
/// statistics at the end.
fn statistics(num_servers: usize, momentum: f32, turn: Turn, num_steps: u64) -> Vec<f32> {
    let rule = |_| -> Box<dyn UpdateRule> { Box::new(Sgd::new()) };
    let config = config(Consistency::Asp);
    let servers = ServerGroup::spawn(&with_statistics(), num_servers, config, rule).unwrap();
    actor::run(async move {
        let initial = servers.pull(PullVersion::Latest).await.unwrap();
        let mut loaded = vec![initial.clone(); 17];
        let mut now = initial;
        for step in 0..num_steps {
            let worker = turn(step);
            let of = |weights: &Weights| weights.read(NUM_TRAINABLE..LEN).into_owned();
            let made = of(&loaded[worker]).into_iter().enumerate();
            let made = made.map(|(channel, old)| {
                let of_batch = TRUE * (1.0 + 0.2 * noise(step, channel));
                (1.0 - momentum) * old + momentum * of_batch
            });
            let made: Vec<f32> = made.collect();
            let computed_on = loaded[worker].version();
            let update = GradientUpdate {
                id: GradientId {
                    worker: WorkerId(worker as u32),
                    incarnation: Incarnation(1),
                    clock: Clock(step),
                },
                computed_on,
                loss: 0.0,
                num_examples: 1,
                gradient: Gradient::with_buffers(
                    [&[0.0; NUM_TRAINABLE][..], &made].concat(),
                    NUM_TRAINABLE,
                ),
            };
            let applied = servers.apply(vec![update], Reduction::Mean).await.unwrap();
            let share = 1.0 / (1 + now.version().0 - computed_on.0) as f32;
            for ((before, made), after) in of(&now).iter().zip(&made).zip(of(&applied)) {
                assert_eq!(after, before - (before - made) * share, "step {step}");
                assert!(after > 0.0, "step {step}: {after} of {before} and {made}");
            }
            now = applied;
            loaded[worker] = now.clone();
        }
        now.read(NUM_TRAINABLE..LEN).into_owned()
    })
}

#[test]
fn statistics_of_stale_steps_stay_possible_and_reach_those_of_the_data() {
    let in_turn: Turn = |step| (step % 17) as usize;
    // One worker takes a step while the other takes 80.
    let with_a_straggler: Turn = |step| usize::from(step % 81 == 80);
    for (turn, momentum, num_steps) in [
        (in_turn, 0.1, 2_500),
        (in_turn, 1.0, 500),
        (with_a_straggler, 0.1, 500),
        (with_a_straggler, 0.5, 500),
    ] {
        let one = statistics(1, momentum, turn, num_steps);
        for number in &one {
            let error = (number - TRUE).abs();
            assert!(error < 0.4 * TRUE, "momentum {momentum}: {number}");
        }
        let three = statistics(3, momentum, turn, num_steps);
        assert!(three == one, "momentum {momentum}");
    }
}
