//! Wrong on purpose: output that leaves before its commit must be found by what the world sees. A test of the gates that this passes would
//! prove nothing. Other faults need instants that only the simulation and the model find (`engine/src/link/model.rs`).

use super::frames::{ENDLESS, PAUSE_US, is_any_seen_again};
use super::scene::{Scene, Way};
use colo_ring_tests::lab::{
    Company, FrameCapture, LinkMoment, ReceiverFault, ask_for_frames, net_experiment,
};
use std::time::Duration;

/// One is enough, unless a thread is starved for longer than the proxy waits for it.
const ATTEMPTS: u32 = 3;

/// How long the guest sends behind an acknowledgement before the line is drawn.
const LATE: Duration = Duration::from_millis(50);

/// What a guard may let go has left long before that.
const RELEASED_AFTER: Duration = Duration::from_millis(50);

/// The first message.
const SKIP: u32 = 0;

/// A guest that sends without end is killed when the fault has let something go. Its frames have numbers: those that are seen again were
/// unmade.
fn is_found(fault: ReceiverFault, killed_at: LinkMoment) {
    net_experiment(Company::Others, |lab| {
        for attempt in 0..ATTEMPTS {
            let (scene, proxy) = Scene::set_with_proxy(lab, Way::Relay, attempt, &[])?;
            let world = FrameCapture::start()?;
            ask_for_frames(&scene.primary, None, ENDLESS, PAUSE_US)?;
            // Of a checkpoint in which the guest sends: that guest is resumed.
            world.wait_number(100)?;
            proxy.break_protocol(fault);
            proxy.kill_at(killed_at, RELEASED_AFTER, SKIP, scene.primary.pid());
            proxy.wait_acted()?;
            let (_receiver, _fresh) = scene.fail_over()?;
            let is_found = is_any_seen_again(&world)?;
            println!("attempt {attempt}: {is_found}");
            if is_found {
                return Ok(());
            }
        }
        panic!("it was not found in {ATTEMPTS} kills");
    });
}

#[test]
fn output_that_leaves_before_its_commit_is_found() {
    is_found(ReceiverFault::ReleasesEarly, LinkMoment::Placed);
}

#[test]
fn an_acknowledgement_before_the_line_is_found() {
    is_found(
        ReceiverFault::AcknowledgesEarly(LATE),
        LinkMoment::Releasing(Duration::ZERO),
    );
}
