//! The files of one checkpoint: a directory with these files, which is renamed to its name when complete.
//!
//! | file | what it holds |
//! |---|---|
//! | `model.safetensors` | the weights, by the names of the model's parameters |
//! | `optimizer.safetensors` | the vectors of the update rule, as `SLOT/PARAMETER` |
//! | `state.bin` | what became of each gradient, and the single numbers of the update rule |
//! | `manifest.json` | version, order of the parameters, statements about the run; for people too |
//! | `CHECKSUMS` | CRC-32 and length of each of the others; written last |
//!
//! The vectors are cut along the parameters and not along the servers. So any number of servers can go on
//! from them, and other programs can read them.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::ops::Range;
use std::path::{Path, PathBuf};

use ps_runtime::actor::error_chain;
use ps_runtime::codec::{Bulk, BulkBytes, BulkValue};
use safetensors::tensor::{Dtype, SafeTensorError, SafeTensors, View};
use serde::{Deserialize, Serialize};

use super::{Checkpoint, CheckpointError};
use crate::chaos::reached;
use crate::frames::little_endian;
use crate::ids::Version;
use crate::rule::{SavedRule, Scalar};
use crate::server::CoordinatorState;
use crate::weights::{Layout, Parameter, Weights};

const MODEL: &str = "model.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "state.bin";
const MANIFEST: &str = "manifest.json";
const CHECKSUMS: &str = "CHECKSUMS";

/// The files that every checkpoint has besides [`CHECKSUMS`].
const FILES: [&str; 4] = [MODEL, OPTIMIZER, STATE, MANIFEST];

const FORMAT: &str = "ps checkpoint";
const FORMAT_VERSION: u32 = 1;

/// The longest list of checksums that is read, in bytes.
const MAX_CHECKSUMS: u64 = 4096;

#[derive(Serialize, Deserialize)]
struct Manifest {
    format: String,
    format_version: u32,
    written_by: String,
    version: u64,
    learning_rate: f64,
    consistency: String,
    /// The clock of the first step that is not settled, by worker.
    next_clocks: BTreeMap<u32, u64>,
    facts: BTreeMap<String, String>,
    /// The names of the vectors of the update rule.
    slots: Vec<String>,
    /// In the order of the flat vector.
    parameters: Vec<ManifestParameter>,
    /// How many of the last parameters are buffers.
    #[serde(default)]
    num_buffers: usize,
}

#[derive(Serialize, Deserialize)]
struct ManifestParameter {
    name: String,
    shape: Vec<usize>,
}

/// What JSON cannot hold: numbers that are not finite, and exact ones.
#[derive(Serialize, Deserialize)]
struct State {
    coordinator: CoordinatorState,
    learning_rate: f64,
    scalars: Vec<(String, Scalar)>,
}

/// Numbers of one parameter, as safetensors wants them.
struct Tensor<'a> {
    shape: &'a [usize],
    numbers: Cow<'a, [f32]>,
}

impl View for Tensor<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        little_endian(&self.numbers)
    }

    fn data_len(&self) -> usize {
        size_of_val(&self.numbers[..])
    }
}

pub(super) fn write(checkpoint: &Checkpoint, path: &Path) -> Result<(), CheckpointError> {
    if let Ok(there) = read(path)
        && there.version() == checkpoint.version()
    {
        return Ok(());
    }
    let partial = partial_of(path);
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| CheckpointError::Write { path, source }
    };
    // It may be left from a process that was killed.
    remove(&partial).map_err(failed(&partial))?;
    let written = write_files(checkpoint, &partial).and_then(|()| {
        // What is there under this name could not be read, or is of another version.
        remove(path).map_err(failed(path))?;
        reached!(CheckpointWritten(path));
        fs::rename(&partial, path).map_err(failed(path))?;
        reached!(CheckpointNamed(path));
        sync_directory(parent_of(path)).map_err(failed(path))
    });
    if written.is_err() {
        // The disk may be full. The error is worth more than that of the cleaning.
        let _ = remove(&partial);
    }
    written
}

/// Returns how many bytes the files of a checkpoint have. What cannot be looked at counts as nothing.
pub(super) fn size_of_files(path: &Path) -> u64 {
    let names = FILES.into_iter().chain([CHECKSUMS]);
    let sizes = names.map(|name| fs::metadata(path.join(name)).map_or(0, |file| file.len()));
    sizes.sum()
}

fn write_files(checkpoint: &Checkpoint, directory: &Path) -> Result<(), CheckpointError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| CheckpointError::Write { path, source }
    };
    fs::create_dir_all(directory).map_err(failed(directory))?;
    let Checkpoint {
        weights,
        rule,
        learning_rate,
        coordinator,
        facts,
        restarted_at: _,
    } = checkpoint;
    let layout = weights.layout();
    write_model(weights, &directory.join(MODEL))?;
    let slots = rule.vectors.iter().flat_map(|(slot, numbers)| {
        layout.parameters().iter().map(move |parameter| {
            let Parameter { name, shape, range } = parameter;
            let numbers = Cow::Borrowed(&numbers[range.clone()]);
            (format!("{slot}/{name}"), Tensor { shape, numbers })
        })
    });
    write_tensors(&directory.join(OPTIMIZER), slots)?;
    let state = State {
        coordinator: coordinator.clone(),
        learning_rate: *learning_rate,
        scalars: rule.scalars.clone(),
    };
    let path = directory.join(STATE);
    let state = BulkValue::new(&state).map_err(io::Error::other);
    let state = state.map_err(failed(&path))?;
    write_file(&path, state.bytes()).map_err(failed(&path))?;
    let manifest = Manifest {
        format: FORMAT.to_owned(),
        format_version: FORMAT_VERSION,
        written_by: concat!("ps ", env!("CARGO_PKG_VERSION")).to_owned(),
        version: checkpoint.version().0,
        learning_rate: *learning_rate,
        consistency: coordinator.consistency.to_string(),
        next_clocks: checkpoint
            .next_clocks()
            .map(|(worker, clock)| (worker.0, clock.0))
            .collect(),
        facts: facts.clone(),
        slots: rule.vectors.iter().map(|(slot, _)| slot.clone()).collect(),
        parameters: layout
            .parameters()
            .iter()
            .map(|parameter| ManifestParameter {
                name: parameter.name.clone(),
                shape: parameter.shape.clone(),
            })
            .collect(),
        num_buffers: layout.num_buffers(),
    };
    let path = directory.join(MANIFEST);
    let mut text = serde_json::to_vec_pretty(&manifest)
        .map_err(io::Error::other)
        .map_err(failed(&path))?;
    text.push(b'\n');
    write_file(&path, &text).map_err(failed(&path))?;
    let mut checksums = String::new();
    for name in FILES {
        let path = directory.join(name);
        let (crc, len) = checksum(&path).map_err(failed(&path))?;
        checksums += &format!("{crc:08x} {len} {name}\n");
    }
    let path = directory.join(CHECKSUMS);
    write_file(&path, checksums.as_bytes()).map_err(failed(&path))?;
    sync_directory(directory).map_err(failed(directory))
}

/// Writes weights by the names of their parameters.
fn write_model(weights: &Weights, path: &Path) -> Result<(), CheckpointError> {
    let parameters = weights.layout().parameters();
    let names: BTreeSet<&str> = parameters.iter().map(|one| one.name.as_str()).collect();
    if names.len() < parameters.len() {
        let path = path.to_owned();
        let source = io::Error::other("two parameters of the model have the same name");
        return Err(CheckpointError::Write { path, source });
    }
    let tensors = parameters.iter().map(|parameter| {
        let Parameter { name, shape, range } = parameter;
        let numbers = weights.read(range.clone());
        (name.clone(), Tensor { shape, numbers })
    });
    write_tensors(path, tensors)
}

impl Weights {
    /// Writes the weights to a file of the format safetensors, under the names of the model's parameters. The
    /// file is either complete or does not exist.
    ///
    /// ```
    /// use ps_actors::weights::{Layout, Weights};
    ///
    /// let weights = Weights::initial(Layout::flat(3), vec![1.0, 2.0, 3.0]);
    /// let directory = tempfile::tempdir()?;
    /// let path = directory.path().join("model.safetensors");
    /// weights.write_safetensors(&path)?;
    ///
    /// let bytes = std::fs::read(&path)?;
    /// let tensors = safetensors::SafeTensors::deserialize(&bytes)?;
    /// assert_eq!(tensors.tensor("weights")?.shape(), [3]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// If the file cannot be written, or if two parameters have the same name.
    pub fn write_safetensors(&self, path: impl AsRef<Path>) -> Result<(), CheckpointError> {
        let path = path.as_ref();
        let failed = |source| CheckpointError::Write {
            path: path.to_owned(),
            source,
        };
        let partial = partial_of(path);
        let written = write_model(self, &partial)
            .and_then(|()| fs::rename(&partial, path).map_err(failed))
            .and_then(|()| sync_directory(parent_of(path)).map_err(failed));
        if written.is_err() {
            let _ = fs::remove_file(&partial);
        }
        written
    }

    /// Reads the weights of a model with this layout from a file of the format safetensors, such as one that
    /// [`write_safetensors`](Self::write_safetensors) has written, or the `model.safetensors` of a checkpoint. Their
    /// version is 0.
    ///
    /// ```
    /// use ps_actors::weights::{Layout, Weights};
    ///
    /// let weights = Weights::initial(Layout::flat(3), vec![1.0, 2.0, 3.0]);
    /// let directory = tempfile::tempdir()?;
    /// let path = directory.path().join("model.safetensors");
    /// weights.write_safetensors(&path)?;
    ///
    /// let read = Weights::read_safetensors(&path, weights.layout())?;
    /// assert_eq!(read.to_vec(), [1.0, 2.0, 3.0]);
    /// let error = Weights::read_safetensors(&path, &Layout::flat(4)).unwrap_err();
    /// assert!(error.to_string().contains("weights is F32 [3], not F32 [4]"), "{error}");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// If the file cannot be read, or is damaged. If it does not have exactly the parameters of the layout, by their
    /// names and shapes, as `f32`.
    pub fn read_safetensors(
        path: impl AsRef<Path>,
        layout: &Layout,
    ) -> Result<Self, CheckpointError> {
        let path = path.as_ref();
        let bytes = fs::read(path).map_err(|source| CheckpointError::Read {
            path: path.to_owned(),
            source,
        })?;
        let tensors =
            SafeTensors::deserialize(&bytes).map_err(|error| CheckpointError::Damaged {
                path: path.to_owned(),
                reason: error.to_string(),
            })?;
        let (found, expected) = (tensors.len(), layout.parameters().len());
        let numbers = copy_tensors(&tensors, layout, str::to_owned).and_then(|numbers| {
            match found == expected {
                true => Ok(numbers),
                false => Err(format!("it has {found} tensors, not {expected}")),
            }
        });
        match numbers {
            Ok(numbers) => Ok(Self::initial(layout.clone(), numbers)),
            Err(reason) => Err(CheckpointError::OtherModel {
                path: path.to_owned(),
                reason,
            }),
        }
    }
}

/// Whether the disk takes this file. With the feature `chaos`, it may be slow or have faults.
#[cfg(feature = "chaos")]
fn disk_takes(path: &Path) -> io::Result<()> {
    crate::chaos::points::before_write(path)
}

#[cfg(not(feature = "chaos"))]
#[allow(
    clippy::unnecessary_wraps,
    reason = "with the feature `chaos` it may fail"
)]
fn disk_takes(_: &Path) -> io::Result<()> {
    Ok(())
}

fn write_tensors<'a>(
    path: &Path,
    tensors: impl Iterator<Item = (String, Tensor<'a>)>,
) -> Result<(), CheckpointError> {
    // The convention by which some loaders recognize files of weights.
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let written = || {
        disk_takes(path)?;
        // The crate makes a file that only its owner may read. It gets the rights of the other files.
        let rights = File::create(path)?.metadata()?.permissions();
        let written = safetensors::serialize_to_file(tensors, Some(metadata), path);
        written.map_err(|error| match error {
            SafeTensorError::IoError(error) => error,
            other => io::Error::other(other),
        })?;
        let file = File::open(path)?;
        file.set_permissions(rights)?;
        file.sync_all()
    };
    written().map_err(|source| CheckpointError::Write {
        path: path.to_owned(),
        source,
    })
}

fn write_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    disk_takes(path)?;
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

pub(super) fn read(directory: &Path) -> Result<Checkpoint, CheckpointError> {
    let mut checksums = read_checksums(directory)?;
    let mut read = |name: &str| read_file(directory, name, &mut checksums);
    let (model, optimizer, state, manifest) = (
        read(MODEL)?,
        read(OPTIMIZER)?,
        read(STATE)?,
        read(MANIFEST)?,
    );
    let damaged = |name: &str, reason: String| CheckpointError::Damaged {
        path: directory.join(name),
        reason,
    };
    let manifest: Manifest =
        serde_json::from_slice(&manifest).map_err(|error| damaged(MANIFEST, error.to_string()))?;
    if manifest.format != FORMAT || manifest.format_version != FORMAT_VERSION {
        let Manifest {
            format,
            format_version,
            written_by,
            ..
        } = manifest;
        let reason = format!(
            "it is of the format `{format}` {format_version}, by {written_by}, and this program reads \
             `{FORMAT}` {FORMAT_VERSION}"
        );
        return Err(damaged(MANIFEST, reason));
    }
    let state = BulkValue::<State>::from(BulkBytes::from(state)).read();
    let state = state.map_err(|error| damaged(STATE, error_chain(&error)))?;
    let layout = layout(&manifest.parameters, manifest.num_buffers)
        .map_err(|reason| damaged(MANIFEST, reason))?;
    let plain = |name: &str| name.to_owned();
    let numbers = read_tensors(&model, &layout, plain).map_err(|reason| damaged(MODEL, reason))?;
    let tensors = SafeTensors::deserialize(&optimizer)
        .map_err(|error| damaged(OPTIMIZER, error.to_string()))?;
    let expected = manifest
        .slots
        .len()
        .saturating_mul(layout.parameters().len());
    if tensors.len() != expected {
        let reason = format!("it has {} tensors, not {expected}", tensors.len());
        return Err(damaged(OPTIMIZER, reason));
    }
    let mut vectors = Vec::new();
    for slot in &manifest.slots {
        let of_slot = |name: &str| format!("{slot}/{name}");
        let numbers = copy_tensors(&tensors, &layout, of_slot);
        let numbers = numbers.map_err(|reason| damaged(OPTIMIZER, reason))?;
        vectors.push((slot.clone(), Bulk::from(numbers)));
    }
    let version = Version(manifest.version);
    if state.coordinator.version != version {
        let reason = format!("it is of {}, not {version}", state.coordinator.version);
        return Err(damaged(STATE, reason));
    }
    Ok(Checkpoint {
        weights: Weights::initial(layout, numbers).at(version),
        rule: SavedRule {
            vectors,
            scalars: state.scalars,
        },
        learning_rate: state.learning_rate,
        coordinator: state.coordinator,
        facts: manifest.facts,
        restarted_at: None,
    })
}

/// Reads the list of files: CRC-32 and length of each, by name.
fn read_checksums(directory: &Path) -> Result<BTreeMap<String, (u32, u64)>, CheckpointError> {
    let path = directory.join(CHECKSUMS);
    let mut text = String::new();
    let read =
        File::open(&path).and_then(|file| file.take(MAX_CHECKSUMS).read_to_string(&mut text));
    if let Err(source) = read {
        return Err(match source.kind() {
            // It is written last.
            io::ErrorKind::NotFound if directory.is_dir() => CheckpointError::Damaged {
                path: directory.to_owned(),
                reason: format!("it is not complete: there is no {CHECKSUMS}"),
            },
            _ => CheckpointError::Read { path, source },
        });
    }
    let line = |line: &str| {
        let mut words = line.split(' ');
        let crc = u32::from_str_radix(words.next()?, 16).ok()?;
        let len = words.next()?.parse().ok()?;
        Some((words.next()?.to_owned(), (crc, len)))
    };
    let lines: Option<BTreeMap<_, _>> = text.lines().map(line).collect();
    lines.ok_or_else(|| CheckpointError::Damaged {
        path,
        reason: "it is not a list of checksums".to_owned(),
    })
}

/// Reads a file, if it is what the list says.
fn read_file(
    directory: &Path,
    name: &str,
    checksums: &mut BTreeMap<String, (u32, u64)>,
) -> Result<Vec<u8>, CheckpointError> {
    let path = directory.join(name);
    let damaged = |reason: String| CheckpointError::Damaged {
        path: path.clone(),
        reason,
    };
    let listed = checksums.remove(name);
    let (crc, len) = listed.ok_or_else(|| damaged(format!("{CHECKSUMS} does not list it")))?;
    let read_error = |source| CheckpointError::Read {
        path: path.clone(),
        source,
    };
    let mut file = File::open(&path).map_err(read_error)?;
    let found = file.metadata().map_err(read_error)?.len();
    if found != len {
        return Err(damaged(format!("it has {found} bytes, not {len}")));
    }
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).map_err(read_error)?;
    match crc32fast::hash(&bytes) == crc && bytes.len() as u64 == len {
        true => Ok(bytes),
        false => Err(damaged("its checksum is another one".to_owned())),
    }
}

fn layout(parameters: &[ManifestParameter], num_buffers: usize) -> Result<Layout, String> {
    let mut start = 0_usize;
    let mut all = Vec::new();
    for ManifestParameter { name, shape } in parameters {
        let len = shape
            .iter()
            .try_fold(1_usize, |len, &axis| len.checked_mul(axis));
        let end = len.and_then(|len| start.checked_add(len));
        let range: Range<usize> = start..end.ok_or("its parameters are too large")?;
        start = range.end;
        all.push(Parameter {
            name: name.clone(),
            shape: shape.clone(),
            range,
        });
    }
    Layout::with_buffers(all, num_buffers).map_err(|error| error.to_string())
}

fn read_tensors(
    bytes: &[u8],
    layout: &Layout,
    name: impl Fn(&str) -> String,
) -> Result<Vec<f32>, String> {
    let tensors = SafeTensors::deserialize(bytes).map_err(|error| error.to_string())?;
    let (found, expected) = (tensors.len(), layout.parameters().len());
    match found == expected {
        true => copy_tensors(&tensors, layout, name),
        false => Err(format!("it has {found} tensors, not {expected}")),
    }
}

/// Copies one tensor for each parameter into one vector, in the order of the layout.
fn copy_tensors(
    tensors: &SafeTensors<'_>,
    layout: &Layout,
    name: impl Fn(&str) -> String,
) -> Result<Vec<f32>, String> {
    let mut numbers = Vec::new();
    for parameter in layout.parameters() {
        let name = name(&parameter.name);
        let tensor = tensors.tensor(&name).map_err(|error| error.to_string())?;
        if tensor.dtype() != Dtype::F32 || tensor.shape() != parameter.shape {
            let (dtype, shape) = (tensor.dtype(), tensor.shape());
            let expected = &parameter.shape;
            return Err(format!(
                "{name} is {dtype:?} {shape:?}, not F32 {expected:?}"
            ));
        }
        let bytes = tensor.data().chunks_exact(size_of::<f32>());
        numbers.extend(bytes.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])));
    }
    Ok(numbers)
}

fn checksum(path: &Path) -> io::Result<(u32, u64)> {
    let mut file = File::open(path)?;
    let (mut crc, mut len) = (crc32fast::Hasher::new(), 0);
    let mut block = vec![0; 1 << 20];
    loop {
        match file.read(&mut block)? {
            0 => return Ok((crc.finalize(), len)),
            n => {
                crc.update(&block[..n]);
                len += n as u64;
            }
        }
    }
}

/// Returns the temporary directory in which the checkpoint `path` is written.
fn partial_of(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    parent_of(path).join(format!(".{name}{PARTIAL}"))
}

/// How the names of temporary directories end.
pub(super) const PARTIAL: &str = ".partial";

pub(super) fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Removes a checkpoint, if it is there.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Makes the names in a directory durable. Elsewhere than on Unix, a directory cannot be opened for this.
pub(crate) fn sync_directory(path: &Path) -> io::Result<()> {
    match cfg!(unix) {
        true => File::open(path)?.sync_all(),
        false => Ok(()),
    }
}
