//! The rules of OpenMetrics 1.0's text, as far as a page of this project can break them.

use std::collections::{BTreeMap, BTreeSet};

/// A page whose rules hold.
#[derive(Debug, Default)]
pub struct Page {
    /// The type of each family.
    pub families: BTreeMap<String, String>,
    /// Every sample by its name with its labels, as written.
    pub samples: BTreeMap<String, f64>,
}

/// A family that is being read.
#[derive(Default)]
struct Family {
    name: String,
    kind: String,
    /// Buckets of the metric that is being read: its labels without `le`, the last bound, the last count.
    buckets: Option<(String, f64, f64)>,
}

impl Page {
    /// Reads a page.
    ///
    /// # Errors
    /// The rule that is broken, with the line.
    pub fn read(text: &str) -> Result<Self, String> {
        let body = text
            .strip_suffix("# EOF\n")
            .ok_or("the page does not end with # EOF")?;
        let mut page = Self::default();
        let mut family = Family::default();
        for line in body.lines() {
            page.read_line(line, &mut family)
                .map_err(|rule| format!("{rule}: {line}"))?;
        }
        page.check_counts()?;
        Ok(page)
    }

    /// The value of a sample; its labels are those written, in any order.
    #[must_use]
    pub fn value(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let labels = labels.iter().map(|(name, value)| format!("{name}=\"{value}\""));
        self.find(name, labels.collect())
    }

    fn read_line(&mut self, line: &str, family: &mut Family) -> Result<(), &'static str> {
        let words: Vec<_> = line.splitn(4, ' ').collect();
        match words[..] {
            ["#", "HELP", name, _] => {
                if self.families.contains_key(name) {
                    return Err("a family comes twice");
                }
                self.families.insert(name.to_owned(), String::new());
                *family = Family {
                    name: name.to_owned(),
                    ..Family::default()
                };
                Ok(())
            }
            ["#", "TYPE", name, kind] if name == family.name => {
                kind.clone_into(&mut family.kind);
                self.families.insert(name.to_owned(), kind.to_owned());
                Ok(())
            }
            ["#", "UNIT", name, unit] if name == family.name => match name.ends_with(&format!("_{unit}")) {
                true => Ok(()),
                false => Err("the name of a family does not end with its unit"),
            },
            ["#", ..] => Err("a comment that is not of its family"),
            _ => self.read_sample(line, family),
        }
    }

    fn read_sample(&mut self, line: &str, family: &mut Family) -> Result<(), &'static str> {
        let (sample, value) = line.rsplit_once(' ').ok_or("no value")?;
        let value: f64 = value.parse().map_err(|_| "not a number")?;
        let (name, labels) = split(sample);
        let names: BTreeSet<_> = parts(labels)
            .iter()
            .map(|part| part.split_once('=').map(|(name, _)| name.to_owned()))
            .collect::<Option<_>>()
            .ok_or("a label without a value")?;
        if names.len() != parts(labels).len() {
            return Err("a label comes twice");
        }
        let suffix = name
            .strip_prefix(&*family.name)
            .ok_or("a sample outside of its family")?;
        let suffixes: &[&str] = match &*family.kind {
            "counter" => &["_total"],
            "gauge" => &[""],
            "info" => &["_info"],
            "histogram" => &["_bucket", "_sum", "_count"],
            _ => return Err("a type that is not used here"),
        };
        if !suffixes.contains(&suffix) {
            return Err("a suffix that the type does not have");
        }
        if family.kind != "gauge" && value < 0.0 || family.kind == "info" && value != 1.0 {
            return Err("a value that the type does not have");
        }
        if self.samples.insert(sample.to_owned(), value).is_some() {
            return Err("a sample comes twice");
        }
        match suffix {
            "_bucket" => read_bucket(labels, value, family),
            _ => Ok(()),
        }
    }

    /// Each histogram's count is that of its last bucket.
    fn check_counts(&self) -> Result<(), String> {
        let families = self.families.iter().filter(|(_, kind)| *kind == "histogram");
        let names: BTreeSet<_> = families.map(|(name, _)| format!("{name}_count")).collect();
        for (sample, count) in &self.samples {
            let (name, labels) = split(sample);
            if names.contains(name) {
                let mut wanted = parts(labels);
                wanted.push("le=\"+Inf\"".to_owned());
                let last = self.find(&name.replace("_count", "_bucket"), wanted);
                if last != Some(*count) {
                    return Err(format!("the last bucket is not the count: {sample}"));
                }
            }
        }
        Ok(())
    }

    fn find(&self, name: &str, labels: Vec<String>) -> Option<f64> {
        let wanted: BTreeSet<_> = labels.into_iter().collect();
        let found = self.samples.iter().find(|(sample, _)| {
            let (own, labels) = split(sample);
            own == name && parts(labels).into_iter().collect::<BTreeSet<_>>() == wanted
        });
        found.map(|(_, value)| *value)
    }
}

fn read_bucket(labels: &str, value: f64, family: &mut Family) -> Result<(), &'static str> {
    let (bounds, others): (Vec<_>, Vec<_>) = parts(labels)
        .into_iter()
        .partition(|label| label.starts_with("le="));
    let [bound] = &bounds[..] else {
        return Err("a bucket without one bound");
    };
    let bound = bound.trim_start_matches("le=").trim_matches('"');
    let bound: f64 = bound
        .trim_start_matches('+')
        .parse()
        .map_err(|_| "a bound that is not a number")?;
    let of = others.join(",");
    if let Some((same, last_bound, last)) = &family.buckets
        && *same == of
        && *last_bound < f64::INFINITY
        && (bound <= *last_bound || value < *last)
    {
        return Err("buckets that do not grow");
    }
    family.buckets = Some((of, bound, value));
    Ok(())
}

/// A sample's name and what is between its braces.
fn split(sample: &str) -> (&str, &str) {
    let (name, rest) = sample.split_once('{').unwrap_or((sample, "}"));
    (name, rest.strip_suffix('}').unwrap_or(rest))
}

/// Labels, each `name="value"`.
fn parts(labels: &str) -> Vec<String> {
    let (mut parts, mut part) = (Vec::new(), String::new());
    let (mut is_quoted, mut is_escaped) = (false, false);
    for letter in labels.chars() {
        match letter {
            ',' if !is_quoted => {
                parts.push(std::mem::take(&mut part));
                continue;
            }
            '"' if !is_escaped => is_quoted = !is_quoted,
            _ => {}
        }
        is_escaped = letter == '\\' && !is_escaped;
        part.push(letter);
    }
    if !part.is_empty() {
        parts.push(part);
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "# HELP a_seconds Some text\n# TYPE a_seconds histogram\n# UNIT a_seconds seconds\n\
                        a_seconds_bucket{x=\"1,\\\"}\",le=\"0.1\"} 1\na_seconds_bucket{x=\"1,\\\"}\",le=\"+Inf\"} 3\n\
                        a_seconds_sum{x=\"1,\\\"}\"} 4.5\na_seconds_count{x=\"1,\\\"}\"} 3\n\
                        # HELP b A counter\n# TYPE b counter\nb_total 7\n# EOF\n";

    #[test]
    fn broken_rules_are_found() {
        let page = Page::read(GOOD).expect("a good page");
        assert_eq!(page.value("b_total", &[]), Some(7.0));
        assert_eq!(page.value("a_seconds_count", &[("x", "1,\\\"}")]), Some(3.0));
        for (from, to, rule) in [
            ("# EOF\n", "", "does not end"),
            ("b_total 7", "b 7", "a suffix"),
            ("b_total 7", "b_total 7\nb_total 7", "a sample comes twice"),
            ("b_total 7", "b_total -7", "a value"),
            ("# HELP b A", "# HELP a_seconds A", "a family comes twice"),
            ("seconds seconds", "seconds bytes", "its unit"),
            (
                "count{x=\"1,\\\"}\"} 3",
                "count{x=\"1,\\\"}\"} 2",
                "not the count",
            ),
            ("le=\"+Inf\"} 3", "le=\"+Inf\"} 0", "do not grow"),
            ("b_total 7", "c_total 7", "outside of its family"),
        ] {
            let refused = Page::read(&GOOD.replace(from, to)).expect_err(rule);
            assert!(refused.contains(rule), "{refused}");
        }
    }
}
