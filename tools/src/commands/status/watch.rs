//! `colo-ring status --watch`: a view of a receiver that stays open, of at most 80 columns.

use super::{guest, state};
use crate::control::ask;
use crate::options::ControlAddress;
use crate::output::{CommandError, print, table};
use colo_ring::metrics::{PauseFigures, display_nanoseconds};
use colo_ring::receiver::{Request, SessionStatus, StatusReport};
use colo_ring::text::{duration, mebibytes, seconds};
use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Duration;

/// How often it is drawn again.
const EVERY: Duration = Duration::from_secs(1);

/// Windows of 10 seconds that the curve shows.
const CURVE_WINDOWS: usize = 12;

/// Clears the screen, once.
const CLEAR: &str = "\x1b[2J";

/// Moves to the upper left corner.
const HOME: &str = "\x1b[H";

/// Clears what is behind, to the end of the line.
const REST_OF_LINE: &str = "\x1b[K";

/// Clears what is below.
const REST_OF_SCREEN: &str = "\x1b[J";

/// Shows the status again and again, until the receiver ends. Where standard output is no terminal, views follow each other.
///
/// # Errors
/// If the receiver does not answer, or standard output cannot be written.
pub(super) fn run(control: &ControlAddress) -> Result<ExitCode, CommandError> {
    let is_terminal = std::io::stdout().is_terminal();
    if is_terminal {
        print(CLEAR)?;
    }
    loop {
        let status: StatusReport = ask(control, &Request::Status)?;
        let view = view(&status);
        print(&match is_terminal {
            true => on_screen(&view),
            false => format!("{view}\n"),
        })?;
        std::thread::sleep(EVERY);
    }
}

fn on_screen(view: &str) -> String {
    let lines = view.lines().map(|line| format!("{line}{REST_OF_LINE}\n"));
    format!("{HOME}{}{REST_OF_SCREEN}", lines.collect::<String>())
}

fn view(status: &StatusReport) -> String {
    let mut text = format!(
        "colo-ring, up {}, guests' memory {} of at most {}\n\n",
        duration(status.uptime_ms / 1000),
        mebibytes(status.ram_held_bytes),
        mebibytes(status.ram_limit_bytes),
    );
    if status.sessions.is_empty() {
        text.push_str("no session\n");
        return text;
    }
    let head = [
        "session",
        "guest",
        "state",
        "age",
        "p50 now",
        "p99",
        "5 min",
        "p99 by 10 s",
    ];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    rows.extend(status.sessions.iter().map(row));
    text.push_str(&table(&rows));
    text.push_str("\np50, p99: pauses as the receiver sees them, of the last 10 to 20 s and of 5 minutes\n");
    text
}

fn row(session: &SessionStatus) -> Vec<String> {
    let recent = session.recent.clone().unwrap_or_default();
    let shown = |figures: PauseFigures, nanoseconds| match figures.checkpoints {
        0 => "-".to_owned(),
        _ => display_nanoseconds(nanoseconds),
    };
    let or_dash = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
    vec![
        session.session.to_string(),
        narrow(&guest(session)),
        state(session).to_owned(),
        or_dash(session.checkpoint_age_ms.map(seconds)),
        shown(recent.now, recent.now.p50_ns),
        shown(recent.now, recent.now.p99_ns),
        shown(recent.minutes, recent.minutes.p99_ns),
        curve(&recent.p99_ns),
    ]
}

/// A name that leaves room for a line of 80 columns.
fn narrow(name: &str) -> String {
    const MAX: usize = 10;
    match name.chars().count() > MAX {
        true => name.chars().take(MAX - 1).chain(['…']).collect(),
        false => name.to_owned(),
    }
}

/// The last windows as bars, the highest of which is the largest value.
fn curve(values: &[u64]) -> String {
    const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let shown = &values[values.len().saturating_sub(CURVE_WINDOWS)..];
    let max = shown.iter().copied().max().unwrap_or(0);
    let bar = |value: &u64| match *value {
        0 => ' ',
        value => {
            let step = u128::from(value) * 7 / u128::from(max.max(1));
            BARS[usize::try_from(step).unwrap_or(7).min(7)]
        }
    };
    shown.iter().map(bar).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_curve_has_its_highest_bar_at_the_largest_value() {
        assert_eq!(curve(&[]), "");
        assert_eq!(curve(&[0, 80, 10, 40]), " █▁▄");
        assert_eq!(curve(&[u64::MAX, 1]), "█▁");
        assert_eq!(curve(&[5; 40]).chars().count(), CURVE_WINDOWS);
    }
}
