//! burn optimizers on flat shards, against burn's own on whole modules.

use ps_model::burn;
use ps_model::burn::grad_clipping::GradientClippingConfig;
use ps_model::burn::module::{Module, Param};
use ps_model::burn::optim::decay::WeightDecayConfig;
use ps_model::burn::optim::momentum::MomentumConfig;
use ps_model::burn::optim::{
    AdaGradConfig, AdamConfig, AdamWConfig, AdanConfig, GradientsParams, LambConfig, LionConfig,
    ModuleOptimizer, MuonConfig, RmsPropConfig, SgdConfig,
};
use ps_model::burn::tensor::{Device, Tensor, TensorData};
use ps_model::{
    BurnRule, ElementwiseConfig, FlatView, Rng, RuleError, RuleState, ShardParameter, StateValue,
    WholeConfig, WholeRule,
};

use crate::support::{default_device, on_each_device};

const NUM_WEIGHTS: usize = 5 * 7 + 3;
const NUM_STEPS: u64 = 6;

#[derive(Module, Debug)]
struct TwoParameters {
    matrix: Param<Tensor<2>>,
    vector: Param<Tensor<1>>,
}

impl TwoParameters {
    fn new(weights: &[f32], device: &Device) -> Self {
        let (matrix, vector) = weights.split_at(5 * 7);
        Self {
            matrix: Param::from_data(TensorData::new(matrix.to_vec(), [5, 7]), device),
            vector: Param::from_data(TensorData::new(vector.to_vec(), [3]), device),
        }
    }

    fn gradients(&self, gradient: &[f32], device: &Device) -> GradientsParams {
        let (matrix, vector) = gradient.split_at(5 * 7);
        let matrix = TensorData::new(matrix.to_vec(), [5, 7]);
        let vector = TensorData::new(vector.to_vec(), [3]);
        let mut gradients = GradientsParams::new();
        gradients.register(self.matrix.id, Tensor::<2>::from_data(matrix, device));
        gradients.register(self.vector.id, Tensor::<1>::from_data(vector, device));
        gradients
    }
}

/// Weights, and gradients of all sizes with a zero among them.
fn weights_and_gradients() -> (Vec<f32>, Vec<Vec<f32>>) {
    let mut rng = Rng::new(17);
    let weights = rng.uniform_within(1.0, NUM_WEIGHTS);
    let gradients = (0..NUM_STEPS).map(|step| {
        let mut gradient = rng.uniform_within(0.1_f32.powi(step as i32 % 3), NUM_WEIGHTS);
        gradient[step as usize * 5] = 0.0;
        gradient
    });
    (weights, gradients.collect())
}

/// Steps the whole module, and shards cut in several ways, and compares the weights bit for bit:
/// the same operations on the same numbers, whatever the shape of the tensor.
fn check<C: ElementwiseConfig>(what: &str, config: &C, mut module_optimizer: ModuleOptimizer) {
    let (initial, gradients) = weights_and_gradients();
    on_each_device(|name, device| {
        let train = device.clone().autodiff();
        let mut module = TwoParameters::new(&initial, &train);
        for (step, gradient) in gradients.iter().enumerate() {
            let rate = 0.05 / (1 + step) as f64;
            let gradient = module.gradients(gradient, device);
            module = module_optimizer.step(rate, module, gradient);
        }
        let view = FlatView::new(&module).expect("a flat view");
        let expected = view.read_weights(&module);
        assert!(expected.iter().zip(&initial).all(|(a, b)| a != b));

        for cuts in [vec![0, 38], vec![0, 1, 38], vec![0, 13, 25, 35, 38]] {
            let mut weights = initial.clone();
            for shard in cuts.windows(2).map(|cut| cut[0]..cut[1]) {
                let mut rule = BurnRule::new(config, device).expect("elementwise");
                for (step, gradient) in gradients.iter().enumerate() {
                    let rate = 0.05 / (1 + step) as f64;
                    let weights = &mut weights[shard.clone()];
                    rule.step(weights, &gradient[shard.clone()], rate)
                        .expect("a good step");
                    // A checkpoint in the middle changes nothing.
                    if step == 2 {
                        let state = rule.save_state().expect("a state of f32");
                        rule = BurnRule::new(config, device).expect("elementwise");
                        rule.load_state(state).expect("its own state");
                    }
                }
            }
            assert_eq!(
                weights, expected,
                "{what} on {name}, shards cut at {cuts:?}"
            );
        }
        // The next device starts from a fresh state.
        module_optimizer = module_optimizer.clone().load_record(Default::default());
    });
}

macro_rules! check {
    ($($name:ident: $config:expr;)*) => {$(
        #[test]
        fn $name() {
            let config = $config;
            check(stringify!($name), &config, config.init());
        }
    )*};
}

check! {
    sgd_on_shards_equals_sgd_on_the_module: SgdConfig::new();
    momentum_on_shards_equals_momentum_on_the_module:
        SgdConfig::new().with_momentum(Some(MomentumConfig::new()));
    nesterov_on_shards_equals_nesterov_on_the_module: SgdConfig::new()
        .with_momentum(Some(MomentumConfig::new().with_nesterov(true)))
        .with_weight_decay(Some(WeightDecayConfig::new(0.01)));
    adam_on_shards_equals_adam_on_the_module: AdamConfig::new();
    amsgrad_on_shards_equals_amsgrad_on_the_module: AdamConfig::new().with_amsgrad(true);
    adamw_on_shards_equals_adamw_on_the_module: AdamWConfig::new();
    cautious_adamw_on_shards_equals_cautious_adamw_on_the_module:
        AdamWConfig::new().with_cautious_weight_decay(true);
    rmsprop_on_shards_equals_rmsprop_on_the_module: RmsPropConfig::new();
    centered_rmsprop_on_shards_equals_centered_rmsprop_on_the_module:
        RmsPropConfig::new().with_centered(true).with_alpha(0.9);
    adagrad_on_shards_equals_adagrad_on_the_module: AdaGradConfig::new().with_lr_decay(0.1);
    lion_on_shards_equals_lion_on_the_module: LionConfig::new().with_weight_decay(0.1);
    adan_on_shards_equals_adan_on_the_module: AdanConfig::new();
    clipping_by_value_on_shards_equals_clipping_by_value_on_the_module:
        AdamConfig::new().with_grad_clipping(Some(GradientClippingConfig::Value(0.05)));
}

#[test]
fn plain_sgd_is_a_straight_loop() {
    let (mut weights, gradients) = weights_and_gradients();
    let mut expected = weights.clone();
    let mut rule = BurnRule::new(&SgdConfig::new(), &default_device()).expect("elementwise");
    for gradient in &gradients {
        rule.step(&mut weights, gradient, 0.125)
            .expect("a good step");
        for (weight, slope) in expected.iter_mut().zip(gradient) {
            *weight -= 0.125 * slope;
        }
    }
    assert_eq!(weights, expected);
}

#[test]
fn clipping_by_norm_is_refused() {
    let config = SgdConfig::new().with_gradient_clipping(Some(GradientClippingConfig::Norm(1.0)));
    let error = BurnRule::new(&config, &default_device()).expect_err("not elementwise");
    assert_eq!(error, RuleError::ClippingByNorm);
}

#[test]
fn bad_steps_are_refused_and_change_nothing() {
    let device = default_device();
    let mut rule = BurnRule::new(&AdamConfig::new(), &device).expect("elementwise");
    let mut weights = [1.0, 2.0];
    let mut refused = |rule: &mut BurnRule<_>, gradient: &[f32], rate, expected: RuleError| {
        let error = rule
            .step(&mut weights, gradient, rate)
            .expect_err("a bad step");
        assert_eq!(error.to_string(), expected.to_string());
        assert_eq!(weights, [1.0, 2.0]);
    };
    let (expected, got) = (3, 2);
    for rate in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        refused(&mut rule, &[0.0; 2], rate, RuleError::LearningRate(rate));
    }
    let (weights, gradient) = (2, 3);
    let length = RuleError::GradientLength { weights, gradient };
    refused(&mut rule, &[0.0; 3], 0.1, length);
    assert_eq!(rule.save_state(), Ok(RuleState::default()));

    rule.step(&mut [0.0; 3], &[1.0; 3], 0.1)
        .expect("a good step");
    let shard = RuleError::ShardLength { expected, got };
    refused(&mut rule, &[0.0; 2], 0.1, shard);
    rule.step(&mut [], &[], 0.1).expect("nothing to do");
    rule.step(&mut [0.0; 3], &[1.0; 3], 0.1)
        .expect("still usable");
}

/// A checkpoint must not be read as that of another optimizer.
#[test]
fn foreign_and_damaged_states_are_refused_and_the_old_one_stays() {
    let device = default_device();
    fn after_two_steps<C: ElementwiseConfig>(
        config: &C,
        device: &Device,
    ) -> BurnRule<C::Optimizer> {
        let mut rule = BurnRule::new(config, device).expect("elementwise");
        for _ in 0..2 {
            rule.step(&mut [1.0, 2.0], &[0.1, 0.2], 0.1)
                .expect("a good step");
        }
        rule
    }
    let mut adam = after_two_steps(&AdamConfig::new(), &device);
    let good = adam.save_state().expect("a state of f32");
    assert_eq!(good.num_weights, 2);
    let time = good.scalars.iter().find(|s| s.name == "momentum.time");
    assert_eq!(time.map(|s| s.value), Some(StateValue::Unsigned(2)));

    let save = |rule: Result<RuleState, RuleError>| rule.expect("a state of f32");
    let sgd = after_two_steps(&SgdConfig::new(), &device).save_state();
    let amsgrad = after_two_steps(&AdamConfig::new().with_amsgrad(true), &device).save_state();
    let lion = after_two_steps(&LionConfig::new(), &device).save_state();
    let mut no_time = good.clone();
    no_time.scalars.clear();
    let mut real_time = good.clone();
    real_time.scalars[0].value = StateValue::Float(0.5);
    let mut short = good.clone();
    short.tensors[1].values.pop();
    let mut no_moment = good.clone();
    no_moment.tensors.remove(0);
    let mut too_many = good.clone();
    too_many.tensors.push(good.tensors[0].clone());
    for foreign in [
        save(sgd),
        save(amsgrad.clone()),
        save(lion),
        no_time,
        real_time,
        short,
        no_moment,
        too_many,
    ] {
        let message = format!("{foreign:?}");
        match adam.load_state(foreign) {
            Err(RuleError::ForeignState(_)) => {}
            other => panic!("{other:?} for {message}"),
        }
        assert_eq!(adam.save_state(), Ok(good.clone()));
    }
    // What burn itself would take: AMSGrad without its maximum.
    let mut amsgrad_rule =
        BurnRule::new(&AdamConfig::new().with_amsgrad(true), &device).expect("elementwise");
    amsgrad_rule.load_state(good).expect_err("no maximum");
    amsgrad_rule
        .load_state(save(amsgrad))
        .expect("its own state");
    // The state of no step puts a rule back to its start.
    amsgrad_rule
        .load_state(RuleState::default())
        .expect("empty");
    assert_eq!(amsgrad_rule.save_state(), Ok(RuleState::default()));
}

#[derive(Clone)]
struct Panicking;

impl burn::optim::Optimizer for Panicking {
    type State<const D: usize> = ();

    fn step<const D: usize>(
        &self,
        _: f64,
        weights: Tensor<D>,
        gradient: Tensor<D>,
        _: Option<()>,
    ) -> (Tensor<D>, Option<()>) {
        if gradient.clone().sum().into_scalar::<f32>() < 0.0 {
            panic!("no more steps");
        }
        (weights - gradient, Some(()))
    }

    fn to_device<const D: usize>((): (), _: &Device) {}
}

#[test]
fn an_optimizer_that_panics_gives_an_error_until_a_state_is_loaded() {
    let mut rule = BurnRule::assume_elementwise(Panicking, &default_device());
    let mut weights = [3.0];
    rule.step(&mut weights, &[1.0], 0.1).expect("a good step");
    let saved = rule.save_state().expect("nothing to save");
    let error = rule.step(&mut weights, &[-1.0], 0.1).expect_err("a panic");
    assert_eq!(error, RuleError::Panicked("no more steps".into()));
    rule.step(&mut weights, &[1.0], 0.1)
        .expect_err("the state is lost");
    rule.save_state().expect_err("the state is lost");
    assert_eq!(weights, [2.0]);
    rule.load_state(saved).expect("its own state");
    rule.step(&mut weights, &[1.0], 0.1).expect("usable again");
    assert_eq!(weights, [1.0]);
}

/// As `check`, for optimizers that need whole parameters. `num_updated` of the weights have a gradient.
fn check_whole<C: WholeConfig>(config: &C, mut optimizer: ModuleOptimizer, num_updated: usize) {
    let (initial, gradients) = weights_and_gradients();
    let parameters = |cut: std::ops::Range<usize>| -> Vec<ShardParameter> {
        let all = [("matrix", vec![5, 7], 0..35), ("vector", vec![3], 35..38)];
        let own = all
            .into_iter()
            .filter(|(_, _, range)| cut.contains(&range.start));
        own.map(|(name, shape, range)| ShardParameter {
            name: name.to_owned(),
            shape,
            range: range.start - cut.start..range.end - cut.start,
            is_buffer: range.start >= num_updated,
        })
        .collect()
    };
    on_each_device(|name, device| {
        let mut module = TwoParameters::new(&initial, &device.clone().autodiff());
        for (step, gradient) in gradients.iter().enumerate() {
            let mut gradient = module.gradients(gradient, device);
            if num_updated <= 35 {
                let _ = gradient.remove::<1>(module.vector.id);
            }
            module = optimizer.step(0.05 / (1 + step) as f64, module, gradient);
        }
        let view = FlatView::new(&module).expect("a flat view");
        let expected = view.read_weights(&module);
        let mut changed = expected[..num_updated].iter().zip(&initial);
        assert!(changed.all(|(a, b)| a != b));

        for cuts in [vec![0, 38], vec![0, 35, 38]] {
            let mut weights = initial.clone();
            for shard in cuts.windows(2).map(|cut| cut[0]..cut[1]) {
                let new = || {
                    let mut rule = WholeRule::new(config, device);
                    rule.place(parameters(shard.clone()))
                        .expect("whole parameters");
                    rule
                };
                let mut rule = new();
                for (step, gradient) in gradients.iter().enumerate() {
                    let rate = 0.05 / (1 + step) as f64;
                    let weights = &mut weights[shard.clone()];
                    rule.step(weights, &gradient[shard.clone()], rate)
                        .expect("a good step");
                    if step == 2 {
                        let state = rule.save_state().expect("a state of f32");
                        rule = new();
                        rule.load_state(state).expect("its own state");
                    }
                }
            }
            assert_eq!(weights, expected, "on {name}, shards cut at {cuts:?}");
        }
        optimizer = optimizer.clone().load_record(Default::default());
    });
}

#[test]
fn lamb_on_shards_equals_lamb_on_the_module() {
    let config = LambConfig::new().with_weight_decay(0.1);
    check_whole(&config, config.init(), NUM_WEIGHTS);
    let clipping = Some(GradientClippingConfig::Norm(0.1));
    let config = config.with_grad_clipping(clipping);
    check_whole(&config, config.init(), NUM_WEIGHTS);
}

/// The vector stands for a statistic, which no optimizer updates.
#[test]
fn muon_on_shards_equals_muon_on_the_module() {
    let config = MuonConfig::new();
    check_whole(&config, config.init(), 35);
}

#[test]
fn cut_parameters_impossible_shapes_and_foreign_states_are_refused() {
    let parameter = |shape: Vec<usize>, len| ShardParameter {
        name: "matrix".to_owned(),
        shape,
        range: 0..len,
        is_buffer: false,
    };
    let device = default_device();
    let mut lamb = WholeRule::new(&LambConfig::new(), &device);
    let error = lamb
        .place(vec![parameter(vec![5, 7], 34)])
        .expect_err("cut");
    assert_eq!(
        error,
        RuleError::CutParameter {
            name: "matrix".into()
        }
    );
    lamb.place(vec![parameter(vec![1; 7], 1)])
        .expect_err("too many axes");
    let mut muon = WholeRule::new(&MuonConfig::new(), &device);
    for shape in [vec![4], vec![2, 2, 1]] {
        let error = muon.place(vec![parameter(shape.clone(), 4)]);
        let (name, error) = ("matrix".to_owned(), error.expect_err("no matrix"));
        assert_eq!(error, RuleError::Shape { name, shape });
    }

    lamb.place(vec![parameter(vec![2, 2], 4)]).expect("whole");
    muon.place(vec![parameter(vec![2, 2], 4)]).expect("whole");
    let gradient = [0.1, 0.2, 0.3, 0.4];
    lamb.step(&mut [1.0; 3], &gradient[..3], 0.1)
        .expect_err("another shard");
    lamb.step(&mut [1.0; 4], &gradient, 0.1).expect("a step");
    muon.step(&mut [1.0; 4], &gradient, 0.1).expect("a step");
    let good = lamb.save_state().expect("a state");
    let mut no_time = good.clone();
    no_time.scalars.clear();
    let mut real_time = good.clone();
    real_time.scalars[0].value = StateValue::Float(0.5);
    let mut short = good.clone();
    short.tensors[1].values.pop();
    let foreign = muon.save_state().expect("a state");
    for foreign in [foreign, no_time, real_time, short] {
        let message = format!("{foreign:?}");
        match lamb.load_state(foreign) {
            Err(RuleError::ForeignState(_)) => {}
            other => panic!("{other:?} for {message}"),
        }
        assert_eq!(lamb.save_state(), Ok(good.clone()));
    }
    lamb.load_state(RuleState::default()).expect("empty");
    lamb.step(&mut [], &[], 0.1).expect("nothing to do");
}
