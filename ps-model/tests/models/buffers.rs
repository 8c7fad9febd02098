//! Running statistics: they are buffers behind the weights, and a gradient says what a batch makes of them (M-2).

use ps_model::burn;
use ps_model::burn::module::{Module, RunningState};
use ps_model::burn::nn::{BatchNorm, BatchNormConfig, Linear};
use ps_model::burn::optim::GradientsParams;
use ps_model::burn::tensor::{Device, Tensor};
use ps_model::{
    Activation, FlatError, FlatView, LocalModel, Model, ModelError, Part, PartError, Rng, Step,
    StepSeed, seeded,
};

use crate::support::{default_device, on_each_device};

const WIDTH: usize = 3;

/// The statistics stand between the parameters of the layers.
#[derive(Module, Debug)]
struct Net {
    first: BatchNorm,
    linear: Linear,
    last: BatchNorm,
    output: Linear,
}

impl Net {
    fn init(device: &Device) -> Self {
        let rng = &mut Rng::new(7);
        let norm = || BatchNormConfig::new(WIDTH).with_momentum(0.25).init(device);
        Self {
            first: norm(),
            linear: seeded::linear(rng, [WIDTH, WIDTH], device),
            last: norm(),
            output: seeded::linear(rng, [WIDTH, 1], device),
        }
    }

    fn output(&self, x: Tensor<2>) -> Tensor<2> {
        let x = self.linear.forward(self.first.forward(x)).tanh();
        self.output.forward(self.last.forward(x))
    }

    fn statistics(&self) -> Vec<f32> {
        let layers = [&self.first, &self.last];
        let states = layers.map(|norm| [&norm.running_mean, &norm.running_var]);
        let states = states.into_iter().flatten();
        let values = states.map(|state| state.value_sync().into_data().try_into_vec().unwrap());
        values.collect::<Vec<Vec<f32>>>().concat()
    }
}

/// Rows of `WIDTH` numbers.
type Rows = Vec<f32>;

fn tensor(rows: &Rows, device: &Device) -> Tensor<2> {
    Tensor::<1>::from_floats(rows.as_slice(), device).reshape([-1, WIDTH as i32])
}

fn rows(seed: u64) -> Rows {
    let mut rng = Rng::new(seed);
    (0..8 * WIDTH).map(|_| 4.0 * rng.uniform() - 1.0).collect()
}

impl Model for Net {
    type Batch = Rows;

    fn loss(&self, rows: &Rows, step: &mut Step) -> Tensor<1> {
        let output = self.output(tensor(rows, step.device()));
        // For the test of a failure after the statistics have changed.
        assert!(rows.len() > 2 * WIDTH, "too few rows");
        output.square().mean()
    }

    fn num_examples(rows: &Rows) -> usize {
        rows.len() / WIDTH
    }
}

fn close(got: &[f32], expected: &[f32], what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (got, expected) in got.iter().zip(expected) {
        let difference = (got - expected).abs();
        assert!(difference < 1e-5, "{what}: {got} and {expected}");
    }
}

#[test]
fn statistics_stand_behind_all_parameters() {
    let device = default_device();
    let model = Net::init(&device);
    // Without gradients there is nothing to train, whatever the layers learn.
    let error = FlatView::new(&model.clone().no_grad()).unwrap_err();
    assert!(
        matches!(error, FlatError::NothingTrainable { .. }),
        "{error}"
    );
    for model in [model.clone(), model.valid()] {
        let view = FlatView::new(&model).unwrap();
        let names: Vec<&str> = view
            .parameters()
            .iter()
            .map(|spec| &spec.name[..])
            .collect();
        let expected = [
            "first.gamma",
            "first.beta",
            "linear.weight",
            "linear.bias",
            "last.gamma",
            "last.beta",
            "output.weight",
            "output.bias",
            "first.running_mean",
            "first.running_var",
            "last.running_mean",
            "last.running_var",
        ];
        assert_eq!(names, expected);
        assert_eq!(view.buffers(), &view.parameters()[8..]);
        let num_trainable = 4 * WIDTH + WIDTH * WIDTH + WIDTH + WIDTH + 1;
        assert_eq!(view.num_trainable(), num_trainable);
        assert_eq!(view.num_weights(), num_trainable + 4 * WIDTH);
        let weights = view.read_weights(&model);
        assert_eq!(weights[num_trainable..][..WIDTH], [0.0; WIDTH]);
        assert_eq!(weights[num_trainable + WIDTH..][..WIDTH], [1.0; WIDTH]);
    }
}

/// A layer of a user's own, which has no flag that says whether it trains.
#[derive(Module, Debug)]
struct Centered {
    mean: RunningState<Tensor<1>>,
    linear: Linear,
}

#[derive(Module, Debug)]
struct Holder<L: Module> {
    layers: Vec<L>,
}

#[test]
fn a_layer_of_a_users_own_has_buffers_whatever_its_name() {
    let device = default_device();
    let centered = |state: &RunningState<Tensor<1>>| Centered {
        mean: state.clone(),
        linear: seeded::linear(&mut Rng::new(1), [2, 1], &device),
    };
    let state = || RunningState::new(Tensor::zeros([2], &device));
    let layers = vec![centered(&state()), centered(&state()).freeze()];
    let view = FlatView::new(&Holder { layers }).unwrap();
    let names: Vec<&str> = view.buffers().iter().map(|spec| &spec.name[..]).collect();
    // Freezing such a layer does not tell it to stop.
    assert_eq!(names, ["layers.0.mean", "layers.1.mean"]);
    let shared = state();
    let layers = vec![centered(&shared), centered(&shared)];
    let [first, second] = ["layers.0.mean", "layers.1.mean"].map(str::to_owned);
    let error = FlatView::new(&Holder { layers }).unwrap_err();
    assert_eq!(error, FlatError::SharedStatistic { first, second });
}

#[test]
fn a_gradient_says_what_the_batch_makes_of_the_statistics_and_changes_none() {
    on_each_device(|name, device| {
        let model = Net::init(device);
        // What burn makes of two batches, one after the other.
        let burns = model.clone().valid().train();
        let on_autodiff = device.clone().autodiff();
        let mut local = LocalModel::new(model, device).unwrap();
        let mut gradient = vec![f32::NAN; local.num_weights()];
        for batch in [rows(1), rows(2)] {
            let mut weights = local.weights().unwrap();
            let num_trainable = local.num_trainable();
            for _ in 0..2 {
                local
                    .gradient(&batch, StepSeed::default(), &mut gradient)
                    .unwrap();
                assert_eq!(local.weights().unwrap(), weights, "{name}");
            }
            drop(burns.output(tensor(&batch, &on_autodiff)));
            weights[num_trainable..].copy_from_slice(&gradient[num_trainable..]);
            close(&weights[num_trainable..], &burns.statistics(), name);
            local.load(&weights).unwrap();
            assert_eq!(local.weights().unwrap(), weights, "{name}");
        }
        assert!(
            gradient[..local.num_trainable()]
                .iter()
                .any(|&slope| slope != 0.0)
        );
        // An evaluation uses the loaded statistics.
        let x = tensor(&rows(3), device);
        let [ours, burns] = [local.model(), &burns].map(|net| {
            let output = net.valid().output(x.clone());
            output.into_data().try_into_vec::<f32>().unwrap()
        });
        close(&ours, &burns, name);
    });
}

/// With this momentum, a sum of what each batch changes would leap over the statistics of the data, ever farther.
#[test]
fn steps_that_are_added_up_change_the_statistics_one_after_the_other() {
    let device = default_device();
    let model = Net::init(&device);
    let burns = model.clone().valid().train();
    let on_autodiff = device.clone().autodiff();
    let local = LocalModel::new(model, &device).unwrap();
    let weights = local.weights().unwrap();
    let mut sum = vec![f32::NAN; local.num_weights()];
    local.begin_sum(&mut sum);
    assert_eq!(
        sum[local.num_trainable()..],
        weights[local.num_trainable()..]
    );
    for batch in (0..20).map(rows) {
        let step = |net: &Net| {
            let loss = net.output(tensor(&batch, &on_autodiff)).square().mean();
            (GradientsParams::from_grads(loss.backward(), net), ())
        };
        local
            .add_gradient_of(StepSeed::default(), &mut sum, step)
            .unwrap();
        assert_eq!(local.weights().unwrap(), weights);
        drop(burns.output(tensor(&batch, &on_autodiff)));
    }
    close(
        &sum[local.num_trainable()..],
        &burns.statistics(),
        "the sum",
    );
}

#[test]
fn a_failed_step_leaves_the_statistics_as_they_were() {
    let local = LocalModel::new(Net::init(&default_device()), &default_device()).unwrap();
    let weights = local.weights().unwrap();
    let mut gradient = vec![0.0; local.num_weights()];
    let two_rows = vec![9.0; 2 * WIDTH];
    let error = local.gradient(&two_rows, StepSeed::default(), &mut gradient);
    assert!(matches!(error, Err(ModelError::Panicked(text)) if text.contains("too few rows")));
    assert_eq!(local.weights().unwrap(), weights);
    let evaluated = local.evaluate(&rows(1)).unwrap();
    local
        .gradient(&rows(1), StepSeed::default(), &mut gradient)
        .unwrap();
    assert_eq!(local.evaluate(&rows(1)).unwrap(), evaluated);
}

#[test]
fn weights_that_do_not_fit_change_no_statistics() {
    let mut local = LocalModel::new(Net::init(&default_device()), &default_device()).unwrap();
    let weights = local.weights().unwrap();
    let (last, all) = (local.num_trainable(), local.num_weights());
    for fails_at in [0, last, all - 1] {
        let result = local.load_with(|range| {
            let len = range.len() - usize::from(range.contains(&fails_at));
            vec![5.0_f32; len]
        });
        let error = result.unwrap_err();
        assert!(
            matches!(error, ModelError::Flat(FlatError::WrongCount { .. })),
            "{error}"
        );
        assert_eq!(local.weights().unwrap(), weights, "{fails_at}");
    }
}

impl Part for Net {
    type Input = Tensor<2>;
    type Output = Tensor<2>;

    fn forward(&self, x: Tensor<2>, _: &mut Step) -> Tensor<2> {
        self.output(x)
    }
}

#[test]
fn a_part_with_statistics_computes_outputs_and_is_not_trained() {
    let local = LocalModel::new(Net::init(&default_device()), &default_device()).unwrap();
    let x = tensor(&rows(1), &default_device());
    assert_eq!(local.infer(x.to_array()).unwrap().shape, [8, 1]);
    let error = local.begin(StepSeed::default()).unwrap_err();
    let name = "first.running_mean".to_owned();
    assert_eq!(error, PartError::RunningStatistics { name });
}
