//! A guest that is protected again: the checkpoint that was kept of it before is given up, once its new session has one that is
//! certain. Until then it is the only one; from then on its memory would be held twice, and what it has is older than what the guest has done since.

use super::state::{ControlState, Kept, Live};
use crate::receiver::Event;
use crate::receiver::background::WorkKind;
use crate::receiver::guest::SessionTitle;
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
    /// Whether the session is of the same guest beyond doubt, which was protected again after this checkpoint, and nobody has begun to
    /// resume it, and the guest is not one that may exist nowhere else. One with disks stays: while it is kept no other session can have
    /// them, so that what is newer is without.
    fn is_replaced_by(&self, live: &Live, uptime: Duration) -> bool {
        let has_disks = !self.checkpoint.disks.all().is_empty();
        let may_go = !self.is_only_copy && !has_disks && self.checkpoint.promotion().is_here();
        let is_older = self.checkpoint.age(uptime) > live.began.elapsed();
        let is_same_machine = || {
            let newer = live.session.checkpoint();
            newer.is_some_and(|newer| self.checkpoint.is_of_same_machine(newer))
        };
        may_go && is_older && self.checkpoint.guest.is_same_guest(&live.session.guest) && is_same_machine()
    }
}
