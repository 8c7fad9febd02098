//! The errors of loading and building data sets.
//!
//! A message never contains its source. Print the whole chain to see the cause.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// A data set could not be loaded or built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// The directory named by the caller or by the environment cannot be listed.
    #[error("cannot read the data directory {}; name one that holds the four IDX files", path.display())]
    Directory {
        /// The directory that was named.
        path: PathBuf,
        /// The error of the operating system.
        #[source]
        source: io::Error,
    },

    /// A directory lacks one of the four files, compressed and uncompressed.
    #[error(
        "{} has neither {file} nor {file}.gz; it holds {}",
        directory.display(),
        if found.is_empty() { "nothing".to_owned() } else { found.join(", ") }
    )]
    MissingFile {
        /// The directory that was searched.
        directory: PathBuf,
        /// The file's name without `.gz`.
        file: String,
        /// The names of the first entries of the directory.
        found: Vec<String>,
    },

    /// A file exists but cannot be read.
    #[error("cannot read {}, which has to be a file that this user may read", path.display())]
    ReadFile {
        /// The file that was found, but not read.
        path: PathBuf,
        /// The error of the operating system.
        #[source]
        source: io::Error,
    },

    /// A file's content is not the IDX data that its name stands for.
    #[error("{} is damaged or not the expected IDX file; replace it", path.display())]
    Corrupt {
        /// The file with the wrong content.
        path: PathBuf,
        /// What was expected and what was found.
        #[source]
        source: IdxError,
    },

    /// A file has the right format, but it is not the published one.
    #[error("{} has SHA-256 {found}, expected {expected}; replace it", path.display())]
    Checksum {
        /// The file with another checksum.
        path: PathBuf,
        /// Published checksum, hexadecimal.
        expected: String,
        /// Checksum of the file, hexadecimal.
        found: String,
    },

    /// An image file and its label file disagree about the number of examples.
    #[error(
        "{} holds {num_images} images but {} holds {num_labels} labels; take both from one data set",
        images.display(),
        labels.display()
    )]
    CountMismatch {
        /// The image file.
        images: PathBuf,
        /// The label file.
        labels: PathBuf,
        /// The number of images.
        num_images: usize,
        /// The number of labels.
        num_labels: usize,
    },

    /// The parts given to [`ImageDataset::new`](crate::ImageDataset::new) do not fit together.
    #[error("not a consistent image data set: {reason}")]
    Inconsistent {
        /// What does not fit.
        reason: String,
    },

    /// The platform has no user cache directory and none was given.
    #[error("no user cache directory is known; set HOME or give a directory")]
    NoCacheDirectory,

    /// The cache directory cannot be created, locked or written.
    #[error("cannot {action} {}", path.display())]
    Cache {
        /// The action that failed, such as "lock".
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The error of the operating system.
        #[source]
        source: io::Error,
    },

    /// Another process held the cache's lock for longer than the time allowed for the download.
    #[error("another process still holds {} after {waited:?}", path.display())]
    Locked {
        /// The lock file.
        path: PathBuf,
        /// How long this process waited.
        waited: Duration,
    },

    /// No mirror delivered a valid copy of one file.
    #[error("cannot download {file}: {}", attempts.join("; "))]
    Download {
        /// The file's name.
        file: String,
        /// One line per mirror: its URL and what went wrong.
        attempts: Vec<String>,
    },

    /// The crate was built without its `download` feature.
    #[error("downloading is compiled out; enable the feature `download` of ps-data")]
    DownloadDisabled,

    /// The data set is nowhere on this machine and could not be fetched.
    #[error(
        "{name} is not available{}; put its four IDX files into a directory and set {variable} to it",
        if *offline { " and downloading is switched off" } else { "" }
    )]
    Unavailable {
        /// Name of the data set.
        name: &'static str,
        /// Environment variable that can name a directory.
        variable: &'static str,
        /// Whether downloading was switched off by the caller or by `PS_OFFLINE`.
        offline: bool,
        /// What failed last: the search of the cache or the download.
        #[source]
        source: Box<Self>,
    },
}

/// How a file deviates from the IDX format or from the shape expected of it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IdxError {
    /// The gzip stream is damaged or ends too early.
    #[error("the gzip stream cannot be decompressed")]
    Gzip {
        /// The error of the decompressor.
        #[source]
        source: io::Error,
    },

    /// The file is larger than any data set this crate reads.
    #[error("the file is larger than {limit} bytes")]
    FileTooLarge {
        /// The size of the largest file that is read, in bytes.
        limit: u64,
    },

    /// The content ends inside the header.
    #[error("expected a header of {expected} bytes, found {found} bytes in all")]
    HeaderTruncated {
        /// How many bytes a header has.
        expected: usize,
        /// How many bytes the content has.
        found: usize,
    },

    /// The magic number says that this is another kind of file.
    #[error("expected magic number {expected:#010x} ({kind}), found {found:#010x}")]
    Magic {
        /// `images` or `labels`.
        kind: &'static str,
        /// Magic number of that kind.
        expected: u32,
        /// Magic number found.
        found: u32,
    },

    /// The images have another size.
    #[error(
        "expected images of {}x{} pixels, found {}x{}",
        expected[0], expected[1], found[0], found[1]
    )]
    ImageSize {
        /// Height and width expected.
        expected: [u32; 2],
        /// Height and width in the header.
        found: [u32; 2],
    },

    /// The header announces no items.
    #[error("the file holds no items")]
    Empty,

    /// The header announces more items than any data set this crate reads.
    #[error("the header announces {found} items, more than the limit of {limit}")]
    TooManyItems {
        /// Largest count accepted.
        limit: u32,
        /// Count in the header.
        found: u32,
    },

    /// The content ends before the announced items.
    #[error("the header announces {expected} bytes of items, found {found}")]
    Truncated {
        /// How many bytes the header announces.
        expected: usize,
        /// How many bytes follow the header.
        found: usize,
    },

    /// The content goes on after the announced items.
    #[error("found more than the {expected} bytes of items that the header announces")]
    TrailingBytes {
        /// Bytes that the header announces.
        expected: usize,
    },

    /// A label is not a class index.
    #[error("label {label} of item {index} is not below {num_classes}")]
    Label {
        /// Index of the item.
        index: usize,
        /// The label that was read for it.
        label: u8,
        /// Number of classes.
        num_classes: usize,
    },
}

/// Joins an error and its sources into one line.
#[cfg(feature = "mnist")]
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        line.push_str(": ");
        line.push_str(&cause.to_string());
        source = cause.source();
    }
    line
}
