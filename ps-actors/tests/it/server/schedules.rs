//! Learning rates that change during a run, and clipping of the combined gradient (S-17, S-18).

use ps_actors::learning_rate::{LearningRateSchedule, Scheduled, check_rates};

use super::*;

/// A rate that falls from update to update.
#[derive(Debug)]
struct Falling(f64);

impl LearningRateSchedule for Falling {
    fn learning_rate(&mut self, version: Version) -> f64 {
        self.0 / version.0 as f64
    }
}

fn scheduled(num_servers: usize, config: ServerConfig) -> ServerGroup {
    let rule = |_| -> Box<dyn UpdateRule> {
        Box::new(Scheduled::new(Sgd::with_momentum(0.5), Falling(0.5)))
    };
    ServerGroup::spawn(&initial(), num_servers, config, rule).unwrap()
}

/// What one thread computes in rounds of three workers, in `f64`.
fn expected(num_rounds: u64, clipping: Clipping) -> Vec<f64> {
    let mut weights: Vec<f64> = initial().to_vec().into_iter().map(f64::from).collect();
    let mut velocity = vec![0.0; LEN];
    for clock in (0..num_rounds).map(Clock) {
        let mean = |i: usize| {
            let targets = (0..3).map(|w| f64::from(target(w, clock, i)));
            weights[i] - targets.sum::<f64>() / 3.0
        };
        let mut mean: Vec<f64> = (0..LEN).map(mean).collect();
        let norm = mean.iter().map(|g| g * g).sum::<f64>().sqrt();
        match clipping {
            Clipping::Off => {}
            Clipping::Norm(limit) => {
                let factor = (limit / norm).min(1.0);
                mean.iter_mut().for_each(|g| *g *= factor);
            }
            Clipping::Value(limit) => {
                let limit = f64::from(limit);
                mean.iter_mut().for_each(|g| *g = g.clamp(-limit, limit));
            }
        }
        for i in 0..LEN {
            velocity[i] = 0.5 * velocity[i] + mean[i];
            weights[i] -= 0.5 / (clock.0 + 1) as f64 * velocity[i];
        }
    }
    weights
}

/// S-17 and S-18.
#[test]
fn rates_and_clipping_are_those_of_one_thread_with_the_same_bits_on_any_number_of_servers() {
    let mut results = Vec::new();
    for clipping in [Clipping::Off, Clipping::Norm(25.0), Clipping::Value(2.5)] {
        let mut all = Vec::new();
        for num_servers in [1, 2, 5] {
            let config = ServerConfig {
                wait_for_workers: 3,
                clipping,
                ..config(Consistency::Bsp)
            };
            let servers = scheduled(num_servers, config);
            run_all(&servers, 3, 20);
            all.push(final_weights(&servers).to_vec());
        }
        assert!(all[1] == all[0] && all[2] == all[0], "{clipping}");
        assert!(!results.contains(&all[0]), "{clipping} changed nothing");
        results.push(all[0].clone());
        for (i, (got, expected)) in all[0].iter().zip(expected(20, clipping)).enumerate() {
            let difference = (f64::from(*got) - expected).abs();
            assert!(
                difference < 1e-4,
                "{clipping}, weight {i}: {got}, not {expected}"
            );
        }
    }
}

/// S-17.
#[test]
fn a_run_that_goes_on_from_a_checkpoint_has_the_rates_of_an_undisturbed_one() {
    let config = ServerConfig {
        wait_for_workers: 3,
        clipping: Clipping::Norm(25.0),
        ..config(Consistency::Bsp)
    };
    let whole = scheduled(1, config);
    run_all(&whole, 3, 12);
    let servers = scheduled(2, config);
    run_all(&servers, 3, 5);
    let group = servers.clone();
    let saved = actor::run(async move { group.checkpoint().await.unwrap() });
    assert_eq!(saved.learning_rate(), 0.5 / 5.0);
    let rule = |_| -> Box<dyn UpdateRule> {
        Box::new(Scheduled::new(Sgd::with_momentum(0.5), Falling(0.5)))
    };
    let servers = ServerGroup::spawn(&saved, 3, config, rule).unwrap();
    let first = servers.servers().next().unwrap();
    assert_eq!(
        first.ask(GetStatus).wait().unwrap().learning_rate,
        0.5 / 6.0
    );
    run_all(&servers, 3, 7);
    assert_eq!(
        final_weights(&servers).to_vec(),
        final_weights(&whole).to_vec()
    );
}

/// S-17.
#[test]
fn a_rate_that_is_set_ends_the_schedule() {
    let servers = scheduled(2, config(Consistency::Asp));
    run_all(&servers, 1, 3);
    let first = servers.servers().next().unwrap();
    let rate = || first.ask(GetStatus).wait().unwrap().learning_rate;
    assert_eq!(rate(), 0.5 / 4.0);
    first.ask(SetLearningRate(0.0)).wait().unwrap().unwrap();
    let before = final_weights(&servers).to_vec();
    run_all(&servers, 1, 2);
    assert_eq!(rate(), 0.0);
    let after = final_weights(&servers);
    assert_eq!((after.version(), after.to_vec()), (Version(5), before));
}

#[test]
fn a_rate_that_no_server_can_use_is_found_before_the_run_and_ends_the_server_in_it() {
    let error = check_rates(&mut Falling(f64::NAN), 10).unwrap_err();
    assert!(error.to_string().contains("NaN for update 1"), "{error}");
    let error = check_rates(&mut Falling(-1.0), 10).unwrap_err();
    assert!(error.to_string().contains("-1.0 for update 1"), "{error}");
    assert_eq!(check_rates(&mut Falling(1.0), 10), Ok(()));

    let rule = Scheduled::new(Sgd::new(), Falling(f64::INFINITY));
    let server = ParameterServer::new(&initial(), rule, config(Consistency::Asp)).unwrap();
    let ended = server.spawn().unwrap().ask(GetStatus).wait().unwrap_err();
    assert!(ended.to_string().contains("inf for update 1"), "{ended}");
}

/// A gradient that is refused is not clipped, and one that is clipped is not refused.
#[test]
fn refusing_looks_at_single_gradients_and_clipping_at_the_combined_one() {
    let config = ServerConfig {
        max_norm: 100.0,
        learning_rate: 1.0,
        clipping: Clipping::Norm(1.0),
        ..config(Consistency::Asp)
    };
    let server = ParameterServer::new(&initial(), Sgd::new(), config).unwrap();
    let server = server.spawn().unwrap();
    let id = |clock| GradientId {
        worker: WorkerId(0),
        incarnation: Incarnation(1),
        clock: Clock(clock),
    };
    let apply = |clock, number: f32| {
        let update = GradientUpdate {
            id: id(clock),
            computed_on: Version(0),
            loss: 0.0,
            num_examples: 1,
            gradient: Gradient::new(vec![number; LEN]),
        };
        server.ask(ApplyGradients::mean([update])).wait().unwrap()
    };
    // 100 numbers of 5 have the norm 50.
    let weights = apply(0, 5.0).unwrap().to_vec();
    for (got, initial) in weights.iter().zip(initial().to_vec()) {
        assert!(
            (got - (initial - 0.1)).abs() < 1e-6,
            "{got}, from {initial}"
        );
    }
    let refused = apply(1, 11.0).unwrap_err();
    assert!(matches!(refused, ServerError::BadNorm { .. }), "{refused}");
}
