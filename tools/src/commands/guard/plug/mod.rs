//! A gate in the kernel: what a guest sends on a tap device is redirected to an ifb device, whose plug queue holds it.
//!
//! It needs nothing of QEMU, so it also fits cards with vhost and with several queues. A line is drawn by one message to the kernel, and what
//! is before it is let go by another, while the guest runs.
//!
//! **The kernel counts frames without a lock.** A frame that comes while a line is drawn, or a release during the one before, could make it
//! count wrong, and let go of a frame too early. So a line is drawn only while the guest is stopped and when the release before has left
//! whole, which the byte counts of the queue show; they also show whether a frame came meanwhile. Then the gate fails, and is
//! opened by the end of the protection.
//!
//! **It outlives its guard.** What it holds stays held. An object in QEMU with the number of the ifb tells the next guard that the plug was
//! put before this very QEMU, and not before an earlier one whose frames nobody may see any more.

mod frames;
mod kernel;
mod lines;
mod netlink;

use super::gate::{Counts, GateError, HoldTimes, OutputGate};
use super::nics;
use crate::output::tell;
use crate::qmp::{Qmp, QmpError};
use colo_ring::units::CheckpointId;
use frames::Frames;
pub(super) use kernel::PlugError;
use kernel::{Action, Interface, Kernel, Statistics};
use lines::Line;
use nix::errno::Errno;
use nix::poll::PollFlags;
use serde_json::json;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

/// How long QEMU may take for its object.
const QMP_LIMIT: Duration = Duration::from_secs(5);

/// How long it is waited for after a release. The next line waits for what is late.
const RELEASE_LIMIT: Duration = Duration::from_millis(100);

/// How long what was let go may take to leave. It is on its way to the host's own network stack.
const LEAVE_LIMIT: Duration = Duration::from_secs(5);

/// How long a QEMU that ends may take to close its tap device after its monitor.
const EXIT_LIMIT: Duration = Duration::from_secs(2);

/// How often it is looked whether it has.
const LOOK: Duration = Duration::from_micros(50);

/// How old what the gate shows of its queue may be, beyond the guard's own looks.
const STATISTICS_AGE: Duration = Duration::from_secs(1);

/// The name of an ifb is that, and the number of its tap device.
const IFB: &str = "colo-";

/// The name of the object in QEMU is that, and the number of the ifb.
const OBJECT: &str = "colo-ring-plug-";

fn ifb_name(tap: &Interface) -> String {
    format!("{IFB}{}", tap.index)
}

/// The tap device of that name.
fn tap_device(kernel: &mut Kernel, name: &str) -> Result<Interface, PlugError> {
    let tap = kernel.interface(name)?;
    let tap = tap.ok_or_else(|| PlugError::NoInterface(name.to_owned()))?;
    match tap.kind.as_deref() {
        Some("tun") => Ok(tap),
        _ => Err(PlugError::NoTap(name.to_owned())),
    }
}

/// Whether a plug could be put before that tap device. It makes all that it is made of, apart from the device, and removes it.
///
/// # Errors
/// With what is missing.
pub(super) fn check(tap: &str) -> Result<(), PlugError> {
    let mut kernel = Kernel::connect()?;
    let tap = tap_device(&mut kernel, tap)?;
    Frames::watch(tap.index).map_err(packet_socket)?;
    let name = format!("{IFB}try{}", tap.index);
    // Of a guard that was killed here.
    if let Some(left) = kernel.interface(&name)? {
        kernel.delete(left.index);
    }
    let ifb = kernel.make(&name, u32::MAX)?;
    let redirected = kernel.redirect(&ifb, ifb.index);
    kernel.delete(ifb.index);
    redirected
}

fn packet_socket(errno: Errno) -> PlugError {
    match errno {
        Errno::EPERM => PlugError::NotAllowed,
        errno => PlugError::Failed {
            what: "open a packet socket".to_owned(),
            errno,
        },
    }
}

/// A tap device and the ifb that a guard has left before it.
fn left(kernel: &mut Kernel, tap: &str) -> Result<Option<(Interface, Interface)>, PlugError> {
    let Some(tap) = kernel.interface(tap)? else {
        return Ok(None);
    };
    let ifb = kernel.interface(&ifb_name(&tap))?;
    Ok(ifb.map(|ifb| (tap, ifb)))
}

/// Removes a plug that a guard has left before that tap device: what it holds is dropped, because another QEMU may have sent it.
/// Returns how many frames those were, if there was a plug.
pub(super) fn remove_left(tap: &str) -> Result<Option<u64>, PlugError> {
    let mut kernel = Kernel::connect()?;
    let Some((tap, ifb)) = left(&mut kernel, tap)? else {
        return Ok(None);
    };
    let held = kernel.statistics(ifb.index).map_or(0, |now| now.frames);
    remove(&mut kernel, tap.index, ifb.index);
    match kernel.interface_at(ifb.index)? {
        None => Ok(Some(held)),
        Some(_) => Err(PlugError::NotAllowed),
    }
}

/// The plug that a guard has left before that tap device, if it was put before this QEMU, which is protected already (`holds`). Any other is
/// removed: what it holds leaves if it is this QEMU's, whose output nobody holds any more.
fn find_own(
    kernel: &mut Kernel,
    qmp: &mut Qmp,
    tap: &str,
    holds: bool,
) -> Result<Option<Interface>, PlugError> {
    let Some((device, ifb)) = left(kernel, tap)? else {
        return Ok(None);
    };
    // Not knowing is no reason to drop what it holds.
    let own = objects(qmp).map_err(|error| PlugError::Marker(error.to_string()))?;
    match own.contains(&ifb.index) {
        true if holds => return Ok(Some(ifb)),
        true => {
            let opened = let_go(kernel, device.index, ifb.index);
            opened.map_err(|error| kernel::failed("open the plug of an earlier guard".to_owned(), &error))?;
            return Ok(None);
        }
        false => {}
    }
    let dropped = remove_left(tap)?.unwrap_or_default();
    tell(&format!(
        "warning: a plug of an earlier guard was left before {tap} and is removed; the {dropped} frames that it held are dropped, as \
         nobody knows whether they are committed"
    ));
    Ok(None)
}

/// Frames that come from now on pass as if it had never been there; those that it holds are dropped.
fn remove(kernel: &mut Kernel, tap: u32, ifb: u32) {
    kernel.stop_redirect(tap);
    kernel.delete(ifb);
}

/// Waits until an open plug has let go of everything.
fn drain(kernel: &mut Kernel, ifb: u32) {
    let deadline = Instant::now() + LEAVE_LIMIT;
    while kernel.statistics(ifb).is_ok_and(|now| now.frames > 0) && Instant::now() < deadline {
        std::thread::sleep(LOOK);
    }
}

/// Removes a plug once everything has left that it holds.
fn let_go(kernel: &mut Kernel, tap: u32, ifb: u32) -> io::Result<()> {
    kernel.act(ifb, Action::ReleaseIndefinite)?;
    drain(kernel, ifb);
    remove(kernel, tap, ifb);
    Ok(())
}

/// Removes every plug that a guard has left before that QEMU: what they hold is released. Plugs that were left before its tap devices by
/// the guard of another QEMU are removed, too, with what they hold. Returns how many network cards had one.
///
/// # Errors
/// If QEMU does not answer, or this process may not.
pub(crate) fn remove_all(qmp: &mut Qmp) -> Result<usize, RemoveError> {
    let mut kernel = Kernel::connect()?;
    let mut count = 0;
    for index in objects(qmp)? {
        let ifb = kernel.interface_at(index)?;
        let tap = ifb.and_then(|ifb| ifb.name.strip_prefix(IFB)?.parse().ok());
        if let Some(tap) = tap {
            let_go(&mut kernel, tap, index)?;
            count += 1;
        }
        qmp.execute("object-del", &json!({"id": format!("{OBJECT}{index}")}))?;
    }
    let nics = nics::list(qmp)?;
    for tap in nics.iter().filter_map(|nic| nic.interface.as_deref()) {
        count += usize::from(remove_left(tap)?.is_some());
    }
    Ok(count)
}

/// What a dead guard has left cannot be removed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RemoveError {
    #[error(transparent)]
    Qmp(#[from] QmpError),
    #[error(transparent)]
    Plug(#[from] PlugError),
    #[error("cannot open a plug: {0}")]
    Open(#[from] io::Error),
}

/// The numbers of the ifb devices that were put before this QEMU.
fn objects(qmp: &mut Qmp) -> Result<Vec<u32>, QmpError> {
    let names = qmp.objects()?;
    let numbers = names
        .iter()
        .filter_map(|name| name.strip_prefix(OBJECT)?.parse().ok());
    Ok(numbers.collect())
}

/// See the module.
pub(super) struct Plug {
    nic: String,
    qmp: Qmp,
    kernel: Kernel,
    tap: u32,
    ifb: u32,
    frames: Frames,
    is_holding: bool,
    line: Line,
    /// Bytes that the queue had taken when the line was drawn.
    line_bytes: u64,
    /// Bytes that will have left when the last release has; unknown while it is open, and after another guard.
    leaving_bytes: Option<u64>,
    since_line: u64,
    sent: u64,
    times: HoldTimes,
    last: Statistics,
    /// When they were read.
    read_at: Instant,
}

impl Plug {
    /// Puts a plug before a tap device: frames pass, unless the guest is protected already and its output `holds`. One that was left
    /// before this QEMU goes on to hold what it has, then; any other that was left there is removed.
    ///
    /// # Errors
    /// With what is missing. Nothing is left then.
    pub(super) fn make(
        qmp: &Qmp,
        nic: String,
        tap: &str,
        limit_bytes: u32,
        holds: bool,
    ) -> Result<Self, PlugError> {
        let (mut kernel, mut qmp) = (Kernel::connect()?, qmp.clone());
        let tap = tap_device(&mut kernel, tap)?;
        let frames = Frames::watch(tap.index).map_err(packet_socket)?;
        let found = find_own(&mut kernel, &mut qmp, &tap.name, holds)?;
        let is_found = found.is_some();
        let ifb = match found {
            Some(ifb) => ifb,
            None => kernel.make(&ifb_name(&tap), limit_bytes)?,
        };
        let mut plug = Self {
            nic,
            qmp,
            kernel,
            tap: tap.index,
            ifb: ifb.index,
            frames,
            is_holding: holds,
            line: if holds { Line::Forgotten } else { Line::None },
            line_bytes: 0,
            leaving_bytes: None,
            since_line: 0,
            sent: 0,
            times: HoldTimes::default(),
            last: Statistics::default(),
            read_at: Instant::now(),
        };
        match is_found {
            true => plug.take_over(limit_bytes),
            // Dropped when it fails, and so removed.
            false => plug.begin(&tap, holds),
        }?;
        Ok(plug)
    }

    /// Sends the tap device's frames through a new plug.
    fn begin(&mut self, tap: &Interface, holds: bool) -> Result<(), PlugError> {
        // If it fails, the plug is not there for the card.
        self.is_holding = false;
        let object = json!({"qom-type": "secret", "id": self.object(), "data": ""});
        let marked = self.qmp.execute_within("object-add", &object, QMP_LIMIT);
        marked.map_err(|error| PlugError::Marker(error.to_string()))?;
        if !holds {
            self.act(Action::ReleaseIndefinite)?;
        }
        self.kernel.redirect(tap, self.ifb)?;
        self.is_holding = holds;
        Ok(())
    }

    /// Goes on with a plug that was found.
    fn take_over(&mut self, limit_bytes: u32) -> Result<(), PlugError> {
        self.act(Action::Limit(limit_bytes))?;
        let found = self.kernel.statistics(self.ifb);
        self.last = found.map_err(|error| kernel::failed("read the plug's statistics".to_owned(), &error))?;
        self.since_line = self.last.frames;
        tell(&format!(
            "{}: goes on with the plug of an earlier guard, which holds {} frames",
            self.nic, self.last.frames
        ));
        Ok(())
    }

    fn act(&mut self, action: Action) -> Result<(), PlugError> {
        let done = self.kernel.act(self.ifb, action);
        done.map_err(|error| kernel::failed(format!("set the plug to {action:?}"), &error))
    }

    fn object(&self) -> String {
        format!("{OBJECT}{}", self.ifb)
    }

    fn count_frames(&mut self) -> Result<(), GateError> {
        let count = self.frames.take().map_err(|errno| self.failed(errno.into()))?;
        self.sent += count;
        if self.is_holding {
            self.since_line += count;
            self.times.came(count);
        }
        Ok(())
    }

    fn statistics(&mut self) -> Result<Statistics, GateError> {
        self.last = self
            .kernel
            .statistics(self.ifb)
            .map_err(|error| self.failed(error))?;
        self.read_at = Instant::now();
        Ok(self.last)
    }

    /// Waits until everything has left that may, and nothing moves.
    fn settle(&mut self) -> Result<Statistics, GateError> {
        let deadline = Instant::now() + LEAVE_LIMIT;
        let mut before = self.statistics()?;
        loop {
            let now = self.statistics()?;
            let is_left = match self.leaving_bytes {
                _ if !self.is_holding => now.frames == 0,
                Some(bytes) if now.left_bytes > bytes => {
                    return Err(self.miscounted("let go of frames too early"));
                }
                Some(bytes) => now.left_bytes == bytes,
                None => true,
            };
            if is_left && now == before {
                return Ok(now);
            }
            if Instant::now() > deadline {
                return Err(self.miscounted("has not let go of what it was to"));
            }
            before = now;
            std::thread::sleep(LOOK);
        }
    }

    /// Gives what was let go the time to leave: QEMU may be ended next, and its tap device with it.
    fn wait_released(&mut self) -> Result<(), GateError> {
        let deadline = Instant::now() + RELEASE_LIMIT;
        let leaving_bytes = self.leaving_bytes.unwrap_or_default();
        while self.statistics()?.left_bytes < leaving_bytes && Instant::now() < deadline {
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    fn miscounted(&self, how: &str) -> GateError {
        let what =
            format!("the kernel's plug {how}; was its ifb device set down, or another frame sent to it?");
        self.failed(io::Error::other(what))
    }

    /// The guest is stopped: draws a line.
    fn draw(&mut self) -> Result<(), GateError> {
        let before = self.settle()?;
        if before.taken_bytes() < self.line_bytes {
            return Err(self.miscounted("has lost frames"));
        }
        self.tell(Action::Buffer)?;
        self.is_holding = true;
        self.leaving_bytes.get_or_insert(before.left_bytes);
        let after = self.statistics()?;
        if after.taken_bytes() != before.taken_bytes() {
            return Err(self.miscounted("was given a frame while the guest stood"));
        }
        (self.line_bytes, self.since_line) = (after.taken_bytes(), 0);
        self.times.line();
        Ok(())
    }

    fn tell(&mut self, action: Action) -> Result<(), GateError> {
        let done = self.kernel.act(self.ifb, action);
        done.map_err(|error| self.failed(error))
    }

    fn failed(&self, source: io::Error) -> GateError {
        GateError::Io {
            nic: self.nic.clone(),
            source,
        }
    }

    /// Whether QEMU has ended: a monitor may have been closed alone. The tap device has gone, or no process has it.
    fn has_qemu_ended(&mut self) -> bool {
        if !self.qmp.is_closed() {
            return false;
        }
        let deadline = Instant::now() + EXIT_LIMIT;
        while (self.kernel.interface_at(self.tap)).is_ok_and(|tap| tap.is_some_and(|tap| tap.has_carrier)) {
            if Instant::now() > deadline {
                return false;
            }
            std::thread::sleep(LOOK);
        }
        true
    }
}

impl OutputGate for Plug {
    fn nic(&self) -> &str {
        &self.nic
    }

    fn kind(&self) -> &'static str {
        "plug"
    }

    fn wait_for<'a>(&'a self, fds: &mut Vec<(BorrowedFd<'a>, PollFlags)>) {
        fds.push((self.frames.as_fd(), PollFlags::POLLIN));
    }

    fn go_on(&mut self) -> Result<(), GateError> {
        self.count_frames()?;
        self.count()
    }

    fn count(&mut self) -> Result<(), GateError> {
        match self.read_at.elapsed() < STATISTICS_AGE {
            true => Ok(()),
            false => self.statistics().map(drop),
        }
    }

    fn place(&mut self, checkpoint: CheckpointId) -> Result<(), GateError> {
        self.count_frames()?;
        match self.line.place(checkpoint) {
            true => self.draw(),
            false => Ok(()),
        }
    }

    fn committed(&mut self, checkpoint: CheckpointId) -> Result<(), GateError> {
        if !self.line.is_released_by(checkpoint) {
            return Ok(());
        }
        self.tell(Action::ReleaseOne)?;
        self.line = Line::None;
        self.times.left();
        // Where the line is another guard's, it is not known what is before it.
        self.leaving_bytes = self.leaving_bytes.map(|_| self.line_bytes);
        self.wait_released()
    }

    fn forget_barriers(&mut self) {
        self.line.forget();
    }

    fn open(&mut self) -> Result<(), GateError> {
        self.tell(Action::ReleaseIndefinite)?;
        (self.is_holding, self.line, self.leaving_bytes) = (false, Line::None, None);
        (self.line_bytes, self.since_line) = (0, 0);
        self.times.forget();
        self.statistics().map(drop)
    }

    fn recover(&mut self) -> Result<(), GateError> {
        // Its devices may be gone, and are not made again.
        self.statistics().map(drop)
    }

    fn waiting(&self) -> u64 {
        self.since_line
    }

    fn counts(&self) -> Counts {
        Counts {
            sent: self.sent,
            held: self.last.frames,
            held_bytes: self.last.waiting_bytes,
            dropped: self.last.dropped,
        }
    }

    fn take_hold_times_us(&mut self, into: &mut Vec<u64>) {
        self.times.take_us(into);
    }
}

impl Drop for Plug {
    fn drop(&mut self) {
        // A guard that could not end the protection leaves output held. A QEMU that has ended sends nothing more, and what it has sent is not
        // committed; the next one may have the same tap device.
        if self.is_holding && !self.has_qemu_ended() {
            return;
        }
        if !self.is_holding {
            drain(&mut self.kernel, self.ifb);
        }
        remove(&mut self.kernel, self.tap, self.ifb);
        let object = json!({"id": self.object()});
        // It may have ended.
        let _ = self.qmp.execute_within("object-del", &object, QMP_LIMIT);
    }
}
