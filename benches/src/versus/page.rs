//! Everything as one HTML page: the tables, and below them the comparison of each cell with its plots.

use std::fmt::Write;

/// The page. `tables` is text as for a terminal, `cells` are titles with a page of `colo-ring compare` each.
#[must_use]
pub fn page(title: &str, tables: &str, cells: &[(String, String)]) -> String {
    let mut page = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n<title>{title}</title>\n\
         <style>body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem }} pre {{ overflow-x: auto }} \
         iframe {{ width: 100%; height: 85vh; border: 1px solid gray }} \
         summary {{ cursor: pointer; padding: .3rem 0 }}</style>\n</head>\n<body>\n\
         <h1>{title}</h1>\n<pre>{tables}</pre>\n<h2>Each in detail</h2>\n",
        title = escape(title),
        tables = escape(tables),
    );
    for (title, comparison) in cells {
        // A page within the page: it needs no file beside this one.
        let _ = writeln!(
            page,
            "<details><summary>{}</summary>\n<iframe loading=\"lazy\" title=\"{0}\" srcdoc=\"{}\"></iframe></details>",
            escape(title),
            escape(comparison)
        );
    }
    page.push_str("</body>\n</html>\n");
    page
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
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
