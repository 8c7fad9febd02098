//! Reads the variables of all launchers. They are in one table with a row per launcher.
//!
//! The first row of which both rank and world size are set is used, and both are taken from that row: an
//! inner launcher inherits the variables of the outer one (mpirun inside Slurm), so numbers from two rows
//! do not belong together. A row of which only one is set is skipped, unless it is our own row.
//! [`env::RENDEZVOUS`] gives the address of rank 0 for every row.

use std::fs;
use std::str::FromStr;

use super::env;
use super::error::LaunchError;
use super::host_list::{first_host, first_line};
use super::rank::Place;
use super::rendezvous::{DEFAULT_PORT, Rendezvous, parse_port};

const MASTER_ADDR: &str = "MASTER_ADDR";
const MASTER_PORT: &str = "MASTER_PORT";
const USE_AGENT_STORE: &str = "TORCHELASTIC_USE_AGENT_STORE";
const STEP_HOSTS: &str = "SLURM_STEP_NODELIST";
const JOB_HOSTS: &str = "SLURM_JOB_NODELIST";
/// The files of hosts that a launcher may have been told of, in the order in which they are looked for.
const HOST_FILES: [&str; 3] = [
    "OMPI_MCA_orte_default_hostfile",
    "HYDRA_HOST_FILE",
    "PBS_NODEFILE",
];
pub(super) const JOB_ID: &str = "SLURM_JOB_ID";

/// The variables of one launcher.
struct Row {
    launcher: &'static str,
    rank: &'static str,
    world_size: &'static str,
    local_rank: Option<&'static str>,
    attempt: Option<&'static str>,
    address: AddressSource,
}

/// The variables that give the address of rank 0 if [`env::RENDEZVOUS`] is not set.
enum AddressSource {
    Nowhere,
    /// `MASTER_ADDR`. Without it, this machine's own address, if all copies run on this machine: then the
    /// variable holds the world size. Else the first host of Slurm's job or of a file of hosts: mpirun starts
    /// rank 0 there.
    Mpi {
        local_size: &'static str,
    },
    /// `MASTER_ADDR`. But with `TORCHELASTIC_USE_AGENT_STORE=True`, torchrun's own store has that port, and
    /// rank 0 takes the next one.
    Torchrun,
    /// The step's first host. `SLURM_LAUNCH_NODE_IPADDR` is not used: it is the host on which srun was typed.
    Slurm,
}

static ROWS: [Row; 6] = [
    Row {
        launcher: "ps",
        rank: env::RANK,
        world_size: env::WORLD_SIZE,
        local_rank: None,
        attempt: Some(env::ATTEMPT),
        address: AddressSource::Nowhere,
    },
    // Kubeflow and many scripts set the same variables.
    Row {
        launcher: "torchrun",
        rank: "RANK",
        world_size: "WORLD_SIZE",
        local_rank: Some("LOCAL_RANK"),
        attempt: Some("TORCHELASTIC_RESTART_COUNT"),
        address: AddressSource::Torchrun,
    },
    Row {
        launcher: "Open MPI",
        rank: "OMPI_COMM_WORLD_RANK",
        world_size: "OMPI_COMM_WORLD_SIZE",
        local_rank: Some("OMPI_COMM_WORLD_LOCAL_RANK"),
        attempt: None,
        address: AddressSource::Mpi {
            local_size: "OMPI_COMM_WORLD_LOCAL_SIZE",
        },
    },
    // MPICH, Intel MPI, `srun --mpi=pmi2`.
    Row {
        launcher: "PMI",
        rank: "PMI_RANK",
        world_size: "PMI_SIZE",
        local_rank: Some("MPI_LOCALRANKID"),
        attempt: None,
        address: AddressSource::Mpi {
            local_size: "MPI_LOCALNRANKS",
        },
    },
    // Only srun sets the number of the step's tasks, so a batch script without srun is alone.
    Row {
        launcher: "Slurm",
        rank: "SLURM_PROCID",
        world_size: "SLURM_STEP_NUM_TASKS",
        local_rank: Some("SLURM_LOCALID"),
        attempt: Some("SLURM_RESTART_COUNT"),
        address: AddressSource::Slurm,
    },
    Row {
        launcher: "Kubernetes",
        rank: "JOB_COMPLETION_INDEX",
        world_size: env::WORLD_SIZE,
        local_rank: None,
        attempt: None,
        address: AddressSource::Nowhere,
    },
];

/// All variables that decide the place of a process. `SLURM_JOB_ID` alone decides nothing.
pub(super) fn variables() -> impl Iterator<Item = &'static str> {
    let of_rows = ROWS
        .iter()
        .flat_map(|row| {
            let local_size = match row.address {
                AddressSource::Mpi { local_size } => Some(local_size),
                _ => None,
            };
            [
                Some(row.rank),
                Some(row.world_size),
                row.local_rank,
                row.attempt,
                local_size,
            ]
        })
        .flatten();
    of_rows
        .chain([
            env::LOCAL_RANK,
            env::RENDEZVOUS,
            MASTER_ADDR,
            MASTER_PORT,
            USE_AGENT_STORE,
            STEP_HOSTS,
            JOB_HOSTS,
        ])
        .chain(HOST_FILES)
}

/// The rank and the world size of one row, after checks.
pub(super) struct Seat {
    row: &'static Row,
    pub(super) rank: u32,
    pub(super) world_size: u32,
}

impl Seat {
    pub(super) fn launcher(&self) -> &'static str {
        self.row.launcher
    }
}

/// The environment.
pub(super) struct Variables<G> {
    /// From names to values.
    variable: G,
    /// From the path of a file of hosts to its text. `None` if it cannot be read here.
    file: fn(&str) -> Option<String>,
}

impl<G: Fn(&str) -> Option<String>> Variables<G> {
    pub(super) fn new(variable: G) -> Self {
        Self::with_files(variable, |path| fs::read_to_string(path).ok())
    }

    pub(super) fn with_files(variable: G, file: fn(&str) -> Option<String>) -> Self {
        Self { variable, file }
    }

    /// Returns the first complete row.
    pub(super) fn seat(&self) -> Result<Option<Seat>, LaunchError> {
        if self.get(env::RANK).is_some() && self.get(env::WORLD_SIZE).is_none() {
            return Err(LaunchError::Incomplete {
                given: env::RANK,
                missing: env::WORLD_SIZE,
            });
        }
        for row in &ROWS {
            if let Some(seat) = self.seat_of(row)? {
                return Ok(Some(seat));
            }
        }
        if self.get(env::WORLD_SIZE).is_some() {
            // The variable is set on purpose, so this process should not train alone. Most likely the Job
            // in Kubernetes is not an indexed one.
            return Err(LaunchError::Incomplete {
                given: env::WORLD_SIZE,
                missing: "PS_RANK (or JOB_COMPLETION_INDEX, by `completionMode: Indexed`)",
            });
        }
        Ok(None)
    }

    /// Reads the rest of the place, once its rank is known.
    pub(super) fn place(&self, seat: &Seat) -> Result<Place, LaunchError> {
        let row = seat.row;
        Ok(Place {
            rank: seat.rank,
            world_size: seat.world_size,
            attempt: self.attempt(row.attempt)?,
            rendezvous: self.rendezvous(seat)?,
            launcher: row.launcher,
        })
    }

    /// Like [`place`](Self::place), for an address that was given by a flag.
    pub(super) fn place_at(
        &self,
        seat: &Seat,
        rendezvous: Rendezvous,
    ) -> Result<Place, LaunchError> {
        Ok(Place {
            rank: seat.rank,
            world_size: seat.world_size,
            attempt: self.attempt(seat.row.attempt)?,
            rendezvous: Some(rendezvous),
            launcher: seat.launcher(),
        })
    }

    /// Returns how often this rank was started again, or 0 if no variable says so.
    pub(super) fn attempt(&self, variable: Option<&'static str>) -> Result<u64, LaunchError> {
        let Some(variable) = variable else {
            return Ok(0);
        };
        Ok(self.number(variable, u64::MAX)?.unwrap_or(0))
    }

    /// Returns this process's number among the copies on its host. 0 if no variable says so.
    pub(super) fn local_rank(&self) -> Result<u32, LaunchError> {
        let largest = u32::MAX.into();
        if let Some(local_rank) = self.number(env::LOCAL_RANK, largest)? {
            return Ok(local_rank);
        }
        let variable = self.seat()?.and_then(|seat| seat.row.local_rank);
        let number = variable.map(|variable| self.number(variable, largest));
        Ok(number.transpose()?.flatten().unwrap_or(0))
    }

    fn seat_of(&self, row: &'static Row) -> Result<Option<Seat>, LaunchError> {
        if self.get(row.rank).is_none() || self.get(row.world_size).is_none() {
            return Ok(None);
        }
        let largest = u32::MAX.into();
        let (rank, world_size) = (
            self.number(row.rank, largest)?.unwrap_or(0),
            self.number(row.world_size, largest)?.unwrap_or(0),
        );
        check_rank(row.launcher, row.world_size, rank, world_size)?;
        Ok(Some(Seat {
            row,
            rank,
            world_size,
        }))
    }

    fn rendezvous(&self, seat: &Seat) -> Result<Option<Rendezvous>, LaunchError> {
        if let Some(value) = self.get(env::RENDEZVOUS) {
            return Rendezvous::parse(env::RENDEZVOUS, &value).map(Some);
        }
        if seat.world_size == 1 {
            return Ok(None);
        }
        // Not only the row of the rank is read: `srun --mpi=pmi2`, a default on some systems, sets PMI's row,
        // which has no address, and Slurm's row, which has one. Rows with the same numbers describe the same
        // copies.
        for row in &ROWS {
            let is_same =
                |other: &Seat| (other.rank, other.world_size) == (seat.rank, seat.world_size);
            if matches!(self.seat_of(row), Ok(Some(other)) if is_same(&other))
                && let Some(found) = self.address(&row.address, seat.world_size)?
            {
                return Ok(Some(found));
            }
        }
        // Only now: MPI's copies may all run on one host of several.
        if matches!(seat.row.address, AddressSource::Mpi { .. })
            && let Some(found) = self.first_of_mpi()?
        {
            return Ok(Some(found));
        }
        Err(LaunchError::NoAddress {
            set_by: seat.launcher(),
            rank: seat.rank,
            world_size: seat.world_size,
            needed: match seat.row.address {
                AddressSource::Nowhere => "PS_RENDEZVOUS=host:port",
                AddressSource::Torchrun => {
                    "PS_RENDEZVOUS=host:port, or MASTER_ADDR and MASTER_PORT"
                }
                AddressSource::Mpi { .. } => {
                    "PS_RENDEZVOUS=host:port or MASTER_ADDR, and pass it on (Open MPI: mpirun -x NAME=VALUE, \
                     MPICH: mpirun -genv NAME VALUE)"
                }
                AddressSource::Slurm => {
                    "PS_RENDEZVOUS=host:port, or SLURM_STEP_NODELIST as srun does"
                }
            },
        })
    }

    fn address(
        &self,
        source: &AddressSource,
        world_size: u32,
    ) -> Result<Option<Rendezvous>, LaunchError> {
        match source {
            AddressSource::Nowhere => Ok(None),
            AddressSource::Mpi { local_size } => match self.master(0)? {
                None if self.number(local_size, u32::MAX.into())? == Some(world_size) => {
                    self.master_at(MASTER_ADDR, "127.0.0.1", 0).map(Some)
                }
                master => Ok(master),
            },
            AddressSource::Torchrun => {
                let is_taken = self
                    .get(USE_AGENT_STORE)
                    .is_some_and(|value| value.trim().eq_ignore_ascii_case("true"));
                self.master(u16::from(is_taken))
            }
            AddressSource::Slurm => self.slurm(STEP_HOSTS),
        }
    }

    /// Returns `MASTER_ADDR` with the port `MASTER_PORT` plus `offset`.
    fn master(&self, offset: u16) -> Result<Option<Rendezvous>, LaunchError> {
        let Some(host) = self.get(MASTER_ADDR) else {
            return Ok(None);
        };
        self.master_at(MASTER_ADDR, &host, offset).map(Some)
    }

    /// Joins a host from `variable` with that port.
    fn master_at(
        &self,
        variable: &'static str,
        host: &str,
        offset: u16,
    ) -> Result<Rendezvous, LaunchError> {
        let port = match self.get(MASTER_PORT) {
            Some(value) => parse_port(MASTER_PORT, &value)?,
            None => DEFAULT_PORT,
        };
        let port = port
            .checked_add(offset)
            .ok_or_else(|| LaunchError::BadPort {
                variable: MASTER_PORT,
                value: port.to_string(),
                problem: "torchrun's own store has it, and there is none after it for rank 0",
            })?;
        Rendezvous::new(variable, host, port)
    }

    /// Returns the first host of the step or job, and a port that two jobs on one host hardly ever share. Rank 0 runs
    /// on this host, unless srun or mpirun was told to place tasks in another way.
    fn slurm(&self, list: &'static str) -> Result<Option<Rendezvous>, LaunchError> {
        let Some(hosts) = self.get(list) else {
            return Ok(None);
        };
        let host = first_host(&hosts).map_err(|problem| LaunchError::BadHostList {
            variable: list,
            value: hosts.clone(),
            problem,
        })?;
        let Some(job) = self.number::<u64>(JOB_ID, u64::MAX)? else {
            return Err(LaunchError::Incomplete {
                given: list,
                missing: JOB_ID,
            });
        };
        let port = u16::try_from(20_000 + job % 10_000).expect("at most 29999");
        Rendezvous::new(list, &host, port).map(Some)
    }

    /// Returns the first host of Slurm's job, or of a file of hosts, if this machine has the file.
    fn first_of_mpi(&self) -> Result<Option<Rendezvous>, LaunchError> {
        if let Some(found) = self.slurm(JOB_HOSTS)? {
            return match self.get(MASTER_PORT) {
                Some(_) => self.master_at(JOB_HOSTS, found.host(), 0).map(Some),
                None => Ok(Some(found)),
            };
        }
        for variable in HOST_FILES {
            if let Some(path) = self.get(variable)
                && let Some(text) = (self.file)(path.trim())
                && let Some(host) = first_line(&text)
            {
                return self.master_at(variable, host, 0).map(Some);
            }
        }
        Ok(None)
    }

    fn number<T: FromStr>(
        &self,
        variable: &'static str,
        largest: u64,
    ) -> Result<Option<T>, LaunchError> {
        let Some(value) = self.get(variable) else {
            return Ok(None);
        };
        match value.trim().parse() {
            Ok(number) => Ok(Some(number)),
            Err(_) => Err(LaunchError::NotANumber {
                variable,
                value,
                largest,
            }),
        }
    }

    pub(super) fn get(&self, variable: &str) -> Option<String> {
        (self.variable)(variable).filter(|value| !value.trim().is_empty())
    }
}

/// Checks that the rank is below the world size.
pub(super) fn check_rank(
    set_by: &'static str,
    world_size_name: &'static str,
    rank: u32,
    world_size: u32,
) -> Result<(), LaunchError> {
    if world_size == 0 {
        return Err(LaunchError::NoProcesses {
            set_by: world_size_name,
        });
    }
    if rank >= world_size {
        return Err(LaunchError::RankOutOfRange {
            set_by,
            rank,
            world_size,
        });
    }
    Ok(())
}
