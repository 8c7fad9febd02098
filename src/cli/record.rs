//! Flags for recording a training and for replaying it.

use std::path::PathBuf;

// No doc comment on this type: `--help` would take it for the program's own text.

#[allow(missing_docs, reason = "see above")]
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Record and replay")]
pub struct RecordArgs {
    /// Write down which gradient was computed on which weights, and which gradients made which update.
    #[arg(long, value_name = "FILE")]
    pub record: Option<PathBuf>,
    /// Compute the weights of a recorded training again, in this process alone. All other flags of the
    /// training must be the same.
    #[arg(long, value_name = "FILE", conflicts_with = "record")]
    pub replay: Option<PathBuf>,
}
