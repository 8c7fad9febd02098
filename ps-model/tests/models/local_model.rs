//! A worker's model: reuse, evaluation mode, and errors instead of panics.

use ps_model::burn;
use ps_model::burn::module::{Module, ModuleVisitor, Param};
use ps_model::burn::tensor::{Device, GradientCheckpointingStrategy, Tensor};
use ps_model::{
    ConvNet, Evaluation, FlatError, ImageBatch, LocalModel, Model, ModelError, Net, Step, StepSeed,
    nll_loss,
};

use crate::support::{default_device, norm, on_each_device, on_each_device_except, random_images};

fn convnet() -> LocalModel<ConvNet> {
    let device = default_device();
    LocalModel::new(ConvNet::init(1, &device), &device).expect("a model with a flat view")
}

fn gradient(model: &LocalModel<ConvNet>, batch: &ImageBatch) -> (f32, Vec<f32>) {
    let mut gradient = vec![f32::NAN; model.num_weights()];
    let loss = model
        .gradient(batch, StepSeed::default(), &mut gradient)
        .expect("the batch fits the model");
    (loss, gradient)
}

#[test]
fn the_gradient_follows_the_weights_that_were_loaded_last() {
    on_each_device(|name, device| {
        let batch = random_images(2, 8);
        let mut first = LocalModel::new(ConvNet::init(1, device), device).expect("a flat view");
        let second = LocalModel::new(ConvNet::init(2, device), device).expect("a flat view");
        let expected = gradient(&second, &batch);
        assert!(gradient(&first, &batch) != expected, "{name}");
        first
            .load(&second.weights().expect("a working device"))
            .expect("as many weights");
        for _ in 0..3 {
            assert!(gradient(&first, &batch) == expected, "{name}");
        }
    });
}

#[test]
fn a_gradient_replaces_what_was_there_and_needs_room_for_each_weight() {
    let model = convnet();
    let batch = random_images(2, 2);
    let gradient_in = |mut room: Vec<f32>| {
        let result = model.gradient(&batch, StepSeed::default(), &mut room);
        result.map(|_loss| room)
    };
    let expected = model.num_weights();
    let gradient = gradient_in(vec![0.0; expected]).expect("a good batch");
    assert!(gradient_in(vec![9.0; expected]).expect("a good batch") == gradient);
    for got in [0, expected - 1, expected + 1] {
        let error = gradient_in(vec![0.0; got]).expect_err("a wrong length");
        assert_eq!(error, ModelError::WeightCount { expected, got });
    }
}

/// A model made without autodiff, or in validation mode, is put into training mode.
#[test]
fn a_model_in_validation_mode_can_be_trained() {
    let device = default_device();
    let model = ConvNet::init(1, &device.clone().autodiff()).valid();
    let model = LocalModel::new(model, &device).expect("a flat view");
    let (_, gradient) = gradient(&model, &random_images(2, 4));
    assert!(norm(&gradient) > 0.0);
}

#[test]
fn evaluation_scores_each_example_and_leaves_dropout_out() {
    // 30 convolutions of this size take minutes on NdArray.
    on_each_device_except(&["ndarray"], |name, device| {
        let model = LocalModel::new(Net::init(3, device), device).expect("a flat view");
        let batch = random_images(5, 6);
        let whole = model.evaluate(&batch).expect("a good batch");
        assert_eq!(
            whole,
            model.evaluate(&batch).expect("a good batch"),
            "{name}"
        );
        assert_eq!(whole.num_examples, 6);
        assert!(whole.num_correct <= Some(6));

        let one_by_one: Evaluation = (0..6)
            .map(|i| {
                let image = batch.images()[i * 784..(i + 1) * 784].to_vec();
                let label = vec![batch.labels()[i]];
                let one = ImageBatch::new(image, label, [1, 1, 28, 28], 10).expect("one image");
                model.evaluate(&one).expect("a good batch")
            })
            .sum();
        assert_eq!(one_by_one.num_correct, whole.num_correct, "{name}");
        // Batches of another size may take another path through a matrix product.
        assert!(
            (one_by_one.mean_loss() - whole.mean_loss()).abs() < 1e-5,
            "{name}"
        );
    });
}

/// Without dropout, the loss in training is the loss in evaluation.
#[test]
fn training_and_evaluation_agree_on_the_loss() {
    on_each_device(|name, device| {
        let model = LocalModel::new(ConvNet::init(1, device), device).expect("a flat view");
        let batch = random_images(5, 16);
        let (loss, _) = gradient(&model, &batch);
        let evaluation = model.evaluate(&batch).expect("a good batch");
        assert!(
            (evaluation.mean_loss() - f64::from(loss)).abs() < 1e-6,
            "{name}"
        );
    });
}

#[test]
fn a_wrong_number_of_weights_is_refused_and_the_old_ones_stay() {
    let mut model = convnet();
    let before = model.weights().expect("a working device");
    for got in [0, 1_959, 1_961] {
        assert_eq!(
            model.load(&vec![0.0; got]),
            Err(ModelError::WeightCount {
                expected: 1_960,
                got
            })
        );
    }
    let short = model.load_with(|range| {
        // The first parameters are complete, a later one is not.
        let len = if range.start < 30 { range.len() } else { 7 };
        vec![0.0_f32; len]
    });
    let (range, got) = (30..1_950, 7);
    assert_eq!(short, Err(FlatError::WrongCount { range, got }.into()));
    let panicking = model.load_with::<Vec<f32>>(|_| panic!("the server is gone"));
    assert_eq!(
        panicking,
        Err(ModelError::Panicked("the server is gone".into()))
    );
    assert_eq!(model.weights().expect("a working device"), before);
}

#[test]
fn a_batch_that_does_not_fit_is_an_error_and_the_next_one_works() {
    on_each_device(|name, device| {
        let model = LocalModel::new(ConvNet::init(1, device), device).expect("a flat view");
        let good = random_images(1, 2);
        let expected = gradient(&model, &good);

        let small = ImageBatch::new(vec![0.0; 2 * 9], vec![0, 1], [2, 1, 3, 3], 10);
        let colours = ImageBatch::new(vec![0.0; 3 * 784], vec![0], [1, 3, 28, 28], 10);
        let classes = ImageBatch::new(vec![0.0; 784], vec![70], [1, 1, 28, 28], 100);
        for (batch, reason) in [
            (small, "[1, 28, 28]"),
            (colours, "[1, 28, 28]"),
            (classes, "labels are of 100 classes, the model knows 10"),
        ] {
            let batch = batch.expect("good for another model");
            let mut gradient = vec![1.0; model.num_weights()];
            let error = model
                .gradient(&batch, StepSeed::default(), &mut gradient)
                .expect_err("a batch for another model");
            assert!(error.to_string().contains(reason), "{name}: {error}");
            model
                .evaluate(&batch)
                .expect_err("a batch for another model");
        }
        assert!(gradient(&model, &good) == expected, "{name}");
    });
}

/// A model whose loss may be none.
#[derive(Module, Debug)]
struct Odd {
    weight: Param<Tensor<1>>,
}

#[derive(Clone, Copy, Debug)]
enum Loss {
    Good,
    WithoutMean,
    Detached,
    Plain,
    LabelOutOfRange,
}

impl Odd {
    fn init(device: &Device) -> LocalModel<Self> {
        let weight = Param::from_tensor(Tensor::from_floats([1.0, 2.0, 3.0], device));
        LocalModel::new(Self { weight }, device).expect("a flat view")
    }
}

impl Model for Odd {
    type Batch = Loss;

    fn loss(&self, loss: &Loss, step: &mut Step) -> Tensor<1> {
        let weight = self.weight.val();
        match loss {
            Loss::Good => weight.mean(),
            Loss::WithoutMean => weight,
            Loss::Detached => weight.detach().mean(),
            Loss::Plain => weight.inner().mean(),
            Loss::LabelOutOfRange => {
                let labels = Tensor::from_ints([1, 7], step.device());
                nll_loss(weight.unsqueeze::<2>().repeat(&[2, 1]), labels)
            }
        }
    }

    fn num_examples(_: &Loss) -> usize {
        3
    }
}

#[test]
fn a_loss_that_cannot_be_learned_from_is_an_error_that_says_what_to_do() {
    on_each_device(|name, device| {
        let model = Odd::init(device);
        let gradient = |loss: Loss| {
            let mut gradient = [0.0; 3];
            let loss = model.gradient(&loss, StepSeed::default(), &mut gradient);
            loss.map(|_| gradient)
        };
        assert!(gradient(Loss::Good).is_ok(), "{name}");
        let got = vec![3];
        let error = gradient(Loss::WithoutMean).expect_err("no number");
        assert_eq!(error, ModelError::LossShape { got }, "{name}");
        assert!(error.to_string().contains(".mean()"), "{error}");
        for loss in [Loss::Detached, Loss::Plain] {
            let error = gradient(loss).expect_err("no gradient");
            assert_eq!(error, ModelError::LossWithoutGradient, "{name}");
        }
        let error = model.evaluate(&Loss::WithoutMean).expect_err("no number");
        assert!(error.to_string().contains(".mean()"), "{name}: {error}");
        assert_eq!(gradient(Loss::Good), Ok([1.0 / 3.0; 3]), "{name}");
    });
    let error = Odd::init(&default_device())
        .gradient(&Loss::LabelOutOfRange, StepSeed::default(), &mut [0.0; 3])
        .expect_err("class 7 of 3");
    let expected = "label 7 of example 1 is not in 0..3";
    assert!(error.to_string().contains(expected), "{error}");
}

/// The strategy of the parameters, which must all have the same.
fn strategy<M: Module>(model: &M) -> Option<GradientCheckpointingStrategy> {
    #[derive(Default)]
    struct Strategies(Vec<Option<GradientCheckpointingStrategy>>);
    impl ModuleVisitor for Strategies {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.0.push(param.val().gradient_checkpointing_strategy());
        }
    }
    let mut found = Strategies::default();
    model.visit(&mut found);
    assert!(found.0.iter().all(|strategy| *strategy == found.0[0]));
    found.0[0]
}

/// Asked for on the device, as in `device.autodiff().gradient_checkpointing()`, wherever the model was
/// made.
#[test]
fn gradient_checkpointing_is_on_if_the_device_says_so() {
    on_each_device(|name, device| {
        let checkpointing = device.clone().autodiff().gradient_checkpointing();
        let batch = random_images(2, 8);
        let plain = LocalModel::new(ConvNet::init(1, device), device).expect("a flat view");
        let (_, expected) = gradient(&plain, &batch);
        for made_on in [device, &device.clone().autodiff(), &checkpointing] {
            let strategy_of = |trained_on| {
                let model = LocalModel::new(ConvNet::init(1, made_on), trained_on);
                let mut model = model.expect("a flat view");
                model
                    .load(&plain.weights().expect("weights"))
                    .expect("as many weights");
                let (_, gradient) = gradient(&model, &batch);
                let difference: Vec<f32> =
                    gradient.iter().zip(&expected).map(|(a, b)| a - b).collect();
                assert!(norm(&difference) < 1e-6 * norm(&gradient), "{name}");
                assert_eq!(
                    model.evaluate(&batch).expect("a good batch").num_correct,
                    plain.evaluate(&batch).expect("a good batch").num_correct
                );
                strategy(model.model())
            };
            let on = Some(GradientCheckpointingStrategy::Balanced);
            assert_eq!(strategy_of(&checkpointing), on, "{name}");
            let off = Some(GradientCheckpointingStrategy::Disabled);
            assert_eq!(strategy_of(device), off, "{name}");
        }
    });
}
