//! What a program prints: lines on standard output and standard error, above the progress bar if there is one.

use std::fmt;
use std::io::{self, IsTerminal as _, Write};
use std::sync::{LazyLock, Mutex, PoisonError};

use indicatif::ProgressBar;

/// The bar that is on the terminal now.
static BAR: Mutex<Option<ProgressBar>> = Mutex::new(None);

/// From now on, lines are printed above this bar.
pub(super) fn show_bar(bar: Option<ProgressBar>) {
    *BAR.lock().unwrap_or_else(PoisonError::into_inner) = bar;
}

/// Prints something while the bar is not there.
fn beside_bar<T>(print: impl FnOnce() -> T) -> T {
    let bar = BAR.lock().unwrap_or_else(PoisonError::into_inner).clone();
    match bar {
        Some(bar) => bar.suspend(print),
        None => print(),
    }
}

/// Prints a line as `println!` does, but goes on where nobody reads it or there is no room for it: that is no
/// reason to lose a training.
#[macro_export]
macro_rules! __say {
    ($($arg:tt)*) => {
        $crate::cli::print_line(::std::format_args!($($arg)*))
    };
}

#[doc(inline)]
pub use crate::__say as say;

/// What [`say!`] does.
#[doc(hidden)]
pub fn print_line(line: fmt::Arguments<'_>) {
    let _ = beside_bar(|| writeln!(io::stdout(), "{line}"));
}

/// Prints an error.
pub(super) fn complain(error: &str) {
    // Nobody may be left to read it; the exit code says the same.
    let _ = LogWriter.write_all(format!("Error: {error}\n").as_bytes());
}

/// Whether standard error is a terminal that knows colours and can erase a line.
pub(super) fn can_erase() -> bool {
    static CAN_ERASE: LazyLock<bool> = LazyLock::new(|| {
        io::stderr().is_terminal() && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
    });
    *CAN_ERASE
}

/// Writes log lines to standard error. Each write is a whole line.
///
/// On a terminal, it erases in the same write what is in the cursor's line: that may be the bar of a download, or
/// the bar of another process. A bar is one line, and is drawn again below.
#[derive(Debug)]
pub(super) struct LogWriter;

/// Returns to the beginning of the line and erases it.
const ERASE_LINE: &str = "\r\x1b[K";

impl Write for LogWriter {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let before = if can_erase() { ERASE_LINE } else { "" };
        let whole = [before.as_bytes(), line].concat();
        beside_bar(|| io::stderr().write_all(&whole))?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}
