//! Both sides, one call after the other. Orders and losses are the simulation's ([`crate::receiver`]).

use super::*;
use crate::units::CheckpointId;

const FIRST: CheckpointId = CheckpointId(0);
const SECOND: CheckpointId = CheckpointId(1);
const THIRD: CheckpointId = CheckpointId(2);

const NOTHING: [u32; 0] = [];

fn out(held: &mut HeldOutput<u32>) -> Vec<u32> {
    std::iter::from_fn(|| held.pop()).collect()
}

fn push(held: &mut HeldOutput<u32>, frames: impl IntoIterator<Item = u32>) {
    for frame in frames {
        assert!(held.push(frame, 100));
    }
}

#[test]
fn frames_pass_before_the_first_line_and_then_leave_by_commits() {
    let mut held = HeldOutput::new(1 << 20);
    push(&mut held, [1, 2]);
    assert_eq!(out(&mut held), [1, 2]);
    push(&mut held, [3]);
    held.place(FIRST);
    push(&mut held, [4, 5]);
    assert_eq!(out(&mut held), [3], "it came before there was a line");
    assert_eq!(
        held.held(),
        Held {
            frames: 2,
            bytes: 200
        }
    );
    held.committed(FIRST);
    assert_eq!(out(&mut held), NOTHING);
    held.place(SECOND);
    push(&mut held, [6]);
    held.committed(SECOND);
    assert_eq!(out(&mut held), [4, 5]);
    held.committed(SECOND);
    held.committed(THIRD);
    assert_eq!(out(&mut held), NOTHING, "there is no line of that checkpoint");
    held.open();
    assert_eq!(out(&mut held), [6]);
    push(&mut held, [7]);
    assert_eq!(out(&mut held), [7]);
    assert_eq!(held.held(), Held::default());
}

#[test]
fn lines_of_a_lost_link_let_nothing_go() {
    let mut held = HeldOutput::new(1 << 20);
    held.place(FIRST);
    push(&mut held, [1]);
    held.place(SECOND);
    held.forget_barriers();
    held.committed(SECOND);
    assert_eq!(out(&mut held), NOTHING);
    held.place(THIRD);
    held.committed(THIRD);
    assert_eq!(out(&mut held), [1]);
}

#[test]
fn what_does_not_fit_is_dropped_and_counted() {
    let mut held = HeldOutput::new(250);
    held.place(FIRST);
    assert!(held.push(1, 100) && held.push(2, 150) && !held.push(3, 1));
    assert_eq!(held.dropped(), 1);
    held.place(SECOND);
    held.committed(SECOND);
    assert_eq!(out(&mut held), [1, 2]);
    assert!(held.push(4, 250));
}

#[test]
fn a_checkpoint_is_acknowledged_when_its_barrier_is_placed() {
    let mut barriers = Barriers::default();
    barriers.ask(FIRST);
    assert!(barriers.may_acknowledge(FIRST) && barriers.next_message().is_none());
    barriers.attach(false);
    assert!(
        barriers.may_acknowledge(FIRST),
        "it was stopped before the link came"
    );
    barriers.ask(SECOND);
    assert!(!barriers.may_acknowledge(SECOND));
    assert_eq!(barriers.placed(SECOND), Err(LinkError::NotAsked(SECOND)));
    assert_eq!(
        barriers.next_message(),
        Some(ToGuard::Barrier { checkpoint: SECOND })
    );
    assert!(barriers.awaits_answer() && barriers.next_message().is_none());
    assert_eq!(barriers.placed(FIRST), Err(LinkError::NotAsked(FIRST)));
    barriers.committed(SECOND);
    assert_eq!(
        barriers.next_message(),
        None,
        "a guard that hangs must not find both when it goes on"
    );
    assert_eq!(barriers.placed(SECOND), Ok(()));
    assert!(barriers.may_acknowledge(SECOND) && !barriers.awaits_answer());
    assert_eq!(
        barriers.next_message(),
        Some(ToGuard::Committed { checkpoint: SECOND })
    );
    assert_eq!(barriers.next_message(), None);
    barriers.ask(THIRD);
    assert!(!barriers.may_acknowledge(THIRD));
    barriers.detach();
    assert!(
        barriers.may_acknowledge(THIRD),
        "nothing is let go without a link"
    );
}

/// A guard that has its guest protected holds nothing before its first line: without it the guest does not run on.
#[test]
fn without_its_first_line_nothing_is_acknowledged() {
    let mut barriers = Barriers::default();
    barriers.attach(true);
    assert!(!barriers.is_unguarded());
    barriers.ask(FIRST);
    barriers.committed(FIRST);
    barriers.detach();
    assert!(barriers.is_unguarded() && !barriers.may_acknowledge(FIRST));
    // One that has found the guest protected has held from its start.
    barriers.attach(false);
    assert!(!barriers.is_unguarded() && barriers.may_acknowledge(FIRST));
    barriers.detach();
    assert!(!barriers.is_unguarded() && barriers.may_acknowledge(FIRST));

    let mut barriers = Barriers::default();
    barriers.attach(true);
    barriers.ask(FIRST);
    assert!(barriers.next_message().is_some());
    assert_eq!(barriers.placed(FIRST), Ok(()));
    barriers.detach();
    assert!(!barriers.is_unguarded() && barriers.may_acknowledge(FIRST));
}

#[test]
fn a_request_is_kept_until_the_guard_wants_a_checkpoint() {
    let mut barriers = Barriers::default();
    barriers.request();
    assert!(barriers.may_begin(), "there is no guard");
    barriers.attach(false);
    barriers.request();
    assert!(
        barriers.may_begin(),
        "its guard has not said that requests are kept"
    );
    barriers.keep();
    assert!(!barriers.may_begin() && barriers.keeps_request());
    barriers.begin(Some(FIRST));
    assert!(!barriers.may_begin(), "there was no barrier on this link");
    barriers.begin(None);
    assert!(barriers.may_begin() && !barriers.keeps_request());
    barriers.ask(FIRST);
    assert!(!barriers.may_begin(), "it was wanted once");
    assert!(!barriers.keeps_request(), "nothing was asked for");
    barriers.begin(None);
    assert!(!barriers.may_begin(), "it has begun already");
    // Before the primary asks: it is answered at once.
    barriers.begin(Some(FIRST));
    barriers.request();
    assert!(barriers.may_begin());
    barriers.ask(SECOND);
    barriers.request();
    assert!(barriers.keeps_request());
    barriers.begin_now();
    assert!(barriers.may_begin());
    barriers.ask(THIRD);
    barriers.request();
    assert!(barriers.keeps_request());
    barriers.detach();
    assert!(barriers.may_begin(), "its guard is lost");
    barriers.attach(false);
    assert!(
        barriers.may_begin(),
        "the next guard has not said that requests are kept"
    );
    barriers.keep();
    barriers.request();
    assert_eq!(barriers.begin_handover(), Ok(()));
    assert_eq!(barriers.next_message(), Some(ToGuard::Handover));
    assert!(barriers.keeps_request());
    barriers.handover_ready();
    assert!(barriers.may_begin(), "it is the last");
}

#[test]
fn a_guest_is_handed_over_by_its_last_checkpoint() {
    let mut barriers = Barriers::default();
    assert_eq!(barriers.begin_handover(), Err(HandoverError::NoGuard));
    barriers.attach(false);
    assert_eq!(barriers.begin_handover(), Ok(()));
    assert_eq!(barriers.begin_handover(), Err(HandoverError::UnderWay));
    assert_eq!(barriers.next_message(), Some(ToGuard::Handover));
    // One that is under way is not the last.
    barriers.ask(FIRST);
    barriers.handover_ready();
    barriers.committed(FIRST);
    assert!(barriers.next_message().is_some());
    assert_eq!(barriers.placed(FIRST), Ok(()));
    assert!(barriers.may_acknowledge(FIRST) && barriers.next_message().is_some());
    assert_eq!(barriers.next_message(), None);
    barriers.ask(SECOND);
    assert!(!barriers.cancel_handover(), "its last checkpoint has begun");
    assert!(barriers.next_message().is_some());
    assert_eq!(barriers.placed(SECOND), Ok(()));
    assert!(!barriers.may_acknowledge(SECOND));
    assert_eq!(barriers.primary_ended(), Err(LinkError::NotLast));
    barriers.committed(SECOND);
    let messages: Vec<_> = std::iter::from_fn(|| barriers.next_message()).collect();
    assert_eq!(
        messages,
        [
            ToGuard::Committed { checkpoint: SECOND },
            ToGuard::Last { checkpoint: SECOND }
        ]
    );
    assert!(barriers.awaits_end() && barriers.awaits_answer());
    assert_eq!(barriers.primary_ended(), Ok(SECOND));
    assert!(!barriers.may_acknowledge(SECOND) && !barriers.awaits_end());
}

#[test]
fn a_guest_that_is_not_handed_over_runs_on() {
    let until_told = || {
        let mut barriers = Barriers::default();
        barriers.attach(false);
        assert_eq!(barriers.begin_handover(), Ok(()));
        assert_eq!(barriers.next_message(), Some(ToGuard::Handover));
        barriers.handover_ready();
        barriers.ask(FIRST);
        barriers.committed(FIRST);
        assert!(barriers.next_message().is_some());
        assert_eq!(barriers.placed(FIRST), Ok(()));
        assert_eq!(
            barriers.next_message(),
            Some(ToGuard::Committed { checkpoint: FIRST })
        );
        assert_eq!(barriers.next_message(), Some(ToGuard::Last { checkpoint: FIRST }));
        barriers
    };
    let mut refused = until_told();
    assert!(refused.handover_refused() && refused.may_acknowledge(FIRST));
    let mut lost = until_told();
    lost.detach();
    assert!(lost.may_acknowledge(FIRST) && !lost.awaits_end());
    let mut ended = Barriers::default();
    ended.attach(false);
    assert_eq!(ended.begin_handover(), Ok(()));
    assert!(ended.next_message().is_some());
    ended.handover_ready();
    ended.ask(FIRST);
    ended.committed(FIRST);
    ended.session_ended();
    assert!(ended.next_message().is_some());
    assert_eq!(ended.placed(FIRST), Ok(()));
    let after: Vec<_> = std::iter::from_fn(|| ended.next_message()).collect();
    assert_eq!(
        after,
        [ToGuard::Committed { checkpoint: FIRST }],
        "its QEMU is not to end any more"
    );
    let mut cancelled = Barriers::default();
    cancelled.attach(false);
    assert_eq!(cancelled.begin_handover(), Ok(()));
    assert!(cancelled.cancel_handover());
    cancelled.handover_ready();
    cancelled.ask(FIRST);
    assert!(cancelled.next_message().is_some());
    assert_eq!(cancelled.placed(FIRST), Ok(()));
    assert!(cancelled.may_acknowledge(FIRST));
}

#[test]
fn messages_are_lines_that_people_can_read() {
    let hello = ToReceiver::Hello(Hello {
        version: LINK_VERSION,
        name: "web3".into(),
        uuid: None,
        timeout_ms: 5000,
        wants: Wanted::Next,
    });
    let text = serde_json::to_string(&hello).unwrap();
    assert_eq!(
        text,
        r#"{"type":"hello","version":6,"name":"web3","uuid":null,"timeout_ms":5000,"wants":"next"}"#
    );
    assert_eq!(serde_json::from_str::<ToReceiver>(&text).unwrap(), hello);
    let barrier = ToGuard::Barrier { checkpoint: SECOND };
    assert_eq!(
        serde_json::to_string(&barrier).unwrap(),
        r#"{"type":"barrier","checkpoint":1}"#
    );
}
