//! `colo-ring status --watch`: a view of a receiver that stays open. It has at most 80 columns, and no more lines than the terminal.

use super::{guest, state};
use crate::control::ask;
use crate::options::ControlAddress;
use crate::output::{COLUMNS, CommandError, draw, print, table, wrapped};
use colo_ring::metrics::{PauseFigures, display_nanoseconds};
use colo_ring::receiver::{Request, SessionState, SessionStatus, StatusReport};
use colo_ring::text::{duration, mebibytes, printable_lines, seconds};
use rustix::termios::tcgetwinsize;
use std::cmp::Reverse;
use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// How often it is drawn again.
const EVERY: Duration = Duration::from_secs(1);

/// Windows of 10 seconds that the curve shows.
const CURVE_WINDOWS: usize = 10;

/// Longest name of a guest, so that a line has 80 columns.
const GUEST_MAX: usize = 10;

/// Lines of a view beside those of sessions: the receiver's and the table's head, the legend, and what separates them.
const OTHER_LINES: usize = 5;

/// Clears the screen, once.
const CLEAR: &str = "\x1b[2J";

/// Moves to the upper left corner.
const HOME: &str = "\x1b[H";

/// Clears what is behind, to the end of the line.
const REST_OF_LINE: &str = "\x1b[K";

/// Clears what is below.
const REST_OF_SCREEN: &str = "\x1b[J";

/// What the receiver has said.
enum Answer {
    Status(Box<StatusReport>),
    /// It does not answer, as while it is restarted.
    None {
        error: String,
        /// Since the last answer.
        for_so_long: Duration,
    },
}

/// Lines and columns of a view.
#[derive(Clone, Copy)]
struct Room {
    lines: usize,
    columns: usize,
}

impl Room {
    /// What the terminal has; where standard output is none, as many lines as there are.
    fn find() -> Self {
        match tcgetwinsize(std::io::stdout()) {
            Ok(size) if size.ws_row > 0 && size.ws_col > 0 => Self {
                // The cursor is on the last one.
                lines: usize::from(size.ws_row - 1),
                columns: COLUMNS.min(size.ws_col.into()),
            },
            _ => Self {
                lines: usize::MAX,
                columns: COLUMNS,
            },
        }
    }
}

/// Shows the status again and again, also of a receiver that is restarted meanwhile. Where standard output is no terminal, views follow each
/// other.
///
/// # Errors
/// If the receiver does not answer at first, or standard output cannot be written.
pub(super) fn run(control: &ControlAddress) -> Result<ExitCode, CommandError> {
    let is_terminal = std::io::stdout().is_terminal();
    let mut answered: Option<Instant> = None;
    loop {
        let answer = match (ask(control, &Request::Status), answered) {
            (Ok(status), _) => {
                if is_terminal && answered.is_none() {
                    draw(CLEAR)?;
                }
                answered = Some(Instant::now());
                Answer::Status(status)
            }
            (Err(error), Some(last)) => Answer::None {
                error: error.to_string(),
                for_so_long: last.elapsed(),
            },
            // The address may be a wrong one.
            (Err(error), None) => return Err(error),
        };
        let view = view(&answer, Room::find());
        match is_terminal {
            true => draw(&on_screen(&view))?,
            false => print(&format!("{view}\n"))?,
        }
        std::thread::sleep(EVERY);
    }
}

fn on_screen(view: &str) -> String {
    let view = printable_lines(view);
    let lines = view.lines().map(|line| format!("{line}{REST_OF_LINE}\n"));
    format!("{HOME}{}{REST_OF_SCREEN}", lines.collect::<String>())
}

fn view(answer: &Answer, room: Room) -> String {
    let text = match answer {
        Answer::Status(status) => of_status(status, room.lines),
        Answer::None { error, for_so_long } => format!(
            "no answer for {}; asked again every second\n\n{}",
            duration(for_so_long.as_secs()),
            wrapped(error)
        ),
    };
    // Whatever has become longer than it should.
    let lines = text.lines().take(room.lines);
    let clipped = lines.map(|line| line.chars().take(room.columns).chain(['\n']).collect::<String>());
    clipped.collect()
}

fn of_status(status: &StatusReport, lines_max: usize) -> String {
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
    let (shown, left_out) = shown(&status.sessions, lines_max.saturating_sub(OTHER_LINES));
    let head = [
        "no.",
        "guest",
        "state",
        "age",
        "p50",
        "p99",
        "5m p50",
        "5m p99",
        "p99 by 10s",
    ];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    rows.extend(shown.into_iter().map(row));
    text.push_str(&table(&rows));
    if left_out > 0 {
        text.push_str(&format!("and {left_out} more\n"));
    }
    text.push_str("\npauses as the receiver sees them, of the last 10 to 20 s; 5m: of 5 minutes\n");
    text
}

/// The sessions that have a line each, and how many have none: while all have one they keep their places, otherwise the worst come first.
fn shown(sessions: &[SessionStatus], lines: usize) -> (Vec<&SessionStatus>, usize) {
    let mut shown: Vec<_> = sessions.iter().collect();
    if shown.len() > lines {
        shown.sort_by_key(|session| urgency(session));
        // One line says how many are left out.
        shown.truncate(lines.saturating_sub(1).max(1));
    }
    let left_out = sessions.len() - shown.len();
    (shown, left_out)
}

/// The smaller, the sooner a person should look at it.
fn urgency(session: &SessionStatus) -> (u8, Reverse<u64>) {
    let class = match session.state {
        SessionState::Ended if session.lost && session.checkpoint.is_some() => 0,
        _ if session.stalled_ms.is_some() => 1,
        SessionState::Protected => 2,
        SessionState::Precopy => 3,
        _ => 4,
    };
    let pause = session.recent.as_ref().map_or(0, |recent| recent.now.p99_ns);
    (class, Reverse(pause))
}

fn row(session: &SessionStatus) -> Vec<String> {
    let recent = session.recent.clone().unwrap_or_default();
    let shown = |figures: PauseFigures, nanoseconds| match figures.checkpoints {
        0 => "-".to_owned(),
        _ => display_nanoseconds(nanoseconds).replace(' ', ""),
    };
    vec![
        session.session.to_string(),
        narrow(&guest(session)),
        state(session).to_owned(),
        session.checkpoint_age_ms.map_or_else(|| "-".to_owned(), age),
        shown(recent.now, recent.now.p50_ns),
        shown(recent.now, recent.now.p99_ns),
        shown(recent.minutes, recent.minutes.p50_ns),
        shown(recent.minutes, recent.minutes.p99_ns),
        curve(&recent.p99_ns),
    ]
}

/// An age in six columns: from a minute on in the largest unit that says enough.
fn age(ms: u64) -> String {
    match ms / 60_000 {
        0 => seconds(ms),
        minutes @ ..100 => format!("{minutes} min"),
        minutes @ ..6000 => format!("{} h", minutes / 60),
        minutes => format!("{} d", minutes / (24 * 60)),
    }
}

/// A name that leaves room for the rest of its line.
fn narrow(name: &str) -> String {
    match name.chars().count() > GUEST_MAX {
        true => name.chars().take(GUEST_MAX - 1).chain(['…']).collect(),
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
    use crate::test_status::{session, status};
    use colo_ring::metrics::RecentFigures;

    const UNLIMITED: Room = Room {
        lines: usize::MAX,
        columns: COLUMNS,
    };

    #[test]
    fn a_curve_has_its_highest_bar_at_the_largest_value() {
        assert_eq!(curve(&[]), "");
        assert_eq!(curve(&[0, 80, 10, 40]), " █▁▄");
        assert_eq!(curve(&[u64::MAX, 1]), "█▁");
        assert_eq!(curve(&[5; 40]).chars().count(), CURVE_WINDOWS);
    }

    /// A guest without a name, whose last checkpoint is old, with figures that take all the room they can.
    fn wide(number: u32) -> SessionStatus {
        let uuid = format!("6b3fb1c2-0d0b-4e0c-9a54-1f0d5c2e7{number:03}");
        let figures = PauseFigures {
            checkpoints: 1000,
            p50_ns: 9_990_000,
            p99_ns: 99_900_000 - u64::from(number),
            max_ns: 999_000_000,
        };
        SessionStatus {
            guest: Some(uuid.clone()),
            uuid: Some(uuid),
            state: SessionState::Protected,
            checkpoint: Some(70_000),
            checkpoint_age_ms: Some(59 * 60_000 + 59_999),
            recent: Some(RecentFigures {
                now: figures,
                minutes: figures,
                p99_ns: vec![99_900_000; 30],
            }),
            ..session(number)
        }
    }

    fn of(sessions: Vec<SessionStatus>) -> Answer {
        Answer::Status(Box::new(StatusReport {
            uptime_ms: 99 * 86_400_000,
            ram_held_bytes: 1 << 40,
            ram_limit_bytes: 1 << 41,
            sessions,
            ..status()
        }))
    }

    fn fits(view: &str, room: Room) {
        let widest = view.lines().map(|line| line.chars().count()).max();
        assert!(widest <= Some(room.columns), "{widest:?} columns:\n{view}");
        assert!(view.lines().count() <= room.lines, "{view}");
    }

    #[test]
    fn ten_guests_with_long_names_fit_eighty_columns() {
        let text = view(&of((99_990..100_000).map(wide).collect()), UNLIMITED);
        fits(&text, UNLIMITED);
        // Nothing is cut off.
        let row = "99990  6b3fb1c2-…  protected  59 min  9.99ms  99.8ms  9.99ms  99.8ms  ██████████";
        assert!(text.lines().any(|line| line == row), "{text}");
        assert!(text.contains("of 5 minutes\n"), "{text}");
        for ms in [0, 59_999, 60_000, 6_000_000, 360_000_000, 86_400_000 * 9999] {
            assert!(age(ms).len() <= 6, "{}", age(ms));
        }
    }

    #[test]
    fn a_low_terminal_has_the_worst_guests() {
        let mut sessions: Vec<_> = (1..=10).map(wide).collect();
        sessions[3].stalled_ms = Some(5000);
        sessions[7].state = SessionState::Ended;
        sessions[7].lost = true;
        sessions[0].state = SessionState::Discarded;
        let answer = of(sessions);
        let room = Room {
            lines: 10,
            columns: 80,
        };
        let text = view(&answer, room);
        fits(&text, room);
        let numbers: Vec<_> = text.lines().skip(3).take(4).collect();
        let numbers = numbers.iter().map(|line| line.split(' ').next().unwrap());
        assert_eq!(numbers.collect::<Vec<_>>(), ["8", "4", "2", "3"], "{text}");
        assert!(text.contains("\nand 6 more\n"), "{text}");
        for lines in 0..20 {
            let room = Room { lines, columns: 40 };
            fits(&view(&answer, room), room);
        }
        // Where all have a line, each keeps its own.
        let all = view(&answer, UNLIMITED);
        let first = all.lines().nth(3).unwrap();
        assert!(first.starts_with("1 ") && !all.contains("more"), "{all}");
    }

    #[test]
    fn no_guest_and_no_receiver_are_said() {
        let text = view(&of(Vec::new()), UNLIMITED);
        assert!(text.ends_with("\n\nno session\n"), "{text}");
        let away = Answer::None {
            error: format!("cannot connect to unix:/{}: Connection refused", "x".repeat(90)),
            for_so_long: Duration::from_secs(75),
        };
        let text = view(&away, UNLIMITED);
        assert!(
            text.starts_with("no answer for 1 min 15 s; asked again every second\n"),
            "{text}"
        );
        assert!(text.contains("Connection refused"), "{text}");
        fits(&text, UNLIMITED);
    }

    #[test]
    fn what_a_receiver_says_commands_no_terminal() {
        let screen = on_screen("a\u{1b}[2J\nb\n");
        assert_eq!(screen, "\u{1b}[Ha\\u{1b}[2J\u{1b}[K\nb\u{1b}[K\n\u{1b}[J");
    }
}
