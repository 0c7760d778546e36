//! Guests for scripts/measure-neighbour to measure another one beside.

use clap::Parser;
use colo_ring_tests::hostile::load::Load;
use colo_ring_tests::hostile::{Destination, HostilePrimary};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::AtomicBool;

/// Guests of a receiver that are idle, or hostile, until this is killed
///
/// Prints a line when they are there.
#[derive(Parser)]
struct Cli {
    /// Where the receiver listens: HOST:PORT
    #[arg(long)]
    to: SocketAddr,

    /// Their address: others than that of the guest that is measured, whose connections are not mistaken for theirs then
    #[arg(long, default_value = "127.0.0.2")]
    from: Ipv4Addr,

    /// The receiver's --channels
    #[arg(long, default_value_t = 4)]
    channels: u8,

    /// So many guests that have one checkpoint and send nothing more
    #[arg(long, default_value_t = 0)]
    idle: usize,

    /// One guest that does this without end
    #[arg(long)]
    hostile: Option<Load>,

    /// Bytes of a device state of the hostile one
    #[arg(long, default_value_t = 64 << 20)]
    state_bytes: usize,
}

fn main() {
    let cli = Cli::parse();
    let to = Destination {
        address: cli.to,
        from: cli.from,
    };
    let idle: Vec<_> = (0..cli.idle)
        .map(|_| HostilePrimary::protected(to, cli.channels))
        .collect();
    println!("{} idle guests", idle.len());
    if let Some(load) = cli.hostile {
        load.run(to, cli.channels, cli.state_bytes, &AtomicBool::new(false));
    }
    loop {
        std::thread::park();
    }
}
