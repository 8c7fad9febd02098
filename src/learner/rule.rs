//! burn's learner as the update rule of a server.
//!
//! A server's weights and the learner's model are the same numbers. An update is what burn's own loop does after a
//! step: a step of the scheduler, and a step of the optimizer with the combined gradient. So whatever the learner
//! has works here, such as groups of parameters, an optimizer that is not elementwise, or a model's own
//! `TrainStep::optimize`. What the optimizer remembers is in the learner, where burn's checkpoints take it from.

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use burn::train::{Learner, LearnerModel};
use ps_actors::rule::UpdateRule;
use ps_model::FlatView;

use super::source::lock;

/// The update rule of the only server of a training.
pub(super) struct LearnerRule<M: LearnerModel> {
    learner: Arc<Mutex<Learner<M>>>,
    view: FlatView,
}

impl<M: LearnerModel> LearnerRule<M> {
    /// `view` is that of the learner's model.
    pub(super) fn new(learner: &Arc<Mutex<Learner<M>>>, view: FlatView) -> Self {
        Self {
            learner: Arc::clone(learner),
            view,
        }
    }

    /// Makes an update. Returns the new weights.
    fn step(&self, gradient: &[f32]) -> Vec<f32> {
        let mut learner = lock(&self.learner);
        let gradients = self.view.gradients_by_parameter(&learner.model(), gradient);
        learner.lr_step();
        learner.optimizer_step(gradients);
        let weights = self.view.read_weights(&learner.model());
        if !self.view.tied().is_empty() {
            // burn's optimizers have changed the first field of each parameter only (M-7).
            let read = |range: Range<usize>| weights[range].to_vec();
            let model = self.view.write_weights(learner.model(), read);
            let model = model.expect("there is a number for each weight");
            learner.load_model(model.into_record());
        }
        weights
    }
}

impl<M: LearnerModel> UpdateRule for LearnerRule<M> {
    fn update(&mut self, weights: &mut [f32], gradient: &[f32], _: f64) {
        weights.copy_from_slice(&self.step(gradient));
    }

    fn update_into(&mut self, _: &[f32], gradient: &[f32], _: f64, next: &mut [f32]) {
        next.copy_from_slice(&self.step(gradient));
    }
}

impl<M: LearnerModel> fmt::Debug for LearnerRule<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the optimizer of burn's learner")
    }
}
