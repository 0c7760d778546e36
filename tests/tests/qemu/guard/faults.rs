//! Wrong on purpose: a receiver that speaks of a commit too early, and a guard that speaks of a line too early, must be found by what a client
//! sees. A test of the gates that these pass would prove nothing.

use super::scene::{Scene, Way};
use colo_ring_tests::lab::{Client, ClientError, Company, LinkFault, LinkMoment, Load, net_experiment};
use std::time::Duration;

/// The kill may fall into a moment in which nothing was on its way.
const ATTEMPTS: u32 = 10;

/// Longer than a guest needs for an answer once it runs.
const EARLY: Duration = Duration::from_millis(20);

fn is_found(fault: LinkFault) {
    net_experiment(Company::Others, |lab| {
        for attempt in 0..ATTEMPTS {
            let (scene, proxy) = Scene::set_with_proxy(lab, Way::Relay, attempt)?;
            let client = Client::start(Load::Count(Duration::ZERO))?;
            client.wait_answers(20)?;
            proxy.break_by(fault);
            proxy.kill_at(LinkMoment::Placed, 5, scene.primary.pid());
            proxy.wait_killed()?;
            let (_receiver, _fresh) = scene.fail_over()?;
            // Whether it goes on, or has ended.
            let goes_on = client.wait_answers(20);
            let error = client.end().error;
            println!("attempt {attempt}: {error:?}, {goes_on:?}");
            if let Some(ClientError::Wrong(_)) = error {
                return Ok(());
            }
        }
        panic!("{fault:?} was not found in {ATTEMPTS} kills");
    });
}

#[test]
fn output_that_leaves_before_its_commit_is_found() {
    is_found(LinkFault::EarlyCommitted);
}

#[test]
fn a_line_that_is_drawn_too_late_is_found() {
    is_found(LinkFault::EarlyPlaced(EARLY));
}
