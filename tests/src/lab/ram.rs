//! Bit-for-bit comparison of guest memory.

use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::model::Model;

use super::{Dump, LabError};

const PAGE: usize = 4096;
const PAGE_BYTES: u64 = 4096;

/// Guest-physical addresses where `pmemsave` may read firmware ROM instead of the RAM block (spec §15).
const FIRMWARE: Range<u64> = 0xe_0000..0x10_0000;
/// Guest-physical addresses where `pmemsave` reads the VGA card instead of the RAM block.
const VGA_WINDOW: Range<u64> = 0xa_0000..0xc_0000;

/// A primary's RAM as the primary itself saved it.
#[derive(Debug)]
pub struct SavedRam {
    by_pmemsave: PathBuf,
    block: Option<PathBuf>,
}

impl SavedRam {
    pub(super) fn new(by_pmemsave: PathBuf, block: Option<PathBuf>) -> Self {
        Self { by_pmemsave, block }
    }

    /// Compares a RAM block's image with it, bit for bit. Where the machine has a VGA card, its RAM is a file, and
    /// every page of that is compared too; else all but the firmware's range.
    ///
    /// # Errors
    /// [`LabError::RamDiffers`] with the ranges that differ.
    pub fn assert_equal(&self, image: &Path) -> Result<(), LabError> {
        let Some(block) = &self.block else {
            return assert_same_files(image, &self.by_pmemsave, &[FIRMWARE]);
        };
        assert_same_files(image, block, &[])?;
        assert_same_files(image, &self.by_pmemsave, &[FIRMWARE, VGA_WINDOW])
    }
}

impl Dump {
    /// Compares all of a dumped checkpoint with what a naive reading of the recorded session makes of the same bytes.
    ///
    /// # Errors
    /// [`LabError::RamDiffers`] with the ranges that differ; [`LabError::Malformed`] if anything else does.
    pub fn assert_equal(&self, model: &Model) -> Result<(), LabError> {
        let found = (self.checkpoint(), self.block_count());
        let expected = (model.checkpoints, model.blocks.len());
        if found != expected {
            return Err(LabError::Malformed {
                what: "the dump".into(),
                detail: format!(
                    "its checkpoint and number of blocks are {found:?}, recorded are {expected:?}"
                ),
            });
        }
        for (name, content) in &model.blocks {
            let image = self.block(&String::from_utf8_lossy(name))?;
            let recorded = (content.as_slice(), content.len() as u64);
            assert_same(open(&image)?, recorded, &image, &[])?;
        }
        if self.device_state()? != model.device_state {
            return Err(LabError::Malformed {
                what: "the dump's device state".into(),
                detail: "it is not what was recorded".into(),
            });
        }
        Ok(())
    }
}

/// Compares a file of RAM with another one; pages inside `exempt` are passed over.
///
/// # Errors
/// [`LabError::RamDiffers`] with the ranges that differ; [`LabError::Malformed`] if the sizes do.
fn assert_same_files(image: &Path, saved: &Path, exempt: &[Range<u64>]) -> Result<(), LabError> {
    assert_same(open(image)?, open(saved)?, image, exempt)
}

/// The same of what is behind the two, each with its bytes.
fn assert_same(
    (mut image_file, image_bytes): (impl Read, u64),
    (mut saved_file, saved_bytes): (impl Read, u64),
    image: &Path,
    exempt: &[Range<u64>],
) -> Result<(), LabError> {
    if image_bytes != saved_bytes || image_bytes == 0 || image_bytes % PAGE_BYTES != 0 {
        return Err(LabError::Malformed {
            what: format!("the size of {}", image.display()),
            detail: format!("{image_bytes} bytes, expected are {saved_bytes}"),
        });
    }
    let mut differing: Vec<Range<u64>> = Vec::new();
    let (mut image_page, mut saved_page) = ([0; PAGE], [0; PAGE]);
    for start in (0..image_bytes).step_by(PAGE) {
        read_page(&mut image_file, image, &mut image_page)?;
        read_page(&mut saved_file, image, &mut saved_page)?;
        if image_page == saved_page || exempt.iter().any(|range| range.contains(&start)) {
            continue;
        }
        match differing.last_mut() {
            Some(last) if last.end == start => last.end += PAGE_BYTES,
            _ => differing.push(start..start + PAGE_BYTES),
        }
    }
    let Some(first) = differing.first() else {
        return Ok(());
    };
    const SHOWN_MAX: usize = 20;
    let shown: Vec<String> = differing
        .iter()
        .take(SHOWN_MAX)
        .map(|range| format!("{:#x}..{:#x}", range.start, range.end))
        .collect();
    Err(LabError::RamDiffers {
        pages: differing
            .iter()
            .map(|range| (range.end - range.start) / PAGE_BYTES)
            .sum(),
        pages_total: image_bytes / PAGE_BYTES,
        first: first.start,
        detail: format!("{} ranges: {}", differing.len(), shown.join(", ")),
    })
}

fn open(path: &Path) -> Result<(std::io::BufReader<File>, u64), LabError> {
    let file = File::open(path).map_err(LabError::io(format!("open {}", path.display())))?;
    let bytes = file
        .metadata()
        .map_err(LabError::io(format!("stat {}", path.display())))?
        .len();
    Ok((std::io::BufReader::with_capacity(1 << 20, file), bytes))
}

fn read_page(file: &mut impl Read, path: &Path, page: &mut [u8; PAGE]) -> Result<(), LabError> {
    file.read_exact(page)
        .map_err(LabError::io(format!("read {}", path.display())))
}
