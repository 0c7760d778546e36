//! A guest that is protected again: the checkpoint that was kept of it before is given up, once its new session has one that is
//! certain. Until then it is the only one; from then on its memory would be held twice, and what it has is older than what the guest has done since.

use super::state::{ControlState, Kept, Live};
use crate::receiver::Event;
use crate::receiver::background::WorkKind;
use crate::receiver::guest::SessionTitle;
use crate::receiver::kept_checkpoint::KeptCheckpoint;
use std::time::Duration;

impl ControlState {
    /// Gives up kept checkpoints of guests that have newer ones.
    pub(super) fn replace_kept(&mut self) {
        let uptime = self.uptime();
        let mut replaced: Vec<(u32, SessionTitle, u32)> = Vec::new();
        for live in self.live.iter_mut().filter(|live| !live.has_replaced) {
            // The initial one may turn out to be none: its end is certain when the primary has gone on (`SessionEnd::FalseEnd`).
            let number = live.session.checkpoint().and_then(|kept| kept.number());
            if number.is_none_or(|number| number.0 == 0) || live.session.end().is_some() {
                continue;
            }
            live.has_replaced = true;
            let older = self.kept.iter().filter(|kept| kept.is_replaced_by(live, uptime));
            replaced.extend(older.map(|kept| {
                let guest = &kept.checkpoint.guest;
                (guest.session(), guest.title(), live.session.id)
            }));
        }
        // Those that had ended before this was looked at.
        let newer = self.kept.iter().map(|kept| &kept.checkpoint);
        for newer in newer.filter(|newer| newer.number().is_some_and(|number| number.0 > 0)) {
            let older = self.kept.iter().filter(|kept| kept.makes_room_for(newer));
            replaced.extend(older.map(|kept| {
                let guest = &kept.checkpoint.guest;
                (guest.session(), guest.title(), newer.session)
            }));
        }
        for (session, old, new) in replaced {
            let Some(kept) = self.take_kept(session) else {
                continue;
            };
            (self.context.events)(Event::Replaced { old, new });
            let services = self.context.services.clone();
            self.in_background(WorkKind::Release, move || kept.release(&*services));
        }
    }
}

impl Kept {
    /// Whether the session is of the same guest beyond doubt, which was protected again after this checkpoint. One with disks stays, unless the
    /// newer one has all of them.
    fn is_replaced_by(&self, live: &Live, uptime: Duration) -> bool {
        let Some(newer) = live.session.checkpoint() else {
            return false;
        };
        if !self.checkpoint.disks.all().is_empty() {
            return self.makes_room_for(newer);
        }
        let is_older = self.checkpoint.age(uptime) > live.began.elapsed();
        is_older && self.may_go() && self.is_same_guest(newer)
    }

    /// Whether the disks of this checkpoint were copied beside it for the newer one, which waits for their bases.
    fn makes_room_for(&self, newer: &KeptCheckpoint) -> bool {
        let disks = &self.checkpoint.disks;
        let is_waited_for = !disks.all().is_empty() && disks.are_followed_by(&newer.disks);
        is_waited_for && self.may_go() && self.is_same_guest(newer)
    }

    /// Whether nobody has begun to resume it, and its guest is not one that may exist nowhere else.
    fn may_go(&self) -> bool {
        !self.is_only_copy && self.checkpoint.promotion().is_here()
    }

    fn is_same_guest(&self, newer: &KeptCheckpoint) -> bool {
        self.checkpoint.guest.is_same_guest(&newer.guest) && self.checkpoint.is_of_same_machine(newer)
    }
}
