//! A guest with servers on its disk, which `scripts/qemu-lab services` makes, and their clients.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::net_guest::in_namespace;
use super::{Company, GUEST_ADDRESS, Lab, LabError, build_guest, run_experiment, script_output};

/// A guest with SSH, HTTP and PostgreSQL servers, `tests/guest/services-init`.
#[derive(Clone, Copy, Debug)]
pub struct ServicesGuest;

impl ServicesGuest {
    /// The IPv4 address of its servers.
    ///
    /// # Panics
    /// Never.
    #[must_use]
    pub fn host() -> String {
        let address: SocketAddr = GUEST_ADDRESS.parse().expect("an address");
        address.ip().to_string()
    }

    pub(super) fn args(self, lab: &Lab) -> Vec<String> {
        let append = format!("console=ttyS0 quiet no_timer_check address={}", Self::host());
        let [kernel, initrd] = [&lab.kernel, &lab.services_initrd].map(|path| path.display().to_string());
        ["-kernel", &kernel, "-initrd", &initrd, "-append", &append]
            .map(str::to_owned)
            .to_vec()
    }

    /// A copy of its disk in `to`, and an empty disk of the same size in `base`, for a receiver.
    ///
    /// # Errors
    /// When they cannot be made.
    pub fn make_disks(to: &Path, base: &Path) -> Result<(), LabError> {
        let from = directory()?.join("root.raw");
        let copy = Command::new("cp")
            .arg("--sparse=always")
            .arg(&from)
            .arg(to)
            .status();
        let copy = copy.map_err(LabError::io("run cp"))?;
        if !copy.success() {
            return Err(LabError::Ended {
                what: format!("cp {}", from.display()),
                detail: copy.to_string(),
            });
        }
        let made = fs::metadata(to).and_then(|image| File::create(base)?.set_len(image.len()));
        made.map_err(LabError::io(format!("make {}", base.display())))
    }

    /// A client program of the same packages, which runs on the host.
    ///
    /// # Errors
    /// When they were not unpacked.
    pub fn client(program: &str) -> Result<Command, LabError> {
        let mut command = Command::new("chroot");
        command.arg(directory()?.join("root")).arg(program);
        Ok(command)
    }
}

/// Where `scripts/qemu-lab services` has put all of it.
fn directory() -> Result<PathBuf, LabError> {
    let directory = PathBuf::from(script_output("path")? + "-services");
    match directory.join("root.raw").exists() {
        true => Ok(directory),
        false => Err(LabError::Ended {
            what: format!("{} is missing", directory.display()),
            detail: "run scripts/qemu-lab services as root".into(),
        }),
    }
}

/// Runs the body of a test as [`super::net_experiment`] does, with a guest with servers.
///
/// # Panics
/// As of [`super::experiment`].
pub fn services_experiment(company: Company, body: impl FnOnce(&Lab) -> Result<(), LabError> + Send) {
    in_namespace(|| run_experiment(open(company), body));
}

fn open(company: Company) -> Result<Lab, LabError> {
    let lab = Lab::open(company)?;
    let laboratory = PathBuf::from(script_output("path")?);
    build_guest("build-services-guest", &laboratory, &lab.services_initrd)?;
    Ok(lab)
}
