//! Lengths of the device sections as the vmdesc describes them, to check a device state against (spec §11.2).
//!
//! The description can miscount (arrays of elements of differing size) and subsections come and go between
//! checkpoints, so a mismatch is a warning and never a reason to refuse.

use super::json;
use crate::wire::limits::VMDESC_DEVICES_MAX;
use crate::wire::stream::{Section, parse_footer};
use serde::de::{Deserialize, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use std::fmt;
use std::marker::PhantomData;
use thiserror::Error;

/// Why a device state is not as described.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum LayoutMismatch {
    /// The vmdesc cannot be read as a list of devices.
    #[error("the vmdesc describes no device layout: {0}")]
    Unreadable(String),
    /// The state differs from the description.
    #[error("at byte {at} of the device state: {seen}, where the vmdesc has {expected}")]
    Differs {
        /// Position in the device state.
        at: usize,
        /// What stands there.
        seen: String,
        /// What was described.
        expected: String,
    },
}

/// The described sections, in the order of the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    devices: Vec<Device>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Device {
    name: Box<str>,
    instance: u32,
    body_len: u64,
}

impl Layout {
    /// Reads a vmdesc's text.
    ///
    /// # Errors
    /// If it holds no readable list of devices, or one of more than [`VMDESC_DEVICES_MAX`].
    pub fn parse(vmdesc: &[u8]) -> Result<Self, LayoutMismatch> {
        let unreadable = |why: &str| LayoutMismatch::Unreadable(why.to_owned());
        let text = json::checked(vmdesc).ok_or_else(|| unreadable("not UTF-8, or nested too deeply"))?;
        let Described(devices) =
            serde_json::from_str(text).map_err(|error| unreadable(&error.to_string()))?;
        Ok(Self { devices })
    }

    /// Number of described sections.
    pub fn sections(&self) -> usize {
        self.devices.len()
    }

    /// Walks a device state, initial or of a checkpoint, from its first section to its EOF byte.
    ///
    /// # Errors
    /// At the first byte that differs from the description.
    pub fn walk(&self, state: &[u8]) -> Result<(), LayoutMismatch> {
        let mut at = 0;
        for device in &self.devices {
            at = device.walk(state, at)?;
        }
        if state.get(at) == Some(&0) && state.len() == at + 1 {
            return Ok(());
        }
        Err(LayoutMismatch::Differs {
            at,
            seen: format!("{} bytes follow", state.len() - at),
            expected: "the EOF byte, and the end".to_owned(),
        })
    }
}

impl Device {
    /// Walks the section at byte `at` and returns where the next one begins.
    fn walk(&self, state: &[u8], at: usize) -> Result<usize, LayoutMismatch> {
        let differs = |at: usize, seen: String| LayoutMismatch::Differs {
            at,
            seen,
            expected: format!("\"{}\" {} of {} bytes", self.name, self.instance, self.body_len),
        };
        let (id, body) = match Section::parse(&state[at..]) {
            Ok(Some((
                Section::Full {
                    id, idstr, instance, ..
                },
                length,
            ))) if idstr == self.name.as_bytes() && instance == self.instance => (id, at + length),
            other => return Err(differs(at, format!("{other:?}"))),
        };
        let footer = usize::try_from(self.body_len)
            .ok()
            .and_then(|length| body.checked_add(length))
            .filter(|&footer| footer <= state.len())
            .ok_or_else(|| differs(body, format!("{} bytes to the end", state.len() - body)))?;
        match parse_footer(&state[footer..], id) {
            Ok(Some(((), length))) => Ok(footer + length),
            Ok(None) => Err(differs(footer, "the end inside a footer".to_owned())),
            Err(error) => Err(differs(footer, error.to_string())),
        }
    }
}

/// The list of devices of a whole vmdesc.
struct Described(Vec<Device>);

impl<'de> Deserialize<'de> for Described {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(DescribedVisitor)
    }
}

struct DescribedVisitor;

impl<'de> Visitor<'de> for DescribedVisitor {
    type Value = Described;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a vmdesc")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Described, A::Error> {
        let mut devices = Vec::new();
        while let Some(key) = map.next_key::<String>()? {
            if key == "devices" {
                devices = map.next_value::<Devices>()?.0;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(Described(devices))
    }
}

struct Devices(Vec<Device>);

impl<'de> Deserialize<'de> for Devices {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(DevicesVisitor)
    }
}

struct DevicesVisitor;

impl<'de> Visitor<'de> for DevicesVisitor {
    type Value = Devices;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of devices")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Devices, A::Error> {
        let mut devices = Vec::new();
        while let Some(node) = seq.next_element::<Node>()? {
            if devices.len() == VMDESC_DEVICES_MAX {
                return Err(A::Error::custom("too many devices"));
            }
            devices.push(Device {
                body_len: node.body_len(),
                instance: node.instance,
                name: node.name.ok_or_else(|| A::Error::missing_field("name"))?,
            });
        }
        Ok(Devices(devices))
    }
}

/// A device, a field or a subsection: what matters of each has the same keys. Of a key given twice the last counts.
#[derive(Default)]
struct Node {
    name: Option<Box<str>>,
    instance: u32,
    /// Bytes of one element of a field; of the whole body of an old-style device.
    size: u64,
    array_len: Option<u64>,
    /// Sum over the fields, if there are any listed.
    fields: Option<u64>,
    /// Sum over the subsections, heads included.
    subsections: u64,
    vmsd_name_len: u64,
}

impl Node {
    fn body_len(&self) -> u64 {
        self.fields.unwrap_or(self.size).saturating_add(self.subsections)
    }

    fn field_len(&self) -> u64 {
        self.size.saturating_mul(self.array_len.unwrap_or(1))
    }

    /// Type byte, str8 name, be32 version, body.
    fn subsection_len(&self) -> u64 {
        self.body_len().saturating_add(1 + 1 + self.vmsd_name_len + 4)
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(NodeVisitor)
    }
}

struct NodeVisitor;

impl<'de> Visitor<'de> for NodeVisitor {
    type Value = Node;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a device, a field or a subsection")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Node, A::Error> {
        let mut node = Node::default();
        while let Some(key) = map.next_key::<String>()? {
            match &*key {
                "name" => node.name = Some(map.next_value()?),
                "instance_id" => node.instance = instance(map.next_value()?).map_err(A::Error::custom)?,
                "size" => node.size = map.next_value()?,
                "array_len" => node.array_len = Some(map.next_value()?),
                "vmsd_name" => node.vmsd_name_len = map.next_value::<String>()?.len() as u64,
                "fields" => node.fields = Some(map.next_value::<Sum<Field>>()?.total),
                "subsections" => node.subsections = map.next_value::<Sum<Subsection>>()?.total,
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(node)
    }
}

/// The vmdesc writes 0xffffffff as -1.
fn instance(number: i64) -> Result<u32, &'static str> {
    match number {
        -1 => Ok(u32::MAX),
        number => u32::try_from(number).map_err(|_| "an instance_id of more than 32 bits"),
    }
}

trait Length {
    fn of(node: &Node) -> u64;
}

struct Field;

impl Length for Field {
    fn of(node: &Node) -> u64 {
        node.field_len()
    }
}

struct Subsection;

impl Length for Subsection {
    fn of(node: &Node) -> u64 {
        node.subsection_len()
    }
}

/// Adds up the lengths of a list without keeping it.
struct Sum<L> {
    total: u64,
    of: PhantomData<L>,
}

impl<'de, L: Length> Deserialize<'de> for Sum<L> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(Sum {
            total: 0,
            of: PhantomData,
        })
    }
}

impl<'de, L: Length> Visitor<'de> for Sum<L> {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of fields or subsections")
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut seq: A) -> Result<Self, A::Error> {
        while let Some(node) = seq.next_element::<Node>()? {
            self.total = self.total.saturating_add(L::of(&node));
        }
        Ok(self)
    }
}
