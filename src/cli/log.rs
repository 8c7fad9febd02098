//! Log lines on standard error.

use std::fmt;

use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::format::{Format, FormatEvent, FormatFields, Full, Writer};
use tracing_subscriber::fmt::{FmtContext, layer};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt as _;

use super::output::{LogWriter, complain};

/// Turns logging on, unless the program has done so itself.
pub(super) fn start(role: Option<String>) {
    let lines = layer()
        .with_writer(|| LogWriter)
        // It would print to the very output that cannot be written, and panic.
        .log_internal_errors(false)
        .event_format(WithRole {
            role,
            format: Format::default(),
        });
    let selected = selected(std::env::var("RUST_LOG").ok().as_deref());
    // An error means that there is a logger already.
    let _ = tracing_subscriber::registry()
        .with(selected)
        .with(lines)
        .try_init();
}

/// Which lines are wanted. What cannot be understood is said, and then it is `info`.
fn selected(wanted: Option<&str>) -> Targets {
    let usual = Targets::new().with_default(LevelFilter::INFO);
    let Some(wanted) = wanted.filter(|wanted| !wanted.trim().is_empty()) else {
        return usual;
    };
    wanted.parse().unwrap_or_else(|error| {
        complain(&format!(
            "RUST_LOG={wanted:?} is not understood ({error}): write a level or target=level, separated by \
             commas; logging at level info"
        ));
        usual
    })
}

/// Puts the process's role before each line.
struct WithRole {
    role: Option<String>,
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
        if let Some(role) = &self.role {
            write!(writer, "{role}: ")?;
        }
        self.format.format_event(context, writer, event)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tracing::Level;

    #[test]
    fn rust_log_selects_by_level_and_module() {
        let by_module = selected(Some("warn,ps_runtime=debug"));
        assert!(by_module.would_enable("ps_runtime::net", &Level::DEBUG));
        assert!(!by_module.would_enable("ps::trainer", &Level::INFO));
        for usual in [None, Some(" "), Some("ps=loud")] {
            let usual = selected(usual);
            assert!(usual.would_enable("ps::trainer", &Level::INFO));
            assert!(!usual.would_enable("ps::trainer", &Level::DEBUG));
        }
    }
}
