//! The figures as tables for a terminal.

use super::figures::{CellFigures, SecondaryFigures};
use super::memory::CopySpeed;
use super::secondary::DECODERS;
use colo_ring_tools::comparison::{Ratio, Ratios, Row};
use colo_ring_tools::output::table;

const NONE: &str = "–";

/// The table of a cell.
#[must_use]
pub fn cell(cell: &CellFigures, copy: &CopySpeed) -> String {
    let mut text = cell.title();
    if let Some(mib) = cell.measured_mib() {
        text.push_str(&format!("; {} MiB of guest pages a checkpoint", digits(mib)));
    }
    text.push('\n');
    let mut rows = vec![head(cell)];
    rows.extend(cell.secondaries.iter().map(|figures| row(figures, copy)));
    text.push_str(&table(&rows));
    for figures in &cell.secondaries {
        text.push_str(&to_other(
            cell,
            figures,
            "the other build",
            &figures.to_other_build,
        ));
        text.push_str(&to_other(
            cell,
            figures,
            "itself without TLS",
            &figures.to_plaintext,
        ));
    }
    text.push_str(&to_decoders(cell));
    for figures in &cell.secondaries {
        if let Some(reason) = &figures.failed {
            text.push_str(&format!("{} FAILED: {}\n", figures.name, reason.trim_end()));
        }
    }
    text
}

/// A line for each phase.
fn to_other(cell: &CellFigures, figures: &SecondaryFigures, what: &str, ratios: &[Option<Ratios>]) -> String {
    let lines = cell.phases.iter().zip(ratios).filter_map(|(phase, ratios)| {
        let ratios = ratios.as_ref()?;
        let [p50, p99] = [&ratios.p50, &ratios.p99].map(ratio);
        Some(format!(
            "{}, {phase} to {what}: p50 {p50}, p99 {p99}\n",
            figures.name
        ))
    });
    lines.collect()
}

/// How far each is from the decoders alone, by the median of the first phase.
fn to_decoders(cell: &CellFigures) -> String {
    let p50 = |one: &SecondaryFigures| Some(one.phases.first()?.as_ref()?.p50_ns as f64);
    let decoders = cell.secondaries.iter().find(|one| one.secondary == DECODERS);
    let Some(limit) = decoders.and_then(p50).filter(|limit| *limit > 0.0) else {
        return String::new();
    };
    let others = cell.secondaries.iter().filter(|one| one.secondary != DECODERS);
    let ratios = others.filter_map(|one| Some(format!("{} {}", one.name, digits(p50(one)? / limit))));
    let phase = cell.phases.first().copied().unwrap_or_default();
    format!(
        "{phase} p50 to the decoders alone: {}\n",
        ratios.collect::<Vec<_>>().join(", ")
    )
}

/// For each spacing a table of the ratios of all cells: medians of the first phase, to QEMU's own secondary.
#[must_use]
pub fn overview(cells: &[CellFigures]) -> String {
    let mut spacings: Vec<_> = cells.iter().map(|cell| cell.spacing_ms).collect();
    spacings.dedup();
    let mut text = String::new();
    for spacing in spacings {
        let cells: Vec<_> = cells.iter().filter(|cell| cell.spacing_ms == spacing).collect();
        // The decoders alone come last, and not in every cell.
        let most = cells.iter().max_by_key(|cell| cell.secondaries.len());
        let Some(first) = most else { continue };
        let mut rows = vec![vec![String::new()]];
        rows[0].extend(cells.iter().map(|cell| cell.capture.replace(", ", " ")));
        for (position, figures) in first.secondaries.iter().enumerate() {
            let ratios = cells.iter().map(|cell| {
                let row = cell
                    .secondaries
                    .get(position)
                    .and_then(|one| one.phases.first()?.as_ref());
                row.map_or_else(
                    || NONE.to_owned(),
                    |row| format!("{} {}", ms(row.p50_ns), short_ratio(row)),
                )
            });
            rows.push([figures.name.clone()].into_iter().chain(ratios).collect());
        }
        let phase = first.phases.first().copied().unwrap_or_default();
        let title = first.title();
        let (_, spacing) = title.rsplit_once(", ").unwrap_or_default();
        text.push_str(&format!(
            "{phase}, p50 in ms and its ratio to QEMU's own; {spacing}\n{}\n",
            table(&rows)
        ));
    }
    text
}

fn short_ratio(row: &Row) -> String {
    let ratio = row.ratios.and_then(|ratios| ratios.p50.ratio);
    ratio.map_or_else(String::new, |ratio| format!("({})", digits(ratio)))
}

fn head(cell: &CellFigures) -> Vec<String> {
    let mut head = vec![String::new()];
    for phase in &cell.phases {
        head.extend([format!("{phase} p50"), "ratio".to_owned()]);
        head.extend(["p99, ms".to_owned(), "ratio".to_owned()]);
    }
    let rest = [
        "CPU ms each",
        "s/GiB",
        "RSS MiB",
        "flush GB/s",
        "of copying",
        "n",
        "dropped",
    ];
    head.extend(rest.map(str::to_owned));
    head
}

fn row(figures: &SecondaryFigures, copy: &CopySpeed) -> Vec<String> {
    let mut cells = vec![figures.name.clone()];
    for row in &figures.phases {
        match row {
            None => cells.extend([NONE; 4].map(str::to_owned)),
            Some(row) => {
                let ratios = row.ratios.map(|ratios| [ratios.p50, ratios.p99]);
                let [p50, p99] = ratios.map_or([NONE; 2].map(str::to_owned), |ratios| {
                    ratios.map(|one| ratio(&one))
                });
                cells.extend([ms(row.p50_ns), p50, p99_ms(row), p99]);
            }
        }
    }
    let some = |text: Option<String>| text.unwrap_or_else(|| NONE.to_owned());
    let flush = figures.flush_bytes_per_s;
    let of_copying = |speed: f64| {
        let [one, two] = [copy.one_thread_bytes_per_s, copy.two_threads_bytes_per_s];
        format!("{:.0} / {:.0} %", 100.0 * speed / one, 100.0 * speed / two)
    };
    cells.extend([
        some(figures.cpu_ms_per_checkpoint.map(|ms| format!("{ms:.2}"))),
        some(figures.cpu_s_per_gib.map(|seconds| format!("{seconds:.2}"))),
        some(figures.rss_bytes_max.map(|bytes| (bytes >> 20).to_string())),
        some(flush.map(|speed| format!("{:.1}", speed / 1e9))),
        some(flush.map(of_copying)),
        figures.checkpoints.to_string(),
        figures.dropped.to_string(),
    ]);
    cells
}

/// Milliseconds.
fn ms(ns: u64) -> String {
    digits(ns as f64 / 1e6)
}

/// A number with the digits that say something.
pub(super) fn digits(number: f64) -> String {
    match number {
        ..0.1 => format!("{number:.4}"),
        ..10.0 => format!("{number:.2}"),
        ..100.0 => format!("{number:.1}"),
        _ => format!("{number:.0}"),
    }
}

fn p99_ms(row: &Row) -> String {
    format!("{}{}", ms(row.p99_ns), if row.p99_is_max { "*" } else { "" })
}

/// With its interval.
pub(super) fn ratio(ratio: &Ratio) -> String {
    match (ratio.ratio, ratio.interval) {
        (None, _) => NONE.to_owned(),
        (Some(ratio), None) => digits(ratio),
        (Some(ratio), Some(interval)) => {
            format!(
                "{} ({}–{})",
                digits(ratio),
                digits(interval.low),
                digits(interval.high)
            )
        }
    }
}

/// What is needed to read the tables.
pub const LEGEND: &str = "\
loaded, received: VMSTATE_SEND to VMSTATE_LOADED and to VMSTATE_RECEIVED, by the primary's clock. stopped: the guest's STOP to RESUME.
ratio: to QEMU's own secondary (of NAME@tls, to that over TLS), with its 95 % interval by resampling of the rounds. * is the maximum: p99 needs 100 checkpoints to be more.
CPU: of the secondary's process after precopy, what it does between checkpoints included: for a checkpoint, and for a GiB of guest pages.
decoders: the payloads of a compressed session decoded in memory by two threads, and nothing else done.
flush: guest pages copied to the RAM image, and that in percent of what one thread and two threads can copy here.
dropped: checkpoints left out, as other processes had the processor.
Over TCP a checkpoint with QEMU's own secondary waits once or twice 40 ms for a delayed acknowledgement; --no-stalls and --unix compare without that.
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_about_three_digits() {
        let texts = [0.00217, 0.19, 1.0, 43.91, 166.2].map(digits);
        assert_eq!(texts, ["0.0022", "0.19", "1.00", "43.9", "166"]);
    }
}
