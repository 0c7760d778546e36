//! What the demo measures.

use crate::page_compression::{CompressionArgs, PageCompression};
use clap::ValueEnum;
use colo_ring::ring::BackendKind;
use colo_ring::store::{CacheKind, CommitMode};
use colo_ring::wire::codec::Method;
use schemars::JsonSchema;
use serde::Serialize;

/// The names of the contestants without `--all`.
pub(super) const DEFAULT: &str = "colo-ring";
pub(super) const WITH_EPOLL: &str = "with epoll";
pub(super) const AS_QEMU: &str = "QEMU's way";
pub(super) const FLOOR: &str = "sink";

/// The ways to receive of the matrix: a name, the backend, and whether it reads into registered buffers.
const WAYS: [(&str, BackendKind, bool); 4] = [
    ("uring", BackendKind::Uring, true),
    ("recvmsg", BackendKind::Uring, false),
    ("epoll", BackendKind::Epoll, false),
    ("threads", BackendKind::Threads, false),
];

/// A contestant.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub(super) struct Variant {
    /// In the matrix a way to receive, then cache and commit. `uring` receives into registered buffers, `recvmsg` is `uring`
    /// without them.
    pub(super) name: String,
    #[serde(flatten)]
    pub(super) secondary: Secondary,
}

/// What receives.
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[serde(tag = "secondary", rename_all = "lowercase")]
pub(super) enum Secondary {
    /// A receiver.
    Receiver(ReceiverKind),
    /// Keeps nothing: the floor of the transport.
    Sink,
}

/// A receiver with these options.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub(super) struct ReceiverKind {
    /// How bytes are received.
    pub(super) backend: BackendKind,
    /// Whether reads go into registered buffers.
    pub(super) registered: bool,
    /// Where received pages wait for their commit.
    pub(super) cache: CacheKind,
    /// When pages are copied to the RAM image.
    pub(super) commit: CommitMode,
    #[serde(flatten)]
    compression: PageCompression,
}

impl ReceiverKind {
    /// With the defaults of `receive` but for the backend.
    fn with(backend: BackendKind) -> Self {
        Self {
            backend,
            registered: backend == BackendKind::Uring,
            cache: CacheKind::Pool,
            commit: CommitMode::Deferred,
            compression: PageCompression::default(),
        }
    }

    /// Built as QEMU's own receiver is: a thread for each channel, a mirror of the guest's memory, and the copying inside of the
    /// guest's pause.
    fn as_qemu() -> Self {
        Self {
            cache: CacheKind::Mirror,
            commit: CommitMode::Sync,
            ..Self::with(BackendKind::Threads)
        }
    }
}

impl Variant {
    fn receiver(name: impl Into<String>, kind: ReceiverKind) -> Self {
        Self {
            name: name.into(),
            secondary: Secondary::Receiver(kind),
        }
    }

    fn sink() -> Self {
        Self {
            name: FLOOR.to_owned(),
            secondary: Secondary::Sink,
        }
    }

    /// How the sessions of this contestant are compressed.
    pub(super) fn compression(&self) -> PageCompression {
        match &self.secondary {
            Secondary::Receiver(kind) => kind.compression,
            Secondary::Sink => PageCompression::default(),
        }
    }

    /// The four that the demo is about.
    pub(super) fn main() -> Vec<Self> {
        vec![
            Self::receiver(DEFAULT, ReceiverKind::with(BackendKind::Uring)),
            Self::receiver(WITH_EPOLL, ReceiverKind::with(BackendKind::Epoll)),
            Self::receiver(AS_QEMU, ReceiverKind::as_qemu()),
            Self::sink(),
        ]
    }

    /// These, every other combination of what the options of `receive` offer, and, with `compressed`, the default with each
    /// method of compression.
    pub(super) fn all(compressed: bool) -> Vec<Self> {
        let mut all = Self::main();
        let floor = all.pop();
        let stores = CacheKind::value_variants().iter().flat_map(|&cache| {
            CommitMode::value_variants()
                .iter()
                .map(move |&commit| (cache, commit))
        });
        let matrix = stores.flat_map(|(cache, commit)| {
            WAYS.map(|(way, backend, registered)| {
                let name = format!("{way} {} {}", value_name(cache), value_name(commit));
                let kind = ReceiverKind {
                    registered,
                    cache,
                    commit,
                    ..ReceiverKind::with(backend)
                };
                Self::receiver(name, kind)
            })
        });
        let is_new = |variant: &Self| !Self::main().iter().any(|main| main.is_same(variant));
        all.extend(matrix.filter(is_new));
        if compressed {
            all.extend(Method::value_variants().iter().filter_map(Self::compressed));
        }
        all.extend(floor);
        all
    }

    fn compressed(method: &Method) -> Option<Self> {
        let args = CompressionArgs {
            compression: *method,
            compression_level: None,
        };
        let compression = args.check(1).ok().filter(|compression| compression.is_some())?;
        let kind = ReceiverKind {
            compression,
            ..ReceiverKind::with(BackendKind::Uring)
        };
        Some(Self::receiver(format!("{DEFAULT} {}", method.name()), kind))
    }

    fn is_same(&self, other: &Self) -> bool {
        let key = |variant: &Self| match &variant.secondary {
            Secondary::Receiver(kind) => Some((kind.backend, kind.registered, kind.cache, kind.commit)),
            Secondary::Sink => None,
        };
        key(self) == key(other)
    }
}

fn value_name(value: impl ValueEnum) -> String {
    let value = value.to_possible_value().expect("no variant is hidden");
    value.get_name().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_cache_and_commit_mode_is_measured_with_every_way_to_receive() {
        let variants = Variant::all(true);
        let names: BTreeSet<_> = variants.iter().map(|variant| variant.name.clone()).collect();
        let stores = CacheKind::value_variants().len() * CommitMode::value_variants().len();
        // The sink, and two methods of compression, beside the matrix.
        assert_eq!((variants.len(), names.len()), (4 * stores + 3, 4 * stores + 3));
        for name in [
            DEFAULT,
            WITH_EPOLL,
            AS_QEMU,
            FLOOR,
            "recvmsg mirror sync",
            "colo-ring zstd",
        ] {
            assert!(names.contains(name), "{name}: {names:?}");
        }
        assert_eq!(variants[0].name, DEFAULT);
        assert!(
            Variant::all(false)
                .iter()
                .all(|variant| !variant.compression().is_some())
        );
    }
}
