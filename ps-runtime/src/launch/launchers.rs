//! The variables of all launchers, as one table, and how they are read.
//!
//! The first row of which both rank and world size are set wins, and both are taken from that one
//! row: an inner launcher inherits the outer one's variables (mpirun inside of Slurm), so numbers
//! from two rows do not belong together. Half a row is left aside, unless it is ours.
//! [`env::RENDEZVOUS`] says where rank 0 listens whatever the row.

use std::str::FromStr;

use super::env;
use super::error::LaunchError;
use super::host_list::first_host;
use super::rank::Place;
use super::rendezvous::{DEFAULT_PORT, Rendezvous, parse_port};

const MASTER_ADDR: &str = "MASTER_ADDR";
const MASTER_PORT: &str = "MASTER_PORT";
const USE_AGENT_STORE: &str = "TORCHELASTIC_USE_AGENT_STORE";
const STEP_HOSTS: &str = "SLURM_STEP_NODELIST";
pub(super) const JOB_ID: &str = "SLURM_JOB_ID";

/// The variables of one launcher.
struct Row {
    launcher: &'static str,
    rank: &'static str,
    world_size: &'static str,
    attempt: Option<&'static str>,
    address: AddressSource,
}

/// Where a launcher says, beside [`env::RENDEZVOUS`], where rank 0 listens.
enum AddressSource {
    Nowhere,
    Master,
    /// As `Master`; but with `TORCHELASTIC_USE_AGENT_STORE=True` torchrun's own store has that
    /// port, and rank 0 takes the next.
    Torchrun,
    /// The step's first host. Not `SLURM_LAUNCH_NODE_IPADDR`: that is where srun was typed.
    Slurm,
}

static ROWS: [Row; 6] = [
    Row {
        launcher: "ps",
        rank: env::RANK,
        world_size: env::WORLD_SIZE,
        attempt: Some(env::ATTEMPT),
        address: AddressSource::Nowhere,
    },
    // Kubeflow and many scripts set the same.
    Row {
        launcher: "torchrun",
        rank: "RANK",
        world_size: "WORLD_SIZE",
        attempt: Some("TORCHELASTIC_RESTART_COUNT"),
        address: AddressSource::Torchrun,
    },
    Row {
        launcher: "Open MPI",
        rank: "OMPI_COMM_WORLD_RANK",
        world_size: "OMPI_COMM_WORLD_SIZE",
        attempt: None,
        address: AddressSource::Master,
    },
    // MPICH, Intel MPI, `srun --mpi=pmi2`.
    Row {
        launcher: "PMI",
        rank: "PMI_RANK",
        world_size: "PMI_SIZE",
        attempt: None,
        address: AddressSource::Master,
    },
    // Only srun sets the number of the step's tasks: a bare batch script is alone.
    Row {
        launcher: "Slurm",
        rank: "SLURM_PROCID",
        world_size: "SLURM_STEP_NUM_TASKS",
        attempt: Some("SLURM_RESTART_COUNT"),
        address: AddressSource::Slurm,
    },
    Row {
        launcher: "Kubernetes",
        rank: "JOB_COMPLETION_INDEX",
        world_size: env::WORLD_SIZE,
        attempt: None,
        address: AddressSource::Nowhere,
    },
];

/// All variables that decide about a place; `SLURM_JOB_ID` alone decides nothing.
pub(super) fn variables() -> impl Iterator<Item = &'static str> {
    let of_rows = ROWS
        .iter()
        .flat_map(|row| [Some(row.rank), Some(row.world_size), row.attempt])
        .flatten();
    of_rows.chain([
        env::RENDEZVOUS,
        MASTER_ADDR,
        MASTER_PORT,
        USE_AGENT_STORE,
        STEP_HOSTS,
    ])
}

/// A rank and a world size of one row, checked.
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

/// The environment, as a function from names to values.
pub(super) struct Variables<G>(pub(super) G);

impl<G: Fn(&str) -> Option<String>> Variables<G> {
    /// The first complete row.
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
            // Set on purpose, so this process should not train alone: most likely the Job in
            // Kubernetes is not an indexed one.
            return Err(LaunchError::Incomplete {
                given: env::WORLD_SIZE,
                missing: "PS_RANK (or JOB_COMPLETION_INDEX, by `completionMode: Indexed`)",
            });
        }
        Ok(None)
    }

    /// Everything else about the place, once its rank is known.
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

    /// As [`place`](Self::place), when a flag says where rank 0 listens.
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

    /// How often this rank was started again; 0 if nobody says.
    pub(super) fn attempt(&self, variable: Option<&'static str>) -> Result<u64, LaunchError> {
        let Some(variable) = variable else {
            return Ok(0);
        };
        Ok(self.number(variable, u64::MAX)?.unwrap_or(0))
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
        // Not only the row of the rank: `srun --mpi=pmi2`, a default in places, sets PMI's row, which
        // has no address, and Slurm's, which has. Rows with the same numbers tell of the same copies.
        for row in &ROWS {
            let is_same =
                |other: &Seat| (other.rank, other.world_size) == (seat.rank, seat.world_size);
            if matches!(self.seat_of(row), Ok(Some(other)) if is_same(&other))
                && let Some(found) = self.address(&row.address)?
            {
                return Ok(Some(found));
            }
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
                AddressSource::Master => {
                    "PS_RENDEZVOUS=host:port, or MASTER_ADDR, and pass it on (mpirun -x, -genv)"
                }
                AddressSource::Slurm => {
                    "PS_RENDEZVOUS=host:port, or SLURM_STEP_NODELIST as srun does"
                }
            },
        })
    }

    fn address(&self, source: &AddressSource) -> Result<Option<Rendezvous>, LaunchError> {
        match source {
            AddressSource::Nowhere => Ok(None),
            AddressSource::Master => self.master(0),
            AddressSource::Torchrun => {
                let is_taken = self
                    .get(USE_AGENT_STORE)
                    .is_some_and(|value| value.trim().eq_ignore_ascii_case("true"));
                self.master(u16::from(is_taken))
            }
            AddressSource::Slurm => self.slurm(),
        }
    }

    /// `MASTER_ADDR`, and the port that comes `offset` after `MASTER_PORT`.
    fn master(&self, offset: u16) -> Result<Option<Rendezvous>, LaunchError> {
        let Some(host) = self.get(MASTER_ADDR) else {
            return Ok(None);
        };
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
        Rendezvous::new(MASTER_ADDR, &host, port).map(Some)
    }

    /// The step's first host, where rank 0 runs unless srun was told to place tasks otherwise, and
    /// a port that two jobs on one host hardly share.
    fn slurm(&self) -> Result<Option<Rendezvous>, LaunchError> {
        let Some(hosts) = self.get(STEP_HOSTS) else {
            return Ok(None);
        };
        let host = first_host(&hosts).map_err(|problem| LaunchError::BadHostList {
            variable: STEP_HOSTS,
            value: hosts.clone(),
            problem,
        })?;
        let Some(job) = self.number::<u64>(JOB_ID, u64::MAX)? else {
            return Err(LaunchError::Incomplete {
                given: STEP_HOSTS,
                missing: JOB_ID,
            });
        };
        let port = u16::try_from(20_000 + job % 10_000).expect("at most 29999");
        Rendezvous::new(STEP_HOSTS, &host, port).map(Some)
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
        (self.0)(variable).filter(|value| !value.trim().is_empty())
    }
}

/// Checks that the rank is one of the world's.
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
