//! The observers of one run: a thread and a queue for each.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ps_actors::actor::error_chain;
use ps_actors::ids::{GradientId, Version};
use ps_actors::weights::GradientUpdate;

use super::Observer;
use super::event::{Computed, Event, RunStarted, Settings, SettledStep, UpdateMade, Versions};
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
    /// Which of them get the events about each gradient.
    follow_gradients: Vec<bool>,
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
            follow_gradients: Vec::new(),
            ended: Mutex::default(),
        };
        for observer in observers {
            let (queue, (ends, ended)) = (Arc::new(Queue::default()), sync_channel(0));
            let thread = std::thread::Builder::new().name("observer".to_owned());
            let its_queue = Arc::clone(&queue);
            let asked = catch_unwind(AssertUnwindSafe(|| observer.follows_gradients()));
            let follows_gradients = asked.unwrap_or_else(|_| {
                tracing::warn!("an observer panicked and gets no events; the training goes on");
                queue.abandon();
                false
            });
            let started = thread.spawn(move || observe(observer, &its_queue, ends));
            match started {
                Ok(_) => {
                    inner.queues.push(queue);
                    inner.follow_gradients.push(follows_gradients);
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

    /// Whether an observer [follows each gradient](Observer::follows_gradients).
    #[must_use]
    pub fn follow_gradients(&self) -> bool {
        let inner = self.inner.iter();
        inner
            .flat_map(|inner| &inner.follow_gradients)
            .any(|&follows| follows)
    }

    /// Tells all observers of an event, or those that follow each gradient if it is about one. Never blocks.
    pub fn tell(&self, event: Event) {
        self.tell_all([event]);
    }

    /// Tells them of several events, as [`tell`](Self::tell) does.
    pub(super) fn tell_all(&self, events: impl IntoIterator<Item = Event>) {
        let Some(inner) = &self.inner else { return };
        let events: Vec<Arc<Event>> = events.into_iter().map(Arc::new).collect();
        for (queue, &follows) in inner.queues.iter().zip(&inner.follow_gradients) {
            let is_for_it = |event: &&Arc<Event>| follows || !event.is_about_each_gradient();
            queue.push(events.iter().filter(is_for_it));
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

    /// Says that a driver's own loop makes a call now. When it has the answer, say [what came of
    /// it](LoopCall). Only a trace needs it.
    ///
    /// ```
    /// use ps::observe::Observers;
    /// use ps::prelude::*;
    ///
    /// let device = select_device(default_device_name())?;
    /// let model = ConvNet::init(0, &device);
    /// let initial = initial_weights(&model, &device)?;
    /// let server = ParameterServer::new(&initial, Sgd::new(), ServerConfig::default())?.spawn()?;
    /// let config = WorkerConfig { worker: WorkerId(0), num_workers: 1, batch_size: 8, seed: 0 };
    /// let worker = spawn_worker(&model, &device, &Mnist::bundled_sample().train, config)?;
    ///
    /// let observers = Observers::none(); // Or those of `ShowArgs::observers`.
    /// let mut weights = server.ask(GetWeights).wait()?;
    /// for _ in 0..3 {
    ///     let call = observers.call_begins();
    ///     let gradient = worker.ask(ComputeGradients(weights)).flatten().wait()?;
    ///     call.computed(&gradient);
    ///     let call = observers.call_begins();
    ///     weights = server.ask(ApplyGradients::sum([gradient.clone()])).flatten().wait()?;
    ///     call.applied(&[gradient], weights.version());
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn call_begins(&self) -> LoopCall {
        LoopCall {
            // Nobody reads the clock for those who do not want to know.
            began: self.follow_gradients().then(|| self.seconds()),
            observers: self.clone(),
        }
    }

    /// Tells all observers that a driver's own loop has applied these gradients, in the update that made
    /// `version`. [`LoopCall::applied`] also tells how long the call took.
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

/// A call that a driver's own loop has begun; see [`Observers::call_begins`].
#[derive(Debug)]
#[must_use = "say what came of the call"]
pub struct LoopCall {
    observers: Observers,
    /// `None` if nobody follows each gradient.
    began: Option<f64>,
}

impl LoopCall {
    /// Tells the observers that a worker has computed this gradient. The loop takes its answer now.
    pub fn computed(self, gradient: &GradientUpdate) {
        self.tell(|time, seconds| {
            let GradientId {
                worker,
                incarnation,
                clock,
            } = gradient.id;
            Event::Computed(Computed {
                time,
                seconds,
                worker,
                incarnation,
                clock,
                computed_on: gradient.computed_on,
            })
        });
    }

    /// Tells all observers that the servers have applied these gradients, in the update that made `version`, as
    /// [`Observers::applied`] does.
    pub fn applied(self, gradients: &[GradientUpdate], version: Version) {
        self.tell(|time, seconds| {
            Event::UpdateMade(UpdateMade {
                time,
                seconds,
                version,
                num_gradients: gradients.len(),
            })
        });
        self.observers.applied(gradients, version);
    }

    fn tell(&self, event: impl FnOnce(f64, f64) -> Event) {
        if let Some(began) = self.began {
            let time = self.observers.seconds();
            self.observers.tell(event(time, time - began));
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
    fn an_observer_that_panics_before_the_first_event_gets_none() {
        struct Panics;
        impl Observer for Panics {
            fn observe(&mut self, _: &Event) {
                panic!("it gets no event");
            }
            fn follows_gradients(&self) -> bool {
                panic!("on purpose")
            }
        }
        let (sender, events) = mpsc::channel();
        let goes_on = move |event: &Event| sender.send(event.clone()).unwrap();
        let observers = Observers::start(vec![Box::new(Panics), Box::new(goes_on)]);
        assert!(!observers.follow_gradients());
        observers.tell(end(&observers));
        observers.finish();
        assert_eq!(events.iter().count(), 1);
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
    fn only_those_who_follow_each_gradient_learn_of_the_calls_of_a_loop() {
        use ps_actors::ids::{Clock, Incarnation, WorkerId};
        use ps_actors::weights::Gradient;

        struct Follows(mpsc::Sender<Event>);
        impl Observer for Follows {
            fn observe(&mut self, event: &Event) {
                self.0.send(event.clone()).unwrap();
            }
            fn follows_gradients(&self) -> bool {
                true
            }
        }
        let gradient = GradientUpdate {
            id: GradientId {
                worker: WorkerId(1),
                incarnation: Incarnation(2),
                clock: Clock(3),
            },
            computed_on: Version(4),
            loss: 0.5,
            num_examples: 6,
            gradient: Gradient::new(vec![1.0]),
        };
        let ((all, of_all), (some, of_some)) = (mpsc::channel(), mpsc::channel());
        let told = move |event: &Event| some.send(event.clone()).unwrap();
        let observers = Observers::start(vec![Box::new(told.clone())]);
        assert!(!observers.follow_gradients());
        let call = observers.call_begins();
        assert!(call.began.is_none(), "the clock is not read");
        call.computed(&gradient);
        observers.finish();
        assert!(of_some.try_recv().is_err());

        let observers = Observers::start(vec![Box::new(told), Box::new(Follows(all))]);
        assert!(observers.follow_gradients());
        observers.call_begins().computed(&gradient);
        let gradients = [gradient];
        observers.call_begins().applied(&gradients, Version(5));
        observers.finish();
        let all: Vec<Event> = of_all.iter().collect();
        let [
            Event::Computed(computed),
            Event::UpdateMade(made),
            Event::Step(step),
        ] = &all[..]
        else {
            panic!("{all:?}");
        };
        assert_eq!(computed.gradient(), gradients[0].id);
        assert_eq!(
            (step.gradient(), step.version),
            (gradients[0].id, Version(5))
        );
        assert_eq!((made.version, made.num_gradients), (Version(5), 1));
        let times = [
            computed.time,
            made.time - made.seconds,
            made.time,
            step.time,
        ];
        // The end is computed from the length, so it is rounded.
        assert!(times.is_sorted_by(|a, b| a <= &(b + 1e-9)), "{times:?}");
        let some: Vec<Event> = of_some.iter().collect();
        assert!(matches!(&some[..], [Event::Step(_)]), "{some:?}");
    }

    #[test]
    fn nobody_is_told_nothing() {
        let observers = Observers::start(Vec::new());
        assert!(observers.is_nobody());
        observers.tell_with(|_| unreachable!("nobody observes"));
        observers.finish();
    }
}
