//! What is warned of. In a process of its own: `tracing` remembers of each place that logs whether anybody
//! listens, and asks whichever thread comes there first, so a test beside these that listens to nothing
//! could decide it for them.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use ps_data::{FashionMnist, MnistOptions};

const NAMES: [&str; 4] = [
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
];

fn sample() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("sample")
}

/// Collects the text of warnings.
#[derive(Clone, Default)]
struct Warnings(Arc<Mutex<String>>);

impl tracing::field::Visit for Warnings {
    fn record_debug(&mut self, _: &tracing::field::Field, value: &dyn std::fmt::Debug) {
        let mut text = self.0.lock().expect("no test panics with it");
        *text += &format!("{value:?}\n");
    }
}

impl tracing::Subscriber for Warnings {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        *metadata.level() == tracing::Level::WARN
    }
    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }
    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn event(&self, event: &tracing::Event<'_>) {
        event.record(&mut self.clone());
    }
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}

/// What warnings are given by loading FashionMNIST.
fn warnings_of_fashion(directory: &Path) -> String {
    let options = MnistOptions {
        directory: Some(directory.to_owned()),
        ..Default::default()
    };
    let warnings = Warnings::default();
    tracing::subscriber::with_default(warnings.clone(), || {
        FashionMnist::load(&options).expect("the same format");
    });
    let text = warnings.0.lock().expect("no test panics with it");
    text.clone()
}

#[test]
fn other_data_than_fashion_mnist_is_warned_of() {
    let warnings = warnings_of_fashion(&sample());
    for name in NAMES {
        let path = sample().join(format!("{name}.gz"));
        let expected = format!(
            "{} is not the published file of FashionMNIST",
            path.display()
        );
        assert!(warnings.contains(&expected), "{warnings}");
    }
}

/// Needs the files themselves: the directory that `PS_MNIST_DIR` names.
#[test]
fn mnist_in_place_of_fashion_mnist_is_recognized() {
    let directory = std::env::var_os("PS_MNIST_DIR").filter(|value| !value.is_empty());
    let Some(directory) = directory else {
        println!("skipped: PS_MNIST_DIR does not name the full MNIST");
        return;
    };
    let warnings = warnings_of_fashion(Path::new(&directory));
    for name in NAMES {
        let expected = format!("is {name} of MNIST, not {name} of FashionMNIST");
        assert!(warnings.contains(&expected), "{warnings}");
    }
}
