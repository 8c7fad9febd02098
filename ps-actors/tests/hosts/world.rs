//! The test's side: this program as driver and nodes on hosts of their own, and what they say.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use ps_actors::launch::env;
use ps_actors::net::tls::DEFAULT_NAME;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tempfile::TempDir;

use super::network::Network;
use super::program::{AUTHORITY, CERTIFICATE, KEY, PLAN, Plan};

/// Bounds every wait; only a failing test waits this long.
const PATIENCE: Duration = Duration::from_secs(60);

/// In its own namespace, every port is free.
const PORT: u16 = 4000;

pub(crate) const TOKEN: &str = "token-of-the-three-hosts";

/// A driver and two nodes; their end comes before that of their network.
pub(crate) struct World {
    hosts: BTreeMap<u32, Host>,
    pub(crate) network: Network,
    plan: Plan,
    said: Receiver<Said>,
    sender: Sender<Said>,
    seen: Vec<(u32, String)>,
    /// The ranks that say no more.
    ended: BTreeSet<u32>,
    /// Where in `seen` the waits begin to look.
    since: usize,
}

/// A line of the host of this rank; its last one is `None`.
type Said = (u32, Option<String>);

/// A process, killed at the end.
struct Host(Child);

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Says why a test, or a part of it, is left out. Not captured, so that it can be read.
pub(crate) fn skip(why: &str) {
    let _ = writeln!(std::io::stderr(), "skipped: {why}");
}

/// Makes an authority and a certificate, and writes what a plan needs.
pub(crate) fn certificates() -> TempDir {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let params = CertificateParams::new(vec![DEFAULT_NAME.to_owned()]).unwrap();
    let certificate = params.signed_by(&key, &authority).unwrap();
    let directory = tempfile::tempdir().unwrap();
    for (file, text) in [
        (AUTHORITY, authority.pem()),
        (CERTIFICATE, certificate.pem()),
        (KEY, key.serialize_pem()),
    ] {
        std::fs::write(directory.path().join(file), text).unwrap();
    }
    directory
}

impl World {
    /// A network without processes; `None` where there can be none.
    pub(crate) fn empty(plan: Plan) -> Option<Self> {
        let network = Network::new(3).map_err(|why| skip(&why)).ok()?;
        let (sender, said) = channel();
        Some(Self {
            hosts: BTreeMap::new(),
            network,
            plan,
            said,
            sender,
            seen: Vec::new(),
            ended: BTreeSet::new(),
            since: 0,
        })
    }

    /// Starts driver and nodes; `None` where there can be no network.
    pub(crate) fn start(plan: Plan) -> Option<Self> {
        let mut world = Self::empty(plan)?;
        (0..3).for_each(|rank| world.launch(rank, Some(TOKEN)));
        Some(world)
    }

    /// Starts this program on the host of this rank.
    pub(crate) fn launch(&mut self, rank: u32, token: Option<&str>) {
        let mut command = self.network.command(rank);
        command.args(["play_a_role", "--exact", "--nocapture"]);
        // Whatever a launcher around this test has set.
        command.env_clear();
        command.envs(std::env::vars_os().filter(|(name, _)| name == "PATH"));
        command
            .env(env::RANK, rank.to_string())
            .env(env::WORLD_SIZE, "3")
            .env(
                env::RENDEZVOUS,
                format!("{}:{PORT}", self.network.address(0)),
            )
            .env(PLAN, serde_json::to_string(&self.plan).unwrap())
            .envs(token.map(|token| (env::TOKEN, token)))
            // Its end is the end of the process, so that none outlives a test that was killed.
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut process = command.spawn().unwrap();
        // Both streams in one order, as far as there is one.
        let (stdout, stderr) = (process.stdout.take(), process.stderr.take());
        let sender = self.sender.clone();
        thread::spawn(move || {
            let logged = {
                let sender = sender.clone();
                thread::spawn(move || follow(rank, stderr.unwrap(), &sender))
            };
            follow(rank, stdout.unwrap(), &sender);
            let _ = logged.join();
            let _ = sender.send((rank, None));
        });
        self.ended.remove(&rank);
        self.hosts.insert(rank, Host(process));
    }

    /// Tells the driver a command.
    pub(crate) fn tell_driver(&mut self, command: &str) {
        let driver = self.hosts.get_mut(&0).unwrap();
        writeln!(driver.0.stdin.as_mut().unwrap(), "{command}").unwrap();
    }

    /// From here on, waits look for what is said from now on.
    pub(crate) fn forget(&mut self) {
        while let Ok(said) = self.said.try_recv() {
            self.note(said);
        }
        self.since = self.seen.len();
    }

    fn note(&mut self, (rank, line): Said) {
        match line {
            Some(line) if line.is_empty() => {}
            Some(line) => self.seen.push((rank, line)),
            None => drop(self.ended.insert(rank)),
        }
    }

    /// Waits for what is said next, by anyone; false if that takes too long.
    fn listen(&mut self, deadline: Instant) -> bool {
        let left = deadline.saturating_duration_since(Instant::now());
        let said = self.said.recv_timeout(left).ok();
        said.map(|said| self.note(said)).is_some()
    }

    /// Waits until this host says, or has said, a line of which something can be made.
    fn find<T>(&mut self, rank: u32, what: &str, look: impl Fn(&str) -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        let mut next = self.since;
        loop {
            while let Some((by, line)) = self.seen.get(next) {
                next += 1;
                if let Some(found) = look(line).filter(|_| *by == rank) {
                    return found;
                }
            }
            if self.ended.contains(&rank) {
                self.fail(&format!("{rank} ended and did not say {what}"));
            }
            if !self.listen(deadline) {
                self.fail(&format!("{rank} did not say {what}"));
            }
        }
    }

    /// Waits until this host says, or has said, a line with this text.
    pub(crate) fn wait_for(&mut self, rank: u32, text: &str) -> String {
        self.find(rank, text, |line| {
            line.contains(text).then(|| line.to_owned())
        })
    }

    /// Waits until so many more gradients of a worker were applied than by now.
    pub(crate) fn wait_for_steps(&mut self, worker: u32, num_steps: u64) {
        let lines = self.seen.iter().rev().filter(|(rank, _)| *rank == 0);
        let mut counts = lines.filter_map(|(_, line)| applied(line, worker));
        let least = counts.next().unwrap_or(0) + num_steps;
        let what = format!("that {least} gradients of worker {worker} were applied");
        self.find(0, &what, |line| {
            applied(line, worker).filter(|applied| *applied >= least)
        });
    }

    /// Whether a host has said a line with this text.
    pub(crate) fn has_said(&self, rank: u32, text: &str) -> bool {
        let mut seen = self.seen.iter();
        seen.any(|(by, line)| *by == rank && line.contains(text))
    }

    /// Waits for the end of a host's process, and returns its exit code.
    pub(crate) fn exit_code(&mut self, rank: u32) -> Option<i32> {
        let deadline = Instant::now() + PATIENCE;
        while !self.ended.contains(&rank) {
            if !self.listen(deadline) {
                self.fail(&format!("{rank} did not end"));
            }
        }
        let mut host = self.hosts.remove(&rank).unwrap();
        host.0.wait().unwrap().code()
    }

    /// Waits until training is over, all weights are as expected, and everybody has left.
    pub(crate) fn finish(&mut self) {
        let line = self.find(0, "how it went", |line| {
            let is_it = line.starts_with("@exact") || line.starts_with("@wrong");
            is_it.then(|| line.to_owned())
        });
        if line.starts_with("@wrong") {
            self.fail(&line);
        }
        for rank in 0..3 {
            let code = self.exit_code(rank);
            if code != Some(0) {
                self.fail(&format!("{rank} ended with {code:?}"));
            }
        }
    }

    fn fail(&self, why: &str) -> ! {
        // Of what is said over and over, the last.
        let is_count = |index: usize| {
            let line = self.seen.get(index).map(|(_, line)| line.as_str());
            line.is_some_and(|line| line.starts_with("@applied"))
        };
        let indexes = 0..self.seen.len();
        let lines: Vec<_> = indexes
            .filter(|index| !(is_count(*index) && is_count(index + 1)))
            .map(|index| format!("{}: {}", self.seen[index].0, self.seen[index].1))
            .collect();
        panic!("{why}; so far:\n{}", lines.join("\n"));
    }
}

/// How many gradients of a worker were applied, if the line says.
fn applied(line: &str, worker: u32) -> Option<u64> {
    let mut counts = line.strip_prefix("@applied ")?.split(' ');
    counts.nth(worker as usize)?.parse().ok()
}

/// Passes a stream's lines on.
fn follow(rank: u32, stream: impl Read, lines: &Sender<Said>) {
    for line in BufReader::new(stream).lines().map_while(Result::ok) {
        if lines.send((rank, Some(line))).is_err() {
            return;
        }
    }
}
