//! The way of a node to its driver: what is tried at the moment, and what may be wrong if it takes long.

use std::fmt::Write as _;
use std::io::{Error, ErrorKind};
use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::net::{TcpStream, lookup_host};
use tokio::time::Instant;

/// How long a process waits for others before it says so in the log. A failed start has to explain itself within 5 s.
pub(super) const SAY_WAITING: Duration = Duration::from_secs(2);

/// A step that lasts this long is not just passing by.
const LASTING: Duration = Duration::from_millis(500);

/// How long to wait for the next of several addresses of a name. All of them together fit into a few seconds.
const NEXT_ADDRESS: Duration = Duration::from_secs(2);

/// When a process that waits says so again: every 5 s in the first minute, then every 30 s.
pub(super) fn pause_after(waited: Duration) -> Duration {
    match waited.as_secs() {
        0..60 => Duration::from_secs(5),
        _ => Duration::from_secs(30),
    }
}

/// What a node does to reach its driver.
#[derive(Debug)]
pub(super) struct Progress(Mutex<State>);

#[derive(Debug)]
struct State {
    /// What a node that is stuck in the present step has to be told.
    step: String,
    since: Instant,
    /// Why the last try failed.
    failure: Option<String>,
}

impl Progress {
    pub(super) fn new() -> Self {
        Self(Mutex::new(State {
            step: String::new(),
            since: Instant::now(),
            failure: None,
        }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing can panic under the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a step. `stuck` says what is wrong if the step does not end.
    pub(super) fn begin(&self, stuck: String) {
        let mut state = self.lock();
        state.step = stuck;
        state.since = Instant::now();
    }

    /// Notes why a try has failed.
    pub(super) fn failed(&self, why: &str) {
        let mut state = self.lock();
        state.failure = Some(why.to_owned());
        // The pause until the next try is a step, too.
        state.step = why.to_owned();
        state.since = Instant::now();
    }

    /// What keeps the node from joining: the step that lasts, or the reason of the last failure.
    pub(super) fn obstacle(&self) -> String {
        let state = self.lock();
        match &state.failure {
            Some(failure) if state.since.elapsed() < LASTING => failure.clone(),
            _ => state.step.clone(),
        }
    }
}

/// Looks a driver's name up, given as `host:port`.
pub(super) async fn look_up(driver: &str, progress: &Progress) -> Result<Vec<SocketAddr>, String> {
    let name = host_of(driver);
    progress.begin(format!(
        "no name server has answered what {name} means: use an address, or a name that this machine knows"
    ));
    // A host name may not be known yet while a cluster starts.
    match lookup_host(driver).await {
        Ok(found) => Ok(found.collect()),
        Err(error) => Err(unresolved(name, &error)),
    }
}

/// Connects to the first of a driver's addresses that answers, and closes the connection. Returns that address and the
/// local one.
///
/// # Errors
/// What may be wrong with the last of the addresses.
pub(super) async fn connect(
    driver: &str,
    addresses: &[SocketAddr],
    limit: Duration,
    progress: &Progress,
) -> Result<(SocketAddr, SocketAddr), String> {
    let name = host_of(driver);
    let limit = match addresses.len() {
        0 | 1 => limit,
        _ => limit.min(NEXT_ADDRESS),
    };
    let mut problems = String::new();
    for &address in addresses {
        let silent = Error::from(ErrorKind::TimedOut);
        progress.begin(unreachable(name, address, &silent));
        let connected = tokio::time::timeout(limit, TcpStream::connect(address)).await;
        let connected = connected.unwrap_or(Err(silent));
        match connected.and_then(|stream| stream.local_addr()) {
            Ok(local) => return Ok((address, local)),
            Err(error) => {
                let separator = if problems.is_empty() { "" } else { "; " };
                // Writing to a string cannot fail.
                let _ = write!(
                    problems,
                    "{separator}{}",
                    unreachable(name, address, &error)
                );
            }
        }
    }
    match problems.is_empty() {
        true => Err(format!("{name} has no address")),
        false => Err(problems),
    }
}

/// Says in one sentence what may be wrong if a connection to the driver fails with `error`. `name` is the driver's host
/// as this process was given it, and `address` is what it means on this machine.
///
/// ```
/// use std::io::ErrorKind;
///
/// use ps_runtime::cluster::unreachable;
///
/// let refused = ErrorKind::ConnectionRefused.into();
/// let sentence = unreachable("10.0.0.1", ([10, 0, 0, 1], 29500).into(), &refused);
/// assert!(sentence.starts_with("10.0.0.1 refuses connections to port 29500"), "{sentence}");
///
/// // Debian gives a machine's own name this address in `/etc/hosts`.
/// let sentence = unreachable("gpu-1", ([127, 0, 1, 1], 29500).into(), &refused);
/// assert!(sentence.contains("gpu-1 means 127.0.1.1 on this machine, which is this machine itself"));
/// ```
#[must_use]
pub fn unreachable(name: &str, address: SocketAddr, error: &Error) -> String {
    let (ip, port) = (address.ip(), address.port());
    let is_number = name.parse() == Ok(ip);
    let mut sentence = match error.kind() {
        ErrorKind::ConnectionRefused => format!(
            "{ip} refuses connections to port {port}: no driver listens there, or not yet, or a firewall rejects them"
        ),
        ErrorKind::TimedOut | ErrorKind::WouldBlock => format!(
            "nothing answers at {address}: a firewall drops the packets, the machine is off, or this is not the driver's \
             address"
        ),
        ErrorKind::NetworkUnreachable | ErrorKind::HostUnreachable => format!(
            "there is no way from this machine to {ip} ({error}): use an address in a network that both machines have"
        ),
        _ => format!("cannot connect to {address}: {error}"),
    };
    if !is_number {
        let advice = match ip.is_loopback() && name != "localhost" {
            true => {
                ", which is this machine itself; if the driver runs on another one, use its address, or correct /etc/hosts"
            }
            false => {
                "; if it means something else on the driver's machine, pass the driver's address in place of the name"
            }
        };
        // Writing to a string cannot fail.
        let _ = write!(sentence, " ({name} means {ip} on this machine{advice})");
    }
    sentence
}

/// Says that a name means nothing here.
pub(super) fn unresolved(name: &str, error: &Error) -> String {
    format!(
        "the driver's name {name} does not resolve on this machine ({error}): use an address, or a name that all machines \
         know (--master-addr, MASTER_ADDR or PS_RENDEZVOUS)"
    )
}

/// Log lines and certificates of machines whose clocks differ by more seconds than this are hard to use.
pub(super) const CLOCK_TOLERANCE: f64 = 1.0;

/// This machine's clock, in seconds since 1970.
pub(super) fn now() -> f64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.unwrap_or_default().as_secs_f64()
}

/// By how many seconds another clock is ahead at least. It was read while the own clock went from `asked` to `answered`.
pub(super) fn clock_difference(asked: f64, other: f64, answered: f64) -> f64 {
    (other - answered).max(0.0) - (asked - other).max(0.0)
}

/// The host of `host:port`.
pub(super) fn host_of(driver: &str) -> &str {
    let host = driver.rsplit_once(':').map_or(driver, |(host, _)| host);
    let bare = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'));
    bare.unwrap_or(host)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_of_an_address_has_no_brackets() {
        for (driver, host) in [
            ("gpu1:29500", "gpu1"),
            ("[fd00::1]:29500", "fd00::1"),
            ("10.0.0.1:1", "10.0.0.1"),
            ("gpu1", "gpu1"),
        ] {
            assert_eq!(host_of(driver), host);
        }
    }

    #[test]
    fn each_cause_has_its_sentence() {
        let address = SocketAddr::from(([10, 0, 0, 1], 29500));
        for (name, kind, part) in [
            (
                "10.0.0.1",
                ErrorKind::TimedOut,
                "nothing answers at 10.0.0.1:29500",
            ),
            (
                "10.0.0.1",
                ErrorKind::ConnectionRefused,
                "a firewall rejects them",
            ),
            (
                "10.0.0.1",
                ErrorKind::NetworkUnreachable,
                "no way from this machine to 10.0.0.1",
            ),
            (
                "gpu1",
                ErrorKind::TimedOut,
                "gpu1 means 10.0.0.1 on this machine",
            ),
        ] {
            let sentence = unreachable(name, address, &kind.into());
            assert!(
                sentence.contains(part),
                "{sentence:?} does not say {part:?}"
            );
        }
        let number = unreachable("10.0.0.1", address, &ErrorKind::TimedOut.into());
        assert!(!number.contains("means"), "{number}");
    }

    #[test]
    fn clocks_differ_only_by_what_the_time_of_the_call_does_not_explain() {
        for (asked, other, answered, expected) in [
            (10.0, 10.5, 11.0, 0.0),
            (10.0, 14.0, 11.0, 3.0),
            (10.0, 4.0, 11.0, -6.0),
        ] {
            assert_eq!(clock_difference(asked, other, answered), expected);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_obstacle_is_the_step_that_lasts_or_else_the_last_failure() {
        let progress = Progress::new();
        progress.begin("stuck".to_owned());
        assert_eq!(progress.obstacle(), "stuck");
        progress.failed("refused");
        tokio::time::advance(LASTING).await;
        assert_eq!(progress.obstacle(), "refused");
        progress.begin("stuck again".to_owned());
        assert_eq!(progress.obstacle(), "refused");
        tokio::time::advance(LASTING).await;
        assert_eq!(progress.obstacle(), "stuck again");
    }

    #[tokio::test]
    async fn a_port_that_nobody_listens_on_refuses() {
        // Held, so that no other process gets the port and listens.
        let held = tokio::net::TcpSocket::new_v4().unwrap();
        held.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = held.local_addr().unwrap();
        let progress = Progress::new();
        let driver = address.to_string();
        let limit = Duration::from_secs(5);
        let why = connect(&driver, &[address], limit, &progress).await;
        let why = why.unwrap_err();
        assert!(why.contains("refuses connections"), "{why}");
    }
}
