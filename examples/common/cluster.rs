//! What the examples share about running as several processes.

use std::fmt;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::exit;
use std::time::Duration;

use anyhow::{Error, Result, anyhow};
use ps::actors::launch::{self, env, log_prefix};
use ps::actors::net::tls::{self, Tls, TlsError, TlsFiles};
use ps::prelude::*;
use tracing_subscriber::fmt::format::{Format, FormatEvent, FormatFields, Writer};
use tracing_subscriber::fmt::{FmtContext, format::Full};
use tracing_subscriber::registry::LookupSpan;

// Options of every example. No doc comment: `--help` would take it for the program's.
#[derive(Clone, clap::Args)]
#[command(next_help_heading = "Several processes")]
pub(crate) struct ClusterArgs {
    /// Run as this many processes on this machine, this one among them.
    #[arg(long)]
    processes: Option<u32>,
    /// This process's number when you start them yourself: 0 is the driver.
    #[arg(long)]
    rank: Option<u32>,
    /// How many processes you start.
    #[arg(long)]
    world_size: Option<u32>,
    /// The address of the driver, which all processes must be able to reach.
    #[arg(long)]
    master_addr: Option<String>,
    /// The port of the driver [default: 29500].
    #[arg(long)]
    master_port: Option<u16>,
    /// Which run this is, so that the driver refuses nodes of another one [default: $PS_RUN_ID].
    #[arg(long)]
    run_id: Option<String>,
    /// What this process offers to actors that need it, such as cpus=4,gpus=1,big.
    #[arg(long)]
    resources: Option<Resources>,
    /// The certificate of the authority that all processes' certificates are from (PEM).
    #[arg(long, requires_all = ["tls_cert", "tls_key"])]
    tls_ca: Option<PathBuf>,
    /// This process's certificate (PEM).
    #[arg(long, requires = "tls_ca")]
    tls_cert: Option<PathBuf>,
    /// The private key of this process's certificate (PEM).
    #[arg(long, requires = "tls_ca")]
    tls_key: Option<PathBuf>,
    /// The name that the certificates are issued for.
    #[arg(long, default_value = tls::DEFAULT_NAME)]
    tls_name: String,
    /// Seconds after which a process of which nothing is heard counts as lost.
    #[arg(long, default_value_t = 5.0)]
    lease: f64,
    /// Listen to other hosts without a token. Anybody on the network can then take part.
    #[arg(long)]
    insecure: bool,
}

impl ClusterArgs {
    fn options(&self) -> LaunchOptions {
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

    /// Turns logging on, and returns this process's rank. Ends the process if flags or variables
    /// contradict each other.
    pub(crate) fn begin(&self) -> u32 {
        let rank = match launch::resolve(&self.options(), env::read) {
            Ok(launch) => launch.rank(),
            Err(error) => end(launch::EXIT_CONFIG, error.into()),
        };
        tracing_subscriber::fmt()
            .with_writer(std::io::stderr)
            // It would print to the very output that cannot be written, and panic.
            .log_internal_errors(false)
            .event_format(WithRole {
                role: log_prefix(rank),
                format: Format::default(),
            })
            .init();
        rank
    }

    /// Takes this process's place. `None` in a node, when its work is over.
    pub(crate) fn launch(&self, hosts: Hosts) -> Result<Option<Cluster>> {
        let mut config = ClusterConfig {
            insecure: self.insecure,
            ..ClusterConfig::default()
        };
        if let Some(resources) = &self.resources {
            config.resources = resources.clone();
        }
        config.tls = match self.tls() {
            Ok(tls) => tls,
            Err(error) => end(launch::EXIT_CONFIG, error.into()),
        };
        config.net = match Duration::try_from_secs_f64(self.lease) {
            Ok(lease) if !lease.is_zero() => config.net.with_lease(lease),
            _ => end(
                launch::EXIT_CONFIG,
                anyhow!("--lease must be a time in seconds"),
            ),
        };
        match Cluster::launch(&self.options(), config, hosts) {
            Ok(cluster) => Ok(cluster),
            // A launcher must know whether to try again.
            Err(error) => end(error.exit_code(), error.into()),
        }
    }
}

fn end(code: u8, error: Error) -> ! {
    // Nobody may be left to read it; the exit code says the same.
    let _ = writeln!(std::io::stderr(), "Error: {error:#}");
    exit(code.into())
}

/// Puts the process's role before each line.
struct WithRole {
    role: String,
    format: Format<Full>,
}

impl<S, N> FormatEvent<S, N> for WithRole
where
    S: tracing::Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &tracing::Event<'_>,
    ) -> fmt::Result {
        write!(writer, "{}: ", self.role)?;
        self.format.format_event(context, writer, event)
    }
}
