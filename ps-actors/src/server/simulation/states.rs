//! The states that a simulation must reach. A test that never reaches one of them tests less than it seems.

use std::fmt;

macro_rules! states {
    ($($name:ident: $text:literal,)*) => {
        /// Something that makes a run interesting. Each is counted.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[non_exhaustive]
        pub enum State {
            $(#[doc = concat!("Counts this: ", $text, ".")] $name,)*
        }

        impl State {
            /// All states.
            pub const ALL: &[Self] = &[$(Self::$name,)*];
        }

        impl fmt::Display for State {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self {
                    $(Self::$name => $text,)*
                })
            }
        }
    };
}

states! {
    DuplicateWhilePending: "a push came again while the first one was pending",
    RepeatAfterSettled: "a push came again after it was settled",
    JoinRepeated: "a request to join came again and got the same answer",
    JoinFenced: "a request to join came again after its membership was over",
    CallerGone: "a caller went away while its push was pending",
    LateDrop: "a gradient was dropped as late",
    HeldBack: "a worker had to wait for slower ones",
    LostByLease: "a member was lost because it was silent",
    LostWithPendingPush: "a member was lost while its push was pending",
    FencedZombie: "a worker that had been stopped pushed after its membership was over",
    FollowerLackedPart: "a follower lacked a part of a gradient and got it",
    FollowTakenAgain: "a follower got the same decisions again",
    LostFollowAnswer: "the answer of a follower was lost",
    VersionGone: "a pull asked for a version that was no longer kept",
    StagedNeverPushed: "a worker was killed between staging and push",
    WorkerKilledBeforeAnswer: "a worker was killed while it waited for the answer to its push",
    CrashBeforeLog: "the first server was killed after it decided and before it wrote the log",
    CrashBetweenLogAndReply: "the first server was killed between the log and the reply",
    CrashBetweenDecisionAndFollow: "the first server was killed before a follower had its decisions",
    FollowerKilled: "another server than the first was killed",
    RestartWithPullsWaiting: "a server was killed while pulls waited there",
    RestartWithPushesWaiting: "the first server was killed while pushes waited there",
    RecoveryFromLogAlone: "servers went on from the log, before there was a checkpoint",
    RecoveryFromCheckpointAlone: "servers went on from a checkpoint, and no update of a log followed",
    RecoveryFromBoth: "servers went on from a checkpoint and the log after it",
    RecoveryFromNothing: "servers began again, because nothing was saved",
    FewerServers: "fewer servers went on than there were before",
    MoreServers: "more servers went on than there were before",
    TornLogTail: "the last record of the log was torn",
    UnsyncedRecordsLost: "records of the log were lost with the power",
    CheckpointIncomplete: "a checkpoint was only half written when the power was lost",
    DamagedCheckpoint: "the newest checkpoint was damaged, and the one before was used",
    AcknowledgedLost: "acknowledged gradients were lost, within what the setting allows",
    StepTakenAgain: "a worker took a step again whose outcome was lost",
    ServerStopped: "a server was stopped for a while",
    LateJoin: "a worker joined after others had begun",
}

/// How often each state was reached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Coverage {
    counts: std::collections::BTreeMap<State, u64>,
}

impl Coverage {
    pub(super) fn count(&mut self, state: State) {
        *self.counts.entry(state).or_default() += 1;
    }

    /// Adds the counts of another run.
    pub fn add(&mut self, other: &Self) {
        for (&state, count) in &other.counts {
            *self.counts.entry(state).or_default() += count;
        }
    }

    /// Returns how often a state was reached.
    #[must_use]
    pub fn of(&self, state: State) -> u64 {
        self.counts.get(&state).copied().unwrap_or(0)
    }

    /// Returns the states that were never reached.
    #[must_use]
    pub fn missing(&self) -> Vec<State> {
        let all = State::ALL.iter().copied();
        all.filter(|&state| self.of(state) == 0).collect()
    }
}

impl fmt::Display for Coverage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for &state in State::ALL {
            writeln!(f, "{:>9}  {state}", self.of(state))?;
        }
        Ok(())
    }
}
