//! Counts the connections of processes that ask to join and have not joined, so that a driver which ends waits until
//! they have their answers.

use std::sync::Arc;

use tokio::sync::watch;

/// The connections of processes that ask to join.
#[derive(Clone)]
pub(crate) struct Guests(Arc<watch::Sender<usize>>);

/// One such connection. It counts until it is dropped.
pub(crate) struct Guest(Guests);

impl Guests {
    pub(crate) fn new() -> Self {
        Self(Arc::new(watch::Sender::new(0)))
    }

    pub(crate) fn enter(&self) -> Guest {
        self.0.send_modify(|number| *number += 1);
        Guest(self.clone())
    }

    pub(crate) fn are_none(&self) -> bool {
        *self.0.borrow() == 0
    }

    /// Waits until there are none.
    pub(crate) async fn gone(&self) {
        // The sender lives as long as this.
        let _ = self.0.subscribe().wait_for(|number| *number == 0).await;
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.0.0.send_modify(|number| *number -= 1);
    }
}
