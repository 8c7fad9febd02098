//! Layout, reading and writing of flat weights and gradients.

use ps_model::burn;
use ps_model::burn::module::{Module, Param};
use ps_model::burn::nn::{Linear, LinearConfig, LinearLayout};
use ps_model::burn::tensor::{FloatDType, Tensor};
use ps_model::{ConvNet, FlatError, FlatView, Net, Rng, seeded};

use crate::support::{default_device, on_each_device};

fn view<M: Module>(model: &M) -> FlatView {
    FlatView::new(model).expect("a model with a flat view")
}

fn read_weights<M: Module>(model: &M) -> Vec<f32> {
    view(model).read_weights(model)
}

fn names_and_shapes<M: Module>(model: &M) -> Vec<(String, Vec<usize>)> {
    let specs = view(model).parameters().to_vec();
    let mut end = 0;
    for spec in &specs {
        assert_eq!(spec.range.start, end, "ranges follow each other");
        assert_eq!(spec.range.len(), spec.shape.iter().product::<usize>());
        end = spec.range.end;
    }
    assert_eq!(end, model.num_params());
    specs.into_iter().map(|s| (s.name, s.shape)).collect()
}

#[test]
fn the_layout_of_convnet_is_that_of_its_fields() {
    let model = ConvNet::init(0, &default_device().autodiff());
    assert_eq!(model.num_params(), 1_960);
    let expected: [(&str, &[usize]); 4] = [
        ("conv1.weight", &[3, 1, 3, 3]),
        ("conv1.bias", &[3]),
        ("fc.weight", &[192, 10]),
        ("fc.bias", &[10]),
    ];
    assert_eq!(
        names_and_shapes(&model),
        expected.map(|(n, s)| (n.to_owned(), s.to_vec()))
    );
}

#[test]
fn the_layout_of_net_is_that_of_its_fields() {
    let model = Net::init(0, &default_device().autodiff());
    assert_eq!(model.num_params(), 1_199_882);
    let expected: [(&str, &[usize]); 8] = [
        ("conv1.weight", &[32, 1, 3, 3]),
        ("conv1.bias", &[32]),
        ("conv2.weight", &[64, 32, 3, 3]),
        ("conv2.bias", &[64]),
        ("fc1.weight", &[9216, 128]),
        ("fc1.bias", &[128]),
        ("fc2.weight", &[128, 10]),
        ("fc2.bias", &[10]),
    ];
    assert_eq!(
        names_and_shapes(&model),
        expected.map(|(n, s)| (n.to_owned(), s.to_vec()))
    );
}

#[test]
fn initial_weights_have_the_same_bits_on_every_device() {
    let reference = read_weights(&ConvNet::init(9, &default_device()));
    on_each_device(|name, device| {
        let weights = read_weights(&ConvNet::init(9, device));
        assert!(weights == reference, "{name}");
        assert!(
            weights != read_weights(&ConvNet::init(10, device)),
            "{name}"
        );
    });
}

#[test]
fn initial_weights_fill_the_range_of_the_fan_in() {
    let weights = read_weights(&ConvNet::init(1, &default_device()));
    for (range, fan_in) in [(0..30, 9.0_f32), (30..1960, 192.0)] {
        let bound = 1.0 / fan_in.sqrt();
        let largest = weights[range].iter().fold(0.0, |a: f32, x| a.max(x.abs()));
        assert!(largest <= bound && largest > 0.8 * bound, "{largest}");
    }
}

#[test]
fn weights_that_were_written_are_read_back_in_their_places() {
    on_each_device(|name, device| {
        let device = device.clone().autodiff();
        let model = ConvNet::init(0, &device);
        let ids = burn::module::ParamGroup::ids_from_module(model.clone());
        let weights: Vec<f32> = (0..1_960).map(|i| i as f32).collect();
        // In two pieces, cut inside a parameter, as from two servers.
        let (first, second) = weights.split_at(1_000);
        let view = view(&model);
        let written = view.write_weights(model, |range| {
            let first = &first[range.start.min(1_000)..range.end.min(1_000)];
            let second = &second[range.start.max(1_000) - 1_000..range.end.max(1_000) - 1_000];
            [first, second].concat()
        });
        let model = written.expect("the right number of weights");
        assert!(view.read_weights(&model) == weights, "{name}");

        let now = burn::module::ParamGroup::ids_from_module(model.clone());
        assert_eq!(format!("{ids:?}"), format!("{now:?}"), "{name}: ids stay");
        assert_eq!(FlatView::new(&model), Ok(view), "{name}: still trainable");
    });
}

#[test]
fn a_wrong_number_of_weights_is_refused() {
    let write = |extra: fn(&mut Vec<f32>)| {
        let model = ConvNet::init(0, &default_device());
        view(&model).write_weights(model, |range| {
            let mut values = vec![1.0; range.len()];
            if range.start == 27 {
                extra(&mut values);
            }
            values
        })
    };
    write(|_| ()).expect("the right number");
    for (extra, got) in [
        ((|out| out.push(0.0)) as fn(&mut Vec<f32>), 4),
        (|out| out.truncate(2), 2),
        (Vec::clear, 0),
    ] {
        let error = write(extra).expect_err("a wrong number");
        assert_eq!(error, FlatError::WrongCount { range: 27..30, got });
        assert_eq!(
            error.to_string(),
            format!("weights 27..30 have 3 numbers, got {got}")
        );
    }
}

/// The numbers of a weight matrix do not depend on how burn stores it.
#[test]
fn a_linear_layer_in_column_layout_computes_the_same_after_a_round_trip() {
    on_each_device(|name, device| {
        let linear = LinearConfig::new(3, 2)
            .with_layout(LinearLayout::Col)
            .init(device);
        let view = view(&linear);
        assert_eq!(view.parameters()[0].shape, [3, 2]);
        let x = Tensor::<2>::from_floats([[1.0, -2.0, 3.0]], device);
        let before = linear.forward(x.clone()).into_data();
        let weights = read_weights(&linear);
        let linear = view
            .write_weights(linear, |range| weights[range].to_vec())
            .expect("the right number of weights");
        let after = linear.forward(x).into_data();
        after.assert_approx_eq::<f32>(&before, burn::tensor::Tolerance::absolute(1e-6));
        assert_eq!(read_weights(&linear), weights, "{name}");
    });
}

#[derive(Module, Debug)]
struct Three {
    used: Linear,
    frozen: Linear,
    unused: Linear,
}

#[test]
fn the_gradient_is_of_what_is_trainable_and_zero_where_it_had_no_part() {
    on_each_device(|name, device| {
        let device = device.clone().autodiff();
        let rng = &mut Rng::new(4);
        let model = Three {
            used: seeded::linear(rng, [2, 1], &device),
            frozen: seeded::linear(rng, [1, 1], &device).no_grad(),
            unused: seeded::linear(rng, [2, 2], &device),
        };
        let view = view(&model);
        let names: Vec<&str> = view.parameters().iter().map(|s| s.name.as_str()).collect();
        let expected = ["used.weight", "used.bias", "unused.weight", "unused.bias"];
        assert_eq!(names, expected);

        let x = Tensor::<2>::from_floats([[2.0, 3.0]], &device);
        let loss = model.frozen.forward(model.used.forward(x)).sum();
        let mut gradient = vec![9.0; view.num_weights()];
        view.read_gradients(&model, loss.backward(), &mut gradient);

        let slope = model.frozen.weight.val().into_scalar::<f32>();
        let expected = [&[2.0 * slope, 3.0 * slope, slope] as &[f32], &[0.0; 6]];
        // Each number is one product, or two where a backend folds differently.
        let expected = expected.concat();
        assert_eq!(gradient.len(), expected.len());
        for (got, expected) in gradient.iter().zip(expected) {
            assert!((got - expected).abs() < 1e-6, "{name}: {gradient:?}");
        }
    });
}

#[derive(Module, Debug)]
struct Pair {
    first: Param<Tensor<1>>,
    second: Param<Tensor<1>>,
}

#[derive(Module, Debug)]
struct Nothing {
    size: usize,
}

#[test]
fn modules_that_have_no_flat_view_are_refused_by_name() {
    let device = default_device();
    let numbers = || Tensor::<1>::from_floats([1.0, 2.0], &device);

    let double = Pair {
        first: Param::from_tensor(numbers()),
        second: Param::from_tensor(numbers().cast(FloatDType::F64)),
    };
    let (name, dtype) = ("second".to_owned(), "f64".to_owned());
    assert_eq!(
        FlatView::new(&double),
        Err(FlatError::ElementType { name, dtype })
    );

    assert_eq!(FlatView::new(&Nothing { size: 3 }), Err(FlatError::Empty));
    let frozen = ConvNet::init(1, &device).freeze();
    let (first, count) = ("conv1.weight".to_owned(), 4);
    for frozen in [frozen.valid(), frozen] {
        let (first, count) = (first.clone(), count);
        assert_eq!(
            FlatView::new(&frozen),
            Err(FlatError::NothingTrainable { first, count })
        );
    }
}
