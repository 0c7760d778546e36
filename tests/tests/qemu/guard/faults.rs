//! Wrong on purpose: output that leaves before its commit must be found by what a client sees. A test of the gates that this passes would
//! prove nothing. Other faults need instants that only the simulation and the model find (`engine/src/link/model.rs`).

use super::scene::{Scene, Way};
use colo_ring_tests::lab::{Client, ClientError, Company, LinkMoment, Load, net_experiment};
use std::time::Duration;

/// The kill may fall into a moment in which nothing was on its way.
const ATTEMPTS: u32 = 10;

/// How long a connection that cannot go on is watched for it.
const HANGS_FOR: Duration = Duration::from_secs(20);

#[test]
fn output_that_leaves_before_its_commit_is_found() {
    net_experiment(Company::Others, |lab| {
        for attempt in 0..ATTEMPTS {
            let (scene, proxy) = Scene::set_with_proxy(lab, Way::Relay, attempt)?;
            let client = Client::start(Load::Count(Duration::ZERO))?;
            client.wait_answers(20)?;
            proxy.release_early();
            proxy.kill_at(LinkMoment::Placed, 5, scene.primary.pid());
            proxy.wait_killed()?;
            let (_receiver, _fresh) = scene.fail_over()?;
            // An answer that the guest has never sent: the client says so, or the two have nothing to say to each other any more.
            let goes_on = client.goes_on(20, HANGS_FOR);
            let error = client.end().error;
            println!("attempt {attempt}: goes on: {goes_on}, {error:?}");
            if !goes_on || matches!(error, Some(ClientError::Wrong(_))) {
                return Ok(());
            }
        }
        panic!("it was not found in {ATTEMPTS} kills");
    });
}
