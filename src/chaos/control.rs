//! The run without faults that a run with faults is compared with: the same command once more, as other processes.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use ps_actors::chaos::Work;
use ps_actors::launch::env::{PARENT_PID, RANK};
use ps_actors::weights::Weights;

/// The file to which a run without faults writes what it did.
const NOTE: &str = "PS_CHAOS_NOTE";

/// Why the run without faults gives nothing to compare with.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ControlError {
    /// It could not be started, or its result not be read.
    #[error("it cannot be run, or its result not be written or read")]
    Io(#[from] io::Error),
    /// It ended without success.
    #[error("it ended with {0}")]
    Failed(ExitStatus),
    /// It said something else than its work.
    #[error("its result makes no sense: `{0}`")]
    Note(String),
}

/// Whether this process can run the whole command again.
pub(super) fn is_possible() -> bool {
    // As long as nobody else gives it its rank.
    let arguments = env::args_os().skip(1);
    let has_rank = arguments.into_iter().any(|word| is_flag(&word, "--rank"));
    env::var_os(PARENT_PID).is_some() || (!has_rank && env::var_os(RANK).is_none())
}

/// Writes down what this run did, if it is the one without faults.
pub(super) fn note(work: &Work, weights: &Weights) -> Result<(), ControlError> {
    let Some(path) = env::var_os(NOTE) else {
        return Ok(());
    };
    let (num, micros, bits) = (work.num_applied, work.time.as_micros(), bits(weights));
    Ok(fs::write(path, format!("{num} {micros} {bits:016x}"))?)
}

/// Runs the command again, without faults. Returns what was done, and a number for the bits of the weights.
pub(super) fn run() -> Result<(Work, u64), ControlError> {
    let directory = Directory::new()?;
    let note = directory.0.join("note");
    let saved = directory.0.join("checkpoints").into_os_string();
    tracing::info!("the same run without faults begins");
    let status = Command::new(env::current_exe()?)
        .args(without_faults(env::args_os().skip(1), &saved))
        .env(NOTE, &note)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()?;
    if !status.success() {
        return Err(ControlError::Failed(status));
    }
    let text = fs::read_to_string(&note)?;
    let mut words = text.split(' ');
    let mut word = || words.next().unwrap_or_default();
    let (num, micros, bits) = (word().parse(), word().parse(), word());
    match (num, micros, u64::from_str_radix(bits, 16)) {
        (Ok(num_applied), Ok(micros), Ok(bits)) => {
            let time = Duration::from_micros(micros);
            Ok((Work { num_applied, time }, bits))
        }
        _ => Err(ControlError::Note(text)),
    }
}

/// A directory that is removed at the end.
struct Directory(PathBuf);

impl Directory {
    fn new() -> io::Result<Self> {
        let path = env::temp_dir().join(format!("ps-chaos-{}", std::process::id()));
        fs::create_dir(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            let path = self.0.display();
            tracing::warn!(%path, %error, "a temporary directory cannot be removed");
        }
    }
}

/// Returns the arguments with an empty plan and other checkpoints, and without what belongs to the run with faults.
fn without_faults(arguments: impl Iterator<Item = OsString>, saved: &OsString) -> Vec<OsString> {
    let mut arguments = arguments.peekable();
    let mut kept: Vec<OsString> = Vec::new();
    while let Some(word) = arguments.next() {
        if ["--chaos-control", "--resume"]
            .iter()
            .any(|flag| word == *flag)
        {
            continue;
        }
        let may_have_value = ["--dashboard", "--otlp"];
        if may_have_value.iter().any(|flag| is_flag(&word, flag)) {
            // Its address may be a word of its own, or missing.
            let is_address = |next: &OsString| !next.to_string_lossy().starts_with('-');
            if may_have_value.iter().any(|flag| word == *flag) {
                let _ = arguments.next_if(is_address);
            }
            continue;
        }
        let flags = [
            "--chaos",
            "--export",
            "--record",
            "--metrics",
            "--run-dir",
            "--tensorboard",
            "--trace",
            "--dashboard-token-file",
            "--dashboard-host",
            "--checkpoint-dir",
            "--artifact-dir",
        ];
        let Some(flag) = flags.into_iter().find(|flag| is_flag(&word, flag)) else {
            kept.push(word);
            continue;
        };
        if word == *flag {
            // Its value is a word of its own.
            let _ = arguments.next();
        }
        if ["--checkpoint-dir", "--artifact-dir"].contains(&flag) {
            kept.extend([flag.into(), saved.clone()]);
        }
    }
    kept.push("--chaos=".into());
    kept
}

/// Whether a word is this flag, with its value or without.
fn is_flag(word: &OsString, flag: &str) -> bool {
    let word = word.to_string_lossy();
    let rest = word.strip_prefix(flag);
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('='))
}

/// Returns a number that differs between weights with different bits: their FNV-1a hash.
pub(super) fn bits(weights: &Weights) -> u64 {
    let numbers = weights.segments().iter().flat_map(|part| part.data());
    numbers.fold(0xcbf2_9ce4_8422_2325, |hash, one| {
        (hash ^ u64::from(one.to_bits())).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_without_faults_is_the_same_otherwise() {
        for (command, expected) in [
            (
                "--chaos drop_5% --num-workers 3",
                "--num-workers 3 --chaos=",
            ),
            (
                // The port of the metrics is taken by the run with faults.
                "--checkpoint-dir a --chaos=x --metrics 127.0.0.1:1 --chaos-control --resume --record=y --net",
                "--checkpoint-dir TEMP --net --chaos=",
            ),
            (
                "--processes 3 --checkpoint-dir=a --export b --update-log",
                "--processes 3 --checkpoint-dir TEMP --update-log --chaos=",
            ),
            (
                "--dashboard --net --dashboard 127.0.0.1:1 --dashboard-token-file f --trace t --quiet",
                "--net --quiet --chaos=",
            ),
            (
                "--artifact-dir=a --resume --epochs 3",
                "--artifact-dir TEMP --epochs 3 --chaos=",
            ),
            (
                // It has no directory of its own, and nobody collects its steps.
                "--run-dir r --otlp --net --otlp http://127.0.0.1:1 --otlp=u --run-dir=r --quiet",
                "--net --quiet --chaos=",
            ),
        ] {
            let words = command.split(' ').map(OsString::from);
            let expected: Vec<_> = expected.split(' ').map(OsString::from).collect();
            assert_eq!(without_faults(words, &"TEMP".into()), expected);
        }
    }
}
