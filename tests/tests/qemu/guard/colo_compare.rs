//! A guest under QEMU's own COLO: a QEMU secondary that runs the guest, too, and colo-compare, which releases what both send alike.

use super::scene::{Way, machine};
use colo_ring_tests::HANG_LIMIT;
use colo_ring_tests::lab::{Address, Lab, LabError, Machine, Nic, Protection, Qemu, Transport};
use serde_json::{Value, json};

/// The longest time between its checkpoints.
const INTERVAL_MS: u32 = 2000;

/// Primary and secondary.
pub(super) struct ComparedGuest {
    pub(super) primary: Qemu,
    _secondary: Qemu,
}

impl ComparedGuest {
    /// Starts both, and waits until they are in COLO. The secondary is behind the tap device of
    /// [`colo_ring_tests::lab::add_other_tap`].
    pub(super) fn start(lab: &Lab, number: u32) -> Result<Self, LabError> {
        let mut primary = Qemu::start(
            lab,
            &format!("compared{number}"),
            &machine(lab, Way::None, number),
        )?;
        primary.wait_serial("listening", HANG_LIMIT)?;
        let of_secondary = Machine {
            nic: Some(Nic::OtherTap),
            ..machine(lab, Way::None, number)
        };
        let mut secondary = Qemu::start_incoming(lab, &format!("secondary{number}"), &of_secondary)?;
        let path = |name: &str| lab.file(&format!("{name}-{number}.sock")).display().to_string();
        add_chardevs(&mut primary, &path)?;
        // With the header that virtio has before each frame.
        let add = |qemu: &mut Qemu, kind: &str, id: &str, more: Value| {
            let mut object = json!({"qom-type": kind, "id": id, "vnet_hdr_support": true});
            object
                .as_object_mut()
                .expect("an object")
                .extend(more.as_object().cloned().unwrap_or_default());
            qemu.qmp().execute("object-add", &object).map(drop)
        };
        let at_net =
            |queue: &str, more: (&str, &str)| json!({"netdev": "net0", "queue": queue, more.0: more.1});
        add(
            &mut primary,
            "filter-mirror",
            "mirror",
            at_net("tx", ("outdev", "mirror")),
        )?;
        add(
            &mut primary,
            "filter-redirector",
            "in",
            at_net("rx", ("indev", "out")),
        )?;
        add(
            &mut primary,
            "filter-redirector",
            "out",
            at_net("rx", ("outdev", "own")),
        )?;
        primary
            .qmp()
            .execute("object-add", &json!({"qom-type": "iothread", "id": "thread"}))?;
        let compared = json!({
            "primary_in": "own-end", "secondary_in": "other", "outdev": "out-end", "iothread": "thread",
        });
        add(&mut primary, "colo-compare", "compare", compared)?;
        for (id, at) in [("mirror", "mirror"), ("other", "other")] {
            add_socket(&mut secondary, id, &path(at), false)?;
        }
        add(
            &mut secondary,
            "filter-redirector",
            "in",
            at_net("tx", ("indev", "mirror")),
        )?;
        add(
            &mut secondary,
            "filter-redirector",
            "out",
            at_net("rx", ("outdev", "other")),
        )?;
        add(
            &mut secondary,
            "filter-rewriter",
            "rewriter",
            json!({"netdev": "net0", "queue": "all"}),
        )?;
        let address = Address::free(lab, Transport::Unix)?;
        secondary.be_secondary(&address, 0)?;
        primary.protect(&address, &Protection::every_ms(INTERVAL_MS, 0))?;
        Ok(Self {
            primary,
            _secondary: secondary,
        })
    }
}

fn add_chardevs(primary: &mut Qemu, path: &impl Fn(&str) -> String) -> Result<(), LabError> {
    for name in ["mirror", "other", "own", "out"] {
        add_socket(primary, name, &path(name), true)?;
    }
    add_socket(primary, "own-end", &path("own"), false)?;
    add_socket(primary, "out-end", &path("out"), false)
}

fn add_socket(qemu: &mut Qemu, id: &str, path: &str, listens: bool) -> Result<(), LabError> {
    let mut data = json!({"addr": {"type": "unix", "data": {"path": path}}, "server": listens});
    if listens {
        data["wait"] = false.into();
    }
    let backend = json!({"type": "socket", "data": data});
    qemu.qmp()
        .execute("chardev-add", &json!({"id": id, "backend": backend}))?;
    Ok(())
}
