//! TLS: only processes that have a certificate of the cluster's authority can join.

use std::path::Path;
use std::time::Duration;

use ps_runtime::ActorRef;
use ps_runtime::cluster::{Cluster, ClusterConfig, ClusterError, Node, Transport};
use ps_runtime::codec::Bulk;
use ps_runtime::net::tls::DEFAULT_NAME;
use ps_runtime::net::{NetConfig, Tls, TlsError, TlsFiles};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tempfile::TempDir;

use super::world::{Add, Counter, Echo, LOCAL, SOON, World, config, hosts};

/// An authority, and the files of one process with a certificate of it.
struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    directory: TempDir,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let issuer = CertifiedIssuer::self_signed(params, key).unwrap();
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("ca.pem"), issuer.pem()).unwrap();
        Self { issuer, directory }
    }

    fn files(&self, name: &str, mutual: bool) -> TlsFiles {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let write = |file: &str, text: String| {
            let path = self.directory.path().join(file);
            std::fs::write(&path, text).unwrap();
            path
        };
        TlsFiles {
            authority: self.directory.path().join("ca.pem"),
            certificate: write("cert.pem", certificate.pem()),
            key: write("key.pem", key.serialize_pem()),
            name: DEFAULT_NAME.to_owned(),
            mutual,
        }
    }

    fn tls(&self, mutual: bool) -> Tls {
        Tls::from_files(&self.files(DEFAULT_NAME, mutual)).unwrap()
    }
}

fn with_tls(tls: Option<Tls>) -> ClusterConfig {
    ClusterConfig {
        tls,
        ..config(Transport::Tcp)
    }
}

#[test]
fn calls_pass_through_tls_unchanged() {
    let authority = Authority::new();
    for mutual in [false, true] {
        let world = World::new(with_tls(Some(authority.tls(mutual))), 1);
        let counter: ActorRef<Counter> = world.cluster.spawn(1).wait().unwrap();
        assert!(!counter.is_local());
        assert_eq!(counter.ask(Add(1)).wait_timeout(SOON).unwrap(), 2);
        let sent: Vec<f32> = (0..500_001).map(|i| i as f32).collect();
        let echoed = counter.ask(Echo(Bulk::from(sent.clone())));
        assert!(echoed.wait_timeout(SOON).unwrap()[..] == sent);
    }
}

#[test]
fn who_has_no_certificate_of_the_authority_does_not_get_in() {
    let authority = Authority::new();
    let world = World::new(with_tls(Some(authority.tls(true))), 1);
    let other = Authority::new();
    for tls in [None, Some(other.tls(true))] {
        let (what, has_tls) = (format!("{tls:?}"), tls.is_some());
        let config = ClusterConfig {
            join_timeout: SOON,
            net: NetConfig::default().with_process_lease(Duration::from_millis(500)),
            ..with_tls(tls)
        };
        let node = Node::new(config, 2, 0, world.driver(), hosts());
        let outcome = node.serve().wait();
        // Waiting would not change that, so the node ends at once and says why.
        let part = match has_tls {
            true => "another authority",
            false => "TLS",
        };
        let refused = matches!(
            &outcome,
            Err(ClusterError::Refused { reason, .. }) if reason.contains(part)
        );
        assert!(refused, "{what}: {outcome:?}");
    }
    let counter: ActorRef<Counter> = world.cluster.spawn(1).wait().unwrap();
    assert_eq!(counter.ask(Add(1)).wait_timeout(SOON).unwrap(), 2);
}

#[test]
fn certificates_for_both_sides_open_a_driver_to_other_hosts() {
    let anywhere = (std::net::Ipv4Addr::UNSPECIFIED, LOCAL.port()).into();
    let authority = Authority::new();
    let open = |tls| Cluster::listen(with_tls(tls), anywhere, hosts());
    assert!(matches!(open(None), Err(ClusterError::NoToken(_))));
    // The server proves its identity, but any process may call it.
    let one_sided = open(Some(authority.tls(false)));
    assert!(matches!(one_sided, Err(ClusterError::NoToken(_))));
    open(Some(authority.tls(true))).unwrap();
}

/// Otherwise the process would join, but no other process could connect to it.
#[test]
fn a_certificate_that_the_others_would_not_believe_is_refused_at_the_start() {
    let (authority, other) = (Authority::new(), Authority::new());
    let refused = |files: &TlsFiles| {
        let error = Tls::from_files(files).unwrap_err();
        assert!(matches!(error, TlsError::NotValid { .. }), "{error:?}");
    };
    refused(&authority.files("somebody-else", true));
    let mut files = authority.files(DEFAULT_NAME, true);
    files.authority = other.files(DEFAULT_NAME, true).authority;
    refused(&files);
}

#[test]
fn files_that_are_no_certificates_are_named() {
    let authority = Authority::new();
    let good = authority.files(DEFAULT_NAME, true);
    let broken = authority.directory.path().join("broken.pem");
    std::fs::write(&broken, "nothing").unwrap();
    let fails = |files: &TlsFiles, path: &Path| match Tls::from_files(files) {
        Err(TlsError::File { path: named, .. }) => assert_eq!(named, path),
        other => panic!("{other:?}"),
    };
    for path in [&broken, &authority.directory.path().join("missing.pem")] {
        let path = path.clone();
        fails(
            &TlsFiles {
                authority: path.clone(),
                ..good.clone()
            },
            &path,
        );
        fails(
            &TlsFiles {
                certificate: path.clone(),
                ..good.clone()
            },
            &path,
        );
        fails(
            &TlsFiles {
                key: path.clone(),
                ..good.clone()
            },
            &path,
        );
    }
    let error = Tls::from_files(&TlsFiles {
        name: "not a name".to_owned(),
        ..good
    });
    assert!(matches!(error, Err(TlsError::Name { .. })), "{error:?}");
}
