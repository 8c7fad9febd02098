//! Writes trained weights to a file that other programs can read.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use ps_actors::checkpoint::CheckpointError;
use ps_actors::weights::Weights;
use ps_model::ModelError;
use ps_model::burn::module::Module;
use ps_model::burn::tensor::Device;

use crate::source::model_with_weights;

/// A file for a trained model. The end of its name says the format:
///
/// - `.safetensors`: the trained parameters by their names. Many programs can read it. A parameter in several fields has
///   the name of the first of them (M-7).
/// - `.bpk`: burn's own format, with everything that is in the module. burn reads it by `Module::load_file`.
///
/// ```
/// use ps::export::ExportFile;
/// use ps::model::burn::module::Module;
/// use ps::prelude::*;
///
/// let device = select_device(default_device_name())?;
/// let model = ConvNet::init(1, &device);
/// let trainer = Trainer::new(model.clone(), Mnist::bundled_sample().train).device(&device);
/// let report = trainer.iterations(3).run()?;
///
/// let directory = tempfile::tempdir()?;
/// let file: ExportFile = directory.path().join("model.bpk").to_string_lossy().parse()?;
/// file.write(&model, &device, &report.weights)?;
/// let read = ConvNet::init(2, &device).load_file(file.path());
/// assert_eq!(initial_weights(&read, &device)?.to_vec(), report.weights.to_vec());
///
/// assert!("model.txt".parse::<ExportFile>().is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportFile {
    path: PathBuf,
    format: Format,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Safetensors,
    Burn,
}

/// Why a model could not be exported.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExportError {
    /// The end of the file's name is not known.
    #[error("`{0}` must end in .safetensors, or in .bpk for burn's own format")]
    Name(String),
    /// The weights are of another model, or the device failed.
    #[error("the weights cannot be put into the model")]
    Model(#[from] ModelError),
    /// The file cannot be written.
    #[error("the model cannot be exported")]
    Write(#[from] CheckpointError),
    /// burn cannot write the file.
    #[error("cannot write {}: {reason}", path.display())]
    Burn {
        /// The file that was to be written.
        path: PathBuf,
        /// What burn said.
        reason: String,
    },
}

impl FromStr for ExportFile {
    type Err = ExportError;

    fn from_str(text: &str) -> Result<Self, ExportError> {
        let path = PathBuf::from(text);
        let format = match path.extension().and_then(|end| end.to_str()) {
            Some("safetensors") => Format::Safetensors,
            Some("bpk") => Format::Burn,
            _ => return Err(ExportError::Name(text.to_owned())),
        };
        Ok(Self { path, format })
    }
}

impl ExportFile {
    /// Returns the path of the file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes `model` with these weights. An existing file is replaced when the new one is complete.
    ///
    /// # Errors
    /// If the weights are of another model, or if the file cannot be written.
    pub fn write<M: Module>(
        &self,
        model: &M,
        device: &Device,
        weights: &Weights,
    ) -> Result<(), ExportError> {
        // This also checks that they are the weights of this model.
        let trained = model_with_weights(model, device, weights)?;
        if self.format == Format::Safetensors {
            return Ok(weights.write_safetensors(&self.path)?);
        }
        let failed = |reason: &dyn std::fmt::Display| ExportError::Burn {
            path: self.path.clone(),
            reason: reason.to_string(),
        };
        // burn adds the end of the name where it is missing.
        let partial = self.path.with_extension("partial.bpk");
        let saved = trained.save_file(&partial).map_err(|error| failed(&error));
        let renamed = saved.and_then(|()| {
            let synced = File::open(&partial).and_then(|file| file.sync_all());
            let renamed = synced.and_then(|()| fs::rename(&partial, &self.path));
            renamed.map_err(|error| failed(&error))
        });
        if renamed.is_err() {
            let _ = fs::remove_file(&partial);
        }
        renamed
    }
}
