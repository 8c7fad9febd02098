//! Several trainings in one program, each with its own model, data and optimizer; and processes that
//! would train another one than their driver.

use ps::actors::cluster::Transport;
use ps::actors::net::memory::MemoryNetwork;
use ps::model::burn::data::dataset::InMemDataset;
use ps::model::burn::module::Module;
use ps::model::burn::nn::{Linear, LinearConfig};
use ps::model::burn::optim::AdamConfig;
use ps::model::burn::tensor::{Device, Tensor, TensorData};
use ps::prelude::*;

use crate::nodes::{refusal, with_two_nodes};

fn device() -> Device {
    select_device(default_device_name()).unwrap()
}

/// The sample with these examples only, and these labels.
fn part(choose: impl Fn(usize) -> bool, label: impl Fn(u8) -> u8) -> ImageDataset {
    let all = Mnist::bundled_sample().train;
    let chosen = || (0..all.len()).filter(|index| choose(*index));
    let pixels = chosen().flat_map(|index| all.image(index).to_vec());
    let labels = chosen().map(|index| label(all.label(index)));
    let (pixels, labels) = (pixels.collect(), labels.collect());
    ImageDataset::new(
        pixels,
        labels,
        all.dims(),
        all.num_classes(),
        all.normalization(),
    )
    .unwrap()
}

/// Trains without every fifth example, beginning with that of the fold.
fn fold(number: usize) -> Trainer<ConvNet, ImageDataset> {
    let data = part(|index| index % 5 != number, |label| label);
    Trainer::new(ConvNet::init(3, &device()), data)
        .device(&device())
        .workers(2)
        .batch_size(8)
        .iterations(4)
}

fn with_adam(number: usize) -> Trainer<ConvNet, ImageDataset> {
    fold(number).optimizer(AdamConfig::new())
}

fn chain(error: &dyn std::error::Error) -> String {
    let source = error.source().map(chain).unwrap_or_default();
    format!("{error}: {source}")
}

///
#[test]
fn each_training_in_a_process_uses_its_own_model_data_and_optimizer() {
    let cluster = Cluster::alone(fold(0).hosts(Hosts::new()).unwrap());
    let mut all: Vec<Vec<f32>> = Vec::new();
    for make in [|| fold(0), || fold(1), || with_adam(0), || fold(0).seed(5)] {
        let weights = make().run_on(&cluster).unwrap().weights.to_vec();
        assert!(weights == make().run().unwrap().weights.to_vec());
        assert!(!all.contains(&weights), "of a training before");
        all.push(weights);
    }
}

/// with servers on nodes, which have to have the right optimizer.
#[test]
fn each_training_on_nodes_uses_its_own_model_data_and_optimizer() {
    let trainings = [|| fold(0), || fold(1), || with_adam(0), || with_adam(1)];
    let hosts = trainings
        .iter()
        .fold(Hosts::new(), |hosts, make| make().hosts(hosts).unwrap());
    with_two_nodes(Transport::Memory(MemoryNetwork::new()), hosts, |cluster| {
        for (index, make) in trainings.iter().enumerate() {
            let report = make()
                .servers_on_nodes(true)
                .servers(2)
                .run_on(cluster)
                .unwrap();
            let alone = make().run().unwrap();
            assert!(report.weights.to_vec() == alone.weights.to_vec(), "{index}");
        }
    });
}

///
#[test]
fn a_node_that_hosts_other_trainings_only_says_what_to_do() {
    let hosts = fold(0).hosts(Hosts::new()).unwrap();
    with_two_nodes(Transport::Memory(MemoryNetwork::new()), hosts, |cluster| {
        for (other, type_name) in [
            (fold(1), "DataWorker"),
            (with_adam(0).servers_on_nodes(true), "ParameterServer"),
        ] {
            let error = chain(&other.run_on(cluster).unwrap_err());
            assert!(error.contains("hosts(..)"), "{error}");
            assert!(error.contains(type_name), "{error}");
        }
        // Placed in the driver, it needs nobody else's hosts.
        fold(0).run_on(cluster).unwrap();
    });
}

///
#[test]
fn a_spawn_without_a_variant_gets_the_only_one_or_an_error() {
    let (device, model) = (device(), ConvNet::init(3, &device()));
    let [one, other] = [0, 1].map(|fold| part(move |index| index % 5 != fold, |label| label));
    let config = WorkerConfig {
        worker: WorkerId(0),
        num_workers: 1,
        batch_size: 8,
        seed: 0,
    };
    let hosts = host_workers(Hosts::new(), &model, &device, &one);
    let cluster = Cluster::alone(hosts.clone());
    cluster
        .spawn::<ModelWorker<ConvNet>>(config)
        .wait()
        .unwrap();

    let cluster = Cluster::alone(host_workers(hosts, &model, &device, &other));
    let error = cluster
        .spawn::<ModelWorker<ConvNet>>(config)
        .wait()
        .unwrap_err();
    let error = chain(&error);
    assert!(error.contains("SpawnOn::variant"), "{error}");
    let weights = initial_weights(&model, &device).unwrap();
    let losses = [&one, &other].map(|data| {
        let variant = SpawnOn::new().variant(worker_variant(&model, &device, data));
        let hosted = cluster.spawn_with::<ModelWorker<ConvNet>>(variant, config);
        let loss = |worker: ActorRef<ModelWorker<ConvNet>>| {
            let gradients = worker.ask(ComputeGradients(weights.clone()));
            gradients.wait().unwrap().unwrap().loss
        };
        let expected = loss(spawn_worker(&model, &device, data, config).unwrap());
        assert_eq!(loss(hosted.wait().unwrap()), expected);
        expected
    });
    assert_ne!(losses[0], losses[1]);
}

/// A network of some layers.
#[derive(Module, Debug)]
struct Mlp {
    layers: Vec<Linear>,
}

impl Mlp {
    fn new(sizes: &[usize]) -> Self {
        let layers = sizes.windows(2).map(|pair| {
            let config = LinearConfig::new(pair[0], pair[1]).with_bias(false);
            config.init(&device())
        });
        Self {
            layers: layers.collect(),
        }
    }
}

impl Model for Mlp {
    type Batch = Vec<f32>;

    fn loss(&self, batch: &Vec<f32>, step: &mut Step) -> Tensor<1> {
        let inputs = TensorData::new(batch.clone(), [batch.len() / 4, 4]);
        let inputs = Tensor::<2>::from_data(inputs, step.device());
        let output = self.layers.iter().fold(inputs, |x, layer| layer.forward(x));
        output.square().mean()
    }

    fn num_examples(batch: &Vec<f32>) -> usize {
        batch.len() / 4
    }
}

fn mlp(model: Mlp, first: f32) -> Trainer<Mlp, impl Examples<Batch = Vec<f32>>> {
    let rows = (0..32)
        .map(|row| [first + row as f32, 1.0, 2.0, 3.0])
        .collect();
    let data = collated(InMemDataset::new(rows), |rows: Vec<[f32; 4]>| rows.concat());
    let data = data.compared_by(|row| row.map(f32::to_le_bytes).concat());
    Trainer::new(model, data).device(&device())
}

///
#[test]
fn a_process_with_another_model_data_optimizer_or_setting_is_refused_by_name() {
    let hosts = |trainer: Trainer<ConvNet, ImageDataset>| trainer.hosts(Hosts::new()).unwrap();
    let shifted = part(|index| index % 5 != 0, |label| (label + 1) % 10);
    let shifted = Trainer::new(ConvNet::init(3, &device()), shifted)
        .device(&device())
        .workers(2)
        .batch_size(8)
        .iterations(4);
    for (other, named) in [
        (shifted, "the content of the training data is"),
        (fold(1), "the content of the training data is"),
        (with_adam(0), "the optimizer is AdamConfig"),
        (
            fold(0).update_rule(|| Sgd::with_momentum(0.5)),
            "the optimizer is Sgd",
        ),
        (
            fold(0).batch_size(16),
            "the batch size is 16 here, but 8 in the driver",
        ),
        (fold(0).seed(1), "the seed is 1 here"),
        (fold(0).workers(3), "the number of workers is 3"),
        (fold(0).learning_rate(0.5), "the learning rate is 0.5"),
        (
            fold(0).name("b"),
            "the name of the training is b here, but not stated",
        ),
    ] {
        let error = refusal(hosts(fold(0)), hosts(other));
        assert!(error.contains(named), "{named}: {error}");
    }
}

///
#[test]
fn a_process_with_a_model_of_as_many_weights_but_other_shapes_or_frozen_values_is_refused() {
    device().seed(1);
    let driver = || {
        mlp(Mlp::new(&[4, 8, 16, 4]), 0.0)
            .hosts(Hosts::new())
            .unwrap()
    };
    let other = mlp(Mlp::new(&[4, 16, 8, 4]), 0.0)
        .hosts(Hosts::new())
        .unwrap();
    let error = refusal(driver(), other);
    assert!(error.contains("the model's layout is"), "{error}");
    assert!(error.contains("[4, 16]"), "{error}");

    // Weights that are trained come from the servers; frozen ones do not.
    let other_data = mlp(Mlp::new(&[4, 8, 16, 4]), 9.0)
        .hosts(Hosts::new())
        .unwrap();
    let error = refusal(driver(), other_data);
    assert!(
        error.contains("the content of the training data is"),
        "{error}"
    );
    let frozen = || {
        let mut model = Mlp::new(&[4, 8, 16, 4]);
        let first = model.layers.remove(0).no_grad();
        model.layers.insert(0, first);
        mlp(model, 0.0).hosts(Hosts::new()).unwrap()
    };
    let error = refusal(frozen(), frozen());
    assert!(
        error.contains("what is not trained in the model is 32 values"),
        "{error}"
    );
}
