//! Controls of a training while it runs: pause, resume, save a checkpoint, change the learning rate or the
//! consistency mode, remove a worker, end the training.
//!
//! A program keeps a clone of its [`Controls`] and gives the other one to
//! [`Trainer::controls`](crate::Trainer::controls), or lets a loop of its own [heed](LoopControls) them. The dashboard
//! (feature `dashboard`) uses the same handle.
//!
//! ```
//! use std::sync::mpsc;
//!
//! use ps::controls::Controls;
//! use ps::observe::Event;
//! use ps::prelude::*;
//!
//! let device = select_device(default_device_name())?;
//! let (sender, steps) = mpsc::channel();
//! let controls = Controls::new();
//! let trainer = Trainer::new(ConvNet::init(1, &device), Mnist::bundled_sample().train)
//!     .device(&device)
//!     .workers(2)
//!     .iterations(50)
//!     .controls(&controls)
//!     .observe(move |event: &Event| {
//!         if let Event::Step(step) = event {
//!             let _ = sender.send(step.clock);
//!         }
//!     });
//! let later = std::thread::spawn(move || {
//!     let _ = steps.recv(); // The first step is settled.
//!     controls.pause().wait()?;
//!     controls.set_learning_rate(0.001).wait()?;
//!     controls.resume().wait()
//! });
//! let report = trainer.run()?;
//! # // A very quick training may be over before it is paused.
//! # let _ =
//! later.join().expect("no panic");
//! assert_eq!(report.num_applied, 2 * 50);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What is promised
//! - [`pause`](Controls::pause): when it is done, no update is made until [`resume`](Controls::resume). Workers finish
//!   the gradient that they compute, and wait. A `Bsp` training has the same bits with and without pauses. A
//!   training that ends (by a signal, an evaluation, or [`end`](Controls::end)) ends a pause first, so that workers can
//!   finish their step. It refuses to be paused.
//! - [`set_learning_rate`](Controls::set_learning_rate) and [`set_consistency`](Controls::set_consistency) hold for
//!   all servers from the same update on. The learning rate is part of each update, also in the update log and in
//!   the schedule of a recorded training, so a recovery and a replay have the same bits.
//! - [`remove_worker`](Controls::remove_worker): the worker finishes its step, for at most 10 s, and leaves. The
//!   others go on without it. The rest of its share of the data is not used.
//! - All of it stays in force if the servers are lost and the training goes on from a checkpoint. A program that is
//!   started again with `--resume` begins with its own settings, and with all workers.
//! - A driver's own loop carries out what is asked when it comes to it. When it is paused, it starts no further
//!   update. It refuses to remove a worker, to change the mode, and to end: these are its own decisions. If workers push to
//!   the servers [by themselves](LoopControls::servers_decide), the mode can be changed.
//! - [`end`](Controls::end): workers finish their current step, for at most 10 s. Then the training ends as if all steps
//!   were taken: with a last checkpoint, an evaluation of the final weights, and a report.
//! - An evaluation of a [`Trainer`](crate::Trainer) does not hold up what is asked. In a driver's own loop it waits until the
//!   loop comes to it.
//! - Observers learn of each change by an [`Event::Controlled`](crate::observe::Event::Controlled), also of the end
//!   of a pause by a signal.
//!
//! | file | what it holds |
//! |---|---|
//! | `mod` | the handle of the program, and its errors |
//! | `inbox` | the calls to a training, as long as it listens |
//! | `listening` | the side of a [`Trainer`](crate::Trainer): carries out what is asked |
//! | `own_loop` | the side of a driver's own loop |

mod inbox;
mod listening;
mod own_loop;

use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use ps_actors::ids::WorkerId;
use ps_actors::server::{Consistency, ConsistencyError, GroupError};
use tokio::sync::{mpsc, oneshot};

pub(crate) use inbox::Pause;
pub(crate) use listening::{Listening, Running, end_pause};
pub use own_loop::LoopControls;

/// How many calls may wait. A training carries out one after the other.
const MAX_WAITING: usize = 16;

/// A handle that controls a training while it runs. A clone is another handle to the same training.
///
/// It controls the training that it was given to by [`Trainer::controls`](crate::Trainer::controls); if there
/// are several, the one that began last. For pausing and the learning rate, see the example of the [module](self). The
/// other controls:
///
/// ```
/// use std::sync::mpsc;
///
/// use ps::controls::Controls;
/// use ps::observe::Event;
/// use ps::prelude::*;
///
/// let device = select_device(default_device_name())?;
/// # let temporary = tempfile::tempdir()?;
/// # let directory = temporary.path();
/// let (sender, steps) = mpsc::channel();
/// let controls = Controls::new();
/// let trainer = Trainer::new(ConvNet::init(1, &device), Mnist::bundled_sample().train)
///     .device(&device)
///     .workers(2)
///     .epochs(1_000_000)
///     .checkpoints(CheckpointConfig::new(directory))
///     .controls(&controls)
///     .observe(move |event: &Event| {
///         if let Event::Step(step) = event {
///             let _ = sender.send(step.clock);
///         }
///     });
/// let later = std::thread::spawn(move || {
///     let _ = steps.recv(); // The first step is settled.
///     let changed = controls.set_consistency(Consistency::Asp).wait();
///     let saved = controls.save_checkpoint().wait();
///     let removed = controls.remove_worker(WorkerId(1)).wait();
///     controls.end().wait().and(changed).and(saved).and(removed)
/// });
/// let report = trainer.run()?;
/// later.join().expect("no panic")?;
/// assert_eq!(report.removed_workers, [WorkerId(1)]);
/// assert!(report.ended_by_controls);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Default)]
pub struct Controls {
    shared: Arc<Mutex<Shared>>,
}

#[derive(Default)]
struct Shared {
    /// To the training that listens.
    sender: Option<mpsc::Sender<Asked>>,
    /// Whether a training listened before.
    has_ended: bool,
    is_paused: bool,
    can: Can,
    /// How many trainings have listened. That of the training that listens, or listened last, is its number.
    number: u64,
}

/// What the training that listens, or listened last, is able to do.
#[derive(Clone, Copy, Debug, Default)]
struct Can {
    save_checkpoints: bool,
    change_consistency: bool,
    remove_workers: bool,
    end: bool,
}

/// What can be asked.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Ask {
    Pause(bool),
    Checkpoint,
    LearningRate(f64),
    Consistency(Consistency),
    RemoveWorker(WorkerId),
    End,
}

/// Something that was asked, and who wants to know.
struct Asked {
    ask: Ask,
    answer: oneshot::Sender<Result<(), ControlError>>,
}

/// Why a training did not do what was asked. It goes on as before.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ControlError {
    /// No training listens yet.
    #[error(
        "no training listens: give the controls to `Trainer::controls`, or heed them in the loop (`Controls::in_loop`), and wait until it has begun"
    )]
    NotRunning,
    /// The training has ended, or its servers were lost before it was done.
    #[error("the training has ended, or its servers were lost before it was done")]
    Ended,
    /// A signal, an evaluation or [`Controls::end`] has ended the training: its workers finish their last step.
    #[error("the training is ending already")]
    Ending,
    /// Too many calls wait.
    #[error("{MAX_WAITING} calls wait already; try again later")]
    TooManyWaiting,
    /// The training saves no checkpoints.
    #[error(
        "this training saves no checkpoints: it needs a directory for them (`--checkpoint-dir`, `Trainer::checkpoints`)"
    )]
    NoCheckpoints,
    /// A driver's own loop decides this itself.
    #[error("this program has a loop of its own, which decides itself {0}")]
    OwnLoop(&'static str),
    /// There is no event loop to ask the servers in.
    #[error("no event loop to ask the servers in: raise the limit on open files (ulimit -n)")]
    NoEventLoop(#[from] std::io::Error),
    /// There is no such worker, or it was removed before.
    #[error("there is no {0} in this training, or it was removed or has taken all its steps")]
    NoSuchWorker(WorkerId),
    /// The only worker that is left cannot be removed.
    #[error("{0} is the last one: end the training instead")]
    LastWorker(WorkerId),
    /// The consistency mode does not fit the number of workers.
    #[error("this mode cannot work")]
    Consistency(#[from] ConsistencyError),
    /// The servers refused it, or could not be reached.
    #[error("the servers did not do it")]
    Servers(#[from] GroupError),
}

/// The result of something that was asked: a future. It begins when the method of [`Controls`] is called.
#[derive(Debug)]
#[must_use = "it may have been refused: await it, or call `wait`"]
pub struct Control(Waits);

#[derive(Debug)]
enum Waits {
    For(oneshot::Receiver<Result<(), ControlError>>),
    Refused(Option<ControlError>),
}

impl Control {
    /// Waits for the result on a plain thread.
    ///
    /// # Errors
    /// As the method of [`Controls`] that made it.
    ///
    /// # Panics
    /// If it is called from asynchronous code.
    pub fn wait(self) -> Result<(), ControlError> {
        match self.0 {
            Waits::For(answer) => answer.blocking_recv().unwrap_or(Err(ControlError::Ended)),
            Waits::Refused(error) => Err(error.unwrap_or(ControlError::Ended)),
        }
    }
}

impl Future for Control {
    type Output = Result<(), ControlError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut self.0 {
            Waits::For(answer) => {
                let answer = Pin::new(answer).poll(context);
                answer.map(|answer| answer.unwrap_or(Err(ControlError::Ended)))
            }
            Waits::Refused(error) => Poll::Ready(Err(error.take().unwrap_or(ControlError::Ended))),
        }
    }
}

impl Controls {
    /// Makes a handle that no training listens to yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether a training listens now.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.lock().sender.is_some()
    }

    /// Whether the training is paused.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        self.lock().is_paused
    }

    /// Whether the training has a directory for checkpoints.
    #[must_use]
    pub fn saves_checkpoints(&self) -> bool {
        self.lock().can.save_checkpoints
    }

    /// Whether the consistency mode of the training can be changed. That of a driver's own loop can be only if its
    /// [servers decide](LoopControls::servers_decide).
    #[must_use]
    pub fn changes_consistency(&self) -> bool {
        self.lock().can.change_consistency
    }

    /// Whether workers can be removed from the training.
    #[must_use]
    pub fn removes_workers(&self) -> bool {
        self.lock().can.remove_workers
    }

    /// Whether the training can be [ended](Self::end). A driver's own loop decides that itself.
    #[must_use]
    pub fn can_end(&self) -> bool {
        self.lock().can.end
    }

    /// Pauses the training. When this is done, no update is made until [`resume`](Self::resume).
    ///
    /// # Errors
    /// If no training runs, if it is ending, or if its servers cannot be reached.
    pub fn pause(&self) -> Control {
        self.ask(Ask::Pause(true))
    }

    /// Lets a paused training go on.
    ///
    /// # Errors
    /// If no training runs, or if its servers cannot be reached.
    pub fn resume(&self) -> Control {
        self.ask(Ask::Pause(false))
    }

    /// Lets the training save a checkpoint of its current version. The result is ready when the training has
    /// accepted the request, not when the checkpoint is on the disk. The event
    /// [`CheckpointSaved`](crate::observe::Event::CheckpointSaved) says that. If the version has a checkpoint
    /// already, no other one is saved. For an example, see [`Controls`].
    ///
    /// # Errors
    /// If no training runs, or if it saves no checkpoints.
    pub fn save_checkpoint(&self) -> Control {
        self.ask(Ask::Checkpoint)
    }

    /// Changes the learning rate of all updates from now on.
    ///
    /// # Errors
    /// If no training runs, if the rate is not a usable number, or if the servers cannot be reached.
    pub fn set_learning_rate(&self, learning_rate: f64) -> Control {
        self.ask(Ask::LearningRate(learning_rate))
    }

    /// Changes the consistency mode from now on. For an example, see [`Controls`].
    ///
    /// # Errors
    /// If no training runs, if the mode does not fit its workers, or if the servers cannot be reached.
    pub fn set_consistency(&self, consistency: Consistency) -> Control {
        self.ask(Ask::Consistency(consistency))
    }

    /// Lets a worker leave for good after its step. The result is ready when the worker has been asked to
    /// leave. If it has not finished its step after 10 s, it is ended at once. For an example, see [`Controls`].
    ///
    /// # Errors
    /// If no training runs, if there is no such worker, or if it is the last one.
    pub fn remove_worker(&self, worker: WorkerId) -> Control {
        self.ask(Ask::RemoveWorker(worker))
    }

    /// Ends the training in an orderly way: its workers finish their current step, for at most 10 s. The result is ready
    /// when the training has accepted the request. Its [`Report`](crate::Report) then says that it was
    /// [ended by controls](crate::Report::ended_by_controls). With it, an [observer](crate::Trainer::observe) can end a
    /// training for any reason: because of the losses, the time, or the number of updates. For an example, see
    /// [`Controls`].
    ///
    /// # Errors
    /// If no training runs, or if it is a loop of a driver's own.
    pub fn end(&self) -> Control {
        self.ask(Ask::End)
    }

    fn ask(&self, ask: Ask) -> Control {
        let (answer, receiver) = oneshot::channel();
        let shared = self.lock();
        let refused = match &shared.sender {
            None if shared.has_ended => ControlError::Ended,
            None => ControlError::NotRunning,
            Some(sender) => match sender.try_send(Asked { ask, answer }) {
                Ok(()) => return Control(Waits::For(receiver)),
                Err(mpsc::error::TrySendError::Full(_)) => ControlError::TooManyWaiting,
                Err(mpsc::error::TrySendError::Closed(_)) => ControlError::Ended,
            },
        };
        Control(Waits::Refused(Some(refused)))
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Controls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shared = self.lock();
        f.debug_struct("Controls")
            .field("is_running", &shared.sender.is_some())
            .field("is_paused", &shared.is_paused)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_training_every_call_says_so() {
        let controls = Controls::new();
        assert!(matches!(
            controls.pause().wait(),
            Err(ControlError::NotRunning)
        ));
        drop(Listening::begin(&controls, true));
        assert!(matches!(controls.resume().wait(), Err(ControlError::Ended)));
    }

    #[test]
    fn calls_that_wait_are_bounded_and_fail_when_the_training_ends() {
        let controls = Controls::new();
        let listening = Listening::begin(&controls, true);
        let waiting: Vec<_> = (0..MAX_WAITING).map(|_| controls.pause()).collect();
        assert!(matches!(
            controls.pause().wait(),
            Err(ControlError::TooManyWaiting)
        ));
        drop(listening);
        for waiting in waiting {
            assert!(matches!(waiting.wait(), Err(ControlError::Ended)));
        }
        assert!(!controls.is_running());
    }
}
