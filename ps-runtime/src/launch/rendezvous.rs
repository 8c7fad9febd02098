//! The address that rank 0 listens on: a host, by name or number, and a port.

use std::fmt;
use std::net::{Ipv6Addr, SocketAddr};
use std::str::FromStr;

use super::error::LaunchError;

/// The port that is used if none is given. It is PyTorch's default for `MASTER_PORT`.
pub const DEFAULT_PORT: u16 = 29500;

const HOST_FORM: &str = "a host is a name, an IPv4 or an IPv6 address";
const LINK_LOCAL: &str = "it works only on one link; use a global or fd00:: address";

/// A host and a port. The host is not resolved yet.
///
/// The text form is `host:port`. An IPv6 address is written in brackets. Link-local addresses (`fe80::`) are
/// refused: a process would also have to know the interface, which has another name on each machine.
///
/// ```
/// use ps_runtime::launch::Rendezvous;
///
/// let rendezvous: Rendezvous = "[fd00::1]:29500".parse()?;
/// assert_eq!((rendezvous.host(), rendezvous.port()), ("fd00::1", 29500));
/// # Ok::<(), ps_runtime::launch::LaunchError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Rendezvous {
    host: String,
    port: u16,
}

impl Rendezvous {
    /// The host, without brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The port. It is never 0.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Joins a host from `variable` with a port.
    pub(super) fn new(variable: &'static str, host: &str, port: u16) -> Result<Self, LaunchError> {
        let bad = |problem| LaunchError::BadAddress {
            variable,
            value: host.to_owned(),
            problem,
        };
        let trimmed = host.trim();
        let bare = trimmed
            .strip_prefix('[')
            .and_then(|inner| inner.strip_suffix(']'))
            .unwrap_or(trimmed);
        let is_word = |text: &str| {
            let allowed = |c: char| c.is_alphanumeric() || matches!(c, '.' | '-' | '_');
            !text.is_empty() && text.chars().all(allowed)
        };
        // `fe80::1%eth0` names the interface of a link-local address.
        let address = bare.split('%').next().unwrap_or(bare);
        if let Ok(address) = address.parse::<Ipv6Addr>()
            && address.is_unicast_link_local()
        {
            return Err(bad(LINK_LOCAL));
        }
        let is_ipv6 = bare.parse::<Ipv6Addr>().is_ok();
        let is_name = is_word(bare);
        if is_ipv6 || (is_name && bare == trimmed) {
            Ok(Self {
                host: bare.to_owned(),
                port: check_port(variable, port)?,
            })
        } else if bare.contains("://") {
            Err(bad("write no scheme before the host"))
        } else if bare.contains(':') {
            Err(bad("the port goes elsewhere, here is only the host"))
        } else {
            Err(bad(HOST_FORM))
        }
    }

    /// Reads `host:port` from `variable`.
    pub(super) fn parse(variable: &'static str, value: &str) -> Result<Self, LaunchError> {
        let bad = |problem| LaunchError::BadAddress {
            variable,
            value: value.to_owned(),
            problem,
        };
        let trimmed = value.trim();
        let Some((host, port)) = trimmed.rsplit_once(':') else {
            return Err(bad("write host:port"));
        };
        if host.contains(':') && !host.starts_with('[') {
            return Err(bad("write host:port, an IPv6 address as [address]:port"));
        }
        let port = parse_port(variable, port)?;
        Self::new(variable, host, port).map_err(|error| match error {
            LaunchError::BadAddress {
                problem: LINK_LOCAL,
                ..
            } => bad(LINK_LOCAL),
            _ => bad(HOST_FORM),
        })
    }
}

/// Reads a port from `variable`.
pub(super) fn parse_port(variable: &'static str, value: &str) -> Result<u16, LaunchError> {
    let port = value.trim().parse().map_err(|_| LaunchError::BadPort {
        variable,
        value: value.to_owned(),
        problem: "a port is a number from 1 to 65535",
    })?;
    check_port(variable, port)
}

fn check_port(variable: &'static str, port: u16) -> Result<u16, LaunchError> {
    if port == 0 {
        return Err(LaunchError::BadPort {
            variable,
            value: port.to_string(),
            problem: "0 lets the system choose, and then the other ranks would not know it",
        });
    }
    Ok(port)
}

impl fmt::Display for Rendezvous {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl FromStr for Rendezvous {
    type Err = LaunchError;

    fn from_str(value: &str) -> Result<Self, LaunchError> {
        Self::parse("address", value)
    }
}

impl From<SocketAddr> for Rendezvous {
    /// Converts the address of a listener. Its port must be known, so it must not be 0.
    fn from(address: SocketAddr) -> Self {
        Self {
            host: address.ip().to_string(),
            port: address.port(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[track_caller]
    fn check(value: &str, expected: Result<(&str, u16), &str>) {
        let found = value.parse::<Rendezvous>().map_err(|e| e.to_string());
        match expected {
            Ok((host, port)) => {
                let found = found.unwrap();
                assert_eq!((found.host(), found.port()), (host, port));
            }
            Err(part) => {
                let error = found.unwrap_err();
                assert!(error.contains(part), "{error:?} does not say {part:?}");
            }
        }
    }

    #[test]
    fn an_address_is_a_host_and_a_port() {
        check("gpu003:29500", Ok(("gpu003", 29500)));
        check(" 10.0.0.7:1 ", Ok(("10.0.0.7", 1)));
        check(
            "train-0.svc_x.cluster.local:65535",
            Ok(("train-0.svc_x.cluster.local", 65535)),
        );
        check("[::1]:80", Ok(("::1", 80)));
    }

    #[test]
    fn a_bad_address_says_what_to_write() {
        check("gpu003", Err("write host:port"));
        check("", Err("write host:port"));
        check("::1:80", Err("[address]:port"));
        check("gpu003:0", Err("is no port: 0 lets the system choose"));
        check("gpu003:65536", Err("from 1 to 65535"));
        check("gpu003:http", Err("from 1 to 65535"));
        check(":80", Err("a host is"));
        check("[gpu003]:80", Err("a host is"));
        check("a b:80", Err("a host is"));
        check("tcp://gpu003:80", Err("write host:port"));
        check("[::1:80", Err("a host is"));
        check(
            "[fe80::1]:80",
            Err("only on one link; use a global or fd00::"),
        );
        check("[fe80::1%eth0]:80", Err("only on one link"));
        check("[fd00::1%eth0]:80", Err("a host is"));
    }

    #[test]
    fn a_host_alone_may_be_an_ipv6_address_with_or_without_brackets() {
        for host in ["::1", "[::1]"] {
            let rendezvous = Rendezvous::new("MASTER_ADDR", host, 7).unwrap();
            assert_eq!(rendezvous.to_string(), "[::1]:7");
        }
        let error = Rendezvous::new("MASTER_ADDR", "fe80::1%eth0", 7).unwrap_err();
        assert!(error.to_string().contains("only on one link"));
        let error = Rendezvous::new("MASTER_ADDR", "gpu003:80", 7).unwrap_err();
        assert!(error.to_string().contains("only the host"));
        let error = Rendezvous::new("MASTER_ADDR", "tcp://gpu003", 7).unwrap_err();
        assert!(error.to_string().contains("no scheme"));
    }

    #[test]
    fn the_address_of_a_listener_is_one() {
        for text in ["127.0.0.1:4000", "[::1]:4000"] {
            let address: SocketAddr = text.parse().unwrap();
            assert_eq!(Rendezvous::from(address), text.parse().unwrap());
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text: String) {
            if let Ok(rendezvous) = text.parse::<Rendezvous>() {
                prop_assert_eq!(rendezvous.to_string().parse(), Ok(rendezvous));
            }
        }
    }
}
