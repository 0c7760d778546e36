//! The vmdesc's JSON, from a peer that is not trusted: bounded depth, duplicate keys allowed (spec §20, 22).

use crate::wire::limits::VMDESC_DEPTH_MAX;
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};
use std::fmt;

/// Whether `text` is a JSON object with a list of devices, and no deeper than it may be.
pub(super) fn is_vmdesc(text: &[u8]) -> bool {
    let Some(text) = checked(text) else { return false };
    serde_json::from_str::<HasDevices>(text).is_ok_and(|found| found.0)
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

/// Whether an object has the key "devices"; everything in it is checked to be JSON.
struct HasDevices(bool);

impl<'de> Deserialize<'de> for HasDevices {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(HasDevicesVisitor)
    }
}

struct HasDevicesVisitor;

impl<'de> Visitor<'de> for HasDevicesVisitor {
    type Value = HasDevices;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<HasDevices, A::Error> {
        let mut found = false;
        while let Some(key) = map.next_key::<String>()? {
            found |= key == "devices";
            map.next_value::<IgnoredAny>()?;
        }
        Ok(HasDevices(found))
    }
}
