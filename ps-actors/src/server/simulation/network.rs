//! The simulated network: what is sent, when it arrives, and what is lost.
//!
//! Between two processes, messages arrive in order, as over one connection. Messages between other pairs may
//! overtake them. A lost message is a lost connection: the caller learns of it and may call again. The callee
//! may have got the call. A message that comes twice is one of an earlier connection, so it may come at any
//! later time.

use std::collections::BTreeMap;

use super::dice::Dice;
use super::messages::{Address, CallId, Input, Micros, Reply, Request};
use super::settings::Settings;

/// How long it takes until a lost connection or an ended process is noticed.
const NOTICED: (Micros, Micros) = (500, 20_000);

/// How much longer it takes now and then, because nothing is heard of the other side.
const SILENCE: (f64, Micros) = (10.0, 500_000);

/// A call that is not over for its caller.
#[derive(Clone, Copy, Debug)]
struct Open {
    callee: Address,
    /// Whether its answer is known to be that of a `Follow`.
    is_follow: bool,
}

/// Something that will reach a process.
#[derive(Debug)]
pub(super) struct Arrival {
    pub(super) at: Micros,
    pub(super) to: Address,
    pub(super) input: Input,
}

#[derive(Clone, Copy, Debug, Default)]
pub(super) struct NetworkCounts {
    pub(super) num_dropped: u64,
    pub(super) num_doubled: u64,
    pub(super) num_follow_answers_lost: u64,
}

#[derive(Debug)]
pub(super) struct Network {
    delay: (Micros, Micros),
    drop_percent: f64,
    dup_percent: f64,
    /// When the latest message of each connection arrives. `None` if the order of messages does not matter.
    latest: Option<BTreeMap<(Address, Address), Micros>>,
    open: BTreeMap<CallId, Open>,
    pub(super) counts: NetworkCounts,
}

impl Network {
    pub(super) fn new(settings: &Settings) -> Self {
        let (plan, delay) = (&settings.plan, settings.delay());
        Self {
            delay,
            drop_percent: plan.drop_percent,
            dup_percent: plan.dup_percent,
            // With one delay for all, everything arrives in order anyway.
            latest: (delay.0 < delay.1).then(BTreeMap::new),
            open: BTreeMap::new(),
            counts: NetworkCounts::default(),
        }
    }

    pub(super) fn num_open(&self) -> usize {
        self.open.len()
    }

    pub(super) fn call(
        &mut self,
        now: Micros,
        id: CallId,
        to: Address,
        request: Request,
        dice: &mut Dice,
        arrivals: &mut Vec<Arrival>,
    ) {
        let is_follow = matches!(request, Request::Follow(_));
        self.open.insert(
            id,
            Open {
                callee: to,
                is_follow,
            },
        );
        let at = self.arrival(now, id.caller, to, dice);
        if dice.chance(self.drop_percent) {
            self.counts.num_dropped += 1;
            self.open.remove(&id);
            // The connection breaks before or after the call has arrived.
            if dice.chance(50.0) {
                let gone = at + self.noticed(dice);
                arrivals.push(Arrival {
                    at,
                    to,
                    input: Input::Called(id, request),
                });
                arrivals.push(Arrival {
                    at: gone,
                    to,
                    input: Input::CallerGone(id),
                });
            }
            let at = now + self.noticed(dice);
            return arrivals.push(Arrival {
                at,
                to: id.caller,
                input: Input::Lost(id),
            });
        }
        if dice.chance(self.dup_percent) {
            self.counts.num_doubled += 1;
            let at = at + self.noticed(dice);
            arrivals.push(Arrival {
                at,
                to,
                input: Input::Called(id, request.clone()),
            });
        }
        arrivals.push(Arrival {
            at,
            to,
            input: Input::Called(id, request),
        });
    }

    pub(super) fn reply(
        &mut self,
        now: Micros,
        id: CallId,
        reply: Reply,
        dice: &mut Dice,
        arrivals: &mut Vec<Arrival>,
    ) {
        let Some(open) = self.open.get(&id).copied() else {
            return;
        };
        let at = self.arrival(now, open.callee, id.caller, dice);
        let (at, input) = match dice.chance(self.drop_percent) {
            true => {
                self.counts.num_dropped += 1;
                self.counts.num_follow_answers_lost += u64::from(open.is_follow);
                (now + self.noticed(dice), Input::Lost(id))
            }
            false => (at, Input::Answered(id, reply)),
        };
        self.open.remove(&id);
        arrivals.push(Arrival {
            at,
            to: id.caller,
            input,
        });
    }

    /// Nobody is there who could handle this call.
    pub(super) fn no_callee(
        &mut self,
        now: Micros,
        id: CallId,
        dice: &mut Dice,
    ) -> Option<Arrival> {
        self.open.remove(&id)?;
        Some(Arrival {
            at: now + self.noticed(dice),
            to: id.caller,
            input: Input::Ended(id),
        })
    }

    /// A process has ended. Its callers and callees learn of it.
    pub(super) fn ended(
        &mut self,
        now: Micros,
        process: Address,
        dice: &mut Dice,
        arrivals: &mut Vec<Arrival>,
    ) {
        let over: Vec<(CallId, Open)> = self
            .open
            .extract_if(.., |id, open| {
                id.caller == process || open.callee == process
            })
            .collect();
        for (id, open) in over {
            let at = now + self.noticed(dice);
            let (to, input) = match id.caller == process {
                true => (open.callee, Input::CallerGone(id)),
                false => (id.caller, Input::Ended(id)),
            };
            arrivals.push(Arrival { at, to, input });
        }
    }

    fn arrival(&mut self, now: Micros, from: Address, to: Address, dice: &mut Dice) -> Micros {
        let at = now + dice.within(self.delay.0..=self.delay.1);
        match &mut self.latest {
            None => at,
            Some(latest) => {
                let latest = latest.entry((from, to)).or_default();
                *latest = at.max(*latest);
                *latest
            }
        }
    }

    fn noticed(&self, dice: &mut Dice) -> Micros {
        let silence = match dice.chance(SILENCE.0) {
            true => dice.below(SILENCE.1),
            false => 0,
        };
        silence + dice.within(NOTICED.0..=NOTICED.1)
    }
}
