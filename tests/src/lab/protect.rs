//! Putting a QEMU under COLO and following its checkpoints by its events.
//!
//! A checkpoint is one `STOP` → `RESUME` of the primary after the first such pair, which is the switch-over.

use crate::HANG_LIMIT;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::json;

use super::qmp::Event;
use super::{Address, LabError, Qemu, SavedRam, wait_for};

/// Longer than any test: no checkpoint comes by itself.
const NEVER_MS: u32 = 3_600_000;

/// How a primary is protected.
#[derive(Clone, Debug)]
pub struct Protection {
    /// multifd channels; 0 = without multifd.
    pub channels: u8,
    /// `x-checkpoint-delay`.
    pub checkpoint_delay_ms: u32,
    /// `zero-page-detection`; the machine type's default where not given.
    pub zero_page_detection: Option<ZeroPageDetection>,
    /// How multifd channels compress pages; not at all where not given.
    pub compression: Option<Compression>,
    /// What the guest does until the first checkpoint.
    pub precopy: Precopy,
}

/// What a guest does in precopy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precopy {
    /// It is stopped before, and runs again from the switch-over on.
    Stands,
    /// It runs. TCG may then miss a page that is being written while the dirty log is cleared, and the primary never
    /// sends what was written: the receiver can be judged by what was sent only ([`super::Recorder::model_at`]).
    Runs,
}

impl Protection {
    /// With this `x-checkpoint-delay`; the guest stands in precopy; the rest is the machine type's default.
    #[must_use]
    pub fn every_ms(checkpoint_delay_ms: u32, channels: u8) -> Self {
        Self {
            channels,
            checkpoint_delay_ms,
            zero_page_detection: None,
            compression: None,
            precopy: Precopy::Stands,
        }
    }
}

/// QEMU's `multifd-compression` with its level.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Compression {
    /// zlib: levels 0 to 9.
    Zlib(u8),
    /// zstd: levels 1 to 20.
    Zstd(u8),
}

impl Compression {
    /// The method's name as QEMU has it, and the level.
    #[must_use]
    pub fn method_and_level(self) -> (&'static str, u8) {
        match self {
            Self::Zlib(level) => ("zlib", level),
            Self::Zstd(level) => ("zstd", level),
        }
    }

    fn add_to(self, parameters: &mut serde_json::Value) {
        let (method, level) = self.method_and_level();
        parameters["multifd-compression"] = method.into();
        parameters[format!("multifd-{method}-level")] = level.into();
    }
}

/// QEMU's `zero-page-detection`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroPageDetection {
    /// Zero pages are sent as pages.
    None,
    /// Zero pages are found by the main thread and sent on the main channel.
    Legacy,
    /// Zero pages are found by the multifd threads and listed in their packets.
    Multifd,
}

impl ZeroPageDetection {
    fn qmp_name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Legacy => "legacy",
            Self::Multifd => "multifd",
        }
    }
}

impl Qemu {
    /// Migrates to a secondary at `address` with COLO and waits until it is in COLO, with its guest running.
    ///
    /// # Errors
    /// When QEMU refuses a setting, the migration fails or does not get there in time.
    pub fn protect(&mut self, address: &Address, protection: &Protection) -> Result<(), LabError> {
        self.set_channels(protection.channels)?;
        let mut parameters = json!({
            "x-checkpoint-delay": protection.checkpoint_delay_ms,
            "max-bandwidth": 100_000_000_000_u64,
        });
        if let Some(compression) = protection.compression {
            compression.add_to(&mut parameters);
        }
        if let Some(detection) = protection.zero_page_detection {
            parameters["zero-page-detection"] = detection.qmp_name().into();
        }
        self.qmp().execute("migrate-set-parameters", &parameters)?;
        if protection.precopy == Precopy::Stands {
            self.stop()?;
        }
        self.qmp()
            .execute("migrate", &json!({"uri": address.to_string()}))?;
        wait_for("the primary to be in COLO", HANG_LIMIT, || {
            let state = self.qmp().execute("query-migrate", &json!({}))?;
            match state["status"].as_str() {
                Some("colo") => Ok(Some(())),
                Some("failed" | "completed" | "cancelled") => Err(LabError::Ended {
                    what: "the migration".into(),
                    detail: state.to_string(),
                }),
                _ => Ok(None),
            }
        })?;
        wait_for("the guest to run in COLO", HANG_LIMIT, || {
            Ok(self.resumes()?.first().map(|_| ()))
        })
    }

    /// Lets precopy end after its first pass, whatever the guest dirties meanwhile: the switch-over may take a minute.
    ///
    /// # Errors
    /// When QEMU refuses it.
    pub fn end_precopy_early(&mut self) -> Result<(), LabError> {
        self.qmp()
            .execute("migrate-set-parameters", &json!({"downtime-limit": 60_000}))?;
        Ok(())
    }

    /// Stops the guest. Protected then, it runs again from the switch-over on.
    ///
    /// # Errors
    /// When QEMU refuses it.
    pub fn stop(&mut self) -> Result<(), LabError> {
        self.qmp().execute("stop", &json!({}))?;
        Ok(())
    }

    /// Makes this QEMU, started by [`Qemu::start_incoming`], the COLO secondary at `address`.
    ///
    /// # Errors
    /// When QEMU refuses a setting or the address.
    pub fn be_secondary(&mut self, address: &Address, channels: u8) -> Result<(), LabError> {
        self.set_channels(channels)?;
        self.qmp()
            .execute("migrate-incoming", &json!({"uri": address.to_string()}))?;
        Ok(())
    }

    /// Has a secondary expect TLS, with the certificates of a directory: before [`Self::be_secondary`].
    ///
    /// # Errors
    /// When QEMU refuses it.
    pub fn expect_tls(&mut self, directory: &Path) -> Result<(), LabError> {
        let object = json!({
            "qom-type": "tls-creds-x509",
            "id": "tls0",
            "dir": directory.display().to_string(),
            "endpoint": "server",
            "verify-peer": true,
        });
        self.qmp().execute("object-add", &object)?;
        self.qmp()
            .execute("migrate-set-parameters", &json!({"tls-creds": "tls0"}))?;
        Ok(())
    }

    /// Has a secondary expect what a primary of that compression sends: before [`Self::be_secondary`].
    ///
    /// # Errors
    /// When QEMU refuses it.
    pub fn expect_compression(&mut self, compression: Compression) -> Result<(), LabError> {
        let mut parameters = json!({});
        compression.add_to(&mut parameters);
        self.qmp().execute("migrate-set-parameters", &parameters)?;
        Ok(())
    }

    /// Number of checkpoints so far.
    ///
    /// # Errors
    /// [`LabError::Ended`] if the primary has left COLO.
    pub fn checkpoints(&mut self) -> Result<usize, LabError> {
        Ok(self.resumes()?.len().saturating_sub(1))
    }

    /// Waits until `count` checkpoints are complete.
    ///
    /// # Errors
    /// [`LabError::Timeout`]; [`LabError::Ended`] if the primary has left COLO.
    pub fn wait_checkpoints(&mut self, count: usize, limit: Duration) -> Result<(), LabError> {
        wait_for(&format!("{count} checkpoints"), limit, || {
            Ok((self.checkpoints()? >= count).then_some(()))
        })
    }

    /// Waits until the guest stands still for a checkpoint.
    ///
    /// # Errors
    /// [`LabError::Timeout`]; [`LabError::Ended`] if the primary has left COLO.
    pub fn wait_paused(&mut self, limit: Duration) -> Result<(), LabError> {
        wait_for("a checkpoint to begin", limit, || {
            self.resumes()?;
            Ok(self.is_paused().then_some(()))
        })
    }

    /// Whether the guest stands still, by QEMU's last event about it.
    pub fn is_paused(&mut self) -> bool {
        let mut events = self.qmp().events().into_iter().rev();
        let last = events.find(|event| matches!(&*event.name, "STOP" | "RESUME"));
        last.is_some_and(|event| event.name == "STOP")
    }

    /// How long the guest stood still at each checkpoint, µs, by the time stamps of QEMU's events.
    pub fn pauses_us(&mut self) -> Vec<u64> {
        let mut stopped_at_us = None;
        let mut pauses = Vec::new();
        for event in self.qmp().events() {
            match event.name.as_str() {
                "STOP" => stopped_at_us = Some(event.at_us),
                "RESUME" => pauses.extend(stopped_at_us.take().map(|stop| event.at_us.saturating_sub(stop))),
                _ => {}
            }
        }
        pauses.into_iter().skip(1).collect()
    }

    /// Stops the guest under load, saves its RAM, and lets one checkpoint take exactly that RAM. Afterwards no
    /// checkpoint comes by itself, so that the secondary keeps it. Call it once, at the end.
    ///
    /// # Errors
    /// When another checkpoint came in between, so that what was saved and what was committed differ in time.
    pub fn commit_stopped(&mut self, save_to: &Path) -> Result<SavedRam, LabError> {
        // Changing the delay starts a checkpoint at once; the timer then waits for the new delay.
        let before = self.checkpoints()?;
        self.set_checkpoint_delay_ms(NEVER_MS)?;
        self.wait_checkpoints(before + 1, HANG_LIMIT)?;
        self.wait_until_quiet()?;
        // The guest has dirtied memory since: what is committed now is not what the last checkpoint had. The line of the
        // next tick may have been on its way already.
        let tick = self.ticks();
        wait_for("the guest's next ticks", HANG_LIMIT, || {
            Ok((self.ticks() >= tick + 2).then_some(()))
        })?;
        let resumes_before = self.resumes()?.len();
        self.stop()?;
        let saved = self.save_ram(save_to)?;
        if self.resumes()?.len() != resumes_before {
            return Err(LabError::Ended {
                what: "the stop of the guest".into(),
                detail: "a checkpoint let it run while its RAM was saved".into(),
            });
        }
        self.set_checkpoint_delay_ms(NEVER_MS)?;
        wait_for("the checkpoint of the stopped guest", HANG_LIMIT, || {
            Ok((self.resumes()?.len() > resumes_before).then_some(()))
        })?;
        self.wait_until_quiet()?;
        let taken = self.resumes()?.len() - resumes_before;
        if taken != 1 {
            return Err(LabError::Ended {
                what: "the checkpoint of the stopped guest".into(),
                detail: format!("{taken} checkpoints were taken, so the guest ran before the last of them"),
            });
        }
        Ok(saved)
    }

    /// A whole session up to the checkpoint that keeps the stopped guest's RAM, with at least so many checkpoints before it:
    /// [`Self::protect`] and [`Self::commit_stopped`].
    ///
    /// # Errors
    /// Those of both.
    pub fn protect_and_stop(
        &mut self,
        address: &Address,
        protection: &Protection,
        checkpoints_min: usize,
        save_to: &Path,
    ) -> Result<SavedRam, LabError> {
        self.protect(address, protection)?;
        self.wait_checkpoints(checkpoints_min, HANG_LIMIT)?;
        self.commit_stopped(save_to)
    }

    fn set_channels(&mut self, channels: u8) -> Result<(), LabError> {
        self.enable(&["x-colo", "return-path"])?;
        if channels > 0 {
            self.enable(&["multifd"])?;
            self.qmp()
                .execute("migrate-set-parameters", &json!({"multifd-channels": channels}))?;
        }
        Ok(())
    }

    fn set_checkpoint_delay_ms(&mut self, delay_ms: u32) -> Result<(), LabError> {
        self.qmp()
            .execute("migrate-set-parameters", &json!({"x-checkpoint-delay": delay_ms}))?;
        Ok(())
    }

    // Until no checkpoint has begun or ended for a while.
    fn wait_until_quiet(&mut self) -> Result<(), LabError> {
        const QUIET: Duration = Duration::from_millis(200);
        let mut seen = 0;
        let mut since = Instant::now();
        wait_for("the last checkpoint", HANG_LIMIT, || {
            let count = self.qmp().events().len();
            if count != seen {
                seen = count;
                since = Instant::now();
            }
            Ok((since.elapsed() >= QUIET).then_some(()))
        })
    }

    fn resumes(&mut self) -> Result<Vec<Event>, LabError> {
        let events = self.qmp().events();
        if let Some(exit) = events.iter().find(|event| event.name == "COLO_EXIT") {
            return Err(LabError::Ended {
                what: "COLO on the primary".into(),
                detail: exit.data.to_string(),
            });
        }
        Ok(events
            .into_iter()
            .filter(|event| event.name == "RESUME")
            .collect())
    }
}
