//! The thread that starts, watches and ends a group's processes.
//!
//! One thread does all of it, for two reasons. The kernel's promise to kill a child with its parent
//! is tied to the *thread* that started the child, so that thread must live as long as the group.
//! And a process may only be signalled before it has been waited for, because afterwards its number may
//! belong to another process. A single thread never does both at the same time.

use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::process::Command;
use std::sync::mpsc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::process::Child;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender};
use tokio::time::{Instant, Sleep, sleep};

use super::error::ProcessError;
use super::processes::Exited;

/// How long a killed process may take to end. Only a broken device driver or file system can delay it for
/// longer.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);

type Answer<T> = mpsc::Sender<Result<T, ProcessError>>;

/// A request of a group to its thread.
pub(super) enum Request {
    /// Start a rank again that has ended. The answer is its attempt.
    Restart { rank: u32, done: Answer<u64> },
    /// Return how the rank ended, if it has.
    Look {
        rank: u32,
        done: Answer<Option<Exited>>,
    },
    /// Send SIGKILL, if the rank runs.
    Kill { rank: u32, done: Answer<()> },
    /// Send SIGTERM to all, and SIGKILL after the grace. A second request can only shorten the grace.
    Stop { grace: Duration },
}

/// One rank.
struct Slot {
    rank: u32,
    attempt: u64,
    /// Set until the process has been waited for.
    child: Option<Child>,
    exited: Option<Exited>,
}

/// The time at which the processes that still run are killed. After that, the time at which the thread stops
/// waiting for them.
struct Stopping {
    deadline: Pin<Box<Sleep>>,
    is_killed: bool,
}

enum Event {
    Exited(Exited),
    Asked(Request),
    /// The group was dropped, and with it the sender of requests.
    Abandoned,
    TimeIsOver,
}

struct Supervisor<C> {
    command: C,
    slots: Vec<Slot>,
    exits: UnboundedSender<Exited>,
    stopping: Option<Stopping>,
}

/// Starts ranks 1 to `num_copies`, reports that to `started`, and serves requests until it is told to stop.
/// When it returns, no process is left. `command` makes the command from a rank and an attempt.
pub(super) fn run(
    command: impl Fn(u32, u64) -> Command,
    num_copies: u32,
    mut requests: UnboundedReceiver<Request>,
    exits: UnboundedSender<Exited>,
    started: mpsc::Sender<Result<(), ProcessError>>,
) {
    let event_loop = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let event_loop = match event_loop {
        Ok(event_loop) => event_loop,
        Err(error) => {
            let _ = started.send(Err(ProcessError::Thread(error)));
            return;
        }
    };
    let mut supervisor = Supervisor {
        command,
        slots: Vec::new(),
        exits,
        stopping: None,
    };
    event_loop.block_on(async {
        // `start` waits for an answer, so sending one cannot fail.
        match supervisor.start_all(num_copies) {
            Ok(()) => {
                let _ = started.send(Ok(()));
                supervisor.serve(&mut requests).await;
            }
            Err(error) => {
                supervisor.stop(Duration::ZERO);
                supervisor.serve(&mut requests).await;
                let _ = started.send(Err(error));
            }
        }
    });
}

impl<C: Fn(u32, u64) -> Command> Supervisor<C> {
    fn start_all(&mut self, num_copies: u32) -> Result<(), ProcessError> {
        heed_children().map_err(ProcessError::Thread)?;
        for rank in 1..=num_copies {
            let child = start(&self.command, rank, 0)?;
            self.slots.push(Slot {
                rank,
                attempt: 0,
                child: Some(child),
                exited: None,
            });
        }
        Ok(())
    }

    /// Serves requests until a stop has been requested and no process runs.
    async fn serve(&mut self, requests: &mut UnboundedReceiver<Request>) {
        while self.stopping.is_none() || self.running().next().is_some() {
            match poll_fn(|cx| self.poll_event(cx, requests)).await {
                // This fails only when the group is being dropped. Then no one needs the report.
                Event::Exited(exited) => drop(self.exits.send(exited)),
                Event::Asked(request) => self.handle(request),
                Event::Abandoned => self.stop(Duration::ZERO),
                Event::TimeIsOver => {
                    if self.stopping.as_ref().is_some_and(|stop| stop.is_killed) {
                        return self.give_up();
                    }
                    self.kill_all();
                }
            }
        }
    }

    fn poll_event(
        &mut self,
        cx: &mut Context<'_>,
        requests: &mut UnboundedReceiver<Request>,
    ) -> Poll<Event> {
        for slot in &mut self.slots {
            if let Poll::Ready(exited) = slot.poll_exit(cx) {
                return Poll::Ready(Event::Exited(exited));
            }
        }
        match requests.poll_recv(cx) {
            Poll::Ready(Some(request)) => return Poll::Ready(Event::Asked(request)),
            Poll::Ready(None) if self.stopping.is_none() => return Poll::Ready(Event::Abandoned),
            Poll::Ready(None) | Poll::Pending => {}
        }
        match &mut self.stopping {
            Some(stopping) => stopping
                .deadline
                .as_mut()
                .poll(cx)
                .map(|()| Event::TimeIsOver),
            None => Poll::Pending,
        }
    }

    fn handle(&mut self, request: Request) {
        // The sender of the request waits for the answer, so sending it cannot fail.
        match request {
            Request::Restart { rank, done } => drop(done.send(self.restart(rank))),
            Request::Look { rank, done } => {
                drop(done.send(self.slot(rank).map(|slot| slot.exited)));
            }
            Request::Kill { rank, done } => drop(done.send(self.slot(rank).and_then(Slot::kill))),
            Request::Stop { grace } => self.stop(grace),
        }
    }

    fn restart(&mut self, rank: u32) -> Result<u64, ProcessError> {
        let attempt = {
            let slot = self.slot(rank)?;
            if slot.child.is_some() {
                return Err(ProcessError::StillRunning { rank });
            }
            slot.attempt + 1
        };
        let child = start(&self.command, rank, attempt)?;
        let slot = self.slot(rank)?;
        slot.attempt = attempt;
        slot.child = Some(child);
        slot.exited = None;
        Ok(attempt)
    }

    fn stop(&mut self, grace: Duration) {
        match &mut self.stopping {
            None => {
                self.running().for_each(Slot::terminate);
                self.stopping = Some(Stopping {
                    deadline: Box::pin(sleep(grace)),
                    is_killed: false,
                });
            }
            Some(stopping) if !stopping.is_killed => {
                // A deadline that the clock cannot represent is not earlier than the present one.
                if let Some(deadline) = Instant::now().checked_add(grace)
                    && deadline < stopping.deadline.deadline()
                {
                    stopping.deadline.as_mut().reset(deadline);
                }
            }
            Some(_) => {}
        }
    }

    fn kill_all(&mut self) {
        for slot in self.running() {
            tracing::warn!(rank = slot.rank, "did not leave when asked to: killing it");
            if let Err(error) = slot.kill() {
                tracing::error!(rank = slot.rank, %error, "could not kill it");
            }
        }
        self.stopping = Some(Stopping {
            deadline: Box::pin(sleep(KILL_TIMEOUT)),
            is_killed: true,
        });
    }

    fn give_up(&mut self) {
        for slot in self.running() {
            tracing::error!(
                rank = slot.rank,
                "still running {KILL_TIMEOUT:?} after it was killed"
            );
        }
        let exits: Vec<Exited> = self.running().map(|slot| slot.ended(None)).collect();
        for exited in exits {
            let _ = self.exits.send(exited);
        }
    }

    fn running(&mut self) -> impl Iterator<Item = &mut Slot> {
        self.slots.iter_mut().filter(|slot| slot.child.is_some())
    }

    fn slot(&mut self, rank: u32) -> Result<&mut Slot, ProcessError> {
        let world_size = u32::try_from(self.slots.len()).expect("ranks are u32") + 1;
        let index = (rank as usize).checked_sub(1);
        index
            .and_then(|index| self.slots.get_mut(index))
            .ok_or(ProcessError::NoSuchRank { rank, world_size })
    }
}

impl Slot {
    fn poll_exit(&mut self, cx: &mut Context<'_>) -> Poll<Exited> {
        let Some(child) = &mut self.child else {
            return Poll::Pending;
        };
        // The state of the wait is kept in the child, not in this short-lived future.
        let Poll::Ready(result) = pin!(child.wait()).poll(cx) else {
            return Poll::Pending;
        };
        if let Err(error) = &result {
            tracing::error!(rank = self.rank, %error, "other code waited for this process");
        }
        Poll::Ready(self.ended(result.ok()))
    }

    fn ended(&mut self, status: Option<std::process::ExitStatus>) -> Exited {
        let exited = Exited {
            rank: self.rank,
            attempt: self.attempt,
            status,
        };
        self.child = None;
        self.exited = Some(exited);
        exited
    }

    fn kill(&mut self) -> Result<(), ProcessError> {
        let rank = self.rank;
        let killed = self.child.as_mut().map_or(Ok(()), Child::start_kill);
        killed.map_err(|source| ProcessError::Kill { rank, source })
    }

    /// Asks the process to end. On Windows this is not possible.
    fn terminate(&mut self) {
        #[cfg(unix)]
        let asked = {
            use rustix::process::{Pid, Signal, kill_process};
            let id = self.child.as_ref().and_then(Child::id);
            let id = id.and_then(|id| Pid::from_raw(id.cast_signed()));
            id.map_or(Ok(()), |id| kill_process(id, Signal::TERM))
        };
        #[cfg(not(unix))]
        let asked = self.kill();
        if let Err(error) = asked {
            tracing::error!(rank = self.rank, %error, "could not ask it to end");
        }
    }
}

fn start(
    command: &impl Fn(u32, u64) -> Command,
    rank: u32,
    attempt: u64,
) -> Result<Child, ProcessError> {
    let command = command(rank, attempt);
    let program = command.get_program().into();
    // Killed on drop, so that no process is left if this thread panics.
    let child = tokio::process::Command::from(command)
        .kill_on_drop(true)
        .spawn()
        .map_err(|source| ProcessError::Spawn {
            rank,
            program,
            source,
        })?;
    tracing::debug!(rank, attempt, pid = child.id(), "started");
    Ok(child)
}

/// Makes sure that the system keeps an ended child until it has been waited for.
///
/// A program inherits from its parent whether SIGCHLD is ignored. If it is, the kernel forgets ended
/// children at once, and their numbers may go to other processes. Installing a handler prevents that.
fn heed_children() -> io::Result<()> {
    #[cfg(unix)]
    drop(tokio::signal::unix::signal(
        tokio::signal::unix::SignalKind::child(),
    )?);
    Ok(())
}
