//! the token is in no log and no debug output. In a process of its own, because it listens to
//! all that is logged.

use std::fmt::{Debug, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use ps_runtime::cluster::{Cluster, ClusterConfig, Hosts, Node, NodeExit, Transport};
use ps_runtime::net::Token;
use tracing::field::{Field, Visit};
use tracing::{Event, Metadata, Subscriber, span};

static LOG: Mutex<String> = Mutex::new(String::new());

/// Writes down everything, at every level.
struct Listener;

struct Writer<'a>(MutexGuard<'a, String>);

impl Writer<'_> {
    fn new(metadata: &Metadata<'_>) -> Self {
        let mut log = LOG.lock().unwrap();
        writeln!(log, "{metadata:?}").unwrap();
        Self(log)
    }
}

impl Visit for Writer<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        writeln!(self.0, "{field}: {value:?}").unwrap();
    }
}

impl Subscriber for Listener {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, span: &span::Attributes<'_>) -> span::Id {
        span.record(&mut Writer::new(span.metadata()));
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &Event<'_>) {
        event.record(&mut Writer::new(event.metadata()));
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

#[test]
fn the_token_is_never_shown() {
    const SECRETS: [&str; 2] = ["the-token-of-this-cluster", "what-a-stranger-tries-to-say"];
    tracing::subscriber::set_global_default(Listener).unwrap();
    let config = |secret| ClusterConfig {
        token: Some(Token::new(secret).unwrap()),
        transport: Transport::Tcp,
        join_timeout: Duration::from_millis(100),
        ..ClusterConfig::default()
    };
    let [ours, strange] = SECRETS.map(config);
    let local = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0);
    let cluster = Cluster::listen(ours.clone(), local, Hosts::new()).unwrap();
    let driver = cluster.address().unwrap().to_string();
    let node = Node::new(ours.clone(), 1, 0, &driver, Hosts::new());
    let mut shown = format!("{ours:?} {cluster:?} {node:?}");
    let node = node.serve();
    cluster
        .wait_for_nodes(1, Duration::from_secs(60))
        .wait()
        .unwrap();
    let stranger = Node::new(strange, 2, 0, &driver, Hosts::new());
    write!(shown, "{stranger:?}").unwrap();
    let refused = stranger.serve().wait().unwrap_err();
    write!(shown, "{refused} {refused:?}").unwrap();
    assert!(shown.contains("401"), "{shown}");
    write!(shown, "{:?} {cluster:?}", cluster.nodes()).unwrap();
    cluster.release().wait();
    assert_eq!(node.wait().unwrap(), NodeExit::Released);
    drop(cluster);

    let log = LOG.lock().unwrap();
    assert!(log.contains("a node has joined"), "{log}");
    let refusal = log
        .find("refused a connection")
        .expect("it names whom it does not know");
    let refusal: Vec<_> = log[refusal..].lines().take(3).collect();
    let refusal = refusal.join(" ");
    assert!(
        refusal.contains("peer: 127.0.0.1:") && refusal.contains("another token"),
        "{refusal}"
    );
    for secret in SECRETS {
        assert!(!log.contains(secret), "{log}");
        assert!(!shown.contains(secret), "{shown}");
    }
}
