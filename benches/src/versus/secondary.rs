//! The secondaries that are compared, and each as a fresh process for one session.

use super::process::Child;
use super::shape::Shape;
use clap::{Arg, Args};
use colo_ring::metrics::{Phase, Report, with_suffix};
use colo_ring_tests::lab::{
    Address, Lab, LabError, Qemu, Receiver, ReceiverOptions, Transport, command_under_test,
};
use colo_ring_tests::tls::Authority;
use colo_ring_tools::commands::receive::ReceiveArgs;
use std::fs;
use std::path::{Path, PathBuf};

/// How secondaries are started.
#[derive(Clone, Copy, Debug)]
pub struct StartOptions<'a> {
    /// Where.
    pub lab: &'a Lab,
    /// Over what they are reached.
    pub transport: Transport,
    /// `receive --cores`; its default where there is none.
    pub cores: Option<&'a str>,
    /// The certificates of those with TLS.
    pub authority: Option<&'a Authority>,
}

/// One of the secondaries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Secondary {
    /// What options, files and tables call it.
    pub name: String,
    kind: Kind,
    /// The `colo-ring` of another build; none is the one beside this program.
    other_build: Option<PathBuf>,
    /// Whether its connections have TLS.
    is_over_tls: bool,
}

/// The name of the decoders alone.
pub(super) const DECODERS: &str = "decoders";

/// Ends the name of a secondary of another build.
const OTHER: &str = "@other";

/// Ends the name of a secondary that is reached over TLS.
const TLS: &str = "@tls";

#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    Qemu,
    Sink,
    Ring(RingOptions),
    /// No secondary: see [`super::decoders`].
    Decoders,
}

/// The options of `colo-ring receive` that are compared, as they are typed.
#[derive(Clone, Debug, PartialEq, Eq)]
struct RingOptions {
    backend: String,
    registered: bool,
    cache: String,
    commit: String,
}

impl Secondary {
    /// Everything that can be compared: QEMU's own first, the sink last, and between them `colo-ring` with every value
    /// of its options. Without registered buffers `uring` is called `recvmsg`.
    #[must_use]
    pub fn all() -> Vec<Self> {
        let mut all = vec![Self::own()];
        for (backend, registered) in backends() {
            for cache in values("cache") {
                for commit in values("commit") {
                    let options = RingOptions {
                        backend: backend.clone(),
                        registered,
                        cache: cache.clone(),
                        commit,
                    };
                    all.push(Self {
                        name: options.name(),
                        kind: Kind::Ring(options),
                        other_build: None,
                        is_over_tls: false,
                    });
                }
            }
        }
        all.push(Self {
            name: "sink".to_owned(),
            kind: Kind::Sink,
            other_build: None,
            is_over_tls: false,
        });
        all
    }

    /// Those that a word names: a whole name, the first part of names (`uring`, `epoll-pool`), `all`, or `usual`.
    #[must_use]
    pub fn named(word: &str) -> Vec<Self> {
        if word == "usual" {
            return Self::usual();
        }
        let meant = |secondary: &Self| {
            let rest = secondary.name.strip_prefix(word);
            word == "all" || rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
        };
        Self::all().into_iter().filter(meant).collect()
    }

    /// Those that are compared when nothing is said: the default backend in every way, the other backends in the way
    /// that is the default, QEMU's own and the sink.
    #[must_use]
    pub fn usual() -> Vec<Self> {
        let default = Self::default_ring();
        let usual = |secondary: &Self| match (&secondary.kind, &default.kind) {
            (Kind::Ring(options), Kind::Ring(default)) => {
                (&options.backend, options.registered) == (&default.backend, default.registered)
                    || (&options.cache, &options.commit) == (&default.cache, &default.commit)
            }
            _ => true,
        };
        Self::all().into_iter().filter(usual).collect()
    }

    /// QEMU's own.
    #[must_use]
    pub fn own() -> Self {
        Self {
            name: "qemu".to_owned(),
            kind: Kind::Qemu,
            other_build: None,
            is_over_tls: false,
        }
    }

    /// The decoders alone, in this process: the limit of every secondary of sessions that are compressed.
    #[must_use]
    pub fn decoders() -> Self {
        Self {
            name: DECODERS.to_owned(),
            kind: Kind::Decoders,
            other_build: None,
            is_over_tls: false,
        }
    }

    /// Whether it is the decoders alone.
    #[must_use]
    pub fn is_decoders(&self) -> bool {
        self.kind == Kind::Decoders
    }

    /// The same receiver of another build, `NAME@other`. None if it is no receiver.
    #[must_use]
    pub fn of_other_build(&self, command: &Path) -> Option<Self> {
        matches!(self.kind, Kind::Ring(_)).then(|| Self {
            name: format!("{}{OTHER}", self.name),
            kind: self.kind.clone(),
            other_build: Some(command.to_owned()),
            is_over_tls: false,
        })
    }

    /// The same over TLS, `NAME@tls`. None of what has no TLS.
    #[must_use]
    pub fn over_tls(&self) -> Option<Self> {
        matches!(self.kind, Kind::Ring(_) | Kind::Qemu).then(|| Self {
            name: format!("{}{TLS}", self.name),
            is_over_tls: true,
            ..self.clone()
        })
    }

    /// Whether its connections have TLS.
    #[must_use]
    pub fn is_over_tls(&self) -> bool {
        self.is_over_tls
    }

    /// Whether it is `this` over TLS.
    #[must_use]
    pub fn is_over_tls_what(&self, this: &Self) -> bool {
        this.over_tls().as_ref() == Some(self)
    }

    /// `colo-ring` with the options that `receive` has by itself.
    ///
    /// # Panics
    /// Never: the default values are among all.
    #[must_use]
    pub fn default_ring() -> Self {
        // Defaults come first.
        let first = Self::all()
            .into_iter()
            .find(|secondary| matches!(secondary.kind, Kind::Ring(_)));
        first.expect("receive has a default")
    }

    /// Whether it is `this` of another build.
    #[must_use]
    pub fn is_other_build_of(&self, this: &Self) -> bool {
        self.other_build.is_some() && this.other_build.is_none() && self.kind == this.kind
    }

    /// Its name in tables; `qemu` is that of QEMU's own.
    #[must_use]
    pub fn title(&self, qemu: &str) -> String {
        match &self.kind {
            Kind::Qemu if self.is_over_tls => format!("{qemu}{TLS}"),
            Kind::Qemu => qemu.to_owned(),
            Kind::Sink | Kind::Decoders => self.name.clone(),
            Kind::Ring(_) => format!("colo-ring {}", self.name),
        }
    }

    /// Whether a QEMU is needed for it.
    #[must_use]
    pub fn is_qemu(&self) -> bool {
        self.kind == Kind::Qemu
    }

    /// Starts it for one session of such a capture.
    ///
    /// # Errors
    /// When it does not start, or is not what was asked for.
    pub fn start(&self, options: &StartOptions<'_>, shape: Shape) -> Result<Running, LabError> {
        let StartOptions {
            lab,
            transport,
            cores,
            authority,
        } = *options;
        let credentials = authority.filter(|_| self.is_over_tls);
        let credentials = credentials.map(|authority| authority.directory("receiver"));
        let address = Address::free(lab, transport)?;
        let process = match &self.kind {
            Kind::Qemu => {
                let mut machine = shape.machine(shape.delay(), 100);
                machine.prealloc = true;
                let mut qemu = Qemu::start_incoming(lab, "own-secondary", &machine)?;
                if let Some(compression) = shape.compression {
                    qemu.expect_compression(compression)?;
                }
                if let Some(directory) = &credentials {
                    qemu.expect_tls(directory)?;
                }
                qemu.be_secondary(&address, shape.channels)?;
                Process::Qemu(Box::new(qemu))
            }
            Kind::Sink => Process::Sink(start_sink(lab, &address, shape)?),
            Kind::Decoders => {
                return Err(LabError::Ended {
                    what: "the decoders alone".into(),
                    detail: "they take no session of a primary".into(),
                });
            }
            Kind::Ring(options) => {
                let command = self.other_build.clone().map_or_else(command_under_test, Ok)?;
                let mut extra = options.words();
                for (option, value) in [("--cores", cores.map(Into::into)), ("--tls", credentials)] {
                    let words = value.map(|value: PathBuf| [option.to_owned(), value.display().to_string()]);
                    extra.extend(words.into_iter().flatten());
                }
                Process::Ring(options.start(command, lab, &address, shape, extra)?)
            }
        };
        Ok(Running { address, process })
    }
}

impl RingOptions {
    fn name(&self) -> String {
        let backend = match (&*self.backend, self.registered) {
            ("uring", false) => "recvmsg",
            (backend, _) => backend,
        };
        format!("{backend}-{}-{}", self.cache, self.commit)
    }

    /// These options for the command line.
    fn words(&self) -> Vec<String> {
        let registered = if self.registered { "on" } else { "off" };
        let options = [
            ("--cache", &*self.cache),
            ("--commit", &*self.commit),
            ("--registered", registered),
        ];
        let words = options.iter().flat_map(|(option, value)| [*option, *value]);
        words.map(str::to_owned).collect()
    }

    fn start(
        &self,
        command: PathBuf,
        lab: &Lab,
        address: &Address,
        shape: Shape,
        extra: Vec<String>,
    ) -> Result<Receiver, LabError> {
        let backend = colo_ring::ring::BackendKind::ALL
            .into_iter()
            .find(|backend| backend.name() == self.backend)
            .expect("the laboratory knows every backend");
        let options = ReceiverOptions {
            channels: shape.channels,
            backend,
            once: true,
            extra,
        };
        let receiver = Receiver::start_command(command, lab, address, &options)?;
        let used = receiver.status()?["backend"].clone();
        if used != self.backend {
            return Err(LabError::Ended {
                what: format!("{} is not available here", self.name()),
                detail: format!("the receiver uses {used}: {}", receiver.log()),
            });
        }
        Ok(receiver)
    }
}

/// Starts `colo-ring sink` for one session.
fn start_sink(lab: &Lab, address: &Address, shape: Shape) -> Result<Child, LabError> {
    let (address, channels) = (address.to_string(), shape.channels.to_string());
    let args = [
        "sink",
        "--sessions",
        "1",
        "--listen",
        &address,
        "--channels",
        &channels,
    ];
    let mut sink = Child::start(args, &lab.file("sink.log"))?;
    sink.wait_listening()?;
    Ok(sink)
}

/// Every backend, and `uring` with and without registered buffers: the default of both first.
fn backends() -> Vec<(String, bool)> {
    let ways = |backend: String| match &*backend {
        "uring" => values("registered")
            .into_iter()
            .map(|value| (backend.clone(), value == "on"))
            .collect(),
        _ => vec![(backend, false)],
    };
    values("backend").into_iter().flat_map(ways).collect()
}

/// The values that an option of `receive` can have, as they are typed; the default first.
fn values(option: &str) -> Vec<String> {
    let receive = ReceiveArgs::augment_args(clap::Command::new("receive"));
    let arg = receive.get_arguments().find(|arg| arg.get_long() == Some(option));
    let possible = arg.map_or_else(Vec::new, Arg::get_possible_values);
    let default = arg.and_then(|arg| arg.get_default_values().first());
    let mut values: Vec<_> = possible.iter().map(|value| value.get_name().to_owned()).collect();
    values.sort_by_key(|value| default.is_none_or(|default| default != &**value));
    values
}

/// A secondary at work; ended when dropped.
#[derive(Debug)]
pub struct Running {
    address: Address,
    process: Process,
}

#[derive(Debug)]
enum Process {
    Qemu(Box<Qemu>),
    Sink(Child),
    Ring(Receiver),
}

/// What a receiver's flushes were.
#[derive(Clone, Copy, Debug, Default)]
pub struct Flushed {
    /// Pages copied.
    pub pages: u64,
    /// How long that took.
    pub ns: u64,
}

impl Running {
    /// Where the primary connects to.
    #[must_use]
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        match &self.process {
            Process::Qemu(qemu) => qemu.pid(),
            Process::Sink(child) => child.pid(),
            Process::Ring(receiver) => receiver.pid(),
        }
    }

    /// Ends it after its session. A receiver reports what it has flushed.
    ///
    /// # Errors
    /// When a receiver does not end or reports nothing.
    pub fn end(self) -> Result<Option<Flushed>, LabError> {
        let Process::Ring(mut receiver) = self.process else {
            return Ok(None);
        };
        receiver.wait_exit()?;
        let total = report(&receiver)?.total;
        let flush = total.phase(Phase::Flush);
        Ok(Some(Flushed {
            pages: total.pages,
            ns: flush.mean_ns * flush.count,
        }))
    }
}

/// The report that a receiver leaves at its end.
///
/// # Errors
/// When there is none.
pub fn report(receiver: &Receiver) -> Result<Report, LabError> {
    let file = with_suffix(receiver.histograms(), ".json");
    let text = fs::read(&file).map_err(LabError::io(format!("read {}", file.display())))?;
    serde_json::from_slice(&text).map_err(|error| LabError::Malformed {
        what: file.display().to_string(),
        detail: error.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_to_receive_is_there_and_the_default_comes_first() {
        let all = Secondary::all();
        assert_eq!(all[0].name, "qemu");
        assert_eq!(all.last().map(|last| &*last.name), Some("sink"));
        assert!(all.len() >= 6, "{all:?}");
        let [backend, cache, commit] = ["backend", "cache", "commit"].map(|option| values(option)[0].clone());
        let name = Secondary::default_ring().name;
        let first = if backend == "uring" && values("registered")[0] == "off" {
            "recvmsg"
        } else {
            &backend
        };
        assert_eq!(name, format!("{first}-{cache}-{commit}"));
        let usual = Secondary::usual();
        assert!(usual.contains(&Secondary::default_ring()));
        for backend in ["epoll", "threads"] {
            assert_eq!(
                usual.iter().filter(|one| one.name.starts_with(backend)).count(),
                1
            );
        }
    }

    #[test]
    fn receivers_alone_have_another_build() {
        let build = Path::new("/before/colo-ring");
        assert_eq!(Secondary::own().of_other_build(build), None);
        let ring = Secondary::default_ring();
        let other = ring.of_other_build(build).unwrap();
        assert_eq!(other.name, format!("{}@other", ring.name));
        assert_ne!(other.title("qemu"), ring.title("qemu"));
    }

    #[test]
    fn what_has_tls_is_named_after_what_has_none() {
        let ring = Secondary::default_ring();
        let secured = ring.over_tls().unwrap();
        assert_eq!(secured.name, format!("{}@tls", ring.name));
        assert!(secured.is_over_tls_what(&ring));
        assert!(!secured.is_over_tls_what(&Secondary::own()));
        assert_eq!(Secondary::own().over_tls().unwrap().title("QEMU 1"), "QEMU 1@tls");
        assert_eq!(Secondary::decoders().over_tls(), None);
    }

    #[test]
    fn words_name_secondaries() {
        assert_eq!(Secondary::named("all"), Secondary::all());
        assert_eq!(Secondary::named("qemu").len(), 1);
        assert_eq!(Secondary::named("epo"), []);
        let ways = values("cache").len() * values("commit").len();
        assert_eq!(Secondary::named("epoll").len(), ways);
    }
}
