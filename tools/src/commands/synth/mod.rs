//! `colo-ring synth`: the synthetic primary as a command.

mod report;

use crate::capture_file::{CaptureInfo, CaptureWriter, Compression};
use crate::net::Address;
use crate::options::Size;
use crate::output::{CommandError, ProgressLine, mebibytes, print, print_json, tell};
use crate::page_compression::{CompressionArgs, CompressionArgsError};
use crate::primary::{
    CheckpointReport, Content, DiskOptions, Distribution, Figures, Pattern, Preset, SynthError, SynthOptions,
    SynthPrimary, Version,
};
use crate::run_file::{Clock, RunFile, RunNameError, check_name};
use crate::signals;
use crate::tls::{Front, TlsArgs};
use clap::{ArgGroup, Args, ValueEnum};
use colo_ring::host::Machine;
use colo_ring::metrics::display_nanoseconds;
pub(crate) use report::{CaptureReport, LiveReport};
use report::{Described, SCHEMA, SCHEMA_VERSION, Schedule, Sent};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

/// Checkpoints that a run file takes.
const RUN_FILE_CHECKPOINTS_MAX: u64 = 500_000;

/// Options of `colo-ring synth`. Those that a preset sets have no default of clap's, so that what was typed is known.
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("destination").required(true).args(["to", "out"])))]
pub struct SynthArgs {
    /// The secondary: tcp:HOST:PORT (IPv6 in brackets) or unix:PATH
    #[arg(
        long,
        value_name = "ADDRESS",
        required_unless_present = "out",
        conflicts_with = "out"
    )]
    to: Option<Address>,

    #[command(flatten)]
    tls: TlsArgs,

    /// Write a capture instead: no secondary is needed, the answers of one are recorded with the schedule's times
    #[arg(long, value_name = "FILE", conflicts_with = "run")]
    out: Option<PathBuf>,

    /// Replace the capture if it exists
    #[arg(long, conflicts_with = "to")]
    force: bool,

    /// Compression of the capture file's blocks, whatever the session's pages are compressed with
    #[arg(long, value_enum, default_value_t = Compression::None, conflicts_with = "to")]
    compress: Compression,

    /// A session that has a name; other options override what it sets
    #[arg(long, value_enum)]
    preset: Option<Preset>,

    /// RAM of the guest, a multiple of 4096 bytes [default: 64M]
    #[arg(long, value_name = "SIZE")]
    ram: Option<Size>,

    /// Multifd channels; 0 sends all pages on the main channel [default: 4]
    #[arg(long, value_name = "N")]
    channels: Option<u8>,

    /// Pages dirtied before each checkpoint: N, uniform:LOW-HIGH, normal:MEAN,DEVIATION, lognormal:MEDIAN,SIGMA or
    /// exponential:MEAN; what is drawn below 0 or above the guest's RAM counts as that [default: 1000]
    #[arg(long, value_name = "PAGES")]
    pages: Option<Distribution>,

    /// Where they are: random, sequential, runs:N (so many neighbours, anywhere) or hotset:PAGES,WRITES (a share of
    /// the guest's pages that takes that share of the writes) [default: random]
    #[arg(long, value_name = "PATTERN")]
    pattern: Option<Pattern>,

    /// Share of pages that are all zero, 0 to 1 [default: 0.1]
    #[arg(long, value_name = "SHARE")]
    zero: Option<f64>,

    /// What the other pages hold [default: random]
    #[arg(long, value_enum)]
    content: Option<Content>,

    /// Pages that zlib and zstd make about so many times smaller, 1 to 16, instead of --content
    #[arg(long, value_name = "R", conflicts_with = "content")]
    ratio: Option<f64>,

    #[command(flatten)]
    compression: CompressionArgs,

    /// Send pages that are sent again as differences to what was sent before (XBZRLE), of which the guest changes 256 bytes
    /// each time; needs --channels 0
    #[arg(long)]
    xbzrle: bool,

    /// Milliseconds from when one checkpoint is due to when the next one is; 0 is --pace max [default: 100]
    #[arg(long, value_name = "MS")]
    interval: Option<u64>,

    /// max: each checkpoint begins when the last one has ended. There is no schedule then, and nothing waits
    #[arg(long, value_enum, conflicts_with = "interval")]
    pace: Option<Pace>,

    /// Let a slow checkpoint move those after it instead of making them wait: stalls are then counted once, however
    /// many checkpoints they delay
    #[arg(long, conflicts_with = "pace")]
    closed_loop: bool,

    /// Disks that the guest has and writes to over NBD: the exports NAME-0, NAME-1 and so on
    #[arg(long, value_name = "N", default_value_t = 0, conflicts_with = "out")]
    disks: u8,

    /// Blocks of 4 KiB that it writes to each of them before every checkpoint
    #[arg(long, value_name = "N", default_value_t = 100, requires = "disks")]
    disk_writes: u32,

    /// Where the secondary serves disks [default: port 10809 of --to's host, or --to's path with .nbd behind it]
    #[arg(long, value_name = "ADDRESS", requires = "disks")]
    disk_to: Option<Address>,

    /// What the exports are called
    #[arg(long, value_name = "NAME", default_value = "synth", requires = "disks")]
    disk_name: String,

    /// Checkpoints until the session is closed [default: 100]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    checkpoints: Option<u64>,

    /// Decides everything that is random
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,

    /// Which QEMU to look like on the wire
    #[arg(long = "version", value_enum, default_value_t = Version::V11_1)]
    qemu: Version,

    /// Write the measured run to PREFIX.run.json and PREFIX.PHASE.hlog, for `compare`
    #[arg(long, value_name = "PREFIX")]
    run: Option<PathBuf>,

    /// What the run is called in tables [default: the secondary's address]
    #[arg(long, value_name = "NAME", requires = "run", value_parser = run_name)]
    name: Option<String>,

    /// Print JSON (schema colo-ring.synth, version 1)
    #[arg(long)]
    json: bool,
}

/// How fast checkpoints follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Pace {
    /// As fast as they can
    Max,
}

fn run_name(name: &str) -> Result<String, RunNameError> {
    check_name(name).map(|()| name.to_owned())
}

/// Makes the session.
///
/// # Errors
/// If the options contradict themselves, or the session or a file fails.
pub fn run(args: &SynthArgs) -> Result<ExitCode, CommandError> {
    let options = args
        .options()
        .map_err(|error| CommandError::Usage(error.to_string()))?;
    let refused = |error: SynthError| CommandError::Usage(error.to_string());
    options.check().map_err(refused)?;
    let machine = Machine::read();
    if options.ram_bytes > machine.memory_bytes {
        return Err(CommandError::Usage(format!(
            "--ram {}: the guest is memory of this machine, which has {:.1} GiB",
            Size(options.ram_bytes),
            machine.memory_bytes as f64 / f64::from(1 << 30)
        )));
    }
    if args.run.is_some() && options.checkpoints > RUN_FILE_CHECKPOINTS_MAX {
        return Err(CommandError::Usage(format!(
            "--run takes at most {RUN_FILE_CHECKPOINTS_MAX} checkpoints"
        )));
    }
    let stop = Arc::new(AtomicBool::new(false));
    let asked = Arc::clone(&stop);
    signals::on_end(move || asked.store(true, Ordering::Relaxed))?;
    let command = Command {
        args,
        options,
        machine,
        stop,
    };
    match (&args.to, &args.out) {
        (Some(address), _) => command.live(address),
        (None, Some(_)) if args.tls.tls.is_some() => Err(CommandError::Usage(
            "--tls is for a secondary: give --to instead of --out".to_owned(),
        )),
        (None, Some(path)) => command.capture(path),
        (None, None) => Err(CommandError::Usage("one of --to and --out is needed".to_owned())),
    }
}

impl SynthArgs {
    fn options(&self) -> Result<SynthOptions, CompressionArgsError> {
        let base = match self.preset {
            Some(preset) => preset.options(self.qemu),
            None => SynthOptions {
                checkpoints: 100,
                ..SynthOptions::new(self.qemu)
            },
        };
        let interval = match self.pace {
            Some(Pace::Max) => Some(Duration::ZERO),
            None => self.interval.map(Duration::from_millis),
        };
        let channels = self.channels.unwrap_or(base.channels);
        if self.xbzrle && channels > 0 {
            return Err(CompressionArgsError::XbzrleWithChannels(channels));
        }
        let content = self.ratio.map(Content::Ratio).or(self.content);
        Ok(SynthOptions {
            ram_bytes: self.ram.map_or(base.ram_bytes, |size| size.0),
            channels,
            compression: self.compression.check(channels)?,
            xbzrle: self.xbzrle,
            dirty_pages: self.pages.unwrap_or(base.dirty_pages),
            pattern: self.pattern.unwrap_or(base.pattern),
            zero_share: self.zero.unwrap_or(base.zero_share),
            content: content.unwrap_or(base.content),
            interval: interval.unwrap_or(base.interval),
            checkpoints: self.checkpoints.unwrap_or(base.checkpoints),
            closed_loop: self.closed_loop,
            seed: self.seed,
            disks: self.disk_options(),
            ..base
        })
    }
}

impl SynthArgs {
    fn disk_options(&self) -> Option<DiskOptions> {
        let receiver = self.to.as_ref().filter(|_| self.disks > 0)?;
        Some(DiskOptions {
            to: self.disk_to.clone().unwrap_or_else(|| receiver.of_disks()),
            name: self.disk_name.clone(),
            count: self.disks,
            writes: self.disk_writes,
        })
    }
}

/// The command at work.
struct Command<'a> {
    args: &'a SynthArgs,
    options: SynthOptions,
    machine: Machine,
    /// Set when it shall end early.
    stop: Arc<AtomicBool>,
}

impl Command<'_> {
    fn live(self, address: &Address) -> Result<ExitCode, CommandError> {
        let started = SystemTime::now();
        let front = self.args.tls.front(address).map_err(CommandError::failed)?;
        let to = front.as_ref().map_or(address, Front::address);
        let mut primary = SynthPrimary::connect(to, &self.options).map_err(CommandError::failed)?;
        let name = self.args.name.clone().unwrap_or_else(|| address.to_string());
        let mut run = RunFile::new(&name, "synth", self.echo()?, Clock::Primary, started);
        run.compression = Some(match self.options.xbzrle {
            true => "xbzrle".to_owned(),
            false => self.options.compression.to_string(),
        });
        let mut figures = Figures::new(self.schedule() == Schedule::OpenLoop);
        let taken = self.take(&mut primary, &mut figures, |figures, report| {
            if self.args.run.is_some() {
                run.checkpoints.push(figures.checkpoint(report));
            }
        });
        let precopy_ns = u64::try_from(primary.precopy().as_nanos()).unwrap_or(u64::MAX);
        let ended = taken.and_then(|()| primary.close());
        // What was measured until then is kept, whatever ended it.
        let warnings = self.warnings(&figures);
        if let Some(prefix) = &self.args.run {
            run.notes.clone_from(&warnings);
            run.notes.extend(ended.as_ref().err().map(ToString::to_string));
            run.write(prefix).map_err(CommandError::failed)?;
        }
        ended.map_err(CommandError::failed)?;
        let report = LiveReport {
            schema: SCHEMA,
            schema_version: SCHEMA_VERSION,
            to: address.to_string(),
            options: self.described(),
            machine: self.machine,
            precopy_ns,
            sent: Sent::of(&figures),
            disk_blocks: figures.disk_blocks,
            phases: figures.phases(),
            own_delay: figures.own_delay(),
            warnings,
        };
        if self.args.json {
            print_json(&report)?;
        } else {
            report
                .warnings
                .iter()
                .for_each(|warning| tell(&format!("warning: {warning}")));
            print(&report.render(self.args.run.as_deref()))?;
        }
        Ok(ExitCode::SUCCESS)
    }

    fn capture(self, path: &Path) -> Result<ExitCode, CommandError> {
        let mut info = CaptureInfo::now("synth", self.echo()?);
        info.primary = Some(format!("synthetic QEMU {}", self.options.version));
        info.channels = Some(self.options.channels);
        let begin = match self.args.force {
            true => CaptureWriter::replace,
            false => CaptureWriter::create,
        };
        let writer = begin(path, &info, self.args.compress).map_err(CommandError::failed)?;
        let mut figures = Figures::new(false);
        let record = || {
            let mut primary = SynthPrimary::record(writer, &self.options)?;
            self.take(&mut primary, &mut figures, |_, _| {})?;
            primary.close()
        };
        record().map_err(CommandError::failed)?;
        let length = std::fs::metadata(path).map_err(CommandError::failed)?.len();
        let report = CaptureReport {
            schema: SCHEMA,
            schema_version: SCHEMA_VERSION,
            out: path,
            options: self.described(),
            machine: self.machine,
            sent: Sent::of(&figures),
        };
        if self.args.json {
            print_json(&report)?;
        } else {
            print(&format!(
                "{}: {}\n{} checkpoints: {}; the file has {:.1} MiB\n",
                path.display(),
                report.options,
                report.sent.checkpoints,
                report.sent.render(&report.options),
                mebibytes(length),
            ))?;
        }
        Ok(ExitCode::SUCCESS)
    }

    /// Takes the checkpoints until all are there or it shall end.
    fn take(
        &self,
        primary: &mut SynthPrimary,
        figures: &mut Figures,
        mut each: impl FnMut(&Figures, &CheckpointReport),
    ) -> Result<(), SynthError> {
        let mut line = ProgressLine::new(!self.args.json);
        for number in 1..=self.options.checkpoints {
            if self.stop.load(Ordering::Relaxed) {
                break;
            }
            let report = primary.checkpoint()?;
            figures.record(&report);
            each(figures, &report);
            if line.is_shown() {
                line.show(&format!(
                    "checkpoint {number} of {}: {} pages, loaded in {:.2?}",
                    self.options.checkpoints, report.pages, report.loaded
                ));
            }
        }
        Ok(())
    }

    fn schedule(&self) -> Schedule {
        if self.options.interval.is_zero() {
            Schedule::None
        } else if self.options.closed_loop {
            Schedule::ClosedLoop
        } else {
            Schedule::OpenLoop
        }
    }

    fn described(&self) -> Described {
        let options = &self.options;
        Described {
            preset: self.args.preset,
            ram_bytes: options.ram_bytes,
            channels: options.channels,
            pages: options.dirty_pages,
            pattern: options.pattern,
            zero_share: options.zero_share,
            content: options.content,
            compression: options.compression,
            xbzrle: options.xbzrle,
            interval_ms: options.interval.as_millis(),
            schedule: self.schedule(),
            checkpoints: options.checkpoints,
            seed: options.seed,
            version: options.version,
            disks: self.args.disks,
            disk_writes: options.disks.as_ref().map_or(0, |disks| disks.writes),
        }
    }

    fn echo(&self) -> Result<serde_json::Value, CommandError> {
        serde_json::to_value(self.described()).map_err(CommandError::failed)
    }

    /// What a reader of the figures must know.
    fn warnings(&self, figures: &Figures) -> Vec<String> {
        let mut warnings = Vec::new();
        if figures.checkpoints < self.options.checkpoints {
            warnings.push(format!(
                "ended after {} of {} checkpoints",
                figures.checkpoints, self.options.checkpoints
            ));
        }
        let delay = figures.own_delay();
        if self.schedule() != Schedule::None
            && u128::from(delay.mean_ns) > self.options.interval.as_nanos() / 20
        {
            warnings.push(format!(
                "this side was late by {} on average and {} at most, its pages not ready or its timer late: no latency \
                 contains that, but the load was less than asked for; use fewer --pages or a longer --interval",
                display_nanoseconds(delay.mean_ns),
                display_nanoseconds(delay.max_ns)
            ));
        }
        warnings
    }
}
