//! A model in several places: autograd crosses actors.

use ps::actors::cluster::Placement;
use ps::model::burn::module::Module;
use ps::model::burn::nn::Linear;
use ps::model::burn::nn::conv::Conv2d;
use ps::model::burn::optim::{AdamConfig, ModuleOptimizer, SgdConfig};
use ps::model::burn::tensor::activation::{log_softmax, relu};
use ps::model::burn::tensor::module::max_pool2d;
use ps::model::burn::tensor::ops::MaxPoolOptions;
use ps::model::{LocalModel, Rng, seeded};
use ps::served::host_parts;

use super::*;
use crate::nodes::{transports, with_two_nodes};

/// The convolutions of `Net`.
#[derive(Module, Debug)]
struct Convolutions {
    conv1: Conv2d,
    conv2: Conv2d,
}

impl Part for Convolutions {
    type Input = Tensor<4>;
    type Output = Tensor<4>;

    fn forward(&self, images: Tensor<4>, _: &mut Step) -> Tensor<4> {
        let x = self.conv2.forward(relu(self.conv1.forward(images)));
        max_pool2d(x, MaxPoolOptions::new([2, 2]))
    }
}

/// Its large fully connected layer.
#[derive(Module, Debug)]
struct Dense {
    fc1: Linear,
}

impl Part for Dense {
    type Input = Tensor<4>;
    type Output = Tensor<2>;

    fn forward(&self, x: Tensor<4>, _: &mut Step) -> Tensor<2> {
        relu(self.fc1.forward(x.flatten(1, 3)))
    }
}

/// `Net` in three pieces, from the numbers that the whole is made of.
fn pieces() -> (Convolutions, Dense, Linear) {
    let (rng, device) = (&mut Rng::new(SEED), &device());
    let convolutions = Convolutions {
        conv1: seeded::conv2d(rng, [1, 32], 3, device),
        conv2: seeded::conv2d(rng, [32, 64], 3, device),
    };
    let fc1 = seeded::linear(rng, [9216, 128], device);
    let head = seeded::linear(rng, [128, Net::NUM_CLASSES], device);
    // With gradients, as it is trained here.
    let head = head.train().fork(&device.clone().autodiff());
    (convolutions, Dense { fc1 }, head)
}

/// The parts compute as the whole; only where a gradient is a sum may its order differ.
fn assert_close(got: &[f32], expected: &[f32], what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
    for (index, (got, expected)) in got.iter().zip(expected).enumerate() {
        let difference = (got - expected).abs();
        assert!(
            difference <= 1e-5 * largest,
            "{what}, {index}: {got}, expected {expected}"
        );
    }
}

/// PyTorch's guide to two devices, over two processes, with a local head.
#[test]
fn a_net_split_over_two_nodes_and_a_local_head_trains_as_the_whole() {
    let whole = Net::init(SEED, &device()).with_dropout([0.0, 0.0]);
    let whole = LocalModel::new(whole, &device()).unwrap();
    let (loss, expected) = locally(&whole, &batch(0, 0), StepSeed::default());
    let (convolutions, dense, _) = pieces();
    for transport in transports() {
        let hosts = Hosts::new();
        let hosts = host_parts(hosts, &convolutions, &device(), PartConfig::default());
        let hosts = host_parts(hosts, &dense, &device(), PartConfig::default());
        with_two_nodes(transport, hosts, |cluster| {
            let on = |rank| SpawnOn::new().place(Placement::Rank(rank));
            let servers = [
                sgd_servers(&convolutions, 1, config()),
                sgd_servers(&dense, 2, config()),
            ];
            let first = cluster.spawn_with::<PartServer<Convolutions>>(on(1), servers[0].clone());
            let second = cluster.spawn_with::<PartServer<Dense>>(on(2), servers[1].clone());
            let (first, second) = (first.wait().unwrap(), second.wait().unwrap());
            let (_, _, head) = pieces();
            run(async {
                let mut optimizer = optimizer(0, &first).await;
                optimizer.add(&second).await.unwrap();
                let mut context = optimizer.begin();
                let batch = batch(0, 0);
                let features = context.forward(&first, batch.images_on(&device())).await;
                let hidden = context.forward(&second, features.unwrap()).await.unwrap();
                let output = log_softmax(head.forward(hidden), 1);
                let got = nll_loss(output.clone(), batch.labels_on(&output.device()));
                let mut local = context.backward(&got).await.unwrap();
                assert!((got.into_scalar::<f32>() - loss).abs() < 1e-5);

                let mut gradient = context.gradient(&first).await.unwrap().values().to_vec();
                gradient.extend(context.gradient(&second).await.unwrap().values());
                let of_head = local.take(&head);
                let weight = of_head.get::<2>(head.weight.id).unwrap();
                let bias = of_head.get::<1>(head.bias.as_ref().unwrap().id).unwrap();
                gradient.extend(weight.into_data().try_into_vec::<f32>().unwrap());
                gradient.extend(bias.into_data().try_into_vec::<f32>().unwrap());
                assert_close(&gradient, &expected, "gradient");

                let outcomes = optimizer.step(context).await.unwrap();
                assert_eq!(outcomes.len(), 2);
                let mut weights = Vec::new();
                for servers in &servers {
                    let pulled = servers.pull(PullVersion::Latest).await.unwrap();
                    assert_eq!(pulled.version(), Version(1));
                    weights.extend(pulled.to_vec());
                }
                let mut updated = whole.weights().unwrap();
                Sgd::new().update(&mut updated, &expected, 0.05);
                assert_close(&weights, &updated[..weights.len()], "weights");
            });
        });
    }
}

/// A layer that is trained here, before a part and behind it.
#[derive(Module, Debug)]
struct Around {
    before: Conv2d,
    behind: Linear,
}

/// Split learning: the trainer keeps the first and last layers, and trains them with a burn
/// optimizer; the middle is trained by Adam on two servers.
#[test]
fn local_layers_before_and_behind_a_part_are_trained_with_it() {
    #[derive(Module, Debug)]
    struct Middle {
        linear: Linear,
    }

    impl Part for Middle {
        type Input = Tensor<4>;
        type Output = Tensor<2>;

        fn forward(&self, x: Tensor<4>, step: &mut Step) -> Tensor<2> {
            let x = max_pool2d(x, MaxPoolOptions::new([3, 3]));
            relu(step.dropout(self.linear.forward(x.flatten(1, 3)), 0.1))
        }
    }

    let (rng, device) = (&mut Rng::new(SEED), &device());
    let trained = &device.clone().autodiff();
    let middle = Middle {
        linear: seeded::linear(rng, [192, 32], device),
    };
    let around = Around {
        before: seeded::conv2d(rng, [1, 3], 3, device),
        behind: seeded::linear(rng, [32, 10], device),
    };
    let mut around = around.train().fork(trained);
    let weights = initial_weights(&middle, device).unwrap();
    let adam = |_| -> Box<dyn UpdateRule> {
        Box::new(OptimizerRule::new(&AdamConfig::new(), device).unwrap())
    };
    let config = ServerConfig {
        learning_rate: 0.01,
        ..config()
    };
    let servers = ServerGroup::spawn(&weights, 2, config, adam).unwrap();
    let part = serve(&middle, &servers);
    let mut sgd: ModuleOptimizer = SgdConfig::new().init();
    let indices: Vec<usize> = (0..64).collect();
    let batch = Examples::batch(&Mnist::bundled_sample().train, &indices);
    let losses = run(async {
        let mut optimizer = optimizer(0, &part).await;
        let mut losses = Vec::new();
        for _ in 0..40 {
            let mut context = optimizer.begin();
            let x = relu(around.before.forward(batch.images_on(trained)));
            let x = context.forward(&part, x).await.unwrap();
            let output = log_softmax(around.behind.forward(x), 1);
            let loss = nll_loss(output, batch.labels_on(trained));
            let gradients = context.backward(&loss).await.unwrap().take(&around);
            // Both layers, each with its bias.
            assert_eq!(gradients.len(), 4);
            optimizer.step(context).await.unwrap();
            around = sgd.step(0.1, around, gradients);
            losses.push(loss.into_scalar::<f32>());
        }
        losses
    });
    let (first, last) = (losses[0], losses[39]);
    assert!(last < 0.3 * first, "the loss went from {first} to {last}");
}
