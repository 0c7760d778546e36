//! Kinds of threads.

use rustix::thread::CapabilitySet;

/// What a thread does, and so what it may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThreadKind {
    /// The command's own thread: shows progress, waits for the end, prints the report.
    Main,
    /// Writes the log.
    Log,
    /// Waits for SIGINT and SIGTERM.
    Signals,
    /// Has the helper run hooks.
    Hooks,
    /// Accepts connections, serves the control socket.
    Control,
    /// Writes histograms to files.
    Histograms,
    /// Drives connections of a core by io_uring or epoll.
    Core,
    /// Drives one connection (backend `threads`).
    Channel,
    /// Decodes pages, or helps a flush.
    Worker,
    /// Maps and populates guests' memory.
    Memory,
    /// Writes dumps and restores checkpoints to files that are open, and frees memory.
    Background,
    /// Accepts clients of disks, and opens disks.
    DiskServer,
    /// Serves a client of a disk, or applies its log.
    Disk,
    /// Does TLS handshakes, and relays the links of guards.
    Handshake,
    /// Serves measurements over HTTP.
    Metrics,
    /// Starts threads for others.
    Starter,
}

impl ThreadKind {
    /// All of them.
    pub const ALL: [Self; 16] = [
        Self::Main,
        Self::Log,
        Self::Signals,
        Self::Hooks,
        Self::Control,
        Self::Histograms,
        Self::Core,
        Self::Channel,
        Self::Worker,
        Self::Memory,
        Self::Background,
        Self::DiskServer,
        Self::Disk,
        Self::Handshake,
        Self::Metrics,
        Self::Starter,
    ];

    /// Those that are started while the receiver runs: what they may do, the starter may.
    const STARTED: Kinds = Kinds::of(&[Self::Channel, Self::Memory, Self::Background, Self::Disk]);

    /// The capabilities that it keeps, of those that the process has.
    pub fn capabilities(self) -> CapabilitySet {
        let none = CapabilitySet::empty();
        // Guests' memory is locked, and registered with rings, also beyond `ulimit -l`.
        let locks = CapabilitySet::IPC_LOCK;
        // Files of the directories that the operator has named may be another user's, where the receiver runs as root.
        let opens = CapabilitySet::DAC_OVERRIDE;
        match self {
            Self::Log | Self::Signals | Self::Hooks | Self::Handshake | Self::Metrics => none,
            Self::Main
            | Self::Control
            | Self::Histograms
            | Self::Background
            | Self::DiskServer
            | Self::Disk => opens,
            Self::Channel | Self::Worker => opens,
            Self::Core | Self::Memory | Self::Starter => locks | opens,
        }
    }
}

/// A set of kinds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kinds(u16);

impl Kinds {
    pub(super) const ALL: Self = Self::of(&ThreadKind::ALL);

    pub(super) const fn of(kinds: &[ThreadKind]) -> Self {
        let (mut set, mut at) = (0, 0);
        while at < kinds.len() {
            set |= 1 << kinds[at] as u16;
            at += 1;
        }
        Self(set)
    }

    pub(super) fn is_for(self, kind: ThreadKind) -> bool {
        self.0 >> kind as u16 & 1 == 1
    }

    /// Whether it has the kind, or one that threads of the kind start.
    pub(super) fn has(self, kind: ThreadKind) -> bool {
        let by_starting = kind == ThreadKind::Starter && self.0 & ThreadKind::STARTED.0 != 0;
        self.is_for(kind) || by_starting
    }
}
