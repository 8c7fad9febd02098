//! What is simulated.

use std::time::Duration;

use super::dice::Dice;
use super::messages::Micros;
use crate::chaos::{Fault, Plan};
use crate::server::Consistency;

/// What a simulated group saves, and so what it can lose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Saving {
    /// Nothing. Servers that are lost begin again.
    Nothing,
    /// Checkpoints. What was applied after the newest one is lost with the servers.
    Checkpoints,
    /// Checkpoints and an update log that is synced at intervals. If the power is lost, the updates of the
    /// last interval are lost.
    Log {
        /// The time between two syncs.
        sync_every: Duration,
    },
    /// Checkpoints and an update log that is synced before each answer. Nothing is lost.
    SyncedLog,
}

impl Saving {
    pub(super) fn has_checkpoints(self) -> bool {
        self != Self::Nothing
    }

    pub(super) fn has_log(self) -> bool {
        matches!(self, Self::Log { .. } | Self::SyncedLog)
    }
}

/// What the workers compute.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Problem {
    /// Each gradient adds to weights of its own, so that the weights count how often each was applied.
    Counting,
    /// Each gradient is that of a quadratic function, with some noise. The curvatures of the weights are from
    /// 0.25 to 1. The loss per weight begins near 0.31.
    Quadratic {
        /// The number of weights.
        num_weights: usize,
        /// The learning rate of a gradient. The gradients of one update are added.
        learning_rate: f64,
        /// The run notes the time from which on the loss per weight is below this number.
        target: f64,
    },
}

/// How long things take.
#[derive(Clone, Debug, PartialEq)]
pub struct Times {
    /// The mean time of a worker's step.
    pub step: Duration,
    /// How much the times of single steps differ: 0 (not at all) to 1 (exponentially distributed).
    pub jitter: f64,
    /// How much slower some of the workers are: a share in percent, and a factor.
    pub stragglers: (f64, f64),
    /// The shortest and the longest time of a message.
    pub delay: (Duration, Duration),
    /// How long the first server is busy with a push.
    pub service: Duration,
}

/// What is simulated: a group of servers, its workers, and the faults.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// The seed of everything that is random.
    pub seed: u64,
    /// How many workers there are.
    pub num_workers: u32,
    /// How many steps each worker takes.
    pub num_steps: u64,
    /// Ends the run after this virtual time, whatever is under way.
    pub run_for: Option<Duration>,
    /// How many servers there are at first.
    pub num_servers: usize,
    /// Whether a group that is started again has a random number of servers, from 1 to 4.
    pub reshards: bool,
    /// The consistency mode.
    pub consistency: Consistency,
    /// The momentum of the update rule.
    pub momentum: f32,
    /// The worker lease.
    pub worker_lease: Option<Duration>,
    /// What the run saves: nothing, checkpoints, or checkpoints and an update log.
    pub saving: Saving,
    /// The time between two checkpoints.
    pub checkpoint_every: Duration,
    /// How long things take.
    pub times: Times,
    /// What the workers compute.
    pub problem: Problem,
    /// The faults.
    pub plan: Plan,
    /// Whether the last worker begins later than the others.
    pub has_late_worker: bool,
    /// How often a worker does not stage a part of its gradient, in percent. The first server then sends it.
    pub unstaged_percent: f64,
    /// A mistake that is made on purpose, to see that the simulator finds it.
    pub(super) mistake: Option<Mistake>,
}

/// A mistake of the simulated processes. None of them is in the code that the simulator shares with real
/// servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(test), expect(dead_code, reason = "only tests make mistakes"))]
pub(super) enum Mistake {
    /// The answer goes out before the log has the update.
    AnswersBeforeLog,
    /// Servers that go on do not know what became of earlier gradients.
    ForgetsLedger,
    /// A follower does not look at the number of what it is told.
    FollowsTwice,
    /// A checkpoint has parts of different versions.
    TornCheckpoint,
    /// New entries are written behind the torn end of the log.
    WritesBehindTornEnd,
    /// A worker that is told that its membership is over pushes under its old id for ever.
    NeverRejoins,
}

impl Settings {
    /// Returns the settings of a small group without faults.
    #[must_use]
    pub fn new(num_workers: u32, num_servers: usize, consistency: Consistency) -> Self {
        Self {
            seed: 0,
            num_workers,
            num_steps: 10,
            run_for: None,
            num_servers,
            reshards: false,
            consistency,
            momentum: 0.0,
            worker_lease: None,
            saving: Saving::SyncedLog,
            checkpoint_every: Duration::from_millis(100),
            times: Times {
                step: Duration::from_millis(10),
                jitter: 0.2,
                stragglers: (0.0, 1.0),
                delay: (Duration::from_micros(200), Duration::from_millis(2)),
                service: Duration::ZERO,
            },
            problem: Problem::Counting,
            plan: Plan::default(),
            has_late_worker: false,
            unstaged_percent: 0.0,
            mistake: None,
        }
    }

    /// Returns the settings of a training in which workers wait for each other: one worker in twenty takes twice as
    /// long, and single steps, of 0.1 s on average, differ much. Nothing is saved. The run notes when the loss, which
    /// is 0.31 at first, falls below `target`. Each gradient is applied with `learning_rate` divided by the number of
    /// workers.
    #[must_use]
    pub fn stragglers(
        num_workers: u32,
        num_servers: usize,
        consistency: Consistency,
        learning_rate: f64,
        target: f64,
    ) -> Self {
        let micros = Duration::from_micros;
        let mut settings = Self::new(num_workers, num_servers, consistency);
        settings.saving = Saving::Nothing;
        settings.times = Times {
            step: Duration::from_millis(100),
            jitter: 0.6,
            stragglers: (5.0, 2.0),
            delay: (micros(200), micros(200)),
            service: micros(10),
        };
        settings.problem = Problem::Quadratic {
            num_weights: 16 * num_servers,
            learning_rate: learning_rate / f64::from(num_workers),
            target,
        };
        settings
    }

    /// Returns settings that are drawn at random from the seed, with some faults.
    #[must_use]
    pub fn random(seed: u64) -> Self {
        let mut dice = Dice::new(seed ^ 0x5e77_1465);
        let num_workers = dice.within(1..=6) as u32;
        let consistency = match dice.below(4) {
            0 => Consistency::Bsp,
            1 => Consistency::Asp,
            2 => Consistency::Ssp {
                bound: dice.below(4),
            },
            _ => Consistency::KofN {
                k: dice.within(1..=u64::from(num_workers)) as usize,
            },
        };
        let mut settings = Self::new(num_workers, dice.within(1..=4) as usize, consistency);
        let millis = Duration::from_millis;
        settings.seed = seed;
        settings.num_steps = dice.within(3..=14);
        settings.reshards = dice.chance(70.0);
        settings.momentum = if dice.chance(30.0) { 0.5 } else { 0.0 };
        let lease = millis(dice.within(60..=400));
        settings.worker_lease = dice.chance(70.0).then_some(lease);
        settings.saving = match dice.below(10) {
            0 => Saving::Nothing,
            1 | 2 => Saving::Checkpoints,
            3..=5 => Saving::Log {
                sync_every: millis(dice.within(10..=80)),
            },
            _ => Saving::SyncedLog,
        };
        settings.checkpoint_every = millis(dice.within(20..=150));
        settings.times.step = millis(dice.within(2..=20));
        settings.times.stragglers = (dice.below(60) as f64, 1.0 + dice.below(8) as f64);
        settings.has_late_worker = dice.chance(30.0);
        settings.unstaged_percent = if dice.chance(30.0) { 10.0 } else { 0.0 };
        settings.plan = settings.random_plan(&mut dice);
        settings
    }

    fn random_plan(&self, dice: &mut Dice) -> Plan {
        let num_updates = self.num_steps * u64::from(self.num_workers);
        let mut faults = Vec::new();
        for _ in 0..dice.below(9) {
            let (worker, step) = (
                dice.below(self.num_workers.into()) as u32,
                dice.below(self.num_steps),
            );
            let most = match self.consistency {
                Consistency::Bsp | Consistency::KofN { .. } => self.num_steps,
                Consistency::Asp | Consistency::Ssp { .. } => num_updates,
            };
            let version = dice.within(1..=most);
            let server = dice.index(self.num_servers);
            let pause = Duration::from_millis(dice.within(10..=700));
            faults.push(match dice.below(12) {
                0..=2 => Fault::KillWorker { worker, step },
                3 | 4 => Fault::StopWorker {
                    worker,
                    pause,
                    step,
                },
                5..=7 => Fault::KillServer { server, version },
                8 => Fault::StopServer {
                    server,
                    pause,
                    version,
                },
                9 | 10 => Fault::LosePower { version },
                _ => Fault::DamageCheckpoint { version },
            });
        }
        let micros = Duration::from_micros;
        let shortest = micros(dice.below(2_000));
        Plan {
            faults,
            drop_percent: if dice.chance(60.0) {
                dice.below(15) as f64
            } else {
                0.0
            },
            dup_percent: if dice.chance(60.0) {
                dice.below(15) as f64
            } else {
                0.0
            },
            delay: Some((shortest, shortest + micros(dice.below(15_000)))),
            seed: None,
        }
    }

    /// Returns the same settings with the faults and the seed of a plan.
    #[must_use]
    pub fn with_plan(mut self, plan: Plan) -> Self {
        self.seed = plan.seed.unwrap_or(self.seed);
        self.plan = plan;
        self
    }

    /// Returns the shortest and the longest time of a message.
    pub(super) fn delay(&self) -> (Micros, Micros) {
        let (shortest, longest) = self.plan.delay.unwrap_or(self.times.delay);
        (micros(shortest), micros(longest))
    }
}

pub(super) fn micros(time: Duration) -> Micros {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX / 4)
}
