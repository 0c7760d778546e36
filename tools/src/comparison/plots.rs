//! The plots: percentile curves, checkpoints over time, and what the pause is made of.

use super::distribution::{Distribution, Point};
use super::runs::{Run, Samples};
use super::svg::{Anchor, Axis, Svg, steps};
use super::table::display_mean;
use colo_ring::metrics::display_nanoseconds;

const WIDTH: f64 = 960.0;
const LEFT: f64 = 72.0;
const RIGHT: f64 = WIDTH - 16.0;
const CURVES_HEIGHT: f64 = 380.0;
const PANEL_HEIGHT: f64 = 104.0;
/// Below a plot: its axis.
const AXIS_HEIGHT: f64 = 46.0;

/// Dots of one run at most, so that pages stay small: above it, fast checkpoints are thinned out.
const DOTS_MAX: usize = 3000;
/// The slowest checkpoints of a run: each can be pointed at.
const SLOWEST: usize = 25;

/// One run's curve or panel.
struct Series<'a, T> {
    /// Its place among all runs: it has the same colour everywhere.
    index: usize,
    name: &'a str,
    data: T,
}

/// The runs that are drawn and have `data`.
fn series<'a, T>(runs: &'a [Run], baseline: &str, data: impl Fn(&'a Run) -> Option<T>) -> Vec<Series<'a, T>> {
    let of_run = |(index, run): (usize, &'a Run)| {
        if !is_drawn(runs, index, baseline) {
            return None;
        }
        Some(Series {
            index,
            name: run.name(),
            data: data(run)?,
        })
    };
    runs.iter().enumerate().filter_map(of_run).collect()
}

/// Runs that are drawn: as many as there are colours that can be told apart, each with dashes of its own.
pub(super) const DRAWN_MAX: usize = 8;

/// The classes of a run's colour and dashes.
pub(super) fn class(index: usize) -> String {
    // The baseline is drawn in any case, perhaps in place of the last one.
    let style = index.min(DRAWN_MAX - 1);
    format!("s{style} d{style}")
}

/// Whether a run is drawn where there are many: the first ones are, and the baseline.
pub(super) fn is_drawn(runs: &[Run], index: usize, baseline: &str) -> bool {
    let baseline = runs.iter().position(|run| run.name() == baseline).unwrap_or(0);
    let first = match baseline < DRAWN_MAX {
        true => DRAWN_MAX,
        false => DRAWN_MAX - 1,
    };
    index < first || index == baseline
}

/// Latency at every percentile. The axis gives every further nine the same room.
pub(super) fn curves(runs: &[Run], phase: &str, baseline: &str) -> String {
    let series = series(runs, baseline, |run| run.distribution(phase));
    let values = || series.iter().map(|series| &series.data);
    let low = values()
        .filter_map(|data| data.exceedances().next())
        .map(|(value, _)| value)
        .min();
    let high = values().map(Distribution::max).max();
    let count = values().map(Distribution::count).max();
    let (Some(low), Some(high), Some(count)) = (low, high, count) else {
        return String::new();
    };
    let bottom = CURVES_HEIGHT - AXIS_HEIGHT;
    let y = Axis::new(low, high, bottom, 12.0);
    let nines = (count as f64).log10().max(1.0);
    let x = |exceeding: f64, count: f64| LEFT + (count / exceeding).log10() / nines * (RIGHT - LEFT);

    let mut svg = Svg::new(WIDTH, CURVES_HEIGHT, &format!("{phase} by percentile"));
    value_ticks(&mut svg, &y, 7);
    for (label, exceeding) in percentile_ticks(nines) {
        let at = x(exceeding, 1.0);
        svg.line("grid", (at, 12.0), (at, bottom));
        svg.text("tick", (at, bottom + 18.0), Anchor::Middle, &label);
    }
    let scale = if y.is_logarithmic() { ", logarithmic" } else { "" };
    svg.text(
        "axis",
        (RIGHT, bottom + 38.0),
        Anchor::End,
        &format!("percentile of checkpoints; {phase}{scale}"),
    );
    for series in &series {
        draw_curve(&mut svg, series, &y, x);
    }
    svg.finish()
}

fn draw_curve(svg: &mut Svg, series: &Series<Distribution>, y: &Axis, x: impl Fn(f64, f64) -> f64) {
    let count = series.data.count() as f64;
    let mut points: Vec<(f64, f64)> = Vec::new();
    for (value, exceeding) in series.data.exceedances() {
        let point = (x(exceeding as f64, count), y.place(value));
        // What falls on the same place need not be drawn twice.
        if points
            .last()
            .is_none_or(|last| (last.0 - point.0).abs() + (last.1 - point.1).abs() > 0.7)
        {
            points.push(point);
        }
    }
    let class = class(series.index);
    let end = (x(1.0, count), y.place(series.data.max()));
    points.push(end);
    let figures = series.data.figures();
    let marks = [
        ("p50", 0.5, figures.p50),
        ("p90", 0.1, figures.p90),
        ("p99", 0.01, figures.p99),
        ("p99.9", 0.001, figures.p99_9),
    ];
    let marks = marks
        .into_iter()
        .filter(|(_, exceeding, _)| exceeding * count >= 1.0);
    let marks: Vec<_> = marks
        .map(|(name, exceeding, value)| (name, value, (x(exceeding, 1.0), y.place(value))))
        .collect();
    // Of a few checkpoints none is exactly at a percentile: the curve goes through its mark, which is on its grid line, in place of
    // what else would be there.
    let is_marked = |at: f64| marks.iter().any(|(_, _, place)| (place.0 - at).abs() < 1.0);
    points.retain(|point| *point == end || !is_marked(point.0));
    points.extend(marks.iter().map(|(_, _, place)| *place));
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    svg.polyline(&format!("curve {class}"), points, series.name);
    for (name, value, place) in marks {
        let title = format!("{}: {name} {}", series.name, display_nanoseconds(value));
        svg.circle(&format!("mark {class}"), place, 4.0, &title);
    }
    let title = format!(
        "{}: maximum {} of {count}",
        series.name,
        display_nanoseconds(series.data.max())
    );
    svg.circle(&format!("end {class}"), end, 4.0, &title);
}

/// 50 %, 90 %, 99 %...: what is written, and the part that exceeds it.
fn percentile_ticks(nines: f64) -> Vec<(String, f64)> {
    let mut ticks = vec![
        ("0 %".to_owned(), 1.0),
        ("50 %".to_owned(), 0.5),
        ("90 %".to_owned(), 0.1),
    ];
    let mut exceeding = 0.01f64;
    let mut label = "99".to_owned();
    while -exceeding.log10() <= nines && ticks.len() < 16 {
        ticks.push((format!("{label} %"), exceeding));
        label.push_str(if label.contains('.') { "9" } else { ".9" });
        exceeding /= 10.0;
    }
    ticks
}

/// Height of a tick's label, with a little room.
const LABEL_HEIGHT: f64 = 15.0;

fn value_ticks(svg: &mut Svg, y: &Axis, count: usize) {
    let mut labelled: Option<f64> = None;
    for (at, label) in y.ticks(count) {
        svg.line("grid", (LEFT, at), (RIGHT, at));
        if labelled.is_none_or(|before| (before - at).abs() >= LABEL_HEIGHT) {
            svg.text("tick", (LEFT - 8.0, at + 4.0), Anchor::End, &label);
            labelled = Some(at);
        }
    }
}

/// Every checkpoint over time, a panel for each run. None if no run has checkpoints: histograms have no times.
pub(super) fn over_time(runs: &[Run], phase: &str, baseline: &str) -> Option<String> {
    let series = series(runs, baseline, |run| match run.samples.get(phase) {
        Some(Samples::Checkpoints(points)) if !points.is_empty() => Some(points.as_slice()),
        _ => None,
    });
    let all = || series.iter().flat_map(|series| series.data);
    let low = all().map(|point| point.value_ns).min()?;
    let high = all().map(|point| point.value_ns).max()?;
    let first = all().map(|point| point.at_ns).min()?;
    let seconds = all().map(|point| point.at_ns - first).max()? as f64 / 1e9;
    let seconds = seconds.max(1e-3);
    let panels = series.len() as f64;
    let bottom = panels * PANEL_HEIGHT;
    let x = |point: &Point| LEFT + (point.at_ns - first) as f64 / 1e9 / seconds * (RIGHT - LEFT);

    let mut svg = Svg::new(
        WIDTH,
        bottom + AXIS_HEIGHT,
        &format!("{phase} of every checkpoint over time"),
    );
    let times = steps(0.0, seconds, 8);
    let decimals = if seconds < 8.0 { 1 } else { 0 };
    for time in times {
        let at = LEFT + time / seconds * (RIGHT - LEFT);
        svg.line("grid", (at, 0.0), (at, bottom));
        svg.text(
            "tick",
            (at, bottom + 18.0),
            Anchor::Middle,
            &format!("{time:.decimals$} s"),
        );
    }
    svg.text(
        "axis",
        (RIGHT, bottom + 38.0),
        Anchor::End,
        "time since the run's first checkpoint",
    );
    let mut top = 0.0;
    for series in &series {
        let y = Axis::new(low, high, top + PANEL_HEIGHT - 10.0, top + 26.0);
        value_ticks(&mut svg, &y, 3);
        draw_panel(&mut svg, series, &y, x);
        svg.text(
            &format!("name {}", class(series.index)),
            (LEFT + 6.0, top + 17.0),
            Anchor::Start,
            series.name,
        );
        top += PANEL_HEIGHT;
        svg.line("panel", (LEFT, top), (RIGHT, top));
    }
    Some(svg.finish())
}

fn draw_panel(svg: &mut Svg, series: &Series<&[Point]>, y: &Axis, x: impl Fn(&Point) -> f64) {
    let mut slowest_first: Vec<_> = series.data.iter().collect();
    slowest_first.sort_by_key(|point| std::cmp::Reverse(point.value_ns));
    let (slowest, others) = slowest_first.split_at(SLOWEST.min(slowest_first.len()));
    // The slow tenth of the dots' room is for the slow, so that thinning hides none of what matters.
    let (slow, fast) = others.split_at(others.len().min(DOTS_MAX / 10));
    let step = fast.len().div_ceil(DOTS_MAX).max(1);
    let place = |point: &&Point| (x(point), y.place(point.value_ns));
    let class = class(series.index);
    let drawn = slow.iter().chain(fast.iter().step_by(step));
    svg.dots(&format!("dots {class}"), drawn.map(place));
    for point in slowest {
        let disturbed = if point.disturbed { ", disturbed" } else { "" };
        let title = format!(
            "{}: {} at {:.3} s{disturbed}",
            series.name,
            display_nanoseconds(point.value_ns),
            point.at_ns as f64 / 1e9
        );
        let shape = if point.disturbed { "hollow" } else { "slow" };
        svg.circle(&format!("{shape} {class}"), place(point), 2.6, &title);
    }
}

/// A phase and the parts of it that were measured.
struct Stack {
    total: &'static str,
    parts: &'static [&'static str],
    /// What is left of it.
    rest: &'static str,
    /// Whether that comes first; else last.
    rest_is_first: bool,
}

const STACKS: [Stack; 2] = [
    Stack {
        total: "pause",
        parts: &["transfer", "vmstate", "commit"],
        rest: "the primary, until it sends",
        rest_is_first: true,
    },
    Stack {
        total: "loaded",
        parts: &["received"],
        rest: "received to loaded",
        rest_is_first: false,
    },
];

/// A part of a bar.
pub(super) struct Part {
    pub name: &'static str,
    /// The class of its colour: 0 is what was not measured by itself.
    pub class: usize,
    mean_ns: f64,
}

/// One bar of a stack.
struct Bar<'a> {
    name: &'a str,
    parts: Vec<Part>,
}

/// What the mean pause is made of: means add up, percentiles do not. Returns for every clock the parts of a bar, for a
/// legend, and the drawing.
pub(super) fn stacks(runs: &[Run]) -> Vec<(Vec<Part>, String)> {
    STACKS
        .iter()
        .filter_map(|stack| draw_stack(runs, stack))
        .collect()
}

fn bar<'a>(run: &'a Run, stack: &Stack) -> Option<Bar<'a>> {
    let mean = |phase: &str| Some(run.distribution(phase)?.figures().mean);
    let mut rest = mean(stack.total)?;
    let mut parts = Vec::new();
    for (name, class) in stack.parts.iter().zip(1..) {
        let mean_ns = mean(name)?;
        rest -= mean_ns;
        parts.push(Part { name, class, mean_ns });
    }
    let at = if stack.rest_is_first { 0 } else { parts.len() };
    let rest = Part {
        name: stack.rest,
        class: 0,
        mean_ns: rest.max(0.0),
    };
    parts.insert(at, rest);
    Some(Bar {
        name: run.name(),
        parts,
    })
}

fn draw_stack(runs: &[Run], stack: &Stack) -> Option<(Vec<Part>, String)> {
    const ROW: f64 = 46.0;
    const BAR_LEFT: f64 = 24.0;
    let mut bars: Vec<_> = runs.iter().filter_map(|run| bar(run, stack)).collect();
    let total = |bar: &Bar| bar.parts.iter().map(|part| part.mean_ns).sum::<f64>();
    let longest = bars.iter().map(total).fold(0.0, f64::max);
    if longest <= 0.0 {
        return None;
    }
    let height = bars.len() as f64 * ROW + AXIS_HEIGHT - 10.0;
    let bottom = height - AXIS_HEIGHT + 10.0;
    // Room behind the longest bar for its total.
    let scale = (RIGHT - 80.0 - BAR_LEFT) / longest;
    let label = format!("what the mean of {} is made of", stack.total);
    let mut svg = Svg::new(WIDTH, height, &label);
    for time in steps(0.0, longest, 7) {
        let at = BAR_LEFT + time * scale;
        svg.line("grid", (at, 0.0), (at, bottom));
        svg.text("tick", (at, bottom + 18.0), Anchor::Middle, &display_mean(time));
    }
    for (row, bar) in bars.iter().enumerate() {
        let top = row as f64 * ROW;
        svg.text("bar-name", (BAR_LEFT, top + 14.0), Anchor::Start, bar.name);
        let mut left = BAR_LEFT;
        for part in &bar.parts {
            let (class, mean) = (part.class, display_mean(part.mean_ns));
            let width = part.mean_ns * scale;
            let title = format!("{}: {} {mean} at the mean", bar.name, part.name);
            svg.rect(
                &format!("part p{class}"),
                (left, top + 20.0),
                (width, 20.0),
                &title,
            );
            if width > 64.0 {
                let at = (left + width / 2.0, top + 34.5);
                svg.text(&format!("in-part q{class}"), at, Anchor::Middle, &mean);
            }
            left += width;
        }
        svg.text(
            "bar-total",
            (left + 8.0, top + 34.5),
            Anchor::Start,
            &display_mean(total(bar)),
        );
    }
    Some((bars.swap_remove(0).parts, svg.finish()))
}
