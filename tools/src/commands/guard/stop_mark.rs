//! What a guard with `--on-receiver-lost stop` leaves in QEMU, so that the next one knows its guest: objects that do nothing.
//!
//! One says that the guest may only run where it is protected, from its first protection on; the other, that it stands because it is not. The
//! second comes before the stop, in the same piece: a guest that stands without it was stopped by someone else.

use crate::qmp::{Qmp, QmpError};
use serde_json::{Value, json};
use std::time::Duration;

/// The guest may only run where it is protected.
const STOPS: &str = "colo-ring-stop-when-lost";

/// It was stopped because it is not.
const STOPPED: &str = "colo-ring-stopped";

/// How long QEMU may take for them.
const LIMIT: Duration = Duration::from_secs(5);

/// What is left of an earlier guard.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct StopMarks {
    /// The guest may only run where it is protected.
    pub(crate) stops: bool,
    /// It was stopped because it is not.
    pub(crate) stopped: bool,
}

impl StopMarks {
    /// Looks for them.
    ///
    /// # Errors
    /// If QEMU does not answer.
    pub(crate) fn find(qmp: &mut Qmp) -> Result<Self, QmpError> {
        let objects = qmp.objects()?;
        let has = |id: &str| objects.iter().any(|name| name == id);
        Ok(Self {
            stops: has(STOPS),
            stopped: has(STOPPED),
        })
    }

    /// Makes them those of a guest that runs, and that a guard stops when it loses its receiver, or does not.
    ///
    /// # Errors
    /// If QEMU does not answer, or refuses.
    pub(crate) fn set_running(qmp: &mut Qmp, stops: bool) -> Result<(), QmpError> {
        let now = Self::find(qmp)?;
        let mut changes = Vec::new();
        match (now.stops, stops) {
            (false, true) => changes.push(add(STOPS)),
            (true, false) => changes.push(delete(STOPS)),
            _ => {}
        }
        if now.stopped {
            changes.push(delete(STOPPED));
        }
        match changes.is_empty() {
            true => Ok(()),
            false => qmp.execute_together(&changes, LIMIT),
        }
    }
}

/// Stops the guest until it is protected again.
///
/// # Errors
/// If QEMU does not answer, or refuses.
pub(crate) fn stop(qmp: &mut Qmp) -> Result<(), QmpError> {
    let now = StopMarks::find(qmp)?;
    let mut commands = Vec::new();
    if !now.stops {
        commands.push(add(STOPS));
    }
    if !now.stopped {
        commands.push(add(STOPPED));
    }
    commands.push(("stop", json!({})));
    qmp.execute_together(&commands, LIMIT)
}

/// Lets a guest run that was stopped because it was not protected, and removes the marks. Whether there was one.
///
/// # Errors
/// If QEMU does not answer, or refuses.
pub(crate) fn run_on(qmp: &mut Qmp) -> Result<bool, QmpError> {
    let StopMarks { stopped, .. } = StopMarks::find(qmp)?;
    if stopped {
        qmp.execute("cont", &json!({}))?;
    }
    StopMarks::set_running(qmp, false)?;
    Ok(stopped)
}

fn add(id: &str) -> (&'static str, Value) {
    ("object-add", json!({"qom-type": "secret", "id": id, "data": ""}))
}

fn delete(id: &str) -> (&'static str, Value) {
    ("object-del", json!({"id": id}))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qmp::tests::{Responder, SocketPath, monitor};
    use std::collections::BTreeSet;
    use std::sync::{Arc, Mutex};

    /// A QEMU: its objects, and whether its guest runs.
    type Shared = Arc<Mutex<(BTreeSet<String>, bool)>>;

    fn qemu() -> (Shared, SocketPath) {
        let qemu: Shared = Arc::new(Mutex::new((BTreeSet::new(), true)));
        let of_monitor = qemu.clone();
        let respond: Responder = Box::new(move |command, arguments| {
            let mut qemu = of_monitor.lock().unwrap();
            let id = arguments["id"].as_str().unwrap_or_default();
            match command {
                "qom-list" => {
                    let objects: Vec<_> = qemu.0.iter().map(|name| json!({"name": name})).collect();
                    return Ok(json!(objects));
                }
                "object-add" if !qemu.0.insert(id.to_owned()) => return Err("there already".to_owned()),
                "object-del" if !qemu.0.remove(id) => return Err("not there".to_owned()),
                "stop" => qemu.1 = false,
                "cont" => qemu.1 = true,
                _ => {}
            }
            Ok(json!({}))
        });
        (qemu, monitor((11, 1, 3), respond))
    }

    #[test]
    fn a_guest_that_was_stopped_is_known_as_such_and_no_other_is() {
        let (shared, path) = qemu();
        let mut qmp = Qmp::connect(&path.0, LIMIT).unwrap();
        let found = |qmp: &mut Qmp| {
            let StopMarks { stops, stopped } = StopMarks::find(qmp).unwrap();
            (stops, stopped)
        };
        assert_eq!(found(&mut qmp), (false, false));
        for _ in 0..2 {
            StopMarks::set_running(&mut qmp, true).unwrap();
            assert_eq!(found(&mut qmp), (true, false));
        }
        for _ in 0..2 {
            stop(&mut qmp).unwrap();
            assert_eq!(found(&mut qmp), (true, true));
            assert!(!shared.lock().unwrap().1);
        }
        assert!(run_on(&mut qmp).unwrap());
        assert!(shared.lock().unwrap().1);
        assert_eq!(found(&mut qmp), (false, false));
        // Someone else's stop.
        StopMarks::set_running(&mut qmp, true).unwrap();
        shared.lock().unwrap().1 = false;
        assert!(!run_on(&mut qmp).unwrap());
        assert!(!shared.lock().unwrap().1);
        assert!(shared.lock().unwrap().0.is_empty());
    }
}
