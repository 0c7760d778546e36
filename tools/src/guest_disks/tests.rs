//! Disks as a real QEMU 11.1 lists them.

use super::*;
use crate::qmp::tests::{Responder, monitor};
use std::time::Duration;

fn entry(device: &str, qdev: &str, node: &str, read_only: bool) -> Value {
    json!({
        "device": device, "qdev": qdev, "type": "unknown",
        "inserted": {"node-name": node, "ro": read_only, "file": "d.raw", "image": {"virtual-size": 4096}},
    })
}

#[test]
fn a_disk_is_called_by_its_drive_its_device_or_its_node() {
    let cases = [
        (
            entry(
                "virtio0",
                "/machine/peripheral-anon/device[3]/virtio-backend",
                "#block134",
                false,
            ),
            "virtio0",
        ),
        (
            entry(
                "rodisk",
                "/machine/peripheral/vro/virtio-backend",
                "#block374",
                true,
            ),
            "rodisk",
        ),
        (entry("", "sdx", "n2", false), "sdx"),
        (
            entry("", "/machine/peripheral/vro/virtio-backend", "n3", false),
            "vro",
        ),
        (entry("", "/machine/peripheral-anon/device[1]", "n4", false), "n4"),
        (
            entry("", "/machine/peripheral-anon/device[1]", "#block9", false),
            "disk7",
        ),
    ];
    for (listed, name) in cases {
        let disk = parse(7, &listed, false).unwrap();
        assert_eq!(disk.name, name);
        assert!(disk.is_called(name) && disk.is_called(&disk.node) && !disk.is_called("other"));
        assert_eq!(disk.bytes, 4096);
    }
    let empty = json!({"device": "cd0", "qdev": "/machine/peripheral-anon/device[2]", "removable": true});
    assert_eq!(parse(0, &empty, false), None);
}

#[test]
fn disks_are_told_apart_by_what_the_guest_can_do_to_them() {
    let respond: Responder = Box::new(|command, arguments| match command {
        "query-block" => Ok(json!([
            entry("vda", "/machine/peripheral/d0/virtio-backend", "n0", false),
            entry("", "iso", "n1", true),
            entry("pflash1", "/machine/system.flash1", "n2", false),
            // No device has it.
            {"device": "spare", "inserted": {"node-name": "n3", "image": {"virtual-size": 4096}}},
        ])),
        "qom-get" if arguments["path"] == "/machine/system.flash1" => Ok(json!("cfi.pflash01")),
        "qom-get" => Err("Device not found".to_owned()),
        other => Err(format!("{other}: not now")),
    });
    let path = monitor((11, 1, 3), respond);
    let mut qmp = Qmp::connect(&path.0, Duration::from_secs(300)).unwrap();
    let uses: Vec<_> = (list(&mut qmp).unwrap().into_iter())
        .map(|disk| (disk.name, disk.usage))
        .collect();
    let expected = [
        ("vda", DiskUse::Writable),
        ("iso", DiskUse::ReadOnly),
        ("pflash1", DiskUse::Flash),
    ];
    assert_eq!(uses, expected.map(|(name, usage)| (name.to_owned(), usage)));
}
