//! Submits a program to a Ray cluster, over HTTP alone. This machine needs neither Ray nor Python.
//!
//! It packs the program and `deploy/ray/ps_on_ray.py` into an archive, uploads it, starts it as a job, shows the job's
//! lines, and ends with the exit code of the program's driver. If it is interrupted, the job goes on.
//!
//! ```text
//! cargo run --example submit --features submit -- --address http://10.0.0.1:8265 \
//!     --servers=2 --workers=3 -- target/release/examples/sharded_ps --num-servers=2 --num-workers=3 --servers-on-nodes
//! ```

use std::fs;
use std::hash::{DefaultHasher, Hasher};
use std::io::{Cursor, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use serde_json::{Value, json};
use ureq::http::Response;
use ureq::{Agent, Body, RequestBuilder};
use zip::write::{SimpleFileOptions, ZipWriter};

const SCRIPT: &str = include_str!("../deploy/ray/ps_on_ray.py");
const SCRIPT_NAME: &str = "ps_on_ray.py";
const PAUSE: Duration = Duration::from_millis(500);
/// How long the cluster may be silent within a request, for example because the network is cut.
const SILENCE: Duration = Duration::from_secs(30);
/// How often in a row the cluster may fail to answer, with a pause each time.
const MAX_FAILURES: u32 = 60;

/// Runs a program on a Ray cluster.
#[derive(Parser)]
#[command(version, after_help = EXAMPLES)]
struct Args {
    /// The cluster's dashboard, such as http://10.0.0.1:8265 [default: $RAY_API_SERVER_ADDRESS].
    #[arg(long)]
    address: Option<String>,
    /// Number of ranks for servers, after the driver.
    #[arg(long, default_value_t = 0)]
    servers: u32,
    /// Number of ranks for workers, after the servers.
    #[arg(long, default_value_t = 2)]
    workers: u32,
    /// What Ray reserves for the driver, such as CPU=1,head=0.1.
    #[arg(long, default_value = "CPU=1")]
    driver_resources: String,
    /// What Ray reserves for each server.
    #[arg(long, default_value = "CPU=1")]
    server_resources: String,
    /// What Ray reserves for each worker, such as CPU=1,GPU=0.5.
    #[arg(long, default_value = "CPU=1")]
    worker_resources: String,
    /// How Ray distributes the ranks: PACK, SPREAD, STRICT_PACK or STRICT_SPREAD.
    #[arg(long, default_value = "PACK")]
    strategy: String,
    /// How often each rank is started again after a failure.
    #[arg(long, default_value_t = 3)]
    restarts: u32,
    /// Seconds to wait for room in the cluster.
    #[arg(long, default_value_t = 300)]
    wait: u32,
    /// Do not wait for the job.
    #[arg(long)]
    detach: bool,
    /// The program and its arguments, after `--`.
    #[arg(required = true, last = true)]
    command: Vec<String>,
}

const EXAMPLES: &str = "Examples:
  submit --address http://10.0.0.1:8265 -- target/release/examples/sync_ps --num-workers=2
  submit --servers=2 --workers=3 -- target/release/examples/sharded_ps \\
      --num-servers=2 --num-workers=3 --servers-on-nodes
  submit --detach -- target/release/examples/async_ps   do not wait for the job";

fn main() -> ExitCode {
    submit(&Args::parse()).unwrap_or_else(|error| {
        eprintln!("Error: {error:#}");
        ExitCode::FAILURE
    })
}

fn submit(args: &Args) -> Result<ExitCode> {
    let given = args.address.clone();
    let address = given.or_else(|| variable("RAY_API_SERVER_ADDRESS"));
    let address = address.context("where is the cluster? pass --address http://HOST:8265")?;
    let cluster = Cluster::new(&address)?;
    let program = Path::new(&args.command[0]);
    let name = program.file_name().and_then(|name| name.to_str());
    let name = name.with_context(|| format!("{} is no file", program.display()))?;
    let package = cluster.upload(&archive(program, name)?)?;
    let job = cluster.start(&entrypoint(args, name), &package)?;
    println!("Job {job} is submitted to {address}.");
    if args.detach {
        return Ok(ExitCode::SUCCESS);
    }
    cluster.follow(&job)
}

/// The program and the script, as Ray unpacks them.
fn archive(program: &Path, name: &str) -> Result<Vec<u8>> {
    ensure!(name != SCRIPT_NAME, "the program may not be named {name}");
    let content = fs::read(program);
    let content = content.with_context(|| format!("cannot read {}", program.display()))?;
    let mut archive = ZipWriter::new(Cursor::new(Vec::new()));
    // The same content gives the same archive, which then is uploaded only once.
    let options = SimpleFileOptions::default().last_modified_time(zip::DateTime::default());
    for (name, content, mode) in [
        (name, &content[..], 0o755),
        (SCRIPT_NAME, SCRIPT.as_bytes(), 0o644),
    ] {
        archive.start_file(name, options.unix_permissions(mode))?;
        archive.write_all(content)?;
    }
    Ok(archive.finish()?.into_inner())
}

/// The line that Ray's job runs, for a shell.
fn entrypoint(args: &Args, name: &str) -> String {
    let mut words = vec![
        "exec".to_owned(),
        "python".to_owned(),
        SCRIPT_NAME.to_owned(),
        format!("--servers={}", args.servers),
        format!("--workers={}", args.workers),
        format!("--driver-resources={}", args.driver_resources),
        format!("--server-resources={}", args.server_resources),
        format!("--worker-resources={}", args.worker_resources),
        format!("--strategy={}", args.strategy),
        format!("--restarts={}", args.restarts),
        format!("--wait={}", args.wait),
        "--".to_owned(),
        format!("./{name}"),
    ];
    words.extend_from_slice(&args.command[1..]);
    let quoted: Vec<String> = words.iter().map(|word| quote(word)).collect();
    quoted.join(" ")
}

fn quote(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_=./,:@%+".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// The variables that the program gets. The token is not among them: everybody who sees the dashboard could read it.
/// The script makes one.
fn variables() -> Value {
    let is_passed_on = |name: &str| {
        (name.starts_with("PS_") && name != "PS_TOKEN")
            || name.starts_with("RUST_")
            || name == "NO_COLOR"
    };
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value)))
        .filter(|(name, _)| is_passed_on(name))
        // JSON is Unicode.
        .map(|(name, value)| (name, value.to_string_lossy().into_owned()))
        .collect()
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name)
        .ok()
        .filter(|value| !value.trim().is_empty())
}

/// The token of a cluster that asks for one, from where Ray's own clients take it.
fn token() -> Result<Option<String>> {
    if variable("RAY_AUTH_MODE").is_some_and(|mode| mode == "disabled") {
        return Ok(None);
    }
    if let Some(token) = variable("RAY_AUTH_TOKEN") {
        return Ok(Some(token));
    }
    let stated = variable("RAY_AUTH_TOKEN_PATH").map(PathBuf::from);
    let usual = variable("HOME").map(|home| Path::new(&home).join(".ray/auth_token"));
    let Some(path) = stated
        .clone()
        .or_else(|| usual.filter(|path| path.exists()))
    else {
        return Ok(None);
    };
    let text = fs::read_to_string(&path);
    let text = text.with_context(|| format!("cannot read the token in {}", path.display()))?;
    Ok(Some(text.trim().to_owned()))
}

/// Ray's Jobs API.
struct Cluster {
    agent: Agent,
    address: String,
    token: Option<String>,
}

impl Cluster {
    fn new(address: &str) -> Result<Self> {
        ensure!(
            address.starts_with("http://"),
            "{address} does not begin with http://: this program speaks plain HTTP only"
        );
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .timeout_connect(Some(Duration::from_secs(10)))
            .timeout_per_read(Some(SILENCE))
            .timeout_per_write(Some(SILENCE))
            .build();
        Ok(Self {
            agent: config.into(),
            address: address.trim_end_matches('/').to_owned(),
            token: token()?,
        })
    }

    /// Uploads the archive, unless the cluster has it. Returns its address within the cluster.
    fn upload(&self, archive: &[u8]) -> Result<String> {
        let mut hasher = DefaultHasher::new();
        hasher.write(archive);
        let name = format!("_ray_pkg_{:016x}.zip", hasher.finish());
        let path = format!("/api/packages/gcs/{name}");
        if self.get(&path)?.0 != 200 {
            let request = self.agent.put(format!("{}{path}", self.address));
            let (code, text) = self.answer(self.signed(request).send(archive))?;
            ensure!(code == 200, "the upload failed with {code}: {text}");
        }
        Ok(format!("gcs://{name}"))
    }

    /// Starts the job and returns its name.
    fn start(&self, entrypoint: &str, package: &str) -> Result<String> {
        let job = json!({
            "entrypoint": entrypoint,
            "runtime_env": {"working_dir": package, "env_vars": variables()},
        });
        let request = self.agent.post(format!("{}/api/jobs/", self.address));
        let request = request.header("Content-Type", "application/json");
        let (code, text) = self.answer(self.signed(request).send(job.to_string()))?;
        ensure!(code == 200, "the job was not accepted: {code}: {text}");
        let answer: Value = serde_json::from_str(&text)?;
        let name = answer["submission_id"].as_str();
        Ok(name
            .with_context(|| format!("the answer has no submission_id: {text}"))?
            .to_owned())
    }

    /// Shows the job's lines until it ends.
    fn follow(&self, job: &str) -> Result<ExitCode> {
        let (mut shown, mut failures) = (0, 0);
        loop {
            // In this order, so that no line is missed that was written before the end.
            let step = self
                .state(job)
                .and_then(|state| Ok((state, self.lines(job)?)));
            let (state, lines) = match step {
                Ok(step) => step,
                Err(error) if failures < MAX_FAILURES => {
                    if failures == 0 {
                        eprintln!("the cluster does not answer, trying again: {error:#}");
                    }
                    failures += 1;
                    // Asking again at once would find the same fault.
                    thread::sleep(PAUSE);
                    continue;
                }
                Err(error) => return Err(error.context("the job may still run")),
            };
            failures = 0;
            // Not where a line was cut in the middle of a character.
            print!("{}", lines.get(shown..).unwrap_or_default());
            let _ = std::io::stdout().flush();
            shown = shown.max(lines.len());
            match state["status"].as_str() {
                Some("SUCCEEDED") => return Ok(ExitCode::SUCCESS),
                Some("FAILED" | "STOPPED") => {
                    let message = state["message"].as_str().unwrap_or("no message");
                    eprintln!(
                        "Job {job} has ended: {}",
                        message.lines().next().unwrap_or_default()
                    );
                    let code = state["driver_exit_code"]
                        .as_i64()
                        .and_then(|code| u8::try_from(code).ok());
                    return Ok(ExitCode::from(code.filter(|code| *code != 0).unwrap_or(1)));
                }
                // The Jobs API tells of nothing by itself: it has to be asked again.
                _ => thread::sleep(PAUSE),
            }
        }
    }

    fn state(&self, job: &str) -> Result<Value> {
        let (code, text) = self.get(&format!("/api/jobs/{job}"))?;
        ensure!(code == 200, "the state of job {job}: {code}: {text}");
        Ok(serde_json::from_str(&text)?)
    }

    /// Everything that the job has printed so far.
    fn lines(&self, job: &str) -> Result<String> {
        let (code, text) = self.get(&format!("/api/jobs/{job}/logs"))?;
        ensure!(code == 200, "the lines of job {job}: {code}: {text}");
        let answer: Value = serde_json::from_str(&text)?;
        Ok(answer["logs"].as_str().unwrap_or_default().to_owned())
    }

    fn get(&self, path: &str) -> Result<(u16, String)> {
        let request = self.agent.get(format!("{}{path}", self.address));
        self.answer(self.signed(request).call())
    }

    fn signed<B>(&self, request: RequestBuilder<B>) -> RequestBuilder<B> {
        match &self.token {
            Some(token) => request.header("Authorization", format!("Bearer {token}")),
            None => request,
        }
    }

    fn answer(&self, answer: Result<Response<Body>, ureq::Error>) -> Result<(u16, String)> {
        let answer = answer.with_context(|| format!("{} does not answer", self.address))?;
        let code = answer.status().as_u16();
        if code == 401 || code == 403 {
            bail!(
                "the cluster {} a token: set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file with it",
                if self.token.is_some() {
                    "refuses this"
                } else {
                    "asks for"
                }
            );
        }
        let body = answer.into_body().into_with_config().limit(u64::MAX);
        Ok((code, body.read_to_string()?))
    }
}
