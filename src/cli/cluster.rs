//! Flags that say which of several processes this one is.

use std::path::PathBuf;
use std::process::{ExitCode, exit};
use std::time::Duration;

use clap::{ArgMatches, FromArgMatches as _};
use ps_actors::actor::error_chain;
use ps_actors::cluster::{Cluster, ClusterConfig, Hosts, Resources};
use ps_actors::launch::{self, EXIT_CONFIG, LaunchOptions, env};
use ps_actors::net::tls::{self, Tls, TlsError, TlsFiles};

use super::doctor;
use super::output::complain;

// No doc comment on the type: `--help` would take it for the program's own text.

#[allow(missing_docs, reason = "see above")]
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Several processes")]
pub struct ClusterArgs {
    /// Run as this many processes on this machine, this one among them.
    #[arg(long)]
    pub processes: Option<u32>,
    /// This process's number when you start them yourself: 0 is the driver.
    #[arg(long)]
    pub rank: Option<u32>,
    /// How many processes you start.
    #[arg(long)]
    pub world_size: Option<u32>,
    /// The address of the driver, which all processes must be able to reach.
    #[arg(long)]
    pub master_addr: Option<String>,
    /// The port of the driver [default: 29500].
    #[arg(long)]
    pub master_port: Option<u16>,
    /// Which run this is, so that the driver refuses nodes of another one [default: $PS_RUN_ID].
    #[arg(long)]
    pub run_id: Option<String>,
    /// What this process offers to actors that need it, such as cpus=4,gpus=1,big.
    #[arg(long)]
    pub resources: Option<Resources>,
    /// The certificate of the authority that all processes' certificates are from (PEM).
    #[arg(long, requires_all = ["tls_cert", "tls_key"])]
    pub tls_ca: Option<PathBuf>,
    /// This process's certificate (PEM).
    #[arg(long, requires = "tls_ca")]
    pub tls_cert: Option<PathBuf>,
    /// The private key of this process's certificate (PEM).
    #[arg(long, requires = "tls_ca")]
    pub tls_key: Option<PathBuf>,
    /// The name that the certificates are issued for.
    #[arg(long, default_value = tls::DEFAULT_NAME)]
    pub tls_name: String,
    /// Seconds of silence after which a process counts as lost.
    #[arg(long, default_value_t = 5.0)]
    pub process_lease: f64,
    /// Listen to other hosts without a token. Anybody on the network can then take part.
    #[arg(long)]
    pub insecure: bool,
    /// Do no work, but check whether the processes find and reach each other and have the same data, and say what is
    /// wrong. All processes need this flag. They wait for each other for this many seconds [default: 3].
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, require_equals = true, default_missing_value = "3")]
    pub doctor: Option<f64>,
}

impl ClusterArgs {
    /// This process's number, and its number among those of its host; `None` in a program without these flags. Ends
    /// the process if they contradict each other or the environment.
    pub(super) fn rank_in(matches: &ArgMatches) -> Option<(u32, u32)> {
        // A name of which no program has another flag by accident.
        matches.try_contains_id("process_lease").ok()?;
        let args = Self::from_arg_matches(matches).ok()?;
        let launch = launch::resolve(&args.options(), env::read);
        // With `--rank`, the variables of launchers are not read.
        let variable = |name: &str| match args.rank {
            Some(_) if name != env::LOCAL_RANK => None,
            _ => env::read(name),
        };
        let ranks = launch.and_then(|launch| Ok((launch.rank(), launch::local_rank(variable)?)));
        match ranks {
            Ok(ranks) => Some(ranks),
            Err(error) => end(EXIT_CONFIG, &error_chain(&error)),
        }
    }

    /// Does the first part of what `--doctor` asks for, if it is there. `None`: the program goes on.
    pub(super) fn doctor_in(matches: &ArgMatches) -> Option<ExitCode> {
        matches.try_contains_id("process_lease").ok()?;
        let args = Self::from_arg_matches(matches).ok()?;
        match Duration::try_from_secs_f64(args.doctor?) {
            Ok(within) => doctor::examine(&args, within),
            Err(_) => end(EXIT_CONFIG, "--doctor must be a time in seconds"),
        }
    }

    /// Returns how many processes there are, this one included.
    #[must_use]
    pub fn world_size(&self) -> u32 {
        // `cli::main` has refused what cannot be resolved.
        launch::resolve(&self.options(), env::read).map_or(1, |launch| launch.world_size())
    }

    /// Takes this process's place. `None` in a node, when its work is over.
    ///
    /// Ends the process where that fails, with an exit code that tells a launcher whether to try again: see
    /// [`StartError::exit_code`](ps_actors::cluster::StartError::exit_code).
    ///
    /// With `--doctor`, it compares what the processes have loaded, and ends the process.
    #[must_use]
    pub fn launch(&self, hosts: Hosts) -> Option<Cluster> {
        if self.doctor.is_some() {
            exit(doctor::compare(self, hosts).into());
        }
        let (options, config) = (self.options(), self.config());
        #[cfg(feature = "metrics")]
        let launched = Cluster::launch_with(&options, config, hosts, super::show::routes());
        #[cfg(not(feature = "metrics"))]
        let launched = Cluster::launch(&options, config, hosts);
        match launched {
            Ok(cluster) => cluster,
            Err(error) => end(error.exit_code(), &error_chain(&error)),
        }
    }

    pub(super) fn config(&self) -> ClusterConfig {
        let mut config = ClusterConfig {
            insecure: self.insecure,
            ..ClusterConfig::default()
        };
        if let Some(resources) = &self.resources {
            config.resources = resources.clone();
        }
        config.tls = match self.tls() {
            Ok(tls) => tls,
            Err(error) => end(EXIT_CONFIG, &error_chain(&error)),
        };
        config.net = match Duration::try_from_secs_f64(self.process_lease) {
            Ok(lease) if !lease.is_zero() => config.net.with_process_lease(lease),
            _ => end(EXIT_CONFIG, "--process-lease must be a time in seconds"),
        };
        config
    }

    pub(super) fn options(&self) -> LaunchOptions {
        LaunchOptions {
            rank: self.rank,
            world_size: self.world_size,
            master_addr: self.master_addr.clone(),
            master_port: self.master_port,
            run_id: self.run_id.clone(),
            processes: self.processes,
        }
    }

    fn tls(&self) -> Result<Option<Tls>, TlsError> {
        let (Some(authority), Some(certificate), Some(key)) =
            (&self.tls_ca, &self.tls_cert, &self.tls_key)
        else {
            return Ok(None);
        };
        let files = TlsFiles {
            authority: authority.clone(),
            certificate: certificate.clone(),
            key: key.clone(),
            name: self.tls_name.clone(),
            mutual: true,
        };
        Tls::from_files(&files).map(Some)
    }
}

fn end(code: u8, error: &str) -> ! {
    complain(error);
    exit(code.into())
}
