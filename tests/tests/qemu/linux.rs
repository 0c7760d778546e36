//! A Linux guest on two CPUs with many devices, protected for longer: it writes and checks files in memory all the
//! while. `COLO_RING_LINUX_SECONDS` makes it as long as one likes; 30 s otherwise.

use colo_ring::host;
use colo_ring::ring::BackendKind;
use colo_ring_tests::HANG_LIMIT;
use std::time::{Duration, Instant};

use colo_ring_tests::lab::{
    Address, Distribution, Guest, LinuxGuest, Machine, Protection, Qemu, Receiver, ReceiverOptions,
    Transport, experiment,
};

const CHANNELS: u8 = 4;

#[test]
fn linux_guest_is_protected_while_it_writes() {
    let seconds = match std::env::var("COLO_RING_LINUX_SECONDS") {
        Ok(text) => text
            .parse()
            .expect("COLO_RING_LINUX_SECONDS is a number of seconds"),
        Err(_) => 30,
    };
    experiment(|lab| {
        let guest = LinuxGuest {
            touch_kib: 1024,
            files: 32,
            pause_ms: 50,
        };
        let machine = Machine::with_devices(256, Guest::Linux(guest));
        let address = Address::free(lab, Transport::Tcp)?;
        let options = ReceiverOptions {
            channels: CHANNELS,
            backend: BackendKind::Uring,
            once: true,
            extra: Vec::new(),
        };
        let mut receiver = Receiver::start(lab, &address, &options)?;
        let mut primary = Qemu::start(lab, "primary", &machine)?;
        primary.wait_serial("tick 1", HANG_LIMIT)?;
        let protection = Protection::every_ms(300, CHANNELS);
        primary.protect(&address, &protection)?;

        let (began, ticks_before) = (Instant::now(), primary.ticks());
        while began.elapsed() < Duration::from_secs(seconds) {
            let next = primary.checkpoints()? + 1;
            primary.wait_checkpoints(next, HANG_LIMIT)?;
            primary.check_guest()?;
        }
        let (checkpoints, ticks) = (primary.checkpoints()?, primary.ticks() - ticks_before);
        println!(
            "{checkpoints} checkpoints and {ticks} ticks of the guest in {seconds} s on {}",
            host::Machine::read()
        );
        println!("pause: {}", Distribution::of_us(&primary.pauses_us()));
        // Every wait for a checkpoint and every check of the guest above had its limit. The guest ran between them, too.
        assert!(checkpoints > 0, "no checkpoint in {seconds} s");
        assert!(ticks > 0, "no tick of the guest in {checkpoints} checkpoints");

        let saved = primary.commit_stopped(&lab.file("saved.ram"))?;
        saved.assert_equal(&receiver.dump_only(&lab.file("stopped"))?.block("pc.ram")?)?;
        primary.check_guest()?;
        let ticks = primary.ticks();
        primary.wait_serial(&format!("tick {}", ticks + 3), HANG_LIMIT)?;
        drop(primary);
        receiver.wait_exit().map(|_| ())
    });
}
