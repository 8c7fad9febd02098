//! What happened in a run, as text for people and as a number that two runs of one seed share.

use super::messages::Micros;

#[derive(Clone, Debug)]
pub(super) struct Trace {
    hash: u64,
    /// `None`: nobody wants to read it.
    lines: Option<Vec<String>>,
}

impl Trace {
    pub(super) fn new(keeps_lines: bool) -> Self {
        Self {
            hash: 0xcbf2_9ce4_8422_2325,
            lines: keeps_lines.then(Vec::new),
        }
    }

    /// Adds one event: numbers that tell it from others, and its text.
    pub(super) fn add(&mut self, now: Micros, numbers: [u64; 3], text: impl FnOnce() -> String) {
        for number in [now].into_iter().chain(numbers) {
            // FNV-1a over whole numbers, with a shift that brings high bits down.
            self.hash = (self.hash ^ number).wrapping_mul(0x0000_0100_0000_01b3);
            self.hash ^= self.hash >> 29;
        }
        if let Some(lines) = &mut self.lines {
            let millis = now as f64 / 1000.0;
            lines.push(format!("{millis:>12.3} ms  {}", text()));
        }
    }

    pub(super) fn hash(&self) -> u64 {
        self.hash
    }

    pub(super) fn into_lines(self) -> Vec<String> {
        self.lines.unwrap_or_default()
    }
}
