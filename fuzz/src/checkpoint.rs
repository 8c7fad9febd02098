//! One file of a checkpoint is replaced, and its checksum is made right, as if somebody who means harm had written
//! it. Whatever is read can be used, or is refused.

use std::cell::RefCell;
use std::fs;

use ps_actors::checkpoint::Checkpoint;
use ps_actors::group::ServerGroup;
use ps_actors::ids::{Clock, GradientId, Incarnation, Version, WorkerId};
use ps_actors::rule::Sgd;
use ps_actors::server::{ApplyGradients, ParameterServer, ServerConfig};
use ps_actors::weights::{Gradient, GradientUpdate, Layout, Parameter, Weights};
use tempfile::TempDir;

const FILES: [&str; 4] = [
    "model.safetensors",
    "optimizer.safetensors",
    "state.bin",
    "manifest.json",
];

/// Replaces the file that the first byte chooses by the bytes behind it, and reads the checkpoint.
///
/// # Panics
/// When such a file could do harm, or when the files cannot be written.
pub fn run(input: &[u8]) {
    thread_local! {
        static SAVED: RefCell<Saved> = RefCell::new(Saved::new());
    }
    if let Some((which, bytes)) = input.split_first() {
        SAVED.with_borrow_mut(|saved| saved.read_with(usize::from(*which) % FILES.len(), bytes));
    }
}

struct Saved {
    directory: TempDir,
    originals: [Vec<u8>; 4],
    /// The file that is not the original one.
    replaced: usize,
}

impl Saved {
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("there is room for files");
        let path = directory.path().join("checkpoint");
        checkpoint().write(&path).expect("it can be written");
        let read = |file| fs::read(path.join(file)).expect("it was written");
        Self {
            originals: FILES.map(read),
            directory,
            replaced: 0,
        }
    }

    fn read_with(&mut self, which: usize, bytes: &[u8]) {
        let path = self.directory.path().join("checkpoint");
        let write = |index: usize, bytes: &[u8]| {
            fs::write(path.join(FILES[index]), bytes).expect("there is room for files");
        };
        write(self.replaced, &self.originals[self.replaced]);
        write(which, bytes);
        self.replaced = which;
        let lines = FILES.iter().zip(&self.originals).enumerate();
        let lines = lines.map(|(index, (file, original))| {
            let bytes = if index == which { bytes } else { original };
            format!("{:08x} {} {file}\n", crc32fast::hash(bytes), bytes.len())
        });
        let lines: String = lines.collect();
        fs::write(path.join("CHECKSUMS"), lines).expect("there is room for files");
        if let Ok(weights) = Weights::read_safetensors(path.join(FILES[0]), initial().layout()) {
            assert_eq!(weights.len(), 8, "they are those of the model");
        }
        let Ok(checkpoint) = Checkpoint::read(&path) else {
            return;
        };
        let rule = Sgd::with_momentum(0.9);
        if let Ok(server) = ParameterServer::new(&checkpoint, rule, ServerConfig::default()) {
            let server = server.spawn().expect("there is a thread");
            // The record of gradients may refuse it.
            let update = ApplyGradients::mean([update(1 << 20)]);
            let _refused = server.ask(update).wait().expect("the server answers");
        }
    }
}

pub(crate) fn update(clock: u64) -> GradientUpdate {
    GradientUpdate {
        id: GradientId {
            worker: WorkerId(0),
            incarnation: Incarnation(1),
            clock: Clock(clock),
        },
        computed_on: Version(0),
        loss: 1.0,
        num_examples: 4,
        gradient: Gradient::new(vec![0.5; 8]),
    }
}

/// The weights of a small model.
pub(crate) fn initial() -> Weights {
    let parameter = |name: &str, shape: &[usize], range| Parameter {
        name: name.to_owned(),
        shape: shape.to_vec(),
        range,
    };
    let layout = Layout::new(vec![
        parameter("linear.weight", &[2, 3], 0..6),
        parameter("linear.bias", &[2], 6..8),
    ]);
    Weights::initial(layout.expect("it is whole"), vec![1.0; 8])
}

/// A small checkpoint after one update.
fn checkpoint() -> Checkpoint {
    let initial = initial();
    let rule = Sgd::with_momentum(0.9);
    let server = ParameterServer::new(&initial, rule, ServerConfig::default());
    let server = server.expect("the settings work").spawn();
    let server = server.expect("there is a thread");
    let applied = server.ask(ApplyGradients::mean([update(0)])).wait();
    applied.expect("it answers").expect("it is a gradient");
    let group = ServerGroup::from(server);
    ps_actors::actor::run(group.checkpoint()).expect("it answers")
}

/// Returns the files of a checkpoint that is whole, as inputs.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    let saved = Saved::new();
    let numbered = (0..).zip(saved.originals);
    numbered
        .map(|(which, bytes)| [vec![which], bytes].concat())
        .collect()
}
