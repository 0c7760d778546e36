//! Everything as one HTML page: the tables, and below them the comparison of each cell with its plots.

use colo_ring_tools::html_page::html_page;
use maud::html;

const STYLE: &str = "body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem } pre { overflow-x: auto } \
                     iframe { width: 100%; height: 85vh; border: 1px solid gray } \
                     summary { cursor: pointer; padding: .3rem 0 }";

/// The page. `tables` is text as for a terminal, `cells` are titles with a page of `colo-ring compare` each.
#[must_use]
pub fn page(title: &str, tables: &str, cells: &[(String, String)]) -> String {
    let body = html! {
        h1 { (title) }
        pre { (tables) }
        h2 { "Each in detail" }
        @for (title, comparison) in cells {
            details {
                summary { (title) }
                // A page within the page: it needs no file beside this one.
                iframe loading="lazy" title=(title) srcdoc=(comparison) {}
            }
        }
    };
    html_page(title, STYLE, &body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_put_in_cannot_end_where_it_is() {
        let page = page(
            "a & b",
            "<pre>",
            &[("cell".to_owned(), "<p class=\"x\">".to_owned())],
        );
        assert!(page.contains("<title>a &amp; b</title>"));
        assert!(page.contains("srcdoc=\"&lt;p class=&quot;x&quot;&gt;\""));
        assert_eq!(page.matches("<pre>").count(), 1);
    }
}
