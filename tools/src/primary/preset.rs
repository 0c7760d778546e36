//! Sessions that have a name.

use super::{Distribution, Pattern, SynthOptions, Version};
use clap::ValueEnum;
use schemars::JsonSchema;
use serde::Serialize;
use std::time::Duration;

/// The two loads of the test that was published with QEMU's multifd support for COLO: a guest of 6 GiB and four cores, a
/// checkpoint every 600 ms, idle and while a file is uploaded to it, over 10 Gbit/s. How many pages its checkpoints had
/// was not published; the numbers here are this project's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Preset {
    /// --ram 1G --pages exponential:100 --pattern hotset:0.01,0.9 --zero 0.1 --interval 600: what an idle Linux guest
    /// was seen to do
    Idle,
    /// --ram 1G --pages lognormal:3500,0.5 --pattern runs:32 --zero 0.02 --interval 600: 15 MiB a checkpoint on
    /// average, nearly all that fits the 14 ms that were published as the mean transfer, and 44 MiB in one of a hundred
    FileUpload,
}

impl Preset {
    /// Its options.
    pub fn options(self, version: Version) -> SynthOptions {
        let base = SynthOptions {
            ram_bytes: 1 << 30,
            interval: Duration::from_millis(600),
            checkpoints: 100,
            ..SynthOptions::new(version)
        };
        match self {
            Self::Idle => SynthOptions {
                dirty_pages: Distribution::Exponential { mean: 100 },
                pattern: Pattern::HotSet {
                    pages: 0.01,
                    writes: 0.9,
                },
                zero_share: 0.1,
                ..base
            },
            Self::FileUpload => SynthOptions {
                dirty_pages: Distribution::LogNormal {
                    median: 3500,
                    sigma: 0.5,
                },
                pattern: Pattern::Runs(32),
                zero_share: 0.02,
                ..base
            },
        }
    }
}
