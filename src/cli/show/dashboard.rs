//! Flags of the dashboard.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::exit;
use std::sync::Arc;

use ps_actors::actor::error_chain;
use ps_actors::launch::EXIT_CONFIG;
use ps_actors::net::{Token, TokenError};

use super::super::output::complain;
use super::super::say;
use crate::controls::Controls;
use crate::dashboard::{Dashboard, DashboardConfig};

/// The variable with the token, if no file is named.
const TOKEN: &str = "PS_DASHBOARD_TOKEN";

// No doc comment on this type: `--help` would take it for the program's own text.

#[allow(missing_docs, reason = "see above")]
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "What is shown")]
pub struct DashboardArgs {
    /// Show the training in the browser while it runs [default address: 127.0.0.1:8265].
    #[arg(long, value_name = "ADDR", num_args = 0..=1, default_missing_value = "127.0.0.1:8265")]
    pub dashboard: Option<SocketAddr>,
    /// Let everybody who knows the token in this file control the training: pause it, or change the learning
    /// rate. Needed if other hosts can reach the address [default: $PS_DASHBOARD_TOKEN].
    #[arg(long, value_name = "FILE", requires = "dashboard")]
    pub dashboard_token_file: Option<PathBuf>,
    /// A name of this host under which browsers ask for the dashboard. May be given several times.
    #[arg(long, value_name = "NAME", requires = "dashboard")]
    pub dashboard_host: Vec<String>,
}

impl DashboardArgs {
    /// Returns the observer that serves the page, if the user asks for one. `metrics` writes those of the exporter. Ends
    /// the process if the flags do not fit together.
    pub(super) fn observer(
        &self,
        controls: &Controls,
        metrics: Option<Arc<dyn Fn() -> String + Send + Sync>>,
    ) -> Option<Dashboard> {
        let address = self.dashboard?;
        let complained = |error: &dyn std::error::Error| -> ! {
            complain(&error_chain(error));
            exit(EXIT_CONFIG.into());
        };
        let token = match self.token() {
            Ok(token) => token,
            Err(error) => complained(&error),
        };
        let config = DashboardConfig {
            address,
            token,
            names: self.dashboard_host.clone(),
            metrics,
            on_ready: Arc::new(|address| say!("The dashboard is at http://{address}/")),
        };
        match Dashboard::new(config, controls) {
            Ok(dashboard) => Some(dashboard),
            Err(error) => complained(&error),
        }
    }

    fn token(&self) -> Result<Option<Token>, TokenError> {
        match &self.dashboard_token_file {
            Some(file) => Token::from_file(file).map(Some),
            None => std::env::var(TOKEN).ok().map(Token::new).transpose(),
        }
    }
}
