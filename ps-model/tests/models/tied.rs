//! A parameter in several fields of a module is trained once (M-7).

use std::ops::Range;

use ps_model::burn;
use ps_model::burn::module::{Module, Param};
use ps_model::burn::nn::Linear;
use ps_model::burn::optim::momentum::MomentumConfig;
use ps_model::burn::optim::{AdamConfig, GradientsParams, SgdConfig};
use ps_model::burn::tensor::{Device, FloatDType, Tensor, TensorData};
use ps_model::{
    Activation, FlatError, FlatView, LocalModel, Model, OptimizerConfig, Part, Rng, ShardRule,
    Step, StepSeed, seeded,
};

use crate::support::{default_device, on_each_device};

type Rows = Vec<[f32; 3]>;

/// Rows of three numbers through two and back.
#[derive(Module, Debug)]
struct Autoencoder {
    /// `[3, 2]`.
    encoder: Param<Tensor<2>>,
    bias: Param<Tensor<1>>,
    /// `[3, 2]`, used transposed. Without it, the encoder's matrix is used.
    decoder: Option<Param<Tensor<2>>>,
}

/// Where the decoder's matrix is.
#[derive(Clone, Copy, Debug)]
enum Decoder {
    /// In a field of its own, which holds the encoder's parameter.
    Tied,
    /// In no field of its own.
    Encoder,
    /// In a field of its own, with the encoder's numbers but an id of its own.
    Own,
}

impl Autoencoder {
    fn new(decoder: Decoder, device: &Device) -> Self {
        let rng = &mut Rng::new(3);
        let encoder = TensorData::new(rng.uniform_within(1.0, 6), [3, 2]);
        let encoder = Param::<Tensor<2>>::from_data(encoder, device);
        Self {
            bias: Param::from_data(TensorData::new(rng.uniform_within(1.0, 2), [2]), device),
            decoder: match decoder {
                Decoder::Tied => Some(encoder.clone()),
                Decoder::Encoder => None,
                Decoder::Own => Some(Param::from_tensor(encoder.val().detach())),
            },
            encoder,
        }
    }

    fn local(decoder: Decoder, device: &Device) -> LocalModel<Self> {
        LocalModel::new(Self::new(decoder, device), device).expect("a flat view")
    }

    fn decoded(&self, x: Tensor<2>) -> Tensor<2> {
        let hidden = x.matmul(self.encoder.val()) + self.bias.val().unsqueeze();
        let decoder = self.decoder.as_ref().unwrap_or(&self.encoder);
        hidden.tanh().matmul(decoder.val().transpose())
    }

    fn error(&self, rows: &Rows, device: &Device) -> Tensor<1> {
        let x = TensorData::new(rows.concat(), [rows.len(), 3]);
        let x = Tensor::<2>::from_data(x, device);
        (self.decoded(x.clone()) - x).square().mean()
    }
}

impl Model for Autoencoder {
    type Batch = Rows;

    fn loss(&self, rows: &Rows, step: &mut Step) -> Tensor<1> {
        self.error(rows, step.device())
    }

    fn num_examples(rows: &Rows) -> usize {
        rows.len()
    }
}

impl Part for Autoencoder {
    type Input = Tensor<2>;
    type Output = Tensor<2>;

    fn forward(&self, x: Tensor<2>, _: &mut Step) -> Tensor<2> {
        self.decoded(x)
    }
}

/// The encoder, the bias, and the decoder if it has a place of its own.
const ENCODER: std::ops::Range<usize> = 0..6;
const NUM_WEIGHTS: usize = 8;

fn rows() -> Rows {
    let mut rng = Rng::new(11);
    let mut number = || 2.0 * rng.uniform() - 1.0;
    (0..5).map(|_| [number(), number(), number()]).collect()
}

fn gradient(model: &LocalModel<Autoencoder>) -> Vec<f32> {
    let mut gradient = vec![f32::NAN; model.num_weights()];
    model
        .gradient(&rows(), StepSeed::default(), &mut gradient)
        .expect("a good batch");
    gradient
}

/// Adds the gradient of the decoder's own field to that of the encoder's.
fn sum_of_fields(untied: &[f32]) -> Vec<f32> {
    let (weights, decoder) = untied.split_at(NUM_WEIGHTS);
    let mut sum = weights.to_vec();
    for (sum, slope) in sum[ENCODER].iter_mut().zip(decoder) {
        *sum += slope;
    }
    sum
}

/// Numbers of about 1, added in another order.
fn assert_close(got: &[f32], expected: &[f32], what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (got, expected) in got.iter().zip(expected) {
        assert!(
            (got - expected).abs() < 1e-6,
            "{what}: {got} and {expected}"
        );
    }
}

fn names(view: &FlatView) -> Vec<&str> {
    let parameters = view.parameters().iter();
    parameters.map(|spec| &spec.name[..]).collect()
}

/// M-7
#[test]
fn the_gradient_of_a_parameter_in_two_fields_is_the_sum_of_those_of_two_parameters() {
    on_each_device(|name, device| {
        let checkpointing = device.clone().autodiff().gradient_checkpointing();
        for device in [device, &checkpointing] {
            let local = |decoder| Autoencoder::local(decoder, device);
            let (tied, once, own) = (
                local(Decoder::Tied),
                local(Decoder::Encoder),
                local(Decoder::Own),
            );
            assert_eq!(tied.layout(), once.layout(), "{name}");
            assert_eq!(tied.num_weights(), NUM_WEIGHTS);
            let [field] = tied.tied() else {
                panic!("{:?}", tied.tied())
            };
            assert_eq!((&field.name[..], &field.first[..]), ("decoder", "encoder"));
            assert_eq!(own.num_weights(), NUM_WEIGHTS + 6);
            assert_eq!((own.tied(), once.tied()), (&[][..], &[][..]));

            let (got, untied) = (gradient(&tied), gradient(&own));
            assert_close(&got, &sum_of_fields(&untied), name);
            let decoders = &untied[NUM_WEIGHTS..];
            assert!(
                decoders.iter().any(|slope| slope.abs() > 1e-2),
                "{untied:?}"
            );
            // It is the same graph as that of a field that is used twice.
            assert_eq!(got, gradient(&once), "{name}");

            // As burn's `TrainStep` computes it, and as others compute through a part.
            let mut sum = vec![0.0; NUM_WEIGHTS];
            let step = |model: &Autoencoder| {
                let loss = model.error(&rows(), &device.clone().autodiff());
                (GradientsParams::from_grads(loss.backward(), model), ())
            };
            tied.add_gradient_of(StepSeed::default(), &mut sum, step)
                .expect("a gradient");
            assert_eq!(sum, got, "{name}");
            let through_a_pass = |local: &LocalModel<Autoencoder>| {
                let rows = Tensor::<2>::from_data([[1.0, -0.5, 0.25]], device);
                let mut pass = local.begin(StepSeed::default()).expect("a pass");
                pass.forward(0, rows.to_array(), false).expect("an output");
                let slopes = Tensor::<2>::from_data([[1.0, 2.0, 3.0]], device);
                pass.backward(0, slopes.to_array()).expect("a gradient");
                pass.take_gradient().expect("of one call")
            };
            let expected = sum_of_fields(&through_a_pass(&own));
            assert_close(&through_a_pass(&tied), &expected, name);
        }
    });
}

/// M-7: a module whose fields have leaves of their own, as after `fork`.
#[test]
fn gradients_of_separate_leaves_are_added_up() {
    on_each_device(|name, device| {
        let device = device.clone().autodiff();
        let model = Autoencoder::new(Decoder::Tied, &device).fork(&device);
        let view = FlatView::new(&model).expect("a flat view");
        let mut got = vec![f32::NAN; NUM_WEIGHTS];
        let loss = model.error(&rows(), &device);
        assert!(view.read_gradients(&model, loss.backward(), &mut got));
        let expected = gradient(&Autoencoder::local(Decoder::Encoder, &device));
        assert_close(&got, &expected, name);
    });
}

fn bits<const D: usize>(tensor: Tensor<D>) -> Vec<u32> {
    let data = tensor.inner().into_data();
    let values = data.try_into_vec::<f32>().expect("f32");
    values.into_iter().map(f32::to_bits).collect()
}

/// Returns the numbers of both fields, which must be equal.
fn shared(model: &Autoencoder) -> Vec<u32> {
    let encoder = bits(model.encoder.val());
    let decoder = model.decoder.as_ref().expect("a field of its own");
    assert_eq!(bits(decoder.val()), encoder);
    assert_eq!(decoder.id, model.encoder.id);
    encoder
}

/// Takes steps with an optimizer, calling `check` with the model and the weights that it has loaded.
fn train<C: OptimizerConfig>(
    config: &C,
    decoder: Decoder,
    device: &Device,
    check: impl Fn(&LocalModel<Autoencoder>, &[f32]),
) -> Vec<f32> {
    let mut local = Autoencoder::local(decoder, device);
    let mut rule: Box<dyn ShardRule> = config.shard_rule(device).expect("an elementwise rule");
    let mut weights = local.weights().expect("a working device");
    for _ in 0..5 {
        local.load(&weights).expect("its own weights");
        check(&local, &weights);
        let gradient = gradient(&local);
        rule.step(&mut weights, &gradient, 0.05)
            .expect("a good step");
    }
    weights
}

/// M-7
#[test]
fn all_fields_of_a_parameter_have_the_same_numbers_after_each_update() {
    fn check<C: OptimizerConfig>(config: &C) {
        on_each_device(|name, device| {
            let trained = train(config, Decoder::Tied, device, |local, weights| {
                let expected: Vec<u32> = weights[ENCODER].iter().map(|w| w.to_bits()).collect();
                let model = local.model();
                for model in [
                    model.clone(),
                    model.valid(),
                    model.valid().train(),
                    model.clone().fork(device),
                    model.clone().to_device(device),
                ] {
                    assert_eq!(shared(&model), expected, "{name}");
                    let view = FlatView::new(&model).expect("a flat view");
                    assert_eq!(view.tied(), local.tied(), "{name}");
                    assert_eq!(view.read_weights(&model), weights, "{name}");
                }
            });
            assert_eq!(trained, train(config, Decoder::Encoder, device, |_, _| ()));
            // Two parameters go apart, so the comparison says something.
            let untied = train(config, Decoder::Own, device, |_, _| ());
            assert_ne!(untied[ENCODER], untied[NUM_WEIGHTS..], "{name}");
        });
    }

    let momentum = MomentumConfig::new().with_momentum(0.9);
    check(&SgdConfig::new());
    check(&SgdConfig::new().with_momentum(Some(momentum)));
    check(&AdamConfig::new());
}

#[derive(Module, Debug)]
struct Stack {
    layers: Vec<Linear>,
    output: Linear,
}

/// M-7: a clone of a layer has its ids.
#[test]
fn clones_of_a_layer_are_one_layer() {
    let device = default_device().autodiff();
    let rng = &mut Rng::new(7);
    let layer = seeded::linear(rng, [2, 2], &device);
    let output = seeded::linear(rng, [2, 1], &device);
    let stack = |layers| Stack {
        layers,
        output: output.clone(),
    };
    let model = stack(vec![layer.clone(); 3]);
    let view = FlatView::new(&model).expect("a flat view");
    let expected = [
        "layers.0.weight",
        "layers.0.bias",
        "output.weight",
        "output.bias",
    ];
    assert_eq!(names(&view), expected);
    let tied: Vec<String> = view
        .tied()
        .iter()
        .map(|field| format!("{}={}", field.name, field.first))
        .collect();
    let expected = [
        "layers.1.weight=layers.0.weight",
        "layers.1.bias=layers.0.bias",
        "layers.2.weight=layers.0.weight",
        "layers.2.bias=layers.0.bias",
    ];
    assert_eq!(tied, expected);

    let loss = |model: &Stack| {
        let x = Tensor::<2>::from_floats([[0.5, -1.0]], &device);
        let layers = model.layers.iter();
        let hidden = layers.fold(x, |x, layer| layer.forward(x).tanh());
        model.output.forward(hidden).sum()
    };
    let gradient = |model: &Stack| {
        let view = FlatView::new(model).expect("a flat view");
        let mut gradient = vec![0.0; view.num_weights()];
        view.read_gradients(model, loss(model).backward(), &mut gradient);
        gradient
    };
    let copies = (0..3).map(|_| {
        let mut copy = layer.clone();
        copy.weight = Param::from_tensor(layer.weight.val().detach());
        let bias = layer.bias.as_ref().expect("a bias");
        copy.bias = Some(Param::from_tensor(bias.val().detach()));
        copy
    });
    let untied = gradient(&stack(copies.collect()));
    let mut expected = vec![0.0; view.num_weights()];
    for (place, slope) in untied.into_iter().enumerate() {
        // Three times six numbers, and the three of the output.
        let place = if place < 18 { place % 6 } else { place - 12 };
        expected[place] += slope;
    }
    assert_close(&gradient(&model), &expected, "three layers");

    // Numbers that are written arrive in all fields.
    let weights: Vec<f32> = (0..9).map(|i| i as f32).collect();
    let read = |range: Range<usize>| weights[range].to_vec();
    let model = view.write_weights(model, read).expect("nine numbers");
    for layer in &model.layers {
        assert_eq!(
            bits(layer.weight.val()),
            [0.0_f32, 1.0, 2.0, 3.0].map(f32::to_bits)
        );
    }
    assert_eq!(view.read_weights(&model), weights);
}

/// Two fields of any ranks, behind a parameter that has nothing to do with them.
#[derive(Module, Debug)]
struct Pair<const D: usize> {
    other: Param<Tensor<1>>,
    first: Param<Tensor<2>>,
    second: Param<Tensor<D>>,
}

/// Checks that a second field with the id of the first is refused because of this difference.
#[track_caller]
fn check_refused<const D: usize>(
    first: &Param<Tensor<2>>,
    mut second: Param<Tensor<D>>,
    difference: &str,
) {
    second.id = first.id;
    let device = default_device();
    let model = Pair {
        other: Param::from_tensor(Tensor::zeros([1], &device)),
        first: first.clone(),
        second,
    };
    let error = FlatView::new(&model).expect_err("fields that differ");
    let expected = FlatError::NotTied {
        first: "first".to_owned(),
        second: "second".to_owned(),
        difference: difference.to_owned(),
    };
    assert_eq!(error, expected);
    assert!(error.to_string().contains(difference), "{error}");
    // With an id of its own, the field is no difficulty, unless its type is one.
    if !difference.contains("types") {
        let second = model.second.clone();
        let second = Param::from_tensor(second.val()).set_require_grad(false);
        FlatView::new(&Pair { second, ..model }).expect("a flat view");
    }
}

/// M-7
#[test]
fn fields_with_one_id_that_are_not_one_parameter_are_refused() {
    let device = default_device();
    let numbers = |shape: [usize; 2]| Param::from_tensor(Tensor::<2>::ones(shape, &device));
    let first = numbers([3, 2]);
    check_refused(
        &first,
        numbers([2, 3]),
        "their shapes are [3, 2] and [2, 3]",
    );
    let flat = Param::from_tensor(Tensor::<1>::ones([6], &device));
    check_refused(&first, flat, "their shapes are [3, 2] and [6]");
    let double = Param::from_tensor(first.val().cast(FloatDType::F64));
    check_refused(&first, double, "their types are f32 and f64");
    let other = first.clone().map(|numbers| numbers.mul_scalar(2.0));
    check_refused(&first, other, "their numbers differ");
    let frozen = first.clone().set_require_grad(false);
    check_refused(&first, frozen.clone(), "one of them is frozen");
    check_refused(&frozen, first.clone(), "one of them is frozen");

    // A frozen parameter is not trained, however many fields hold it.
    let model = Pair {
        other: Param::from_tensor(Tensor::zeros([1], &device)),
        first: frozen.clone(),
        second: frozen,
    };
    let view = FlatView::new(&model).expect("a flat view");
    assert_eq!((names(&view), view.tied()), (vec!["other"], &[][..]));
    let local = LocalModel::new(model, &device).expect("a flat view");
    let mut fixed = Vec::new();
    let add = |name: &str, _: &[usize], _: &[u8]| fixed.push(name.to_owned());
    local.fixed_tensors(add).expect("a working device");
    assert_eq!(fixed, ["first", "second"]);
}

/// M-7: the reason why burn's learner does not train such models. If this fails, it can.
#[test]
fn burns_optimizers_change_the_first_field_only() {
    let device = default_device().autodiff();
    let model = Autoencoder::new(Decoder::Tied, &device);
    let before = shared(&model);
    let view = FlatView::new(&model).expect("a flat view");
    let gradients = view.gradients_by_parameter(&model, &[1.0; NUM_WEIGHTS]);
    assert_eq!(gradients.len(), 2);
    let model = SgdConfig::new().init().step(0.5, model, gradients);
    assert_ne!(bits(model.encoder.val()), before);
    let decoder = model.decoder.as_ref().expect("a field of its own");
    assert_eq!(bits(decoder.val()), before);
    assert!(matches!(
        FlatView::new(&model),
        Err(FlatError::NotTied { .. })
    ));
    // What `gradients_by_parameter` says about this.
    let weights = view.read_weights(&model);
    let read = |range: Range<usize>| weights[range].to_vec();
    let model = view.write_weights(model, read).expect("its own weights");
    assert_ne!(shared(&model), before);
}
