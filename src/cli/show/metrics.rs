//! `--metrics` and `--dashboard`: one exporter for all trainings of this process, in the driver only.

use std::net::SocketAddr;
use std::process::exit;
use std::sync::OnceLock;

use axum::Router;
use ps_actors::launch::{EXIT_CONFIG, env};
use ps_actors::net::Token;

use super::super::{RANK, output};
use crate::metrics::{Exporter, MetricsListener};
use crate::observe::Observer;

/// It lives as long as the process, so the last numbers can still be fetched after a training.
static EXPORTER: OnceLock<Exporter> = OnceLock::new();

/// Serves the exporter at the address of `--metrics`.
static LISTENER: OnceLock<MetricsListener> = OnceLock::new();

/// Reads an address. A name would have to mean the same to all processes.
pub(super) fn address(text: &str) -> Result<SocketAddr, String> {
    let numbers = text.replace("localhost", "127.0.0.1");
    numbers.parse().map_err(|_| {
        "write an IP address of this machine and a port, such as 127.0.0.1:9464".to_owned()
    })
}

/// Returns the exporter, and makes it if there is none. `None` in a node.
pub(super) fn exporter() -> Option<&'static Exporter> {
    let is_driver = RANK.get().is_none_or(|&rank| rank == 0);
    is_driver.then(|| EXPORTER.get_or_init(Exporter::new))
}

/// Makes an observer that feeds the exporter; begins to serve at the address, if there is one and nobody has. `None`
/// in a node. Ends the process if this is not possible.
pub(super) fn observer(address: Option<SocketAddr>) -> Option<Box<dyn Observer>> {
    let exporter = exporter()?;
    if let Some(address) = address {
        LISTENER.get_or_init(|| start(exporter, address));
    }
    Some(Box::new(exporter.observer()))
}

/// The routes of the exporter, for the port of the driver. None if there is no exporter.
pub(in super::super) fn routes() -> Router {
    EXPORTER.get().map(Exporter::routes).unwrap_or_default()
}

/// Returns what writes the metrics as text, for the dashboard. `None` in a node.
#[cfg(feature = "dashboard")]
pub(super) fn text() -> Option<std::sync::Arc<dyn Fn() -> String + Send + Sync>> {
    let exporter = exporter()?.clone();
    Some(std::sync::Arc::new(move || exporter.render()))
}

fn start(exporter: &Exporter, address: SocketAddr) -> MetricsListener {
    let token = match address.ip().is_loopback() {
        // Only processes of this machine can connect.
        true => None,
        false => token(),
    };
    let is_open = token.is_none() && !address.ip().is_loopback();
    match exporter.listen(address, token) {
        Ok(listener) => {
            let address = listener.address();
            tracing::info!("metrics are at http://{address}/metrics");
            if is_open {
                tracing::warn!(
                    "anybody who can connect to {address} can read the metrics; set PS_TOKEN to ask for it"
                );
            }
            listener
        }
        Err(error) => end(&format!(
            "cannot serve metrics at {address} (--metrics): {error}; choose an address of this machine and a free port"
        )),
    }
}

fn token() -> Option<Token> {
    match env::read(env::TOKEN).map(Token::new) {
        None => None,
        Some(Ok(token)) => Some(token),
        Some(Err(error)) => end(&format!("PS_TOKEN cannot be used: {error}")),
    }
}

fn end(error: &str) -> ! {
    output::complain(error);
    exit(EXIT_CONFIG.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_a_number_and_a_port() {
        for (text, expected) in [
            ("127.0.0.1:9464", "127.0.0.1:9464"),
            ("localhost:1", "127.0.0.1:1"),
            ("[::1]:9464", "[::1]:9464"),
            ("0.0.0.0:0", "0.0.0.0:0"),
        ] {
            assert_eq!(address(text), Ok(expected.parse().unwrap()));
        }
        for text in [
            "",
            "9464",
            ":9464",
            "127.0.0.1",
            "host:9464",
            "127.0.0.1:99999",
        ] {
            let error = address(text).unwrap_err();
            assert!(error.contains("127.0.0.1:9464"), "{text}: {error}");
        }
    }
}
