//! Lists of what is in a capture: checkpoints, elements of the main channel, packets.

use super::super::elements::{self, Element};
use super::super::{ChannelFilter, InspectArgs};
use super::session::ratio;
use super::{duration_or_dash, number_or_dash, time};
use crate::output::{CommandError, Lines, mebibytes, printable, tell};
use crate::streams::{Channel, Packet, Streams};
use crate::units::nanoseconds;
use colo_ring::units::PAGE_BYTES;
use colo_ring::wire::codec::Method;
use colo_ring::wire::multifd::{HEADER_LEN, PacketHeader};
use schemars::JsonSchema;
use serde::Serialize;
use std::time::Duration;

/// A checkpoint in the list. All times are the capture's.
#[derive(Serialize, JsonSchema)]
pub(in crate::commands::inspect) struct CheckpointItem {
    /// Its number, from 1.
    pub(super) checkpoint: u64,
    /// Its request, since the start of the capture.
    pub(super) at_ns: u64,
    /// From the request before.
    pub(super) gap_ns: Option<u64>,
    /// Where CHECKPOINT_REQUEST is on the main channel.
    pub(super) main_offset: usize,
    /// Pages with content.
    pub(super) pages: u64,
    /// Zero pages.
    pub(super) zero_pages: u64,
    /// Bytes on all channels.
    pub(super) bytes: u64,
    /// Content of its pages on the wire, and how many times larger it is in memory.
    pub(super) payload_bytes: u64,
    /// How many times larger the content of its pages is in memory; null without pages.
    pub(super) ratio: Option<f64>,
    /// Length of its device state.
    pub(super) device_state_bytes: usize,
    /// Syncs of its channels.
    pub(super) syncs: u64,
    /// From VMSTATE_SEND.
    pub(super) received_ns: Option<u64>,
    /// From VMSTATE_SEND to VMSTATE_LOADED; null if that is not there.
    pub(super) loaded_ns: Option<u64>,
}

/// A multifd packet in the list.
#[derive(Serialize, JsonSchema)]
pub(in crate::commands::inspect) struct PacketItem {
    /// Its multifd channel.
    channel: u8,
    /// Its number on the channel, from 0.
    packet: usize,
    /// The checkpoint that it belongs to; 0 is the first copy, null what comes after the last.
    checkpoint: Option<u64>,
    /// Its first byte, since the start of the capture.
    at_ns: u64,
    /// Its first byte in the channel's stream.
    offset: usize,
    /// Its length with its content.
    bytes: usize,
    /// The number that it has for the primary.
    packet_num: u64,
    /// Whether it is a sync.
    sync: bool,
    /// How its pages are compressed.
    method: &'static str,
    /// The RAM block of its pages; empty without pages.
    block: String,
    /// Pages with content.
    pages: u16,
    /// Zero pages.
    zero_pages: u16,
    /// Offsets in the block, of the first page with content and the first zero page.
    first_page: Option<u64>,
    /// The same of its first zero page.
    first_zero_page: Option<u64>,
}

/// An element of the main channel in the list.
#[derive(Serialize, JsonSchema)]
pub(in crate::commands::inspect) struct ElementItem<'a> {
    /// Always `main`.
    channel: &'static str,
    /// The checkpoint that it belongs to; 0 is the first copy, null what comes after the last.
    checkpoint: Option<u64>,
    /// Its first byte, since the start of the capture.
    at_ns: u64,
    /// Its first byte in the main channel's stream.
    offset: usize,
    /// Its length.
    bytes: usize,
    /// What it is, in words.
    what: &'a str,
}

pub(super) fn checkpoint_items(streams: &Streams) -> Vec<CheckpointItem> {
    let mut before = None;
    let mut items = Vec::new();
    for (index, checkpoint) in streams.checkpoints.iter().enumerate() {
        let sent = streams.main.to_secondary.at(checkpoint.transfer.start);
        let answers = streams.answers.checkpoints.get(index);
        let since = |answer: Option<Duration>| Some(nanoseconds(answer?.saturating_sub(sent?)));
        items.push(CheckpointItem {
            checkpoint: index as u64 + 1,
            at_ns: nanoseconds(checkpoint.at),
            gap_ns: before
                .replace(checkpoint.at)
                .map(|before| nanoseconds(checkpoint.at.saturating_sub(before))),
            main_offset: checkpoint.request.start,
            pages: checkpoint.pages,
            zero_pages: checkpoint.zero_pages,
            bytes: checkpoint.bytes,
            payload_bytes: checkpoint.payload_bytes,
            ratio: ratio(checkpoint.pages * PAGE_BYTES, checkpoint.payload_bytes),
            device_state_bytes: checkpoint.device_state.len(),
            syncs: checkpoint.syncs,
            received_ns: since(answers.and_then(|answers| answers.received)),
            loaded_ns: since(answers.and_then(|answers| answers.loaded)),
        });
    }
    items
}

fn ratio_text(ratio: f64) -> String {
    // Pages with little on them have ratios of some hundred.
    format!("{ratio:.*}", if ratio < 99.995 { 2 } else { 0 })
}

pub(super) fn list_checkpoints(args: &InspectArgs, streams: &Streams) -> Result<(), CommandError> {
    let mut lines = Lines::new(args.json, &args.around_list("capture"), "checkpoints")?;
    let head = "ckpt|at s|gap|pages|zero|MiB|ratio|received|loaded";
    lines.head(head, &[5, 8, 8, 7, 7, 8, 5, 8, 8])?;
    for item in checkpoint_items(streams) {
        if !args.wants_checkpoint(Some(item.checkpoint)) {
            continue;
        }
        lines.item(&item, || {
            vec![
                item.checkpoint.to_string(),
                format!("{:.3}", item.at_ns as f64 / 1e9),
                duration_or_dash(item.gap_ns),
                item.pages.to_string(),
                item.zero_pages.to_string(),
                format!("{:.2}", mebibytes(item.bytes)),
                item.ratio.map_or_else(|| "-".to_owned(), ratio_text),
                duration_or_dash(item.received_ns),
                duration_or_dash(item.loaded_ns),
            ]
        })?;
    }
    lines.finish()
}

/// The checkpoint that a byte of the main channel belongs to; 0 is precopy.
fn checkpoint_at(streams: &Streams, byte: usize) -> Option<u64> {
    if streams.precopy.main.contains(&byte) {
        return Some(0);
    }
    let index = streams
        .checkpoints
        .partition_point(|checkpoint| checkpoint.transfer.end <= byte);
    (index < streams.checkpoints.len()).then(|| index as u64 + 1)
}

pub(super) fn list_elements(args: &InspectArgs, streams: &Streams) -> Result<(), CommandError> {
    if matches!(args.channel, Some(ChannelFilter::Multifd(_))) {
        return Err(CommandError::Usage(
            "sections are on the main channel: --kind packets lists multifd channels".to_owned(),
        ));
    }
    let mut lines = Lines::new(args.json, &args.around_list("capture"), "sections")?;
    lines.head(ELEMENT_HEAD, ELEMENT_WIDTHS)?;
    let stopped = walk_elements(args, streams, &mut lines, |element| !element.is_page)?;
    end_list(args, lines, stopped)
}

const ELEMENT_HEAD: &str = "ckpt|at s|byte|bytes|what";
const ELEMENT_WIDTHS: &[usize] = &[5, 10, 10, 7];

fn walk_elements(
    args: &InspectArgs,
    streams: &Streams,
    lines: &mut Lines,
    wanted: impl Fn(&Element) -> bool,
) -> Result<Option<String>, CommandError> {
    elements::walk(streams, |element| {
        let checkpoint = checkpoint_at(streams, element.offset);
        if !wanted(&element) || !args.wants_checkpoint(checkpoint) {
            return Ok(());
        }
        let item = ElementItem {
            channel: "main",
            checkpoint,
            at_ns: nanoseconds(streams.main.to_secondary.at(element.offset).unwrap_or_default()),
            offset: element.offset,
            bytes: element.bytes,
            what: &element.what,
        };
        lines.item(&item, || {
            vec![
                number_or_dash(item.checkpoint),
                time(item.at_ns),
                item.offset.to_string(),
                item.bytes.to_string(),
                printable(item.what),
            ]
        })
    })
}

pub(super) fn list_packets(args: &InspectArgs, streams: &Streams) -> Result<(), CommandError> {
    let mut lines = Lines::new(args.json, &args.around_list("capture"), "packets")?;
    let mut stopped = None;
    if args.wants_channel(ChannelFilter::Main) && (streams.channels.is_empty() || args.channel.is_some()) {
        // Plain mode: pages are records of the main channel.
        lines.head(ELEMENT_HEAD, ELEMENT_WIDTHS)?;
        stopped = walk_elements(args, streams, &mut lines, |element| element.is_page)?;
        return end_list(args, lines, stopped);
    }
    let channels: Vec<_> = streams
        .channels
        .iter()
        .filter(|channel| args.wants_channel(ChannelFilter::Multifd(channel.id().0)))
        .collect();
    if let (Some(ChannelFilter::Multifd(wanted)), true) = (args.channel, channels.is_empty()) {
        return Err(CommandError::Usage(format!(
            "there is no channel {wanted}: the capture has {} multifd channels",
            streams.channels.len()
        )));
    }
    let head = "channel|packet|ckpt|at s|byte|bytes|pages|zero|what";
    lines.head(head, &[7, 6, 5, 10, 10, 6, 5, 4])?;
    for channel in channels {
        for number in 0..channel.packets().len() {
            let checkpoint = packet_checkpoint(streams, channel, number);
            if !args.wants_checkpoint(checkpoint) {
                continue;
            }
            let item = packet_item(channel, number, checkpoint);
            lines.item(&item, || packet_cells(&item))?;
        }
        stopped = stopped.or(channel.stopped().map(str::to_owned));
    }
    end_list(args, lines, stopped)
}

/// The checkpoint that a packet belongs to; 0 is precopy.
fn packet_checkpoint(streams: &Streams, channel: &Channel, number: usize) -> Option<u64> {
    let place = usize::from(channel.id().0);
    if streams.precopy.packets.get(place)?.contains(&number) {
        return Some(0);
    }
    let behind = |checkpoint: &crate::streams::Checkpoint| checkpoint.packets[place].end <= number;
    let index = streams.checkpoints.partition_point(behind);
    (index < streams.checkpoints.len()).then(|| index as u64 + 1)
}

fn packet_item(channel: &Channel, number: usize, checkpoint: Option<u64>) -> PacketItem {
    let packet: Packet = channel.packets()[number];
    let bytes = channel.packet_bytes(number);
    let offset = packet.end - bytes.len();
    let at = channel.connection.to_secondary.at(offset).unwrap_or_default();
    // It was decoded once, when the capture was read.
    let header = bytes
        .first_chunk::<HEADER_LEN>()
        .and_then(|header| PacketHeader::decode(header).ok());
    let block = header
        .as_ref()
        .filter(|header| header.has_pages())
        .and_then(|header| header.block_name().ok());
    PacketItem {
        channel: channel.id().0,
        packet: number,
        checkpoint,
        at_ns: nanoseconds(at),
        offset,
        bytes: bytes.len(),
        packet_num: header.as_ref().map_or(0, PacketHeader::packet_num),
        sync: packet.sync,
        method: header.as_ref().map_or("", |header| header.method().name()),
        block: block
            .map(|name| name.escape_ascii().to_string())
            .unwrap_or_default(),
        pages: packet.normal,
        zero_pages: packet.zero,
        first_page: header.as_ref().and_then(|header| header.normal_offsets().next()),
        first_zero_page: header.as_ref().and_then(|header| header.zero_offsets().next()),
    }
}

fn packet_cells(item: &PacketItem) -> Vec<String> {
    let method = if item.pages > 0 && item.method != Method::None.name() {
        item.method
    } else {
        ""
    };
    let sync = if item.sync { "SYNC" } else { "" };
    let what = [method, item.block.as_str(), sync]
        .into_iter()
        .filter(|part| !part.is_empty());
    vec![
        item.channel.to_string(),
        item.packet.to_string(),
        number_or_dash(item.checkpoint),
        time(item.at_ns),
        item.offset.to_string(),
        item.bytes.to_string(),
        item.pages.to_string(),
        item.zero_pages.to_string(),
        what.collect::<Vec<_>>().join(" "),
    ]
}

/// Ends a list that may not go to the capture's end.
fn end_list(args: &InspectArgs, lines: Lines, stopped: Option<String>) -> Result<(), CommandError> {
    lines.finish()?;
    if let Some(stopped) = stopped {
        tell(&format!("{}: {}", args.file.display(), printable(&stopped)));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_have_three_figures_or_more() {
        let texts = [1.0, 4.766, 99.99, 99.996, 1092.27].map(ratio_text);
        assert_eq!(texts, ["1.00", "4.77", "99.99", "100", "1092"]);
    }
}
