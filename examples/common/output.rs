//! What an example prints.

/// Prints a line as `println!` does, but goes on where nobody reads it or there is no room for it: that is
/// no reason to lose a training.
macro_rules! say {
    ($($arg:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stdout(), $($arg)*);
    }};
}

pub(crate) use say;
