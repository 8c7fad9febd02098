//! The calls to a training, as long as it listens.

use tokio::sync::mpsc;

use super::{Asked, Can, Controls, MAX_WAITING};

/// Gets what is asked through [`Controls`]. When it is dropped, calls fail.
#[derive(Debug)]
pub(super) struct Inbox {
    pub(super) controls: Controls,
    asked: mpsc::Receiver<Asked>,
}

impl Inbox {
    /// From now on the controls are those of this training.
    pub(super) fn open(controls: &Controls, can: Can) -> Self {
        let (sender, asked) = mpsc::channel(MAX_WAITING);
        let mut shared = controls.lock();
        shared.sender = Some(sender);
        (shared.is_paused, shared.can) = (false, can);
        drop(shared);
        Self {
            controls: controls.clone(),
            asked,
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

    pub(super) fn set_paused(&self, is_paused: bool) {
        self.controls.lock().is_paused = is_paused;
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        let mut shared = self.controls.lock();
        // Another training may have begun to listen: then the other end is not closed.
        self.asked.close();
        let is_ours = shared
            .sender
            .as_ref()
            .is_some_and(tokio::sync::mpsc::Sender::is_closed);
        if is_ours {
            (shared.sender, shared.is_paused, shared.has_ended) = (None, false, true);
        }
    }
}
