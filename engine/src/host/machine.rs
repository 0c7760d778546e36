//! The machine, as measurements describe it.

use super::{cores, memory, network, proc};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::fmt;

/// A short description of the machine, for reports only.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Machine {
    /// The processor's model name.
    pub cpu_model: String,
    /// Cores online.
    pub cores_online: usize,
    /// Cores that this process may use.
    pub cores_allowed: usize,
    /// The kernel's release.
    pub kernel: String,
    /// Memory of the machine.
    pub memory_bytes: u64,
    /// TCP congestion control of new sockets.
    pub congestion_control: String,
}

impl Machine {
    /// Reads it. A value that cannot be read is `unknown` or 0.
    pub fn read() -> Self {
        let unknown = || "unknown".to_owned();
        let cpuinfo = proc::text("/proc/cpuinfo").unwrap_or_default();
        let online = proc::text("/sys/devices/system/cpu/online")
            .and_then(|list| cores::parse_core_list(&list).ok())
            .unwrap_or_default();
        let kernel = nix::sys::utsname::uname().map(|names| names.release().to_string_lossy().into_owned());
        Self {
            cpu_model: proc::field(&cpuinfo, "model name").map_or_else(unknown, str::to_owned),
            cores_online: online.len(),
            cores_allowed: cores::allowed_cores().unwrap_or_default().len(),
            kernel: kernel.unwrap_or_else(|_| unknown()),
            memory_bytes: memory::total_bytes(),
            congestion_control: network::congestion_control().unwrap_or_else(unknown),
        }
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}, {} of {} cores, {:.1} GiB, Linux {}, {}",
            self.cpu_model,
            self.cores_allowed,
            self.cores_online,
            self.memory_bytes as f64 / f64::from(1 << 30),
            self.kernel,
            self.congestion_control
        )
    }
}
