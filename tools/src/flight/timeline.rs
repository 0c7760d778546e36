//! The slowest checkpoints as stacked bars: when what happened, and below it whose time it was.

use super::cause::Parts;
use super::{By, SlowCheckpoint, SlowReport};
use crate::comparison::svg::{Anchor, Svg, steps};
use colo_ring::metrics::display_nanoseconds;
use colo_ring::store::Window;

const WIDTH: f64 = 960.0;
const LEFT: f64 = 84.0;
/// Behind the longest bar there is room for its figure.
const RIGHT: f64 = WIDTH - 84.0;
const ROW: f64 = 34.0;
/// A channel's line, and from one to the next.
const CHANNEL_HEIGHT: f64 = 2.0;
const CHANNEL_STEP: f64 = 3.0;
const AXIS_HEIGHT: f64 = 30.0;

/// Bars that are drawn.
const BARS_MAX: usize = 20;

/// The class of a window's colour, and its name.
pub(super) const WINDOWS: [(Window, &str, &str); 5] = [
    (Window::Stop, "w0", "REPLY to SEND"),
    (Window::Ram, "w1", "RAM"),
    (Window::DeviceState, "w2", "device state"),
    (Window::Commit, "w3", "commit"),
    (Window::Answer, "w4", "to LOADED"),
];

/// The same of whose time it was.
pub(super) const WHOSE: [(&str, &str); 4] = [
    ("o0", "primary and network"),
    ("o1", "this host’s scheduler"),
    ("o2", "this receiver"),
    ("o3", "not known"),
];

fn whose(parts: &Parts) -> [u64; 4] {
    [
        parts.primary + parts.guard,
        parts.host,
        parts.working + parts.waiting,
        parts.unknown,
    ]
}

/// None if there is nothing to draw.
pub(super) fn draw(report: &SlowReport) -> Option<String> {
    let slowest = &report.slowest[..report.slowest.len().min(BARS_MAX)];
    let longest = slowest
        .first()
        .map(|slow| slow.duration_ns)
        .filter(|longest| *longest > 0)?;
    let channels = match report.by {
        By::Pause => (slowest.iter().map(|slow| slow.record.channels.iter().count())).max(),
        By::Reply => None,
    };
    let lines = channels.unwrap_or(0) as f64 * CHANNEL_STEP;
    let row = ROW + lines;
    let bottom = slowest.len() as f64 * row;
    let scale = (RIGHT - LEFT) / longest as f64;
    let label = format!("the slowest checkpoints by {}", report.by.name());
    let mut svg = Svg::new(WIDTH, bottom + AXIS_HEIGHT, &label);
    for time in steps(0.0, longest as f64, 7) {
        let at = LEFT + time * scale;
        svg.line("grid", (at, 0.0), (at, bottom));
        let label = display_nanoseconds(format!("{time:.0}").parse().unwrap_or(0));
        svg.text("tick", (at, bottom + 18.0), Anchor::Middle, &label);
    }
    for (slow, number) in slowest.iter().zip(0u8..) {
        let top = f64::from(number) * row + 6.0;
        let record = &slow.record;
        let name = record.checkpoint.to_string();
        svg.text("tick", (LEFT - 8.0, top + 15.0), Anchor::End, &name);
        let bar =
            |svg: &mut Svg, top: f64, height: f64, parts: &mut dyn Iterator<Item = (&str, &str, u64)>| {
                let mut left = LEFT;
                for (class, part, nanoseconds) in parts {
                    let width = nanoseconds as f64 * scale;
                    if width > 0.0 {
                        let title = format!("{name}: {part} {}", display_nanoseconds(nanoseconds));
                        svg.rect(&format!("part {class}"), (left, top), (width, height), &title);
                    }
                    left += width;
                }
            };
        if report.by == By::Pause {
            let mut windows = WINDOWS
                .iter()
                .map(|(window, class, part)| (*class, *part, record.window_ns(*window)));
            bar(&mut svg, top, 12.0, &mut windows);
            draw_channels(&mut svg, slow, top + 13.0, scale);
        }
        let parts = whose(&Parts::of(record, report.by));
        let mut parts = WHOSE
            .iter()
            .zip(parts)
            .map(|((class, part), time)| (*class, *part, time));
        bar(&mut svg, top + 13.0 + lines, 8.0, &mut parts);
        let figure = display_nanoseconds(slow.duration_ns);
        let end = LEFT + slow.duration_ns as f64 * scale + 8.0;
        svg.text("bar-total", (end, top + 15.0), Anchor::Start, &figure);
    }
    Some(svg.finish())
}

/// A line for each channel, from its first to its last byte.
fn draw_channels(svg: &mut Svg, slow: &SlowCheckpoint, top: f64, scale: f64) {
    let record = &slow.record;
    for (bytes, number) in record.channels.iter().zip(0u8..) {
        let [first, last] =
            [bytes.first_byte_ns, bytes.last_byte_ns].map(|at| at.saturating_sub(record.reply_ns));
        let title = format!(
            "{}: channel {} from {} to {} after CHECKPOINT_REPLY",
            record.checkpoint,
            bytes.channel,
            display_nanoseconds(first),
            display_nanoseconds(last)
        );
        let at = (
            LEFT + first as f64 * scale,
            top + f64::from(number) * CHANNEL_STEP,
        );
        // What came at once is a point.
        let width = (last.saturating_sub(first) as f64 * scale).max(CHANNEL_HEIGHT);
        svg.rect("channel", at, (width, CHANNEL_HEIGHT), &title);
    }
}
