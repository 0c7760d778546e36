//! The command line of `bench-vs-qemu`.

use super::live;
use super::plan::{Cell, Plan};
use super::secondary::Secondary;
use super::shape::Shape;
use clap::Args;
use colo_ring::host::allowed_cores;
use colo_ring_tests::lab::Transport;
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Checkpoints and rounds of `--quick`.
const QUICK: (u64, u64) = (40, 2);
const CHECKPOINTS: u64 = 300;
/// From six on, `compare` takes rounds as wholes when it looks for the interval of a ratio.
const ROUNDS: u64 = 6;

/// What to measure, and how.
#[derive(Clone, Debug, Args, Serialize)]
pub struct Options {
    /// Captures: names like 30M-plain, loads (idle, 5M, 30M, 160M) or modes (multifd-4, plain) [default: all eight
    /// of these]; compressed at level 1: 5M-zstd, 40M-zstd, 5M-zlib, 40M-zlib, or zstd and zlib. Beside these the
    /// decoders alone take turns, on two threads and in memory
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    captures: Vec<String>,

    /// Milliseconds from one checkpoint to the next; 0 is back to back
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "0,100")]
    spacings: Vec<u64>,

    /// The secondaries that take turns: usual (with --live QEMU's own and the default of colo-ring), qemu, sink, all, names like uring-pool-deferred or their beginnings (uring, epoll)
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "usual")]
    secondaries: Vec<String>,

    /// The colo-ring of another build: beside each receiver of this one, the same of that takes turns as NAME@other, and
    /// the ratio to it is printed below the table
    #[arg(long, value_name = "FILE")]
    other_build: Option<PathBuf>,

    /// Undisturbed checkpoints wanted of each secondary in each cell [default: 300]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=100_000))]
    n: Option<u64>,

    /// Sessions of each secondary in each cell in which to get them [default: 6]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1000))]
    rounds: Option<u64>,

    /// A first look: 40 checkpoints in 2 rounds, unless --n and --rounds say otherwise
    #[arg(long)]
    quick: bool,

    /// Cores for colo-ring receive [default: its own choice]
    #[arg(long, value_name = "LIST")]
    pub(super) cores: Option<String>,

    /// The core on which loopback is handled [default: the last one]
    #[arg(long, value_name = "N")]
    softirq_core: Option<usize>,

    /// Use sessions of colo-ring synth, for hosts without QEMU: nothing is then compared with QEMU
    #[arg(long, conflicts_with = "live")]
    pub(super) synth: bool,

    /// A live primary's own pause, idle and with 40 MiB a checkpoint, in place of replays
    #[arg(long)]
    pub(super) live: bool,

    /// With TLS (x509, AES-256-GCM in TLS 1.3): beside QEMU's own secondary and each receiver, the same over TLS takes turns as NAME@tls
    #[arg(long, conflicts_with_all = ["unix", "live", "other_build"])]
    pub(super) tls: bool,

    /// Over UNIX sockets, where QEMU's own secondary has no delayed acknowledgements to wait for
    #[arg(long)]
    unix: bool,

    /// Over TCP, but without the waits for delayed acknowledgements that a QEMU's main channel has: what secondaries do, without
    /// what their socket options do
    #[arg(long, conflicts_with_all = ["unix", "live"])]
    pub(super) no_stalls: bool,

    /// Take disturbed checkpoints, too: on a machine that is never quiet, where figures mean little
    #[arg(long)]
    keep_disturbed: bool,

    /// Say what would be measured and about how long it takes, and end
    #[arg(long)]
    pub(super) dry_run: bool,

    /// Where captures are kept [default: ${XDG_CACHE_HOME:-~/.cache}/colo-ring/captures]
    #[arg(long, value_name = "DIR")]
    captures_dir: Option<PathBuf>,

    /// Where results go [default: target/bench-vs-qemu/TIME]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,

    /// Put the short table between its marks in this Markdown file
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "README.md")]
    pub(super) readme: Option<PathBuf>,
}

impl Options {
    /// What is to be measured.
    ///
    /// # Errors
    /// When a word names nothing, or something that cannot be had without QEMU.
    pub fn plan(&self) -> Result<Plan, String> {
        let mut secondaries = chosen(
            &self.secondaries,
            Secondary::named,
            "secondary",
            &known_secondaries(),
        )?;
        if self.synth {
            secondaries.retain(|secondary| !secondary.is_qemu());
        }
        if self.live && self.secondaries == ["usual"] {
            let default = Secondary::default_ring();
            secondaries.retain(|secondary| secondary.is_qemu() || *secondary == default);
        }
        if let Some(command) = &self.other_build {
            if !command.is_file() {
                return Err(format!("--other-build: no such file: {}", command.display()));
            }
            let both = |one: Secondary| {
                let other = one.of_other_build(command);
                [Some(one), other].into_iter().flatten()
            };
            secondaries = secondaries.into_iter().flat_map(both).collect();
        }
        if self.tls {
            let both = |one: Secondary| {
                let secured = one.over_tls();
                [Some(one), secured].into_iter().flatten()
            };
            secondaries = secondaries.into_iter().flat_map(both).collect();
        }
        let cells = if self.live {
            live::CELLS.to_vec()
        } else {
            self.cells()?
        };
        if cells.iter().any(|cell| cell.shape.compression.is_some()) {
            // The last, as some cells do without.
            secondaries.push(Secondary::decoders());
        }
        let (checkpoints, rounds) = if self.quick { QUICK } else { (CHECKPOINTS, ROUNDS) };
        let checkpoints = self.n.unwrap_or(checkpoints);
        Ok(Plan {
            cells,
            secondaries,
            checkpoints,
            rounds: self.rounds.unwrap_or(rounds).min(checkpoints),
            keep_disturbed: self.keep_disturbed,
        })
    }

    /// Every capture at every spacing.
    fn cells(&self) -> Result<Vec<Cell>, String> {
        let shapes = match &self.captures[..] {
            [] => Shape::ALL.to_vec(),
            words => chosen(words, Shape::named, "capture", &known_captures())?,
        };
        let at = |spacing_ms: &u64| {
            let spacing = Duration::from_millis(*spacing_ms);
            shapes.iter().map(move |shape| Cell {
                shape: *shape,
                spacing,
            })
        };
        Ok(self.spacings.iter().flat_map(at).collect())
    }

    /// The core on which loopback is handled.
    #[must_use]
    pub fn softirq_core(&self) -> usize {
        let last = || allowed_cores().ok().and_then(|cores| cores.last().copied());
        self.softirq_core.or_else(last).unwrap_or(0)
    }

    /// Over what secondaries are reached.
    #[must_use]
    pub fn transport(&self) -> Transport {
        if self.unix {
            Transport::Unix
        } else {
            Transport::Tcp
        }
    }

    /// Where captures are kept.
    #[must_use]
    pub fn captures_dir(&self) -> PathBuf {
        let variable = |name| std::env::var_os(name).map(PathBuf::from);
        let home_cache = || variable("HOME").unwrap_or_default().join(".cache");
        let cache = || variable("XDG_CACHE_HOME").unwrap_or_else(home_cache);
        self.captures_dir
            .clone()
            .unwrap_or_else(|| cache().join("colo-ring/captures"))
    }

    /// Where results go.
    #[must_use]
    pub fn out(&self) -> PathBuf {
        let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let own = || Path::new("target/bench-vs-qemu").join(now().as_secs().to_string());
        self.out.clone().unwrap_or_else(own)
    }
}

fn known_captures() -> String {
    let names: Vec<_> = Shape::every().map(|shape| shape.name()).collect();
    format!("there are {}", names.join(", "))
}

fn known_secondaries() -> String {
    let names = Secondary::all().into_iter().map(|secondary| secondary.name);
    format!("there are usual, all, {}", names.collect::<Vec<_>>().join(", "))
}

/// What the words name, each once, in the order of the words.
fn chosen<T: PartialEq>(
    words: &[String],
    named: impl Fn(&str) -> Vec<T>,
    what: &str,
    known: &str,
) -> Result<Vec<T>, String> {
    let mut all = Vec::new();
    for word in words {
        let found = named(word);
        if found.is_empty() {
            return Err(format!("no {what} is named '{word}': {known}"));
        }
        for one in found {
            if !all.contains(&one) {
                all.push(one);
            }
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    fn plan(line: &str) -> Result<Plan, String> {
        let words = ["bench-vs-qemu"].into_iter().chain(line.split_whitespace());
        Line::try_parse_from(words)
            .map_err(|error| error.to_string())?
            .options
            .plan()
    }

    #[test]
    fn all_cells_with_the_usual_secondaries_are_measured_unless_told() {
        let plan = plan("").unwrap();
        assert_eq!(plan.cells.len(), 16);
        assert_eq!(plan.secondaries, Secondary::usual());
        assert!(plan.checkpoints >= 300);
        assert_eq!(plan.rounds, 6);
    }

    #[test]
    fn cells_and_secondaries_can_be_chosen() {
        let plan =
            plan("--captures 30M-plain,idle --spacings 100 --secondaries qemu,epoll,qemu --n 1").unwrap();
        let cells: Vec<_> = plan.cells.iter().map(Cell::name).collect();
        assert_eq!(
            cells,
            [
                "30M-plain-every-100ms",
                "idle-multifd-4-every-100ms",
                "idle-plain-every-100ms"
            ]
        );
        assert_eq!(plan.secondaries[0].name, "qemu");
        assert!(
            plan.secondaries[1..]
                .iter()
                .all(|one| one.name.starts_with("epoll"))
        );
        assert_eq!((plan.checkpoints, plan.rounds), (1, 1));
    }

    #[test]
    fn beside_compressed_sessions_stand_the_decoders() {
        let plan = plan("--captures zstd,5M-zlib --spacings 0 --secondaries qemu").unwrap();
        let cells: Vec<_> = plan.cells.iter().map(Cell::name).collect();
        assert_eq!(
            cells,
            ["5M-zstd-every-0ms", "40M-zstd-every-0ms", "5M-zlib-every-0ms"]
        );
        assert!(plan.secondaries.last().unwrap().is_decoders());
    }

    #[test]
    fn what_is_not_there_is_reported() {
        assert!(plan("--captures 31M").unwrap_err().contains("31M"));
        assert!(plan("--secondaries rdma").unwrap_err().contains("epoll"));
    }

    #[test]
    fn another_build_stands_beside_each_receiver() {
        let line = "--secondaries qemu,epoll,sink --other-build";
        let this = std::env::current_exe().unwrap();
        let missing = plan(&format!("{line} /nowhere")).unwrap_err();
        assert!(missing.contains("/nowhere"), "{missing}");
        let plan = plan(&format!("{line} {}", this.display())).unwrap();
        let names: Vec<_> = plan.secondaries.iter().map(|one| &*one.name).collect();
        assert_eq!(names.first(), Some(&"qemu"));
        assert_eq!(names.last(), Some(&"sink"));
        for pair in names[1..names.len() - 1].chunks(2) {
            assert_eq!(format!("{}@other", pair[0]), pair[1]);
        }
    }

    #[test]
    fn without_qemu_there_is_no_qemu() {
        let plan = plan("--synth --secondaries all").unwrap();
        assert!(!plan.secondaries.iter().any(Secondary::is_qemu));
    }
}
