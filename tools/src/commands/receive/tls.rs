//! What the log says of the receiver's certificates, and reading them again.

use crate::output::tell;
use crate::tls::date;
use colo_ring::tls::{ServerCredentials, Validity};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// From so long before its end on, a certificate is warned of.
const EXPIRES_SOON: Duration = Duration::from_secs(14 * 24 * 3600);

/// Says what the TLS of this receiver is.
pub(super) fn tell_of(credentials: &ServerCredentials, serves_disks: bool) {
    let who = match (
        credentials.demands_certificate(),
        credentials.allowed().identities().len(),
    ) {
        (false, 0) => "any primary may connect".to_owned(),
        (_, 0) => "primaries with a certificate of its CA may connect".to_owned(),
        (_, count) => format!("{count} identities may connect"),
    };
    tell(&format!(
        "TLS on every connection, by {}: {who}; records are opened in this process, on the receiving cores",
        credentials.directory().display()
    ));
    if !credentials.demands_certificate() {
        tell("warning: --tls-verify-peer off: whoever can connect defines the memory of guests");
    }
    if serves_disks {
        tell("warning: --tls is for migrations and guards: disks are served without TLS");
    }
    tell_key(credentials);
    tell_validity(&credentials.validity());
}

fn tell_key(credentials: &ServerCredentials) {
    if credentials.is_key_open() {
        tell(&format!(
            "warning: others than its owner may read {}/server-key.pem, and with it take the place of this receiver: chmod 600",
            credentials.directory().display()
        ));
    }
}

fn tell_validity(validity: &Validity) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let soon = now + EXPIRES_SOON;
    let [now, soon] = [now, soon].map(|time| i64::try_from(time.as_secs()).unwrap_or(i64::MAX));
    let ends = [
        ("the certificate of this receiver", validity.expires_unix_s),
        ("a certificate of its CA", validity.ca_expires_unix_s),
    ];
    tell(&format!(
        "TLS: this receiver is {}, until {}",
        validity.subject,
        date(validity.expires_unix_s)
    ));
    for (what, end) in ends {
        if end <= now {
            tell(&format!(
                "warning: {what} has expired at {}: primaries refuse it",
                date(end)
            ));
        } else if end <= soon {
            tell(&format!("warning: {what} expires at {}", date(end)));
        }
    }
    if validity.begins_unix_s > now {
        tell(&format!(
            "warning: the certificate of this receiver is not valid before {}: is the clock right?",
            date(validity.begins_unix_s)
        ));
    }
    if let Some(next) = validity.crl_next_update_unix_s.filter(|next| *next <= now) {
        tell(&format!(
            "warning: ca-crl.pem is out of date: its CA was to publish another at {}. What it revokes stays revoked",
            date(next)
        ));
    }
}

/// Reads them again, at SIGHUP.
pub(super) fn reload(credentials: &ServerCredentials) {
    match credentials.reload() {
        Ok(validity) => {
            tell("SIGHUP: new connections have the certificates that are there now");
            tell_key(credentials);
            tell_validity(&validity);
        }
        Err(error) => tell(&format!("SIGHUP: the certificates in force stay: --tls: {error}")),
    }
}
