//! MNIST and FashionMNIST: the options of loading them, and what loading returns.
//!
//! Both have the same format and one loader, the module `load`, which says in what order places
//! are searched and what is verified.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use crate::load::{Environment, load, read_sample};
use crate::spec::{self, NUM_CLASSES};
use crate::{DataError, ImageDataset, Normalization, Split};

/// Where to look for MNIST or FashionMNIST. Build it with `..Default::default()`.
#[derive(Debug, Clone)]
pub struct MnistOptions {
    /// Directory with the four IDX files, each with or without `.gz`, named
    /// `train-images-idx3-ubyte` or `train-images.idx3-ubyte`; or torchvision's `root` (they are in
    /// `MNIST/raw` or `FashionMNIST/raw`), or what Kaggle's archive unpacks to (each in a folder of
    /// its name). If set, nothing else is tried. May hold any data set of the same format: other data
    /// than the published is reported by a warning through `tracing`, not refused; so is MNIST in
    /// place of FashionMNIST, and the other way round. Default: none; then `PS_MNIST_DIR` or
    /// `PS_FASHION_MNIST_DIR` counts in its place.
    pub directory: Option<PathBuf>,
    /// Never touches the network. `PS_OFFLINE`, set to anything but `0`, `false` or nothing, has
    /// the same effect. Default: `false`.
    pub offline: bool,
    /// Where downloads are kept. Default: `ps/mnist` or `ps/fashion-mnist` in the user's cache.
    pub cache_directory: Option<PathBuf>,
    /// Base URLs tried in order in place of the built-in ones, if there are any. The checksums
    /// stay the same. Default: empty.
    pub mirrors: Vec<String>,
    /// Time allowed for reaching a mirror: for its name, and again for its connection. Too low
    /// gives up on slow networks; too high lets a machine behind a silent firewall wait. Default:
    /// 3 seconds.
    pub connect_timeout: Duration,
    /// Time allowed for all downloads together, waiting for another process included. Default:
    /// 10 minutes.
    pub download_timeout: Duration,
}

impl Default for MnistOptions {
    fn default() -> Self {
        Self {
            directory: None,
            offline: false,
            cache_directory: None,
            mirrors: Vec::new(),
            connect_timeout: Duration::from_secs(3),
            download_timeout: Duration::from_secs(600),
        }
    }
}

/// Where a loaded data set came from. Its `Display` is fit for one line of a program's output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DataSource {
    /// The directory named by the caller or the environment.
    Directory(PathBuf),
    /// Files that an earlier run or another process had downloaded.
    Cache(PathBuf),
    /// Files downloaded now and kept in this directory.
    Downloaded(PathBuf),
    /// The part of MNIST that is compiled into this crate.
    BundledSample {
        /// Why nothing better was available.
        reason: String,
    },
}

impl fmt::Display for DataSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory(path) => write!(f, "directory {}", path.display()),
            Self::Cache(path) => write!(f, "cache {}", path.display()),
            Self::Downloaded(path) => write!(f, "downloaded to {}", path.display()),
            Self::BundledSample { reason } => {
                write!(f, "bundled sample of the real data ({reason})")
            }
        }
    }
}

/// MNIST: handwritten digits, 28×28 grey, 60,000 for training and 10,000 for testing.
///
/// The bundled sample has 4,000 and 1,000, the same number of each digit.
#[derive(Debug, Clone)]
pub struct Mnist {
    /// Examples to learn from.
    pub train: ImageDataset,
    /// Examples to evaluate on.
    pub test: ImageDataset,
    /// Where they came from.
    pub source: DataSource,
}

impl Mnist {
    /// Loads MNIST from the first place that has it: the directory given, `PS_MNIST_DIR`, the
    /// user's cache, a download, else the bundled sample. The sample is announced by one warning
    /// through `tracing` and by [`source`](Self::source).
    ///
    /// Blocks while it downloads; any number of processes may do so at once, one of them fetches.
    ///
    /// # Errors
    ///
    /// If a directory was named, by the caller or the environment, and one of its files cannot be
    /// read or is not what it should be.
    pub fn load(options: &MnistOptions) -> Result<Self, DataError> {
        let spec = &spec::MNIST;
        let (train, test, source) = load(spec, options, &Environment::of_process(spec))?;
        Ok(Self {
            train,
            test,
            source,
        })
    }

    /// Returns the bundled sample: 4,000 training and 1,000 test images of the real MNIST.
    ///
    /// Needs neither files nor network and is the same everywhere, which suits tests.
    pub fn bundled_sample() -> Self {
        let (train, test) = read_sample(&spec::MNIST_SAMPLE, Normalization::MNIST);
        let reason = "asked for".to_owned();
        let source = DataSource::BundledSample { reason };
        Self {
            train,
            test,
            source,
        }
    }

    /// Returns one split.
    pub fn split(&self, split: Split) -> &ImageDataset {
        match split {
            Split::Train => &self.train,
            Split::Test => &self.test,
        }
    }
}

/// FashionMNIST: articles of clothing in the format of MNIST,
/// <https://github.com/zalandoresearch/fashion-mnist>.
#[derive(Debug, Clone)]
pub struct FashionMnist {
    /// Examples to learn from.
    pub train: ImageDataset,
    /// Examples to evaluate on.
    pub test: ImageDataset,
    /// Where they came from.
    pub source: DataSource,
}

impl FashionMnist {
    /// Names of the classes, by label.
    pub const CLASSES: [&'static str; NUM_CLASSES] = [
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ];

    /// Loads FashionMNIST as [`Mnist::load`] does; the variable is `PS_FASHION_MNIST_DIR`.
    ///
    /// # Errors
    ///
    /// As [`Mnist::load`]; and, as there is no bundled sample, [`DataError::Unavailable`] if it is
    /// neither in the cache nor can be downloaded.
    pub fn load(options: &MnistOptions) -> Result<Self, DataError> {
        let spec = &spec::FASHION_MNIST;
        let (train, test, source) = load(spec, options, &Environment::of_process(spec))?;
        Ok(Self {
            train,
            test,
            source,
        })
    }

    /// Returns one split.
    pub fn split(&self, split: Split) -> &ImageDataset {
        match split {
            Split::Train => &self.train,
            Split::Test => &self.test,
        }
    }
}
