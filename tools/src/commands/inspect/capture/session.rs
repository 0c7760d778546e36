//! The session in a capture as a whole.

use super::duration_or_dash;
use super::lists::{CheckpointItem, checkpoint_items};
use crate::capture_file::ConnectionId;
use crate::output::printable;
use crate::streams::{Channel, Streams};
use serde::Serialize;

/// The session in it.
#[derive(Serialize)]
pub(super) struct SessionOverview {
    machine_type: String,
    main: ConnectionId,
    channels: Vec<ChannelOverview>,
    blocks: Vec<BlockOverview>,
    checkpoints: usize,
    pages: u64,
    zero_pages: u64,
    bytes: u64,
    /// Durations that half of the checkpoints exceed, by the capture's clock.
    interval_p50_ns: Option<u64>,
    loaded_p50_ns: Option<u64>,
    notes: Vec<String>,
}

#[derive(Serialize)]
struct ChannelOverview {
    channel: u8,
    connection: ConnectionId,
    packets: usize,
    syncs: u64,
}

#[derive(Serialize)]
struct BlockOverview {
    name: String,
    used_bytes: u64,
}

impl SessionOverview {
    pub(super) fn of(streams: &Streams) -> Self {
        let channel = |channel: &Channel| ChannelOverview {
            channel: channel.id().0,
            connection: channel.connection.id,
            packets: channel.packets().len(),
            syncs: channel.syncs(),
        };
        let items = checkpoint_items(streams);
        let sum = |value: fn(&CheckpointItem) -> u64| items.iter().map(value).sum();
        Self {
            machine_type: streams.machine_type.clone(),
            main: streams.main.id,
            channels: streams.channels.iter().map(channel).collect(),
            blocks: streams
                .blocks
                .iter()
                .map(|(_, block)| BlockOverview {
                    name: block.display_name().into_owned(),
                    used_bytes: block.used_length,
                })
                .collect(),
            checkpoints: items.len(),
            pages: sum(|item| item.pages),
            zero_pages: sum(|item| item.zero_pages),
            bytes: sum(|item| item.bytes),
            interval_p50_ns: median(items.iter().filter_map(|item| item.gap_ns)),
            loaded_p50_ns: median(items.iter().filter_map(|item| item.loaded_ns)),
            notes: streams.notes.clone(),
        }
    }

    pub(super) fn render(&self) -> String {
        let mut text = format!(
            "\na session of {}: main channel on connection {}, {} multifd channels\n",
            self.machine_type,
            self.main,
            self.channels.len()
        );
        for channel in &self.channels {
            text.push_str(&format!(
                "  channel {} on connection {}: {} packets, {} syncs\n",
                channel.channel, channel.connection, channel.packets, channel.syncs
            ));
        }
        for block in &self.blocks {
            text.push_str(&format!(
                "  RAM block {}: {} bytes\n",
                printable(&block.name),
                block.used_bytes
            ));
        }
        text.push_str(&format!(
            "{} checkpoints with {} pages, {} zero pages, {} bytes; medians: interval {}, loaded {}\n",
            self.checkpoints,
            self.pages,
            self.zero_pages,
            self.bytes,
            duration_or_dash(self.interval_p50_ns),
            duration_or_dash(self.loaded_p50_ns),
        ));
        for note in &self.notes {
            text.push_str(&format!("note: {}\n", printable(note)));
        }
        text
    }
}

fn median(values: impl Iterator<Item = u64>) -> Option<u64> {
    let mut values: Vec<_> = values.collect();
    values.sort_unstable();
    values.get(values.len() / 2).copied()
}
