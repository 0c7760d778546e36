//! The main channel's frame: how a connection begins, the header with the configuration, section heads, footers and
//! commands (spec §2 to §5).

use super::cursor::{Cursor, Stop, put_str8};
use super::limits::MACHINE_NAME_MAX;
use super::{Parsed, WireError};
use crate::units::PAGE_SHIFT;

/// First four bytes of a main channel: "QEVM".
pub const MAIN_MAGIC: [u8; 4] = *b"QEVM";
/// First four bytes of a multifd channel, and of each of its packets.
pub const MULTIFD_MAGIC: [u8; 4] = [0x11, 0x22, 0x33, 0x44];

const STREAM_VERSION: u32 = 3;

/// Type byte that ends the sections of a stream or of a checkpoint.
pub const SECTION_EOF: u8 = 0x00;
const SECTION_START: u8 = 0x01;
const SECTION_PART: u8 = 0x02;
const SECTION_END: u8 = 0x03;
/// Type byte of a device's section.
pub const SECTION_FULL: u8 = 0x04;
const SUBSECTION: u8 = 0x05;
/// Type byte of the vmdesc.
pub const SECTION_VMDESC: u8 = 0x06;
const SECTION_CONFIGURATION: u8 = 0x07;
const SECTION_COMMAND: u8 = 0x08;
/// Type byte of a footer.
pub const SECTION_FOOTER: u8 = 0x7e;

/// Name, instance and version of the one section that comes in parts.
pub const RAM_IDSTR: &[u8] = b"ram";
/// Instance of the RAM section.
pub const RAM_INSTANCE: u32 = 0;
/// Version of the RAM section.
pub const RAM_VERSION: u32 = 4;

/// The kind of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChannelKind {
    /// The main channel, both directions.
    Main,
    /// One of the multifd channels.
    Multifd,
}

/// Recognizes the kind of a connection by its first four bytes, which are also the first bytes of its stream (spec §2).
///
/// # Errors
/// If they belong to neither kind; the error names a likely protocol.
pub fn classify(first: [u8; 4]) -> Result<ChannelKind, WireError> {
    let hint = match first {
        MAIN_MAGIC => return Ok(ChannelKind::Main),
        MULTIFD_MAGIC => return Ok(ChannelKind::Multifd),
        [0x16, 0x03, ..] => {
            " but TLS: start the receiver with --tls, or unset the parameter tls-creds on the primary"
        }
        [b'G', b'E', b'T', b' '] | [b'P', b'O', b'S', b'T'] | [b'H', b'E', b'A', b'D'] => {
            " but HTTP: this port is for QEMU's migrate command"
        }
        _ => "; only a QEMU that migrates should connect to this address",
    };
    let first = first.escape_ascii().to_string();
    Err(WireError::NotAChannel { first, hint })
}

/// The start of a main channel. A failover stream begins with the same bytes, verbatim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamHeader {
    /// Versioned machine type, for example `pc-i440fx-11.1`; printable ASCII.
    pub machine_type: String,
    /// Configuration subsection `configuration/target-page-bits`, if sent. Its value was 12.
    pub target_page_bits: bool,
    /// Configuration subsection `configuration/capabilities`, if sent. It was empty.
    pub capabilities: bool,
    /// Configuration subsection `configuration/uuid`, if sent.
    pub uuid: Option<[u8; 16]>,
}

const NAME_PAGE_BITS: &[u8] = b"configuration/target-page-bits";
const NAME_CAPABILITIES: &[u8] = b"configuration/capabilities";
const NAME_UUID: &[u8] = b"configuration/uuid";

impl StreamHeader {
    /// Parses header and configuration (spec §3). Needs one byte more than it consumes: that byte shows whether a
    /// further subsection follows. A real primary always sends more.
    ///
    /// # Errors
    /// If the stream has another format, or the primary does not send all of its RAM.
    pub fn parse(input: &[u8]) -> Parsed<Self> {
        Cursor::parse(input, |cursor| {
            expect_u32(
                cursor,
                "the magic of the main channel",
                u32::from_be_bytes(MAIN_MAGIC),
                "0x5145564d",
            )?;
            expect_u32(
                cursor,
                "the version of the stream",
                STREAM_VERSION,
                "3: use a newer QEMU",
            )?;
            let kind = cursor.u8()?;
            if kind != SECTION_CONFIGURATION {
                let remedy = "use a machine type without send-configuration=off";
                return Err(WireError::refused("a stream without configuration section", remedy).into());
            }
            let mut header = Self {
                machine_type: machine_type(cursor)?,
                target_page_bits: false,
                capabilities: false,
                uuid: None,
            };
            while cursor.peek()? == SUBSECTION {
                header.subsection(cursor)?;
            }
            Ok(header)
        })
    }

    /// Parses header and configuration that are here whole, without what follows; none if they are not valid.
    pub fn parse_whole(bytes: &[u8]) -> Option<Self> {
        let with_next = [bytes, &[0]].concat();
        Self::parse(&with_next).ok().flatten().map(|(header, _)| header)
    }

    fn subsection(&mut self, cursor: &mut Cursor<'_>) -> Result<(), Stop> {
        cursor.u8()?;
        let name = cursor.str8()?;
        expect_u32(cursor, "the version of a configuration subsection", 1, "1")?;
        let again = match name {
            NAME_PAGE_BITS => {
                expect_u32(
                    cursor,
                    "the target's page bits",
                    PAGE_SHIFT,
                    "12: pages of 4096 bytes",
                )?;
                std::mem::replace(&mut self.target_page_bits, true)
            }
            NAME_CAPABILITIES => {
                no_capabilities(cursor)?;
                std::mem::replace(&mut self.capabilities, true)
            }
            NAME_UUID => self.uuid.replace(*cursor.array()?).is_some(),
            _ => {
                let what = format!("the configuration subsection \"{}\"", name.escape_ascii());
                let remedy =
                    "only target-page-bits, capabilities and uuid are known; use another machine type";
                return Err(WireError::refused(what, remedy).into());
            }
        };
        if again {
            return Err(WireError::value("the count of one configuration subsection", 2u8, "1").into());
        }
        Ok(())
    }

    /// Appends header and configuration, subsections in QEMU's order.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&MAIN_MAGIC);
        out.extend_from_slice(&STREAM_VERSION.to_be_bytes());
        out.push(SECTION_CONFIGURATION);
        let length = u32::try_from(self.machine_type.len()).expect("a machine type has at most 255 bytes");
        out.extend_from_slice(&length.to_be_bytes());
        out.extend_from_slice(self.machine_type.as_bytes());
        if self.target_page_bits {
            put_subsection(out, NAME_PAGE_BITS, &PAGE_SHIFT.to_be_bytes());
        }
        if self.capabilities {
            put_subsection(out, NAME_CAPABILITIES, &0u32.to_be_bytes());
        }
        if let Some(uuid) = &self.uuid {
            put_subsection(out, NAME_UUID, uuid);
        }
    }
}

/// Appends the configuration subsection for capability `name`, after a header without one.
///
/// # Panics
/// If the name is longer than 255 bytes.
pub fn encode_capability(out: &mut Vec<u8>, name: &[u8]) {
    let mut body = 1u32.to_be_bytes().to_vec();
    put_str8(&mut body, name);
    put_subsection(out, NAME_CAPABILITIES, &body);
}

fn put_subsection(out: &mut Vec<u8>, name: &[u8], body: &[u8]) {
    out.push(SUBSECTION);
    put_str8(out, name);
    out.extend_from_slice(&1u32.to_be_bytes());
    out.extend_from_slice(body);
}

fn machine_type(cursor: &mut Cursor<'_>) -> Result<String, Stop> {
    let length = cursor.be32()?;
    if length == 0 || length > MACHINE_NAME_MAX {
        return Err(WireError::value("the length of the machine type", length, "1 to 255").into());
    }
    let mut name = String::with_capacity(MACHINE_NAME_MAX as usize);
    for &byte in cursor.take(length as usize)? {
        if !byte.is_ascii_graphic() {
            return Err(WireError::value("a byte of the machine type", byte, "printable ASCII").into());
        }
        name.push(char::from(byte));
    }
    Ok(name)
}

fn no_capabilities(cursor: &mut Cursor<'_>) -> Result<(), Stop> {
    if cursor.be32()? == 0 {
        return Ok(());
    }
    let what = format!("with capability {}", cursor.str8()?.escape_ascii());
    Err(WireError::refused(what, "switch this capability off: not all RAM would be sent").into())
}

fn expect_u32(
    cursor: &mut Cursor<'_>,
    field: &'static str,
    expected: u32,
    expected_text: &'static str,
) -> Result<(), Stop> {
    let seen = cursor.be32()?;
    if seen == expected {
        return Ok(());
    }
    Err(WireError::value(field, seen, expected_text).into())
}

/// An element of the main channel where a section may begin (spec §4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Section<'a> {
    /// End of the sections.
    Eof,
    /// Start of the RAM section; its body begins with the block list. The primary chooses the id.
    RamStart {
        /// Id that PART, END and footers repeat.
        id: u32,
    },
    /// A further part of a section; records follow.
    Part {
        /// The section's id.
        id: u32,
    },
    /// The last part of a section; records follow.
    End {
        /// The section's id.
        id: u32,
    },
    /// A device's section. Its body has no length: see [`super::vmdesc`].
    Full {
        /// Id that its footer repeats.
        id: u32,
        /// Name of the device's state.
        idstr: &'a [u8],
        /// Which of several devices of that name.
        instance: u32,
        /// Version of the state's format.
        version: u32,
    },
    /// JSON text of that length follows.
    VmDescription {
        /// Bytes of text.
        length: u32,
    },
    /// A whole command.
    Command(Command),
}

impl<'a> Section<'a> {
    /// Parses a section's head, or a whole command.
    ///
    /// # Errors
    /// If the type is unknown or not supported.
    pub fn parse(input: &'a [u8]) -> Parsed<Self> {
        Cursor::parse(input, |cursor| {
            Ok(match cursor.u8()? {
                SECTION_EOF => Self::Eof,
                SECTION_START => {
                    let (id, idstr, instance, version) = long_head(cursor)?;
                    check_start(idstr, instance, version)?;
                    Self::RamStart { id }
                }
                SECTION_PART => Self::Part { id: cursor.be32()? },
                SECTION_END => Self::End { id: cursor.be32()? },
                SECTION_FULL => {
                    let (id, idstr, instance, version) = long_head(cursor)?;
                    Self::Full {
                        id,
                        idstr,
                        instance,
                        version,
                    }
                }
                SECTION_VMDESC => Self::VmDescription {
                    length: cursor.be32()?,
                },
                SECTION_COMMAND => Self::Command(Command::body(cursor)?),
                other => {
                    let expected = "a section: 0x0 to 0x4, 0x6 or 0x8";
                    return Err(WireError::value("a section's type", other, expected).into());
                }
            })
        })
    }

    /// Appends the head, or the whole command.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let mut long_head = |kind: u8, id: u32, idstr: &[u8], instance: u32, version: u32| {
            out.push(kind);
            out.extend_from_slice(&id.to_be_bytes());
            put_str8(out, idstr);
            out.extend_from_slice(&instance.to_be_bytes());
            out.extend_from_slice(&version.to_be_bytes());
        };
        match *self {
            Self::Eof => out.push(SECTION_EOF),
            Self::RamStart { id } => long_head(SECTION_START, id, RAM_IDSTR, RAM_INSTANCE, RAM_VERSION),
            Self::Full {
                id,
                idstr,
                instance,
                version,
            } => long_head(SECTION_FULL, id, idstr, instance, version),
            Self::Part { id } => put_head(out, SECTION_PART, id),
            Self::End { id } => put_head(out, SECTION_END, id),
            Self::VmDescription { length } => put_head(out, SECTION_VMDESC, length),
            Self::Command(command) => command.encode(out),
        }
    }
}

fn put_head(out: &mut Vec<u8>, kind: u8, number: u32) {
    out.push(kind);
    out.extend_from_slice(&number.to_be_bytes());
}

fn long_head<'a>(cursor: &mut Cursor<'a>) -> Result<(u32, &'a [u8], u32, u32), Stop> {
    Ok((cursor.be32()?, cursor.str8()?, cursor.be32()?, cursor.be32()?))
}

fn check_start(idstr: &[u8], instance: u32, version: u32) -> Result<(), WireError> {
    let remedy = match idstr {
        RAM_IDSTR if (instance, version) == (RAM_INSTANCE, RAM_VERSION) => return Ok(()),
        RAM_IDSTR => "only instance 0, version 4 of it is known: use QEMU 7.2 to 11",
        b"dirty-bitmap" => "switch its capability dirty-bitmaps off",
        _ => "remove the device that sends its state in parts (for example VFIO)",
    };
    let name = idstr.escape_ascii();
    let what = format!("a section in parts \"{name}\" (instance {instance}, version {version})");
    Err(WireError::refused(what, remedy))
}

/// Parses the footer of section `id`.
///
/// # Errors
/// If it is not the footer of this section.
pub fn parse_footer(input: &[u8], id: u32) -> Parsed<()> {
    Cursor::parse(input, |cursor| {
        let kind = cursor.u8()?;
        if kind != SECTION_FOOTER {
            let what = format!("a section without footer (byte {kind:#x} instead of 0x7e)");
            let remedy = "use a machine type of 2.4 or later and leave send-section-footer on";
            return Err(WireError::refused(what, remedy).into());
        }
        let seen = cursor.be32()?;
        if seen == id {
            return Ok(());
        }
        Err(WireError::Mismatch {
            field: "the section id of a footer",
            seen: seen.into(),
            expected: id.into(),
        }
        .into())
    })
}

/// Appends the footer of section `id`.
pub fn encode_footer(out: &mut Vec<u8>, id: u32) {
    put_head(out, SECTION_FOOTER, id);
}

/// A command of the primary (spec §5). The session checks when each is allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// From now on return-path messages may be sent.
    OpenReturnPath,
    /// To be answered by PONG with the same value.
    Ping(u32),
    /// The primary does COLO (up to 10.0 only).
    EnableColo,
    /// The guest has been stopped; nothing to do.
    SwitchoverStart,
}

impl Command {
    fn body(cursor: &mut Cursor<'_>) -> Result<Self, Stop> {
        let command = cursor.be16()?;
        let length = cursor.be16()?;
        let expected = match command {
            2 => 4,
            1 | 8 | 11 => 0,
            _ => return Err(refused_command(command).into()),
        };
        if length != expected {
            return Err(WireError::Mismatch {
                field: "the data length of a command",
                seen: length.into(),
                expected: expected.into(),
            }
            .into());
        }
        Ok(match command {
            1 => Self::OpenReturnPath,
            2 => Self::Ping(cursor.be32()?),
            8 => Self::EnableColo,
            _ => Self::SwitchoverStart,
        })
    }

    /// Appends the command as a section.
    pub fn encode(self, out: &mut Vec<u8>) {
        let (command, data) = match self {
            Self::OpenReturnPath => (1u16, None),
            Self::Ping(value) => (2, Some(value)),
            Self::EnableColo => (8, None),
            Self::SwitchoverStart => (11, None),
        };
        out.push(SECTION_COMMAND);
        out.extend_from_slice(&command.to_be_bytes());
        out.extend_from_slice(&if data.is_some() { 4u16 } else { 0 }.to_be_bytes());
        if let Some(value) = data {
            out.extend_from_slice(&value.to_be_bytes());
        }
    }
}

fn refused_command(command: u16) -> WireError {
    let name = match command {
        3 => "POSTCOPY_ADVISE",
        4 => "POSTCOPY_LISTEN",
        5 => "POSTCOPY_RUN",
        6 => "POSTCOPY_RAM_DISCARD",
        7 => "PACKAGED",
        9 => "POSTCOPY_RESUME",
        10 => "RECV_BITMAP",
        _ => {
            let what = format!("the unknown command {command}");
            return WireError::refused(what, "use QEMU 7.2 to 11 with the capabilities in the README");
        }
    };
    let what = format!("the command {name}");
    WireError::refused(
        what,
        "switch its capability postcopy-ram (and other postcopy ones) off",
    )
}
