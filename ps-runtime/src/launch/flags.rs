//! The flags about the launch. They have priority over environment variables.

use super::env;
use super::error::LaunchError;
use super::launchers::{Variables, check_rank};
use super::rank::Place;
use super::rendezvous::{DEFAULT_PORT, Rendezvous, parse_port};

/// The flags about the launch. A program should give them these names on its command line:
/// `--rank`, `--world-size`, `--master-addr`, `--master-port`, `--run-id`, `--processes`.
///
/// By default no flag is set. Then environment variables decide. If there are none either, the process is
/// alone.
///
/// ```
/// use ps_runtime::launch::{Launch, LaunchOptions, resolve};
///
/// let no_variables = |_: &str| None;
/// let alone = LaunchOptions::default();
/// assert_eq!(resolve(&alone, no_variables)?, Launch::Alone);
///
/// let second_of_three = LaunchOptions {
///     rank: Some(1),
///     world_size: Some(3),
///     master_addr: Some("10.0.0.1".to_owned()),
///     ..LaunchOptions::default()
/// };
/// let Launch::Rank(place) = resolve(&second_of_three, no_variables)? else {
///     unreachable!("it was told its rank");
/// };
/// assert!(!place.is_driver());
/// let driver = place.rendezvous.expect("it was told the address");
/// assert_eq!(driver.to_string(), "10.0.0.1:29500");
/// # Ok::<(), ps_runtime::launch::LaunchError>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LaunchOptions {
    /// This copy's number, from 0. Needs `world_size`.
    pub rank: Option<u32>,
    /// How many copies there are. At least 1. Needs `rank`.
    pub world_size: Option<u32>,
    /// The host that rank 0 listens on. If `rank` is set, the default is 127.0.0.1. If `rank` is not set, this
    /// adds the host to the rank of a launcher that gives no address, such as mpirun.
    pub master_addr: Option<String>,
    /// The port that rank 0 listens on, from 1 to 65535. Default: [`DEFAULT_PORT`].
    pub master_port: Option<u16>,
    /// The id of this run. Nodes of another run are refused. Default: `PS_RUN_ID`.
    pub run_id: Option<String>,
    /// How many processes to run on this machine, including this one. At least 1.
    pub processes: Option<u32>,
}

impl LaunchOptions {
    /// The driver starts the other processes itself, on this machine. `processes` counts the driver, too; it is at
    /// least 1.
    ///
    /// ```
    /// use ps_runtime::launch::{Launch, LaunchOptions, resolve};
    ///
    /// let role = resolve(&LaunchOptions::processes(3), |_: &str| None)?;
    /// assert_eq!(role, Launch::StartProcesses { world_size: 3 });
    /// # Ok::<(), ps_runtime::launch::LaunchError>(())
    /// ```
    #[must_use]
    pub fn processes(processes: u32) -> Self {
        Self {
            processes: Some(processes),
            ..Self::default()
        }
    }
}

/// The role of this process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Launch {
    /// There are no other processes: everything runs in this process.
    Alone,
    /// This process is the driver and starts the others; see [`ProcessGroup`](super::ProcessGroup).
    StartProcesses {
        /// How many processes to run, including this one. At least 2.
        world_size: u32,
    },
    /// This process is one of several copies, or a single copy that was told where to listen.
    Rank(Place),
}

impl Launch {
    /// This process's rank. It is 0 unless the process is a node.
    pub fn rank(&self) -> u32 {
        match self {
            Self::Alone | Self::StartProcesses { .. } => 0,
            Self::Rank(place) => place.rank,
        }
    }

    /// How many processes there are, this one included.
    #[must_use]
    pub fn world_size(&self) -> u32 {
        match self {
            Self::Alone => 1,
            Self::StartProcesses { world_size } => *world_size,
            Self::Rank(place) => place.world_size,
        }
    }
}

/// Decides the role of this process from flags and environment variables.
///
/// Flags have priority: with `--rank` and `--world-size`, no variables of launchers are read except
/// `PS_ATTEMPT`. There is one exception. A child process of a [`ProcessGroup`](super::ProcessGroup) has the
/// driver's command line, so its variables have priority over flags.
///
/// # Errors
/// When flags are incomplete, when they contradict each other or a launcher, and in the cases of
/// [`from_env`](super::from_env).
pub fn resolve(
    options: &LaunchOptions,
    env: impl Fn(&str) -> Option<String>,
) -> Result<Launch, LaunchError> {
    let variables = Variables::new(env);
    if variables.get(env::PARENT_PID).is_some() {
        // The flags are ignored: with `--processes`, child processes would start child processes without
        // end.
        return from_variables(&LaunchOptions::default(), &variables);
    }
    if let Some(world_size) = options.processes {
        return start_processes(options, world_size, &variables);
    }
    match (options.rank, options.world_size) {
        (Some(rank), Some(world_size)) => from_flags(options, rank, world_size, &variables),
        (Some(_), None) => Err(LaunchError::Incomplete {
            given: "--rank",
            missing: "--world-size",
        }),
        (None, Some(_)) => Err(LaunchError::Incomplete {
            given: "--world-size",
            missing: "--rank",
        }),
        (None, None) => from_variables(options, &variables),
    }
}

fn start_processes(
    options: &LaunchOptions,
    world_size: u32,
    variables: &Variables<impl Fn(&str) -> Option<String>>,
) -> Result<Launch, LaunchError> {
    let others = [
        ("--rank", options.rank.is_some()),
        ("--world-size", options.world_size.is_some()),
        ("--master-addr", options.master_addr.is_some()),
        ("--master-port", options.master_port.is_some()),
    ];
    if let Some((other, _)) = others.into_iter().find(|(_, is_set)| *is_set) {
        return Err(LaunchError::Conflict { other });
    }
    // Otherwise each of the copies would be a driver of its own.
    if let Some(seat) = variables.seat()?
        && seat.world_size > 1
    {
        return Err(LaunchError::AlreadyLaunched {
            launcher: seat.launcher(),
            rank: seat.rank,
            world_size: seat.world_size,
        });
    }
    match world_size {
        0 => Err(LaunchError::NoProcesses {
            set_by: "--processes",
        }),
        1 => Ok(Launch::Alone),
        _ => Ok(Launch::StartProcesses { world_size }),
    }
}

fn from_flags(
    options: &LaunchOptions,
    rank: u32,
    world_size: u32,
    variables: &Variables<impl Fn(&str) -> Option<String>>,
) -> Result<Launch, LaunchError> {
    check_rank("flags", "--world-size", rank, world_size)?;
    let has_address = options.master_addr.is_some() || options.master_port.is_some();
    let rendezvous = if world_size > 1 || has_address {
        Some(address(options)?)
    } else {
        None
    };
    Ok(launch(Place {
        rank,
        world_size,
        attempt: variables.attempt(Some(env::ATTEMPT))?,
        rendezvous,
        launcher: "flags",
    }))
}

fn from_variables(
    options: &LaunchOptions,
    variables: &Variables<impl Fn(&str) -> Option<String>>,
) -> Result<Launch, LaunchError> {
    if options.master_port.is_some() && options.master_addr.is_none() {
        return Err(LaunchError::Incomplete {
            given: "--master-port",
            missing: "--master-addr, or --rank and --world-size,",
        });
    }
    match (variables.seat()?, &options.master_addr) {
        (Some(seat), None) => variables.place(&seat).map(launch),
        (Some(seat), Some(_)) => variables.place_at(&seat, address(options)?).map(launch),
        (None, None) => Ok(Launch::Alone),
        (None, Some(_)) => Err(LaunchError::Incomplete {
            given: "--master-addr",
            missing: "--rank and --world-size, or a launcher's variables,",
        }),
    }
}

fn launch(place: Place) -> Launch {
    if place.world_size == 1 && place.rendezvous.is_none() {
        Launch::Alone
    } else {
        Launch::Rank(place)
    }
}

fn address(options: &LaunchOptions) -> Result<Rendezvous, LaunchError> {
    let host = options.master_addr.as_deref().unwrap_or("127.0.0.1");
    let port = match options.master_port {
        Some(port) => parse_port("--master-port", &port.to_string())?,
        None => DEFAULT_PORT,
    };
    Rendezvous::new("--master-addr", host, port)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch::rank::tests::{in_words, value};

    /// `flags` and `variables` in words; a place as `launcher rank/world#attempt@address`.
    #[track_caller]
    fn check(flags: &str, variables: &str, expected: Result<&str, &str>) {
        let number = |name| value(flags, name).map(|text| text.parse().unwrap());
        let options = LaunchOptions {
            rank: number("rank"),
            world_size: number("world-size"),
            master_addr: value(flags, "master-addr"),
            master_port: number("master-port").map(|port| u16::try_from(port).unwrap()),
            run_id: None,
            processes: number("processes"),
        };
        let found = match resolve(&options, |name| value(variables, name)) {
            Ok(Launch::Alone) => Ok("alone".to_owned()),
            Ok(Launch::StartProcesses { world_size }) => Ok(format!("start {world_size}")),
            Ok(Launch::Rank(place)) => Ok(in_words(&place)),
            Err(error) => Err(error.to_string()),
        };
        match (&found, expected) {
            (Ok(launch), Ok(expected)) => assert_eq!(launch, expected),
            (Err(error), Err(part)) => {
                assert!(error.contains(part), "{error:?} does not say {part:?}")
            }
            _ => panic!("{flags} and {variables} give {found:?}, expected {expected:?}"),
        }
    }

    const TORCHRUN: &str = "RANK=1 WORLD_SIZE=2 MASTER_ADDR=gpu1 MASTER_PORT=4000";

    #[test]
    fn without_flags_variables_decide() {
        check("", "", Ok("alone"));
        check("", TORCHRUN, Ok("torchrun 1/2#0@gpu1:4000"));
        check("", "RANK=0 WORLD_SIZE=1 MASTER_ADDR=gpu1", Ok("alone"));
        check(
            "",
            "PS_RANK=0 PS_WORLD_SIZE=1 PS_RENDEZVOUS=a:1",
            Ok("ps 0/1#0@a:1"),
        );
        check("", "PS_RANK=0", Err("PS_WORLD_SIZE is not"));
    }

    #[test]
    fn flags_win_over_variables() {
        check(
            "rank=0 world-size=3",
            TORCHRUN,
            Ok("flags 0/3#0@127.0.0.1:29500"),
        );
        check(
            "rank=2 world-size=3",
            "RANK=x WORLD_SIZE=2",
            Ok("flags 2/3#0@127.0.0.1:29500"),
        );
        check(
            "rank=2 world-size=3 master-addr=gpu7 master-port=4001",
            "PS_ATTEMPT=6",
            Ok("flags 2/3#6@gpu7:4001"),
        );
        check("rank=0 world-size=1", TORCHRUN, Ok("alone"));
        check(
            "rank=0 world-size=1 master-port=7",
            "",
            Ok("flags 0/1#0@127.0.0.1:7"),
        );
        check("processes=4", "", Ok("start 4"));
        check("processes=4", "RANK=0 WORLD_SIZE=1", Ok("start 4"));
        check("processes=1", "", Ok("alone"));
    }

    #[test]
    fn an_address_can_complete_what_a_launcher_says() {
        let mpirun = "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2";
        check("", mpirun, Err("MASTER_ADDR"));
        check("master-addr=gpu1", mpirun, Ok("Open MPI 1/2#0@gpu1:29500"));
        check(
            "master-addr=gpu2 master-port=1",
            TORCHRUN,
            Ok("torchrun 1/2#0@gpu2:1"),
        );
    }

    #[test]
    fn incomplete_flags_are_refused() {
        check(
            "rank=1",
            TORCHRUN,
            Err("--rank is set but --world-size is not"),
        );
        check(
            "world-size=2",
            TORCHRUN,
            Err("--world-size is set but --rank is not"),
        );
        check(
            "master-port=1",
            TORCHRUN,
            Err("--master-port is set but --master-addr"),
        );
        check(
            "master-addr=a",
            "",
            Err("--master-addr is set but --rank and"),
        );
        check("rank=2 world-size=2", "", Err("flags: rank 2 of 2"));
        check("rank=0 world-size=0", "", Err("--world-size is 0"));
        check(
            "rank=0 world-size=2 master-port=0",
            "",
            Err("--master-port=\"0\" is no port"),
        );
        check(
            "rank=0 world-size=2 master-addr=a:1",
            "",
            Err("only the host"),
        );
    }

    #[test]
    fn starting_processes_goes_with_no_other_flag_and_no_launcher() {
        check("processes=2 rank=0", "", Err("leave out --rank"));
        check(
            "processes=2 world-size=2",
            "",
            Err("leave out --world-size"),
        );
        check(
            "processes=2 master-addr=a",
            "",
            Err("leave out --master-addr"),
        );
        check(
            "processes=2 master-port=1",
            "",
            Err("leave out --master-port"),
        );
        check("processes=0", "", Err("--processes is 0"));
        check(
            "processes=2",
            TORCHRUN,
            Err("torchrun has already started this one as rank 1 of 2"),
        );
        // Even where the launcher gives no address.
        check(
            "processes=2",
            "PMI_RANK=0 PMI_SIZE=2",
            Err("PMI has already"),
        );
    }

    #[test]
    fn a_copy_starts_no_copies_although_its_command_line_says_so() {
        check(
            "processes=4",
            "PS_PARENT_PID=7 PS_RANK=3 PS_WORLD_SIZE=4 PS_ATTEMPT=1 PS_RENDEZVOUS=127.0.0.1:9",
            Ok("ps 3/4#1@127.0.0.1:9"),
        );
    }
}
