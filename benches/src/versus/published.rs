//! The short table for the README: what the transfer of a checkpoint takes, idle and under load.

use super::figures::{CellFigures, SecondaryFigures};
use super::shape::Shape;
use super::table;
use colo_ring_tools::comparison::Row;
use std::fs;
use std::io;
use std::path::Path;

/// The load of the table's second half, MiB per checkpoint.
const LOAD_MIB: u32 = 30;

const BEGIN: &str = "<!-- bench-vs-qemu: begin -->";
const END: &str = "<!-- bench-vs-qemu: end -->";

/// The table as a Markdown section: rows plain and multifd-4, idle and under load, as far as they were measured; the
/// transfer's mean and 99th percentile with QEMU's own secondary and with `colo-ring` as it is by default (`ring`).
#[must_use]
pub fn section(cells: &[CellFigures], ring: &str, conditions: &str) -> String {
    let mut text = String::from(
        "| transfer (SEND to RECEIVED), ms | QEMU's own: mean | p99 | colo-ring: mean | p99 | ratio of means (95 %) |\n\
         |---|---|---|---|---|---|\n",
    );
    for channels in [0, 4] {
        for mib in [0, LOAD_MIB] {
            let shape = Shape::new(mib, channels);
            // With time between checkpoints, as in reality, where it was measured.
            let cell = cells
                .iter()
                .filter(|cell| cell.capture == shape.to_string())
                .max_by_key(|cell| cell.spacing_ms);
            let figures = cell.and_then(|cell| Some((cell, of(cell, "qemu")?, of(cell, ring)?)));
            if let Some((cell, qemu, own)) = figures {
                text.push_str(&row(cell, qemu, own));
            }
        }
    }
    text.push_str(&format!(
        "\ncolo-ring answers RECEIVED and LOADED in one write, so that its transfer has the commit in it; QEMU's own loads \
         the device state and copies the pages after its own. {conditions}\n"
    ));
    text
}

fn of<'a>(cell: &'a CellFigures, secondary: &str) -> Option<&'a Row> {
    let named = |figures: &&SecondaryFigures| figures.secondary == secondary;
    let received = cell.phases.iter().position(|phase| *phase == "received")?;
    cell.secondaries
        .iter()
        .find(named)?
        .phases
        .get(received)?
        .as_ref()
}

fn row(cell: &CellFigures, qemu: &Row, own: &Row) -> String {
    let ms = |ns: f64| table::digits(ns / 1e6);
    let ratio = own
        .ratios
        .map_or_else(|| "–".to_owned(), |ratios| table::ratio(&ratios.mean));
    format!(
        "| {}, n = {} and {} | {} | {} | **{}** | **{}** | {} |\n",
        cell.title(),
        qemu.count,
        own.count,
        ms(qemu.mean_ns),
        ms(qemu.p99_ns as f64),
        ms(own.mean_ns),
        ms(own.p99_ns as f64),
        ratio,
    )
}

/// Puts the section between its two marks in a Markdown file.
///
/// # Errors
/// When the file cannot be read or written, or has no marks.
pub fn insert(file: &Path, section: &str) -> io::Result<()> {
    let text = fs::read_to_string(file)?;
    let new = replaced(&text, section).ok_or_else(|| {
        io::Error::other(format!(
            "it has no lines \"{BEGIN}\" and \"{END}\" to put the table between"
        ))
    })?;
    fs::write(file, new)
}

fn replaced(text: &str, section: &str) -> Option<String> {
    let (before, rest) = text.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!("{before}{BEGIN}\n{}\n{END}{after}", section.trim_end()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_between_the_marks_is_replaced() {
        let text = format!("a\n{BEGIN}\nold\n{END}\nb\n");
        let once = replaced(&text, "new\n").unwrap();
        assert_eq!(once, format!("a\n{BEGIN}\nnew\n{END}\nb\n"));
        assert_eq!(replaced(&once, "new").as_ref(), Some(&once));
        assert_eq!(replaced("no marks", "new"), None);
    }
}
