//! A receiver from which guests are resumed: its images are files, its sessions end in fresh QEMUs.

use crate::HANG_LIMIT;
use colo_ring::ring::BackendKind;
use std::fs;
use std::path::PathBuf;

use serde_json::Value;

use super::{
    Address, Lab, LabError, Machine, Protection, Qemu, Receiver, ReceiverOptions, SharedDirectory, Transport,
    protect_by_command, wait_for,
};

/// How the guest's memory gets to the fresh QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// QEMU maps the receiver's file and runs on it.
    Shared,
    /// All of it is in the stream.
    Stream,
}

impl Way {
    /// Its name in `colo-ring failover --json`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Shared => "shared",
            Self::Stream => "stream",
        }
    }
}

/// A receiver whose images are files, on an address of its own.
#[derive(Debug)]
pub struct Secondary {
    receiver: Receiver,
    address: Address,
    channels: u8,
    ram: SharedDirectory,
    disks: Option<Disks>,
    /// Further options of the receiver.
    options: Vec<String>,
}

/// Where it keeps guests' disks, and serves them.
#[derive(Debug)]
struct Disks {
    directory: PathBuf,
    address: Address,
}

impl Secondary {
    /// Starts one with this many multifd channels; 0 = plain.
    ///
    /// # Errors
    /// Those of [`Receiver::start`].
    pub fn start(lab: &Lab, channels: u8) -> Result<Self, LabError> {
        Self::start_in(lab, channels, lab.ram_directory()?)
    }

    /// The same with its images in that directory.
    ///
    /// # Errors
    /// Those of [`Receiver::start`].
    pub fn start_in(lab: &Lab, channels: u8, ram: SharedDirectory) -> Result<Self, LabError> {
        Self::launch(lab, channels, ram, None, &[])
    }

    /// The same with these further options of `colo-ring receive`.
    ///
    /// # Errors
    /// Those of [`Receiver::start`].
    pub fn start_with(lab: &Lab, channels: u8, options: &[&str]) -> Result<Self, LabError> {
        Self::launch(lab, channels, lab.ram_directory()?, None, options)
    }

    /// The same with disks, in a directory of its own.
    ///
    /// # Errors
    /// Those of [`Receiver::start`].
    pub fn start_with_disks(lab: &Lab, channels: u8) -> Result<Self, LabError> {
        let directory = lab.fresh_file("disks", "dir");
        fs::create_dir(&directory).map_err(LabError::io(format!("create {}", directory.display())))?;
        let address = Address::Unix(lab.fresh_file("nbd", "sock"));
        let disks = Disks { directory, address };
        Self::launch(lab, channels, lab.ram_directory()?, Some(disks), &[])
    }

    fn launch(
        lab: &Lab,
        channels: u8,
        ram: SharedDirectory,
        disks: Option<Disks>,
        options: &[&str],
    ) -> Result<Self, LabError> {
        let address = Address::free(lab, Transport::Tcp)?;
        let options: Vec<String> = options.iter().map(|option| (*option).to_owned()).collect();
        let all = Self::options(channels, &ram, disks.as_ref(), &options);
        let receiver = Receiver::start(lab, &address, &all)?;
        Ok(Self {
            receiver,
            address,
            channels,
            ram,
            disks,
            options,
        })
    }

    fn options(
        channels: u8,
        ram: &SharedDirectory,
        disks: Option<&Disks>,
        further: &[String],
    ) -> ReceiverOptions {
        let mut extra = vec!["--ram-dir".to_owned(), ram.path().display().to_string()];
        extra.extend_from_slice(further);
        if let Some(Disks { directory, address }) = disks {
            let directory = directory.display().to_string();
            extra.extend([
                "--disks".to_owned(),
                directory,
                "--nbd".to_owned(),
                address.to_string(),
            ]);
        }
        ReceiverOptions {
            channels,
            backend: BackendKind::Uring,
            once: false,
            extra,
        }
    }

    fn disks(&self) -> &Disks {
        self.disks.as_ref().expect("it was started with disks")
    }

    /// The file of the disk that it serves under that name.
    ///
    /// # Panics
    /// When it was started without disks.
    #[must_use]
    pub fn disk(&self, name: &str) -> PathBuf {
        self.disks().directory.join(format!("{name}.raw"))
    }

    /// Where it serves disks.
    ///
    /// # Panics
    /// When it was started without disks.
    #[must_use]
    pub fn disk_address(&self) -> String {
        self.disks().address.to_string()
    }

    /// Ends it, and removes its disks.
    ///
    /// # Errors
    /// When they cannot be removed.
    ///
    /// # Panics
    /// When it was started without disks.
    pub fn remove_disks(mut self) -> Result<(), LabError> {
        self.receiver.kill();
        let directory = &self.disks().directory;
        fs::remove_dir_all(directory).map_err(LabError::io(format!("remove {}", directory.display())))
    }

    /// Kills the receiver by SIGKILL; there is none then.
    pub fn kill_receiver(&mut self) {
        self.receiver.kill();
    }

    /// Kills the receiver by SIGKILL and starts another one with the same address and directory.
    ///
    /// # Errors
    /// Those of [`Receiver::start`].
    pub fn kill_and_restart(&mut self, lab: &Lab) -> Result<(), LabError> {
        self.receiver.kill();
        self.receiver = Receiver::start(
            lab,
            &self.address,
            &Self::options(self.channels, &self.ram, self.disks.as_ref(), &self.options),
        )?;
        Ok(())
    }

    /// The receiver.
    #[must_use]
    pub fn receiver(&self) -> &Receiver {
        &self.receiver
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Its multifd channels; 0 = plain.
    #[must_use]
    pub fn channels(&self) -> u8 {
        self.channels
    }

    /// Number of files in its directory of images.
    #[must_use]
    pub fn files(&self) -> usize {
        self.ram.files()
    }

    /// Protects a primary that was never protected, with checkpoints every so many milliseconds.
    ///
    /// # Errors
    /// Those of [`Qemu::protect`].
    pub fn protect(&self, primary: &mut Qemu, checkpoint_delay_ms: u32) -> Result<(), LabError> {
        let protection = Protection::every_ms(checkpoint_delay_ms, self.channels);
        primary.protect(&self.address, &protection)
    }

    /// Lets `colo-ring protect` do it, with these further arguments, and returns its report.
    ///
    /// # Errors
    /// [`LabError::Ended`] with the command's own words when it fails.
    pub fn protect_by_command(&self, primary: &Qemu, arguments: &[&str]) -> Result<Value, LabError> {
        let channels = self.channels.to_string();
        let all = [&["--channels", &channels], arguments].concat();
        protect_by_command(primary.free_monitor(), &self.address, &all)
    }

    /// How a session stands, as `colo-ring status` lists it; null if it does not.
    ///
    /// # Errors
    /// Those of [`Receiver::status`].
    pub fn session(&self, session: u64) -> Result<Value, LabError> {
        let status = self.receiver.status()?;
        let sessions = status["sessions"].as_array();
        let found = sessions.and_then(|list| list.iter().find(|entry| entry["session"] == session));
        Ok(found.unwrap_or(&Value::Null).clone())
    }

    /// Waits until a session is in that state, and returns how it stands then.
    ///
    /// # Errors
    /// [`LabError::Timeout`], and those of [`Receiver::status`].
    pub fn wait_state(&self, session: u64, state: &str) -> Result<Value, LabError> {
        wait_for(&format!("session {session} to be {state}"), HANG_LIMIT, || {
            let status = self.session(session)?;
            Ok((status["state"] == state).then_some(status))
        })
    }

    /// The file of a session's main memory, as `colo-ring status` names it.
    ///
    /// # Errors
    /// [`LabError::Malformed`] when it names none.
    pub fn ram_file(&self, session: u64) -> Result<PathBuf, LabError> {
        let status = self.session(session)?;
        let blocks = status["blocks"].as_array();
        let block = blocks.and_then(|list| list.iter().find(|block| block["name"] == "pc.ram"));
        let file = block.and_then(|block| block["file"].as_str());
        file.map(PathBuf::from).ok_or_else(|| LabError::Malformed {
            what: "colo-ring status --json".into(),
            detail: format!("it names no file of pc.ram: {status}"),
        })
    }

    /// A QEMU that waits for the guest of a session.
    ///
    /// # Errors
    /// Those of [`Qemu::start`] and [`Secondary::ram_file`].
    pub fn standby(
        &self,
        lab: &Lab,
        name: &str,
        machine: &Machine,
        way: Way,
        session: u64,
    ) -> Result<Qemu, LabError> {
        match way {
            Way::Shared => Qemu::start_standby(lab, name, machine, &self.ram_file(session)?),
            Way::Stream => Qemu::start_incoming(lab, name, machine),
        }
    }

    /// Resumes a session's guest in a QEMU that waits for it, and returns the command's report.
    ///
    /// # Errors
    /// Those of [`Receiver::failover`].
    ///
    /// # Panics
    /// When the command succeeds and tells another way than the one asked for, or a guest that does not run.
    pub fn failover(&self, session: u64, standby: &Qemu, way: Way) -> Result<Value, LabError> {
        let monitor = standby.free_monitor().display().to_string();
        let mut arguments = vec!["--qmp", &monitor];
        if way == Way::Stream {
            arguments.push("--stream");
        }
        let report = self.receiver.failover(session, arguments)?;
        assert_eq!(report["status"], "running", "{report}");
        assert_eq!(report["way"], way.name(), "{report}");
        Ok(report)
    }
}
