//! An HTML page that needs no other file: no script, nothing is loaded, and nothing that a peer has chosen is
//! a command to a terminal that shows it.

use colo_ring::text::printable_lines;
use maud::{DOCTYPE, Markup, PreEscaped, html};

/// The page; `style` is its style sheet. Light and dark are the reader's.
#[must_use]
pub fn html_page(title: &str, style: &str, body: &Markup) -> String {
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                title { (title) }
                style { (PreEscaped(style)) }
            }
            body { (body) }
        }
    };
    printable_lines(&page.into_string())
}
