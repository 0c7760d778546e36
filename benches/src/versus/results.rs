//! The files of results, written again after each cell, so that whatever ends a measurement leaves what was measured.

use super::contest::CellResult;
use super::figures::{CellFigures, SecondaryFigures};
use super::memory::CopySpeed;
use super::options::Options;
use super::secondary::Secondary;
use super::{page, published, table};
use colo_ring::host::Machine;
use colo_ring_tests::lab::{LabError, Transport};
use serde::Serialize;
use std::fs;
use std::path::{Path, PathBuf};

/// What was measured so far.
#[derive(Debug, Serialize)]
pub struct Results<'a> {
    schema: &'static str,
    schema_version: u32,
    options: &'a Options,
    machine: Machine,
    /// Of colo-ring.
    version: &'static str,
    /// QEMU's name and version; none without QEMU.
    qemu: Option<String>,
    /// The host's settings meanwhile, in words.
    settings: Vec<String>,
    copy: CopySpeed,
    cells: Vec<CellFigures>,
    /// Titles and pages of the cells.
    #[serde(skip)]
    pages: Vec<(String, String)>,
    #[serde(skip)]
    directory: PathBuf,
}

impl<'a> Results<'a> {
    /// Nothing yet; makes the directory.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn new(
        options: &'a Options,
        directory: PathBuf,
        qemu: Option<String>,
        settings: Vec<String>,
    ) -> Result<Self, LabError> {
        fs::create_dir_all(&directory).map_err(LabError::io(format!("create {}", directory.display())))?;
        Ok(Self {
            schema: "colo-ring.bench-vs-qemu",
            schema_version: 1,
            options,
            machine: Machine::read(),
            version: env!("CARGO_PKG_VERSION"),
            qemu,
            settings,
            copy: CopySpeed::measure(),
            cells: Vec::new(),
            pages: Vec::new(),
            directory,
        })
    }

    /// The conditions on the machine, in lines.
    #[must_use]
    pub fn conditions(&self) -> String {
        let qemu = self
            .qemu
            .as_deref()
            .unwrap_or("without QEMU: synthetic sessions, nothing is compared with it");
        format!(
            "{}\ncolo-ring {}; {qemu}; {}; {}\nmemory copies {:.1} GB/s with one thread, {:.1} with two\n",
            self.machine,
            self.version,
            match self.options.transport() {
                Transport::Tcp if self.options.no_stalls =>
                    "loopback TCP without waits for delayed acknowledgements",
                Transport::Tcp => "loopback TCP",
                Transport::Unix => "UNIX sockets",
            },
            self.settings.join("; "),
            self.copy.one_thread_bytes_per_s / 1e9,
            self.copy.two_threads_bytes_per_s / 1e9,
        )
    }

    /// Takes the result of a cell, writes everything, and returns the cell's table.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn add(&mut self, result: &CellResult, phases: &[&'static str]) -> Result<String, LabError> {
        let compared = CellFigures::of(result, phases);
        let (figures, page) = compared.map_err(|error| LabError::Malformed {
            what: "what was measured".into(),
            detail: error.to_string(),
        })?;
        for turns in &result.turns {
            if let Some(run) = &turns.run {
                let prefix = self.directory.join(&figures.cell).join(&turns.secondary.name);
                run.write(&prefix).map_err(super::replays::bad_run)?;
            }
        }
        let text = table::cell(&figures, &self.copy);
        self.pages.push((figures.title(), page));
        self.cells.push(figures);
        self.write()?;
        Ok(text)
    }

    /// The ratios of all cells, and what is needed to read the tables.
    #[must_use]
    pub fn overview(&self) -> String {
        format!("{}{}", table::overview(&self.cells), table::LEGEND)
    }

    /// Everything as text for a terminal.
    fn text(&self) -> String {
        let tables: Vec<_> = self
            .cells
            .iter()
            .map(|cell| table::cell(cell, &self.copy))
            .collect();
        format!(
            "{}\n{}\n{}",
            self.conditions(),
            tables.join("\n"),
            self.overview()
        )
    }

    /// The short table as a Markdown section.
    #[must_use]
    pub fn published(&self) -> String {
        let conditions = self.conditions().trim_end().replace('\n', "; ");
        published::section(
            &self.cells,
            &Secondary::default_ring().name,
            conditions.trim_end(),
        )
    }

    /// Where they are.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Where a secondary failed or too few of its checkpoints were undisturbed, in words.
    #[must_use]
    pub fn lacks(&self, wanted: u64) -> Vec<String> {
        let all = self
            .cells
            .iter()
            .flat_map(|cell| cell.secondaries.iter().map(move |one| (cell, one)));
        let lacking = all.filter(|(_, one)| one.failed.is_some() || one.checkpoints < wanted);
        let in_words = |(cell, one): (&CellFigures, &SecondaryFigures)| {
            let what = if one.failed.is_some() {
                "failed".to_owned()
            } else {
                format!("n = {}", one.checkpoints)
            };
            format!("{}: {} {what}", cell.title(), one.name)
        };
        lacking.map(in_words).collect()
    }

    fn write(&self) -> Result<(), LabError> {
        let title = match &self.qemu {
            Some(qemu) => format!("colo-ring and {qemu}"),
            None => "colo-ring".to_owned(),
        };
        let json = serde_json::to_string_pretty(self).map_err(|error| LabError::Malformed {
            what: "the results".into(),
            detail: error.to_string(),
        })?;
        for (name, text) in [
            ("results.json", json),
            ("table.txt", self.text()),
            ("published.md", self.published()),
            ("index.html", page::page(&title, &self.text(), &self.pages)),
        ] {
            let file = self.directory.join(name);
            fs::write(&file, text).map_err(LabError::io(format!("write {}", file.display())))?;
        }
        Ok(())
    }
}
