//! How a training ends before all its steps are taken: by a signal, because its evaluations say so, or because somebody asks
//! for it.

use std::cell::Cell;
use std::pin::pin;

use futures_util::future::select;
use ps_actors::ids::Version;
use ps_actors::launch::StopSignal;
use tokio::sync::watch;

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

/// Whether the program has ended the training: by a condition that an evaluation met, or because it was asked to end. It is
/// kept as long as the training runs, even when servers are lost.
#[derive(Default)]
pub(crate) struct Ending {
    /// The version whose evaluation met a condition.
    met_at: Cell<Option<Version>>,
    is_asked: Cell<bool>,
    is_set: watch::Sender<bool>,
}

impl Ending {
    /// Returns the version whose evaluation met a condition.
    pub(super) fn met_at(&self) -> Option<Version> {
        self.met_at.get()
    }

    /// Whether somebody has asked for the end.
    pub(super) fn is_asked(&self) -> bool {
        self.is_asked.get()
    }

    pub(super) fn is_set(&self) -> bool {
        *self.is_set.borrow()
    }

    /// Ends the training, because somebody asks for it.
    pub(crate) fn ask(&self) {
        self.is_asked.set(true);
        self.is_set.send_replace(true);
    }

    /// Shows an evaluation to all conditions, until one is met.
    pub(super) fn look(&self, point: &CurvePoint, conditions: &mut [StopWhen]) {
        if self.met_at.get().is_some() {
            return;
        }
        // Each condition sees each evaluation.
        let met = conditions.iter_mut().map(|is_met| is_met(point));
        if met.fold(false, |any, is_met| any | is_met) {
            let version = point.version;
            tracing::info!(%version, "ending: the evaluation met the condition for it");
            self.met_at.set(Some(version));
            self.is_set.send_replace(true);
        }
    }

    async fn wait(&self) {
        let mut is_set = self.is_set.subscribe();
        // The sender is here, so it cannot fail.
        let _ = is_set.wait_for(|&is_set| is_set).await;
    }
}

/// Waits until a signal or the program ends the training.
pub(super) async fn must_stop(signal: Option<&StopSignal>, ending: &Ending) {
    select(pin!(signalled(signal)), pin!(ending.wait())).await;
}

/// Waits until a signal ends the training.
pub(super) async fn signalled(signal: Option<&StopSignal>) {
    match signal {
        Some(signal) => _ = signal.wait().await,
        None => std::future::pending().await,
    }
}
