//! Certificates and keys in a directory, under the names that QEMU gives them.

use super::identity::{Allowed, parts};
use super::verifier::Bounded;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use rustls::server::{NoServerSessionStorage, VerifierBuilderError, WebPkiClientVerifier};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use thiserror::Error;
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer;
use x509_parser::revocation_list::CertificateRevocationList;

const CA: &str = "ca-cert.pem";
const CRL: &str = "ca-crl.pem";
const SERVER_CERTIFICATE: &str = "server-cert.pem";
const SERVER_KEY: &str = "server-key.pem";

/// Those of QEMU's GnuTLS that are safe.
const VERSIONS: &[&rustls::SupportedProtocolVersion] = &[&rustls::version::TLS13, &rustls::version::TLS12];

/// Largest file that is read.
const FILE_MAX: u64 = 4 << 20;

/// Why credentials cannot be used.
#[derive(Debug, Error)]
pub enum CredentialsError {
    /// A file cannot be read.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The error of the system.
        source: std::io::Error,
    },
    /// A file has not what it should have.
    #[error("{}: {reason}", path.display())]
    Contents {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// They do not fit together.
    #[error("{}: {reason}", directory.display())]
    Unfit {
        /// The directory.
        directory: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

/// When what the credentials consist of expires: seconds since 1970.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Validity {
    /// The subject of the own certificate.
    pub subject: String,
    /// From when on it is valid.
    pub begins_unix_s: i64,
    /// Until when it is valid.
    pub expires_unix_s: i64,
    /// Until when the first of the CA's certificates is valid.
    pub ca_expires_unix_s: i64,
    /// When the CA was to publish its next list of revoked certificates, where there is one.
    pub crl_next_update_unix_s: Option<i64>,
}

/// Which end the files are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Server,
    Client,
}

/// What the files of a directory have.
pub(super) struct Files {
    directory: PathBuf,
    roots: Arc<RootCertStore>,
    revoked: Vec<CertificateRevocationListDer<'static>>,
    /// None of a client without one.
    own: Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>,
    validity: Option<Validity>,
}

/// The provider of all cryptography.
pub(super) fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

/// Has the calling thread's source of random numbers made, which asks the system for more than a confined thread may.
pub(crate) fn begin_random_numbers() {
    // It fails only where a handshake would, too, and then with a reason.
    let _ = provider().secure_random.fill(&mut [0; 32]);
}

fn read(path: &Path) -> Result<Vec<u8>, CredentialsError> {
    let failed = |source| CredentialsError::File {
        path: path.to_owned(),
        source,
    };
    let length = std::fs::metadata(path).map_err(failed)?.len();
    if length > FILE_MAX {
        return Err(contents(path, &"more than 4 MiB"));
    }
    std::fs::read(path).map_err(failed)
}

fn contents(path: &Path, reason: &dyn fmt::Display) -> CredentialsError {
    CredentialsError::Contents {
        path: path.to_owned(),
        reason: reason.to_string(),
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, CredentialsError> {
    let pem = read(path)?;
    let all = CertificateDer::pem_slice_iter(&pem).collect::<Result<Vec<_>, _>>();
    match all.map_err(|error| contents(path, &error))? {
        none if none.is_empty() => Err(contents(path, &"no certificate in PEM")),
        some => Ok(some),
    }
}

fn parsed<'a>(
    path: &Path,
    certificate: &'a CertificateDer<'_>,
) -> Result<X509Certificate<'a>, CredentialsError> {
    let parsed = X509Certificate::from_der(certificate);
    parsed
        .map(|(_, certificate)| certificate)
        .map_err(|error| contents(path, &error))
}

impl Files {
    fn read(directory: &Path, end: End) -> Result<Self, CredentialsError> {
        let path = |name: &str| directory.join(name);
        let ca = path(CA);
        let mut roots = RootCertStore::empty();
        let mut ca_expires = i64::MAX;
        for certificate in certificates(&ca)? {
            ca_expires = ca_expires.min(parsed(&ca, &certificate)?.validity().not_after.timestamp());
            roots.add(certificate).map_err(|error| contents(&ca, &error))?;
        }
        let (revoked, crl_next_update) = match path(CRL) {
            // A link that leads nowhere, or what may not be seen, is not the same as no list.
            crl if crl
                .symlink_metadata()
                .is_err_and(|error| error.kind() == ErrorKind::NotFound) =>
            {
                (Vec::new(), None)
            }
            crl => revoked(&crl)?,
        };
        let (certificate, key) = match end {
            End::Server => (path(SERVER_CERTIFICATE), path(SERVER_KEY)),
            End::Client => (path("client-cert.pem"), path("client-key.pem")),
        };
        let (mut own, mut validity) = (None, None);
        if end == End::Server || certificate.exists() {
            let chain = certificates(&certificate)?;
            let first = parsed(&certificate, &chain[0])?;
            validity = Some(Validity {
                subject: parts(first.subject())
                    .into_iter()
                    .rev()
                    .collect::<Vec<_>>()
                    .join(","),
                begins_unix_s: first.validity().not_before.timestamp(),
                expires_unix_s: first.validity().not_after.timestamp(),
                ca_expires_unix_s: ca_expires,
                crl_next_update_unix_s: crl_next_update,
            });
            let secret = PrivateKeyDer::from_pem_slice(&read(&key)?);
            let secret = secret.map_err(|error| {
                contents(
                    &key,
                    &format!("no private key in PEM that is not encrypted ({error})"),
                )
            })?;
            own = Some((chain, secret));
        }
        Ok(Self {
            directory: directory.to_owned(),
            roots: Arc::new(roots),
            revoked,
            own,
            validity,
        })
    }

    fn unfit(directory: &Path, reason: &dyn fmt::Display) -> CredentialsError {
        CredentialsError::Unfit {
            directory: directory.to_owned(),
            reason: reason.to_string(),
        }
    }

    fn server(self, demands_certificate: bool) -> Result<(ServerConfig, Validity), CredentialsError> {
        let directory = self.directory;
        let unfit = |reason: &dyn fmt::Display| Self::unfit(&directory, reason);
        let mut verifier = WebPkiClientVerifier::builder_with_provider(self.roots, provider());
        if !self.revoked.is_empty() {
            // A list is one CA's: certificates of another, without a list, are not revoked.
            verifier = verifier.with_crls(self.revoked).allow_unknown_revocation_status();
        }
        if !demands_certificate {
            verifier = verifier.allow_unauthenticated();
        }
        let verifier = verifier
            .build()
            .map_err(|error: VerifierBuilderError| unfit(&error))?;
        let config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(VERSIONS)
            .map_err(|error| unfit(&error))?
            .with_client_cert_verifier(Arc::new(Bounded(verifier)));
        let (Some((chain, key)), Some(validity)) = (self.own, self.validity) else {
            return Err(unfit(&"no certificate of the server"));
        };
        let mut config = config.with_single_cert(chain, key).map_err(|error| {
            unfit(&format!(
                "server-cert.pem and server-key.pem do not fit together: {error}"
            ))
        })?;
        // Each connection has a handshake of its own; nothing of one is kept for another.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        // The receiving cores decrypt.
        config.enable_secret_extraction = true;
        Ok((config, validity))
    }

    /// A client's configuration with these versions, whose keys a test may know.
    #[cfg(all(test, not(loom), not(miri)))]
    pub(super) fn client_with(
        directory: &Path,
        versions: &[&'static rustls::SupportedProtocolVersion],
    ) -> ClientConfig {
        let mut config = Self::read(directory, End::Client)
            .unwrap()
            .client(versions)
            .unwrap();
        config.enable_secret_extraction = true;
        config
    }

    fn client(
        self,
        versions: &[&'static rustls::SupportedProtocolVersion],
    ) -> Result<ClientConfig, CredentialsError> {
        let directory = self.directory;
        let unfit = |reason: &dyn fmt::Display| Self::unfit(&directory, reason);
        let config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(versions)
            .map_err(|error| unfit(&error))?
            .with_root_certificates(self.roots);
        match self.own {
            None => Ok(config.with_no_client_auth()),
            Some((chain, key)) => config.with_client_auth_cert(chain, key).map_err(|error| {
                unfit(&format!(
                    "client-cert.pem and client-key.pem do not fit together: {error}"
                ))
            }),
        }
    }
}

type Revoked = (Vec<CertificateRevocationListDer<'static>>, Option<i64>);

fn revoked(path: &Path) -> Result<Revoked, CredentialsError> {
    let pem = read(path)?;
    let lists = CertificateRevocationListDer::pem_slice_iter(&pem).collect::<Result<Vec<_>, _>>();
    let lists = lists.map_err(|error| contents(path, &error))?;
    let mut next = None;
    for list in &lists {
        let (_, list) = CertificateRevocationList::from_der(list).map_err(|error| contents(path, &error))?;
        let update = list.next_update().map(|time| time.timestamp());
        next = [next, update].into_iter().flatten().min();
    }
    match lists.is_empty() {
        true => Err(contents(path, &"no list of revoked certificates in PEM")),
        false => Ok((lists, next)),
    }
}

/// What new connections are accepted with.
struct InForce {
    config: Arc<ServerConfig>,
    validity: Validity,
}

/// The credentials of a receiver. They can be read again while it runs: connections that exist stay as they are.
pub struct ServerCredentials {
    directory: PathBuf,
    demands_certificate: bool,
    allowed: Allowed,
    in_force: RwLock<InForce>,
}

impl fmt::Debug for ServerCredentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Nothing of the key.
        let mut shown = f.debug_struct("ServerCredentials");
        shown.field("directory", &self.directory).finish_non_exhaustive()
    }
}

fn load(directory: &Path, demands_certificate: bool) -> Result<InForce, CredentialsError> {
    let (config, validity) = Files::read(directory, End::Server)?.server(demands_certificate)?;
    Ok(InForce {
        config: Arc::new(config),
        validity,
    })
}

impl ServerCredentials {
    /// Reads `ca-cert.pem`, `server-cert.pem`, `server-key.pem` and, if it is there, `ca-crl.pem`.
    ///
    /// # Errors
    /// If one of them cannot be used.
    pub fn load(
        directory: &Path,
        demands_certificate: bool,
        allowed: Allowed,
    ) -> Result<Self, CredentialsError> {
        Ok(Self {
            in_force: RwLock::new(load(directory, demands_certificate)?),
            directory: directory.to_owned(),
            demands_certificate,
            allowed,
        })
    }

    /// Reads the files again. What is wrong with them leaves the old ones in force. Whether anything has changed.
    ///
    /// # Errors
    /// If they cannot be used.
    pub fn reload(&self) -> Result<Validity, CredentialsError> {
        let new = load(&self.directory, self.demands_certificate)?;
        let validity = new.validity.clone();
        let is_gone = validity.crl_next_update_unix_s.is_none();
        if is_gone && self.validity().crl_next_update_unix_s.is_some() {
            let reason = "the list of revoked certificates is gone, which would make them valid again: put one there, or start the receiver again";
            return Err(contents(&self.directory.join(CRL), &reason));
        }
        *self.in_force.write().unwrap_or_else(PoisonError::into_inner) = new;
        Ok(validity)
    }

    /// Where they are.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Where its files are: the directory, and those that its links lead to.
    pub(crate) fn directories(&self) -> Vec<PathBuf> {
        let files = [CA, CRL, SERVER_CERTIFICATE, SERVER_KEY].map(|name| self.directory.join(name));
        let real = files
            .iter()
            .filter_map(|file| Some(file.canonicalize().ok()?.parent()?.to_owned()));
        let mut all: Vec<_> = real.chain([self.directory.clone()]).collect();
        all.sort();
        all.dedup();
        all
    }

    /// Whether others than its owner may read the key of the receiver.
    pub fn is_key_open(&self) -> bool {
        let key = std::fs::metadata(self.directory.join(SERVER_KEY));
        key.is_ok_and(|key| key.permissions().mode() & 0o077 != 0)
    }

    /// Whether a client must have a certificate.
    pub fn demands_certificate(&self) -> bool {
        self.demands_certificate
    }

    /// Which clients may connect.
    pub fn allowed(&self) -> &Allowed {
        &self.allowed
    }

    /// When they expire.
    pub fn validity(&self) -> Validity {
        let in_force = self.in_force.read().unwrap_or_else(PoisonError::into_inner);
        in_force.validity.clone()
    }

    /// For a new connection.
    pub(super) fn config(&self) -> Arc<ServerConfig> {
        let in_force = self.in_force.read().unwrap_or_else(PoisonError::into_inner);
        in_force.config.clone()
    }
}

/// When a client's certificate expires; none without one.
///
/// # Errors
/// If its files cannot be used.
pub fn client_validity(directory: &Path) -> Result<Option<Validity>, CredentialsError> {
    let files = Files::read(directory, End::Client)?;
    let validity = files.validity.clone();
    files.client(VERSIONS)?;
    Ok(validity)
}

/// What a client connects with: `ca-cert.pem`, and `client-cert.pem` with `client-key.pem` if they are there.
///
/// # Errors
/// If one of them cannot be used.
pub fn client_config(directory: &Path) -> Result<Arc<ClientConfig>, CredentialsError> {
    Ok(Arc::new(Files::read(directory, End::Client)?.client(VERSIONS)?))
}
