//! What becomes of a line of the log: text on standard error, with the time on a terminal; a line of JSON; or an entry of the journal
//! with fields, where standard error leads there.
//!
//! | field of the journal | key of JSON | |
//! |---|---|---|
//! | `MESSAGE` | `message` | the line, without `warning:` |
//! | `PRIORITY` | `level` | 3 `error`, 4 `warning`, 6 `info` |
//! | `SESSION` | `session` | the receiver's number, in lines about one session |
//! | `GUEST` | `guest` | its guest's name, where it has one |
//! | `PEER`, `CHECKPOINT` | `peer`, `checkpoint` | in lines about a session's beginning and end |
//! | `STATE` | `state` | in lines that say how a session stands now |

use clap::{Args, ValueEnum};
use colo_ring::receiver::SessionTitle;
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Map, Value};
use std::ffi::OsStr;
use std::io::IsTerminal;
use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::OnceLock;
use std::time::SystemTime;

/// Where journald takes entries.
const JOURNAL: &str = "/run/systemd/journal/socket";

/// How a command logs.
#[derive(Clone, Copy, Debug, Args)]
pub struct LogArgs {
    /// How lines of the log are written: `auto` is entries with fields where standard error leads to journald, else text, with the time on
    /// a terminal; `json` is an object a line
    #[arg(long, value_enum, default_value_t = LogFormat::Auto)]
    log_format: LogFormat,

    /// Least severe lines of the log that are written
    #[arg(long, value_enum, default_value_t = Level::Info)]
    log_level: Level,
}

/// A form of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// What fits standard error
    Auto,
    /// Text
    Text,
    /// JSON
    Json,
}

/// How severe a line is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// The command fails
    Error,
    /// Something is not as it should be
    Warning,
    /// What happens
    Info,
}

impl Level {
    /// As syslog(3) counts.
    fn priority(self) -> u8 {
        match self {
            Self::Error => 3,
            Self::Warning => 4,
            Self::Info => 6,
        }
    }

    /// That of a line, by how it begins, and the line without that.
    pub(crate) fn of(line: &str) -> (Self, &str) {
        let begins = [
            ("colo-ring: ", Self::Error),
            ("warning: ", Self::Warning),
            ("WARNING: ", Self::Warning),
        ];
        let known = begins
            .into_iter()
            .find_map(|(begin, level)| Some((level, line.strip_prefix(begin)?)));
        known.unwrap_or((Self::Info, line))
    }
}

/// What is known of a line beside its text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Fields {
    pub(crate) session: Option<u32>,
    pub(crate) guest: Option<String>,
    pub(crate) peer: Option<String>,
    pub(crate) checkpoint: Option<u64>,
    pub(crate) state: Option<&'static str>,
}

impl Fields {
    /// Of a line about a session.
    pub(crate) fn of(session: &SessionTitle) -> Self {
        let name = session.name.as_ref().map(ToString::to_string);
        Self {
            session: Some(session.session),
            guest: name.or_else(|| session.uuid.map(|uuid| uuid.to_string())),
            ..Self::default()
        }
    }

    /// Completed by what the line itself says: `session 3: …`, `session 3 ended …`.
    fn with_session_of(self, line: &str) -> Self {
        let named = line.strip_prefix("session ").map(|rest| {
            let end = rest.find(|letter: char| !letter.is_ascii_digit());
            &rest[..end.unwrap_or(rest.len())]
        });
        let session = self.session.or(named.and_then(|number| number.parse().ok()));
        Self { session, ..self }
    }

    fn named(&self) -> impl Iterator<Item = (&'static str, Value)> {
        let all = [
            ("session", self.session.map(Value::from)),
            ("guest", self.guest.clone().map(Value::from)),
            ("peer", self.peer.clone().map(Value::from)),
            ("checkpoint", self.checkpoint.map(Value::from)),
            ("state", self.state.map(Value::from)),
        ];
        all.into_iter().filter_map(|(name, value)| Some((name, value?)))
    }
}

static FORM: OnceLock<Form> = OnceLock::new();

/// A form that fits.
#[derive(Debug)]
struct Form {
    kind: Kind,
    level: Level,
}

#[derive(Debug)]
enum Kind {
    Text,
    Timed,
    Json,
    Journal(UnixDatagram),
}

/// A line that is ready to be written.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// To standard error.
    Text(String),
    /// To the journal, or as the text if it does not take it.
    Journal(Vec<u8>, String),
}

/// Chooses the form. To be called before the process is confined, once.
pub(crate) fn begin(args: LogArgs) {
    let kind = match args.log_format {
        LogFormat::Text => Kind::Text,
        LogFormat::Json => Kind::Json,
        LogFormat::Auto => journal().map_or_else(
            || match std::io::stderr().is_terminal() {
                true => Kind::Timed,
                false => Kind::Text,
            },
            Kind::Journal,
        ),
    };
    let level = args.log_level;
    // A second choice would be of the same arguments.
    let _ = FORM.set(Form { kind, level });
}

/// The journal, if standard error leads there.
fn journal() -> Option<UnixDatagram> {
    let stream = std::env::var_os("JOURNAL_STREAM")?;
    let about = rustix::fs::fstat(std::io::stderr().as_fd()).ok()?;
    if !is_stream(&stream, about.st_dev, about.st_ino) {
        return None;
    }
    connect(Path::new(JOURNAL)).ok()
}

fn connect(journal: &Path) -> std::io::Result<UnixDatagram> {
    let socket = UnixDatagram::unbound()?;
    socket.connect(journal)?;
    Ok(socket)
}

/// Whether `JOURNAL_STREAM` names the file with these numbers.
fn is_stream(stream: &OsStr, device: u64, inode: u64) -> bool {
    stream.to_str() == Some(&format!("{device}:{inode}"))
}

/// Sends an entry. Returns whether the journal has taken it.
pub(crate) fn send(entry: &[u8]) -> bool {
    match FORM.get().map(|form| &form.kind) {
        Some(Kind::Journal(socket)) => socket.send(entry).is_ok(),
        _ => false,
    }
}

/// A line in the form that was chosen, or as text if none was; none if it is not severe enough.
pub(crate) fn entry(line: &str, fields: Fields) -> Option<Entry> {
    let Some(form) = FORM.get() else {
        return Some(Entry::Text(format!("{line}\n")));
    };
    form.entry(line, fields, SystemTime::now())
}

impl Form {
    fn entry(&self, line: &str, fields: Fields, now: SystemTime) -> Option<Entry> {
        let (level, message) = Level::of(line);
        if level > self.level {
            return None;
        }
        let fields = fields.with_session_of(message);
        Some(match &self.kind {
            Kind::Text => Entry::Text(format!("{line}\n")),
            Kind::Timed => Entry::Text(format!("{} {line}\n", humantime::format_rfc3339_seconds(now))),
            Kind::Json => Entry::Text(json(level, message, &fields, now) + "\n"),
            Kind::Journal(_) => Entry::Journal(for_journal(level, message, &fields), format!("{line}\n")),
        })
    }
}

fn json(level: Level, message: &str, fields: &Fields, now: SystemTime) -> String {
    let mut object = Map::new();
    let time = humantime::format_rfc3339_millis(now).to_string();
    object.insert("time".to_owned(), time.into());
    object.insert("level".to_owned(), level_name(level).into());
    object.insert("message".to_owned(), message.into());
    object.extend(fields.named().map(|(name, value)| (name.to_owned(), value)));
    Value::Object(object).to_string()
}

fn level_name(level: Level) -> &'static str {
    match level {
        Level::Error => "error",
        Level::Warning => "warning",
        Level::Info => "info",
    }
}

/// In journald's own protocol.
fn for_journal(level: Level, message: &str, fields: &Fields) -> Vec<u8> {
    let mut entry = Vec::new();
    let mut add = |name: &str, value: &str| {
        entry.extend(name.as_bytes());
        // A value of several lines has its length before it.
        if value.contains('\n') {
            entry.push(b'\n');
            entry.extend((value.len() as u64).to_le_bytes());
        } else {
            entry.push(b'=');
        }
        entry.extend(value.as_bytes());
        entry.push(b'\n');
    };
    add("MESSAGE", message);
    add("PRIORITY", &level.priority().to_string());
    add("SYSLOG_IDENTIFIER", "colo-ring");
    for (name, value) in fields.named() {
        let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        add(&name.to_ascii_uppercase(), &text);
    }
    entry
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, UNIX_EPOCH};

    fn form(kind: Kind, level: Level) -> Form {
        Form { kind, level }
    }

    fn text(form: &Form, line: &str, fields: Fields) -> String {
        let now = UNIX_EPOCH + Duration::from_millis(1_700_000_000_250);
        match form.entry(line, fields, now) {
            Some(Entry::Text(text)) => text,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_line_has_the_form_that_was_chosen() {
        let line = "warning: session 12: pages come late";
        let plain = form(Kind::Text, Level::Info);
        assert_eq!(text(&plain, line, Fields::default()), format!("{line}\n"));
        let timed = form(Kind::Timed, Level::Info);
        let with_time = format!("2023-11-14T22:13:20Z {line}\n");
        assert_eq!(text(&timed, line, Fields::default()), with_time);
        let fields = Fields {
            guest: Some("web\"3".to_owned()),
            checkpoint: Some(7),
            ..Fields::default()
        };
        let value: Value = serde_json::from_str(&text(&form(Kind::Json, Level::Info), line, fields)).unwrap();
        let expected = serde_json::json!({
            "time": "2023-11-14T22:13:20.250Z", "level": "warning", "message": "session 12: pages come late",
            "session": 12, "guest": "web\"3", "checkpoint": 7
        });
        assert_eq!(value, expected);
    }

    #[test]
    fn what_is_not_severe_enough_is_left_out() {
        let form = form(Kind::Text, Level::Warning);
        let is_written = |line: &str| form.entry(line, Fields::default(), UNIX_EPOCH).is_some();
        assert!(is_written("colo-ring: no"));
        assert!(is_written("WARNING: no"));
        assert!(!is_written("listening on tcp:[::1]:4444"));
    }

    #[test]
    fn the_journal_gets_fields() {
        let fields = Fields {
            session: Some(3),
            peer: Some("192.0.2.7:1".to_owned()),
            ..Fields::default()
        };
        let entry = for_journal(Level::Error, "a\nb", &fields);
        let mut expected = b"MESSAGE\n\x03\0\0\0\0\0\0\0a\nb\nPRIORITY=3\n".to_vec();
        expected.extend(b"SYSLOG_IDENTIFIER=colo-ring\nSESSION=3\nPEER=192.0.2.7:1\n");
        assert_eq!(entry, expected);
        assert!(is_stream(OsStr::new("9:1234"), 9, 1234));
        assert!(!is_stream(OsStr::new("9:1234"), 9, 12345));
        let directory = tempfile::tempdir().unwrap();
        let journal = UnixDatagram::bind(directory.path().join("journal")).unwrap();
        let socket = connect(&directory.path().join("journal")).unwrap();
        let form = form(Kind::Journal(socket), Level::Info);
        match form.entry("session 1 began", Fields::default(), UNIX_EPOCH) {
            Some(Entry::Journal(entry, text)) => {
                assert_eq!(text, "session 1 began\n");
                let Kind::Journal(socket) = &form.kind else {
                    panic!("it is one")
                };
                socket.send(&entry).unwrap();
            }
            other => panic!("{other:?}"),
        }
        let mut bytes = [0; 256];
        let length = journal.recv(&mut bytes).unwrap();
        assert!(bytes[..length].ends_with(b"SESSION=1\n"));
    }
}
