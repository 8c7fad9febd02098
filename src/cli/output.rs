//! What a program prints.

use std::io::Write as _;

/// Prints a line as `println!` does, but goes on where nobody reads it or there is no room for it: that is no
/// reason to lose a training.
#[macro_export]
macro_rules! __say {
    ($($arg:tt)*) => {{
        use ::std::io::Write as _;
        let _ = ::std::writeln!(::std::io::stdout(), $($arg)*);
    }};
}

#[doc(inline)]
pub use crate::__say as say;

/// Prints an error.
pub(super) fn complain(error: &str) {
    // Nobody may be left to read it; the exit code says the same.
    let _ = writeln!(std::io::stderr(), "Error: {error}");
}
