//! The observers of one run: a thread and a queue for each.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ps_actors::actor::error_chain;
use ps_actors::ids::Version;
use ps_actors::weights::GradientUpdate;

use super::Observer;
use super::event::{Event, RunStarted, Settings, SettledStep, Versions};
use super::queue::Queue;
use super::summary::RunEnded;

/// How long the end of a run waits for observers that still handle events.
const PATIENCE: Duration = Duration::from_secs(10);

/// The observers of one run. A clone is another handle to them.
///
/// [`Trainer`](crate::Trainer) makes them itself. A driver's own loop tells them what happens:
///
/// ```
/// use std::sync::mpsc;
///
/// use ps::observe::{Event, Observers, Settings};
/// use ps::prelude::Version;
///
/// let (sender, events) = mpsc::channel();
/// let print = move |event: &Event| _ = sender.send(event.time());
/// let observers = Observers::start(vec![Box::new(print)]);
/// observers.run_started(Settings::default(), Version(0));
/// // The loop is here.
/// observers.run_ended();
/// assert_eq!(events.iter().count(), 2);
/// ```
#[derive(Clone)]
pub struct Observers {
    /// `None` if there are none.
    inner: Option<Arc<Inner>>,
    began: Instant,
}

struct Inner {
    queues: Vec<Arc<Queue>>,
    /// Each observer's thread drops its sender at its end.
    ended: Mutex<Vec<Receiver<()>>>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.queues.iter().for_each(|queue| queue.close());
    }
}

impl Observers {
    /// Starts a thread for each observer. The run begins now.
    #[must_use]
    pub fn start(observers: Vec<Box<dyn Observer>>) -> Self {
        let mut inner = Inner {
            queues: Vec::new(),
            ended: Mutex::default(),
        };
        for observer in observers {
            let (queue, (ends, ended)) = (Arc::new(Queue::default()), sync_channel(0));
            let thread = std::thread::Builder::new().name("observer".to_owned());
            let its_queue = Arc::clone(&queue);
            let started = thread.spawn(move || observe(observer, &its_queue, ends));
            match started {
                Ok(_) => {
                    inner.queues.push(queue);
                    let all = inner.ended.get_mut();
                    all.unwrap_or_else(PoisonError::into_inner).push(ended);
                }
                Err(error) => {
                    tracing::warn!(%error, "an observer gets no thread; the training goes on without it");
                }
            }
        }
        Self {
            inner: (!inner.queues.is_empty()).then(|| Arc::new(inner)),
            began: Instant::now(),
        }
    }

    /// Makes the observers of a run that nobody observes.
    #[must_use]
    pub fn none() -> Self {
        Self {
            inner: None,
            began: Instant::now(),
        }
    }

    /// Whether nobody observes. Then events need not be made.
    #[must_use]
    pub fn is_nobody(&self) -> bool {
        self.inner.is_none()
    }

    /// Returns the time since the run began, in seconds.
    #[must_use]
    pub fn seconds(&self) -> f64 {
        self.began.elapsed().as_secs_f64()
    }

    /// Tells all observers of an event. Never blocks.
    pub fn tell(&self, event: Event) {
        if let Some(inner) = &self.inner {
            let event = Arc::new(event);
            inner.queues.iter().for_each(|queue| queue.push(&event));
        }
    }

    /// Tells all observers of the event that `make` makes, which gets the time since the run began.
    /// Does nothing if nobody observes.
    pub fn tell_with(&self, make: impl FnOnce(f64) -> Event) {
        if !self.is_nobody() {
            self.tell(make(self.seconds()));
        }
    }

    /// Tells all observers that the run began, with these settings, from the weights of `first_version`.
    pub fn run_started(&self, settings: Settings, first_version: Version) {
        self.tell_with(|_| {
            let now = SystemTime::now().duration_since(UNIX_EPOCH);
            let unix_time = now.unwrap_or_default().saturating_sub(self.began.elapsed());
            Event::RunStarted(Box::new(RunStarted {
                time: 0.0,
                unix_time: unix_time.as_secs_f64(),
                settings,
                versions: Versions::here(),
                first_version,
            }))
        });
    }

    /// Tells all observers that a driver's own loop has applied these gradients, in the update that made
    /// `version`.
    pub fn applied(&self, gradients: &[GradientUpdate], version: Version) {
        for gradient in gradients {
            self.tell_with(|time| Event::Step(SettledStep::applied(time, gradient, version)));
        }
    }

    /// Tells all observers that a driver's own loop has ended without an error, and [finishes](Self::finish).
    pub fn run_ended(self) {
        self.end(None);
    }

    /// Tells all observers that a driver's own loop has ended with this error, and [finishes](Self::finish). The
    /// observers get the error with all causes.
    pub fn run_failed(self, error: &(dyn std::error::Error + 'static)) {
        self.end(Some(error_chain(error)));
    }

    fn end(self, error: Option<String>) {
        self.tell_with(|time| Event::RunEnded(Box::new(RunEnded::new(time, error))));
        self.finish();
    }

    /// Says that no more events come, and waits until the observers have handled those that wait, but no
    /// longer than 10 s. An observer that needs longer is left behind on its thread.
    pub fn finish(self) {
        let Some(inner) = &self.inner else { return };
        inner.queues.iter().for_each(|queue| queue.close());
        let deadline = Instant::now() + PATIENCE;
        let ended = inner.ended.lock();
        for ended in ended.unwrap_or_else(PoisonError::into_inner).drain(..) {
            let left = deadline.saturating_duration_since(Instant::now());
            if let Err(RecvTimeoutError::Timeout) = ended.recv_timeout(left) {
                tracing::warn!("an observer has not handled all events within {PATIENCE:?}");
            }
        }
    }
}

impl fmt::Debug for Observers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let num = self.inner.as_ref().map_or(0, |inner| inner.queues.len());
        f.debug_struct("Observers")
            .field("num_observers", &num)
            .finish_non_exhaustive()
    }
}

/// Gives all events to an observer. One that panics gets no more. `ends` is dropped last.
fn observe(mut observer: Box<dyn Observer>, queue: &Queue, ends: SyncSender<()>) {
    while let Some(event) = queue.pop() {
        let handled = catch_unwind(AssertUnwindSafe(|| observer.observe(&event)));
        if handled.is_err() {
            tracing::warn!("an observer panicked and gets no more events; the training goes on");
            queue.abandon();
            break;
        }
    }
    // It may write the rest of its files now.
    if catch_unwind(AssertUnwindSafe(|| drop(observer))).is_err() {
        tracing::warn!("an observer panicked at its end");
    }
    drop(ends);
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    fn end(observers: &Observers) -> Event {
        Event::RunEnded(Box::new(super::super::RunEnded::new(
            observers.seconds(),
            None,
        )))
    }

    #[test]
    fn a_panic_of_one_observer_harms_no_other() {
        let (sender, events) = mpsc::channel();
        let panics = |_: &Event| panic!("on purpose");
        let goes_on = move |event: &Event| sender.send(event.clone()).unwrap();
        let observers = Observers::start(vec![Box::new(panics), Box::new(goes_on)]);
        for _ in 0..100 {
            observers.run_started(Settings::default(), Version(0));
        }
        observers.tell(end(&observers));
        observers.finish();
        assert_eq!(events.iter().count(), 101);
    }

    #[test]
    fn the_end_waits_until_observers_have_dropped_what_they_own() {
        struct SlowEnd(mpsc::Sender<()>);
        impl Observer for SlowEnd {
            fn observe(&mut self, _: &Event) {}
        }
        impl Drop for SlowEnd {
            fn drop(&mut self) {
                self.0.send(()).unwrap();
            }
        }
        for _ in 0..100 {
            let (sender, dropped) = mpsc::channel();
            let observers = Observers::start(vec![Box::new(SlowEnd(sender))]);
            observers.tell(end(&observers));
            observers.finish();
            dropped.try_recv().expect("it was dropped before the end");
        }
    }

    #[test]
    fn nobody_is_told_nothing() {
        let observers = Observers::start(Vec::new());
        assert!(observers.is_nobody());
        observers.tell_with(|_| unreachable!("nobody observes"));
        observers.finish();
    }
}
