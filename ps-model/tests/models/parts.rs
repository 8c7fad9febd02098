//! Parts of models that others compute through, and graphs that go on elsewhere.

use ps_model::burn::module::Module;
use ps_model::burn::nn::Linear;
use ps_model::burn::nn::conv::Conv2d;
use ps_model::burn::tensor::activation::{log_softmax, relu};
use ps_model::burn::tensor::module::max_pool2d;
use ps_model::burn::tensor::ops::MaxPoolOptions;
use ps_model::burn::tensor::{Device, Tensor, TensorData};
use ps_model::{
    Activation, Array, ConvNet, FlatView, ImageBatch, LocalGradients, LocalModel, MAX_CALLS, Model,
    Net, Part, PartError, Pass, Rng, SeamError, Seams, Step, StepSeed, nll_loss, seeded,
};

use crate::support::{default_device, on_each_device_except, random_images};

/// A gradient of output and of a part's weights, as one trainer would do it in one process.
fn through_a_pass<P>(
    model: &LocalModel<P>,
    batch: &ImageBatch,
    seed: StepSeed,
    device: &Device,
) -> (f32, Vec<f32>)
where
    P: Part<Input = Tensor<4>, Output = Tensor<2>>,
{
    let mut pass = model.begin(seed).unwrap();
    let (mut seams, images) = (Seams::new(), batch.images_on(device));
    let output = pass.forward(0, images.to_array(), false).unwrap();
    let (_, output): (_, Tensor<2>) = seams.cross(images, output).unwrap();
    let loss = nll_loss(output, batch.labels_on(&device.clone().autodiff()));
    go_back(&mut seams, &loss, |_, gradient| pass.backward(0, gradient));
    let gradient = pass.take_gradient().expect("backward was called");
    (loss.into_scalar::<f32>(), gradient)
}

fn go_back(
    seams: &mut Seams,
    loss: &Tensor<1>,
    mut answer: impl FnMut(usize, Array) -> Result<Option<Array>, PartError>,
) -> LocalGradients {
    let mut backward = seams.backward(loss).unwrap();
    while let Some(mut seam) = backward.next_seam().unwrap() {
        let gradient = std::mem::take(&mut seam.output_gradient);
        let gradient = answer(seam.number, gradient).unwrap();
        seam.resume(gradient).unwrap();
    }
    backward.finish()
}

#[test]
fn a_pass_gives_the_bits_of_the_model_as_a_whole() {
    fn check<M>(model: M, device: &Device, name: &str)
    where
        M: Model<Batch = ImageBatch> + Part<Input = Tensor<4>, Output = Tensor<2>>,
    {
        let model = LocalModel::new(model, device).unwrap();
        let batch = random_images(5, 4);
        let seed = StepSeed {
            seed: 9,
            worker: 2,
            clock: 3,
        };
        let mut expected = vec![0.0; model.num_weights()];
        let loss = model.gradient(&batch, seed, &mut expected).unwrap();
        let (got_loss, got) = through_a_pass(&model, &batch, seed, device);
        assert_eq!(got_loss.to_bits(), loss.to_bits(), "{name}");
        assert!(got == expected, "{name}");
    }
    // `Net` takes minutes on ndarray.
    on_each_device_except(&["ndarray"], |name, device| {
        check(ConvNet::init(3, device), device, name);
        check(Net::init(3, device), device, name);
    });
}

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
        let [batch, channels, height, width] = x.dims();
        relu(
            self.fc1
                .forward(x.reshape([batch, channels * height * width])),
        )
    }
}

/// `Net` in three pieces: two parts that are computed elsewhere and a local head, drawn from the same
/// numbers as the whole.
fn pieces_of_net(seed: u64, device: &Device) -> (Convolutions, Dense, Linear) {
    let rng = &mut Rng::new(seed);
    let convolutions = Convolutions {
        conv1: seeded::conv2d(rng, [1, 32], 3, device),
        conv2: seeded::conv2d(rng, [32, 64], 3, device),
    };
    let fc1 = seeded::linear(rng, [9216, 128], device);
    let head = seeded::linear(rng, [128, 10], device);
    (convolutions, Dense { fc1 }, head)
}

/// Both compute the same sums in a different order only where gradients of one weight are added up.
fn assert_close(got: &[f32], expected: &[f32], what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        let difference = (got - expected).abs();
        assert!(
            difference <= 1e-5 * largest,
            "{what}: number {i} is {got}, expected {expected}"
        );
    }
}

fn weights_of<M: Module>(module: &M, mut gradients: LocalGradients) -> Vec<f32> {
    let mut gradients = gradients.take(module);
    let mut out = Vec::new();
    struct Read<'a>(
        &'a mut ps_model::burn::optim::GradientsParams,
        &'a mut Vec<f32>,
    );
    impl ps_model::burn::module::ModuleVisitor for Read<'_> {
        fn visit_float<const D: usize>(
            &mut self,
            param: &ps_model::burn::module::Param<Tensor<D>>,
        ) {
            let gradient = self
                .0
                .remove::<D>(param.id)
                .expect("it had part in the loss");
            self.1.extend(gradient.to_array().values);
        }
    }
    module.visit(&mut Read(&mut gradients, &mut out));
    out
}

#[test]
fn a_net_split_over_two_parts_and_a_local_head_gets_the_gradients_of_the_whole() {
    on_each_device_except(&["ndarray"], |name, device| {
        let whole = LocalModel::new(Net::init(3, device).with_dropout([0.0, 0.0]), device).unwrap();
        let batch = random_images(5, 2);
        let mut expected = vec![0.0; whole.num_weights()];
        let seed = StepSeed::default();
        let whole_loss = whole.gradient(&batch, seed, &mut expected).unwrap();

        let (convolutions, dense, head) = pieces_of_net(3, device);
        let first = LocalModel::new(convolutions, device).unwrap();
        let second = LocalModel::new(dense, device).unwrap();
        let head = head.train().fork(&device.clone().autodiff());
        let (mut pass1, mut pass2) = (first.begin(seed).unwrap(), second.begin(seed).unwrap());

        let mut seams = Seams::new();
        let images = batch.images_on(device);
        let features = pass1.forward(0, images.to_array(), false).unwrap();
        let (_, features): (_, Tensor<4>) = seams.cross(images, features).unwrap();
        let hidden = pass2.forward(0, features.to_array(), true).unwrap();
        let (_, hidden): (_, Tensor<2>) = seams.cross(features, hidden).unwrap();
        let output = log_softmax(head.forward(hidden), 1);
        let loss = nll_loss(output, batch.labels_on(&device.clone().autodiff()));
        let mut order = Vec::new();
        let local = go_back(&mut seams, &loss, |seam, gradient| {
            order.push(seam);
            match seam {
                0 => pass1.backward(0, gradient),
                _ => pass2.backward(0, gradient),
            }
        });
        assert_eq!(order, [1, 0]);

        let mut got = pass1.take_gradient().unwrap();
        got.extend(pass2.take_gradient().unwrap());
        got.extend(weights_of(&head, local));
        assert!(
            (loss.into_scalar::<f32>() - whole_loss).abs() < 1e-5,
            "{name}"
        );
        assert_close(&got, &expected, name);
    });
}

/// `y = tanh(x·w1)`, somewhere else; before it and behind it, and around it, local layers.
#[derive(Module, Debug)]
struct Middle {
    linear: Linear,
}

impl Part for Middle {
    type Input = Tensor<2>;
    type Output = Tensor<2>;

    fn forward(&self, x: Tensor<2>, _: &mut Step) -> Tensor<2> {
        self.linear.forward(x).tanh()
    }

    fn check_input(&self, shape: &[usize]) -> Result<(), String> {
        match shape {
            [_, 4] => Ok(()),
            _ => Err("an input has shape [batch, 4]".to_owned()),
        }
    }
}

#[derive(Module, Debug)]
struct Around {
    before: Linear,
    behind: Linear,
}

fn middle_and_around(device: &Device) -> (Middle, Around) {
    let rng = &mut Rng::new(8);
    let linear = seeded::linear(rng, [4, 4], device);
    let before = seeded::linear(rng, [3, 4], device);
    let behind = seeded::linear(rng, [4, 2], device);
    (Middle { linear }, Around { before, behind })
}

fn input(device: &Device) -> Tensor<2> {
    let numbers = Rng::new(1).uniform_within(1.0, 6);
    Tensor::from_data(TensorData::new(numbers, [2, 3]), device)
}

/// The same loss, with the middle computed in the same graph or as a part, by `middle`.
fn residual_loss(
    around: &Around,
    x: Tensor<2>,
    prepare: impl FnOnce(Tensor<2>) -> Tensor<2>,
    middle: impl FnOnce(Tensor<2>) -> Tensor<2>,
) -> Tensor<1> {
    let x = prepare(around.before.forward(x).tanh());
    let x = middle(x.clone()) + x;
    around.behind.forward(x).square().mean()
}

/// PT-6
#[test]
fn layers_before_behind_and_around_a_part_get_their_gradients() {
    let device = default_device().autodiff();
    let (middle, around) = middle_and_around(&device);
    let part = LocalModel::new(middle.clone(), &device).unwrap();

    let step = &mut Step::evaluation(&device);
    let forward = |x| middle.forward(x, step);
    let loss = residual_loss(&around, input(&device), |x| x, forward);
    let whole = loss.backward();
    // A graph's gradients are read once, so both modules at the same time.
    #[derive(Module, Debug)]
    struct Both {
        middle: Middle,
        around: Around,
    }
    let both = Both {
        middle,
        around: around.clone(),
    };
    let mut expected = vec![0.0; both.num_params()];
    let view = FlatView::new(&both).unwrap();
    view.read_gradients(&both, whole, &mut expected);

    let mut pass = part.begin(StepSeed::default()).unwrap();
    let seams = std::cell::RefCell::new(Seams::new());
    let cut = |x| seams.borrow_mut().cut(x);
    let forward = |x: Tensor<2>| {
        let output = pass.forward(0, x.to_array(), true).unwrap();
        seams.borrow_mut().cross(x, output).unwrap().1
    };
    let loss = residual_loss(&around, input(&device), cut, forward);
    let local = go_back(&mut seams.borrow_mut(), &loss, |_, gradient| {
        pass.backward(0, gradient)
    });
    let mut got = pass.take_gradient().unwrap();
    got.extend(weights_of(&around, local));
    assert_close(&got, &expected, "middle, before, behind");
}

/// PT-6
#[test]
fn a_graph_shared_by_two_sides_of_a_part_is_an_error_that_says_to_cut_it() {
    let device = default_device().autodiff();
    let (middle, around) = middle_and_around(&device);
    let part = LocalModel::new(middle, &device).unwrap();
    let mut pass = part.begin(StepSeed::default()).unwrap();
    let mut seams = Seams::new();
    let forward = |x: Tensor<2>| {
        let output = pass.forward(0, x.to_array(), true).unwrap();
        seams.cross(x, output).unwrap().1
    };
    let loss = residual_loss(&around, input(&device), |x| x, forward);
    let mut backward = seams.backward(&loss).unwrap();
    let mut seam = backward.next_seam().unwrap().expect("one seam");
    let gradient = std::mem::take(&mut seam.output_gradient);
    let gradient = pass.backward(0, gradient).unwrap();
    let error = seam.resume(gradient).unwrap_err();
    assert!(matches!(error, SeamError::Panicked(_)), "{error:?}");
    assert!(error.to_string().contains("cut"), "{error}");
}

#[test]
fn a_part_without_influence_on_the_loss_is_not_gone_back_through() {
    let device = default_device().autodiff();
    let (middle, around) = middle_and_around(&device);
    let part = LocalModel::new(middle, &device).unwrap();
    let mut pass = part.begin(StepSeed::default()).unwrap();
    let mut seams = Seams::new();
    let x = around.before.forward(input(&device));
    for call in 0..2 {
        let output = pass.forward(call, x.to_array(), true).unwrap();
        let (_, _unused): (_, Tensor<2>) = seams.cross(x.clone(), output).unwrap();
    }
    let loss = around.behind.forward(x).sum();
    go_back(&mut seams, &loss, |_, _| panic!("nothing depends on it"));
}

fn pass_of_middle() -> Pass<Middle> {
    let device = default_device();
    let (middle, _) = middle_and_around(&device);
    let part = LocalModel::new(middle, &device).unwrap();
    part.begin(StepSeed::default()).unwrap()
}

fn array(shape: &[usize]) -> Array {
    Array {
        shape: shape.to_vec(),
        values: vec![0.5; shape.iter().product()],
    }
}

/// PT-5
#[test]
fn what_does_not_fit_is_an_error_and_the_pass_goes_on() {
    let mut pass = pass_of_middle();
    let error = pass.forward(0, array(&[2, 4, 1]), true).unwrap_err();
    assert!(matches!(error, PartError::WrongInput { .. }), "{error:?}");
    let error = pass.forward(0, array(&[2, 3]), true).unwrap_err();
    assert!(error.to_string().contains("[batch, 4]"), "{error}");
    let lies = Array {
        shape: vec![2, 4],
        values: vec![0.0; 7],
    };
    let error = pass.forward(0, lies, true).unwrap_err();
    assert!(
        matches!(error, PartError::WrongCount { got: 7, .. }),
        "{error:?}"
    );
    let overflow = Array {
        shape: vec![usize::MAX, 4],
        values: Vec::new(),
    };
    let error = pass.forward(0, overflow, true).unwrap_err();
    assert!(matches!(error, PartError::WrongCount { .. }), "{error:?}");
    let error = pass.backward(0, array(&[2, 4])).unwrap_err();
    assert_eq!(error, PartError::NoSuchCall { call: 0 });

    pass.forward(0, array(&[2, 4]), true).unwrap();
    let error = pass.forward(0, array(&[2, 4]), true).unwrap_err();
    assert_eq!(error, PartError::CallRepeated { call: 0 });
    let error = pass.backward(0, array(&[4, 2])).unwrap_err();
    assert!(
        matches!(error, PartError::WrongGradient { .. }),
        "{error:?}"
    );
    assert_eq!(pass.gradient(), None);
    assert!(pass.backward(0, array(&[2, 4])).unwrap().is_some());
    let error = pass.backward(0, array(&[2, 4])).unwrap_err();
    assert_eq!(error, PartError::AlreadyBackward { call: 0 });
    assert_eq!(pass.gradient().map(<[f32]>::len), Some(20));

    for call in 1..MAX_CALLS as u32 {
        pass.forward(call, array(&[2, 4]), true).unwrap();
    }
    let error = pass.forward(999, array(&[2, 4]), true).unwrap_err();
    assert_eq!(error, PartError::TooManyCalls);
}

/// PT-5
#[test]
fn a_part_that_panics_gives_an_error() {
    let device = default_device();
    let (convolutions, ..) = pieces_of_net(1, &device);
    let model = LocalModel::new(convolutions, &device).unwrap();
    let mut pass = model.begin(StepSeed::default()).unwrap();
    // Three channels for a convolution of one; this part does not check.
    let error = pass.forward(0, array(&[1, 3, 28, 28]), false).unwrap_err();
    assert!(matches!(error, PartError::Panicked(_)), "{error:?}");
    let error = model.infer(array(&[1, 3, 28, 28])).unwrap_err();
    assert!(matches!(error, PartError::Panicked(_)), "{error:?}");
    assert!(pass.forward(0, array(&[1, 1, 28, 28]), false).is_ok());
}

#[test]
fn gradients_of_several_calls_add_up() {
    let mut one = pass_of_middle();
    one.forward(0, array(&[2, 4]), false).unwrap();
    one.backward(0, array(&[2, 4])).unwrap();
    let mut two = pass_of_middle();
    for call in [3, 8] {
        two.forward(call, array(&[2, 4]), false).unwrap();
    }
    for call in [3, 8] {
        assert_eq!(two.backward(call, array(&[2, 4])).unwrap(), None);
    }
    let once = one.take_gradient().unwrap();
    let twice: Vec<f32> = once.iter().map(|x| x + x).collect();
    assert_eq!(two.take_gradient().unwrap(), twice);
}

/// Passes begun on different weights, forward and backward interleaved, with loads in between: the
/// very thing that PyTorch's guide fails at with two trainers.
#[test]
fn passes_keep_the_weights_and_graphs_that_they_began_with() {
    let device = default_device();
    let mut model = LocalModel::new(ConvNet::init(1, &device), &device).unwrap();
    let weights = model.weights().unwrap();
    let batch = random_images(2, 3);
    let images = batch.images_on(&device);
    let mut expected = Vec::new();
    let mut passes = Vec::new();
    for clock in 0..3 {
        let scaled: Vec<f32> = weights.iter().map(|w| w * (1.0 + clock as f32)).collect();
        model.load(&scaled).unwrap();
        let seed = StepSeed::default();
        expected.push(through_a_pass(&model, &batch, seed, &device));
        let mut pass = model.begin(seed).unwrap();
        let output = pass.forward(0, images.to_array(), false).unwrap();
        passes.push((pass, output));
    }
    model.load(&vec![0.0; weights.len()]).unwrap();
    for ((mut pass, output), (loss, expected)) in passes.into_iter().zip(expected).rev() {
        let mut seams = Seams::new();
        let (_, output): (_, Tensor<2>) = seams.cross(images.clone(), output).unwrap();
        let got = nll_loss(output, batch.labels_on(&device.clone().autodiff()));
        go_back(&mut seams, &got, |_, gradient| pass.backward(0, gradient));
        assert_eq!(got.into_scalar::<f32>(), loss);
        assert!(pass.take_gradient().unwrap() == expected);
    }
}

/// PT-7
#[test]
fn inference_switches_dropout_off_and_each_call_draws_its_own() {
    let device = default_device();
    let model = LocalModel::new(Net::init(1, &device), &device).unwrap();
    let images = random_images(1, 1).images_on(&device).to_array();
    let infer = || model.infer(images.clone()).unwrap();
    assert_eq!(infer(), infer());
    let seed = |clock| StepSeed {
        clock,
        ..StepSeed::default()
    };
    let output = |clock, call| {
        let mut pass = model.begin(seed(clock)).unwrap();
        pass.forward(call, images.clone(), false).unwrap()
    };
    assert_eq!(output(0, 0), output(0, 0));
    assert_eq!(output(0, 1), output(0, 1));
    assert_ne!(output(0, 0), output(1, 0));
    assert_ne!(output(0, 0), output(0, 1));
    assert_ne!(output(0, 0), infer());
}
