//! Chooses the device to compute on, among the backends compiled in.
//!
//! This is the only file with burn's deprecated calls (NdArray and LibTorch leave burn with 0.23). Besides
//! `conv` and `pool` it is the only one with `cfg`s. The cargo feature of a backend adds a device and
//! changes nothing else.
//!
//! | Name         | Feature   | Device                                                        |
//! |--------------|-----------|---------------------------------------------------------------|
//! | `flex`       | `flex`    | CPU, pure Rust; the default                                   |
//! | `ndarray`    | `ndarray` | CPU, pure Rust; slow at large convolutions                    |
//! | `tch`        | `tch`     | CPU through LibTorch                                          |
//! | `tch:cuda`   | `tch`     | this process's NVIDIA GPU through LibTorch                    |
//! | `tch:cuda:N` | `tch`     | NVIDIA GPU number N through LibTorch                          |
//! | `cuda`       | `cuda`    | this process's NVIDIA GPU through CubeCL                      |
//! | `cuda:N`     | `cuda`    | NVIDIA GPU number N through CubeCL                            |
//! | `wgpu`       | `wgpu`    | this process's GPU, or the best adapter (Vulkan, Metal, ...)  |
//! | `wgpu:N`     | `wgpu`    | discrete GPU number N; `wgpu:cpu` is a software adapter       |
//!
//! A process's GPU is the one whose number is the process's local rank (its number among the processes on its
//! host) modulo the number of GPUs; see [`select_device_for`]. `CUDA_VISIBLE_DEVICES` hides other NVIDIA GPUs.
//! Those that are left are numbered from 0. For `wgpu`, discrete GPUs count. If there are fewer than two, wgpu
//! chooses the adapter.
//!
//! Parallelism comes from workers, so the CPU backends use one thread each. LibTorch would start one thread
//! per core in every worker. So selecting a `tch` device sets its number of threads to 1, unless
//! `OMP_NUM_THREADS` is set. Then that number is used.

use burn::tensor::{Device, Tensor};

use crate::panic;

#[cfg(not(any(
    feature = "flex",
    feature = "ndarray",
    feature = "tch",
    feature = "cuda",
    feature = "wgpu"
)))]
compile_error!(
    "no backend is enabled: build with at least one of the features `flex` (the default), \
     `ndarray`, `tch`, `cuda` and `wgpu`, for example `cargo build --features flex`"
);

/// The backends in order of preference for the default: name of feature and device, compiled in.
const BACKENDS: [(&str, bool); 5] = [
    ("flex", cfg!(feature = "flex")),
    ("tch", cfg!(feature = "tch")),
    ("ndarray", cfg!(feature = "ndarray")),
    ("cuda", cfg!(feature = "cuda")),
    ("wgpu", cfg!(feature = "wgpu")),
];

/// The names that [`select_device`] knows, as shown in its error.
const KNOWN: &str =
    "flex, ndarray, tch, tch:cuda, tch:cuda:N, cuda, cuda:N, wgpu, wgpu:N, wgpu:cpu";

/// Why a device cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// The name is not one of those that the [module](self) lists.
    #[error("unknown device `{name}` (known: {KNOWN})")]
    Unknown {
        /// The name as given.
        name: String,
    },
    /// The backend of the device is not part of this build.
    #[error(
        "device `{name}` is not compiled in: build again with `--features {feature}` (compiled in: {})",
        compiled_devices().join(", ")
    )]
    NotCompiledIn {
        /// The name as given.
        name: String,
        /// The cargo feature that adds it.
        feature: &'static str,
    },
    /// The backend is compiled in but cannot compute on this machine, for example because it has no such
    /// GPU or no driver.
    #[error("device `{name}` is not available on this machine: {reason}")]
    Unavailable {
        /// The name as given.
        name: String,
        /// What the backend reported.
        reason: String,
    },
}

/// Opens the device called `name`, and checks that it can compute.
///
/// ```
/// use ps_model::{DeviceError, default_device_name, select_device};
///
/// let device = select_device(default_device_name())?;
/// # let _ = device;
/// assert!(matches!(select_device("abacus"), Err(DeviceError::Unknown { .. })));
/// # Ok::<(), DeviceError>(())
/// ```
///
/// The [module](self) lists the names. Autodiff is on for the device. This matters for batches: if a tensor
/// comes from a device without autodiff, burn's layers take it for the input of an inference, and a
/// `Dropout` does nothing to it. Where nothing requires a gradient, nothing is recorded. `device.inner()`
/// is the same device without autodiff. `device.gradient_checkpointing()` saves memory.
///
/// # Errors
///
/// If the name is unknown, if its backend is not compiled in (the error names the feature to add), or if
/// the device cannot be used on this machine.
pub fn select_device(name: &str) -> Result<Device, DeviceError> {
    select_device_for(name, 0)
}

/// Opens the device called `name` for one of several processes on this host, and checks that it can compute.
///
/// `local_rank` is the process's number among them, from 0. If the name says only which kind of GPU (`cuda`,
/// `tch:cuda`, `wgpu`), the processes take the GPUs of the host in turn. Otherwise it is as [`select_device`].
///
/// ```
/// use ps_model::{default_device_name, select_device_for};
///
/// // The fourth process of a host with two GPUs has the second one, if the name is `cuda`.
/// let device = select_device_for(default_device_name(), 3)?;
/// # let _ = device;
/// # Ok::<(), ps_model::DeviceError>(())
/// ```
///
/// # Errors
/// As [`select_device`].
pub fn select_device_for(name: &str, local_rank: usize) -> Result<Device, DeviceError> {
    let choice = Choice::parse(name).ok_or_else(|| DeviceError::Unknown {
        name: name.to_owned(),
    })?;
    // Backends report a missing GPU or driver by panicking, at the first operation.
    let probe = panic::catch_quietly(|| {
        let device = choice.of_process(local_rank, Choice::num_gpus).open()?;
        let sum = Tensor::<1>::from_floats([1.0, 2.0], &device).sum();
        Some((device, sum.try_into_scalar::<f32>()))
    });
    let unavailable = |reason: String| DeviceError::Unavailable {
        name: name.to_owned(),
        reason,
    };
    match probe {
        Ok(Some((device, Ok(3.0)))) => Ok(device.autodiff()),
        Ok(Some((_, Ok(sum)))) => Err(unavailable(format!("it says that 1 + 2 is {sum}"))),
        Ok(Some((_, Err(error)))) => Err(unavailable(error.to_string())),
        Ok(None) => Err(DeviceError::NotCompiledIn {
            name: name.to_owned(),
            feature: choice.feature(),
        }),
        Err(message) => Err(unavailable(first_line(&message))),
    }
}

/// Keeps only the part of a backend's message that concerns users. LibTorch appends a C++ stack trace, with
/// escaped line ends. CubeCL panics in a thread of its own and prints the reason there. Only `RecvError`
/// arrives here.
fn first_line(message: &str) -> String {
    if message.contains("RecvError") {
        return "the backend's thread panicked, for the reason printed above".to_owned();
    }
    let message = message
        .strip_prefix("called `Result::unwrap()` on an `Err` value: ")
        .unwrap_or(message);
    let end = [message.find('\n'), message.find("\\n")];
    let end = end.into_iter().flatten().min().unwrap_or(message.len());
    message[..end].to_owned()
}

/// Returns the default device: the first one of `flex`, `tch`, `ndarray`, `cuda`, `wgpu` whose backend is
/// compiled in.
///
/// For an example, see [`select_device`].
#[must_use]
pub fn default_device_name() -> &'static str {
    compiled_devices()[0]
}

/// Lists one device name of each backend that is compiled in, the default first.
///
/// The devices of `cuda` and `wgpu` may still be unavailable on this machine.
///
/// ```
/// use ps_model::{compiled_devices, default_device_name};
///
/// assert_eq!(compiled_devices()[0], default_device_name());
/// ```
#[must_use]
pub fn compiled_devices() -> Vec<&'static str> {
    BACKENDS
        .iter()
        .filter(|(_, compiled)| *compiled)
        .map(|(name, _)| *name)
        .collect()
}

/// A device name, parsed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Choice {
    Flex,
    NdArray,
    LibTorch,
    /// `None`: the GPU of this process.
    LibTorchCuda(Option<usize>),
    /// `None`: the GPU of this process.
    Cuda(Option<usize>),
    Wgpu,
    WgpuDiscrete(usize),
    WgpuCpu,
}

impl Choice {
    fn parse(name: &str) -> Option<Self> {
        let parts: Vec<&str> = name.split(':').collect();
        match parts[..] {
            ["flex"] => Some(Self::Flex),
            ["ndarray"] => Some(Self::NdArray),
            ["tch"] => Some(Self::LibTorch),
            ["tch", "cuda"] => Some(Self::LibTorchCuda(None)),
            ["tch", "cuda", index] => Some(Self::LibTorchCuda(Some(index.parse().ok()?))),
            ["cuda"] => Some(Self::Cuda(None)),
            ["cuda", index] => Some(Self::Cuda(Some(index.parse().ok()?))),
            ["wgpu"] => Some(Self::Wgpu),
            ["wgpu", "cpu"] => Some(Self::WgpuCpu),
            ["wgpu", index] => index.parse().ok().map(Self::WgpuDiscrete),
            _ => None,
        }
    }

    const fn feature(self) -> &'static str {
        match self {
            Self::Flex => "flex",
            Self::NdArray => "ndarray",
            Self::LibTorch | Self::LibTorchCuda(_) => "tch",
            Self::Cuda(_) => "cuda",
            Self::Wgpu | Self::WgpuDiscrete(_) | Self::WgpuCpu => "wgpu",
        }
    }

    /// Names the GPU of the process with this local rank, if the name that was parsed names none.
    fn of_process(self, local_rank: usize, num_gpus: impl Fn(Self) -> usize) -> Self {
        match self {
            Self::LibTorchCuda(None) => {
                Self::LibTorchCuda(Some(local_rank % num_gpus(self).max(1)))
            }
            Self::Cuda(None) => Self::Cuda(Some(local_rank % num_gpus(self).max(1))),
            Self::Wgpu => match num_gpus(self) {
                // wgpu knows best which of its adapters to take.
                0 | 1 => self,
                several => Self::WgpuDiscrete(local_rank % several),
            },
            other => other,
        }
    }

    /// Returns how many GPUs of this kind the host has. 0 also if the backend is not compiled in.
    fn num_gpus(self) -> usize {
        match self {
            #[cfg(feature = "tch")]
            Self::LibTorchCuda(_) => usize::try_from(tch::Cuda::device_count()).unwrap_or(0),
            #[cfg(feature = "cuda")]
            Self::Cuda(_) => Device::enumerate(burn::tensor::DeviceType::Cuda).len(),
            #[cfg(feature = "wgpu")]
            Self::Wgpu => {
                let adapters = Device::enumerate(burn::tensor::DeviceType::Wgpu);
                let discrete = |index| Device::wgpu(burn::tensor::DeviceKind::DiscreteGpu(index));
                (0..adapters.len())
                    .take_while(|&index| adapters.contains(&discrete(index)))
                    .count()
            }
            _ => 0,
        }
    }

    /// Names the device to burn; `None` if its backend is not compiled in.
    #[allow(
        deprecated,
        reason = "burn 0.22 still has NdArray and LibTorch, and users ask for them"
    )]
    fn open(self) -> Option<Device> {
        match self {
            #[cfg(feature = "flex")]
            Self::Flex => {
                keep_freed_memory();
                Some(Device::flex())
            }
            #[cfg(feature = "ndarray")]
            Self::NdArray => Some(Device::ndarray()),
            #[cfg(feature = "tch")]
            Self::LibTorch => {
                limit_libtorch_threads();
                Some(Device::libtorch())
            }
            #[cfg(feature = "tch")]
            Self::LibTorchCuda(index) => {
                limit_libtorch_threads();
                Some(Device::libtorch_cuda(index.unwrap_or(0)))
            }
            #[cfg(feature = "cuda")]
            Self::Cuda(index) => Some(Device::cuda(index.unwrap_or(0))),
            #[cfg(feature = "wgpu")]
            Self::Wgpu => Some(Device::wgpu(burn::tensor::DeviceKind::DefaultDevice)),
            #[cfg(feature = "wgpu")]
            Self::WgpuDiscrete(index) => {
                Some(Device::wgpu(burn::tensor::DeviceKind::DiscreteGpu(index)))
            }
            #[cfg(feature = "wgpu")]
            Self::WgpuCpu => Some(Device::wgpu(burn::tensor::DeviceKind::Cpu)),
            #[allow(unreachable_patterns, reason = "reachable unless all are compiled in")]
            _ => None,
        }
    }
}

/// Lets glibc keep up to 64 MB of freed memory for the next step, unless the user has set
/// `M_TRIM_THRESHOLD` or `M_MMAP_THRESHOLD`.
///
/// The tensors of a step come and go with it. glibc would give the end of the heap back to the system
/// after each step and fetch it again, page by page: a quarter of a step of `Net`. When a block that
/// had a mapping of its own is freed, glibc takes its size for the one up to which blocks come from
/// the heap, and keeps twice as much (mallopt(3), "dynamic mmap threshold"). This block, of nearly the
/// 32 MB up to which it does so, is never written to, so it takes no memory.
#[cfg(feature = "flex")]
fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        static ONCE: std::sync::Once = std::sync::Once::new();
        ONCE.call_once(|| drop(std::hint::black_box(Vec::<u8>::with_capacity(31 << 20))));
    }
}

/// Makes LibTorch compute on one thread per worker, unless the user has said otherwise.
#[cfg(feature = "tch")]
fn limit_libtorch_threads() {
    if std::env::var_os("OMP_NUM_THREADS").is_none() {
        tch::set_num_threads(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_parsed_and_others_refused() {
        for (name, expected) in [
            ("flex", Some(Choice::Flex)),
            ("tch", Some(Choice::LibTorch)),
            ("tch:cuda", Some(Choice::LibTorchCuda(None))),
            ("tch:cuda:1", Some(Choice::LibTorchCuda(Some(1)))),
            ("cuda", Some(Choice::Cuda(None))),
            ("cuda:2", Some(Choice::Cuda(Some(2)))),
            ("wgpu", Some(Choice::Wgpu)),
            ("wgpu:0", Some(Choice::WgpuDiscrete(0))),
            ("wgpu:cpu", Some(Choice::WgpuCpu)),
            ("", None),
            ("Flex", None),
            ("flex:0", None),
            ("tch:cuda:", None),
            ("cuda:-1", None),
            ("cuda:0:0", None),
            ("cuda:99999999999999999999999", None),
        ] {
            assert_eq!(Choice::parse(name), expected, "{name:?}");
        }
    }

    #[test]
    fn the_processes_of_a_host_take_its_gpus_in_turn_unless_a_number_is_given() {
        let choices = |name: &str, num_gpus: usize| {
            let choice = Choice::parse(name).unwrap();
            [0, 1, 2].map(|local_rank| choice.of_process(local_rank, |_| num_gpus))
        };
        let cuda = |numbers: [usize; 3]| numbers.map(|number| Choice::Cuda(Some(number)));
        assert_eq!(choices("cuda", 2), cuda([0, 1, 0]));
        assert_eq!(choices("cuda", 1), cuda([0, 0, 0]));
        // Then it is burn that says that there is none.
        assert_eq!(choices("cuda", 0), cuda([0, 0, 0]));
        assert_eq!(choices("cuda:1", 2), cuda([1, 1, 1]));
        let torch = |numbers: [usize; 3]| numbers.map(|number| Choice::LibTorchCuda(Some(number)));
        assert_eq!(choices("tch:cuda", 2), torch([0, 1, 0]));
        assert_eq!(choices("tch:cuda:1", 2), torch([1, 1, 1]));
        assert_eq!(choices("wgpu", 2), [0, 1, 0].map(Choice::WgpuDiscrete));
        assert_eq!(choices("wgpu", 1), [Choice::Wgpu; 3]);
        assert_eq!(choices("wgpu:1", 2), [Choice::WgpuDiscrete(1); 3]);
        assert_eq!(choices("wgpu:cpu", 2), [Choice::WgpuCpu; 3]);
        assert_eq!(choices("tch", 2), [Choice::LibTorch; 3]);
    }

    #[test]
    fn a_backends_message_is_cut_to_its_first_line() {
        assert_eq!(first_line("no driver"), "no driver");
        assert_eq!(first_line("no driver\nstack: 1\n2"), "no driver");
        let message = r#"called `Result::unwrap()` on an `Err` value: Torch("no driver\nframe\n")"#;
        assert_eq!(first_line(message), r#"Torch("no driver"#);
        let message = "called `Result::unwrap()` on an `Err` value: RecvError";
        assert!(first_line(message).ends_with("printed above"));
    }

    #[cfg(feature = "tch")]
    #[test]
    fn libtorch_computes_on_one_thread_in_every_worker() {
        select_device("tch").expect("a CPU backend works everywhere");
        if std::env::var_os("OMP_NUM_THREADS").is_none() {
            // LibTorch keeps the number for each thread.
            let worker = std::thread::spawn(tch::get_num_threads);
            assert_eq!(worker.join().expect("no panic"), 1);
        }
    }

    #[test]
    fn every_device_in_the_list_of_known_names_has_a_feature_of_the_table() {
        for name in KNOWN.split(", ") {
            let choice = Choice::parse(&name.replace('N', "0")).expect("a known name");
            assert!(
                BACKENDS
                    .iter()
                    .any(|(feature, _)| *feature == choice.feature())
            );
        }
    }
}
