//! TLS between processes: certificates prove which processes belong to the cluster, and the connections
//! are encrypted.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::{AlertDescription, CertificateError, ClientConfig, RootCertStore, ServerConfig};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

/// The default for the name that all certificates of a cluster are issued for.
pub const DEFAULT_NAME: &str = "ps";

/// The certificates of one process. A clone shares them.
///
/// All processes of a cluster use certificates of one authority, which belongs to the cluster. The
/// certificates are issued for one name and not for addresses, because nodes may run on any host.
#[derive(Clone)]
pub struct Tls {
    acceptor: TlsAcceptor,
    connector: TlsConnector,
    name: ServerName<'static>,
    is_mutual: bool,
}

/// The paths of a process's certificates, which are PEM files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The certificate of the authority that has issued the certificates of all processes.
    pub authority: PathBuf,
    /// This process's certificate, followed by the certificates between it and the authority.
    pub certificate: PathBuf,
    /// The private key of the certificate.
    pub key: PathBuf,
    /// The name that the certificates are issued for.
    pub name: String,
    /// If `true`, only processes that have a certificate can connect. If `false`, the token decides.
    pub mutual: bool,
}

/// An error of the TLS library.
type Cause = Box<dyn std::error::Error + Send + Sync>;

/// Why certificates cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A file cannot be read, or does not contain what it should.
    #[error("could not read {what} from {path}")]
    File {
        /// What should be in the file, such as "a certificate".
        what: &'static str,
        /// The path of the file.
        path: PathBuf,
        /// Why it cannot be read.
        #[source]
        source: Cause,
    },
    /// The name is not a valid host name.
    #[error("`{name}` cannot be the name of a certificate")]
    Name {
        /// The name as it was given.
        name: String,
        /// Why it is not valid.
        #[source]
        source: Cause,
    },
    /// Certificate and key do not fit together, or the authority's certificate cannot be used.
    #[error("the certificates cannot be used")]
    Unusable(#[source] Cause),
    /// Other processes would refuse the certificate of this process.
    #[error(
        "{path} is not a valid certificate of the authority for `{name}`{}",
        clock_advice(source)
    )]
    NotValid {
        /// The path of the certificate.
        path: PathBuf,
        /// The name that the certificate must be issued for.
        name: String,
        /// Why the certificate is not valid.
        #[source]
        source: Cause,
    },
    /// The certificates of other processes cannot be checked against the authority.
    #[error("other processes cannot be checked against the authority")]
    Verifier(#[source] Cause),
}

impl Tls {
    /// Reads the certificates of this process.
    ///
    /// ```no_run
    /// use ps_runtime::cluster::ClusterConfig;
    /// use ps_runtime::net::tls::DEFAULT_NAME;
    /// use ps_runtime::net::{Tls, TlsFiles};
    ///
    /// let tls = Tls::from_files(&TlsFiles {
    ///     authority: "authority.pem".into(),
    ///     certificate: "node.pem".into(),
    ///     key: "node.key".into(),
    ///     name: DEFAULT_NAME.to_owned(),
    ///     mutual: true,
    /// })?;
    /// let config = ClusterConfig { tls: Some(tls), ..ClusterConfig::default() };
    /// # drop(config);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// When a file cannot be read, when certificate and key do not fit together, or when the certificate is
    /// not a valid one of the authority for the name.
    pub fn from_files(files: &TlsFiles) -> Result<Self, TlsError> {
        let authority = read_certificates(&files.authority, "the authority's certificate")?;
        let certificate = read_certificates(&files.certificate, "a certificate")?;
        let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|source| TlsError::File {
            what: "a private key",
            path: files.key.clone(),
            source: source.into(),
        })?;
        let name = ServerName::try_from(files.name.clone()).map_err(|source| TlsError::Name {
            name: files.name.clone(),
            source: source.into(),
        })?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut roots = RootCertStore::empty();
        for certificate in authority {
            roots.add(certificate).map_err(unusable)?;
        }
        let roots = Arc::new(roots);
        // Checked here, so that a mistake is an error now and not a process that no other can reach.
        let checked =
            WebPkiServerVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider));
        let (own, between) = certificate
            .split_first()
            .ok_or(rustls::Error::NoCertificatesPresented)
            .map_err(unusable)?;
        checked
            .build()
            .map_err(|error| TlsError::Verifier(error.into()))?
            .verify_server_cert(own, between, &name, &[], UnixTime::now())
            .map_err(|source| TlsError::NotValid {
                path: files.certificate.clone(),
                name: files.name.clone(),
                source: source.into(),
            })?;
        let versions = [&rustls::version::TLS13];
        let server = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&versions)
            .map_err(unusable)?;
        let server = match files.mutual {
            true => {
                let roots = Arc::clone(&roots);
                let verifier =
                    WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider));
                let verifier = verifier.build();
                let verifier = verifier.map_err(|error| TlsError::Verifier(error.into()))?;
                server.with_client_cert_verifier(verifier)
            }
            false => server.with_no_client_auth(),
        };
        let server = server
            .with_single_cert(certificate.clone(), key.clone_key())
            .map_err(unusable)?;
        let client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&versions)
            .map_err(unusable)?
            .with_root_certificates(roots)
            .with_client_auth_cert(certificate, key)
            .map_err(unusable)?;
        Ok(Self {
            acceptor: TlsAcceptor::from(Arc::new(server)),
            connector: TlsConnector::from(Arc::new(client)),
            name,
            is_mutual: files.mutual,
        })
    }

    /// Whether only processes that have a certificate can connect.
    #[must_use]
    pub fn is_mutual(&self) -> bool {
        self.is_mutual
    }

    pub(crate) async fn accept(&self, stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        Ok(self.acceptor.accept(stream).await?.into())
    }

    pub(crate) async fn connect(&self, stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        Ok(self
            .connector
            .connect(self.name.clone(), stream)
            .await?
            .into())
    }
}

/// Says in words what the error of a TLS handshake means, if another try would end in the same way.
pub(crate) fn explain(error: &(dyn std::error::Error + 'static)) -> Option<String> {
    let mut next = Some(error);
    let cause = loop {
        let error = next?;
        // An `io::Error` shows the source of the error that it holds, and not the error itself.
        let held = error
            .downcast_ref::<io::Error>()
            .and_then(io::Error::get_ref);
        let found = held.and_then(|held| held.downcast_ref::<rustls::Error>());
        if let Some(found) = found.or_else(|| error.downcast_ref()) {
            break found;
        }
        next = error.source();
    };
    let text = match cause {
        rustls::Error::InvalidCertificate(problem) => match problem {
            CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                "its certificate is from another authority: all processes need certificates of one authority (--tls-ca)"
            }
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                "its certificate is for another name: issue all certificates for the name in --tls-name"
            }
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                "its certificate has expired, by this machine's clock: issue a new one, or set the clock by NTP"
            }
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                "its certificate is not valid yet, by this machine's clock: set the clocks by NTP"
            }
            _ => return Some(format!("its certificate cannot be used: {cause}")),
        },
        rustls::Error::NoCertificatesPresented => {
            "it has no certificate: give it one (--tls-ca, --tls-cert, --tls-key)"
        }
        rustls::Error::InvalidMessage(_) => {
            "it does not speak TLS: give all processes certificates (--tls-ca, --tls-cert, --tls-key), or none"
        }
        rustls::Error::AlertReceived(alert) => match alert {
            AlertDescription::UnknownCA
            | AlertDescription::BadCertificate
            | AlertDescription::CertificateUnknown
            | AlertDescription::DecryptError => {
                "it does not accept this process's certificate: all processes need certificates of one authority (--tls-ca)"
            }
            AlertDescription::CertificateExpired => {
                "this process's certificate has expired, by the other machine's clock: issue a new one, or set the clock \
                 by NTP"
            }
            AlertDescription::CertificateRequired => {
                "it asks for a certificate: give this process one (--tls-ca, --tls-cert, --tls-key)"
            }
            _ => return None,
        },
        _ => return None,
    };
    Some(text.to_owned())
}

/// Advice for a certificate that is not valid at this time.
fn clock_advice(cause: &Cause) -> &'static str {
    match cause.downcast_ref() {
        Some(rustls::Error::InvalidCertificate(
            CertificateError::Expired
            | CertificateError::ExpiredContext { .. }
            | CertificateError::NotValidYet
            | CertificateError::NotValidYetContext { .. },
        )) => " at this time, by this machine's clock: issue a new one, or set the clock by NTP",
        _ => "",
    }
}

fn unusable(error: rustls::Error) -> TlsError {
    TlsError::Unusable(error.into())
}

fn read_certificates(
    path: &Path,
    what: &'static str,
) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let failed = |source: pem::Error| TlsError::File {
        what,
        path: path.to_owned(),
        source: source.into(),
    };
    let certificates = CertificateDer::pem_file_iter(path).map_err(failed)?;
    let certificates: Vec<_> = certificates.collect::<Result<_, _>>().map_err(failed)?;
    match certificates.is_empty() {
        true => Err(failed(pem::Error::NoItemsFound)),
        false => Ok(certificates),
    }
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls")
            .field("name", &self.name)
            .field("is_mutual", &self.is_mutual)
            .finish_non_exhaustive()
    }
}
