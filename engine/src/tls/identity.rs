//! Who is at the other end: what its certificate says, and whether that may connect.

use rustls::pki_types::CertificateDer;
use std::fmt::{self, Write};
use std::net::IpAddr;
use thiserror::Error;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::objects::{oid_registry, oid2abbrev};
use x509_parser::prelude::FromDer;
use x509_parser::x509::X509Name;

/// Names of a certificate that are kept: more are no identity of a host.
const NAMES_MAX: usize = 32;

/// Longest text that is kept of a name, in bytes.
const NAME_MAX: usize = 512;

/// A certificate that cannot be read.
#[derive(Debug, Error)]
#[error("its certificate cannot be read: {0}")]
pub struct UnreadableCertificate(String);

/// The subject of a certificate, and its other names. Two of them are equal if they name the same peer: certificates are renewed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The subject and the issuer as they are: what is shown of them may be the same of two.
    subject_and_issuer: Vec<u8>,
    /// The parts of the distinguished name as text, like `CN=host1`, in the certificate's order.
    parts: Vec<String>,
    /// Subject alternative names, sorted: host names, addresses, URIs, mail addresses.
    names: Vec<String>,
}

/// A part of a distinguished name, with what would separate parts escaped (RFC 4514).
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for (at, character) in text.chars().enumerate() {
        let is_edge =
            (at == 0 && matches!(character, ' ' | '#')) || (at + 1 == text.len() && character == ' ');
        if is_edge || matches!(character, ',' | '+' | '"' | '\\' | '<' | '>' | ';' | '=') {
            out.push('\\');
        }
        match character.is_control() {
            // Never into a line of the log.
            true => drop(write!(out, "\\{:02X}", u32::from(character))),
            false => out.push(character),
        }
    }
    out
}

fn hex(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        // A string takes all that is written to it.
        let _ = write!(out, "{byte:02x}");
    }
    out
}

fn cut(mut text: String) -> String {
    if text.len() > NAME_MAX {
        let end = (0..=NAME_MAX).rev().find(|at| text.is_char_boundary(*at));
        text.truncate(end.unwrap_or(0));
    }
    text
}

pub(super) fn parts(name: &X509Name<'_>) -> Vec<String> {
    let part = |rdn: &x509_parser::x509::RelativeDistinguishedName<'_>| {
        let attributes = rdn.iter().map(|attribute| {
            let oid = attribute.attr_type();
            let key = oid2abbrev(oid, oid_registry()).map_or_else(|_| oid.to_id_string(), str::to_owned);
            match attribute.as_str() {
                Ok(text) => format!("{key}={}", escaped(text)),
                // As RFC 4514 has it for what is no text.
                Err(_) => format!("{key}=#{}", hex(attribute.as_slice())),
            }
        });
        cut(attributes.collect::<Vec<_>>().join("+"))
    };
    name.iter_rdn().take(NAMES_MAX).map(part).collect()
}

fn address(bytes: &[u8]) -> Option<String> {
    let address = match bytes.len() {
        4 => IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?),
        16 => IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?),
        _ => return None,
    };
    Some(address.to_string())
}

impl Identity {
    /// What a certificate says.
    ///
    /// # Errors
    /// If it is none.
    pub fn of(certificate: &CertificateDer<'_>) -> Result<Self, UnreadableCertificate> {
        let unreadable = |error: &dyn fmt::Display| UnreadableCertificate(error.to_string());
        let (_, certificate) = X509Certificate::from_der(certificate).map_err(|error| unreadable(&error))?;
        let names = certificate
            .subject_alternative_name()
            .map_err(|error| unreadable(&error))?;
        let names = names.map(|names| {
            let text = |name: &GeneralName<'_>| match name {
                GeneralName::DNSName(name) => Some(name.to_ascii_lowercase()),
                GeneralName::URI(name) | GeneralName::RFC822Name(name) => Some((*name).to_owned()),
                GeneralName::IPAddress(bytes) => address(bytes),
                _ => None,
            };
            let names = names.value.general_names.iter().take(NAMES_MAX);
            let mut names: Vec<_> = names.filter_map(text).map(|name| cut(escaped(&name))).collect();
            names.sort();
            names
        });
        Ok(Self {
            subject_and_issuer: [certificate.subject().as_raw(), certificate.issuer().as_raw()].concat(),
            parts: parts(certificate.subject()),
            names: names.unwrap_or_default(),
        })
    }

    /// One with this common name.
    #[cfg(test)]
    pub(crate) fn named(name: &str) -> Self {
        Self {
            subject_and_issuer: Vec::new(),
            parts: vec![format!("CN={name}")],
            names: Vec::new(),
        }
    }

    fn subject(&self, parts: impl Iterator<Item = impl AsRef<str>>) -> String {
        let parts: Vec<_> = parts.map(|part| part.as_ref().to_owned()).collect();
        parts.join(",")
    }

    /// Whether this text names it: its distinguished name, in either order of its parts (tools differ), or one of its other names.
    fn is(&self, wanted: &str) -> bool {
        let wanted = normal(wanted);
        let is_subject = !self.parts.is_empty()
            && (self.subject(self.parts.iter().rev()) == wanted || self.subject(self.parts.iter()) == wanted);
        is_subject || self.names.iter().any(|name| name.eq_ignore_ascii_case(&wanted))
    }
}

/// Without the spaces that some tools write behind a comma, and around the first `=`.
fn normal(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let (mut is_start, mut is_escaped) = (true, false);
    for character in text.trim().chars() {
        if is_start && character == ' ' {
            continue;
        }
        is_start = character == ',' && !is_escaped;
        is_escaped = character == '\\' && !is_escaped;
        out.push(character);
    }
    out
}

impl fmt::Display for Identity {
    /// As QEMU and GnuTLS write a distinguished name, the last part first; else its first other name.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.parts.is_empty(), self.names.first()) {
            (false, _) => f.write_str(&self.subject(self.parts.iter().rev())),
            (true, Some(name)) => f.write_str(name),
            (true, None) => f.write_str("a certificate without a name"),
        }
    }
}

/// Which identities may connect: those of `--tls-allow`, or every one that the CA has signed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Allowed(Vec<String>);

impl Allowed {
    /// These; all where there are none.
    pub fn new(identities: Vec<String>) -> Self {
        Self(identities)
    }

    /// As they were given.
    pub fn identities(&self) -> &[String] {
        &self.0
    }

    /// Whether a peer may connect.
    pub fn has(&self, identity: Option<&Identity>) -> bool {
        self.0.is_empty() || identity.is_some_and(|identity| self.0.iter().any(|wanted| identity.is(wanted)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        Identity {
            subject_and_issuer: Vec::new(),
            parts: ["C=GB", "O=Example Home", "CN=host1"].map(str::to_owned).to_vec(),
            names: ["10.0.0.7", "host1.example.org"].map(str::to_owned).to_vec(),
        }
    }

    #[test]
    fn a_peer_is_known_by_each_of_its_names_and_by_no_part_of_one() {
        let identity = identity();
        let text = "CN=host1,O=Example Home,C=GB";
        assert_eq!(identity.to_string(), text);
        let named = |name: &str| Allowed::new(vec!["other".to_owned(), name.to_owned()]).has(Some(&identity));
        for name in [
            text,
            "C=GB,O=Example Home,CN=host1",
            "CN=host1, O=Example Home, C=GB",
            "host1.example.org",
            "HOST1.example.org",
            "10.0.0.7",
        ] {
            assert!(named(name), "{name}");
        }
        for name in [
            "CN=host1",
            "host1",
            "example.org",
            "C=GB,CN=host1,O=Example Home",
            "",
            "10.0.0.70",
        ] {
            assert!(!named(name), "{name}");
        }
        assert!(Allowed::default().has(None) && Allowed::default().has(Some(&identity)));
        assert!(!Allowed::new(vec!["x".into()]).has(None));
    }

    #[test]
    fn a_name_cannot_be_made_to_look_like_another() {
        assert_eq!(escaped("a,CN=b"), "a\\,CN\\=b");
        assert_eq!(escaped(" a\n"), "\\ a\\0A");
        assert_eq!(normal("CN=a\\, b, O=c"), "CN=a\\, b,O=c");
    }
}
