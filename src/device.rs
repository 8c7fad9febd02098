//! The device of this process.

use ps_actors::launch::{self, env};
use ps_model::burn::tensor::Device;
use ps_model::{DeviceError, select_device_for};

/// Opens the device called `name`, and checks that it can compute.
///
/// If the name says only which kind of GPU (`cuda`, `tch:cuda`, `wgpu`), the processes of a host take its GPUs in turn:
/// the number of this process on its host is what its launcher says, or `PS_LOCAL_RANK`, or else 0. The names are listed at
/// [`ps_model::device`].
///
/// ```
/// use ps::model::DeviceError;
/// use ps::prelude::*;
///
/// let device = select_device(default_device_name())?;
/// # let _ = device;
/// assert!(matches!(select_device("abacus"), Err(DeviceError::Unknown { .. })));
/// # Ok::<(), DeviceError>(())
/// ```
///
/// # Errors
/// As [`ps_model::select_device`].
pub fn select_device(name: &str) -> Result<Device, DeviceError> {
    // Starting the processes reports variables that make no sense.
    let local_rank = launch::local_rank(env::read).unwrap_or(0);
    select_device_for(name, local_rank as usize)
}
