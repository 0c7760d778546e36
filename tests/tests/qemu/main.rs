//! The command with real QEMU, in the laboratory that `scripts/qemu-lab` makes. One program, because each links the
//! whole engine. The laboratory lets two experiments run side by side, and alone what measures: `--test-threads=2` is
//! enough.

mod capture;
mod compression;
mod disks;
mod failover;
mod failover_compressed;
mod failover_interrupted;
mod failover_linux;
mod guard;
mod guests;
mod hostile;
mod lab;
mod linux;
mod matrix;
mod numa;
mod plug;
mod protect;
mod recorded;
mod replay;
mod slow;
mod tls;
mod torn;
