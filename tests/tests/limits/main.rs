//! Whatever one peer, one operator or one fault of the host does, every other guest stays protected. The real command, with limits,
//! strangers, and readers that do not read. docs/limits.md lists what each test holds.

mod connections;
mod control;
mod files;
mod full_disk;
mod hooks;
mod memory;
mod names;
mod process;
mod sandbox;
mod sessions;
mod sockets;
mod stderr;
mod system_calls;
mod threads;

use colo_ring_tests::command::RunningReceiver;
use colo_ring_tools::net::Address;
use std::net::SocketAddr;

fn socket_address(receiver: &RunningReceiver) -> SocketAddr {
    match receiver.address() {
        Address::Tcp(address) => address.parse().expect("an address and a port"),
        Address::Unix(_) => panic!("it listens on TCP"),
    }
}
