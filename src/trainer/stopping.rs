//! How a training ends before all its steps are taken: by a signal, or because its evaluations say so.

use std::cell::Cell;
use std::pin::pin;

use futures_util::future::select;
use ps_actors::ids::Version;
use ps_actors::launch::StopSignal;
use tokio::sync::Notify;

use crate::report::CurvePoint;

/// Ends a training when the loss on the test data has stopped falling. See
/// [`Trainer::early_stopping`](crate::Trainer::early_stopping).
///
/// ```
/// use ps::trainer::EarlyStopping;
///
/// let mut stopping = EarlyStopping::new(2);
/// assert!(!stopping.must_stop(1.0));
/// assert!(!stopping.must_stop(0.8)); // Better.
/// assert!(!stopping.must_stop(0.9)); // Once worse.
/// assert!(stopping.must_stop(0.8)); // Twice in a row not better than 0.8.
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct EarlyStopping {
    patience: u32,
    min_improvement: f64,
    best: f64,
    num_in_vain: u32,
}

impl EarlyStopping {
    /// Ends the training when `patience` evaluations in a row were not better than the best one before
    /// them. The number 0 counts as 1.
    #[must_use]
    pub fn new(patience: u32) -> Self {
        Self {
            patience: patience.max(1),
            min_improvement: 0.0,
            best: f64::INFINITY,
            num_in_vain: 0,
        }
    }

    /// Counts an evaluation as better only if its loss is lower by more than this number. The default is 0.
    #[must_use]
    pub fn min_improvement(mut self, min_improvement: f64) -> Self {
        self.min_improvement = min_improvement;
        self
    }

    /// Takes the loss of the next evaluation. Returns whether the training must stop. A loss that is not a
    /// number is not better.
    pub fn must_stop(&mut self, loss: f64) -> bool {
        if loss < self.best - self.min_improvement {
            (self.best, self.num_in_vain) = (loss, 0);
        } else {
            self.num_in_vain += 1;
        }
        self.num_in_vain >= self.patience
    }
}

/// A condition that ends a training.
pub(super) type StopWhen = Box<dyn FnMut(&CurvePoint) -> bool>;

/// The version whose evaluation met a condition that ends the training. It is kept as long as the training
/// runs, even when servers are lost.
#[derive(Default)]
pub(super) struct Met {
    version: Cell<Option<Version>>,
    is_set: Notify,
}

impl Met {
    pub(super) fn version(&self) -> Option<Version> {
        self.version.get()
    }

    /// Shows an evaluation to all conditions, until one is met.
    pub(super) fn look(&self, point: &CurvePoint, conditions: &mut [StopWhen]) {
        if self.version.get().is_some() {
            return;
        }
        // Each condition sees each evaluation.
        let met = conditions.iter_mut().map(|is_met| is_met(point));
        if met.fold(false, |any, is_met| any | is_met) {
            let version = point.version;
            tracing::info!(%version, "ending: the evaluation met the condition for it");
            self.version.set(Some(version));
            self.is_set.notify_one();
        }
    }

    async fn wait(&self) {
        while self.version.get().is_none() {
            self.is_set.notified().await;
        }
    }
}

/// Waits until a signal or a condition ends the training.
pub(super) async fn must_stop(signal: Option<&StopSignal>, met: &Met) {
    let signal = pin!(async {
        match signal {
            Some(signal) => _ = signal.wait().await,
            None => std::future::pending().await,
        }
    });
    select(signal, pin!(met.wait())).await;
}
