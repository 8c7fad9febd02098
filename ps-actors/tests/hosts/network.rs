//! A network of several hosts on one machine: a network namespace for each, and one more that is
//! the switch between them. Needs root and iproute2; some faults need nftables.

use std::path::Path;
use std::process::{self, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

/// What all names begin with; then come the process that made them, and the number of the network.
const PREFIX: &str = "ps-hosts";

/// Hosts 0 and up at 10.77.0.1 and up. Host 1 is behind port `h1` of the switch.
///
/// Its end removes everything, also after a panic. What a killed process has left behind, the next
/// one removes.
#[derive(Debug)]
pub(crate) struct Network {
    name: String,
    num_hosts: u32,
}

impl Network {
    /// Sets up hosts that reach each other.
    ///
    /// # Errors
    /// When this process may not, or the programs are missing; the error says which.
    pub(crate) fn new(num_hosts: u32) -> Result<Self, String> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        static SWEPT: OnceLock<Result<(), String>> = OnceLock::new();
        SWEPT.get_or_init(sweep).clone()?;
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let network = Self {
            name: format!("{PREFIX}.{}.{number}", process::id()),
            num_hosts,
        };
        let switch = network.switch();
        run("ip", &format!("netns add {switch}"))?;
        run("ip", &format!("-n {switch} link add br0 type bridge"))?;
        run("ip", &format!("-n {switch} link set br0 up"))?;
        for host in 0..num_hosts {
            let name = network.host(host);
            run("ip", &format!("netns add {name}"))?;
            // Both ends are born where they belong: no name is ever taken in our own namespace.
            run(
                "ip",
                &format!("-n {name} link add eth0 type veth peer name h{host} netns {switch}"),
            )?;
            run("ip", &format!("-n {switch} link set h{host} master br0 up"))?;
            let address = network.address(host);
            run("ip", &format!("-n {name} addr add {address}/24 dev eth0"))?;
            run("ip", &format!("-n {name} link set eth0 up"))?;
            run("ip", &format!("-n {name} link set lo up"))?;
        }
        Ok(network)
    }

    fn switch(&self) -> String {
        format!("{}.switch", self.name)
    }

    fn host(&self, host: u32) -> String {
        format!("{}.{host}", self.name)
    }

    pub(crate) fn address(&self, host: u32) -> String {
        format!("10.77.0.{}", host + 1)
    }

    /// This very program, on that host. Becomes the program without a process in between.
    pub(crate) fn command(&self, host: u32) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.host(host)]);
        command.arg(std::env::current_exe().unwrap());
        command
    }

    /// Cuts a host's cable, both ways.
    pub(crate) fn cut(&self, host: u32) {
        let switch = self.switch();
        run("ip", &format!("-n {switch} link set h{host} down")).unwrap();
    }

    /// Mends the cable.
    pub(crate) fn mend(&self, host: u32) {
        let switch = self.switch();
        run("ip", &format!("-n {switch} link set h{host} up")).unwrap();
    }

    /// Lets the switch drop the frames that match a rule of nftables: `iifname h1` are those that
    /// come from host 1, `oifname h1` those that go to it.
    ///
    /// # Errors
    /// When nftables is missing, or the kernel lacks what the rule needs.
    pub(crate) fn drop_frames(&self, matching: &str) -> Result<(), String> {
        self.nft("add table bridge faults")?;
        self.nft("add chain bridge faults forward { type filter hook forward priority 0 ; }")?;
        self.nft(&format!(
            "add rule bridge faults forward {matching} counter drop"
        ))?;
        Ok(())
    }

    /// Ends the effect of [`drop_frames`](Self::drop_frames).
    pub(crate) fn drop_no_frames(&self) {
        self.nft("delete table bridge faults").unwrap();
    }

    /// How many frames the switch has dropped because of [`drop_frames`](Self::drop_frames).
    pub(crate) fn num_dropped(&self) -> u64 {
        let rules = self.nft("list table bridge faults").unwrap();
        let mut words = rules.split_whitespace();
        words.find(|word| *word == "packets");
        words.next().and_then(|count| count.parse().ok()).unwrap()
    }

    fn nft(&self, words: &str) -> Result<String, String> {
        // Without `ip netns exec`'s own words around it, a missing program is known as such.
        run("nft", "--version")?;
        run("ip", &format!("netns exec {} nft {words}", self.switch()))
    }

    /// Makes a host's link slow, both ways: so many Mbit/s.
    ///
    /// # Errors
    /// When the kernel cannot.
    pub(crate) fn slow_down(&self, host: u32, rate: u32) -> Result<(), String> {
        for (namespace, device) in [
            (self.host(host), "eth0".to_owned()),
            (self.switch(), format!("h{host}")),
        ] {
            // The queue holds what takes 100 ms to send; what comes on top is dropped.
            let words = format!(
                "-n {namespace} qdisc add dev {device} root tbf rate {rate}mbit burst 64kb latency 100ms"
            );
            run("tc", &words)?;
        }
        Ok(())
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for host in 0..self.num_hosts {
            remove(&self.host(host));
        }
        remove(&self.switch());
    }
}

/// Removes what processes left behind that are gone; fails where there can be no namespaces.
fn sweep() -> Result<(), String> {
    let listed = Command::new("ip").args(["netns", "list"]).output();
    let listed = listed.map_err(|error| format!("ip (of iproute2): {error}"))?;
    for line in String::from_utf8_lossy(&listed.stdout).lines() {
        let name = line.split_whitespace().next().unwrap_or_default();
        let mut parts = name.split('.');
        let is_ours = parts.next() == Some(PREFIX);
        let maker = parts.next().unwrap_or_default();
        if is_ours && !Path::new("/proc").join(maker).exists() {
            remove(name);
        }
    }
    // Whether we may. And only one at a time prepares the directory of namespaces.
    let probe = format!("{PREFIX}.{}.probe", process::id());
    run("ip", &format!("netns add {probe}"))?;
    remove(&probe);
    Ok(())
}

/// Removes a namespace that may not be there.
fn remove(name: &str) {
    let _ = run("ip", &format!("netns del {name}"));
}

/// Runs a program to its end, and returns what it prints.
fn run(program: &str, words: &str) -> Result<String, String> {
    let output = Command::new(program)
        .args(words.split_whitespace())
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("{program}: {error}"))?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => {
            let why = String::from_utf8_lossy(&output.stderr);
            Err(format!("{program} {words}: {}", why.trim()))
        }
    }
}
