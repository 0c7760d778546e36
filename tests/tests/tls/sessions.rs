//! Sessions over TLS: what is committed is what was sent, with every backend, version and number of channels.

use crate::Running;
use colo_ring::ring::BackendKind;
use colo_ring_tests::hostile::HostilePrimary;
use colo_ring_tests::receiver::dump;
use colo_ring_tests::tls::{Authority, address, front, options};
use colo_ring_tools::primary::{Distribution, SynthOptions, SynthPrimary, Version};
use rustls::ClientConfig;
use std::sync::Arc;
use std::time::Duration;

/// Checkpoints of one session, each compared.
fn compare(running: &mut Running, through: &colo_ring_tools::tls::Front, channels: u8) {
    let shape = SynthOptions {
        ram_bytes: 4 << 20,
        channels,
        dirty_pages: Distribution::Fixed(300),
        interval: Duration::ZERO,
        uuid: [9; 16],
        ..SynthOptions::new(Version::V11_1)
    };
    let mut primary = SynthPrimary::connect(through.address(), &shape).expect("a session");
    let session = running.began();
    for _ in 0..4 {
        primary.checkpoint().expect("a checkpoint");
        let directory = tempfile::tempdir().expect("a directory");
        let dumped = dump(&running.receiver, session, directory.path()).expect("it has a checkpoint");
        for block in &dumped.blocks {
            let file = std::fs::read(directory.path().join(&block.file)).expect("a dumped file");
            let image = primary.image(&block.name).expect("its block");
            assert!(*image == *file, "block {} is not as it was sent", block.name);
        }
    }
    let status = running.status();
    let status = status.sessions.iter().find(|status| status.session == session);
    let status = status.expect("it runs");
    assert_eq!(
        status.identity.as_deref(),
        Some("CN=primary,O=colo-ring laboratory")
    );
    println!(
        "{channels} channels: {}",
        status.tls.as_deref().expect("it has TLS")
    );
    drop(primary);
    let end = running.ended();
    assert!(end.lost, "{:?}", end.end);
    assert!(end.end.expect("it has ended").contains("the primary went away"));
}

#[test]
fn sessions_with_every_backend() {
    let authority = Authority::new();
    for backend in [BackendKind::Uring, BackendKind::Epoll, BackendKind::Threads] {
        for channels in [0, 1, 4] {
            println!("{backend}, {channels} channels");
            let mut running = Running::start(options(backend, channels, authority.credentials(true, &[])));
            let through = authority.front("primary", address(&running.receiver));
            compare(&mut running, &through, channels);
            running.stop();
        }
    }
}

#[test]
fn sessions_with_each_version_and_cipher() {
    let authority = Authority::new();
    let mut running = Running::start(options(BackendKind::Uring, 2, authority.credentials(true, &[])));
    let config = authority.client("primary");
    let provider = config.crypto_provider().clone();
    let mut seen = Vec::new();
    for suite in &provider.cipher_suites {
        let version = match suite.tls13() {
            Some(_) => &rustls::version::TLS13,
            None => &rustls::version::TLS12,
        };
        // The receiver's key is one of ECDSA.
        if format!("{:?}", suite.suite()).contains("RSA") {
            continue;
        }
        let mut provider = (*provider).clone();
        provider.cipher_suites = vec![*suite];
        let client = ClientConfig::builder_with_provider(Arc::new(provider))
            .with_protocol_versions(&[version])
            .expect("a version")
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Anyone(config.crypto_provider().clone())));
        let directory = authority.directory("primary");
        let pem = |name: &str| std::fs::read(directory.join(name)).expect("a file");
        use rustls::pki_types::pem::PemObject;
        let chain = rustls::pki_types::CertificateDer::pem_slice_iter(&pem("client-cert.pem"))
            .collect::<Result<Vec<_>, _>>()
            .expect("a certificate");
        let key = rustls::pki_types::PrivateKeyDer::from_pem_slice(&pem("client-key.pem")).expect("a key");
        let client = client.with_client_auth_cert(chain, key).expect("a certificate");
        let through = front(Arc::new(client), address(&running.receiver));
        compare(&mut running, &through, 2);
        seen.push(suite.suite());
    }
    println!("{seen:?}");
    assert!(seen.len() >= 6, "{seen:?}");
    running.stop();
}

/// Takes every server: these tests are about the ciphers.
#[derive(Debug)]
struct Anyone(Arc<rustls::crypto::CryptoProvider>);

impl rustls::client::danger::ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _end_entity: &rustls::pki_types::CertificateDer<'_>,
        _intermediates: &[rustls::pki_types::CertificateDer<'_>],
        _name: &rustls::pki_types::ServerName<'_>,
        _ocsp: &[u8],
        _now: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &rustls::pki_types::CertificateDer<'_>,
        signed: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signed, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &rustls::pki_types::CertificateDer<'_>,
        signed: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[test]
fn wrong_bytes_are_found_where_they_are_also_with_tls() {
    let authority = Authority::new();
    let mut running = Running::start(options(BackendKind::Uring, 2, authority.credentials(true, &[])));
    let through = authority.front("primary", address(&running.receiver));
    let to = through.socket_address().expect("TCP");
    let mut primary = HostilePrimary::protected(to, 2);
    running.began();
    let (packet, byte) = (primary.channels[1].packets, primary.channels[1].bytes);
    primary.channels[1].send(&[0; 1344]);
    let end = running.ended();
    let text = end.end.expect("it has ended");
    let place = format!("channel 1, packet {packet}, byte {byte}: ");
    assert!(text.starts_with(&place), "{text}");
    assert!(end.checkpoint.is_some());
    running.stop();
}

#[test]
fn certificates_are_read_again() {
    let authority = Authority::new();
    let credentials = authority.credentials(true, &[]);
    let mut running = Running::start(options(BackendKind::Epoll, 0, credentials.clone()));
    let through = authority.front("primary", address(&running.receiver));
    let to = through.socket_address().expect("TCP");
    let mut first = HostilePrimary::protected(to, 0);
    running.began();
    let before = running.status().tls.expect("it has TLS");
    assert_eq!(before.validity.subject, "CN=receiver,O=colo-ring laboratory");
    // A certificate that is not there leaves the old one in force.
    let own = authority.directory("receiver").join("server-cert.pem");
    std::fs::write(&own, "nothing").expect("a file");
    let error = credentials.reload().expect_err("no certificate").to_string();
    assert!(
        error.contains("server-cert.pem: no certificate in PEM"),
        "{error}"
    );
    authority.make(&["--days", "30", "receiver", "receiver", "localhost", "127.0.0.1"]);
    let after = credentials.reload().expect("a certificate");
    assert!(after.expires_unix_s < before.validity.expires_unix_s);
    assert_eq!(running.status().tls.expect("it has TLS").validity, after);
    // Revoked meanwhile: no new session, and the one that runs goes on.
    authority.make(&["revoke", "primary"]);
    credentials.reload().expect("a list");
    let mut refused = HostilePrimary::connect(to, 0);
    running.warned("its certificate is refused: it is revoked (ca-crl.pem)");
    assert!(refused.main.is_closed());
    first.checkpoint(&[(0, 5, 0x55)]);
    running.stop();
}
