//! The whole of `bench-vs-qemu`: from its options to its files.

use super::captures::{Captures, Source};
use super::contest::{Play, TurnOf, measure};
use super::live::Live;
use super::options::Options;
use super::plan::{Plan, WARM_UP_CHECKPOINTS};
use super::published;
use super::replays::Replays;
use super::results::Results;
use super::secondary::StartOptions;
use colo_ring_tests::lab::{Company, HostSetting, Lab, LabError};
use colo_ring_tests::tls::Authority;
use colo_ring_tools::output::{CommandError, ProgressLine, print, tell};
use std::time::{Duration, Instant};

/// Measures what the plan says and writes the results. Returns whether everything that was planned was measured.
///
/// # Errors
/// When there is no laboratory, a capture cannot be made, a file cannot be written, or it was interrupted: what
/// was measured before is written then.
pub fn run(options: &Options, plan: &Plan) -> Result<bool, LabError> {
    tell(&format!("{plan}: {}", about(plan.estimate())));
    if options.dry_run {
        return Ok(true);
    }
    let lab = if options.synth {
        Lab::without_qemu(Company::Nobody)?
    } else {
        Lab::open(Company::Nobody)?
    };
    let version = if options.synth {
        None
    } else {
        Some(lab.qemu_version()?)
    };
    let qemu = version.as_ref().map(|version| format!("QEMU {version}"));
    let source = version.map_or(Source::Synth, Source::Qemu);
    let captures = Captures::in_directory(&lab, &options.captures_dir(), source)?;
    if !options.live {
        make_missing(&captures, plan)?;
    }

    let settings = settings(options);
    let in_words = settings
        .iter()
        .map(|setting| format!("{} {}", setting.name(), setting.now()))
        .collect();
    let mut results = Results::new(options, options.out(), qemu.clone(), in_words)?;
    tell(&results.conditions());
    let out = results.directory().to_owned();
    let authority = options.tls.then(Authority::new);
    let start = StartOptions {
        authority: authority.as_ref(),
        lab: &lab,
        transport: options.transport(),
        cores: options.cores.as_deref(),
    };
    let qemu = qemu.as_deref().unwrap_or_default();
    let play: Box<dyn Play + '_> = if options.live {
        Box::new(Live {
            start,
            out: &out,
            qemu,
        })
    } else {
        let captures = &captures;
        Box::new(Replays {
            start,
            captures,
            out: &out,
            qemu,
            no_stalls: options.no_stalls,
        })
    };
    warm_up(plan, &*play)?;
    measure_all(plan, &*play, &mut results)?;
    finish(options, &results)?;
    let lacks = results.lacks(plan.checkpoints);
    for lack in &lacks {
        tell(&format!("not measured as planned: {lack}"));
    }
    Ok(lacks.is_empty())
}

fn finish(options: &Options, results: &Results<'_>) -> Result<(), LabError> {
    print(&results.overview()).map_err(cannot_print)?;
    tell(&format!(
        "written: {}",
        results.directory().join("index.html").display()
    ));
    if let Some(readme) = &options.readme {
        let inserted = published::insert(readme, &results.published());
        inserted.map_err(LabError::io(format!("put the table into {}", readme.display())))?;
    }
    Ok(())
}

/// What decides over the times of loopback TCP, set for as long as the values live.
fn settings(options: &Options) -> Vec<HostSetting> {
    let settings = vec![
        HostSetting::cubic(),
        HostSetting::no_slow_start_after_idle(),
        HostSetting::loopback_on_core(options.softirq_core()),
    ];
    for setting in &settings {
        tell(&format!("{} = {setting}", setting.file().display()));
    }
    settings
}

fn make_missing(captures: &Captures<'_>, plan: &Plan) -> Result<(), LabError> {
    let mut shapes: Vec<_> = plan.cells.iter().map(|cell| cell.shape).collect();
    shapes.sort();
    shapes.dedup();
    for shape in shapes {
        let file = captures.file(shape);
        if file.exists() {
            continue;
        }
        tell(&format!("capturing {shape}: {}", file.display()));
        captures.make(shape)?;
    }
    Ok(())
}

/// A session of each that counts nowhere, with the largest checkpoints: memory that this host has taken back is slow to
/// come again, and files are read for the first time.
fn warm_up(plan: &Plan, play: &dyn Play) -> Result<(), LabError> {
    let Some(cell) = plan.cells.iter().max_by_key(|cell| cell.shape.mib) else {
        return Ok(());
    };
    let mut line = ProgressLine::new(true);
    for secondary in plan.secondaries_in(*cell) {
        line.show(&format!("warming up: {}", secondary.name));
        let turn = TurnOf {
            secondary,
            cell: *cell,
            round: 0,
            checkpoints: WARM_UP_CHECKPOINTS,
        };
        // What fails here fails in its first turn, too, and is reported there.
        if let Err(LabError::Interrupted) = play.session(&turn) {
            return Err(LabError::Interrupted);
        }
    }
    Ok(())
}

fn measure_all(plan: &Plan, play: &dyn Play, results: &mut Results<'_>) -> Result<(), LabError> {
    let started = Instant::now();
    let estimate = plan.estimate();
    for cell in &plan.cells {
        let mut line = ProgressLine::new(true);
        let progress = |what: &str| {
            let left = estimate.saturating_sub(started.elapsed());
            line.show(&format!("{what}; {} left", about(left)));
        };
        let result = measure(plan, *cell, play, progress)?;
        line.clear();
        print(&format!("{}\n", results.add(&result, play.phases())?)).map_err(cannot_print)?;
    }
    Ok(())
}

fn cannot_print(error: CommandError) -> LabError {
    LabError::io("print a table")(std::io::Error::other(error))
}

fn about(duration: Duration) -> String {
    match duration.as_secs() {
        seconds @ ..120 => format!("about {seconds} s"),
        seconds => format!("about {} min", seconds.div_ceil(60)),
    }
}
