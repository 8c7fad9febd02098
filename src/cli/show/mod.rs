//! Flags for what a training shows while it runs, and what it leaves behind.

#[cfg(feature = "dashboard")]
mod dashboard;
mod progress;
mod table;

#[cfg(feature = "runs")]
use std::path::PathBuf;

use crate::controls::Controls;
use crate::observe::Observer;

#[cfg(feature = "dashboard")]
pub use dashboard::DashboardArgs;
pub use progress::Progress;
pub use table::closing_table;

// No doc comment on this type: `--help` would take it for the program's own text.

#[allow(missing_docs, reason = "see above")]
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "What is shown")]
pub struct ShowArgs {
    /// Show no progress and no closing table on standard error.
    #[arg(long)]
    pub quiet: bool,
    /// Describe the run in this directory: settings, events, report, curves. If it has a run already, the name
    /// gets a number.
    #[cfg(feature = "runs")]
    #[arg(long, value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
    #[cfg(feature = "dashboard")]
    #[command(flatten)]
    pub dashboard: DashboardArgs,
    /// What controls the training: give it to [`Trainer::controls`](crate::Trainer::controls).
    #[arg(skip)]
    pub controls: Controls,
}

impl ShowArgs {
    /// Returns the observers that the user asks for, for [`Trainer::observe`](crate::Trainer::observe) or
    /// [`Observers::start`](crate::observe::Observers::start). Ends the process with 64
    /// ([`EXIT_CONFIG`](ps_actors::launch::EXIT_CONFIG)) if there can be no dashboard with these flags.
    #[must_use]
    pub fn observers(&self) -> Vec<Box<dyn Observer>> {
        let mut observers: Vec<Box<dyn Observer>> = Vec::new();
        if !self.quiet {
            observers.push(Box::new(Progress::new()));
        }
        #[cfg(feature = "runs")]
        if let Some(directory) = &self.run_dir {
            observers.push(Box::new(crate::runs::RunDir::new(directory)));
        }
        #[cfg(feature = "dashboard")]
        if let Some(dashboard) = self.dashboard.observer(&self.controls) {
            observers.push(Box::new(dashboard));
        }
        observers
    }
}
