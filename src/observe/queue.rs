//! The events that wait for one observer: a bounded queue that never blocks the training.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::event::{Event, EventsSkipped};

/// How many events may wait. A [`Step`](Event::Step) takes about 200 bytes, which all observers share.
pub(super) const MAX_WAITING: usize = 1 << 16;

/// The events that wait for one observer. If it is so slow that [`MAX_WAITING`] events wait, further
/// steps are skipped and counted, and so are events that follow each gradient, and what is told again soon. Other events
/// are rare. They are skipped only if twice as many wait. The [end](Event::RunEnded) always fits, and nothing comes after
/// it.
#[derive(Debug, Default)]
pub(super) struct Queue {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Arc<Event>>,
    /// How many events were skipped since the last one that was taken in.
    num_skipped: u64,
    /// Whether no more events come.
    is_closed: bool,
    /// Whether somebody waits for an event.
    is_awaited: bool,
}

impl State {
    /// Adds an event, or counts it as skipped.
    fn push(&mut self, event: &Arc<Event>) {
        let limit = match **event {
            Event::Step(_) | Event::ServersSeen(_) | Event::Evaluating(_) => MAX_WAITING,
            ref event if event.is_about_each_gradient() => MAX_WAITING,
            Event::RunEnded(_) => usize::MAX,
            _ => 2 * MAX_WAITING,
        };
        if self.is_closed {
            return;
        }
        if self.waiting.len() >= limit {
            self.num_skipped += 1;
            return;
        }
        if self.num_skipped > 0 {
            let skipped = Event::EventsSkipped(EventsSkipped {
                time: event.time(),
                num_events: std::mem::take(&mut self.num_skipped),
            });
            self.waiting.push_back(Arc::new(skipped));
        }
        self.waiting.push_back(Arc::clone(event));
        // What somebody tells later, on another thread, came too late.
        self.is_closed = matches!(**event, Event::RunEnded(_));
    }
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, State> {
        // No code of others runs under the lock, so nothing is left half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds events, and counts those that it must skip. Whoever waits is woken once for all of them: a thread that sleeps
    /// after each of them costs the training a context switch each time.
    pub(super) fn push<'a>(&self, events: impl IntoIterator<Item = &'a Arc<Event>>) {
        let mut state = self.lock();
        events.into_iter().for_each(|event| state.push(event));
        let is_awaited = state.is_awaited && !state.waiting.is_empty();
        drop(state);
        if is_awaited {
            self.changed.notify_one();
        }
    }

    /// Returns the next event, as soon as there is one. `None` if no more come.
    pub(super) fn pop(&self) -> Option<Arc<Event>> {
        let mut state = self.lock();
        loop {
            if let Some(event) = state.waiting.pop_front() {
                return Some(event);
            }
            if state.is_closed {
                return None;
            }
            state.is_awaited = true;
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
            state.is_awaited = false;
        }
    }

    /// Says that no more events come. Those that wait can still be taken.
    pub(super) fn close(&self) {
        self.lock().is_closed = true;
        self.changed.notify_all();
    }

    /// Says that nobody takes events any more.
    pub(super) fn abandon(&self) {
        let mut state = self.lock();
        state.is_closed = true;
        state.waiting = VecDeque::new();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::super::event::{NodeLost, StepsMissed};
    use super::*;
    use ps_actors::cluster::NodeId;
    use ps_actors::ids::{Clock, WorkerId};

    fn seen(time: f64) -> Arc<Event> {
        Arc::new(Event::ServersSeen(super::super::event::ServersSeen {
            time,
            learning_rate: 0.1,
            consistency: String::new(),
            num_pending: 0,
            awaited: Vec::new(),
            members: Vec::new(),
            servers: Vec::new(),
            log: None,
        }))
    }

    fn missed(time: f64) -> Arc<Event> {
        Arc::new(Event::StepsMissed(StepsMissed {
            time,
            worker: WorkerId(0),
            first: Clock(0),
            num_steps: 1,
        }))
    }

    #[test]
    fn a_full_queue_skips_what_is_frequent_and_says_how_much() {
        let queue = Queue::default();
        let all: Vec<_> = (0..MAX_WAITING + 5)
            .map(|number| seen(number as f64))
            .collect();
        queue.push(&all);
        // What is rare is still taken in, after the number of those that were skipped.
        queue.push([&missed(-1.0)]);
        for number in 0..MAX_WAITING {
            assert_eq!(queue.pop().unwrap().time(), number as f64);
        }
        let skipped = queue.pop().unwrap();
        assert!(
            matches!(&*skipped, Event::EventsSkipped(skipped) if skipped.num_events == 5),
            "{skipped:?}"
        );
        assert_eq!(queue.pop().unwrap().time(), -1.0);
        queue.push([&seen(7.0)]);
        queue.close();
        assert_eq!(queue.pop().unwrap().time(), 7.0);
        assert_eq!(queue.pop(), None);
    }

    #[test]
    fn whoever_waits_gets_all_events_that_come_together() {
        const PATIENCE: Duration = Duration::from_secs(60);
        let queue = Arc::new(Queue::default());
        let (sender, taken) = mpsc::channel();
        let its_queue = Arc::clone(&queue);
        let thread = std::thread::spawn(move || {
            while let Some(event) = its_queue.pop() {
                sender.send(event.time()).expect("the test waits for it");
            }
        });
        // It waits already, or is on its way to.
        for round in 0..500 {
            let events = [seen(f64::from(round)), missed(f64::from(round) + 0.5)];
            queue.push(&events);
            for event in &events {
                assert_eq!(taken.recv_timeout(PATIENCE), Ok(event.time()));
            }
        }
        queue.close();
        thread.join().expect("it did not panic");
    }

    #[test]
    fn the_end_fits_into_a_full_queue_and_nothing_comes_after_it() {
        let queue = Queue::default();
        for number in 0..3 * MAX_WAITING {
            queue.push([&missed(number as f64)]);
        }
        let end = super::super::summary::RunEnded::new(-1.0, None);
        queue.push([&Arc::new(Event::RunEnded(Box::new(end)))]);
        queue.push([&missed(-2.0)]);
        queue.close();
        let events: Vec<Arc<Event>> = std::iter::from_fn(|| queue.pop()).collect();
        assert_eq!(events.len(), 2 * MAX_WAITING + 2);
        let [.., skipped, end] = &events[..] else {
            unreachable!("there are so many");
        };
        let num_skipped = MAX_WAITING as u64;
        assert!(
            matches!(&**skipped, Event::EventsSkipped(skipped) if skipped.num_events == num_skipped),
            "{skipped:?}"
        );
        assert!(matches!(**end, Event::RunEnded(_)), "{end:?}");
    }

    #[test]
    fn even_rare_events_have_a_bound() {
        let queue = Queue::default();
        let lost = Arc::new(Event::NodeLost(NodeLost {
            time: 0.0,
            node: NodeId::DRIVER,
        }));
        for _ in 0..3 * MAX_WAITING {
            queue.push([&lost]);
        }
        assert_eq!(queue.lock().waiting.len(), 2 * MAX_WAITING);
        queue.abandon();
        queue.push([&lost]);
        assert_eq!(queue.pop(), None);
    }
}
