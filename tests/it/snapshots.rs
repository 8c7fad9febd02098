//! A model's tensors use the memory of the snapshot that they were loaded from.

use ps::model::FlatView;
use ps::model::burn::module::{Module, ModuleMapper, Param};
use ps::model::burn::tensor::Tensor;
use ps::prelude::*;

/// Doubles all parameters: in place, where a tensor has its memory for itself.
struct Doubles;

impl ModuleMapper for Doubles {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|tensor| tensor.mul_scalar(2.0).detach())
    }
}

/// PS-5: a snapshot never changes, whatever is done with the model. With several servers, some parameters are in pieces.
#[test]
fn what_changes_a_models_tensors_does_not_change_the_snapshot() {
    let device = select_device(default_device_name()).unwrap();
    let initial = initial_weights(&ConvNet::init(2, &device), &device).unwrap();
    for num_servers in [1, 3] {
        let config = ServerConfig::default();
        let rule = |_| -> Box<dyn UpdateRule> { Box::new(Sgd::new()) };
        let servers = ServerGroup::spawn(&initial, num_servers, config, rule).unwrap();
        let weights = run(servers.pull(PullVersion::Latest)).unwrap();
        let untrained = ConvNet::init(1, &device);
        let model = model_with_weights(&untrained, &device, &weights).unwrap();
        let model = model.map(&mut Doubles);
        let doubled: Vec<f32> = initial.to_vec().iter().map(|weight| 2.0 * weight).collect();
        let view = FlatView::new(&untrained).unwrap();
        assert_eq!(view.read_weights(&model), doubled);
        assert_eq!(weights.to_vec(), initial.to_vec());
    }
}

/// Counts the tensors whose memory lies within a snapshot's.
#[cfg(feature = "flex")]
struct Places<'a> {
    snapshot: &'a Weights,
    num_within: usize,
}

#[cfg(feature = "flex")]
impl ModuleMapper for Places<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|tensor| {
            let device = tensor.device();
            // On this backend, nothing is copied if the tensor has its memory for itself.
            let data = tensor.into_data();
            let place = data.as_slice::<f32>().unwrap().as_ptr();
            let segments = self.snapshot.segments().iter();
            let is_within = segments.map(|segment| segment.data().as_ptr_range());
            self.num_within += usize::from({ is_within }.any(|range| range.contains(&place)));
            Tensor::from_data(data, &device)
        })
    }
}

#[cfg(feature = "flex")]
#[test]
fn on_the_cpu_no_parameter_is_copied() {
    let device = select_device("flex").unwrap();
    let model = ConvNet::init(1, &device);
    let snapshot = initial_weights(&model, &device).unwrap();
    let mut places = Places {
        snapshot: &snapshot,
        num_within: 0,
    };
    let loaded = model_with_weights(&model, &device, &snapshot).unwrap();
    loaded.map(&mut places);
    assert_eq!(places.num_within, snapshot.layout().parameters().len());
}
