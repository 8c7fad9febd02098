//! The disk of the machine with the first server: checkpoints, and the segments of an update log.
//!
//! What was written survives the death of a process. What was synced survives a loss of power. Of the rest,
//! a loss of power keeps a part: a beginning of each segment, perhaps with a torn entry at its end, because a
//! file is written from front to back.
//!
//! Checkpoints are kept as values and not as bytes. How they are written, read and checked is tested with
//! real files (`checkpoint/`).

use super::dice::Dice;
use super::settings::{Mistake, Settings};
use crate::checkpoint::Checkpoint;
use crate::ids::Version;
use crate::server::replay::{LogEntry, Replay};

/// One entry of the log, with the numbers of its gradients.
#[derive(Clone, Debug)]
pub(super) struct Record {
    pub(super) entry: LogEntry,
    pub(super) numbers: Vec<f32>,
}

#[derive(Clone, Debug)]
struct Segment {
    start: Version,
    records: Vec<Record>,
    /// How many of the records are on the disk for certain.
    num_synced: usize,
    /// Whether a part of a record follows. Nothing can be read after it.
    torn_after: Option<usize>,
}

#[derive(Clone, Debug)]
struct Stored {
    checkpoint: Checkpoint,
    is_complete: bool,
    is_damaged: bool,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Disk {
    segments: Vec<Segment>,
    checkpoints: Vec<Stored>,
}

/// What a loss of power did to the disk.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct PowerLoss {
    pub(super) num_records_lost: usize,
    pub(super) is_torn: bool,
    pub(super) checkpoint_was_incomplete: bool,
}

/// What servers go on from.
#[derive(Debug)]
pub(super) struct Recovered {
    /// `None`: from initial weights.
    pub(super) checkpoint: Option<Checkpoint>,
    /// How many updates of the log followed.
    pub(super) num_updates: u64,
    /// The version of the checkpoint on the disk, before the log.
    pub(super) saved: Option<Version>,
    pub(super) skipped_damaged: bool,
}

impl Disk {
    /// Describes what is on the disk.
    #[cfg(test)]
    pub(super) fn description(&self) -> String {
        let segments = self.segments.iter();
        let entries: Vec<_> = segments
            .flat_map(|segment| segment.records.iter().map(|record| &record.entry))
            .collect();
        format!("{entries:?}")
    }

    pub(super) fn rotate(&mut self, start: Version) {
        self.segments.push(Segment {
            start,
            records: Vec::new(),
            num_synced: 0,
            torn_after: None,
        });
    }

    pub(super) fn append(&mut self, record: Record) {
        if let Some(segment) = self.segments.last_mut() {
            segment.records.push(record);
        }
    }

    pub(super) fn sync(&mut self) {
        for segment in &mut self.segments {
            segment.num_synced = segment.records.len();
        }
    }

    /// Begins to write a checkpoint.
    pub(super) fn begin(&mut self, checkpoint: Checkpoint) {
        self.checkpoints.push(Stored {
            checkpoint,
            is_complete: false,
            is_damaged: false,
        });
    }

    /// Renames the checkpoint that is being written. It is synced then. Removes what no checkpoint needs.
    pub(super) fn complete(&mut self) {
        if let Some(last) = self.checkpoints.last_mut() {
            last.is_complete = true;
        }
        let num_over = self.checkpoints.len().saturating_sub(3);
        self.checkpoints.drain(..num_over);
        if let Some(oldest) = self.checkpoints.first() {
            let oldest = oldest.checkpoint.version();
            self.segments.retain(|segment| segment.start >= oldest);
        }
    }

    /// Forgets what was half written.
    pub(super) fn abandon(&mut self) {
        self.checkpoints.retain(|stored| stored.is_complete);
    }

    /// Damages the newest checkpoint. Returns `false` if there is no other one, without which nobody could go
    /// on.
    pub(super) fn damage(&mut self) -> bool {
        let is_usable = |stored: &&mut Stored| stored.is_complete && !stored.is_damaged;
        let mut usable = self.checkpoints.iter_mut().rev().filter(is_usable);
        match (usable.next(), usable.next()) {
            (Some(newest), Some(_)) => {
                newest.is_damaged = true;
                true
            }
            _ => false,
        }
    }

    pub(super) fn lose_power(&mut self, dice: &mut Dice) -> PowerLoss {
        let mut loss = PowerLoss::default();
        for segment in &mut self.segments {
            let (len, least) = (segment.records.len(), segment.num_synced);
            let kept = dice.within(least as u64..=len as u64) as usize;
            if kept < len {
                loss.num_records_lost += len - kept;
                if dice.chance(50.0) {
                    segment.torn_after = Some(kept);
                    loss.is_torn = true;
                }
                segment.records.truncate(kept);
            }
        }
        let num_before = self.checkpoints.len();
        self.abandon();
        loss.checkpoint_was_incomplete = self.checkpoints.len() < num_before;
        loss
    }

    /// Reads the newest checkpoint that can be used, lets it follow the log, and removes what does not follow.
    pub(super) fn recover(&mut self, settings: &Settings) -> Recovered {
        let keeps_torn_end = settings.mistake == Some(Mistake::WritesBehindTornEnd);
        self.abandon();
        let mut usable = self
            .checkpoints
            .iter()
            .rev()
            .skip_while(|one| one.is_damaged);
        let found = usable.next().map(|stored| stored.checkpoint.clone());
        let skipped_damaged = self.checkpoints.iter().any(|one| one.is_damaged);
        let saved = found.as_ref().map(Checkpoint::version);
        // A run begins with a checkpoint of its initial weights.
        let Some(start) = found else {
            return Recovered {
                checkpoint: None,
                num_updates: 0,
                saved,
                skipped_damaged,
            };
        };
        let (from, rule) = (start.version(), Box::new(settings.rule()));
        let mut replay = Replay::new(start, rule).expect("the rule is the same");
        let mut num_updates = 0;
        let first = self
            .segments
            .iter()
            .position(|segment| segment.start == from);
        let mut num_used = 0;
        for segment in self.segments.iter_mut().skip(first.unwrap_or(usize::MAX)) {
            if segment.start != replay.version() {
                break;
            }
            num_used += 1;
            if let (Some(torn), false) = (segment.torn_after, keeps_torn_end) {
                segment.records.truncate(torn);
                segment.torn_after = None;
            }
            let readable = segment.torn_after.unwrap_or(segment.records.len());
            for record in &segment.records[..readable] {
                let followed = replay.follow(record.entry.clone(), &record.numbers);
                num_updates += u64::from(followed.expect("the log has no gaps"));
            }
        }
        self.segments.truncate(first.unwrap_or(0) + num_used);
        Recovered {
            checkpoint: Some(replay.finish()),
            num_updates,
            saved,
            skipped_damaged,
        }
    }
}
