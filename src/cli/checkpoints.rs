//! Flags for checkpoints, and the end of a training that has some.

use std::path::PathBuf;
use std::process::ExitCode;

use ps_actors::checkpoint::{Checkpoint, CheckpointConfig, CheckpointError, Checkpoints};
use ps_actors::launch::{Signal, exit_code};
use ps_actors::rule::UpdateRule;
use ps_actors::update_log::{LogConfig, LogSync};
use ps_actors::weights::Weights;
use ps_model::burn::module::Module;
use ps_model::burn::tensor::Device;

use super::{TrainArgs, say};
use crate::agreement::Facts;
use crate::export::{ExportError, ExportFile};
use crate::resume::{self, Dealing, Terms};

// No doc comment on this type: `--help` would take it for the program's own text.

#[allow(missing_docs, reason = "see above")]
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Checkpoints and result")]
pub struct CheckpointArgs {
    /// Save checkpoints to this directory, during the training and at its end. Without it, nothing is
    /// saved.
    #[arg(long, value_name = "DIR")]
    pub checkpoint_dir: Option<PathBuf>,
    /// Updates from one checkpoint to the next; 0: only one at the end.
    #[arg(
        long,
        value_name = "UPDATES",
        default_value_t = 1000,
        requires = "checkpoint_dir"
    )]
    pub checkpoint_every: u64,
    /// How many checkpoints are kept.
    #[arg(long, value_name = "NUMBER", default_value_t = 3, requires = "checkpoint_dir",
          value_parser = clap::value_parser!(u32).range(1..))]
    pub keep_checkpoints: u32,
    /// Go on from the newest usable checkpoint in the directory. If there is none yet, start from the
    /// beginning.
    #[arg(long, requires = "checkpoint_dir")]
    pub resume: bool,
    /// Also log each update between checkpoints, so that no gradient is lost after a worker was told that it
    /// was applied. SYNC says when the log must be on the disk, in case the machine fails: `always` (before
    /// each answer), `never` (when the system likes), or every so many seconds.
    #[arg(long, value_name = "SYNC", num_args = 0..=1, require_equals = true,
          default_missing_value = "1", requires = "checkpoint_dir")]
    pub update_log: Option<LogSync>,
    /// Write the trained model to this file at the end: FILE.safetensors, or FILE.bpk for burn.
    #[arg(long, value_name = "FILE")]
    pub export: Option<ExportFile>,
}

impl CheckpointArgs {
    /// Returns the settings for [`Trainer::checkpoints`](crate::Trainer::checkpoints). `None`: the user
    /// wants no checkpoints.
    #[must_use]
    pub fn config(&self) -> Option<CheckpointConfig> {
        Some(CheckpointConfig {
            directory: self.checkpoint_dir.clone()?,
            every: self.checkpoint_every,
            keep: self.keep_checkpoints as usize,
            resume: self.resume,
            log: self.update_log.map(|sync| LogConfig {
                sync,
                ..LogConfig::default()
            }),
        })
    }

    /// Writes the trained model to a file, if the user asks for it.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn export<M: Module>(
        &self,
        model: &M,
        device: &Device,
        weights: &Weights,
    ) -> Result<(), ExportError> {
        let Some(file) = &self.export else {
            return Ok(());
        };
        file.write(model, device, weights)?;
        say!("The trained model is in {}.", file.path().display());
        Ok(())
    }

    /// Opens the directory, for a driver's own loop. Returns the checkpoint from which it goes on, if the
    /// user asks for it and there is one. It must be of a model with the layout of `initial`. `rule` is a
    /// new update rule, as the servers'. Start the servers, and then the
    /// [log](Checkpoints::start_log).
    ///
    /// # Errors
    /// If the directory cannot be used, or has checkpoints from which the run cannot go on.
    pub fn open(
        &self,
        initial: &Weights,
        rule: impl UpdateRule,
    ) -> Result<(Checkpoints, Option<Checkpoint>), CheckpointError> {
        self.open_with(initial, rule, [])
    }

    /// As [`open`](Self::open). The checkpoint must be of a run with the same `facts`, such as a seed: the name of each,
    /// and its value as text.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_with(
        &self,
        initial: &Weights,
        rule: impl UpdateRule,
        facts: impl IntoIterator<Item = (&'static str, String)>,
    ) -> Result<(Checkpoints, Option<Checkpoint>), CheckpointError> {
        let facts = facts.into_iter();
        let facts = facts.fold(Facts::default(), |facts, (name, value)| {
            facts.state(name, value)
        });
        self.open_dealt(initial, Box::new(rule), &facts, None)
    }

    /// As [`open`](Self::open), for workers that share `num_examples`. The checkpoint must be of a run with
    /// the same batch size and seed. The number of workers may be another one: they go on at the same place
    /// of the epoch.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_for(
        &self,
        initial: &Weights,
        rule: impl UpdateRule,
        train: &TrainArgs,
        num_examples: usize,
    ) -> Result<(Checkpoints, Option<Checkpoint>), CheckpointError> {
        let facts = Facts::default()
            .state("the number of training examples", num_examples)
            .state("the batch size", train.batch_size)
            .state("the seed", train.seed);
        let dealing = Dealing {
            num_workers: train.num_workers,
            batch_size: train.batch_size,
            num_examples,
        };
        self.open_dealt(initial, Box::new(rule), &facts, Some(dealing))
    }

    fn open_dealt(
        &self,
        initial: &Weights,
        rule: Box<dyn UpdateRule>,
        facts: &Facts,
        dealing: Option<Dealing>,
    ) -> Result<(Checkpoints, Option<Checkpoint>), CheckpointError> {
        let terms = Terms {
            layout: initial.layout(),
            facts,
            dealing,
        };
        let opened = resume::open(self.config(), rule, &terms)?;
        if let Some(found) = &opened.1 {
            say!("Going on after {} updates.", found.version().0);
        }
        Ok(opened)
    }
}

/// Returns the exit code at the end of a training. If it was interrupted and `is_saved` in a checkpoint, says
/// with which command it goes on, and returns success. If it was interrupted and not saved, returns the
/// [signal's code](Signal::exit_code).
#[must_use]
pub fn end_of_training(interrupted: Option<Signal>, is_saved: bool) -> ExitCode {
    if interrupted.is_none() || !is_saved {
        return exit_code(interrupted);
    }
    say_how_to_go_on();
    ExitCode::SUCCESS
}

/// Says with which command this run goes on: its own, with `--resume`.
pub fn say_how_to_go_on() {
    let mut words: Vec<String> = std::env::args().map(|word| quoted(&word)).collect();
    if !words.iter().any(|word| word == "--resume") {
        words.push("--resume".to_owned());
    }
    say!("To go on: {}", words.join(" "));
}

/// Quotes a word for a shell, if it needs that.
fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,@%+".contains(c);
    match !word.is_empty() && word.chars().all(is_plain) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_come_back_from_a_shell() {
        for (word, expected) in [
            ("--seed=1", "--seed=1"),
            ("a b", "'a b'"),
            ("", "''"),
            ("it's", r"'it'\''s'"),
            ("$HOME", "'$HOME'"),
        ] {
            assert_eq!(quoted(word), expected);
        }
    }
}
