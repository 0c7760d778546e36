//! How a primary compresses the pages of its multifd channels: options of `protect` and `synth`.

use clap::Args;
use colo_ring::wire::codec::Method;
use schemars::JsonSchema;
use serde::Serialize;
use std::fmt;
use std::ops::RangeInclusive;
use thiserror::Error;

/// The level where none is given: that of QEMU for every method.
const LEVEL_DEFAULT: u32 = 1;

/// The levels that QEMU takes. Empty where there are none.
fn levels(method: Method) -> RangeInclusive<u8> {
    match method {
        Method::Zlib => 0..=9,
        Method::Zstd => 0..=20,
        _ => RangeInclusive::new(1, 0),
    }
}

/// The options.
#[derive(Clone, Copy, Debug, Default, Args)]
pub struct CompressionArgs {
    /// Compression of pages on the multifd channels, for a slow network
    #[arg(long, value_enum, value_name = "METHOD", default_value_t)]
    pub compression: Method,

    /// Level of the compression: 0 to 9 with zlib, 0 to 20 with zstd [default: 1]
    #[arg(long, value_name = "N")]
    pub compression_level: Option<u32>,
}

/// Options of compression that do not go together.
#[derive(Debug, Error)]
pub enum CompressionArgsError {
    /// A level of no method.
    #[error("--compression-level needs --compression zlib or zstd")]
    NoMethod,
    /// A session without multifd channels.
    #[error(
        "--compression {} needs multifd channels, and --channels is 0: QEMU compresses pages on these only", .0.name()
    )]
    NoChannels(Method),
    /// XBZRLE in a session with multifd channels.
    #[error(
        "--xbzrle needs --channels 0, here and at the receiver, and --channels is {0}: with multifd QEMU has no XBZRLE; \
         --compression is for that"
    )]
    XbzrleWithChannels(u8),
    /// A level that the method does not have.
    #[error(
        "--compression-level {level}: {} has the levels {} to {}",
        .method.name(), levels(*.method).start(), levels(*.method).end()
    )]
    Level {
        /// The method.
        method: Method,
        /// The level.
        level: u32,
    },
}

/// A method with its level.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct PageCompression {
    /// The method.
    #[serde(rename = "compression")]
    pub method: Method,
    /// Its level; none without compression.
    #[serde(rename = "compression_level")]
    pub level: Option<u8>,
}

impl CompressionArgs {
    /// The compression of a session with so many multifd channels.
    ///
    /// # Errors
    /// If the options do not go together.
    pub fn check(self, channels: u8) -> Result<PageCompression, CompressionArgsError> {
        let method = self.compression;
        if method == Method::None {
            return match self.compression_level {
                None => Ok(PageCompression::default()),
                Some(_) => Err(CompressionArgsError::NoMethod),
            };
        }
        if channels == 0 {
            return Err(CompressionArgsError::NoChannels(method));
        }
        let level = self.compression_level.unwrap_or(LEVEL_DEFAULT);
        let known = u8::try_from(level)
            .ok()
            .filter(|level| levels(method).contains(level));
        match known {
            Some(_) => Ok(PageCompression { method, level: known }),
            None => Err(CompressionArgsError::Level { method, level }),
        }
    }
}

impl PageCompression {
    /// Whether pages are compressed.
    pub fn is_some(self) -> bool {
        self.method != Method::None
    }
}

impl fmt::Display for PageCompression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.level {
            None => f.write_str(self.method.name()),
            Some(level) => write!(f, "{} level {level}", self.method.name()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(compression: Method, level: Option<u32>, channels: u8) -> Result<String, CompressionArgsError> {
        let args = CompressionArgs {
            compression,
            compression_level: level,
        };
        let checked = args.check(channels)?;
        Ok(checked.to_string())
    }

    #[test]
    fn a_method_has_its_levels() {
        use Method::{None as Off, Zlib, Zstd};
        assert_eq!(check(Off, None, 0).unwrap(), "none");
        assert_eq!(check(Zlib, None, 1).unwrap(), "zlib level 1");
        assert_eq!(check(Zlib, Some(9), 4).unwrap(), "zlib level 9");
        assert_eq!(check(Zstd, Some(20), 4).unwrap(), "zstd level 20");
        assert_eq!(check(Zstd, Some(0), 4).unwrap(), "zstd level 0");
        for (method, level, channels, says) in [
            (Zlib, Some(10), 4, "0 to 9"),
            (Zstd, Some(21), 4, "0 to 20"),
            (Zstd, Some(256), 4, "level 256: zstd has the levels 0 to 20"),
            (Off, Some(1), 4, "needs --compression"),
            (Zstd, None, 0, "--channels is 0"),
        ] {
            let refused = check(method, level, channels).unwrap_err().to_string();
            assert!(refused.contains(says), "{refused}");
        }
    }

    #[test]
    fn reports_name_method_and_level() {
        let args = CompressionArgs {
            compression: Method::Zstd,
            compression_level: None,
        };
        let json = serde_json::to_value(args.check(2).unwrap()).unwrap();
        assert_eq!(
            json,
            serde_json::json!({"compression": "zstd", "compression_level": 1})
        );
        let json = serde_json::to_value(PageCompression::default()).unwrap();
        assert_eq!(
            json,
            serde_json::json!({"compression": "none", "compression_level": null})
        );
    }
}
