//! The session in a capture as a whole.

use super::duration_or_dash;
use super::lists::{CheckpointItem, checkpoint_items};
use crate::capture_file::ConnectionId;
use crate::output::printable;
use crate::streams::{Channel, Streams};
use colo_ring::units::PAGE_BYTES;
use colo_ring::wire::codec::Method;
use schemars::JsonSchema;
use serde::Serialize;
use std::fmt;

/// The session in it.
#[derive(Serialize, JsonSchema)]
pub(super) struct SessionOverview {
    /// The primary's versioned machine type.
    machine_type: String,
    /// The connection of the main channel.
    main: ConnectionId,
    /// The multifd channels.
    channels: Vec<ChannelOverview>,
    /// The RAM blocks.
    blocks: Vec<BlockOverview>,
    /// Checkpoints.
    checkpoints: usize,
    /// How pages are compressed: `none`, a method, or `xbzrle`.
    compression: &'static str,
    /// Pages with content in all checkpoints.
    pages: u64,
    /// Zero pages in all checkpoints.
    zero_pages: u64,
    /// Bytes of all checkpoints, on all channels.
    bytes: u64,
    /// Content of their pages on the wire.
    payload_bytes: u64,
    /// How many times larger that is in memory; null without pages.
    ratio: Option<f64>,
    /// Durations that half of the checkpoints exceed, by the capture's clock.
    interval_p50_ns: Option<u64>,
    /// VMSTATE_SEND to VMSTATE_LOADED that half of the checkpoints exceed; null without checkpoints.
    loaded_p50_ns: Option<u64>,
    /// What a reader must know.
    notes: Vec<String>,
}

/// A multifd channel.
#[derive(Serialize, JsonSchema)]
struct ChannelOverview {
    /// Its number.
    channel: u8,
    /// Its connection.
    connection: ConnectionId,
    /// Its packets.
    packets: usize,
    /// Its syncs.
    syncs: u64,
    /// Of the pages of all its packets, precopy included.
    #[serde(flatten)]
    content: PageBytes,
}

/// What compression has made of pages.
#[derive(Serialize, JsonSchema)]
struct PageBytes {
    /// How pages are compressed; none where there is no page with content.
    method: Option<&'static str>,
    /// Content of pages, before compression and on the wire.
    page_bytes: u64,
    /// Content of pages on the wire.
    payload_bytes: u64,
    /// Of the two; none without pages.
    ratio: Option<f64>,
}

/// A RAM block.
#[derive(Serialize, JsonSchema)]
struct BlockOverview {
    /// Its name.
    name: String,
    /// Its length.
    used_bytes: u64,
}

impl SessionOverview {
    pub(super) fn of(streams: &Streams) -> Self {
        let channel = |channel: &Channel| ChannelOverview {
            channel: channel.id().0,
            connection: channel.connection.id,
            packets: channel.packets().len(),
            syncs: channel.syncs(),
            content: PageBytes::of(channel),
        };
        let items = checkpoint_items(streams);
        let sum = |value: fn(&CheckpointItem) -> u64| items.iter().map(value).sum();
        let (pages, payload_bytes) = (sum(|item| item.pages), sum(|item| item.payload_bytes));
        Self {
            machine_type: streams.machine_type.clone(),
            main: streams.main.id,
            channels: streams.channels.iter().map(channel).collect(),
            blocks: streams
                .blocks
                .iter()
                .map(|(_, block)| BlockOverview {
                    name: block.name_text(),
                    used_bytes: block.used_length,
                })
                .collect(),
            checkpoints: items.len(),
            compression: streams.compression(),
            pages,
            zero_pages: sum(|item| item.zero_pages),
            bytes: sum(|item| item.bytes),
            payload_bytes,
            ratio: ratio(pages * PAGE_BYTES, payload_bytes),
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
                "  channel {} on connection {}: {} packets, {} syncs{}\n",
                channel.channel, channel.connection, channel.packets, channel.syncs, channel.content
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
            "{} checkpoints with {} pages, {} zero pages, {} bytes{}; medians: interval {}, loaded {}\n",
            self.checkpoints,
            self.pages,
            self.zero_pages,
            self.bytes,
            match self.ratio {
                Some(ratio) if self.compression != Method::None.name() =>
                    format!(", pages by {} {ratio:.2} to 1", self.compression),
                _ => String::new(),
            },
            duration_or_dash(self.interval_p50_ns),
            duration_or_dash(self.loaded_p50_ns),
        ));
        for note in &self.notes {
            text.push_str(&format!("note: {}\n", printable(note)));
        }
        text
    }
}

impl PageBytes {
    fn of(channel: &Channel) -> Self {
        let pages: u64 = channel
            .packets()
            .iter()
            .map(|packet| u64::from(packet.normal))
            .sum();
        let payloads = (0..channel.packets().len()).map(|number| channel.payload(number).len() as u64);
        let payload_bytes = payloads.sum();
        Self {
            method: channel.method().map(Method::name),
            page_bytes: pages * PAGE_BYTES,
            payload_bytes,
            ratio: ratio(pages * PAGE_BYTES, payload_bytes),
        }
    }
}

/// In words that follow others; none where nothing is compressed.
impl fmt::Display for PageBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Some(method), Some(ratio)) = (self.method, self.ratio) else {
            return Ok(());
        };
        if method == Method::None.name() {
            return Ok(());
        }
        let (pages, payload) = (self.page_bytes, self.payload_bytes);
        write!(
            f,
            "; {method}: {pages} bytes of pages in {payload}, {ratio:.2} to 1"
        )
    }
}

/// How many times larger pages are than their content on the wire.
pub(super) fn ratio(page_bytes: u64, payload_bytes: u64) -> Option<f64> {
    (payload_bytes > 0).then(|| page_bytes as f64 / payload_bytes as f64)
}

fn median(values: impl Iterator<Item = u64>) -> Option<u64> {
    let mut values: Vec<_> = values.collect();
    values.sort_unstable();
    values.get(values.len() / 2).copied()
}
