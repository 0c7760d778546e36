use super::runs::Samples;
use super::*;
use crate::run_file::{Checkpoint, RunFile};
use std::time::UNIX_EPOCH;

/// A run whose checkpoints take `loaded` nanoseconds each.
fn run(name: &str, rounds: u32, loaded: impl Fn(u64) -> u64) -> Run {
    let options = serde_json::json!({ "pace": "max" });
    let mut file = RunFile::new(name, "colo-ring replay", options, Clock::Primary, UNIX_EPOCH);
    file.checkpoints = (0..u64::from(rounds) * 50)
        .map(|n| Checkpoint {
            n: n + 1,
            round: u32::try_from(n / 50).unwrap(),
            at_ns: n * 20_000_000,
            phases_ns: [
                ("loaded".to_owned(), loaded(n)),
                ("received".to_owned(), loaded(n) / 2),
            ]
            .into(),
            ..Checkpoint::default()
        })
        .collect();
    file.into()
}

/// Values that spread by a third, the same every time.
fn spread(n: u64) -> u64 {
    1_000_000 + (n * 7919) % 333_333
}

/// Wherever the baseline is among them.
#[test]
fn no_two_runs_that_are_drawn_look_alike_and_they_are_few() {
    let runs: Vec<_> = (0..20).map(|n| run(&format!("run {n}"), 1, spread)).collect();
    let sheet = include_str!("page.css");
    for baseline in [0, 7, 8, 19] {
        let name = runs[baseline].name();
        let drawn = (0..runs.len()).filter(|index| plots::is_drawn(&runs, *index, name));
        let styles: std::collections::BTreeSet<_> = drawn.clone().map(plots::class).collect();
        assert_eq!((drawn.clone().count(), styles.len()), (8, 8));
        assert!(drawn.clone().any(|index| index == baseline));
        for class in styles.iter().flat_map(|style| style.split(' ')) {
            assert!(
                class == "d0" || sheet.contains(&format!(".{class} {{")),
                "{class}"
            );
        }
        let options = Options {
            baseline: Some(name.to_owned()),
            phases: vec!["loaded".to_owned()],
            ..Options::default()
        };
        let page = html::page(&report(&runs, options).unwrap());
        assert_eq!(page.matches("<path class=\"curve s").count(), 8 + 2 * 8 + 8);
        assert!(page.contains("more cannot be told apart"));
    }
}

fn attributes<'a>(page: &'a str, element: &str, attribute: &str) -> Vec<&'a str> {
    let with = page.split(element).skip(1);
    let values = with.filter_map(|rest| rest.split(&format!(" {attribute}=\"")).nth(1)?.split('"').next());
    values.collect()
}

#[test]
fn percentiles_are_marked_on_their_grid_lines() {
    for rounds in [1, 7, 30] {
        let runs = [run("a", rounds, spread)];
        let drawing = plots::curves(&runs, "loaded", "a");
        let grid = attributes(&drawing, "<line class=\"grid\"", "x1");
        let marks = attributes(&drawing, "<circle class=\"mark", "cx");
        assert!(
            marks.len() >= 2 && marks.iter().all(|mark| grid.contains(mark)),
            "{marks:?} {grid:?}"
        );
    }
}

#[test]
fn a_page_says_the_result_when_runs_began_and_what_disturbed_them() {
    let mut runs = [run("QEMU", 8, |n| spread(n) * 2), run("half", 8, spread)];
    let page = html::page(&report(&runs, Options::default()).unwrap());
    for said in [
        "QEMU: loaded p50 ",
        "half: p50 ",
        "× 0.50 (95 %: ",
        "1970-01-01 00:00",
        "Options of all",
        "pace",
    ] {
        assert!(page.contains(said), "{said}");
    }
    assert!(!page.contains("Disturbed: "));
    if let Some(Samples::Checkpoints(points)) = runs[1].samples.get_mut("loaded") {
        points[3].disturbed = true;
    }
    runs[0].dropped = 5;
    let page = html::page(&report(&runs, Options::default()).unwrap());
    let table = page.split("<details>").next().unwrap();
    assert!(
        table.contains("Disturbed: ") && table.contains(">5</td>"),
        "{table}"
    );
}

#[test]
fn a_table_has_figures_ratios_and_verdicts() {
    let runs = [
        run("QEMU", 8, |n| spread(n) * 2),
        run("half", 8, spread),
        run("same", 8, |n| spread(n + 1) * 2),
    ];
    let comparison = report(&runs, Options::default()).unwrap();
    let phases: Vec<_> = comparison
        .phases
        .iter()
        .map(|phase| phase.phase.as_str())
        .collect();
    assert_eq!(phases, ["received", "loaded"]);
    let loaded = &comparison.phases[1].rows;
    assert!(loaded[0].ratios.is_none());
    let half = loaded[1].ratios.unwrap();
    assert_eq!(half.p50.ratio, Some(0.5));
    assert!(half.p50.interval.unwrap().difference_shown);
    let same = loaded[2].ratios.unwrap();
    assert!(!same.p50.interval.unwrap().difference_shown, "{same:?}");
    assert_eq!(loaded[0].resampled, Some(Resampling::Rounds));

    let table = comparison.table();
    for part in [
        "to QEMU",
        "95 % interval",
        "lower",
        "none",
        "whole rounds",
        "* is the maximum",
    ] {
        assert!(table.contains(part), "{part} is missing in\n{table}");
    }
    // 400 checkpoints: p99 is one, p99.9 is the maximum.
    assert!(!loaded[0].p99_is_max && loaded[0].p99_9_is_max);
}

#[test]
fn the_same_seed_gives_the_same_comparison() {
    let runs = [run("a", 2, spread), run("b", 2, |n| spread(n * 3))];
    let json = |seed| {
        let options = Options {
            seed,
            ..Options::default()
        };
        serde_json::to_value(report(&runs, options).unwrap()).unwrap()
    };
    assert_eq!(json(1), json(1));
    assert_ne!(json(1)["phases"], json(2)["phases"]);
    let json = json(1);
    assert_eq!(
        (&json["schema"], &json["schema_version"]),
        (&"colo-ring.compare".into(), &1.into())
    );
    assert_eq!(json["runs"][0]["options"]["pace"], "max");
    assert!(json["runs"][0]["machine"]["kernel"].is_string());
    let row = &json["phases"][1]["rows"][1];
    assert!(
        row["p99_ns"].is_u64() && row["ratios"]["p99"]["interval"]["low"].is_f64(),
        "{row}"
    );
}

#[test]
fn baseline_and_phases_are_chosen_or_refused() {
    let runs = [run("a", 1, spread), run("b", 1, spread)];
    let options = |baseline: &str, phase: &str| Options {
        baseline: Some(baseline.to_owned()),
        phases: vec![phase.to_owned()],
        ..Options::default()
    };
    let comparison = report(&runs, options("b", "loaded")).unwrap();
    assert_eq!(comparison.phases.len(), 1);
    assert!(comparison.phases[0].rows[0].ratios.is_some());
    let said = report(&runs, options("c", "loaded")).unwrap_err().to_string();
    assert!(said.contains("\"c\"") && said.contains("a, b"), "{said}");
    let said = report(&runs, options("a", "pause")).unwrap_err().to_string();
    assert!(said.contains("loaded, received"), "{said}");
}

#[test]
fn rounds_of_one_name_are_added_up_only_when_asked() {
    let runs = || vec![run("a", 1, spread), run("b", 1, spread), run("a", 2, spread)];
    let said = gather(runs(), false).unwrap_err().to_string();
    assert!(said.contains("--merge"), "{said}");
    let gathered = gather(runs(), true).unwrap();
    assert_eq!(gathered.len(), 2);
    let distribution = gathered[0].distribution("loaded").unwrap();
    assert_eq!(
        (distribution.count(), distribution.rounds()),
        (150, vec![0, 1, 2])
    );
}

#[test]
fn runs_are_named_with_their_compression_where_one_has_it() {
    let mut runs = [
        run("raw", 1, spread),
        run("packed", 1, spread),
        run("unknown", 1, spread),
    ];
    runs[0].compression = Some("none".to_owned());
    let table = |runs: &[Run]| report(runs, Options::default()).unwrap().table();
    assert!(!table(&runs).contains("not compressed"));
    runs[1].compression = Some("zstd level 3".to_owned());
    let text = table(&runs);
    for label in ["raw (not compressed) ", "packed (zstd level 3) ", "unknown "] {
        assert!(text.contains(label), "{label}: {text}");
    }
    let page = html::page(&report(&runs, Options::default()).unwrap());
    assert!(page.contains("packed (zstd level 3)"));
    let two = [
        runs[0].clone(),
        Run {
            name: "raw".to_owned(),
            ..runs[1].clone()
        },
    ];
    let refused = |merge| gather(two.to_vec(), merge).unwrap_err().to_string();
    let said = refused(true);
    assert!(
        said.contains("compressed in different ways") && said.contains("NAME=FILE"),
        "{said}"
    );
    let said = refused(false);
    assert!(said.ends_with("distinguish them by NAME=FILE"), "{said}");
}

#[test]
fn a_page_needs_nothing_else_and_escapes_what_comes_from_files() {
    let evil = "</title><script>alert(1)</script>\"'&";
    let mut runs = [run(evil, 1, spread), run("b", 1, |n| spread(n) * 50)];
    runs[0].notes.push(evil.to_owned());
    runs[0].files.push(evil.into());
    runs[0].options = serde_json::json!({ evil: evil });
    runs[0].command = Some(evil.to_owned());
    runs[0].machine.as_mut().unwrap().cpu_model = evil.to_owned();
    let page = html::page(&report(&runs, Options::default()).unwrap());
    assert!(!page.contains("<script") && !page.contains("</title><script"));
    for outside in ["http:", "https:", "src=", "href=", "@import", "url("] {
        assert!(!page.contains(outside), "{outside}");
    }
    for (open, close) in [
        ("<svg ", "</svg>"),
        ("<table", "</table>"),
        ("<section", "</section>"),
        ("<div", "</div>"),
    ] {
        assert_eq!(page.matches(open).count(), page.matches(close).count(), "{open}");
    }
}

#[test]
fn pages_of_odd_runs_have_no_numbers_that_are_none() {
    let runs = [
        run("zero", 1, |_| 0),
        run("one value", 1, |_| 5),
        run("huge", 1, |n| u64::MAX - n),
    ];
    for runs in [&runs[..], &runs[..1], &runs[1..2]] {
        let page = html::page(&report(runs, Options::default()).unwrap());
        assert!(!page.contains("NaN") && !page.contains("inf"), "{}", runs[0].name);
    }
    let page = html::page(&report(&[], Options::default()).unwrap());
    assert!(page.contains("</html>"));
}

#[test]
fn long_runs_make_no_long_pages() {
    let runs = [run("long", 2000, spread)];
    assert_eq!(runs[0].checkpoints().0, 100_000);
    let page = html::page(
        &report(
            &runs,
            Options {
                resamples: 10,
                ..Options::default()
            },
        )
        .unwrap(),
    );
    assert!(page.len() < 400_000, "{} bytes", page.len());
}

#[test]
fn a_recorder_beside_a_run_is_of_that_run_or_left_out() {
    use colo_ring::store::{FlightLog, FlightRecord};
    let record = |seconds: u64| FlightRecord {
        requested_at_ns: seconds * 1_000_000_000,
        ..FlightRecord::default()
    };
    let log = |started_s: u64| FlightLog {
        started_unix_ns: started_s * 1_000_000_000,
        records: vec![record(10), record(20)],
        ..FlightLog::default()
    };
    // By the primary's clock, for 8 seconds from then on.
    let mut run = run("a", 8, spread);
    run.started_unix_ms = Some(1_000_000);
    assert!(run.is_recorded_by(&log(995)) && !run.is_recorded_by(&log(900)));
    run.clock = Some(Clock::Receiver);
    assert!(run.is_recorded_by(&log(1000)) && !run.is_recorded_by(&log(995)));
    run.started_unix_ms = None;
    assert!(!run.is_recorded_by(&log(1000)));
}

#[test]
fn merged_runs_keep_the_date_that_is_known() {
    let mut dated = run("a", 1, spread);
    dated.started_unix_ms = Some(5);
    let undated = Run {
        started_unix_ms: None,
        ..run("a", 1, spread)
    };
    let merged = gather(vec![dated, undated], true).unwrap();
    assert_eq!(merged[0].started_unix_ms, Some(5));
}
