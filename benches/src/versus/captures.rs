//! The captured sessions that are replayed: made once from a live primary, then kept.

use super::process::Child;
use super::secondary::report;
use super::shape::Shape;
use colo_ring::ring::BackendKind;
use colo_ring_tests::lab::{Address, Lab, LabError, Protection, Qemu, Receiver, ReceiverOptions, Transport};
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Raised when captures are made differently, so that older ones are made again.
const RECIPE: u32 = 1;
const ATTEMPTS: u32 = 3;
/// Checkpoints of a capture: the test guest's are far apart, and an emulated primary compresses slowly.
const CAPTURE_LIMIT: Duration = Duration::from_secs(600);
const LIMIT: Duration = Duration::from_secs(120);
/// All of a synthetic guest's memory goes through its precopy.
const SYNTH_RAM: &str = "256M";
const SYNTH_IDLE_PAGES: u64 = 100;
/// How far a capture's pages per checkpoint may be from what was wanted, in percent of it.
const PERCENT_OF_WANTED: std::ops::RangeInclusive<u64> = 85..=118;

/// Where sessions come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A live QEMU of that version, with the test guest, under emulation.
    Qemu(String),
    /// `colo-ring synth`.
    Synth,
}

/// The captures of one source, in one directory.
#[derive(Debug)]
pub struct Captures<'a> {
    lab: &'a Lab,
    directory: PathBuf,
    source: Source,
}

impl<'a> Captures<'a> {
    /// Those in `directory`, which is made when it is missing.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn in_directory(lab: &'a Lab, directory: &Path, source: Source) -> Result<Self, LabError> {
        fs::create_dir_all(directory).map_err(LabError::io(format!("create {}", directory.display())))?;
        Ok(Self {
            lab,
            directory: directory.to_owned(),
            source,
        })
    }

    /// The file of that kind of session; [`Self::make`] makes it.
    #[must_use]
    pub fn file(&self, shape: Shape) -> PathBuf {
        let source = match &self.source {
            Source::Qemu(version) => format!("qemu-{version}"),
            Source::Synth => "synth".to_owned(),
        };
        self.directory
            .join(format!("{}.{source}.r{RECIPE}.cap", shape.name()))
    }

    /// Makes one that is missing. It appears whole or not at all.
    ///
    /// # Errors
    /// When the primary, the receiver or the recorder fails, or the guest cannot be made to dirty as much as wanted.
    pub fn make(&self, shape: Shape) -> Result<(), LabError> {
        let file = self.file(shape);
        let partial = file.with_extension("partial");
        let made = match self.source {
            Source::Qemu(_) => self.record_with_pages(shape, &partial),
            Source::Synth => self.synthesize(shape, &partial),
        };
        if made.is_err() {
            // It may be large, and is of no use; the reason for the failure is of more interest than one of this.
            let _ = fs::remove_file(&partial);
        }
        made?;
        fs::rename(&partial, &file).map_err(LabError::io(format!("rename {}", partial.display())))
    }

    /// Records until a checkpoint has about the pages that are wanted.
    fn record_with_pages(&self, shape: Shape, out: &Path) -> Result<(), LabError> {
        let (mut percent, mut seen) = (100, Vec::new());
        for _ in 0..ATTEMPTS {
            let pages = self.record(shape, percent, out)?.max(1);
            let wanted = shape.pages();
            // An idle guest dirties what it does.
            if wanted == 0 || PERCENT_OF_WANTED.contains(&(pages * 100 / wanted)) {
                return Ok(());
            }
            seen.push(pages);
            percent = (percent * wanted / pages).max(1);
        }
        Err(LabError::Ended {
            what: format!("a capture of {shape}"),
            detail: format!(
                "a checkpoint should have about {} pages, but {ATTEMPTS} attempts had {seen:?}: the host is too busy",
                shape.pages()
            ),
        })
    }

    /// Records a session of a live primary. Returns the mean number of pages of its checkpoints.
    fn record(&self, shape: Shape, percent: u64, out: &Path) -> Result<u64, LabError> {
        let (behind, before) = (
            Address::free(self.lab, Transport::Tcp)?,
            Address::free(self.lab, Transport::Tcp)?,
        );
        let options = ReceiverOptions {
            channels: shape.channels,
            backend: BackendKind::Uring,
            once: true,
            extra: Vec::new(),
        };
        let mut receiver = Receiver::start(self.lab, &behind, &options)?;
        let recorder = self.start_recorder(&before, &behind, out)?;
        let mut primary = Qemu::start(self.lab, "captured", &shape.machine(shape.delay(), percent))?;
        primary.wait_serial("tick 2 ", LIMIT)?;
        let delay_ms = u32::try_from(shape.delay().as_millis()).unwrap_or(u32::MAX);
        let protection = Protection {
            compression: shape.compression,
            ..Protection::every_ms(delay_ms, shape.channels)
        };
        primary.end_precopy_early()?;
        primary.protect(&before, &protection)?;
        primary.wait_checkpoints(shape.captured_checkpoints(), CAPTURE_LIMIT)?;
        primary.check_guest()?;
        // Between two checkpoints, as one has just ended: the capture ends with a whole one.
        drop(primary);
        recorder.wait(LIMIT)?;
        receiver.wait_exit()?;
        let total = report(&receiver)?.total;
        Ok(total.pages / total.checkpoints.max(1))
    }

    /// Starts `colo-ring capture` between a primary and a secondary.
    fn start_recorder(&self, before: &Address, behind: &Address, out: &Path) -> Result<Child, LabError> {
        let (before, behind) = (before.to_string(), behind.to_string());
        // What a killed attempt left is replaced; pages of the test guest do not compress.
        let args = [
            "capture",
            "--force",
            "--compress",
            "none",
            "--listen",
            &before,
            "--to",
            &behind,
            "--out",
        ];
        let args = args.map(OsStr::new).into_iter().chain([out.as_os_str()]);
        let mut recorder = Child::start(args, &self.lab.file("capture.log"))?;
        recorder.wait_listening()?;
        Ok(recorder)
    }

    /// Lets `colo-ring synth` write a session of the same kind, for hosts without QEMU.
    fn synthesize(&self, shape: Shape, out: &Path) -> Result<(), LabError> {
        let pages = if shape.mib == 0 {
            SYNTH_IDLE_PAGES
        } else {
            shape.pages()
        };
        let options = [
            ("--ram", SYNTH_RAM.to_owned()),
            ("--channels", shape.channels.to_string()),
            ("--pages", pages.to_string()),
            ("--zero", "0".to_owned()),
            ("--checkpoints", shape.captured_checkpoints().to_string()),
            ("--interval", shape.delay().as_millis().to_string()),
            ("--out", out.display().to_string()),
        ];
        let compressed = shape.compression.map(|compression| {
            let (method, level) = compression.method_and_level();
            // As the test guest's pages are.
            [
                ("--ratio", "3".to_owned()),
                ("--compression", method.to_owned()),
                ("--compression-level", level.to_string()),
            ]
        });
        let options = options.into_iter().chain(compressed.into_iter().flatten());
        let options: Vec<_> = options.collect();
        let words = options.iter().flat_map(|(name, value)| [*name, value]);
        Child::start(["synth"].into_iter().chain(words), &self.lab.file("synth.log"))?.wait(LIMIT)
    }
}
