//! The vmdesc's JSON, from a peer that is not trusted: bounded depth, duplicate keys allowed, of which the last counts (spec §11.2, §20, 22).
//!
//! It is read in one pass that keeps nothing but the device it is at: however long its lists are, nothing is allocated for them.

use super::sections::{Device, Evidence, Walk};
use crate::wire::limits::VMDESC_DEPTH_MAX;
use serde::de::{Deserialize, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use std::fmt;
use std::marker::PhantomData;

/// What a subsection has before its body, beside its name: type byte, length of the name, be32 version.
const SUBSECTION_HEAD: u64 = 1 + 1 + 4;

/// What `text` says of the device state, if it is a JSON object with a list of devices, and no deeper than it may be.
pub(super) fn describes(text: &[u8], state: &[u8]) -> Option<Evidence> {
    let text = checked(text)?;
    let mut walk = Walk::new(state);
    let mut json = serde_json::Deserializer::from_str(text);
    let read = Text(Some(&mut walk)).deserialize(&mut json);
    let read = read.and_then(|has_devices| json.end().map(|()| has_devices));
    if let Ok(has_devices) = read {
        return has_devices.then(|| walk.evidence());
    }
    // It may be JSON all the same, with values of other kinds than are known.
    let mut json = serde_json::Deserializer::from_str(text);
    let has_devices = Text(None).deserialize(&mut json).ok()?;
    json.end().ok()?;
    has_devices.then(|| walk.not_understood())
}

/// The text, if it is UTF-8 and within the depth limit: only then a recursive parser may read it.
fn checked(text: &[u8]) -> Option<&str> {
    let mut depth = 0usize;
    let mut in_string = false;
    let mut escaped = false;
    for &byte in text {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b'{' | b'[' if !in_string => depth += 1,
            b'}' | b']' if !in_string => depth = depth.checked_sub(1)?,
            _ => {}
        }
        if depth > VMDESC_DEPTH_MAX {
            return None;
        }
    }
    std::str::from_utf8(text).ok()
}

/// The keys that matter.
#[derive(Clone, Copy, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
enum Key {
    Devices,
    Name,
    VmsdName,
    InstanceId,
    Size,
    ArrayLen,
    Fields,
    Subsections,
    #[serde(other)]
    Other,
}

/// The whole text, which is an object: whether it has the key "devices". With a walk, what is in that list is passed by it; else
/// everything is only checked to be JSON.
struct Text<'w, 's>(Option<&'w mut Walk<'s>>);

impl<'de> DeserializeSeed<'de> for Text<'_, '_> {
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<bool, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Text<'_, '_> {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<bool, A::Error> {
        let mut has_devices = false;
        while let Some(key) = map.next_key::<Key>()? {
            let is_devices = matches!(key, Key::Devices);
            has_devices |= is_devices;
            match &mut self.0 {
                Some(walk) if is_devices => map.next_value_seed(Devices(walk))?,
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(has_devices)
    }
}

/// The list of devices, in the order of their sections.
struct Devices<'w, 's>(&'w mut Walk<'s>);

impl<'de> DeserializeSeed<'de> for Devices<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Devices<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of devices")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        while let Some(node) = list.next_element::<Node<'de>>()? {
            self.0.pass(&Device {
                name: node.name,
                instance: node.instance,
                body: node.body(),
            });
        }
        Ok(())
    }
}

/// A device or a subsection.
#[derive(Default)]
struct Node<'a> {
    name: Option<&'a str>,
    vmsd_name: Option<&'a str>,
    instance: Option<i64>,
    size: Option<u64>,
    fields: Option<Sum<Field>>,
    subsections: Option<Sum<Node<'a>>>,
}

impl Node<'_> {
    fn body(&self) -> Option<u64> {
        let fields = match &self.fields {
            Some(fields) => fields.bytes?,
            None => self.size?,
        };
        let subsections = self.subsections.as_ref().map_or(Some(0), |all| all.bytes)?;
        fields.checked_add(subsections)
    }
}

/// A field of a body. What is in it is counted in its size.
#[derive(Default)]
struct Field {
    size: Option<u64>,
    array_len: Option<u64>,
}

/// What has a length on the wire, unless it is not known.
trait Part {
    fn bytes(&self) -> Option<u64>;
}

impl Part for Field {
    fn bytes(&self) -> Option<u64> {
        self.size?.checked_mul(self.array_len.unwrap_or(1))
    }
}

/// As a subsection.
impl Part for Node<'_> {
    fn bytes(&self) -> Option<u64> {
        let head = SUBSECTION_HEAD + self.vmsd_name?.len() as u64;
        head.checked_add(self.body()?)
    }
}

/// The bytes of all elements of a list; none if they are not known.
struct Sum<T> {
    bytes: Option<u64>,
    of: PhantomData<T>,
}

/// Deserializes `T`, which is an object or a list.
struct As<T>(PhantomData<T>);

impl<'de> Deserialize<'de> for Node<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(As::<Self>(PhantomData))
    }
}

impl<'de> Visitor<'de> for As<Node<'de>> {
    type Value = Node<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a device or a subsection")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Node<'de>, A::Error> {
        let mut node = Node::default();
        while let Some(key) = map.next_key::<Key>()? {
            match key {
                Key::Name => node.name = Some(map.next_value()?),
                Key::VmsdName => node.vmsd_name = Some(map.next_value()?),
                Key::InstanceId => node.instance = Some(map.next_value()?),
                Key::Size => node.size = Some(map.next_value()?),
                Key::Fields => node.fields = Some(map.next_value()?),
                Key::Subsections => node.subsections = Some(map.next_value()?),
                Key::Devices | Key::ArrayLen | Key::Other => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(node)
    }
}

impl<'de> Deserialize<'de> for Field {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(As::<Self>(PhantomData))
    }
}

impl<'de> Visitor<'de> for As<Field> {
    type Value = Field;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a field")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Field, A::Error> {
        let mut field = Field::default();
        while let Some(key) = map.next_key::<Key>()? {
            match key {
                Key::Size => field.size = Some(map.next_value()?),
                Key::ArrayLen => field.array_len = Some(map.next_value()?),
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(field)
    }
}

impl<'de, T: Deserialize<'de> + Part> Deserialize<'de> for Sum<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(As::<Self>(PhantomData))
    }
}

impl<'de, T: Deserialize<'de> + Part> Visitor<'de> for As<Sum<T>> {
    type Value = Sum<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Sum<T>, A::Error> {
        let mut bytes = Some(0u64);
        while let Some(part) = list.next_element::<T>()? {
            bytes = bytes
                .zip(part.bytes())
                .and_then(|(all, one)| all.checked_add(one));
        }
        Ok(Sum {
            bytes,
            of: PhantomData,
        })
    }
}
