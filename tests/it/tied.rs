//! A parameter in several fields of a model is trained, saved and exported once (M-7).

use burn::module::{Module, Param};
use burn::optim::AdamConfig;
use burn::optim::momentum::MomentumConfig;
use burn::tensor::{Device, Tensor, TensorData};
use burn_store::{ModuleSnapshot as _, SafetensorsStore};
use ps::actors::cluster::{ClusterConfig, Node};
use ps::export::ExportFile;
use ps::model::burn;
use ps::model::burn::data::dataset::InMemDataset;
use ps::model::burn::optim::SgdConfig;
use ps::model::{FlatView, Rng};
use ps::prelude::*;

const WIDTH: usize = 3;
const HIDDEN: usize = 4;

/// Rows of numbers through fewer than they have, and back.
#[derive(Module, Debug)]
struct Autoencoder {
    /// `[WIDTH, HIDDEN]`.
    encoder: Param<Tensor<2>>,
    bias: Param<Tensor<1>>,
    /// Like the encoder, used transposed. Without it, the encoder's matrix is used.
    decoder: Option<Param<Tensor<2>>>,
}

impl Autoencoder {
    fn new(seed: u64, has_decoder: bool, device: &Device) -> Self {
        let rng = &mut Rng::new(seed);
        let matrix = TensorData::new(rng.uniform_within(1.0, WIDTH * HIDDEN), [WIDTH, HIDDEN]);
        let encoder = Param::<Tensor<2>>::from_data(matrix, device);
        let bias = TensorData::new(rng.uniform_within(1.0, HIDDEN), [HIDDEN]);
        Self {
            decoder: has_decoder.then(|| encoder.clone()),
            bias: Param::from_data(bias, device),
            encoder,
        }
    }

    /// Returns the bits of both fields, which must be equal.
    fn shared(&self) -> Vec<u32> {
        let decoder = self.decoder.as_ref().unwrap();
        let [encoder, decoder] = [&self.encoder, decoder].map(|field| {
            let values = field.val().into_data().try_into_vec::<f32>().unwrap();
            bits(&values)
        });
        assert_eq!(encoder, decoder);
        encoder
    }
}

impl Model for Autoencoder {
    type Batch = Vec<[f32; WIDTH]>;

    fn loss(&self, rows: &Self::Batch, step: &mut Step) -> Tensor<1> {
        let x = TensorData::new(rows.concat(), [rows.len(), WIDTH]);
        let x = Tensor::<2>::from_data(x, step.device());
        let hidden = x.clone().matmul(self.encoder.val()) + self.bias.val().unsqueeze();
        let decoder = self.decoder.as_ref().unwrap_or(&self.encoder);
        let y = hidden.tanh().matmul(decoder.val().transpose());
        (y - x).square().mean()
    }

    fn num_examples(rows: &Self::Batch) -> usize {
        rows.len()
    }
}

fn device() -> Device {
    select_device(default_device_name()).unwrap()
}

fn trainer(has_decoder: bool) -> Trainer<Autoencoder, impl Examples<Batch = Vec<[f32; WIDTH]>>> {
    let mut rng = Rng::new(11);
    let mut row = || [(); WIDTH].map(|()| 2.0 * rng.uniform() - 1.0);
    let rows = (0..64).map(|_| row()).collect();
    let data = collated(InMemDataset::new(rows), |rows: Vec<[f32; WIDTH]>| rows);
    Trainer::new(Autoencoder::new(5, has_decoder, &device()), data)
        .device(&device())
        .workers(2)
        .batch_size(8)
        .iterations(12)
        .learning_rate(0.05)
}

fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|number| number.to_bits()).collect()
}

/// M-7, PS-3: and the bits are those of a model that has the parameter in one field, and uses it twice.
#[test]
fn tied_fields_have_the_same_bits_with_any_number_of_servers() {
    let momentum = MomentumConfig::new().with_momentum(0.9);
    let momentum = SgdConfig::new().with_momentum(Some(momentum));
    let trained = |has_decoder, num_servers, is_adam| {
        let trainer = trainer(has_decoder).servers(num_servers);
        let trainer = match is_adam {
            true => trainer.optimizer(AdamConfig::new()),
            false => trainer.optimizer(momentum.clone()),
        };
        let report = trainer.run().unwrap();
        assert_eq!(report.num_applied, 24);
        assert_eq!(report.weights.len(), WIDTH * HIDDEN + HIDDEN);
        report.weights
    };
    let initial = initial_weights(&Autoencoder::new(5, true, &device()), &device()).unwrap();
    for is_adam in [false, true] {
        let once = bits(&trained(false, 1, is_adam).to_vec());
        assert_ne!(once, bits(&initial.to_vec()));
        for num_servers in [1, 2, 5] {
            let weights = trained(true, num_servers, is_adam);
            let what = format!("{num_servers} servers, Adam: {is_adam}");
            assert!(bits(&weights.to_vec()) == once, "{what}");
            let model = Autoencoder::new(1, true, &device());
            let model = model_with_weights(&model, &device(), &weights).unwrap();
            assert_eq!(model.shared(), once[..WIDTH * HIDDEN], "{what}");
        }
    }
}

/// M-7, S-13: of the fields of the model, burn's reader of safetensors does not find the second one.
#[test]
fn a_tied_parameter_is_in_a_checkpoint_and_in_an_exported_file_once() {
    let directory = tempfile::tempdir().unwrap();
    let checkpoints = || CheckpointConfig {
        resume: true,
        ..CheckpointConfig::new(directory.path().join("checkpoints"))
    };
    let adam = || trainer(true).optimizer(AdamConfig::new());
    let whole = adam().run().unwrap();
    adam()
        .checkpoints(checkpoints())
        .iterations(5)
        .run()
        .unwrap();
    let halves = adam().checkpoints(checkpoints()).servers(2).run().unwrap();
    assert_eq!(halves.resumed.as_ref().unwrap().version, Version(5));
    let expected = bits(&whole.weights.to_vec());
    assert!(bits(&halves.weights.to_vec()) == expected);

    let device = device();
    let model = Autoencoder::new(1, true, &device);
    let export = |name: &str| {
        let file = directory.path().join(name).to_string_lossy().parse();
        let file: ExportFile = file.unwrap();
        file.write(&model, &device, &whole.weights).unwrap();
        file.path().to_owned()
    };
    let file = export("model.safetensors");
    let mut store = SafetensorsStore::from_file(&file).allow_partial(true);
    let found = model.clone().load_from(&mut store).unwrap();
    let mut names = found.applied;
    names.sort_unstable();
    assert_eq!(
        (names, found.unused),
        (vec!["bias".to_owned(), "encoder".to_owned()], vec![])
    );
    let missing: Vec<String> = found.missing.into_iter().map(|(name, _)| name).collect();
    assert_eq!(missing, ["decoder"]);
    let read = Weights::read_safetensors(&file, whole.weights.layout()).unwrap();
    let read = model_with_weights(&model, &device, &read).unwrap();
    assert_eq!(read.shared(), expected[..WIDTH * HIDDEN]);

    // burn's own format has all fields, and their ids, by which they stay tied.
    let read = Autoencoder::new(2, false, &device);
    let read = Autoencoder {
        decoder: Some(Param::from_tensor(read.encoder.val())),
        ..read
    };
    assert_eq!(FlatView::new(&read).unwrap().tied(), []);
    let read = read.load_file(export("model.bpk"));
    assert_eq!(read.shared(), expected[..WIDTH * HIDDEN]);
    assert_eq!(FlatView::new(&read).unwrap().tied().len(), 1);
}

#[derive(Module, Debug)]
struct Three {
    fields: Vec<Param<Tensor<1>>>,
}

/// M-7: the names and shapes of the weights are the same in both processes.
#[test]
fn a_node_with_other_ties_is_refused_by_name() {
    let device = device();
    let tied_to = |first: usize| {
        let field = || Param::from_tensor(Tensor::<1>::zeros([2], &device));
        let fields = [field(), field()];
        let third = fields[first].clone();
        let fields = fields.into_iter().chain([third]).collect();
        agree_on_model(Hosts::new(), &Three { fields }, &device)
    };
    let local = ([127, 0, 0, 1], 0).into();
    let cluster = Cluster::listen(ClusterConfig::default(), local, tied_to(0)).unwrap();
    let address = cluster.address().unwrap().to_string();
    let node = Node::new(ClusterConfig::default(), 1, 0, address, tied_to(1));
    let error = node.serve().wait().unwrap_err().to_string();
    assert!(error.contains("fields.2 = fields.0"), "{error}");
    assert!(error.contains("fields.2 = fields.1"), "{error}");
}
