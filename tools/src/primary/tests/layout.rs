//! Whether device state has the sections that its vmdesc describes (spec §11.2).

use colo_ring::wire::stream::{SECTION_EOF, Section, parse_footer};
use serde::Deserialize;

/// A device, a field or a subsection of a vmdesc.
#[derive(Debug, Deserialize)]
struct Node {
    name: Option<String>,
    vmsd_name: Option<String>,
    instance_id: Option<i64>,
    #[serde(default)]
    size: usize,
    array_len: Option<usize>,
    fields: Option<Vec<Node>>,
    #[serde(default)]
    subsections: Vec<Node>,
}

impl Node {
    fn body_len(&self) -> usize {
        let of_field = |field: &Node| field.size * field.array_len.unwrap_or(1);
        let fields = self.fields.as_ref();
        let fields = fields.map_or(self.size, |fields| fields.iter().map(of_field).sum());
        fields + self.subsections.iter().map(Node::subsection_len).sum::<usize>()
    }

    /// Type byte, str8 name, be32 version, body.
    fn subsection_len(&self) -> usize {
        1 + 1 + self.vmsd_name.as_ref().map_or(0, String::len) + 4 + self.body_len()
    }
}

/// The sections that a vmdesc describes.
#[derive(Debug, Deserialize)]
pub(in crate::primary) struct Layout {
    devices: Vec<Node>,
}

impl Layout {
    pub(in crate::primary) fn parse(vmdesc: &[u8]) -> Self {
        serde_json::from_slice(vmdesc).unwrap()
    }

    pub(in crate::primary) fn sections(&self) -> usize {
        self.devices.len()
    }

    /// Checks a device state, initial or of a checkpoint, from its first section to its EOF byte.
    pub(in crate::primary) fn check(&self, state: &[u8]) {
        let mut at = 0;
        for device in &self.devices {
            let (section, length) = Section::parse(&state[at..]).unwrap().unwrap();
            let Section::Full {
                id, idstr, instance, ..
            } = section
            else {
                panic!("{section:?} at byte {at}");
            };
            assert_eq!(Some(&*String::from_utf8_lossy(idstr)), device.name.as_deref());
            assert_eq!(Some(i64::from(instance)), device.instance_id);
            at += length + device.body_len();
            let ((), length) = parse_footer(&state[at..], id).unwrap().unwrap();
            at += length;
        }
        assert_eq!(state[at..], [SECTION_EOF]);
    }
}
