//! A capture: its connections as they are in the file, and the session in them as the protocol sees it.
//!
//! The connections are read record by record and need no memory; everything else is found by [`Streams`], which holds
//! the capture whole, up to half of the machine's memory.

use super::elements::{self, Element};
use super::{ChannelFilter, InspectArgs, Kind};
use crate::capture_file::{
    CaptureError, CaptureInfo, CaptureReader, ConnectionId, Direction, EndKind, Event, Record,
};
use crate::output::{CommandError, Lines, print, print_json, printable, table, tell};
use crate::streams::{Channel, Packet, Streams, StreamsError};
use colo_ring::metrics::display_nanoseconds;
use colo_ring::wire::multifd::{HEADER_LEN, PacketHeader};
use serde::Serialize;
use std::path::Path;
use std::time::Duration;

/// Letters of a label that are kept: there may be 65536 connections.
const LABEL_MAX: usize = 120;

/// What is in the file, without a look at what it means.
#[derive(Serialize)]
struct Overview {
    info: CaptureInfo,
    records: u64,
    connections: Vec<ConnectionOverview>,
    finished: bool,
    torn: Option<String>,
}

#[derive(Serialize)]
struct ConnectionOverview {
    connection: ConnectionId,
    label: String,
    opened_ns: u64,
    to_secondary: DirectionOverview,
    to_primary: DirectionOverview,
}

#[derive(Default, Serialize)]
struct DirectionOverview {
    bytes: u64,
    records: u64,
    first_ns: Option<u64>,
    last_ns: Option<u64>,
    end: Option<EndKind>,
}

/// The session in it.
#[derive(Serialize)]
struct SessionOverview {
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

/// A checkpoint in the list. All times are the capture's.
#[derive(Serialize)]
struct CheckpointItem {
    checkpoint: u64,
    at_ns: u64,
    /// From the request before.
    gap_ns: Option<u64>,
    /// Where CHECKPOINT_REQUEST is on the main channel.
    main_offset: usize,
    pages: u64,
    zero_pages: u64,
    bytes: u64,
    device_state_bytes: usize,
    syncs: u64,
    /// From VMSTATE_SEND.
    received_ns: Option<u64>,
    loaded_ns: Option<u64>,
}

/// A multifd packet in the list.
#[derive(Serialize)]
struct PacketItem {
    channel: u8,
    packet: usize,
    checkpoint: Option<u64>,
    at_ns: u64,
    offset: usize,
    bytes: usize,
    packet_num: u64,
    sync: bool,
    method: &'static str,
    block: String,
    pages: u16,
    zero_pages: u16,
    /// Offsets in the block, of the first page with content and the first zero page.
    first_page: Option<u64>,
    first_zero_page: Option<u64>,
}

/// An element of the main channel in the list.
#[derive(Serialize)]
struct ElementItem<'a> {
    channel: &'static str,
    checkpoint: Option<u64>,
    at_ns: u64,
    offset: usize,
    bytes: usize,
    what: &'a str,
}

pub(super) fn run(args: &InspectArgs) -> Result<(), CommandError> {
    let kinds = [
        Kind::Connections,
        Kind::Checkpoints,
        Kind::Sections,
        Kind::Packets,
    ];
    args.allow("a capture", &kinds, true)?;
    let failed = |error: StreamsError| CommandError::Failed(format!("{}: {error}", args.file.display()));
    match args.kind {
        None | Some(Kind::Connections) => overview(args),
        Some(kind) => {
            let streams = Streams::load(&args.file).map_err(failed)?;
            for note in &streams.notes {
                tell(&format!("{}: {}", args.file.display(), printable(note)));
            }
            match kind {
                Kind::Checkpoints => list_checkpoints(args, &streams),
                Kind::Sections => list_elements(args, &streams),
                _ => list_packets(args, &streams),
            }
        }
    }
}

fn overview(args: &InspectArgs) -> Result<(), CommandError> {
    #[derive(Serialize)]
    struct Content<'a> {
        capture: &'a Overview,
        session: Option<&'a SessionOverview>,
        /// Why there is none.
        no_session: Option<&'a str>,
    }
    let file = Overview::read(&args.file)
        .map_err(|error| CommandError::Failed(format!("{}: {error}", args.file.display())))?;
    let session = match args.kind {
        None => Some(Streams::load(&args.file).map(|streams| SessionOverview::of(&streams))),
        // The connections alone were asked for: they need no memory.
        Some(_) => None,
    };
    let reason = match &session {
        Some(Err(error)) => Some(error.to_string()),
        _ => None,
    };
    let session = session.and_then(Result::ok);
    if args.json {
        return print_json(&args.inspection(
            "capture",
            Content {
                capture: &file,
                session: session.as_ref(),
                no_session: reason.as_deref(),
            },
        ));
    }
    let mut text = file.render();
    if let Some(session) = &session {
        text.push_str(&session.render());
    }
    if let Some(reason) = reason {
        text.push_str(&format!("\nno session can be shown: {reason}\n"));
    }
    print(&text)
}

impl Overview {
    fn read(path: &Path) -> Result<Self, CaptureError> {
        let mut reader = CaptureReader::open(path)?;
        let mut overview = Self {
            info: reader.info().clone(),
            records: 0,
            connections: Vec::new(),
            finished: false,
            torn: None,
        };
        while let Some(record) = reader.next()? {
            overview.take(&record);
        }
        overview.torn = reader.is_torn().map(|tear| tear.to_string());
        Ok(overview)
    }

    fn take(&mut self, record: &Record<'_>) {
        self.records += 1;
        let at_ns = nanoseconds(record.at);
        match record.event {
            Event::Open { connection, label } => self.connections.push(ConnectionOverview {
                connection,
                label: label.chars().take(LABEL_MAX).collect(),
                opened_ns: at_ns,
                to_secondary: DirectionOverview::default(),
                to_primary: DirectionOverview::default(),
            }),
            Event::Data {
                connection,
                direction,
                bytes,
            } => {
                if let Some(side) = self.side(connection, direction) {
                    side.bytes += bytes.len() as u64;
                    side.records += 1;
                    side.first_ns.get_or_insert(at_ns);
                    side.last_ns = Some(at_ns);
                }
            }
            Event::End {
                connection,
                direction,
                how,
            } => {
                if let Some(side) = self.side(connection, direction) {
                    side.end = Some(how);
                }
            }
            Event::Note(_) => {}
            Event::Finish(_) => self.finished = true,
        }
    }

    /// The reader has checked that it was opened.
    fn side(&mut self, connection: ConnectionId, direction: Direction) -> Option<&mut DirectionOverview> {
        let connection = self.connections.get_mut(usize::from(connection.0))?;
        Some(match direction {
            Direction::ToSecondary => &mut connection.to_secondary,
            Direction::ToPrimary => &mut connection.to_primary,
        })
    }

    fn render(&self) -> String {
        let info = &self.info;
        let or_unknown =
            |side: &Option<String>| side.as_deref().map_or_else(|| "unknown".to_owned(), printable);
        let mut text = format!(
            "a capture ({}), {} records; primary {}, secondary {}\nmachine: {}\noptions: {}\n",
            printable(&info.captured),
            self.records,
            or_unknown(&info.primary),
            or_unknown(&info.secondary),
            printable(&info.machine.to_string()),
            printable(&info.options.to_string()),
        );
        if let Some(torn) = &self.torn {
            text.push_str(&format!("it ends early, {torn}\n"));
        }
        text.push('\n');
        let head = [
            "connection",
            "opened",
            "to secondary",
            "last",
            "end",
            "to primary",
            "last",
            "end",
            "label",
        ];
        let mut rows = vec![head.map(str::to_owned).to_vec()];
        for connection in &self.connections {
            let side = |side: &DirectionOverview| {
                let end = match side.end {
                    None => "open",
                    Some(EndKind::Eof) => "eof",
                    Some(EndKind::Reset) => "reset",
                };
                [side.bytes.to_string(), time_or_dash(side.last_ns), end.to_owned()]
            };
            let mut row = vec![connection.connection.to_string(), time(connection.opened_ns)];
            row.extend(side(&connection.to_secondary));
            row.extend(side(&connection.to_primary));
            row.push(printable(&connection.label));
            rows.push(row);
        }
        text.push_str(&table(&rows));
        text
    }
}

impl SessionOverview {
    fn of(streams: &Streams) -> Self {
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

    fn render(&self) -> String {
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

fn checkpoint_items(streams: &Streams) -> Vec<CheckpointItem> {
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
            device_state_bytes: checkpoint.device_state.len(),
            syncs: checkpoint.syncs,
            received_ns: since(answers.and_then(|answers| answers.received)),
            loaded_ns: since(answers.and_then(|answers| answers.loaded)),
        });
    }
    items
}

fn list_checkpoints(args: &InspectArgs, streams: &Streams) -> Result<(), CommandError> {
    let mut lines = Lines::new(args.json, &args.inspection("capture", ()), "checkpoints")?;
    let head = "checkpoint|at|gap|main byte|pages|zero|bytes|device state|syncs|received|loaded";
    lines.head(head, &[10, 11, 9, 12, 8, 8, 12, 12, 5, 9, 9])?;
    for item in checkpoint_items(streams) {
        if !args.wants_checkpoint(Some(item.checkpoint)) {
            continue;
        }
        lines.item(&item, || {
            vec![
                item.checkpoint.to_string(),
                time(item.at_ns),
                duration_or_dash(item.gap_ns),
                item.main_offset.to_string(),
                item.pages.to_string(),
                item.zero_pages.to_string(),
                item.bytes.to_string(),
                item.device_state_bytes.to_string(),
                item.syncs.to_string(),
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

fn list_elements(args: &InspectArgs, streams: &Streams) -> Result<(), CommandError> {
    if matches!(args.channel, Some(ChannelFilter::Multifd(_))) {
        return Err(CommandError::Usage(
            "sections are on the main channel: --kind packets lists multifd channels".to_owned(),
        ));
    }
    let mut lines = Lines::new(args.json, &args.inspection("capture", ()), "sections")?;
    lines.head(ELEMENT_HEAD, ELEMENT_WIDTHS)?;
    let stopped = walk_elements(args, streams, &mut lines, |element| !element.is_page)?;
    end_list(args, lines, stopped)
}

const ELEMENT_HEAD: &str = "channel|checkpoint|at|byte|bytes|what";
const ELEMENT_WIDTHS: &[usize] = &[7, 10, 11, 12, 9];

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
                "main".to_owned(),
                number_or_dash(item.checkpoint),
                time(item.at_ns),
                item.offset.to_string(),
                item.bytes.to_string(),
                printable(item.what),
            ]
        })
    })
}

fn list_packets(args: &InspectArgs, streams: &Streams) -> Result<(), CommandError> {
    let mut lines = Lines::new(args.json, &args.inspection("capture", ()), "packets")?;
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
    let head = "channel|packet|checkpoint|at|byte|bytes|num|pages|zero|first page|first zero|method|block";
    lines.head(head, &[7, 7, 10, 11, 12, 9, 8, 5, 5, 12, 12, 6, 10])?;
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
    let hex = |offset: Option<u64>| offset.map_or_else(|| "-".to_owned(), |offset| format!("{offset:#x}"));
    let block = match (item.block.as_str(), item.sync) {
        ("", true) => "SYNC".to_owned(),
        (block, true) => format!("{block} SYNC"),
        (block, false) => block.to_owned(),
    };
    vec![
        item.channel.to_string(),
        item.packet.to_string(),
        number_or_dash(item.checkpoint),
        time(item.at_ns),
        item.offset.to_string(),
        item.bytes.to_string(),
        item.packet_num.to_string(),
        item.pages.to_string(),
        item.zero_pages.to_string(),
        hex(item.first_page),
        hex(item.first_zero_page),
        item.method.to_owned(),
        block,
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

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// A time since the start of the capture.
fn time(nanoseconds: u64) -> String {
    format!("{:.6}", nanoseconds as f64 / 1e9)
}

fn time_or_dash(nanoseconds: Option<u64>) -> String {
    nanoseconds.map_or_else(|| "-".to_owned(), time)
}

fn duration_or_dash(nanoseconds: Option<u64>) -> String {
    nanoseconds.map_or_else(|| "-".to_owned(), display_nanoseconds)
}

fn number_or_dash(number: Option<u64>) -> String {
    number.map_or_else(|| "-".to_owned(), |number| number.to_string())
}

fn median(values: impl Iterator<Item = u64>) -> Option<u64> {
    let mut values: Vec<_> = values.collect();
    values.sort_unstable();
    values.get(values.len() / 2).copied()
}
