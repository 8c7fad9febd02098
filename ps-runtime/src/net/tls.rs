//! TLS between processes: who is there is proved by certificates, and nobody else can listen.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

/// The name that all certificates of a cluster are issued for, unless another is given.
pub const DEFAULT_NAME: &str = "ps";

/// Certificates of one process. Cloning shares them.
///
/// All processes of a cluster use certificates of one authority of their own. They are issued for
/// one name, not for addresses: nodes come and go, and where they are does not matter.
#[derive(Clone)]
pub struct Tls {
    acceptor: TlsAcceptor,
    connector: TlsConnector,
    name: ServerName<'static>,
    is_mutual: bool,
}

/// Where the certificates of a process are, as PEM files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The authority that has issued the certificates of all processes.
    pub authority: PathBuf,
    /// This process's certificate, with those between it and the authority.
    pub certificate: PathBuf,
    /// The private key of the certificate.
    pub key: PathBuf,
    /// The name that the certificates are issued for.
    pub name: String,
    /// Lets in only who has a certificate. Else whoever has the token.
    pub mutual: bool,
}

/// What the library below says.
type Cause = Box<dyn std::error::Error + Send + Sync>;

/// Why certificates cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A file cannot be read, or holds something else.
    #[error("could not read {what} from {path}")]
    File {
        /// What was looked for.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: Cause,
    },
    /// The name is no host name.
    #[error("`{name}` cannot be the name of a certificate")]
    Name {
        /// Which.
        name: String,
        /// Why.
        #[source]
        source: Cause,
    },
    /// Certificate and key do not fit, or the authority's certificate is of no use.
    #[error("the certificates cannot be used")]
    Unusable(#[source] Cause),
    /// The others would not believe this process.
    #[error("{path} is not a valid certificate of the authority for `{name}`")]
    NotValid {
        /// The certificate.
        path: PathBuf,
        /// The name that it has to be for.
        name: String,
        /// Why not.
        #[source]
        source: Cause,
    },
    /// Nobody could be checked against the authority.
    #[error("nobody can be checked against the authority")]
    Verifier(#[source] Cause),
}

impl Tls {
    /// Reads the certificates of this process.
    ///
    /// # Errors
    /// When a file cannot be read, or certificate and key do not fit.
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
        // A mistake shows here rather than as a process that nobody can reach.
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

    /// Whether only who has a certificate is let in.
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
