//! The calls to a training, as long as it listens.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::mpsc;

use super::{Asked, Can, Controls, MAX_WAITING};

/// Gets what is asked through [`Controls`]. When it is dropped, calls fail.
#[derive(Debug)]
pub(super) struct Inbox {
    pub(super) pause: Pause,
    asked: mpsc::Receiver<Asked>,
}

/// Whether a training is paused. The [`Controls`] show it as long as no other training listens.
#[derive(Clone, Debug)]
pub(crate) struct Pause {
    controls: Controls,
    /// The number of the training among those that listened.
    number: u64,
    is_on: Arc<AtomicBool>,
}

impl Pause {
    pub(super) fn is_on(&self) -> bool {
        self.is_on.load(Ordering::SeqCst)
    }

    /// Returns whether it was on before.
    pub(super) fn set(&self, is_on: bool) -> bool {
        let mut shared = self.controls.lock();
        if shared.number == self.number {
            shared.is_paused = is_on;
        }
        self.is_on.swap(is_on, Ordering::SeqCst)
    }
}

impl Inbox {
    /// From now on the controls are those of this training.
    pub(super) fn open(controls: &Controls, can: Can) -> Self {
        let (sender, asked) = mpsc::channel(MAX_WAITING);
        let mut shared = controls.lock();
        shared.sender = Some(sender);
        (shared.is_paused, shared.can) = (false, can);
        shared.number += 1;
        let pause = Pause {
            controls: controls.clone(),
            number: shared.number,
            is_on: Arc::default(),
        };
        Self { pause, asked }
    }

    /// Says that the consistency mode can be changed.
    pub(super) fn can_change_consistency(&self) {
        let mut shared = self.pause.controls.lock();
        if shared.number == self.pause.number {
            shared.can.change_consistency = true;
        }
    }

    /// Waits for the next call. `None` if another training listens now.
    pub(super) async fn next(&mut self) -> Option<Asked> {
        self.asked.recv().await
    }

    /// Returns the next call, if there is one already.
    pub(super) fn next_that_waits(&mut self) -> Option<Asked> {
        self.asked.try_recv().ok()
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        let mut shared = self.pause.controls.lock();
        // Another training may have begun to listen.
        if shared.number == self.pause.number {
            (shared.sender, shared.is_paused, shared.has_ended) = (None, false, true);
        }
    }
}
