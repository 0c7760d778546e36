//! Whether the certificates of `--tls` can be used, and for how long.

use super::{Check, State};
use crate::tls::date;
use colo_ring::tls::{Allowed, KernelLack, KernelTls, ServerCredentials, Validity, client_validity};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// Days before its end in which a certificate is warned of.
const SOON_DAYS: i64 = 14;
const DAY_S: i64 = 24 * 3600;

/// Those of a receiver, or of a primary, whichever the directory has.
pub(super) fn checks(directory: &Path) -> Vec<Check> {
    let mut checks = Vec::new();
    let is_primary =
        directory.join("client-cert.pem").exists() && !directory.join("server-cert.pem").exists();
    let validity = match is_primary {
        true => client_validity(directory),
        false => {
            let credentials = ServerCredentials::load(directory, true, Allowed::default());
            credentials.map(|credentials| Some(credentials.validity()))
        }
    };
    match validity {
        Err(error) => checks.push(Check {
            item: "TLS",
            state: State::Missing,
            seen: error.to_string(),
            meaning: "neither a receiver nor a primary can use this directory".to_owned(),
            remedy: Some("scripts/make-certs DIR, or docs/tls.md for a CA of your own".to_owned()),
        }),
        Ok(None) => checks.push(Check {
            item: "TLS",
            state: State::Warn,
            seen: "a CA, and no certificate".to_owned(),
            meaning: "a receiver refuses primaries without one, unless --tls-verify-peer off".to_owned(),
            remedy: None,
        }),
        Ok(Some(validity)) => {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let now = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
            checks.extend(of(&validity, now));
        }
    }
    checks.push(records(KernelTls::probe()));
    checks
}

/// What opens records, and what the kernel could open.
fn records(kernel: Result<KernelTls, KernelLack>) -> Check {
    let kernel = match kernel {
        Ok(kernel) if kernel.follows_key_changes() => format!("this host's kernel could open {kernel}"),
        Ok(kernel) => format!("this host's kernel could open {kernel}, but follows no change of keys"),
        Err(lack) => lack.to_string(),
    };
    Check {
        item: "TLS records",
        state: State::Ok,
        seen: "opened in user space, on the receiving cores; kernel TLS is not used by this version"
            .to_owned(),
        meaning: kernel,
        remedy: None,
    }
}

fn of(validity: &Validity, now: i64) -> Vec<Check> {
    let ends = [
        (
            "TLS certificate",
            Some(validity.expires_unix_s),
            "expires",
            State::Missing,
        ),
        (
            "TLS CA",
            Some(validity.ca_expires_unix_s),
            "expires",
            State::Missing,
        ),
        (
            "TLS revocations",
            validity.crl_next_update_unix_s,
            "is to be renewed",
            State::Warn,
        ),
    ];
    let check = |(item, end, verb, at_end): (&'static str, Option<i64>, &str, State)| {
        let end = end?;
        let (state, meaning) = match end - now {
            left if left <= 0 => (at_end, "the other side refuses it, or should"),
            left if left <= SOON_DAYS * DAY_S => (State::Warn, "renew it, and send the receiver SIGHUP"),
            _ => (State::Ok, ""),
        };
        Some(Check {
            item,
            state,
            seen: format!("{verb} at {} ({} days)", date(end), (end - now) / DAY_S),
            meaning: meaning.to_owned(),
            remedy: None,
        })
    };
    let mut checks: Vec<_> = ends.into_iter().filter_map(check).collect();
    if let Some(own) = checks.first_mut() {
        own.seen = format!("{}, {}", validity.subject, own.seen);
    }
    checks
}

#[cfg(test)]
mod tests {
    use super::*;
    use colo_ring_tests::tls::Authority;

    #[test]
    fn certificates_that_expire_are_found() {
        let authority = Authority::new();
        let states = |name: &str| {
            let checks = checks(&authority.directory(name));
            checks
                .iter()
                .map(|check| (check.item, check.state))
                .collect::<Vec<_>>()
        };
        let well = [
            ("TLS certificate", State::Ok),
            ("TLS CA", State::Ok),
            ("TLS records", State::Ok),
        ];
        assert_eq!(states("receiver"), well);
        assert_eq!(states("primary"), well);
        authority.make(&["--days", "3", "receiver", "soon"]);
        assert_eq!(states("soon")[0], ("TLS certificate", State::Warn));
        authority.make(&["--days", "0", "primary", "old"]);
        assert_eq!(states("old")[0], ("TLS certificate", State::Missing));
        authority.make(&["revoke", "old"]);
        assert_eq!(states("receiver")[2], ("TLS revocations", State::Ok));
        assert_eq!(states("nothing")[0], ("TLS", State::Missing));
    }
}
