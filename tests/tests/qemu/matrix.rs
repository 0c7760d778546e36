//! Unmodified QEMU 11 primaries, protected by `colo-ring receive`: what the receiver holds is, bit for bit, the RAM
//! that the primary saves of itself.
//!
//! Every value of every dimension (multifd 1, 2, 4, 16, plain; pc, q35, pc-i440fx-8.0, two CPUs with many devices;
//! zero-page detection; TCP, UNIX) meets every backend at least once.

use colo_ring::ring::BackendKind;
use colo_ring_tests::HANG_LIMIT;
use colo_ring_tests::lab::{
    Address, Content, Dump, Guest, Lab, LabError, Machine, Pattern, Protection, Qemu, Receiver,
    ReceiverOptions, TestGuest, Transport, ZeroPageDetection, check_test_guest_image, experiment,
};

const CHECKPOINTS_MIN: usize = 20;
const MEMORY_MIB: u32 = 128;

struct Case {
    backend: BackendKind,
    machine: &'static str,
    channels: u8,
    transport: Transport,
    zero_pages: ZeroPageDetection,
    pattern: Pattern,
    content: Content,
}

/// Stands for a pc with two CPUs and many devices.
const MANY_DEVICES: &str = "many-devices";

impl Case {
    fn load(&self) -> TestGuest {
        // About 4 MiB a checkpoint; every eighth write makes a zero page.
        TestGuest {
            pattern: self.pattern,
            content: self.content,
            ..TestGuest::random(10_000, 96)
        }
    }

    fn machine(&self) -> Machine {
        let guest = Guest::Test(self.load());
        match self.machine {
            MANY_DEVICES => Machine::with_devices(MEMORY_MIB, guest),
            name => Machine::bare(name, MEMORY_MIB, guest),
        }
    }

    /// How the wire names this machine: the versioned type behind an alias.
    fn machine_prefix(&self) -> &'static str {
        match self.machine {
            "pc" | MANY_DEVICES => "pc-i440fx-",
            "q35" => "pc-q35-",
            versioned => versioned,
        }
    }

    fn run(&self) {
        experiment(|lab| self.body(lab));
    }

    fn body(&self, lab: &Lab) -> Result<(), LabError> {
        let address = Address::free(lab, self.transport)?;
        let options = ReceiverOptions {
            channels: self.channels,
            backend: self.backend,
            once: true,
            extra: Vec::new(),
        };
        let mut receiver = Receiver::start(lab, &address, &options)?;
        let mut primary = Qemu::start(lab, "primary", &self.machine())?;
        primary.wait_serial("tick 2 ", HANG_LIMIT)?;
        primary.protect(
            &address,
            &Protection {
                zero_page_detection: Some(self.zero_pages),
                ..Protection::every_ms(150, self.channels)
            },
        )?;

        // While checkpoints go on, any dump is the guest's memory of one instant.
        primary.wait_checkpoints(CHECKPOINTS_MIN / 2, HANG_LIMIT)?;
        let running = receiver.dump_only(&lab.file("running"))?;
        check_test_guest_image(&running.block("pc.ram")?, &self.load())?;
        primary.wait_checkpoints(CHECKPOINTS_MIN, HANG_LIMIT)?;

        let saved = primary.commit_stopped(&lab.file("saved.ram"))?;
        let stopped = receiver.dump_only(&lab.file("stopped"))?;
        saved.assert_equal(&stopped.block("pc.ram")?)?;
        primary.check_guest()?;
        self.check_description(&running, &stopped, primary.checkpoints()?)?;

        // The primary dies; with --once the receiver ends, its histograms written.
        drop(primary);
        receiver.wait_exit()?;
        let log = receiver.log();
        // Of the warning about an end of the device state that has another description.
        assert!(!log.contains("of other sections"), "{log}");
        let summary = receiver.histograms().with_extension("json");
        assert!(
            summary.exists(),
            "{} was not written: {}",
            summary.display(),
            receiver.log()
        );
        Ok(())
    }

    fn check_description(&self, running: &Dump, stopped: &Dump, checkpoints: usize) -> Result<(), LabError> {
        assert!(
            stopped.machine().starts_with(self.machine_prefix()),
            "{} on the wire",
            stopped.machine()
        );
        assert_eq!(
            stopped.checkpoint(),
            u64::try_from(checkpoints).expect("a count"),
            "the primary's own count"
        );
        assert!(running.checkpoint() < stopped.checkpoint());
        let device_state = stopped.device_state()?;
        assert_eq!(
            (device_state.first(), device_state.last()),
            (Some(&4), Some(&0)),
            "a FULL section first, EOF last"
        );
        Ok(())
    }
}

macro_rules! cases {
    ($($name:ident: $backend:ident, $machine:expr, $channels:expr, $transport:ident, $zero:ident, $pattern:expr,
        $content:ident;)*) => {
        $(#[test]
        fn $name() {
            Case {
                backend: BackendKind::$backend,
                machine: $machine,
                channels: $channels,
                transport: Transport::$transport,
                zero_pages: ZeroPageDetection::$zero,
                pattern: $pattern,
                content: Content::$content,
            }
            .run();
        })*
    };
}

use Pattern::{Random, Runs, Sequential};

cases! {
    uring_pc_multifd_4:        Uring,   "pc",            4,  Tcp,  Multifd, Random,     Incompressible;
    uring_q35_multifd_2:       Uring,   "q35",           2,  Unix, None,    Runs(40),   Compressible;
    uring_8_0_multifd_16:      Uring,   "pc-i440fx-8.0", 16, Tcp,  Legacy,  Random,     Incompressible;
    uring_pc_plain:            Uring,   "pc",            0,  Tcp,  Legacy,  Runs(10),   Compressible;
    uring_devices_multifd_1:   Uring,   MANY_DEVICES,    1,  Unix, Multifd, Sequential, Incompressible;
    uring_8_0_multifd_4:       Uring,   "pc-i440fx-8.0", 4,  Unix, Multifd, Sequential, Incompressible;

    epoll_pc_multifd_16:       Epoll,   "pc",            16, Tcp,  Multifd, Runs(40),   Incompressible;
    epoll_q35_multifd_1:       Epoll,   "q35",           1,  Tcp,  Legacy,  Random,     Compressible;
    epoll_8_0_multifd_4:       Epoll,   "pc-i440fx-8.0", 4,  Unix, None,    Random,     Incompressible;
    epoll_q35_plain:           Epoll,   "q35",           0,  Unix, None,    Sequential, Incompressible;
    epoll_devices_multifd_2:   Epoll,   MANY_DEVICES,    2,  Tcp,  Multifd, Random,     Incompressible;

    threads_pc_multifd_1:      Threads, "pc",            1,  Unix, None,    Random,     Incompressible;
    threads_q35_multifd_16:    Threads, "q35",           16, Tcp,  Multifd, Runs(40),   Compressible;
    threads_8_0_multifd_2:     Threads, "pc-i440fx-8.0", 2,  Tcp,  Legacy,  Sequential, Incompressible;
    threads_8_0_plain:         Threads, "pc-i440fx-8.0", 0,  Tcp,  Legacy,  Random,     Incompressible;
    threads_devices_multifd_4: Threads, MANY_DEVICES,    4,  Unix, Multifd, Runs(10),   Incompressible;
}
