//! What a process can see without the others.

use std::fs::read_to_string;
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use ps_actors::cluster::unreachable;
use ps_actors::launch::{Place, Rendezvous};

use super::Findings;

/// Each connection to another process is an open file, and each file of data.
const FEW_FILES: u64 = 1024;

/// How long a process waits for others before it says what keeps it, and before it says so again.
const SAY_WAITING: Duration = Duration::from_secs(2);

/// The limits on open files and memory, and whether processes may read each other's memory.
pub(super) fn limits(findings: &mut Findings) {
    if let Some(limit) = open_files() {
        match limit {
            limit if limit < FEW_FILES => findings.bad(&format!(
                "may open only {limit} files, and each connection is one: raise the limit (ulimit -n {FEW_FILES})"
            )),
            limit => findings.good(&format!("may open {limit} files")),
        }
    }
    if let Some(memory) = memory() {
        findings.good(&memory);
    }
    match read_to_string("/proc/sys/kernel/yama/ptrace_scope") {
        Ok(scope) if scope.trim() != "0" => findings.good(&format!(
            "may not read the memory of other processes (kernel.yama.ptrace_scope is {}): between processes of one \
             machine, weights are copied through sockets, which is slower",
            scope.trim()
        )),
        _ => findings.good("nothing is known that forbids processes of one machine to read each other's memory"),
    }
}

fn open_files() -> Option<u64> {
    let limits = read_to_string("/proc/self/limits").ok()?;
    let line = limits
        .lines()
        .find(|line| line.starts_with("Max open files"))?;
    match line.split_whitespace().nth(3)? {
        "unlimited" => Some(u64::MAX),
        soft => soft.parse().ok(),
    }
}

fn memory() -> Option<String> {
    const MEBIBYTE: u64 = 1 << 20;
    let info = read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find(|line| line.starts_with("MemAvailable"))?;
    let available: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    let limit = read_to_string("/sys/fs/cgroup/memory.max").ok();
    let limit = limit.and_then(|limit| limit.trim().parse::<u64>().ok());
    let limit = limit.map(|bytes| format!(", and a limit of {} MiB", bytes / MEBIBYTE));
    Some(format!(
        "{} MiB of memory are available{}",
        available / 1024,
        limit.unwrap_or_default()
    ))
}

/// Whether the driver can listen at its address, or a node can reach it there.
pub(super) fn way_to_driver(place: &Place, within: Duration, findings: &mut Findings) -> bool {
    let Some(rendezvous) = &place.rendezvous else {
        return true;
    };
    let addresses = match resolve(rendezvous, within) {
        Ok(addresses) => addresses,
        Err(problem) => {
            findings.bad(&format!(
                "the driver's name {} does not resolve here ({problem}): use an address, or a name that all \
                 machines know (--master-addr, MASTER_ADDR or PS_RENDEZVOUS)",
                rendezvous.host()
            ));
            return false;
        }
    };
    let list: Vec<String> = addresses.iter().map(ToString::to_string).collect();
    findings.good(&format!(
        "the driver is {rendezvous}, which is {}",
        list.join(" and ")
    ));
    if place.is_driver() {
        can_listen(place, rendezvous, addresses[0], findings)
    } else {
        can_reach(rendezvous.host(), &addresses, within, findings)
    }
}

/// A name server that does not answer would take longer than anyone wants to wait.
fn resolve(rendezvous: &Rendezvous, within: Duration) -> Result<Vec<SocketAddr>, String> {
    let target = (rendezvous.host().to_owned(), rendezvous.port());
    let (sender, found) = mpsc::channel();
    thread::spawn(move || sender.send(target.to_socket_addrs().map(Vec::from_iter)));
    match found.recv_timeout(within) {
        Ok(Ok(addresses)) if !addresses.is_empty() => Ok(addresses),
        Ok(Ok(_)) => Err("it has no address".to_owned()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no name server answers within {within:?}")),
    }
}

fn can_listen(
    place: &Place,
    rendezvous: &Rendezvous,
    address: SocketAddr,
    findings: &mut Findings,
) -> bool {
    match TcpListener::bind(address) {
        Ok(_) => {
            let is_meant =
                rendezvous.host() == "localhost" || rendezvous.host().parse() == Ok(address.ip());
            if place.world_size > 1 && address.ip().is_loopback() && !is_meant {
                findings.bad(&format!(
                    "on this machine, its name {} means {}, where no other machine can reach it: use its address in \
                     the network, or correct /etc/hosts",
                    rendezvous.host(),
                    address.ip()
                ));
            } else {
                findings.good(&format!("{address} is free to listen on"));
            }
            true
        }
        Err(error) => {
            let port = address.port();
            findings.bad(&match error.kind() {
                ErrorKind::AddrInUse => format!(
                    "port {port} of {} is taken, perhaps by another run: choose another port (--master-port, \
                     MASTER_PORT or PS_RENDEZVOUS)",
                    address.ip()
                ),
                ErrorKind::AddrNotAvailable => format!(
                    "{} is no address of this machine, so rank 0 runs on another machine than {} says: set \
                     PS_RENDEZVOUS to the machine of rank 0",
                    address.ip(),
                    place.launcher
                ),
                _ => format!("cannot listen on {address}: {error}"),
            });
            false
        }
    }
}

/// Whether the driver answers. It may start a moment later.
fn can_reach(
    name: &str,
    addresses: &[SocketAddr],
    within: Duration,
    findings: &mut Findings,
) -> bool {
    let deadline = Instant::now() + within;
    let mut say_at = Instant::now() + SAY_WAITING;
    loop {
        let mut problems = Vec::new();
        for address in addresses {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = left.clamp(Duration::from_millis(100), Duration::from_secs(1));
            match TcpStream::connect_timeout(address, left) {
                Ok(stream) => {
                    let from = stream
                        .local_addr()
                        .map_or(String::new(), |from| format!(" from {}", from.ip()));
                    findings.good(&format!("reaches the driver at {address}{from}"));
                    return true;
                }
                Err(error) => problems.push(unreachable(name, *address, &error)),
            }
        }
        let now = Instant::now();
        let problems = problems.join("; ");
        if now >= deadline {
            findings.bad(&format!(
                "cannot reach the driver for {within:?}: {problems}"
            ));
            return false;
        }
        if now >= say_at {
            let left = deadline.saturating_duration_since(now).as_secs();
            findings.waits(&format!("{problems}; trying for {left} s more"));
            say_at = now + SAY_WAITING;
        }
        // The other process may not listen yet, and nothing tells when it does.
        thread::sleep(Duration::from_millis(50));
    }
}
