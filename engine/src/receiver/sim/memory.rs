//! The model guest's memory: page by page what it holds, and what it held at every checkpoint. Nothing of the engine is
//! used here.

use super::rng::Rng;
use std::collections::BTreeSet;
use std::rc::Rc;

pub(super) const PAGE: usize = 4096;

/// Content of a page. The first eight bytes of no two contents are equal, but for pages of zeros.
pub(super) type Content = Rc<[u8; PAGE]>;

/// What the secondary must hold after a checkpoint.
pub(super) struct Snapshot {
    pub(super) pages: Vec<Content>,
    pub(super) device_state: Vec<u8>,
    /// Pages sent for it with content and as zero, repetitions counted.
    pub(super) sent: (u64, u64),
    /// How many bytes of each connection complete it, the main channel's first.
    pub(super) complete_at: Vec<usize>,
}

/// The guest's RAM, as the primary has it.
pub(super) struct Memory {
    pub(super) blocks: Vec<(String, usize)>,
    pub(super) pages: Vec<Content>,
    /// Pages that were written since they were last sent.
    pub(super) dirty: BTreeSet<usize>,
    zero: Content,
    versions: u64,
}

pub(super) fn is_zero(content: &Content) -> bool {
    content.iter().all(|byte| *byte == 0)
}

impl Memory {
    /// A guest before it has run: nothing of it was sent.
    pub(super) fn new(rng: &mut Rng, pages_max: usize) -> Self {
        let count = rng.range(1, 4);
        let names = [
            "pc.ram",
            "pc.bios",
            "/rom@etc/acpi/tables",
            "0000:00:02.0/vga.vram",
        ];
        let block = |name: &&str| (name.to_string(), rng.range(1, pages_max / count));
        let blocks: Vec<_> = names[..count].iter().map(block).collect();
        let all: usize = blocks.iter().map(|(_, pages)| pages).sum();
        let zero: Content = Rc::new([0; PAGE]);
        let mut memory = Self {
            blocks,
            pages: vec![zero.clone(); all],
            dirty: (0..all).collect(),
            zero,
            versions: 0,
        };
        for page in 0..all {
            memory.write(rng, page);
        }
        memory
    }

    /// The guest runs, and writes at most `most` pages: often the same as before, so that content of two checkpoints meets.
    pub(super) fn run(&mut self, rng: &mut Rng, most: usize) {
        let all = self.pages.len();
        let often = if rng.one_in(3) { all } else { all.div_ceil(8) };
        let first = rng.below(often);
        let near = rng.one_in(2);
        for step in 0..rng.below(most + 1) {
            let page = if near {
                (first + step) % all
            } else {
                rng.below(often)
            };
            self.write(rng, page);
        }
    }

    fn write(&mut self, rng: &mut Rng, page: usize) {
        self.pages[page] = self.content(rng, page);
        self.dirty.insert(page);
    }

    /// New content for a page: zeros, a small change of what it holds, or something else.
    pub(super) fn content(&mut self, rng: &mut Rng, page: usize) -> Content {
        self.versions += 1;
        let mut bytes = match rng.below(4) {
            0 => return self.zero.clone(),
            1 => *self.pages[page],
            _ => {
                let word = rng.next().to_le_bytes();
                let mut bytes = [0; PAGE];
                bytes.as_chunks_mut().0.fill(word);
                bytes
            }
        };
        bytes[..8].copy_from_slice(&self.versions.to_le_bytes());
        for _ in 0..rng.below(4) {
            let at = rng.range(8, PAGE - 1);
            bytes[at] = bytes[at].wrapping_add(1);
        }
        Rc::new(bytes)
    }

    /// The block of a page, and its byte offset there.
    pub(super) fn locate(&self, page: usize) -> (usize, u64) {
        let mut first = 0;
        for (block, (_, pages)) in self.blocks.iter().enumerate() {
            if page < first + pages {
                return (block, ((page - first) * PAGE) as u64);
            }
            first += pages;
        }
        panic!("page {page} is beyond the guest's {first}")
    }
}
