//! The progress of a training on standard error: a bar on a terminal, otherwise a log line now and then.

use std::io::{self, Write as _};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle, TermLike};

use super::super::output;
use super::table::closing_table;
use crate::observe::{Change, Event, Observer, Tally};

/// How often the bar is drawn again.
const REDRAW: Duration = Duration::from_millis(100);

/// After how many seconds the first log line comes, without a terminal. Each pause is twice as long as the one
/// before, up to [`LONGEST`].
const FIRST: f64 = 5.0;

/// The longest time between two log lines, in seconds.
const LONGEST: f64 = 60.0;

/// Shows the progress of a training on standard error, and a table at its end.
///
/// On a terminal it is one line that is drawn again and again. Log lines, and lines of
/// [`say!`](crate::cli::say), come above it. Without a terminal, or on one that can erase nothing (`TERM=dumb`), it
/// is a log line after 5 s, 10 s, 20 s, 40 s, and then once a minute. `NO_COLOR` switches colours off.
#[derive(Debug)]
pub struct Progress {
    tally: Tally,
    bar: Option<ProgressBar>,
    drawn: Instant,
    /// When the next log line is due, in seconds since the run started.
    next_line: f64,
    /// Whether the servers are lost.
    is_recovering: bool,
    is_paused: bool,
    is_terminal: bool,
    /// Whether all of it is drawn, and nothing is printed.
    is_unseen: bool,
}

impl Progress {
    /// Makes a display. It shows nothing before the first event.
    #[must_use]
    pub fn new() -> Self {
        Self {
            tally: Tally::default(),
            bar: None,
            drawn: Instant::now(),
            next_line: FIRST,
            is_recovering: false,
            is_paused: false,
            is_terminal: output::can_erase(),
            is_unseen: false,
        }
    }

    /// Makes a display that draws as on a terminal of 80 columns, which nobody sees. For the benchmark of what observing
    /// costs.
    #[doc(hidden)]
    #[must_use]
    pub fn unseen() -> Self {
        let mut progress = Self::new();
        (progress.is_terminal, progress.is_unseen) = (true, true);
        progress
    }

    fn begin(&mut self) {
        if !self.is_terminal {
            return;
        }
        let target = match self.is_unseen {
            true => ProgressDrawTarget::term_like_with_hz(Box::new(Unseen), 20),
            false => ProgressDrawTarget::stderr(),
        };
        let bar = ProgressBar::with_draw_target(Some(1), target);
        // One line: log lines of other processes on the same terminal can then overwrite it.
        let style = ProgressStyle::with_template(match self.tally.steps_done() {
            // Nobody knows how many steps there will be.
            (_, 0) => "{spinner} {wide_msg}",
            _ => "[{bar:16}] {percent:>3} % {wide_msg}",
        });
        let style = style.expect("the template is well-formed");
        bar.set_style(style.progress_chars("=> "));
        output::show_bar(Some(bar.clone()));
        self.bar = Some(bar);
        self.draw();
    }

    fn draw(&mut self) {
        self.drawn = Instant::now();
        if let Some(bar) = &self.bar {
            match self.tally.steps_done() {
                (_, 0) => bar.tick(),
                (done, all) => {
                    bar.set_length(all);
                    bar.set_position(done);
                }
            }
            bar.set_message(self.status());
        }
    }

    /// Draws what must be seen now, because nothing else may happen for a while.
    fn draw_at_once(&mut self) {
        self.draw();
        if let Some(bar) = &self.bar {
            // It leaves out what comes too soon after what it has drawn.
            bar.force_draw();
        }
    }

    /// Says in a few words how the training goes. What matters most comes first, because a narrow terminal cuts
    /// the rest off.
    fn status(&self) -> String {
        let tally = &self.tally;
        let mut parts = Vec::new();
        if self.is_recovering {
            parts.push("the servers are lost, recovering".to_owned());
        }
        if self.is_paused {
            parts.push("paused".to_owned());
        }
        if let Some(part) = tally.evaluating {
            parts.push(format!("evaluating, {:.0} %", 100.0 * part));
        }
        if let Some(left) = tally.seconds_left()
            && !self.is_paused
        {
            parts.push(format!("{} left", duration(left)));
        }
        let (num_lost, num_workers) = (tally.num_workers_lost(), tally.workers.len());
        if num_lost > 0 {
            parts.push(format!("{num_lost} of {num_workers} workers lost"));
        }
        if let Some(loss) = tally.loss() {
            parts.push(format!("loss {loss:.3}"));
        }
        if let Some((_, _, Some(accuracy))) = tally.evaluation {
            parts.push(format!("accuracy {:.1} %", 100.0 * accuracy));
        }
        if tally.num_applied() > 0 {
            let rate = tally.gradients_per_second(tally.seconds);
            parts.push(format!("{rate:.0} gradients/s"));
            parts.push(format!("staleness {:.1}", tally.staleness.mean()));
        }
        if num_lost == 0 {
            let num_live = tally.num_workers_live();
            let plural = if num_live == 1 { "" } else { "s" };
            parts.push(format!("{num_live} worker{plural}"));
        }
        parts.join(", ")
    }

    fn line(&mut self) {
        let now = self.tally.seconds;
        if now < self.next_line {
            return;
        }
        self.next_line = now + now.min(LONGEST);
        let status = self.status();
        match self.tally.steps_done() {
            (_, 0) => tracing::info!(target: "ps::progress", "{status}"),
            (done, all) => {
                let percent = 100 * done / all;
                tracing::info!(target: "ps::progress", "{percent} %: {status}");
            }
        }
    }

    fn end(&mut self) {
        if let Some(bar) = self.bar.take() {
            // In this order: a line that somebody prints meanwhile must not go beside the bar.
            bar.finish_and_clear();
            output::show_bar(None);
        }
        let is_coloured =
            self.is_terminal && std::env::var_os("NO_COLOR").is_none_or(|no| no.is_empty());
        let table = closing_table(&self.tally, is_coloured);
        if let Some(table) = table.filter(|_| !self.is_unseen) {
            // Nobody may be left to read it.
            let _ = write!(io::stderr(), "{table}");
        }
    }
}

impl Default for Progress {
    fn default() -> Self {
        Self::new()
    }
}

impl Observer for Progress {
    fn observe(&mut self, event: &Event) {
        self.tally.count(event);
        match event {
            Event::RunStarted(_) => self.begin(),
            Event::RunEnded(_) => self.end(),
            Event::ServersLost(_) => self.is_recovering = true,
            Event::ServersRecovered(_) => self.is_recovering = false,
            Event::Controlled(controlled) => match controlled.change {
                Change::Paused => self.is_paused = true,
                Change::Resumed => self.is_paused = false,
                _ => {}
            },
            _ => {}
        }
        let is_rare = matches!(
            event,
            Event::ServersLost(_)
                | Event::ServersRecovered(_)
                | Event::WorkerLost(_)
                | Event::Controlled(_)
        );
        match self.bar {
            Some(_) if is_rare => self.draw_at_once(),
            Some(_) if self.drawn.elapsed() >= REDRAW => self.draw(),
            None if !self.is_terminal && !matches!(event, Event::RunEnded(_)) => self.line(),
            _ => {}
        }
    }
}

/// A training that ends without an end, for example because its driver panicked, leaves no bar behind.
impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
            output::show_bar(None);
        }
    }
}

/// A terminal of 80 columns that nobody sees.
#[derive(Debug)]
struct Unseen;

impl TermLike for Unseen {
    fn width(&self) -> u16 {
        80
    }

    fn move_cursor_up(&self, _: usize) -> io::Result<()> {
        Ok(())
    }

    fn move_cursor_down(&self, _: usize) -> io::Result<()> {
        Ok(())
    }

    fn move_cursor_right(&self, _: usize) -> io::Result<()> {
        Ok(())
    }

    fn move_cursor_left(&self, _: usize) -> io::Result<()> {
        Ok(())
    }

    fn write_line(&self, _: &str) -> io::Result<()> {
        Ok(())
    }

    fn write_str(&self, _: &str) -> io::Result<()> {
        Ok(())
    }

    fn clear_line(&self) -> io::Result<()> {
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes a time in the unit that fits.
fn duration(seconds: f64) -> String {
    let seconds = seconds.ceil() as u64;
    match seconds {
        0..=99 => format!("{seconds} s"),
        100..=5999 => format!("{} min", seconds.div_ceil(60)),
        _ => format!("{}:{:02} h", seconds / 3600, seconds % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_evaluation_that_takes_long_is_shown_until_it_is_over() {
        use crate::source::TestResult;
        use ps_actors::ids::Version;

        use crate::observe::testing;

        let mut progress = Progress::new();
        progress.tally.count(&testing::step(0, 0, 1.0));
        assert!(!progress.status().contains("evaluating"));
        progress.tally.count(&testing::evaluating(1.5, 30, 40));
        let status = progress.status();
        assert!(status.starts_with("evaluating, 75 %, "), "{status}");
        let result = TestResult::default();
        progress
            .tally
            .count(&Event::evaluated(1.0, 2.0, Version(1), &result, false));
        assert!(!progress.status().contains("evaluating"));
    }

    #[test]
    fn without_a_number_of_steps_there_is_no_time_left_and_no_percentage() {
        let mut progress = Progress::new();
        for clock in 0..20 {
            progress
                .tally
                .count(&crate::observe::testing::step(0, clock, clock as f64));
        }
        let tally = &progress.tally;
        assert_eq!((tally.steps_done(), tally.seconds_left()), ((20, 0), None));
        assert!(!progress.status().contains("left"));
    }

    /// After such an event, nothing else may happen for a long time.
    #[test]
    fn what_stops_the_training_is_shown_at_once() {
        use crate::observe::{Controlled, ServersLost, ServersRecovered, testing};

        let controlled = |change| Event::Controlled(Controlled { time: 1.0, change });
        let lost = Event::ServersLost(ServersLost {
            time: 1.0,
            reason: "a test".to_owned(),
        });
        let recovered = Event::ServersRecovered(ServersRecovered {
            time: 1.0,
            version: Default::default(),
            seconds: 1.0,
        });
        let mut progress = Progress::new();
        progress.observe(&testing::step(0, 0, 1.0));
        progress.bar = Some(ProgressBar::hidden());
        for (event, text, is_shown) in [
            (lost, "the servers are lost, recovering", true),
            (recovered, "the servers are lost, recovering", false),
            (controlled(Change::Paused), "paused", true),
            (controlled(Change::Resumed), "paused", false),
            (testing::worker_lost(1.0), "1 of 1 workers lost", true),
        ] {
            progress.drawn = Instant::now();
            progress.observe(&event);
            let message = progress.bar.as_ref().unwrap().message();
            assert_eq!(message.contains(text), is_shown, "{event:?}: {message}");
        }
    }

    #[test]
    fn times_are_short() {
        for (seconds, expected) in [
            (0.2, "1 s"),
            (99.0, "99 s"),
            (100.5, "2 min"),
            (5_999.0, "100 min"),
            (6_000.0, "1:40 h"),
            (400_000.0, "111:06 h"),
        ] {
            assert_eq!(duration(seconds), expected);
        }
    }

    #[test]
    fn lines_without_a_terminal_become_rare() {
        let mut progress = Progress::new();
        progress.is_terminal = false;
        let mut times = Vec::new();
        for second in 0..300 {
            progress.tally.seconds = f64::from(second);
            let before = progress.next_line;
            progress.line();
            if progress.next_line != before {
                times.push(second);
            }
        }
        assert_eq!(times, [5, 10, 20, 40, 80, 140, 200, 260]);
    }
}
