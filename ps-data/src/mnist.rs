//! MNIST and FashionMNIST: the options for loading them, and the loaded data sets.
//!
//! Both have the same format and the same loader. The module `load` says in which order places are
//! searched and what is verified.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use crate::load::{Environment, load, read_sample};
use crate::spec::{self, NUM_CLASSES};
use crate::{DataError, ImageDataset, Normalization, Split};

/// The options for loading MNIST or FashionMNIST. Build them with `..Default::default()`.
///
/// ```
/// use ps_data::{DataSource, Mnist, MnistOptions};
///
/// // Never the network, and never the directory of an earlier download.
/// let options = MnistOptions {
///     offline: true,
///     cache_directory: Some("no/such/directory".into()),
///     ..MnistOptions::default()
/// };
/// # if std::env::var_os("PS_MNIST_DIR").is_none() {
/// let mnist = Mnist::load(&options)?;
/// assert!(matches!(mnist.source, DataSource::BundledSample { .. }));
/// # }
/// # Ok::<(), ps_data::DataError>(())
/// ```
#[derive(Debug, Clone)]
pub struct MnistOptions {
    /// The directory with the four IDX files. Each may end in `.gz`, and may be named
    /// `train-images-idx3-ubyte` or `train-images.idx3-ubyte`. The directory may also be torchvision's
    /// `root` (with the files in `MNIST/raw` or `FashionMNIST/raw`), or the unpacked Kaggle archive (with
    /// each file in a folder of its name).
    ///
    /// If it is set, no other place is tried. It may hold any data set of the same format. Data that is
    /// not the published data set is not refused, but a warning through `tracing` reports it. MNIST
    /// instead of FashionMNIST, or the other way round, is also reported. Default: `None`; then the
    /// variable `PS_MNIST_DIR` or `PS_FASHION_MNIST_DIR` is used.
    pub directory: Option<PathBuf>,
    /// Whether the network must not be used. `PS_OFFLINE` has the same effect, if it is set to anything
    /// but `0`, `false` or an empty text. Default: `false`.
    pub offline: bool,
    /// The directory in which downloads are kept. Default: `ps/mnist` or `ps/fashion-mnist` in the user's
    /// cache.
    pub cache_directory: Option<PathBuf>,
    /// Base URLs that are tried in order, instead of the built-in ones. If it is empty, the built-in ones
    /// are used. The checksums stay the same. Default: empty.
    pub mirrors: Vec<String>,
    /// How long reaching a mirror may take: once for resolving its name, and once for connecting. If it is
    /// too low, slow networks fail. If it is too high, a machine behind a silent firewall waits long.
    /// Default: 3 s.
    pub connect_timeout: Duration,
    /// How long all downloads together may take, including the wait for another process. Default:
    /// 10 minutes.
    pub download_timeout: Duration,
    /// Whether a download shows its progress on standard error, if that is a terminal. Otherwise the log gets a line for
    /// each file. Default: `true`.
    pub shows_progress: bool,
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
            shows_progress: true,
        }
    }
}

/// The place that a data set was loaded from. `Display` writes it as one line for a program's output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DataSource {
    /// The directory that the caller or the environment named.
    Directory(PathBuf),
    /// A cache directory, with files that an earlier run or another process had downloaded.
    Cache(PathBuf),
    /// A cache directory, with files that were downloaded now.
    Downloaded(PathBuf),
    /// The part of MNIST that is compiled into this crate.
    BundledSample {
        /// Why the full data set was not available.
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

/// MNIST: images of handwritten digits, 28×28 grey pixels each. 60,000 images are for training and 10,000
/// for testing.
///
/// The bundled sample has 4,000 training images and 1,000 test images, with the same number of each digit.
///
/// ```
/// use ps_data::Mnist;
///
/// let mnist = Mnist::bundled_sample();
/// assert_eq!((mnist.train.len(), mnist.test.len()), (4_000, 1_000));
/// assert_eq!(mnist.train.num_classes(), 10);
/// ```
#[derive(Debug, Clone)]
pub struct Mnist {
    /// The examples for training.
    pub train: ImageDataset,
    /// The examples for testing.
    pub test: ImageDataset,
    /// The place that the data set was loaded from.
    pub source: DataSource,
}

impl Mnist {
    /// Loads MNIST from the first place that has it: the directory in `options`, `PS_MNIST_DIR`, the user's
    /// cache, a download, the bundled sample. If the sample is used, one warning through `tracing` and
    /// [`source`](Self::source) say so.
    ///
    /// It blocks while it downloads. Any number of processes may call it at the same time; one of them
    /// downloads the files.
    ///
    /// ```no_run
    /// use ps_data::{Mnist, MnistOptions};
    ///
    /// let mnist = Mnist::load(&MnistOptions::default())?;
    /// println!("{} training images from {}", mnist.train.len(), mnist.source);
    /// # Ok::<(), ps_data::DataError>(())
    /// ```
    ///
    /// # Errors
    ///
    /// If the caller or the environment named a directory, and one of its files cannot be read or does not
    /// have the expected format.
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
    /// It needs no files and no network and is the same everywhere. Use it in tests.
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

/// FashionMNIST: images of articles of clothing in the format of MNIST,
/// <https://github.com/zalandoresearch/fashion-mnist>.
///
/// It is loaded like [`Mnist`], which has examples.
#[derive(Debug, Clone)]
pub struct FashionMnist {
    /// The examples for training.
    pub train: ImageDataset,
    /// The examples for testing.
    pub test: ImageDataset,
    /// The place that the data set was loaded from.
    pub source: DataSource,
}

impl FashionMnist {
    /// The names of the classes. The index is the label.
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

    /// Loads FashionMNIST like [`Mnist::load`]. The variable is `PS_FASHION_MNIST_DIR`, and there is no
    /// bundled sample.
    ///
    /// ```no_run
    /// use ps_data::{FashionMnist, MnistOptions};
    ///
    /// let clothes = FashionMnist::load(&MnistOptions::default())?;
    /// let label = clothes.test.label(0);
    /// println!("The first test image is: {}", FashionMnist::CLASSES[usize::from(label)]);
    /// # Ok::<(), ps_data::DataError>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`Mnist::load`], and [`DataError::Unavailable`] if the data set is not in the cache and
    /// cannot be downloaded.
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
