//! What a server that follows the first one remembers of the parts of gradients that it has applied, for those who
//! trace a training.
//!
//! As a worker with its steps (`worker/steps`), it records nothing until somebody asks for the first time, and reads no
//! clock for it. From then on it keeps the records of the latest [`MAX_PARTS`] parts. They are numbered in the order in which
//! they were made, so whoever asks sees a gap if there were more in between. A record is kept until the next question
//! says that it has arrived.
//!
//! The shard is pure and knows no time. So the actor says here what it gives to the shard and which version came of it.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use actix::Message;
use ps_runtime::codec::{BulkValue, CodecError};
use serde::{Deserialize, Serialize};

use super::messages::Decision;
use crate::ids::{GradientId, Version};

/// How many records a server keeps, of about 100 bytes each. Of as many parts that wait for their update, it knows when they
/// came.
pub const MAX_PARTS: usize = 1 << 13;

/// A server's part of a gradient, which it has applied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AppliedPart {
    /// The gradient.
    pub id: GradientId,
    /// The version of the weights that the update made.
    pub version: Version,
    /// How long the server had the part before it began the update. Zero if it does not know when the part came.
    pub held: Duration,
    /// How long the server took to make the update. If one part completes several updates that have waited for it, each
    /// of them has the time of all.
    pub took: Duration,
    /// How long ago the update was made, when the records were sent. Clocks of machines need not agree.
    pub ago: Duration,
}

/// Returns the records of applied parts from this number on, and forgets the earlier ones. Sent to every other server of
/// a group, which records its parts from the first such question on. The first server has no records: its answer to a
/// push says how long it held it ([`Pushed`](super::Pushed)).
///
/// ```
/// use ps_actors::actor::run;
/// use ps_actors::group::ServerGroup;
/// use ps_actors::ids::{Version, WorkerId};
/// use ps_actors::rule::Sgd;
/// use ps_actors::server::{GetAppliedParts, PullVersion, ServerConfig};
/// use ps_actors::session::Session;
/// use ps_actors::weights::{Gradient, GradientUpdate, Layout, Weights};
///
/// let initial = Weights::initial(Layout::flat(40), vec![0.0; 40]);
/// let servers =
///     ServerGroup::spawn(&initial, 2, ServerConfig::default(), |_| Box::new(Sgd::new()))?;
/// let second = servers.servers().nth(1).expect("there are two");
/// second.ask(GetAppliedParts { from: 0 }).wait()?;
/// let id = run(async {
///     let session = Session::join(&servers, WorkerId(0)).await?;
///     let id = session.gradient_id(session.next_clock());
///     servers
///         .push(GradientUpdate {
///             id,
///             computed_on: Version(0),
///             loss: 0.0,
///             num_examples: 1,
///             gradient: Gradient::new(vec![1.0; 40]),
///         })
///         .await?;
///     servers.pull(PullVersion::Latest).await?; // Now the second server has made the update.
///     session.leave().await?;
///     Ok::<_, ps_actors::server::GroupError>(id)
/// })?;
/// let parts = second.ask(GetAppliedParts { from: 0 }).wait()?;
/// assert_eq!(parts.first, 0);
/// let parts = parts.read()?;
/// assert_eq!((parts[0].id, parts[0].version), (id, Version(1)));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "AppliedParts")]
pub struct GetAppliedParts {
    /// The number of the first record that is wanted.
    pub from: u64,
}

/// The records of some applied parts, in the order in which they were applied.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct AppliedParts {
    /// The number of the first of these records. The others follow it.
    pub first: u64,
    /// `None`: no records. They travel beside the header, because they may be many.
    records: Option<BulkValue<Vec<AppliedPart>>>,
}

impl AppliedParts {
    /// Makes the answer with these records, of which the first has this number.
    ///
    /// # Panics
    /// If they take more than 64 MiB. [`MAX_PARTS`] take about 1 MiB.
    #[must_use]
    pub fn new(first: u64, records: Vec<AppliedPart>) -> Self {
        let encode = || BulkValue::new(&records).expect("plain data, and not too much of it");
        Self {
            first,
            records: (!records.is_empty()).then(encode),
        }
    }

    /// Returns the records.
    ///
    /// # Errors
    /// If they come from a peer that did not send records of parts.
    pub fn read(self) -> Result<Vec<AppliedPart>, CodecError> {
        self.records.map_or(Ok(Vec::new()), BulkValue::read)
    }
}

/// What is given to the shard, as far as it matters here.
#[derive(Debug)]
pub(super) enum Given {
    /// The numbers of a gradient.
    Part(GradientId),
    /// This gradient is not to be part of an update.
    Dropped(GradientId),
    /// An update of these gradients. It may have to wait for some of them.
    Update(Version, Vec<GradientId>),
}

impl Given {
    pub(super) fn by(decision: &Decision) -> Option<Self> {
        match decision {
            Decision::Stage(id, _) | Decision::Complete(id, _) => Some(Self::Part(*id)),
            Decision::Update { update, .. } => {
                let named = update.gradients.iter().map(|one| one.id);
                Some(Self::Update(update.version, named.collect()))
            }
            Decision::Discard(id) => Some(Self::Dropped(*id)),
            Decision::Save(_) | Decision::Fence { .. } => None,
        }
    }
}

/// What is being done with the shard, and since when.
#[derive(Debug)]
pub(super) struct Doing {
    began: Instant,
    given: Given,
}

/// The latest applied parts of a server.
#[derive(Debug, Default)]
pub(super) struct PartRecorder {
    /// `None` until somebody asks for the first time.
    recording: Option<Recording>,
}

#[derive(Debug, Default)]
struct Recording {
    latest: VecDeque<(Instant, AppliedPart)>,
    /// The number of the first record in `latest`.
    first: u64,
    /// When the parts came that wait for their update.
    came: BTreeMap<GradientId, Instant>,
    /// The updates that the shard has taken and not yet made.
    undone: VecDeque<(Version, Vec<GradientId>)>,
}

impl PartRecorder {
    /// Call it before something is given to the shard. As long as nobody has asked, this is the only cost.
    pub(super) fn begin(&self, given: impl FnOnce() -> Option<Given>) -> Option<Doing> {
        self.recording.as_ref()?;
        let given = given()?;
        let began = Instant::now();
        Some(Doing { began, given })
    }

    /// Call it when the shard has taken it without an error. The shard's weights now have this version.
    pub(super) fn done(&mut self, doing: Option<Doing>, version: Version) {
        let (Some(recording), Some(Doing { began, given })) = (&mut self.recording, doing) else {
            return;
        };
        match given {
            Given::Part(id) => recording.came(id, began),
            Given::Dropped(id) => {
                recording.came.remove(&id);
            }
            Given::Update(version, ids) => recording.undone.push_back((version, ids)),
        }
        recording.made(began, version);
    }

    /// Answers a question.
    pub(super) fn from(&mut self, from: u64) -> AppliedParts {
        let recording = self.recording.get_or_insert_default();
        while recording.first < from && recording.latest.pop_front().is_some() {
            recording.first += 1;
        }
        recording.kept()
    }
}

impl Recording {
    fn came(&mut self, id: GradientId, at: Instant) {
        // Those of a worker that was fenced never get an update, nor do those that came after they were dropped. Forgetting
        // all of them costs nothing but times of a few others.
        if self.came.len() == MAX_PARTS {
            self.came.clear();
        }
        self.came.entry(id).or_insert(at);
    }

    /// Records the parts of the updates until this version, which have just been made.
    fn made(&mut self, began: Instant, until: Version) {
        let mut ended = None;
        while let Some((version, ids)) = self.undone.pop_front() {
            if version > until {
                self.undone.push_front((version, ids));
                break;
            }
            let ended = *ended.get_or_insert_with(Instant::now);
            for id in ids {
                let came = self.came.remove(&id).unwrap_or(began);
                let part = AppliedPart {
                    id,
                    version,
                    held: began.saturating_duration_since(came),
                    took: ended.saturating_duration_since(began),
                    ago: Duration::ZERO,
                };
                self.add(ended, part);
            }
        }
    }

    fn add(&mut self, at: Instant, part: AppliedPart) {
        if self.latest.len() == MAX_PARTS {
            self.latest.pop_front();
            self.first += 1;
        }
        self.latest.push_back((at, part));
    }

    fn kept(&self) -> AppliedParts {
        let now = Instant::now();
        let records = self.latest.iter().map(|(at, part)| AppliedPart {
            ago: now.saturating_duration_since(*at),
            ..part.clone()
        });
        AppliedParts::new(self.first, records.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{Clock, Incarnation, WorkerId};
    use ps_runtime::test_util::transport;

    fn id(clock: u64) -> GradientId {
        GradientId {
            worker: WorkerId(0),
            incarnation: Incarnation(1),
            clock: Clock(clock),
        }
    }

    /// Gives something to a shard, which then has this version.
    fn give(recorder: &mut PartRecorder, given: Given, version: u64) {
        let doing = recorder.begin(|| Some(given));
        recorder.done(doing, Version(version));
    }

    fn update(version: u64, clocks: &[u64]) -> Given {
        let ids = clocks.iter().map(|&clock| id(clock));
        Given::Update(Version(version), ids.collect())
    }

    /// The number of the first record, and of each its clock and version.
    fn answer(recorder: &mut PartRecorder, from: u64) -> (u64, Vec<(u64, u64)>) {
        let answer = transport(&recorder.from(from)).unwrap();
        let first = answer.first;
        let parts = answer.read().unwrap();
        let named = parts.iter().map(|part| (part.id.clock.0, part.version.0));
        (first, named.collect())
    }

    #[test]
    fn nothing_is_recorded_and_no_clock_is_read_until_somebody_asks() {
        let mut recorder = PartRecorder::default();
        let doing = recorder.begin(|| panic!("nobody has asked"));
        assert!(doing.is_none());
        recorder.done(doing, Version(1));
        assert_eq!(answer(&mut recorder, 0), (0, vec![]));
        // An update that was decided before is not known.
        give(&mut recorder, Given::Part(id(0)), 1);
        assert_eq!(answer(&mut recorder, 0), (0, vec![]));
        give(&mut recorder, update(2, &[0]), 2);
        assert_eq!(answer(&mut recorder, 0), (0, vec![(0, 2)]));
    }

    #[test]
    fn a_part_is_recorded_when_its_update_is_made() {
        let mut recorder = PartRecorder::default();
        recorder.from(0);
        give(&mut recorder, Given::Part(id(0)), 0);
        // The second gradient is missing, and with it this update and the next one.
        give(&mut recorder, update(1, &[0, 1]), 0);
        give(&mut recorder, Given::Part(id(2)), 0);
        give(&mut recorder, update(2, &[2]), 0);
        assert_eq!(answer(&mut recorder, 0), (0, vec![]));
        give(&mut recorder, Given::Part(id(1)), 2);
        assert_eq!(answer(&mut recorder, 0), (0, vec![(0, 1), (1, 1), (2, 2)]));
        let recording = recorder.recording.as_ref().unwrap();
        assert!(recording.came.is_empty() && recording.undone.is_empty());
        let parts = recorder.from(0).read().unwrap();
        // The last one that came did not wait.
        assert_eq!(parts[1].held, Duration::ZERO);
        assert!(parts[0].held >= parts[2].held, "{parts:?}");
    }

    #[test]
    fn the_arrival_of_a_gradient_that_is_dropped_is_forgotten() {
        let mut recorder = PartRecorder::default();
        recorder.from(0);
        give(&mut recorder, Given::Part(id(0)), 0);
        give(&mut recorder, Given::Part(id(1)), 0);
        let dropped = Given::by(&Decision::Discard(id(0)));
        give(&mut recorder, dropped.unwrap(), 0);
        let came = &recorder.recording.as_ref().unwrap().came;
        assert_eq!(came.keys().collect::<Vec<_>>(), [&id(1)]);
        assert_eq!(answer(&mut recorder, 0), (0, vec![]));
    }

    #[test]
    fn a_record_is_kept_until_it_has_arrived() {
        let mut recorder = PartRecorder::default();
        recorder.from(0);
        for clock in 0..4 {
            give(&mut recorder, update(clock + 1, &[clock]), clock + 1);
        }
        let last = (1, vec![(1, 2), (2, 3), (3, 4)]);
        assert_eq!(answer(&mut recorder, 1), last);
        // The answer was lost.
        assert_eq!(answer(&mut recorder, 1), last);
        assert_eq!(answer(&mut recorder, 4), (4, vec![]));
        // Whoever asks for what is not there gets what comes next.
        assert_eq!(answer(&mut recorder, u64::MAX), (4, vec![]));
        give(&mut recorder, update(5, &[9]), 5);
        assert_eq!(answer(&mut recorder, 0), (4, vec![(9, 5)]));
    }

    #[test]
    fn the_latest_parts_are_kept_and_fit_into_a_message() {
        let mut recorder = PartRecorder::default();
        recorder.from(0);
        let num_parts = 2 * MAX_PARTS as u64 + 3;
        for clock in 0..num_parts {
            // Every second one gets no update.
            give(&mut recorder, Given::Part(id(u64::MAX - 2 * clock)), clock);
            give(
                &mut recorder,
                Given::Part(id(u64::MAX - 2 * clock - 1)),
                clock,
            );
            let ids = vec![id(u64::MAX - 2 * clock)];
            let given = Given::Update(Version(u64::MAX - num_parts + clock), ids);
            give(&mut recorder, given, u64::MAX);
        }
        let (first, parts) = answer(&mut recorder, 0);
        assert_eq!(
            (first, parts.len()),
            (num_parts - MAX_PARTS as u64, MAX_PARTS)
        );
        assert_eq!(parts.last().unwrap().1, u64::MAX - 1);
        assert!(recorder.recording.unwrap().came.len() <= MAX_PARTS);
    }
}
