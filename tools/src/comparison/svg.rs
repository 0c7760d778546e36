//! Drawing: SVG elements, and axes that place values on them.
//!
//! Colours are classes that the page's style sheet fills in, so that one drawing serves light and dark. Every text
//! that is drawn is escaped here.

use colo_ring::metrics::display_nanoseconds;
use std::fmt::Write;

/// Text that may stand in HTML and SVG, in attributes too.
pub(crate) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            // Not allowed in XML, and nothing to look at.
            control if control.is_control() && control != '\n' => escaped.push('\u{fffd}'),
            other => escaped.push(other),
        }
    }
    escaped
}

/// On which side of its point a text is.
#[derive(Clone, Copy)]
pub(crate) enum Anchor {
    Start,
    Middle,
    End,
}

/// A drawing.
pub(crate) struct Svg {
    text: String,
}

impl Svg {
    /// An empty one of that size, which scales with the page. `label` is what a screen reader says.
    pub(crate) fn new(width: f64, height: f64, label: &str) -> Self {
        let text = format!(
            "<svg viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"{}\">\n",
            escape(label)
        );
        Self { text }
    }

    pub(crate) fn line(&mut self, class: &str, from: (f64, f64), to: (f64, f64)) {
        self.push(format_args!(
            "<line class=\"{class}\" x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\"/>\n",
            from.0, from.1, to.0, to.1
        ));
    }

    pub(crate) fn rect(&mut self, class: &str, at: (f64, f64), size: (f64, f64), title: &str) {
        let title = title_element(title);
        self.push(format_args!(
            "<rect class=\"{class}\" x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\">{title}</rect>\n",
            at.0, at.1, size.0, size.1
        ));
    }

    pub(crate) fn circle(&mut self, class: &str, at: (f64, f64), radius: f64, title: &str) {
        let title = title_element(title);
        self.push(format_args!(
            "<circle class=\"{class}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"{radius}\">{title}</circle>\n",
            at.0, at.1
        ));
    }

    pub(crate) fn text(&mut self, class: &str, at: (f64, f64), anchor: Anchor, text: &str) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        let text = escape(text);
        self.push(format_args!(
            "<text class=\"{class}\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"{anchor}\">{text}</text>\n",
            at.0, at.1
        ));
    }

    /// A line through all points.
    pub(crate) fn polyline(
        &mut self,
        class: &str,
        points: impl IntoIterator<Item = (f64, f64)>,
        title: &str,
    ) {
        let mut path = String::new();
        for (index, (x, y)) in points.into_iter().enumerate() {
            let step = if index == 0 { 'M' } else { 'L' };
            let _ = write!(path, "{step}{x:.1} {y:.1}");
        }
        self.path(class, &path, title);
    }

    /// A dot at every point, as one element: strokes of no length with round ends.
    pub(crate) fn dots(&mut self, class: &str, points: impl IntoIterator<Item = (f64, f64)>) {
        let mut path = String::new();
        for (x, y) in points {
            let _ = write!(path, "M{x:.1} {y:.1}h0");
        }
        self.path(class, &path, "");
    }

    fn path(&mut self, class: &str, path: &str, title: &str) {
        let title = title_element(title);
        self.push(format_args!(
            "<path class=\"{class}\" d=\"{path}\">{title}</path>\n"
        ));
    }

    pub(crate) fn finish(mut self) -> String {
        self.text.push_str("</svg>\n");
        self.text
    }

    fn push(&mut self, element: std::fmt::Arguments) {
        let _ = self.text.write_fmt(element);
    }
}

/// What is shown where the pointer rests.
fn title_element(title: &str) -> String {
    match title {
        "" => String::new(),
        _ => format!("<title>{}</title>", escape(title)),
    }
}

/// An axis of durations: logarithmic if they span much, else linear.
pub(crate) struct Axis {
    low: f64,
    high: f64,
    logarithmic: bool,
    /// Where `low` and `high` are drawn.
    from: f64,
    to: f64,
}

/// From this ratio of the longest to the shortest on, an axis is logarithmic.
const LOGARITHMIC_FROM: f64 = 8.0;

impl Axis {
    /// An axis for `low..=high` nanoseconds, drawn from `from` to `to`.
    pub(crate) fn new(low: u64, high: u64, from: f64, to: f64) -> Self {
        // A logarithm needs more than 0, and an axis some length.
        let (low, high) = (low.max(1) as f64, high.max(2) as f64);
        let logarithmic = high / low >= LOGARITHMIC_FROM;
        let (low, high) = if logarithmic {
            (low * 0.93, high * 1.07)
        } else {
            // A fifth around values that hardly differ, so that ticks do.
            let margin = ((high - low) * 0.05).max(high * 0.1);
            ((low - margin).max(0.0), high + margin)
        };
        Self {
            low,
            high,
            logarithmic,
            from,
            to,
        }
    }

    pub(crate) fn is_logarithmic(&self) -> bool {
        self.logarithmic
    }

    pub(crate) fn place(&self, value: u64) -> f64 {
        self.place_exactly(value.max(1) as f64)
    }

    fn place_exactly(&self, value: f64) -> f64 {
        let part = match self.logarithmic {
            true => (value / self.low).ln() / (self.high / self.low).ln(),
            false => (value - self.low) / (self.high - self.low),
        };
        self.from + part * (self.to - self.from)
    }

    /// Positions and labels of the ticks: about `count`.
    pub(crate) fn ticks(&self, count: usize) -> Vec<(f64, String)> {
        let values = match self.logarithmic {
            true => self.logarithmic_ticks(count),
            false => steps(self.low, self.high, count),
        };
        let tick = |value: f64| {
            let nanoseconds = format!("{value:.0}").parse().unwrap_or(u64::MAX);
            (self.place_exactly(value), display_nanoseconds(nanoseconds))
        };
        values.into_iter().map(tick).collect()
    }

    /// 1, 2 and 5 of every decade; or fewer where that is too much, down to every so many decades.
    fn logarithmic_ticks(&self, count: usize) -> Vec<f64> {
        let (first, last) = (self.low.log10().floor(), self.high.log10().ceil());
        let ticks_at = |factors: &[f64], stride: f64| {
            let mut ticks = Vec::new();
            let mut exponent = first;
            while exponent <= last {
                let decade = 10f64.powf(exponent);
                ticks.extend(factors.iter().map(|factor| factor * decade));
                exponent += stride;
            }
            ticks.retain(|tick| (self.low..=self.high).contains(tick));
            ticks
        };
        let stride = ((last - first) / count as f64).ceil().max(1.0);
        [&[1.0, 2.0, 5.0][..], &[1.0, 3.0]]
            .map(|factors| ticks_at(factors, 1.0))
            .into_iter()
            .find(|ticks| ticks.len() <= count + 2)
            .unwrap_or_else(|| ticks_at(&[1.0], stride))
    }
}

/// Round values from `low` to `high`, about `count`.
pub(crate) fn steps(low: f64, high: f64, count: usize) -> Vec<f64> {
    let rough = (high - low) / count as f64;
    let decade = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0]
        .map(|factor| factor * decade)
        .into_iter()
        .find(|step| *step >= rough)
        .unwrap_or(rough);
    let mut values = Vec::new();
    let mut value = (low / step).ceil() * step;
    // Bounded whatever the numbers are.
    while value <= high && values.len() <= 2 * count {
        values.push(value);
        value += step;
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_from_a_file_is_markup() {
        let mut svg = Svg::new(10.0, 10.0, "\"><script>");
        svg.text("t", (1.0, 2.0), Anchor::Start, "<b>&'\u{1b}");
        svg.circle("c", (1.0, 2.0), 3.0, "</title><script>");
        let text = svg.finish();
        assert!(
            !text.contains("<script") && !text.contains("<b>") && !text.contains('\u{1b}'),
            "{text}"
        );
        assert!(text.contains("&lt;b&gt;&amp;&#39;\u{fffd}"));
    }

    #[test]
    fn axes_have_a_few_ticks_within_them() {
        for (low, high) in [
            (1, 1),
            (0, 0),
            (0, u64::MAX),
            (1_000_000, 1_000_001),
            (900_000, 1_400_000),
            (50_000, 80_000_000),
            (3_000, 30_000),
        ] {
            let axis = Axis::new(low, high, 100.0, 0.0);
            let ticks = axis.ticks(6);
            assert!((1..=12).contains(&ticks.len()), "{low}..{high}: {ticks:?}");
            for (place, _) in ticks {
                assert!((-0.1..=100.1).contains(&place), "{low}..{high}: {place}");
            }
            for value in [low, high] {
                assert!((-0.1..=100.1).contains(&axis.place(value)));
            }
        }
    }
}
