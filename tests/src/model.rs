//! A second, naive reading of a captured session, straight from the wire specification: no code of the engine, all
//! bytes at hand, one epoch after the other. What the engine makes of the same session must be equal to it.

use crate::capture::Capture;
use std::collections::HashSet;

const PAGE: usize = 4096;
const HEADER: usize = 1344;

/// The state after the last complete checkpoint.
#[derive(Debug, Default)]
pub struct Model {
    /// Content of every block, by name.
    pub blocks: Vec<(Vec<u8>, Vec<u8>)>,
    /// The device state.
    pub device_state: Vec<u8>,
    /// Complete checkpoints after the initial state.
    pub checkpoints: u64,
    /// Pages that were received in one epoch twice.
    pub twice: usize,
    /// Deltas.
    pub deltas: u64,
    /// The commands' numbers, in their order.
    pub commands: Vec<usize>,
    /// SYNC packets with pages.
    pub syncs_with_pages: usize,
    /// Packets without pages that announce a payload, which does not come.
    pub stale_sizes: usize,
    current: Vec<u8>,
    continued: usize,
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> &'a [u8] {
        let taken = &self.bytes[self.at..self.at + count];
        self.at += count;
        taken
    }

    fn number(&mut self, bytes: usize) -> u64 {
        self.take(bytes)
            .iter()
            .fold(0, |number, byte| number << 8 | u64::from(*byte))
    }

    fn count(&mut self, bytes: usize) -> usize {
        usize::try_from(self.number(bytes)).expect("a small number")
    }

    fn string(&mut self) -> &'a [u8] {
        let length = self.count(1);
        self.take(length)
    }

    /// The length of a run in a delta: seven bits, and seven more where the first byte says so.
    fn run(&mut self) -> usize {
        let low = self.count(1);
        if low < 0x80 {
            return low;
        }
        (low & 0x7f) | self.count(1) << 7
    }

    fn left(&self) -> usize {
        self.bytes.len() - self.at
    }
}

impl Model {
    /// Plays the whole capture.
    pub fn of(capture: &Capture) -> Self {
        Self::at(capture, u64::MAX)
    }

    /// Plays a capture up to this checkpoint, or its end.
    pub fn at(capture: &Capture, checkpoint: u64) -> Self {
        let mut model = Self::default();
        let mut channels: Vec<Reader<'_>> = capture
            .connections
            .iter()
            .enumerate()
            .filter(|(position, _)| *position != capture.main)
            // Behind the init packet.
            .map(|(_, bytes)| Reader { bytes, at: 64 })
            .collect();
        let mut main = Reader {
            bytes: &capture.connections[capture.main],
            at: 8 + 1,
        };
        let name = main.count(4);
        main.take(name);
        let mut flush_marks = false;
        while model.section(&mut main, &mut channels, &mut flush_marks) {}
        let text = find_vmdesc(main.bytes, main.at);
        model.commit(main.bytes[main.at..=text.0].to_vec());
        main.at = text.1;
        while model.checkpoints < checkpoint
            && main.left() > 0
            && model.checkpoint(&mut main, &mut channels, &mut flush_marks)
        {
            model.checkpoints += 1;
        }
        model
    }

    /// One section before the device state; false when that begins.
    fn section(
        &mut self,
        main: &mut Reader<'_>,
        channels: &mut [Reader<'_>],
        flush_marks: &mut bool,
    ) -> bool {
        match main.bytes[main.at] {
            0x08 => {
                main.take(1);
                let command = main.count(2);
                let length = main.count(2);
                main.take(length);
                self.commands.push(command);
            }
            kind @ 0x01..=0x03 => {
                main.take(5);
                if kind == 1 {
                    main.string();
                    main.take(8);
                }
                self.body(main, channels, kind == 1, flush_marks);
                main.take(5);
            }
            _ => return false,
        }
        true
    }

    fn body(
        &mut self,
        main: &mut Reader<'_>,
        channels: &mut [Reader<'_>],
        start: bool,
        flush_marks: &mut bool,
    ) {
        loop {
            let word = main.number(8);
            let (flags, high) = (word & 0xfff, usize::try_from(word >> 12 << 12).expect("64 bits"));
            match flags & !0x20 {
                0x04 => {
                    let mut sum = 0;
                    while sum < high {
                        let name = main.string().to_vec();
                        let length = main.count(8);
                        self.blocks.push((name, vec![0; length]));
                        sum += length;
                    }
                    self.current = vec![0; sum];
                }
                0x02 => {
                    let block = self.block_of(main, flags);
                    main.take(1);
                    self.page(block, high, &[0; PAGE]);
                }
                0x08 => {
                    let block = self.block_of(main, flags);
                    let page = main.take(PAGE).to_vec();
                    self.page(block, high, &page);
                }
                0x40 => {
                    let block = self.block_of(main, flags);
                    self.delta(block, high, main);
                }
                0x200 => {
                    *flush_marks |= start;
                    self.epoch(channels);
                }
                0x10 => {
                    if !*flush_marks {
                        self.epoch(channels);
                    }
                    return;
                }
                other => panic!("flags {other:#x} at {}", main.at),
            }
        }
    }

    fn block_of(&mut self, main: &mut Reader<'_>, flags: u64) -> usize {
        if flags & 0x20 == 0 {
            self.continued = self.named(main.string());
        }
        self.continued
    }

    fn named(&self, name: &[u8]) -> usize {
        self.blocks
            .iter()
            .position(|(known, _)| known == name)
            .expect("a block of the list")
    }

    fn begin_of(&self, block: usize) -> usize {
        self.blocks[..block]
            .iter()
            .map(|(_, content)| content.len())
            .sum()
    }

    fn page(&mut self, block: usize, offset: usize, content: &[u8]) {
        assert!(
            offset + PAGE <= self.blocks[block].1.len(),
            "the page lies in its block"
        );
        let at = self.begin_of(block) + offset;
        self.current[at..at + PAGE].copy_from_slice(content);
    }

    /// A delta (XBZRLE) against what the page holds now: bytes to leave, bytes to replace, in turn.
    fn delta(&mut self, block: usize, offset: usize, main: &mut Reader<'_>) {
        assert_eq!(main.number(1), 1, "the only encoding");
        let length = main.count(2);
        let mut delta = Reader {
            bytes: main.take(length),
            at: 0,
        };
        let begin = self.begin_of(block) + offset;
        let page = &mut self.current[begin..begin + PAGE];
        let mut at = 0;
        while delta.left() > 0 {
            at += delta.run();
            let replaced = delta.run();
            page[at..at + replaced].copy_from_slice(delta.take(replaced));
            at += replaced;
        }
        self.deltas += 1;
    }

    /// Everything on the channels up to and including their next SYNC.
    fn epoch(&mut self, channels: &mut [Reader<'_>]) {
        let mut seen = HashSet::new();
        for channel in channels {
            loop {
                let header = channel.take(HEADER);
                let number = |at: usize, length: usize| Reader { bytes: header, at }.count_of(length);
                let (flags, normal, zero) = (number(8, 4), number(16, 4), number(32, 4));
                let has_pages = normal + zero > 0;
                self.syncs_with_pages += usize::from(flags & 1 != 0 && has_pages);
                self.stale_sizes += usize::from(number(20, 4) != 0 && !has_pages);
                if has_pages {
                    let name = header[64..320].split(|byte| *byte == 0).next().expect("a name");
                    let block = self.named(name);
                    for entry in 0..normal + zero {
                        let offset = number(320 + 8 * entry, 8);
                        let content = if entry < normal {
                            channel.take(PAGE).to_vec()
                        } else {
                            vec![0; PAGE]
                        };
                        self.page(block, offset, &content);
                        self.twice += usize::from(!seen.insert((block, offset)));
                    }
                }
                if flags & 1 != 0 {
                    break;
                }
            }
        }
    }

    fn commit(&mut self, device_state: Vec<u8>) {
        self.device_state = device_state;
        let mut at = 0;
        for (_, content) in &mut self.blocks {
            let length = content.len();
            content.copy_from_slice(&self.current[at..at + length]);
            at += length;
        }
    }

    /// One checkpoint; false if the capture ends in the middle of it.
    fn checkpoint(
        &mut self,
        main: &mut Reader<'_>,
        channels: &mut [Reader<'_>],
        flush_marks: &mut bool,
    ) -> bool {
        if main.left() < 8 {
            return false;
        }
        assert_eq!((main.number(4), main.number(4)), (1, 3), "REQUEST and SEND");
        // The recording may end right behind SEND; it does not end inside the few bytes of sections.
        while main.left() > 0 && main.bytes[main.at] != 0 {
            self.section(main, channels, flush_marks);
        }
        if main.left() == 0 {
            return false;
        }
        main.take(1);
        assert_eq!(main.number(4), 4, "SIZE");
        let length = main.count(8);
        if main.left() < length {
            return false;
        }
        let blob = main.take(length).to_vec();
        self.commit(blob);
        true
    }
}

impl Reader<'_> {
    fn count_of(mut self, bytes: usize) -> usize {
        self.count(bytes)
    }
}

/// Position of the EOF byte before the vmdesc, and of the byte behind the vmdesc.
fn find_vmdesc(bytes: &[u8], from: usize) -> (usize, usize) {
    for at in from..bytes.len() - 6 {
        if bytes[at] == 0 && bytes[at + 1] == 6 && bytes[at + 6] == b'{' {
            let end = at + 6 + Reader { bytes, at: at + 2 }.count_of(4);
            let next = bytes.get(end..end + 4);
            if end == bytes.len() || next == Some(&[0, 0, 0, 1]) {
                return (at, end);
            }
        }
    }
    panic!("no vmdesc")
}
