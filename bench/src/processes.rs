//! Memory and processor time of everything that a run has started, found by a mark in the
//! environment: Ray's daemons leave their parent, session and process group, but keep that. Read from
//! `/proc`, so there is nothing to see but on Linux.

use std::collections::BTreeSet;
use std::fs;

use rustix::process::{Pid, Signal, kill_process};

/// The variable whose value is the mark.
pub(crate) const MARK: &str = "PS_BENCH_RUN";

/// Processor times in `/proc` are in ticks of this length, on every Linux.
const TICKS_PER_S: f64 = 100.0;

/// The processes with one mark.
#[derive(Debug)]
pub(crate) struct Marked {
    entry: Vec<u8>,
    /// Processes that were there before and are not looked at again.
    others: BTreeSet<i32>,
}

impl Marked {
    /// Must be made before the first process with this mark is started.
    pub(crate) fn new(mark: &str) -> Self {
        let mut others: BTreeSet<_> = all().collect();
        others.remove(&(std::process::id() as i32));
        Self {
            entry: format!("{MARK}={mark}").into_bytes(),
            others,
        }
    }

    fn ids(&self) -> Vec<i32> {
        let is_marked = |id: &i32| {
            let environment = fs::read(format!("/proc/{id}/environ")).unwrap_or_default();
            let mut entries = environment.split(|byte| *byte == 0);
            entries.any(|entry| entry == self.entry)
        };
        let news = all().filter(|id| !self.others.contains(id));
        news.filter(is_marked).collect()
    }

    /// Returns the memory of all together, in bytes. Pages that several processes share count once
    /// (PSS, proportional set size).
    pub(crate) fn memory(&self) -> u64 {
        let ids = self.ids().into_iter();
        ids.filter_map(|id| pss(&fs::read_to_string(format!("/proc/{id}/smaps_rollup")).ok()?))
            .sum()
    }

    /// Returns the processor time of all that are there, and of their children that were waited for,
    /// in seconds.
    pub(crate) fn cpu_seconds(&self) -> f64 {
        let ids = self.ids().into_iter();
        ids.filter_map(|id| ticks(&fs::read_to_string(format!("/proc/{id}/stat")).ok()?))
            .map(|ticks| ticks as f64 / TICKS_PER_S)
            .sum()
    }

    /// Ends those that are still there.
    pub(crate) fn kill(&self) {
        let ids = self.ids().into_iter();
        for id in ids.filter_map(Pid::from_raw) {
            // It may have ended by itself meanwhile.
            let _ = kill_process(id, Signal::KILL);
        }
    }
}

fn all() -> impl Iterator<Item = i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

fn pss(smaps: &str) -> Option<u64> {
    let line = smaps.lines().find(|line| line.starts_with("Pss:"))?;
    Some(1024 * line.split_whitespace().nth(1)?.parse::<u64>().ok()?)
}

/// Of the process itself and its children, as user and in the system.
fn ticks(stat: &str) -> Option<u64> {
    // The program's name, in brackets, may hold anything.
    let (_, fields) = stat.rsplit_once(')')?;
    let fields = fields.split_whitespace().skip(11).take(4);
    fields.map(|field| field.parse::<u64>().ok()).sum()
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn proportional_memory_is_read_from_the_rollup() {
        let smaps = "5580 [rollup]\nRss:        9000 kB\nPss:        1234 kB\nPss_Dirty:   99 kB\n";
        assert_eq!(pss(smaps), Some(1234 * 1024));
        assert_eq!(pss(""), None);
    }

    #[test]
    fn times_are_found_behind_any_program_name() {
        let stat = "17 (a) b (c) S 1 17 17 0 -1 4194304 100 0 0 0 7 8 20 30 20 0 1 0 55 0 0";
        assert_eq!(ticks(stat), Some(65));
        assert_eq!(ticks("17 (cut off) S 1"), Some(0));
        assert_eq!(ticks(""), None);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn children_with_the_mark_are_seen_and_ended() {
        let marked = Marked::new("a-test");
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .env(MARK, "a-test")
            .spawn()
            .unwrap();
        // Its environment is there a moment after `spawn` has returned.
        let deadline = Instant::now() + Duration::from_secs(10);
        while marked.memory() == 0 && Instant::now() < deadline {
            std::thread::yield_now();
        }
        assert!(marked.memory() > 0);
        assert_eq!(marked.ids(), [child.id() as i32]);
        marked.kill();
        assert!(!child.wait().unwrap().success());
        assert!(marked.ids().is_empty());
    }
}
