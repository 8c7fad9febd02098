//! What is compared: the works, who does them, what is measured, and what we want to reach.

use ps::prelude::{compiled_devices, default_device_name};

use crate::stats::Better::{self, Higher, Lower};

/// A work that all contenders do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Work {
    /// Two workers train `ConvNet` on batches of 128.
    Convnet,
    /// Two workers train `Net` on batches of 32.
    Net,
    /// One process calls another.
    Transfer,
}

/// Who does a work, and how it is started.
#[derive(Clone, Debug)]
pub(crate) struct Contender {
    pub(crate) name: String,
    pub(crate) what: String,
    pub(crate) program: Program,
    pub(crate) arguments: Vec<String>,
}

/// What is started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Program {
    /// A subcommand of this program.
    Ours(&'static str),
    /// A file in `rivals/`.
    Rival(&'static str),
}

impl Contender {
    pub(crate) fn is_ours(&self) -> bool {
        matches!(self.program, Program::Ours(_))
    }

    /// The name without the device.
    pub(crate) fn kind(&self) -> &str {
        self.name
            .split_once('@')
            .map_or(&self.name, |(kind, _)| kind)
    }

    /// The device of ours in training: `None` for calls, which compute nothing, and for rivals.
    pub(crate) fn device(&self) -> Option<&str> {
        self.name.split_once('@').map(|(_, device)| device)
    }
}

/// A number that runs of a work have.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Metric {
    pub(crate) key: &'static str,
    pub(crate) title: &'static str,
    pub(crate) better: Better,
    /// Whether a table of ratios is worth its place.
    pub(crate) has_ratios: bool,
}

const fn metric(key: &'static str, title: &'static str, better: Better, ratios: bool) -> Metric {
    Metric {
        key,
        title,
        better,
        has_ratios: ratios,
    }
}

const TRAINING: [Metric; 8] = [
    metric("gradients_per_second", "gradients/s", Higher, true),
    metric("startup_s", "start-up, s", Lower, true),
    metric("seconds_to_90", "s to 90 %", Lower, false),
    metric("seconds_to_95", "s to 95 %", Lower, true),
    metric("seconds_to_97", "s to 97 %", Lower, true),
    metric("gradients_to_95", "gradients to 95 %", Lower, false),
    metric("peak_mb", "peak memory, MB", Lower, true),
    metric("cpu_s_per_1000", "CPU s per 1,000", Lower, true),
];

const TRANSFER: [Metric; 11] = [
    metric("call_p50_ms", "empty call p50, ms", Lower, true),
    metric("call_p99_ms", "p99", Lower, false),
    metric("8kb_p50_ms", "8 KB p50, ms", Lower, true),
    metric("8kb_p99_ms", "p99", Lower, false),
    metric("4.8mb_p50_ms", "4.8 MB p50, ms", Lower, true),
    metric("4.8mb_p99_ms", "p99", Lower, false),
    metric("4.8mb_gb_per_s", "GB/s", Higher, false),
    metric("100mb_p50_ms", "100 MB p50, ms", Lower, true),
    metric("100mb_p99_ms", "p99", Lower, false),
    metric("100mb_gb_per_s", "GB/s", Higher, false),
    metric("peak_mb", "peak memory, MB", Lower, true),
];

/// What a run of a work must be able to show, so that nobody is fast at the wrong thing: the least
/// accuracy in percent. Transfers check the weights that come back themselves.
pub(crate) fn least_accuracy(work: Work, is_quick: bool) -> f64 {
    match (work, is_quick) {
        (Work::Convnet, false) => 70.0,
        // Some 50 gradients at least, on the sample of MNIST.
        (Work::Convnet, true) => 30.0,
        (Work::Net, false) => 30.0,
        // After a handful of steps there is nothing to see.
        (Work::Net, true) | (Work::Transfer, _) => f64::NEG_INFINITY,
    }
}

/// How long a work takes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lengths {
    pub(crate) is_quick: bool,
    pub(crate) seconds: f64,
    pub(crate) target: f64,
    pub(crate) max_seconds: f64,
}

impl Work {
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Convnet => "ConvNet, batch 128",
            Self::Net => "Net, batch 32",
            Self::Transfer => "Calls between two processes",
        }
    }

    pub(crate) fn metrics(self) -> &'static [Metric] {
        match self {
            Self::Convnet | Self::Net => &TRAINING,
            Self::Transfer => &TRANSFER,
        }
    }

    /// The same for all contenders.
    fn arguments(self, lengths: &Lengths) -> Vec<String> {
        let words = match self {
            Self::Convnet => format!(
                "--model convnet --batch-size 128 --learning-rate 0.1 --seconds {} --target {} --max-seconds {}",
                lengths.seconds, lengths.target, lengths.max_seconds
            ),
            // Seconds for a step or two are nothing here, and an evaluation costs as much as training.
            Self::Net if lengths.is_quick => {
                "--model net --batch-size 8 --learning-rate 0.05 --seconds 0.1 --num-test 100"
                    .to_owned()
            }
            Self::Net => format!(
                "--model net --batch-size 32 --learning-rate 0.05 --seconds {} --num-test 1000",
                2.0 * lengths.seconds
            ),
            Self::Transfer => format!("--seconds {}", lengths.seconds / 2.0),
        };
        words.split(' ').map(str::to_owned).collect()
    }

    pub(crate) fn contenders(self, lengths: &Lengths) -> Vec<Contender> {
        let mut contenders = self.ours();
        contenders.extend(self.rivals());
        // Its time is that of the arithmetic: who waits for whom shows with `ConvNet`.
        contenders.retain(|contender| self != Self::Net || !contender.name.contains("-async"));
        for contender in &mut contenders {
            let arguments = self.arguments(lengths);
            contender.arguments.splice(0..0, arguments);
        }
        contenders
    }

    fn ours(self) -> Vec<Contender> {
        if self == Self::Transfer {
            return vec![contender(
                "ps",
                "ps, `ask` and push-pull",
                Program::Ours("transfer"),
                "",
            )];
        }
        let mut all = Vec::new();
        for device in compiled_devices() {
            for (name, what, arguments) in [
                ("ps-sync", "one process, bsp", "--consistency bsp"),
                ("ps-async", "one process, asp", "--consistency asp"),
                (
                    "ps-processes-sync",
                    "three processes, bsp",
                    "--consistency bsp --processes 3",
                ),
                (
                    "ps-processes-async",
                    "three processes, asp",
                    "--consistency asp --processes 3",
                ),
                ("ps-single", "one worker", "--num-workers 1"),
                ("ps-remote", "model on the server, one trainer", ""),
            ] {
                // What the backend changes is the arithmetic: these would show the same again.
                let is_about_others =
                    matches!(name, "ps-async" | "ps-processes-async" | "ps-remote");
                if is_about_others && device != default_device_name() {
                    continue;
                }
                let part = match name {
                    "ps-remote" => "remote-forward",
                    _ => "train",
                };
                all.push(contender(
                    &format!("{name}@{device}"),
                    &format!("ps, {device}: {what}"),
                    Program::Ours(part),
                    &format!("--device {device} {arguments}"),
                ));
            }
        }
        all
    }

    fn rivals(self) -> Vec<Contender> {
        let rivals: &[(&str, &str, &'static str, &str)] = match self {
            Self::Transfer => &[
                ("ray", "Ray, NumPy arrays", "ray_transfer.py", ""),
                ("rpc", "PyTorch RPC, tensors", "rpc_transfer.py", ""),
            ],
            Self::Convnet | Self::Net => &[
                ("ray-sync", "Ray, sync", "ray_ps.py", "--mode sync"),
                ("ray-async", "Ray, async", "ray_ps.py", "--mode async"),
                (
                    "rpc-sync",
                    "PyTorch RPC push/pull, sync",
                    "rpc_push_pull.py",
                    "--mode sync",
                ),
                (
                    "rpc-async",
                    "PyTorch RPC push/pull, async",
                    "rpc_push_pull.py",
                    "--mode async",
                ),
                (
                    "rpc-remote",
                    "PyTorch RPC remote forward, one trainer",
                    "rpc_remote_forward.py",
                    "",
                ),
                ("ddp", "PyTorch DDP, gloo, no server", "ddp.py", ""),
                (
                    "torch-single",
                    "PyTorch, one process, no framework",
                    "torch_single.py",
                    "",
                ),
            ],
        };
        let rivals = rivals.iter();
        rivals
            .map(|(name, what, file, arguments)| {
                contender(name, what, Program::Rival(file), arguments)
            })
            .collect()
    }
}

fn contender(name: &str, what: &str, program: Program, arguments: &str) -> Contender {
    let arguments = arguments.split_whitespace().map(str::to_owned).collect();
    Contender {
        name: name.to_owned(),
        what: what.to_owned(),
        program,
        arguments,
    }
}

/// A ratio that we want to reach, on the default device. Our contender's name is without it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Target {
    pub(crate) work: Work,
    pub(crate) key: &'static str,
    pub(crate) ours: &'static str,
    pub(crate) rival: &'static str,
    pub(crate) at_least: f64,
}

const fn target(
    work: Work,
    key: &'static str,
    ours: &'static str,
    rival: &'static str,
    at_least: f64,
) -> Target {
    Target {
        work,
        key,
        ours,
        rival,
        at_least,
    }
}

const RATE: &str = "gradients_per_second";

/// Of `Net`: "at most 1.5 times slower".
const SLOWER: f64 = 1.0 / 1.5;

pub(crate) const TARGETS: [Target; 18] = [
    target(Work::Convnet, RATE, "ps-sync", "ray-sync", 5.0),
    target(Work::Convnet, RATE, "ps-async", "ray-async", 5.0),
    target(Work::Convnet, RATE, "ps-processes-sync", "ray-sync", 3.0),
    target(Work::Convnet, RATE, "ps-processes-async", "ray-async", 3.0),
    target(Work::Convnet, RATE, "ps-sync", "rpc-sync", 5.0),
    target(Work::Convnet, RATE, "ps-async", "rpc-async", 5.0),
    target(Work::Convnet, RATE, "ps-processes-sync", "rpc-sync", 5.0),
    target(Work::Convnet, RATE, "ps-processes-async", "rpc-async", 5.0),
    target(Work::Convnet, RATE, "ps-single", "torch-single", 1.0),
    target(Work::Convnet, RATE, "ps-remote", "rpc-remote", 1.0),
    target(Work::Convnet, "peak_mb", "ps-sync", "ray-sync", 5.0),
    target(Work::Net, RATE, "ps-sync", "ray-sync", SLOWER),
    target(Work::Net, RATE, "ps-sync", "rpc-sync", SLOWER),
    target(Work::Net, RATE, "ps-single", "torch-single", SLOWER),
    target(Work::Net, RATE, "ps-remote", "rpc-remote", SLOWER),
    target(Work::Net, "peak_mb", "ps-sync", "ray-sync", 5.0),
    target(Work::Transfer, "100mb_p50_ms", "ps", "ray", 3.0),
    target(Work::Transfer, "100mb_p50_ms", "ps", "rpc", 3.0),
];

/// Seconds to the first gradient in process.
pub(crate) const STARTUP_BELOW_S: f64 = 1.0;
