//! Slow checkpoints in a page.

use super::timeline::{WHOSE, WINDOWS, draw};
use super::{By, SlowReport};
use crate::comparison::STYLE;
use crate::html_page::html_page;
use maud::{Markup, PreEscaped, html};

/// A page of its own.
pub fn page(report: &SlowReport) -> String {
    let body = html! {
        main {
            h1 { "Slow checkpoints" }
            (section(report))
        }
    };
    html_page("Slow checkpoints", STYLE, &body)
}

/// What there is to say and to see of one recorder.
pub fn section(report: &SlowReport) -> Markup {
    let summary = report.summary();
    html! {
        p { @for line in report.head().lines() { (line) br; } }
        ul { @for line in summary.lines() { li { (line) } } }
        @if let Some(drawing) = draw(report) {
            figure {
                @if report.by == By::Pause {
                    (legend(WINDOWS.iter().map(|(_, class, name)| (*class, *name))))
                }
                (legend(WHOSE.iter().copied().take(if report.of_slowest.unknown_ns > 0 { 4 } else { 3 })))
                (PreEscaped(drawing))
            }
            p.note {
                "Each checkpoint by its number. Above: when what happened, from CHECKPOINT_REPLY to VMSTATE_LOADED. Thin lines: \
                 the multifd channels, each from its first to its last byte. Below: whose time it was, in all; not in the order \
                 in which it passed."
            }
        }
    }
}

fn legend<'a>(entries: impl Iterator<Item = (&'a str, &'a str)>) -> Markup {
    html! {
        ul.legend {
            @for (class, name) in entries {
                li {
                    svg.sign viewBox="0 0 28 10" aria-hidden="true" {
                        rect class={ "part " (class) } width="28" height="10" {}
                    }
                    (name)
                }
            }
        }
    }
}
