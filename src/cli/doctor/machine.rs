//! What a process can see without the others.

use std::fs::read_to_string;
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use ps_actors::cluster::unreachable;
use ps_actors::launch::{Place, Rendezvous};

use super::Findings;

/// Each connection to another process is an open file, and each file of data.
const FEW_FILES: u64 = 1024;

const MEBIBYTE: u64 = 1 << 20;
/// A process with a small model and MNIST needs about this much. With less, the system kills it, or it cannot start its
/// threads, and neither names the cause.
const LITTLE_MEMORY: u64 = 256 * MEBIBYTE;

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
    memory(findings);
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
    match soft_limit("Max open files")?.as_str() {
        "unlimited" => Some(u64::MAX),
        soft => soft.parse().ok(),
    }
}

/// What the system says of a limit of this process, whose name has three words.
fn soft_limit(name: &str) -> Option<String> {
    let limits = read_to_string("/proc/self/limits").ok()?;
    let line = limits.lines().find(|line| line.starts_with(name))?;
    line.split_whitespace().nth(3).map(str::to_owned)
}

fn memory(findings: &mut Findings) {
    let cgroups = read_to_string("/proc/self/cgroup").unwrap_or_default();
    let address_space = soft_limit("Max address space").and_then(|limit| limit.parse().ok());
    let bounds = [
        (available(), "is available on this machine: free some"),
        (
            cgroup_limit(&cgroups, |file| read_to_string(file).ok()),
            "is the limit of its control group: raise the limit of the container or job",
        ),
        (
            address_space,
            "is the limit of its address space: raise it (ulimit -v)",
        ),
    ];
    let known: Vec<(u64, &str)> = bounds
        .into_iter()
        .filter_map(|(bytes, text)| Some((bytes?, text)))
        .collect();
    for (bytes, text) in &known {
        if *bytes < LITTLE_MEMORY {
            let mebibytes = bytes / MEBIBYTE;
            findings.bad(&format!("{mebibytes} MiB of memory {text}"));
        }
    }
    if let Some(least) = known.iter().map(|(bytes, _)| *bytes).min()
        && least >= LITTLE_MEMORY
    {
        findings.good(&format!("{} MiB of memory may be used", least / MEBIBYTE));
    }
}

fn available() -> Option<u64> {
    let info = read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find(|line| line.starts_with("MemAvailable"))?;
    let kibibytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kibibytes * 1024)
}

/// The least limit of this process's control group and of those above it, whatever a group's own limit says. `cgroups` is
/// what `/proc/self/cgroup` says.
fn cgroup_limit(cgroups: &str, read: impl Fn(&Path) -> Option<String>) -> Option<u64> {
    let mut least = None;
    for line in cgroups.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(group)) = (parts.next(), parts.next()) else {
            continue;
        };
        // Version 2 has one tree for all controllers; version 1 has one for memory.
        let (root, name) = match controllers {
            "" => ("/sys/fs/cgroup", "memory.max"),
            all if all.split(',').any(|one| one == "memory") => {
                ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")
            }
            _ => continue,
        };
        let root = Path::new(root);
        let own = root.join(group.trim_start_matches('/'));
        // In a container, a group of the host may be named, which is not there.
        for folder in own.ancestors().take_while(|path| path.starts_with(root)) {
            let limit = read(&folder.join(name)).and_then(|text| text.trim().parse().ok());
            least = least.into_iter().chain(limit).min();
        }
    }
    // "No limit" is a huge number in version 1.
    least.filter(|bytes| *bytes < 1 << 60)
}

/// Whether the driver can listen at its address, or a node can reach it there.
pub(super) fn way_to_driver(place: &Place, within: Duration, findings: &mut Findings) -> bool {
    let Some(rendezvous) = &place.rendezvous else {
        return true;
    };
    let deadline = Instant::now() + within;
    let addresses = match place.is_driver() {
        true => resolve(rendezvous, within),
        false => resolve_in_time(rendezvous, within, deadline, findings),
    };
    let addresses = match addresses {
        Ok(addresses) => addresses,
        Err(problem) => {
            findings.bad(&format!(
                "{}: use an address, or a name that all machines know (--master-addr, MASTER_ADDR or PS_RENDEZVOUS)",
                unresolved(rendezvous, &problem)
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
        can_reach(rendezvous.host(), &addresses, within, deadline, findings)
    }
}

fn unresolved(rendezvous: &Rendezvous, problem: &str) -> String {
    let name = rendezvous.host();
    format!("the driver's name {name} does not resolve here ({problem})")
}

/// Looks the driver's name up until it is there. On some engines, it appears only when the driver has started.
fn resolve_in_time(
    rendezvous: &Rendezvous,
    within: Duration,
    deadline: Instant,
    findings: &Findings,
) -> Result<Vec<SocketAddr>, String> {
    let mut say_at = Instant::now() + SAY_WAITING;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        // Long enough for an answer, so that the last look-up does not hide what the others have found.
        let left = left.clamp(Duration::from_millis(200), SAY_WAITING);
        let problem = match resolve(rendezvous, left) {
            Ok(addresses) => return Ok(addresses),
            Err(problem) => problem,
        };
        let now = Instant::now();
        if now >= deadline {
            return Err(format!("{problem}, tried for {within:?}"));
        }
        if now >= say_at {
            let left = deadline.saturating_duration_since(now).as_secs();
            let text = unresolved(rendezvous, &problem);
            findings.waits(&format!("{text}; trying for {left} s more"));
            say_at = now + SAY_WAITING;
        }
        // Nothing tells when a name appears.
        thread::sleep(Duration::from_millis(50));
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
        Err(_) => Err("no name server answers".to_owned()),
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
    deadline: Instant,
    findings: &mut Findings,
) -> bool {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(cgroups: &str, files: &[(&str, &str)], expected: Option<u64>) {
        let read = |path: &Path| {
            let found = files.iter().find(|(name, _)| Path::new(name) == path);
            found.map(|(_, text)| format!("{text}\n"))
        };
        assert_eq!(cgroup_limit(cgroups, read), expected, "{cgroups}");
    }

    #[test]
    fn the_least_limit_of_a_group_and_of_those_above_it_counts() {
        let job = "0::/system.slice/job_7/step_0\n";
        let root = ("/sys/fs/cgroup/memory.max", "max");
        check(job, &[root], None);
        check(
            "0::/\n",
            &[("/sys/fs/cgroup/memory.max", "1000")],
            Some(1000),
        );
        let above = ("/sys/fs/cgroup/system.slice/job_7/memory.max", "3000");
        let own = "/sys/fs/cgroup/system.slice/job_7/step_0/memory.max";
        check(job, &[root, above, (own, "max")], Some(3000));
        check(job, &[root, above, (own, "2000")], Some(2000));
        check(job, &[root, above, (own, "4000")], Some(3000));
    }

    #[test]
    fn version_1_has_a_tree_of_its_own_for_memory() {
        let groups = "3:cpu,cpuacct:/a\n2:rdma,memory:/a/b\n1:name=systemd:/a\n0::/a\n";
        let (own, above) = (
            "/sys/fs/cgroup/memory/a/b/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/a/memory.limit_in_bytes",
        );
        check(groups, &[(own, "9223372036854771712")], None);
        check(
            groups,
            &[(own, "9223372036854771712"), (above, "5000")],
            Some(5000),
        );
    }
}
