//! What is not trainable stays in each process's copy, as it was.

use ps_model::burn;
use ps_model::burn::module::{Flag, Lora, Module, Param, ParamId, QLora, Quantizer};
use ps_model::burn::nn::{BatchNorm, BatchNormConfig, Linear};
use ps_model::burn::tensor::quantization::{Calibration, QuantValue};
use ps_model::burn::tensor::{Bool, Device, FloatDType, Int, IntDType, Tensor};
use ps_model::{FlatError, FlatView, LocalModel, Model, ModelError, Rng, Step, StepSeed, seeded};

use crate::support::{default_device, on_each_device_except, one_name};

fn linear([inputs, outputs]: [usize; 2], device: &Device) -> Linear {
    seeded::linear(&mut Rng::new(inputs as u64), [inputs, outputs], device)
}

fn names(view: &FlatView) -> Vec<String> {
    let names = view.parameters().iter().map(|spec| spec.name.clone());
    names.collect()
}

fn bits<const D: usize>(tensor: Tensor<D>) -> Vec<u32> {
    let values = tensor.into_data().try_into_vec::<f32>().expect("f32");
    values.into_iter().map(f32::to_bits).collect()
}

/// Loads ones, computes a gradient, and checks that there are as many numbers as the view says.
fn step<M: Model<Batch = f32>>(local: &mut LocalModel<M>) -> Vec<f32> {
    local.load(&vec![1.0; local.num_weights()]).expect("ones");
    let mut gradient = vec![f32::NAN; local.num_weights()];
    let loss = local.gradient(&0.5, StepSeed::default(), &mut gradient);
    assert!(loss.expect("a good batch").is_finite());
    assert!(gradient.iter().all(|slope| slope.is_finite()));
    gradient
}

/// The example is x in each of two inputs.
fn input(x: f32, step: &Step) -> Tensor<2> {
    Tensor::<2>::full([4, 2], x, step.device())
}

#[derive(Module, Debug)]
struct Perceptron {
    hidden: Linear,
    output: Linear,
}

impl Perceptron {
    fn init(device: &Device) -> Self {
        Self {
            hidden: linear([2, 3], device),
            output: linear([3, 1], device),
        }
    }
}

impl Model for Perceptron {
    type Batch = f32;

    fn loss(&self, x: &f32, step: &mut Step) -> Tensor<1> {
        let hidden = self.hidden.forward(input(*x, step)).tanh();
        self.output.forward(hidden).square().mean()
    }

    fn num_examples(_: &f32) -> usize {
        4
    }
}

#[test]
fn a_frozen_layer_is_not_in_the_view_wherever_the_model_is() {
    let plain = default_device();
    for device in [plain.clone(), plain.clone().autodiff()] {
        let Perceptron { hidden, output } = Perceptron::init(&device);
        let hidden = hidden.freeze();
        let model = Perceptron { hidden, output };
        for model in [
            model.valid(),
            model.valid().train(),
            model.clone().fork(&plain),
            model,
        ] {
            let view = FlatView::new(&model).expect("a flat view");
            assert_eq!(names(&view), ["output.weight", "output.bias"]);
            let mut local = LocalModel::new(model.clone(), &plain).expect("a flat view");
            assert_eq!(local.num_weights(), 4);
            assert_eq!(step(&mut local).len(), 4);
            let trained = local.model();
            assert_eq!(
                bits(trained.hidden.weight.val()),
                bits(model.hidden.weight.val())
            );
            assert_eq!(bits(trained.output.weight.val()), [1.0_f32.to_bits(); 3]);
            // And it is still frozen in what comes back.
            assert_eq!(FlatView::new(&trained.valid()).expect("a flat view"), view);
        }
    }
}

#[test]
fn of_a_model_with_lora_only_the_adapters_are_in_the_view() {
    let device = default_device();
    let model = Perceptron::init(&device).apply_lora(Lora::new(2, 4.0));
    let mut local = LocalModel::new(model.clone(), &device).expect("a flat view");
    let expected = [
        "hidden.weight.lora.a",
        "hidden.weight.lora.b",
        "output.weight.lora.a",
        "output.weight.lora.b",
    ];
    let got: Vec<&str> = local.layout().iter().map(|s| s.name.as_str()).collect();
    assert_eq!(got, expected);
    assert_eq!(local.num_weights(), 2 * 2 + 2 * 3 + 3 * 2 + 2);
    assert!(step(&mut local).iter().any(|slope| *slope != 0.0));
    assert_eq!(
        bits(local.model().hidden.weight.base()),
        bits(model.hidden.weight.base())
    );
    // The adapter has a part in the loss, in training and in evaluation.
    let before = LocalModel::new(model, &device).expect("a flat view");
    let losses = [&before, &local].map(|local| local.evaluate(&0.5).expect("a good batch"));
    assert!(losses[0] != losses[1]);
}

#[test]
fn a_quantized_base_works_and_a_quantized_weight_to_be_trained_is_refused() {
    // Burn cannot quantize on LibTorch.
    on_each_device_except(&["tch"], |_, device| {
        let scheme = device.settings().quantization.scheme;
        let scheme = scheme.with_value(QuantValue::Q8S);
        let quantizer = || Quantizer::new(Calibration::MinMax, scheme);
        let model = Perceptron::init(device);
        let quantized = model.clone().quantize_weights(&mut quantizer());
        match FlatView::new(&quantized).expect_err("weights that cannot be trained") {
            FlatError::ElementType { name, .. } => assert_eq!(name, "hidden.weight"),
            error => panic!("{error}"),
        }
        let model = model.apply_qlora(QLora::new(Lora::new(1, 1.0), quantizer()));
        let mut local = LocalModel::new(model, device).expect("a flat view");
        assert_eq!(local.num_weights(), 2 + 3 + 3 + 1);
        step(&mut local);
    });
}

/// Tables and masks beside one weight.
#[derive(Module, Debug)]
struct Tables {
    index: Param<Tensor<1, Int>>,
    mask: Param<Tensor<1, Bool>>,
    double: Param<Tensor<1>>,
    constant: Tensor<1>,
    empty: Param<Tensor<2>>,
    weight: Param<Tensor<1>>,
    training: Param<Flag>,
}

impl Tables {
    fn init(device: &Device) -> Self {
        let index = Tensor::<1, Int>::from_ints([2, 0], device);
        let mask = Tensor::<1>::from_floats([0.0, 1.0], device).greater_elem(0.5);
        let double = Tensor::<1>::from_floats([0.5, 4.0], device).cast(FloatDType::F64);
        Self {
            index: Param::initialized(ParamId::new(), index),
            mask: Param::initialized(ParamId::new(), mask),
            double: Param::initialized(ParamId::new(), double),
            constant: Tensor::from_floats([3.0, 5.0], device),
            empty: Param::from_tensor(Tensor::zeros([2, 0], device)),
            weight: Param::from_tensor(Tensor::from_floats([1.0, 2.0, 3.0], device)),
            training: Param::from_bool(true),
        }
    }
}

impl Model for Tables {
    type Batch = f32;

    fn loss(&self, x: &f32, step: &mut Step) -> Tensor<1> {
        assert!(self.training.is_enabled() == step.is_training());
        let picked = self.weight.val().select(0, self.index.val());
        let picked = picked.mask_fill(self.mask.val(), 0.0);
        let double = self.double.val().cast(FloatDType::F32);
        (picked * double * self.constant.clone() * *x).sum()
    }

    fn num_examples(_: &f32) -> usize {
        1
    }
}

#[test]
fn integers_booleans_doubles_constants_and_empty_parameters_do_their_work() {
    let plain = default_device();
    let checkpointing = plain.clone().autodiff().gradient_checkpointing();
    for made_on in [&plain, &plain.clone().autodiff(), &checkpointing] {
        for trained_on in [&plain, &checkpointing] {
            let model = Tables::init(made_on);
            let mut local = LocalModel::new(model, trained_on).expect("a flat view");
            assert_eq!(local.num_weights(), 3);
            // 0.5 (x) · 0.5 (double) · 3 (constant) for weight 2; the other one is masked.
            assert_eq!(step(&mut local), [0.0, 0.0, 0.75]);
            assert_eq!(local.evaluate(&0.5).expect("a good batch").loss_sum, 0.75);

            let mut fixed = Vec::new();
            let add = |name: &str, shape: &[usize], bytes: &[u8]| {
                fixed.push((name.to_owned(), shape.to_vec(), bytes.len()));
            };
            local.fixed_tensors(add).expect("a working device");
            let names: Vec<&str> = fixed.iter().map(|(name, ..)| name.as_str()).collect();
            assert_eq!(names, ["index", "mask", "double", "training"]);
            assert_eq!(fixed[2], ("double".to_owned(), vec![2], 16));
        }
    }
}

/// M-4: burn shows frozen parameters, and not constants. If this fails, processes can compare constants, too.
#[test]
fn a_constant_that_differs_cannot_be_noticed_and_a_frozen_parameter_can() {
    let device = default_device();
    let with = |constant: f32, frozen: f32| {
        let mut model = Tables::init(&device);
        model.constant = model.constant.mul_scalar(constant);
        model.double = model.double.map(|double| double.mul_scalar(frozen));
        let local = LocalModel::new(model, &device).expect("a flat view");
        let mut fixed = Vec::new();
        let add = |name: &str, _: &[usize], bytes: &[u8]| {
            fixed.push((name.to_owned(), bytes.to_vec()));
        };
        local.fixed_tensors(add).expect("a working device");
        (fixed, local.evaluate(&0.5).expect("a good batch").loss_sum)
    };
    let (fixed, loss) = with(1.0, 1.0);
    let (other, other_loss) = with(2.0, 1.0);
    assert_ne!(loss, other_loss);
    assert_eq!(fixed, other);
    assert_ne!(fixed, with(1.0, 2.0).0);
}

/// M-6: backends have integers of different types, and processes on them compare the bytes.
#[test]
fn the_bytes_of_integers_do_not_depend_on_their_type() {
    let device = default_device();
    // Burn has no other integers on LibTorch.
    let narrow = match one_name() {
        "tch" => IntDType::I64,
        _ => IntDType::I32,
    };
    let fixed = |dtype, large: i64| {
        let mut model = Tables::init(&device);
        let index = Tensor::<1, Int>::from_ints([2, 0], &device).cast(dtype);
        model.index = Param::initialized(ParamId::new(), index.mul_scalar(large));
        let local = LocalModel::new(model, &device).expect("a flat view");
        let mut fixed = Vec::new();
        let add = |name: &str, shape: &[usize], bytes: &[u8]| {
            fixed.push((name.to_owned(), shape.to_vec(), bytes.to_vec()));
        };
        local.fixed_tensors(add).expect("a working device");
        fixed
    };
    let narrow = fixed(narrow, 1);
    assert_eq!(narrow, fixed(IntDType::I64, 1));
    assert_eq!(narrow[0].2, [2, 0, 0, 0, 0, 0, 0, 0]);
    assert_ne!(narrow, fixed(IntDType::I64, 2));
    // Those that do not fit differ, too.
    let wide = fixed(IntDType::I64, 1 << 40);
    assert_eq!(wide[0].2, [0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
}

#[derive(Module, Debug)]
struct Normalized {
    norm: BatchNorm,
    linear: Linear,
}

impl Model for Normalized {
    type Batch = f32;

    fn loss(&self, x: &f32, step: &mut Step) -> Tensor<1> {
        let x = self.norm.forward(input(*x, step));
        self.linear.forward(x).mean()
    }

    fn num_examples(_: &f32) -> usize {
        4
    }
}

#[test]
fn statistics_of_a_frozen_layer_stay_as_they_are() {
    let device = default_device();
    let norm = BatchNormConfig::new(2).init(&device);
    let model = |norm: BatchNorm| Normalized {
        norm,
        linear: linear([2, 1], &device),
    };
    let mut local = LocalModel::new(model(norm.clone().freeze()), &device).expect("frozen");
    let gradient = step(&mut local);
    assert_eq!((local.num_weights(), local.num_trainable()), (3, 3));
    assert_eq!(local.buffers(), []);
    // Mean 0 and variance 1, as at the beginning, leave the input as it is.
    for (slope, expected) in gradient.iter().zip([0.5, 0.5, 1.0]) {
        assert!((slope - expected).abs() < 1e-4, "{gradient:?}");
    }
    let mut stopped = norm;
    stopped.training = stopped.training.with_value(false);
    let mut local = LocalModel::new(model(stopped), &device).expect("statistics that stay");
    assert_eq!(local.num_weights(), 7, "gamma and beta are trained");
    step(&mut local);
    let statistics = &local.model().norm;
    assert_eq!(bits(statistics.running_mean.value_sync()), [0; 2]);
    let ones = [1.0_f32.to_bits(); 2];
    assert_eq!(bits(statistics.running_var.value_sync()), ones);
    let mut fixed = Vec::new();
    let add = |name: &str, _: &[usize], _: &[u8]| fixed.push(name.to_owned());
    local.fixed_tensors(add).expect("a working device");
    assert_eq!(
        fixed,
        ["norm.training", "norm.running_mean", "norm.running_var"]
    );
}

#[test]
fn a_model_with_nothing_to_train_says_so() {
    let device = default_device();
    let error = LocalModel::new(Perceptron::init(&device).freeze(), &device);
    let error = error.expect_err("nothing to train");
    assert!(matches!(
        error,
        ModelError::Flat(FlatError::NothingTrainable { count: 4, .. })
    ));
    assert!(error.to_string().contains("`hidden.weight`"), "{error}");
}
