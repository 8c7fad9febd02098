//! The place of this process among the N copies of the program.

use super::error::LaunchError;
use super::launchers::Variables;
use super::rendezvous::Rendezvous;

/// The place of this process among the N copies of a program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// This copy's number, from 0 to `world_size - 1`. Rank 0 is the driver.
    pub rank: u32,
    /// How many copies there are. At least 1.
    pub world_size: u32,
    /// How often this rank has been started again, as the launcher says. 0 if it says nothing.
    pub attempt: u64,
    /// The address that rank 0 listens on. It is `None` only if `world_size` is 1.
    pub rendezvous: Option<Rendezvous>,
    /// The source of the rank, for messages: "torchrun", "Slurm", "flags", ….
    pub launcher: &'static str,
}

impl Place {
    /// Whether this is rank 0.
    pub fn is_driver(&self) -> bool {
        self.rank == 0
    }
}

/// Returns the beginning of the log lines of a rank: "driver 0", or "node 2".
pub fn log_prefix(rank: u32) -> String {
    let role = if rank == 0 { "driver" } else { "node" };
    format!("{role} {rank}")
}

/// Reads this process's place from a launcher's variables. Returns `None` if no launcher set any.
///
/// It looks for our own variables, then for those of torchrun, Open MPI, PMI (MPICH, Intel MPI), Slurm and
/// Kubernetes, in this order. The first set of variables that has both a rank and a world size is used.
///
/// `get` is [`env::read`](super::env::read); a test can pass a function of its own. An empty variable counts
/// as not set. An address is needed only if there are several copies. A single copy that a launcher started
/// is alone, unless [`env::RENDEZVOUS`](super::env::RENDEZVOUS) says where it should listen.
///
/// ```
/// use ps_runtime::launch::from_env;
///
/// let torchrun = |name: &str| match name {
///     "RANK" => Some("2".to_owned()),
///     "WORLD_SIZE" => Some("4".to_owned()),
///     "MASTER_ADDR" => Some("gpu003".to_owned()),
///     "MASTER_PORT" => Some("29400".to_owned()),
///     _ => None,
/// };
/// let place = from_env(torchrun)?.expect("both RANK and WORLD_SIZE are set");
/// assert_eq!((place.rank, place.world_size), (2, 4));
/// assert_eq!(place.rendezvous.unwrap().to_string(), "gpu003:29400");
/// # Ok::<(), ps_runtime::launch::LaunchError>(())
/// ```
///
/// # Errors
/// When the variables contradict each other, when a value is not a number, or when the address of rank 0 is
/// missing. The error names the variable to set.
pub fn from_env(get: impl Fn(&str) -> Option<String>) -> Result<Option<Place>, LaunchError> {
    let variables = Variables::new(get);
    match variables.seat()? {
        Some(seat) => variables.place(&seat).map(Some),
        None => Ok(None),
    }
}

/// Reads this process's number among the copies on its host, from 0: `PS_LOCAL_RANK`, or the variable of the
/// launcher that gave the rank. 0 if none of them says so, as under Kubernetes and Ray, where a process sees
/// only its own GPUs. Child processes of a [`ProcessGroup`](super::ProcessGroup) have their rank.
///
/// ```
/// use ps_runtime::launch::local_rank;
///
/// let second_host_of_two = |name: &str| match name {
///     "RANK" => Some("3".to_owned()),
///     "WORLD_SIZE" => Some("4".to_owned()),
///     "LOCAL_RANK" => Some("1".to_owned()),
///     _ => None,
/// };
/// assert_eq!(local_rank(second_host_of_two)?, 1);
/// # Ok::<(), ps_runtime::launch::LaunchError>(())
/// ```
///
/// # Errors
/// When the value is not a number, or when the launcher's variables contradict each other.
pub fn local_rank(get: impl Fn(&str) -> Option<String>) -> Result<u32, LaunchError> {
    Variables::new(get).local_rank()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::launch::launchers::{JOB_ID, variables};
    use proptest::prelude::*;

    /// The value of a name in `NAME=value` words.
    pub(in crate::launch) fn value(words: &str, name: &str) -> Option<String> {
        let mut pairs = words
            .split_whitespace()
            .filter_map(|word| word.split_once('='));
        let found = pairs.find(|(known, _)| *known == name);
        found.map(|(_, value)| value.to_owned())
    }

    /// A place as `launcher rank/world#attempt@address`.
    pub(in crate::launch) fn in_words(place: &Place) -> String {
        let Place {
            rank,
            world_size,
            attempt,
            rendezvous,
            launcher,
        } = place;
        let address = rendezvous.as_ref();
        let address = address.map_or("nowhere".to_owned(), ToString::to_string);
        format!("{launcher} {rank}/{world_size}#{attempt}@{address}")
    }

    /// `variables` as `NAME=value` in words; the place as `launcher rank/world#attempt@address`.
    #[track_caller]
    fn check(variables: &str, expected: Result<&str, &str>) {
        let found = match from_env(|name| value(variables, name)) {
            Ok(None) => Ok("alone".to_owned()),
            Ok(Some(place)) => Ok(in_words(&place)),
            Err(error) => Err(error.to_string()),
        };
        match (&found, expected) {
            (Ok(place), Ok(expected)) => assert_eq!(place, expected, "for {variables}"),
            (Err(error), Err(part)) => {
                assert!(error.contains(part), "{error:?} does not say {part:?}")
            }
            _ => panic!("{variables} gives {found:?}, expected {expected:?}"),
        }
    }

    #[test]
    fn the_launcher_that_gives_the_rank_gives_the_local_rank() {
        for (variables, expected) in [
            ("", 0),
            ("PS_LOCAL_RANK=2", 2),
            ("PS_RANK=3 PS_WORLD_SIZE=4", 0),
            ("PS_RANK=3 PS_WORLD_SIZE=4 PS_LOCAL_RANK=1", 1),
            // Ray inside Slurm: the number is that of the outer launcher.
            (
                "PS_RANK=3 PS_WORLD_SIZE=4 SLURM_PROCID=1 SLURM_STEP_NUM_TASKS=2 SLURM_LOCALID=1",
                0,
            ),
            ("RANK=3 WORLD_SIZE=4 LOCAL_RANK=1", 1),
            (
                "OMPI_COMM_WORLD_RANK=3 OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_RANK=1",
                1,
            ),
            ("PMI_RANK=3 PMI_SIZE=4 MPI_LOCALRANKID=1", 1),
            ("PMI_RANK=3 PMI_SIZE=4", 0),
            ("SLURM_PROCID=3 SLURM_STEP_NUM_TASKS=4 SLURM_LOCALID=1", 1),
            // srun has started no step, so this process is alone.
            ("SLURM_LOCALID=1", 0),
            ("JOB_COMPLETION_INDEX=1 PS_WORLD_SIZE=2", 0),
        ] {
            let found = local_rank(|name| value(variables, name));
            assert_eq!(found.unwrap(), expected, "for {variables}");
        }
        let error = local_rank(|name| value("PS_LOCAL_RANK=first", name)).unwrap_err();
        assert!(error.to_string().contains("PS_LOCAL_RANK"), "{error}");
    }

    const SRUN: &str = "SLURM_PROCID=3 SLURM_STEP_NUM_TASKS=4 SLURM_STEP_NODELIST=gpu[003-007,9],x1 SLURM_JOB_ID=123456";

    #[test]
    fn each_launcher_gives_a_place() {
        check("", Ok("alone"));
        check(
            "PS_RANK=1 PS_WORLD_SIZE=3 PS_ATTEMPT=7 PS_RENDEZVOUS=gpu1:4000",
            Ok("ps 1/3#7@gpu1:4000"),
        );
        check(
            "RANK=0 WORLD_SIZE=2 TORCHELASTIC_RESTART_COUNT=5 MASTER_ADDR=gpu1 MASTER_PORT=4000",
            Ok("torchrun 0/2#5@gpu1:4000"),
        );
        check(
            "RANK=1 WORLD_SIZE=2 MASTER_ADDR=::1",
            Ok("torchrun 1/2#0@[::1]:29500"),
        );
        check(
            "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2 MASTER_ADDR=gpu1",
            Ok("Open MPI 1/2#0@gpu1:29500"),
        );
        check(
            "PMI_RANK=1 PMI_SIZE=2 MASTER_ADDR=gpu1 MASTER_PORT=4000",
            Ok("PMI 1/2#0@gpu1:4000"),
        );
        check(
            &format!("{SRUN} SLURM_RESTART_COUNT=2"),
            Ok("Slurm 3/4#2@gpu003:23456"),
        );
        check(
            "JOB_COMPLETION_INDEX=1 PS_WORLD_SIZE=2 PS_RENDEZVOUS=train-0.train:29500",
            Ok("Kubernetes 1/2#0@train-0.train:29500"),
        );
    }

    #[test]
    fn mpi_needs_no_address_on_one_machine() {
        let mpirun = "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=3 OMPI_COMM_WORLD_LOCAL_SIZE";
        check(&format!("{mpirun}=3"), Ok("Open MPI 1/3#0@127.0.0.1:29500"));
        check(
            &format!("{mpirun}=3 MASTER_PORT=4000"),
            Ok("Open MPI 1/3#0@127.0.0.1:4000"),
        );
        check(
            &format!("{mpirun}=3 MASTER_ADDR=gpu1"),
            Ok("Open MPI 1/3#0@gpu1:29500"),
        );
        check(&format!("{mpirun}=2"), Err("mpirun -x NAME=VALUE"));
        let mpich = "PMI_RANK=1 PMI_SIZE=3 MPI_LOCALNRANKS";
        check(&format!("{mpich}=3"), Ok("PMI 1/3#0@127.0.0.1:29500"));
        check(&format!("{mpich}=1"), Err("mpirun -genv NAME VALUE"));
    }

    #[test]
    fn mpi_in_a_job_of_slurm_needs_no_address() {
        let job = "SLURM_JOB_NODELIST=gpu[003-007,9],x1 SLURM_JOB_ID=123456";
        let mpirun = "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=3 OMPI_COMM_WORLD_LOCAL_SIZE";
        check(
            &format!("{mpirun}=2 {job}"),
            Ok("Open MPI 1/3#0@gpu003:23456"),
        );
        // mpirun starts its helpers on the other hosts by srun.
        check(
            &format!("{SRUN} {mpirun}=2 {job}"),
            Ok("Open MPI 1/3#0@gpu003:23456"),
        );
        check(
            &format!("PMI_RANK=1 PMI_SIZE=3 MPI_LOCALNRANKS=1 {job}"),
            Ok("PMI 1/3#0@gpu003:23456"),
        );
        // A second training in the same job.
        check(
            &format!("{mpirun}=2 {job} MASTER_PORT=4000"),
            Ok("Open MPI 1/3#0@gpu003:4000"),
        );
        check(
            &format!("{mpirun}=2 {job} MASTER_ADDR=x1"),
            Ok("Open MPI 1/3#0@x1:29500"),
        );
        check(
            &format!("{mpirun}=3 {job}"),
            Ok("Open MPI 1/3#0@127.0.0.1:29500"),
        );
        check(
            &format!("{mpirun}=2 SLURM_JOB_NODELIST=n1"),
            Err("SLURM_JOB_ID is not"),
        );
        // Other launchers say themselves where rank 0 is.
        check(&format!("RANK=1 WORLD_SIZE=3 {job}"), Err("MASTER_ADDR"));
    }

    #[test]
    fn mpi_with_a_file_of_hosts_needs_no_address() {
        #[track_caller]
        fn check(variables: &str, expected: Option<&str>) {
            let file = |path: &str| (path == "/hosts").then(|| "# ours\ngpu3:4\n".to_owned());
            let variables = Variables::with_files(|name| value(variables, name), file);
            let seat = variables.seat().unwrap().unwrap();
            let found = variables.place(&seat).map(|place| in_words(&place));
            assert_eq!(found.ok().as_deref(), expected);
        }
        let open_mpi = "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=3";
        let mpich = "PMI_RANK=1 PMI_SIZE=3";
        let [on_open_mpi, on_mpich] = [
            Some("Open MPI 1/3#0@gpu3:29500"),
            Some("PMI 1/3#0@gpu3:29500"),
        ];
        check(
            &format!("{open_mpi} OMPI_MCA_orte_default_hostfile=/hosts"),
            on_open_mpi,
        );
        check(&format!("{mpich} HYDRA_HOST_FILE=/hosts"), on_mpich);
        check(&format!("{mpich} PBS_NODEFILE=/hosts"), on_mpich);
        check(
            &format!("{mpich} PBS_NODEFILE=/hosts MASTER_PORT=7"),
            Some("PMI 1/3#0@gpu3:7"),
        );
        // It is not on this machine.
        check(&format!("{mpich} PBS_NODEFILE=/elsewhere"), None);
        check("RANK=1 WORLD_SIZE=3 PBS_NODEFILE=/hosts", None);
    }

    #[test]
    fn torchruns_own_store_keeps_its_port() {
        let torchrun = "RANK=0 WORLD_SIZE=2 MASTER_ADDR=gpu1 TORCHELASTIC_USE_AGENT_STORE";
        check(
            &format!("{torchrun}=True MASTER_PORT=4000"),
            Ok("torchrun 0/2#0@gpu1:4001"),
        );
        check(
            &format!("{torchrun}=False MASTER_PORT=4000"),
            Ok("torchrun 0/2#0@gpu1:4000"),
        );
        check(
            &format!("{torchrun}=True MASTER_PORT=65535"),
            Err("there is none after it"),
        );
    }

    #[test]
    fn the_first_complete_row_wins_and_half_a_row_does_not_count() {
        // mpirun inside of Slurm, and an outer torchrun's leftovers.
        check(
            &format!("{SRUN} OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=2 MASTER_ADDR=n1 RANK=9"),
            Ok("Open MPI 0/2#0@n1:29500"),
        );
        check("RANK=1", Ok("alone"));
        check("WORLD_SIZE=2", Ok("alone"));
        check("JOB_COMPLETION_INDEX=1", Ok("alone"));
        // A bare batch script.
        check("SLURM_PROCID=0 SLURM_NTASKS=4 SLURM_JOB_ID=1", Ok("alone"));
        check("RANK= WORLD_SIZE=", Ok("alone"));
        check(
            "PS_RANK=1 PS_WORLD_SIZE=3 PS_RENDEZVOUS=a:1 RANK=0 WORLD_SIZE=2 MASTER_ADDR=b",
            Ok("ps 1/3#0@a:1"),
        );
    }

    #[test]
    fn half_a_row_of_ours_is_a_mistake() {
        check("PS_RANK=1", Err("PS_RANK is set but PS_WORLD_SIZE is not"));
        check(
            "PS_RANK=1 RANK=0 WORLD_SIZE=1",
            Err("PS_RANK is set but PS_WORLD_SIZE is not"),
        );
        check("PS_WORLD_SIZE=4", Err("completionMode: Indexed"));
    }

    #[test]
    fn our_address_wins_over_the_launchers() {
        check(
            &format!("{SRUN} PS_RENDEZVOUS=ib0:1"),
            Ok("Slurm 3/4#0@ib0:1"),
        );
        check(
            "RANK=0 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1 PS_RENDEZVOUS=b:2",
            Ok("torchrun 0/2#0@b:2"),
        );
    }

    #[test]
    fn a_row_that_agrees_lends_its_address() {
        check(
            &format!("{SRUN} PMI_RANK=3 PMI_SIZE=4"),
            Ok("PMI 3/4#0@gpu003:23456"),
        );
        check(&format!("{SRUN} PMI_RANK=1 PMI_SIZE=4"), Err("MASTER_ADDR"));
    }

    #[test]
    fn one_copy_needs_no_address() {
        check(
            "RANK=0 WORLD_SIZE=1 MASTER_ADDR=a",
            Ok("torchrun 0/1#0@nowhere"),
        );
        check("PS_RANK=0 PS_WORLD_SIZE=1", Ok("ps 0/1#0@nowhere"));
        check(
            "PS_RANK=0 PS_WORLD_SIZE=1 PS_RENDEZVOUS=a:1",
            Ok("ps 0/1#0@a:1"),
        );
    }

    #[test]
    fn mistakes_say_what_to_change() {
        check(
            "PS_RANK=one PS_WORLD_SIZE=2",
            Err(r#"PS_RANK="one" is not a whole number from 0 to 4294967295"#),
        );
        check("RANK=-1 WORLD_SIZE=2", Err("RANK=\"-1\" is not"));
        check(
            "RANK=0 WORLD_SIZE=4294967296",
            Err("WORLD_SIZE=\"4294967296\" is not"),
        );
        check(
            "RANK=2 WORLD_SIZE=2",
            Err("torchrun: rank 2 of 2: ranks count from 0, so the last is 1"),
        );
        check("RANK=0 WORLD_SIZE=0", Err("WORLD_SIZE is 0"));
        check(
            "PS_RANK=0 PS_WORLD_SIZE=2",
            Err("set PS_RENDEZVOUS=host:port"),
        );
        check("RANK=0 WORLD_SIZE=2", Err("or MASTER_ADDR and MASTER_PORT"));
        check(
            "OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=2",
            Err("mpirun -x"),
        );
        check(
            "JOB_COMPLETION_INDEX=0 PS_WORLD_SIZE=2",
            Err("set PS_RENDEZVOUS=host:port"),
        );
        check(
            "SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=2",
            Err("SLURM_STEP_NODELIST"),
        );
        check(
            "RANK=0 WORLD_SIZE=2 MASTER_ADDR=a:1",
            Err("here is only the host"),
        );
        check(
            "RANK=0 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=0",
            Err("MASTER_PORT=\"0\" is no port"),
        );
        check(
            "PS_RANK=0 PS_WORLD_SIZE=2 PS_RENDEZVOUS=a",
            Err("PS_RENDEZVOUS=\"a\" is no address"),
        );
        check(
            "PS_RANK=0 PS_WORLD_SIZE=2 PS_ATTEMPT=x PS_RENDEZVOUS=a:1",
            Err("PS_ATTEMPT=\"x\" is not"),
        );
        let srun = "SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NODELIST";
        check(
            &format!("{srun}=n[1 SLURM_JOB_ID=1"),
            Err("a bracket is not closed"),
        );
        check(&format!("{srun}=n1"), Err("SLURM_JOB_ID is not"));
        check(
            &format!("{srun}=n1 SLURM_JOB_ID=x"),
            Err("SLURM_JOB_ID=\"x\" is not"),
        );
    }

    #[test]
    fn log_lines_begin_with_role_and_rank() {
        assert_eq!(log_prefix(0), "driver 0");
        assert_eq!(log_prefix(2), "node 2");
    }

    proptest! {
        #[test]
        fn a_place_from_any_values_is_one_of_its_world(
            values in prop::collection::vec(prop_oneof!["[0-9]{0,3}", "[a-z0-9.:\\[\\]-]{0,8}"], 40),
            is_set in prop::collection::vec(any::<bool>(), 40),
        ) {
            let names: Vec<&str> = variables().chain([JOB_ID]).collect();
            let get = |name: &str| {
                let index = names.iter().position(|known| *known == name).unwrap();
                is_set[index].then(|| values[index].clone())
            };
            if let Ok(Some(place)) = from_env(get) {
                prop_assert!(place.rank < place.world_size);
                prop_assert!(place.rendezvous.is_some() || place.world_size == 1);
            }
        }
    }
}
