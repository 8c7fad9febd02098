//! Training through a server is training.

use std::thread;

use ps::actors::cluster::Placement;
use ps::model::{LocalModel, Part};
use ps::served::{host_parts, infer, parameters};

use super::*;
use crate::nodes::{transports, with_two_nodes};

/// PT-1: the losses of one trainer are those of a loop in one process, to the bit.
fn check_one_trainer<M>(model: M, num_steps: u64, num_servers: usize)
where
    M: Model<Batch = ImageBatch> + Part<Input = Tensor<4>, Output = Tensor<2>>,
{
    let mut local = LocalModel::new(model.clone(), &device()).unwrap();
    let mut weights = local.weights().unwrap();
    let mut rule = Sgd::new();
    let servers = sgd_servers(&model, num_servers, config());
    let part = serve(&model, &servers);
    let (losses, outcomes): (Vec<_>, Vec<_>) = run(async {
        let mut optimizer = optimizer(0, &part).await;
        let mut steps = Vec::new();
        for clock in 0..num_steps {
            let mut context = optimizer.begin();
            let loss = compute(&mut context, &part, &batch(0, clock))
                .await
                .unwrap();
            steps.push((loss, optimizer.step(context).await.unwrap()));
        }
        optimizer.leave().await.unwrap();
        steps.into_iter().unzip()
    });
    for clock in 0..num_steps {
        let (loss, gradient) = locally(&local, &batch(0, clock), seed(0, clock));
        assert_eq!(losses[clock as usize].to_bits(), loss.to_bits(), "{clock}");
        let version = Version(clock + 1);
        let applied = Outcome::Applied {
            version,
            staleness: 0,
        };
        assert_eq!(outcomes[clock as usize], [applied]);
        rule.update(&mut weights, &gradient, 0.05);
        local.load(&weights).unwrap();
    }
    let served = run(servers.pull(PullVersion::Latest)).unwrap();
    assert!(served.to_vec() == weights);
}

#[test]
fn one_trainer_gets_the_losses_of_local_training() {
    check_one_trainer(ConvNet::init(1, &device()), 20, 1);
    check_one_trainer(ConvNet::init(1, &device()), 20, 3);
    // With dropout.
    check_one_trainer(Net::init(1, &device()), 3, 1);
}

/// PT-1, PT-2: what crashes PyTorch's guide. Every gradient is that of the context's own snapshot,
/// and all of them are in the weights.
#[test]
fn three_trainers_at_once_get_the_gradients_of_their_snapshots_and_lose_no_update() {
    let model = ConvNet::init(1, &device());
    for (transport, num_parts) in transports().into_iter().zip([1, 2, 1]) {
        let hosts = host_parts(Hosts::new(), &model, &device(), PartConfig::default());
        with_two_nodes(transport, hosts, |cluster| {
            let servers = sgd_servers(&model, 1, config());
            // On nodes in turn; two of them compute with the same weights.
            let parts =
                (0..num_parts).map(|_| cluster.spawn::<PartServer<ConvNet>>(servers.clone()));
            let parts: Vec<_> = parts.map(|part| part.wait().unwrap()).collect();
            assert!(!parts[0].is_local());
            check_three_trainers(&model, &servers, &parts);
        });
    }
}

fn check_three_trainers(
    model: &ConvNet,
    servers: &ServerGroup,
    parts: &[ActorRef<PartServer<ConvNet>>],
) {
    const NUM_STEPS: u64 = 10;
    let trainers: Vec<_> = (0..3)
        .map(|trainer: u32| {
            let part = parts[trainer as usize % parts.len()].clone();
            thread::spawn(move || {
                run(async {
                    let mut optimizer = optimizer(trainer, &part).await;
                    let mut steps = Vec::new();
                    for clock in 0..NUM_STEPS {
                        let mut context = optimizer.begin();
                        let batch = batch(trainer, clock);
                        compute(&mut context, &part, &batch).await.unwrap();
                        let gradient = context.gradient(&part).await.unwrap();
                        let outcome = optimizer.step(context).await.unwrap()[0];
                        steps.push((clock, gradient, outcome));
                    }
                    optimizer.leave().await.unwrap();
                    steps
                })
            })
        })
        .collect();
    let mut updates = Vec::new();
    let mut local = LocalModel::new(model.clone(), &device()).unwrap();
    for (trainer, steps) in (0..).zip(trainers) {
        for (clock, gradient, outcome) in steps.join().unwrap() {
            let snapshot = PullVersion::Exactly(computed_on(outcome));
            let snapshot = run(servers.pull(snapshot)).unwrap();
            local.load(&snapshot.to_vec()).unwrap();
            let (_, expected) = locally(&local, &batch(trainer, clock), seed(trainer, clock));
            assert!(
                gradient.values() == expected,
                "trainer {trainer}, clock {clock}"
            );
            updates.push((outcome.version(), expected));
        }
    }
    updates.sort_by_key(|(version, _)| *version);
    let mut weights = LocalModel::new(model.clone(), &device())
        .unwrap()
        .weights()
        .unwrap();
    for (update, expected) in updates.iter().zip(1..) {
        assert_eq!(update.0, Version(expected), "one update for each gradient");
        Sgd::new().update(&mut weights, &update.1, 0.05);
    }
    let latest = run(servers.pull(PullVersion::Latest)).unwrap();
    assert_eq!(latest.version(), Version(3 * NUM_STEPS));
    assert!(latest.to_vec() == weights);
}

/// PS-3: the mean of two trainers' gradients is that of the joined batch if both say how large theirs is.
#[test]
fn batches_of_different_size_weigh_by_their_examples_where_it_is_said() {
    let model = ConvNet::init(1, &device());
    let indices = [0..2usize, 2..8];
    let take = |indices: std::ops::Range<usize>| {
        Examples::batch(&Mnist::bundled_sample().train, &indices.collect::<Vec<_>>())
    };
    let local = LocalModel::new(model.clone(), &device()).unwrap();
    let initial = local.weights().unwrap();
    let gradients = indices
        .clone()
        .map(|indices| locally(&local, &take(indices), seed(0, 0)).1);
    for (is_said, shares) in [(true, [0.25f32, 0.75]), (false, [0.5, 0.5])] {
        let config = ServerConfig {
            consistency: Consistency::Bsp,
            reduction: Reduction::Mean,
            wait_for_workers: 2,
            ..config()
        };
        let servers = sgd_servers(&model, 2, config);
        let part = serve(&model, &servers);
        let trainers = [0, 1].map(|trainer| {
            let (part, batch) = (part.clone(), take(indices[trainer].clone()));
            thread::spawn(move || {
                run(async {
                    let mut optimizer = optimizer(trainer as u32, &part).await;
                    let mut context = optimizer.begin();
                    if is_said {
                        context.set_num_examples(batch.labels().len());
                    }
                    compute(&mut context, &part, &batch).await.unwrap();
                    optimizer.step(context).await.unwrap();
                })
            })
        });
        for trainer in trainers {
            trainer.join().unwrap();
        }
        let got = run(servers.pull(PullVersion::Latest)).unwrap().to_vec();
        for (index, got) in got.into_iter().enumerate() {
            let mean = gradients[0][index] * shares[0] + gradients[1][index] * shares[1];
            let expected = initial[index] - 0.05 * mean;
            // Only the order of additions may differ.
            assert!((got - expected).abs() <= 1e-6, "{got} and {expected}");
        }
    }
}

#[test]
fn synchronous_trainers_wait_for_each_other() {
    let model = ConvNet::init(1, &device());
    let config = ServerConfig {
        consistency: Consistency::Bsp,
        wait_for_workers: 2,
        ..config()
    };
    let part = serve(&model, &sgd_servers(&model, 1, config));
    let trainers = [0, 1].map(|trainer| {
        let part = part.clone();
        thread::spawn(move || {
            run(async {
                let mut optimizer = optimizer(trainer, &part).await;
                for clock in 0..5 {
                    let mut context = optimizer.begin();
                    compute(&mut context, &part, &batch(trainer, clock))
                        .await
                        .unwrap();
                    let outcome = optimizer.step(context).await.unwrap()[0];
                    let applied = Outcome::Applied {
                        version: Version(clock + 1),
                        staleness: 0,
                    };
                    assert_eq!(outcome, applied);
                }
                optimizer.leave().await.unwrap();
            });
        })
    });
    for trainer in trainers {
        trainer.join().unwrap();
    }
}

/// PT-7
#[test]
fn inference_is_without_dropout_at_the_latest_weights() {
    let model = Net::init(1, &device());
    let part = serve(&model, &sgd_servers(&model, 1, config()));
    let images = batch(0, 0).images_on(&device());
    let served = || {
        let output = run(infer(&part, images.clone())).unwrap();
        output.into_data().try_into_vec::<f32>().unwrap()
    };
    let local = LocalModel::new(model, &device()).unwrap();
    let shape = images.dims().to_vec();
    let values = images.clone().into_data().try_into_vec().unwrap();
    let expected = local.infer(Array { shape, values }).unwrap();
    assert_eq!(served(), expected.values);
    run(async {
        let mut optimizer = optimizer(0, &part).await;
        let mut context = optimizer.begin();
        compute(&mut context, &part, &batch(0, 0)).await.unwrap();
        optimizer.step(context).await.unwrap();
    });
    assert_ne!(served(), expected.values);
}

#[test]
fn single_parameters_and_their_gradients_can_be_fetched() {
    let model = ConvNet::init(1, &device());
    for transport in transports() {
        let hosts = host_parts(Hosts::new(), &model, &device(), PartConfig::default());
        with_two_nodes(transport, hosts, |cluster| {
            let servers = sgd_servers(&model, 2, config());
            let part = cluster.spawn::<PartServer<ConvNet>>(servers.clone());
            let part = part.wait().unwrap();
            run(async {
                let all = parameters(&part).await.unwrap();
                let names: Vec<_> = all.iter().map(|parameter| parameter.name()).collect();
                let expected = ["conv1.weight", "conv1.bias", "fc.weight", "fc.bias"];
                assert_eq!(names, expected);
                assert_eq!(all[0].shape(), [3, 1, 3, 3]);
                let mut fetched = Vec::new();
                for parameter in &all {
                    fetched.extend(parameter.fetch().await.unwrap().values);
                }
                let weights = servers.pull(PullVersion::Latest).await.unwrap();
                assert_eq!(fetched, weights.to_vec());

                let mut optimizer = optimizer(0, &part).await;
                let mut context = optimizer.begin();
                compute(&mut context, &part, &batch(0, 0)).await.unwrap();
                let whole = context.gradient(&part).await.unwrap();
                let bias = all[3].gradient(&context).await.unwrap();
                assert_eq!(bias.shape, [10]);
                assert_eq!(bias.values, whole.values()[1950..]);
            });
        });
    }
}

#[test]
fn parts_can_be_put_where_they_are_wanted() {
    let model = ConvNet::init(1, &device());
    let hosts = host_parts(Hosts::new(), &model, &device(), PartConfig::default());
    with_two_nodes(transports()[1].clone(), hosts, |cluster| {
        let servers = sgd_servers(&model, 1, config());
        for rank in [0, 1, 2] {
            let options = SpawnOn::new().place(Placement::Rank(rank));
            let part = cluster.spawn_with::<PartServer<ConvNet>>(options, servers.clone());
            let part = part.wait().unwrap();
            assert_eq!(part.node().map_or(0, |node| node.rank), rank);
            run(infer(&part, batch(0, 0).images_on(&device()))).unwrap();
        }
    });
}
