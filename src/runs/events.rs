//! The file of events: lines of JSON in a file that does not grow without bound.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, BufWriter, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::observe::{Event, EventsSkipped, StepsThinned};

/// How many bytes the file may have.
pub(super) const MAX_BYTES: u64 = 64 << 20;

/// How many bytes are collected before they are written.
const BUFFER: usize = 1 << 16;

/// How long a line waits at most until it is written.
const FLUSH_EVERY: Duration = Duration::from_millis(250);

/// How long nothing is tried after the disk was full.
const PAUSE: Duration = Duration::from_secs(10);

/// The file of events, open for appending.
#[derive(Debug)]
pub(super) struct EventsFile {
    path: PathBuf,
    file: File,
    max_bytes: u64,
    /// How many bytes of whole lines are in the file.
    len: u64,
    /// Whole lines that are not yet written, and how many events they are.
    buffer: Vec<u8>,
    num_buffered: u64,
    written: Instant,
    thinning: Thinning,
    num_thinned: u64,
    /// Until when nothing is tried, because the disk was full, and how many events were lost by that.
    paused_until: Option<Instant>,
    num_lost: u64,
    /// How many of these the file already tells of, and how many it does when the buffer is written.
    num_told: u64,
    num_telling: u64,
}

impl EventsFile {
    /// Opens a file. Removes a last line that is cut. Goes on thinning as the file says.
    pub(super) fn open(path: &Path, max_bytes: u64) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        let mut file = options.read(true).append(true).create(true).open(path)?;
        let (len, every) = whole_lines(&mut file)?;
        file.set_len(len)?;
        Ok(Self {
            path: path.to_owned(),
            file,
            max_bytes,
            len,
            buffer: Vec::new(),
            num_buffered: 0,
            written: Instant::now(),
            thinning: Thinning::every(every),
            num_thinned: 0,
            paused_until: None,
            num_lost: 0,
            num_told: 0,
            num_telling: 0,
        })
    }

    /// Returns how many steps there are for each one that is kept.
    pub(super) fn every(&self) -> u64 {
        self.thinning.every
    }

    /// Returns how many events were lost because the file could not be written.
    pub(super) fn num_lost(&self) -> u64 {
        self.num_lost
    }

    /// Adds an event. It is in the file after 250 ms at the latest, if further events come. The start of a run is there at
    /// once, because without it the file says nothing.
    ///
    /// # Errors
    /// If the file could not be written, the first time and then every 10 s. Some events are then lost.
    pub(super) fn add(&mut self, event: &Event) -> io::Result<()> {
        if !self.thinning.keeps(event) {
            self.num_thinned += 1;
            return Ok(());
        }
        if self
            .paused_until
            .is_some_and(|until| Instant::now() < until)
        {
            self.num_lost += 1;
            return Ok(());
        }
        if self.paused_until.take().is_some() {
            self.add_line(&Event::EventsSkipped(EventsSkipped {
                time: event.time(),
                num_events: self.num_lost - self.num_told,
            }))?;
            self.num_telling = self.num_lost;
        }
        self.add_line(event)?;
        self.num_buffered += 1;
        let is_start = matches!(event, Event::RunStarted(_));
        if is_start || self.buffer.len() >= BUFFER || self.written.elapsed() >= FLUSH_EVERY {
            self.flush()?;
        }
        if self.len > self.max_bytes
            && let Err(error) = self.thin(event.time())
        {
            // It is not tried again for every event.
            self.max_bytes = self.max_bytes.saturating_mul(2);
            return Err(error);
        }
        Ok(())
    }

    fn add_line(&mut self, event: &Event) -> io::Result<()> {
        serde_json::to_writer(&mut self.buffer, event)?;
        self.buffer.push(b'\n');
        Ok(())
    }

    /// Writes what is collected.
    ///
    /// # Errors
    /// If the file cannot be written. The lines are then lost, and no part of one is left.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        self.written = Instant::now();
        let written = self.file.write_all(&self.buffer);
        match &written {
            Ok(()) => {
                self.len += self.buffer.len() as u64;
                self.num_told = self.num_telling;
            }
            Err(_) => {
                self.num_lost += self.num_buffered;
                self.num_telling = self.num_told;
                self.paused_until = Some(Instant::now() + PAUSE);
                // If this fails, the next one who opens the file does it.
                let _ = self.file.set_len(self.len);
            }
        }
        self.buffer.clear();
        self.num_buffered = 0;
        written
    }

    /// Leaves out every second one of the frequent events, until half of the room is free.
    fn thin(&mut self, time: f64) -> io::Result<()> {
        // A file of rare events alone gets no smaller.
        for _ in 0..64 {
            self.thinning.double();
            let before = self.len;
            self.rewrite(time)?;
            if self.len <= self.max_bytes / 2 || self.len == before {
                break;
            }
        }
        if self.len > self.max_bytes / 2 {
            // Rare events were not rare. There is room for as many again.
            self.max_bytes = self.max_bytes.max(2 * self.len);
        }
        let every = self.thinning.every;
        tracing::info!(path = %self.path.display(), "only one step in {every} is kept in this file");
        Ok(())
    }

    fn rewrite(&mut self, time: f64) -> io::Result<()> {
        let temporary = self.path.with_extension("jsonl.tmp");
        let mut out = BufWriter::new(File::create(&temporary)?);
        let mut thinning = Thinning {
            every: self.thinning.every,
            every_other: 2,
            num_seen: [0; 2],
        };
        let mut len = 0;
        for line in BufReader::new(File::open(&self.path)?).lines() {
            let line = line?;
            let keeps = match serde_json::from_str::<Event>(&line) {
                Ok(Event::StepsThinned(_)) => false,
                Ok(event) => thinning.keeps(&event),
                // A later version wrote it.
                Err(_) => true,
            };
            match keeps {
                true => {
                    writeln!(out, "{line}")?;
                    len += line.len() as u64 + 1;
                }
                false => self.num_thinned += 1,
            }
        }
        let mut line = serde_json::to_vec(&Event::StepsThinned(StepsThinned {
            time,
            kept_every: self.thinning.every,
            num_left_out: self.num_thinned,
        }))?;
        line.push(b'\n');
        out.write_all(&line)?;
        out.into_inner()
            .map_err(io::IntoInnerError::into_error)?
            .sync_data()?;
        fs::rename(&temporary, &self.path)?;
        self.file = OpenOptions::new().append(true).open(&self.path)?;
        self.len = len + line.len() as u64;
        Ok(())
    }
}

/// Returns the length of the whole lines of a file, and how it was thinned.
fn whole_lines(file: &mut File) -> io::Result<(u64, u64)> {
    file.seek(SeekFrom::Start(0))?;
    let mut reader = BufReader::new(file);
    let (mut len, mut every, mut line) = (0, 1, Vec::new());
    loop {
        line.clear();
        let num_bytes = reader.read_until(b'\n', &mut line)?;
        if line.last() != Some(&b'\n') {
            return Ok((len, every));
        }
        len += num_bytes as u64;
        // Others need not be read.
        if line.starts_with(br#"{"event":"steps_thinned""#)
            && let Ok(Event::StepsThinned(thinned)) = serde_json::from_slice(&line)
        {
            every = thinned.kept_every.max(1);
        }
    }
}

/// Which of the frequent events are kept. Pure.
#[derive(Clone, Copy, Debug)]
struct Thinning {
    /// Of the steps of each worker, those whose clock is a multiple of this number.
    every: u64,
    /// Of evaluations and states of servers, one of so many.
    every_other: u64,
    /// How many evaluations and states of servers there were.
    num_seen: [u64; 2],
}

impl Thinning {
    /// For new events.
    fn every(every: u64) -> Self {
        Self {
            every,
            every_other: every,
            num_seen: [0; 2],
        }
    }

    /// Keeps half as many of the new events.
    fn double(&mut self) {
        self.every = self.every.saturating_mul(2);
        self.every_other = self.every;
    }

    fn keeps(&mut self, event: &Event) -> bool {
        let kind = match event {
            Event::Step(step) => return step.clock.0.is_multiple_of(self.every),
            Event::Evaluated(evaluated) if !evaluated.is_final => 0,
            Event::ServersSeen(_) => 1,
            _ => return true,
        };
        let number = self.num_seen[kind];
        self.num_seen[kind] += 1;
        number.is_multiple_of(self.every_other)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use ps_actors::cluster::NodeId;
    use ps_actors::ids::{Version, WorkerId};

    use super::*;
    use crate::observe::{Evaluated, ServersSeen, testing};

    fn lines(path: &Path) -> Vec<Event> {
        let text = fs::read_to_string(path).unwrap();
        let lines = text.lines();
        lines
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    #[test]
    fn a_long_run_keeps_every_nth_step_of_each_worker_in_a_bounded_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("events.jsonl");
        let max_bytes = 100_000;
        let mut file = EventsFile::open(&path, max_bytes).unwrap();
        let (num_steps, num_lost) = (5_000, 40);
        for clock in 0..num_steps {
            for worker in 0..2 {
                file.add(&testing::step(worker, clock, clock as f64))
                    .unwrap();
            }
            if clock % (num_steps / num_lost) == 0 {
                file.add(&testing::worker_lost(clock as f64)).unwrap();
                // The process was killed in the middle of a line, and goes on.
                file.flush().unwrap();
                drop(file);
                let mut cut = OpenOptions::new().append(true).open(&path).unwrap();
                cut.write_all(b"{\"event\":\"step\",\"ti").unwrap();
                file = EventsFile::open(&path, max_bytes).unwrap();
            }
        }
        file.flush().unwrap();
        assert!(fs::metadata(&path).unwrap().len() <= max_bytes + BUFFER as u64);
        let every = file.every();
        assert!(every >= 8 && every.is_power_of_two(), "{every}");
        let events = lines(&path);
        let mut clocks: BTreeMap<WorkerId, Vec<u64>> = BTreeMap::new();
        for event in &events {
            if let Event::Step(step) = event {
                clocks.entry(step.worker).or_default().push(step.clock.0);
            }
        }
        let expected: Vec<u64> = (0..num_steps).step_by(every as usize).collect();
        assert_eq!(clocks[&WorkerId(0)], expected);
        assert_eq!(clocks[&WorkerId(1)], expected);
        let lost = events
            .iter()
            .filter(|event| matches!(event, Event::WorkerLost(_)));
        assert_eq!(lost.count() as u64, num_lost, "rare events are all there");
        let thinned: Vec<_> = events
            .iter()
            .filter_map(|event| match event {
                Event::StepsThinned(thinned) => Some(thinned.kept_every),
                _ => None,
            })
            .collect();
        assert_eq!(thinned, [every]);
    }

    #[test]
    fn evaluations_and_looks_at_the_servers_are_thinned_as_the_steps_are() {
        fn evaluated(version: u64) -> Event {
            Event::Evaluated(Evaluated {
                time: version as f64,
                seconds: 0.1,
                version: Version(version),
                loss: 1.0,
                accuracy: None,
                metrics: BTreeMap::new(),
                is_final: false,
            })
        }
        fn seen(version: u64) -> Event {
            Event::ServersSeen(ServersSeen {
                time: version as f64,
                learning_rate: 0.1,
                consistency: "asp".to_owned(),
                num_pending: 0,
                awaited: Vec::new(),
                members: Vec::new(),
                servers: Vec::new(),
                log: None,
            })
        }
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("events.jsonl");
        let mut file = EventsFile::open(&path, 50_000).unwrap();
        let num_steps = 2_048;
        for clock in 0..num_steps {
            // The run goes on in another process.
            if clock == num_steps / 2 {
                file.flush().unwrap();
                assert!(file.every() > 1);
                file = EventsFile::open(&path, 50_000).unwrap();
            }
            for event in [
                testing::step(0, clock, clock as f64),
                evaluated(clock),
                seen(clock),
            ] {
                // The line is written now. So the file is thinned as soon as it is too large.
                file.written -= FLUSH_EVERY;
                file.add(&event).unwrap();
            }
        }
        let expected: Vec<u64> = (0..num_steps).step_by(file.every() as usize).collect();
        let events = lines(&path);
        let kept = |clock: fn(&Event) -> Option<u64>| -> Vec<u64> {
            events.iter().filter_map(clock).collect()
        };
        assert_eq!(
            kept(|event| match event {
                Event::Step(step) => Some(step.clock.0),
                _ => None,
            }),
            expected
        );
        assert_eq!(
            kept(|event| match event {
                Event::Evaluated(evaluated) => Some(evaluated.version.0),
                _ => None,
            }),
            expected
        );
        assert_eq!(
            kept(|event| match event {
                Event::ServersSeen(seen) => Some(seen.time as u64),
                _ => None,
            }),
            expected
        );
    }

    #[test]
    fn a_file_of_rare_events_alone_still_takes_events() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("events.jsonl");
        let mut file = EventsFile::open(&path, 10_000).unwrap();
        for number in 0..2_000 {
            file.add(&testing::worker_lost(f64::from(number))).unwrap();
        }
        file.flush().unwrap();
        let lost = lines(&path).into_iter();
        let lost = lost.filter(
            |event| matches!(event, Event::WorkerLost(lost) if lost.node == Some(NodeId::DRIVER)),
        );
        assert_eq!(lost.count(), 2_000);
    }

    /// `/dev/full` is Linux's disk that is always full.
    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_is_an_error_now_and_then_and_loses_events() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("events.jsonl");
        let mut file = EventsFile::open(&path, MAX_BYTES).unwrap();
        file.file = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let mut num_errors = 0;
        for clock in 0..1_000 {
            num_errors += u32::from(file.add(&testing::step(0, clock, 0.0)).is_err());
        }
        assert!(file.flush().is_ok(), "nothing is tried meanwhile");
        assert_eq!(num_errors, 1);
        assert_eq!(file.num_lost(), 1_000);
        // It is tried again, in vain.
        file.paused_until = Some(Instant::now());
        let is_written = file
            .add(&testing::step(0, 1_000, 0.0))
            .and_then(|()| file.flush());
        assert!(is_written.is_err());
        assert!(file.flush().is_ok(), "nothing is tried meanwhile");
        assert_eq!(file.num_lost(), 1_001);
        // There is room again.
        file.file = OpenOptions::new().append(true).open(&path).unwrap();
        file.paused_until = Some(Instant::now());
        file.add(&testing::step(0, 1_001, 0.0)).unwrap();
        file.flush().unwrap();
        let events = lines(&path);
        assert!(
            matches!(&events[..], [Event::EventsSkipped(skipped), Event::Step(_)] if skipped.num_events == 1_001),
            "{events:?}"
        );
        // They are told once.
        file.paused_until = Some(Instant::now());
        file.num_lost += 3;
        file.add(&testing::step(0, 1_002, 0.0)).unwrap();
        file.flush().unwrap();
        let told = lines(&path).into_iter().filter_map(|event| match event {
            Event::EventsSkipped(skipped) => Some(skipped.num_events),
            _ => None,
        });
        assert_eq!(told.collect::<Vec<_>>(), [1_001, 3]);
    }
}
