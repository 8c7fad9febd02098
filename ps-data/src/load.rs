//! Finds the files of a data set: directory, environment, cache, download, bundled sample.
//!
//! If the user named a directory (argument, then environment), it is used or the load fails; it is never
//! skipped silently. Its files must have the right format. It may hold any data set of that format, so a
//! checksum that differs from the published one is only a warning. The warning names the data set if it is
//! another known one. Cached and downloaded files must match the published checksums. A cached file that
//! does not match is fetched again.

use std::path::{Path, PathBuf};

use crate::error::{DataError, chain};
use crate::idx::{Idx, Kind, decode, read_raw};
use crate::locate::{Located, missing_file};
use crate::spec::{
    Checksum, DataFile, IMAGE_SIZE, KNOWN, NUM_CLASSES, Pair, Sample, Spec, suspicion,
};
use crate::{DataSource, ImageDataset, MnistOptions, Normalization};

#[cfg(feature = "download")]
use crate::download::fetch;

#[cfg(not(feature = "download"))]
fn fetch(_: &Spec, _: &Path, _: &MnistOptions) -> Result<usize, DataError> {
    Err(DataError::DownloadDisabled)
}

/// The training examples and the test examples.
type Splits = (ImageDataset, ImageDataset);

/// The environment variables that are used. They are read in one place so that tests can replace them.
#[derive(Debug, Default)]
pub(crate) struct Environment {
    pub(crate) directory: Option<PathBuf>,
    pub(crate) offline: bool,
}

impl Environment {
    pub(crate) fn of_process(spec: &Spec) -> Self {
        let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
        Self {
            directory: set(spec.variable).map(PathBuf::from),
            offline: set("PS_OFFLINE").is_some_and(|value| value != "0" && value != "false"),
        }
    }
}

/// Loads training and test examples from the first place that has them.
pub(crate) fn load(
    spec: &Spec,
    options: &MnistOptions,
    environment: &Environment,
) -> Result<(ImageDataset, ImageDataset, DataSource), DataError> {
    let named = options
        .directory
        .as_ref()
        .or(environment.directory.as_ref());
    if let Some(directory) = named {
        let (train, test) = read_directory(spec, directory)?;
        let source = DataSource::Directory(directory.clone());
        return Ok((train, test, source));
    }
    let offline = options.offline || environment.offline;
    let failure = match read_or_fetch(spec, options, offline) {
        Ok(loaded) => return Ok(loaded),
        Err(failure) => failure,
    };
    let Some(sample) = spec.sample else {
        return Err(DataError::Unavailable {
            name: spec.name,
            variable: spec.variable,
            offline,
            source: Box::new(failure),
        });
    };
    let (train, test) = read_sample(sample, spec.normalization);
    let reason = match offline {
        true => format!("offline: {}", chain(&failure)),
        false => chain(&failure),
    };
    tracing::warn!(
        "using the bundled sample of {} ({} training, {} test images): {reason}",
        spec.name,
        train.len(),
        test.len(),
    );
    let source = DataSource::BundledSample { reason };
    Ok((train, test, source))
}

/// Reads the cache. If necessary and allowed, it downloads the files first.
fn read_or_fetch(
    spec: &Spec,
    options: &MnistOptions,
    offline: bool,
) -> Result<(ImageDataset, ImageDataset, DataSource), DataError> {
    let cache = match &options.cache_directory {
        Some(directory) => directory.clone(),
        None => dirs::cache_dir()
            .ok_or(DataError::NoCacheDirectory)?
            .join("ps")
            .join(spec.folder),
    };
    let ((train, test), source) = match read_cache(spec, &cache) {
        Ok(splits) => (splits, DataSource::Cache(cache)),
        Err(failure) if offline => return Err(failure),
        Err(failure) => {
            if !matches!(failure, DataError::MissingFile { .. }) {
                tracing::warn!("{}; fetching it again", chain(&failure));
            }
            let fetched = fetch(spec, &cache, options)?;
            let splits = read_cache(spec, &cache)?;
            // Another process may have done the work while this one waited for the lock.
            let source = match fetched {
                0 => DataSource::Cache(cache),
                _ => DataSource::Downloaded(cache),
            };
            (splits, source)
        }
    };
    Ok((train, test, source))
}

fn read_directory(spec: &Spec, directory: &Path) -> Result<Splits, DataError> {
    let located = Located::new(spec, directory)?;
    read_splits(spec, |file, kind| {
        let path = located.path(file)?;
        let (raw, idx) = read_decoded(&path, kind)?;
        if let Some(suspicion) = suspicion(&KNOWN, spec, file, &raw, &idx) {
            tracing::warn!("{} {suspicion}; using it as it is", path.display());
        }
        Ok((idx, path))
    })
}

fn read_cache(spec: &Spec, cache: &Path) -> Result<Splits, DataError> {
    read_splits(spec, |file, kind| {
        let path = cached_path(cache, file);
        if !path.exists() {
            return Err(missing_file(cache, file.name));
        }
        Ok((read_file(&path, kind, Some(file.checksum))?, path))
    })
}

/// Returns the path of a cached file. Cached files are compressed, as the mirrors send them.
pub(crate) fn cached_path(cache: &Path, file: &DataFile) -> PathBuf {
    cache.join(format!("{}.gz", file.name))
}

pub(crate) fn read_sample(sample: &Sample, normalization: Normalization) -> Splits {
    let read = |[images, labels]: [&[u8]; 2]| {
        let decode = |raw, kind| decode(raw, kind).expect("a test reads the bundled sample");
        let (images, labels) = (decode(images, Kind::IMAGES), decode(labels, Kind::LABELS));
        dataset(images, labels, normalization).expect("a test reads the bundled sample")
    };
    (read(sample.train), read(sample.test))
}

fn read_splits(
    spec: &Spec,
    read: impl Fn(&DataFile, Kind) -> Result<(Idx, PathBuf), DataError>,
) -> Result<Splits, DataError> {
    let read_pair = |pair: &Pair| {
        // Labels first: they are small, so a missing or wrong directory shows at once.
        let (labels, labels_path) = read(&pair.labels, Kind::LABELS)?;
        let (images, images_path) = read(&pair.images, Kind::IMAGES)?;
        if images.count != labels.count {
            return Err(DataError::CountMismatch {
                images: images_path,
                labels: labels_path,
                num_images: images.count,
                num_labels: labels.count,
            });
        }
        dataset(images, labels, spec.normalization)
    };
    Ok((read_pair(&spec.train)?, read_pair(&spec.test)?))
}

fn dataset(
    images: Idx,
    labels: Idx,
    normalization: Normalization,
) -> Result<ImageDataset, DataError> {
    ImageDataset::new(
        images.body,
        labels.body,
        [1, IMAGE_SIZE as usize, IMAGE_SIZE as usize],
        NUM_CLASSES,
        normalization,
    )
}

/// Reads one file and verifies its format. If a checksum is given, it verifies that, too.
pub(crate) fn read_file(
    path: &Path,
    kind: Kind,
    checksum: Option<Checksum>,
) -> Result<Idx, DataError> {
    let (raw, idx) = read_decoded(path, kind)?;
    match checksum.and_then(|checksum| checksum.mismatch(&raw, &idx)) {
        Some((expected, found)) => Err(DataError::Checksum {
            path: path.to_owned(),
            expected,
            found,
        }),
        None => Ok(idx),
    }
}

/// Returns a file's bytes and its decoded contents.
fn read_decoded(path: &Path, kind: Kind) -> Result<(Vec<u8>, Idx), DataError> {
    let raw = read_raw(path)?;
    let idx = decode(&raw, kind).map_err(|source| DataError::Corrupt {
        path: path.to_owned(),
        source,
    })?;
    Ok((raw, idx))
}
