//! What the observer's thread and the server share: the state, and its latest text.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::sync::{Semaphore, watch};

use super::MetricsText;
use super::guard::Guard;
use super::state::State;
use super::view::{Control, View};
use crate::controls::Controls;

/// How often clients get a new state, if there is one.
const TICK: Duration = Duration::from_millis(400);

/// How often clients get the state even if nothing has changed, so that both sides know that the connection
/// lives.
const HEARTBEAT: Duration = Duration::from_secs(5);

/// How many clients may get the stream of events.
pub(super) const MAX_STREAMS: usize = 32;

/// The state of the dashboard of one run.
pub(super) struct Shared {
    pub(super) guard: Guard,
    pub(super) controls: Controls,
    pub(super) metrics: Option<MetricsText>,
    /// Names this run, so that a client knows whether it connects to the same one again.
    pub(super) run: String,
    state: Mutex<State>,
    latest: watch::Sender<Published>,
    pub(super) streams: Arc<Semaphore>,
    is_closed: watch::Sender<bool>,
}

/// The state as text.
#[derive(Clone, Debug, Default)]
pub(super) struct Published {
    /// Rises with each text.
    pub(super) number: u64,
    pub(super) view: Arc<str>,
    pub(super) is_last: bool,
    /// What it was made from.
    revision: u64,
    control: Control,
}

impl Shared {
    pub(super) fn new(guard: Guard, controls: Controls, metrics: Option<MetricsText>) -> Self {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        Self {
            guard,
            controls,
            metrics,
            run: format!("{:x}{:x}", now.as_micros(), std::process::id()),
            state: Mutex::default(),
            latest: watch::Sender::new(Published::default()),
            streams: Arc::new(Semaphore::new(MAX_STREAMS)),
            is_closed: watch::Sender::new(false),
        }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn control(&self) -> Control {
        Control {
            is_allowed: self.guard.token.is_some(),
            is_running: self.controls.is_running(),
            is_paused: self.controls.is_paused(),
            saves_checkpoints: self.controls.saves_checkpoints(),
            changes_consistency: self.controls.changes_consistency(),
            removes_workers: self.controls.removes_workers(),
            can_end: self.controls.can_end(),
        }
    }

    /// Writes the state of now.
    pub(super) fn view(&self) -> String {
        let control = self.control();
        let state = self.state();
        // Nothing in it can fail to be written.
        serde_json::to_string(&View::of(&state, control)).unwrap_or_default()
    }

    pub(super) fn latest(&self) -> watch::Receiver<Published> {
        self.latest.subscribe()
    }

    /// Gives the state of now to all clients.
    pub(super) fn publish(&self) {
        let (view, control) = (self.view(), self.control());
        let (revision, is_closed) = (self.state().revision, *self.is_closed.borrow());
        self.latest.send_modify(|latest| {
            *latest = Published {
                number: latest.number + 1,
                view: view.into(),
                is_last: is_closed,
                revision,
                control,
            };
        });
    }

    /// Gives the state to clients again and again. Does nothing while there are none.
    pub(super) async fn tick(&self) {
        let mut published = Instant::now();
        loop {
            tokio::time::sleep(TICK).await;
            if self.latest.receiver_count() == 0 {
                continue;
            }
            let is_new = {
                let latest = self.latest.borrow();
                latest.number == 0
                    || latest.revision != self.state().revision
                    || latest.control != self.control()
            };
            if is_new || published.elapsed() >= HEARTBEAT {
                self.publish();
                published = Instant::now();
            }
        }
    }

    /// Says that no more events come.
    pub(super) fn close(&self) {
        self.is_closed.send_replace(true);
    }

    pub(super) async fn closed(&self) {
        // The sender is in `self`, so it does not end before.
        let _ = self
            .is_closed
            .subscribe()
            .wait_for(|&is_closed| is_closed)
            .await;
    }

    pub(super) async fn all_streams_ended(&self) {
        // It is never closed.
        let _ = self.streams.acquire_many(MAX_STREAMS as u32).await;
    }
}
