//! Finds the files of a data set in a directory, with the usual names and in the usual folders.
//!
//! The published names have a hyphen (`train-images-idx3-ubyte`); many copies have a dot
//! (`train-images.idx3-ubyte`). torchvision keeps the files in `MNIST/raw`. Kaggle's archive puts each file
//! into a folder with the file's name. All files are taken from one of these folders: files of two copies
//! are never mixed.

use std::path::{Path, PathBuf};

use crate::error::DataError;
use crate::spec::{DataFile, Spec};

/// How many entries of a directory an error lists.
const LISTED: usize = 10;

/// A directory with all files of a data set.
#[derive(Debug)]
pub(crate) struct Located {
    folder: PathBuf,
}

impl Located {
    /// Looks into `directory` and the folders that torchvision makes there.
    pub(crate) fn new(spec: &Spec, directory: &Path) -> Result<Self, DataError> {
        let cannot_list = |source| DataError::Directory {
            path: directory.to_owned(),
            source,
        };
        std::fs::read_dir(directory).map_err(cannot_list)?;
        let folders = [
            directory.to_owned(),
            directory.join(spec.torchvision).join("raw"),
            directory.join("raw"),
        ];
        let has_all = |folder: &PathBuf| spec.names().all(|name| find(folder, name).is_some());
        if let Some(folder) = folders.iter().find(|folder| has_all(folder)) {
            let folder = folder.clone();
            return Ok(Self { folder });
        }
        // The error names the folder that seems to have the files.
        let has_any = |folder: &&PathBuf| spec.names().any(|name| find(folder, name).is_some());
        let folder = folders.iter().find(has_any).unwrap_or(&folders[0]);
        let missing = spec.names().find(|name| find(folder, name).is_none());
        let missing = missing.expect("no folder has all files");
        Err(missing_file(folder, missing))
    }

    /// Returns the path of one of the files.
    pub(crate) fn path(&self, file: &DataFile) -> Result<PathBuf, DataError> {
        // The file was found before, but it may have been removed since.
        find(&self.folder, file.name).ok_or_else(|| missing_file(&self.folder, file.name))
    }
}

/// Returns the error for a missing file. It lists what the directory contains.
pub(crate) fn missing_file(directory: &Path, file: &str) -> DataError {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let mut found: Vec<_> = entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    found.sort();
    if found.len() > LISTED {
        let more = found.len() - LISTED;
        found.truncate(LISTED);
        found.push(format!("{more} more"));
    }
    DataError::MissingFile {
        directory: directory.to_owned(),
        file: file.to_owned(),
        found,
    }
}

fn find(folder: &Path, name: &str) -> Option<PathBuf> {
    let dotted = name.replace("-idx", ".idx");
    let names = [name, &dotted].map(|name| [name.to_owned(), format!("{name}.gz")]);
    let names = names.as_flattened();
    let direct = names.iter().map(|name| folder.join(name));
    let nested = names.iter().map(|name| folder.join(name).join(name));
    direct
        .clone()
        .chain(nested)
        .find(|path| path.is_file())
        // Reading this path gives an error that says what it is instead of a file.
        .or_else(|| direct.clone().find(|path| path.exists()))
}
