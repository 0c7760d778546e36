//! The guests: what they do to their memory, as QEMU arguments.

use super::{DiskGuest, Lab, NetGuest, ServicesGuest};

/// What a QEMU of the laboratory boots.
#[derive(Clone, Debug)]
pub enum Guest {
    /// The freestanding test guest, `tests/guest/dirtier.S`.
    Test(TestGuest),
    /// A Debian kernel with busybox, `tests/guest/linux-init`.
    Linux(LinuxGuest),
    /// The same kernel with a disk, `tests/guest/disk-init`.
    Disk(DiskGuest),
    /// The same kernel with a network card, `tests/guest/net-init`.
    Net(NetGuest),
    /// The same kernel with servers on a disk, `tests/guest/services-init`.
    Services(ServicesGuest),
}

/// Where the test guest writes.
#[derive(Clone, Copy, Debug)]
pub enum Pattern {
    /// Single random pages.
    Random,
    /// This many consecutive pages, then another random place.
    Runs(u32),
    /// From the first page of the region to the last, again and again.
    Sequential,
}

/// What the test guest writes.
#[derive(Clone, Copy, Debug)]
pub enum Content {
    /// Pages that neither LZ nor Huffman coding makes smaller.
    Incompressible,
    /// Pages that compress to about a third.
    Compressible,
}

/// The test guest's load. Its region begins at 8 MiB.
#[derive(Clone, Debug)]
pub struct TestGuest {
    /// Pages written per second; 0 leaves it halted between timer interrupts.
    pub rate_pages_per_s: u32,
    /// Where they are.
    pub pattern: Pattern,
    /// What they hold.
    pub content: Content,
    /// Every so many pages, one is written as all zero; 0 = never.
    pub zero_every: u32,
    /// Size of the region, MiB.
    pub region_mib: u32,
    /// Whether the whole region is written once before the guest is ready.
    pub fill: bool,
    /// Timer interrupts, 100 a second, for each tick.
    pub interrupts_per_tick: u32,
}

impl TestGuest {
    /// A guest that only ticks.
    #[must_use]
    pub fn idle() -> Self {
        Self {
            rate_pages_per_s: 0,
            pattern: Pattern::Random,
            content: Content::Incompressible,
            zero_every: 0,
            region_mib: 64,
            fill: false,
            interrupts_per_tick: 10,
        }
    }

    /// A guest that writes random incompressible pages, some of them zero.
    #[must_use]
    pub fn random(rate_pages_per_s: u32, region_mib: u32) -> Self {
        Self {
            rate_pages_per_s,
            region_mib,
            zero_every: 8,
            ..Self::idle()
        }
    }

    fn append(&self) -> String {
        let run = match self.pattern {
            Pattern::Random => 1,
            Pattern::Runs(pages) => pages,
            Pattern::Sequential => 0,
        };
        format!(
            "rate={} run={run} mib={} soft={} zero={} fill={} tick={}",
            self.rate_pages_per_s,
            self.region_mib,
            u8::from(matches!(self.content, Content::Compressible)),
            self.zero_every,
            u8::from(self.fill),
            self.interrupts_per_tick,
        )
    }
}

/// The Linux guest's load: files of random bytes in memory, each checked before it is written again.
#[derive(Clone, Debug)]
pub struct LinuxGuest {
    /// Written per turn, KiB.
    pub touch_kib: u32,
    /// Files kept; the memory in use is about `files` × `touch_kib`.
    pub files: u32,
    /// Pause between turns, ms.
    pub pause_ms: u32,
}

impl Guest {
    pub(super) fn args(&self, lab: &Lab) -> Vec<String> {
        match self {
            Self::Test(guest) => {
                vec![
                    "-kernel".into(),
                    lab.test_guest.display().to_string(),
                    "-append".into(),
                    guest.append(),
                ]
            }
            Self::Disk(guest) => guest.args(lab),
            Self::Net(guest) => guest.args(lab),
            Self::Services(guest) => guest.args(lab),
            Self::Linux(guest) => vec![
                "-kernel".into(),
                lab.kernel.display().to_string(),
                "-initrd".into(),
                lab.initrd.display().to_string(),
                "-append".into(),
                // Emulated on a busy host, the timer may be too late for the kernel's test of it, which is a panic then.
                format!(
                    "console=ttyS0 quiet no_timer_check touch_kib={} files={} pause_ms={}",
                    guest.touch_kib, guest.files, guest.pause_ms
                ),
            ],
        }
    }
}
