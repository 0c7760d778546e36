//! An interval log.

use super::{InspectArgs, Kind};
use crate::hlog::{Entry, HlogError, Interval, Log, Reader, Torn};
use crate::output::{CommandError, Lines, print, print_json, printable, table, tell};
use colo_ring::metrics::display_nanoseconds;
use hdrhistogram::Histogram;
use schemars::JsonSchema;
use serde::Serialize;

const QUANTILES: [(&str, f64); 5] = [
    ("p50", 0.5),
    ("p90", 0.9),
    ("p99", 0.99),
    ("p99.9", 0.999),
    ("p99.99", 0.9999),
];

/// The overview of a log.
#[derive(Serialize, JsonSchema)]
pub(super) struct LogContent {
    /// Start of the log, in seconds since 1970; null if it does not say it.
    started_unix_s: Option<f64>,
    /// Its comments.
    comments: Vec<String>,
    /// Its intervals.
    intervals: u64,
    /// Figures of all intervals.
    total: Figures,
    /// Figures by tag.
    tags: Vec<TagFigures>,
    /// There are more tags than are listed.
    tags_not_kept: bool,
    /// Where it ends in the middle of a line; null if it does not.
    torn: Option<Torn>,
}

/// The intervals of one tag.
#[derive(Serialize, JsonSchema)]
struct TagFigures {
    /// The tag.
    tag: String,
    /// Its intervals.
    intervals: u64,
    #[serde(flatten)]
    figures: Figures,
}

/// Of one histogram, in nanoseconds.
#[derive(Serialize, JsonSchema)]
struct Figures {
    /// Values.
    count: u64,
    /// The shortest.
    min_ns: u64,
    /// Arithmetic mean.
    mean_ns: f64,
    /// Median.
    p50_ns: u64,
    /// 90th percentile.
    p90_ns: u64,
    /// 99th percentile.
    p99_ns: u64,
    /// 99.9th percentile.
    p99_9_ns: u64,
    /// 99.99th percentile.
    p99_99_ns: u64,
    /// The longest.
    max_ns: u64,
}

impl Figures {
    fn new(histogram: &Histogram<u64>, factor: u64) -> Self {
        let [p50_ns, p90_ns, p99_ns, p99_9_ns, p99_99_ns] =
            QUANTILES.map(|(_, quantile)| histogram.value_at_quantile(quantile).saturating_mul(factor));
        Self {
            count: histogram.len(),
            min_ns: histogram.min().saturating_mul(factor),
            mean_ns: histogram.mean() * factor as f64,
            p50_ns,
            p90_ns,
            p99_ns,
            p99_9_ns,
            p99_99_ns,
            max_ns: histogram.max().saturating_mul(factor),
        }
    }

    fn cells(&self) -> [String; 7] {
        [
            self.count.to_string(),
            display_nanoseconds(self.p50_ns),
            display_nanoseconds(self.p90_ns),
            display_nanoseconds(self.p99_ns),
            display_nanoseconds(self.p99_9_ns),
            display_nanoseconds(self.p99_99_ns),
            display_nanoseconds(self.max_ns),
        ]
    }
}

/// An interval in the list.
#[derive(Serialize, JsonSchema)]
pub(super) struct IntervalContent {
    /// Its line in the file, from 1.
    line: u64,
    /// The line's first byte in the file.
    offset: u64,
    /// Its tag; null without one.
    tag: Option<String>,
    /// Its beginning, since the start of the log or as the log has it.
    start_s: f64,
    /// Its length.
    length_s: f64,
    #[serde(flatten)]
    figures: Figures,
}

pub(super) fn run(args: &InspectArgs) -> Result<(), CommandError> {
    args.allow("an interval log", &[Kind::Intervals], false)?;
    let failed = |error: HlogError| CommandError::Failed(error.to_string());
    let factor = args.unit.nanoseconds();
    if args.kind.is_some() {
        return list(args, factor);
    }
    let log = Log::read(&args.file).map_err(failed)?;
    let content = LogContent {
        started_unix_s: log.start_time_s,
        comments: log.comments,
        intervals: log.intervals,
        total: Figures::new(&log.total, factor),
        tags: log
            .tags
            .into_iter()
            .map(|(tag, (intervals, histogram))| TagFigures {
                tag,
                intervals,
                figures: Figures::new(&histogram, factor),
            })
            .collect(),
        tags_not_kept: log.tags_not_kept,
        torn: log.torn,
    };
    if args.json {
        return print_json(&args.inspection("interval log", content));
    }
    print(&render(&content))
}

fn render(content: &LogContent) -> String {
    let mut text = format!("interval log, {} intervals", content.intervals);
    if let Some(started) = content.started_unix_s {
        text.push_str(&format!(", started {started:.3} s after 1970"));
    }
    text.push('\n');
    for comment in &content.comments {
        text.push_str(&format!("  {}\n", printable(comment)));
    }
    text.push('\n');
    let head = [
        "",
        "intervals",
        "n",
        "p50",
        "p90",
        "p99",
        "p99.9",
        "p99.99",
        "max",
    ];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    let total = ["all".to_owned(), content.intervals.to_string()];
    rows.push([&total[..], &content.total.cells()].concat());
    for tag in &content.tags {
        let begin = [printable(&tag.tag), tag.intervals.to_string()];
        rows.push([&begin[..], &tag.figures.cells()].concat());
    }
    text.push_str(&table(&rows));
    if content.tags_not_kept {
        text.push_str("further tags are in the first row alone\n");
    }
    if let Some(torn) = &content.torn {
        text.push_str(&format!("it is {torn}\n"));
    }
    text
}

/// Interval by interval, as it is read: a log may have millions.
fn list(args: &InspectArgs, factor: u64) -> Result<(), CommandError> {
    let failed = |error: HlogError| CommandError::Failed(error.to_string());
    let mut reader = Reader::open(&args.file).map_err(failed)?;
    let mut lines = Lines::new(args.json, &args.around_list("interval log"), "intervals")?;
    let head = "start s|length s|n|p50|p90|p99|p99.9|max|tag";
    lines.head(head, &[9, 8, 6, 7, 7, 7, 7, 7])?;
    while let Some(entry) = reader.next_entry().map_err(failed)? {
        match entry {
            Entry::Interval(interval) => {
                let content = of_interval(interval, factor);
                lines.item(&content, || {
                    let [count, p50, p90, p99, p99_9, _, max] = content.figures.cells();
                    let start = format!("{:.3}", content.start_s);
                    let length = format!("{:.3}", content.length_s);
                    let tag = content.tag.as_deref().map_or_else(String::new, printable);
                    vec![start, length, count, p50, p90, p99, p99_9, max, tag]
                })?;
            }
            Entry::Torn(torn) => tell(&format!("{} is {torn}", args.file.display())),
            Entry::StartTime(_) | Entry::BaseTime(_) | Entry::Comment(_) => {}
        }
    }
    lines.finish()
}

fn of_interval(interval: Interval, factor: u64) -> IntervalContent {
    IntervalContent {
        line: interval.line,
        offset: interval.offset,
        figures: Figures::new(&interval.histogram, factor),
        tag: interval.tag,
        start_s: interval.start_s,
        length_s: interval.length_s,
    }
}
