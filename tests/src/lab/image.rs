//! The test guest's memory, checked from outside: its table of generations and its pages belong to one instant.
//!
//! This needs no stopped primary, so it holds for any committed image. The layout is that of `tests/guest/dirtier.S`.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::{Content, LabError, TestGuest};

const PAGE_BYTES: usize = 4096;
const TABLE_OFFSET: u64 = 0x20_0000;
const REGION_OFFSET: u64 = 0x80_0000;
const MAGIC: u32 = 0x5254_494d;
const ZERO_BIT: u32 = 1 << 31;
/// The guest enters a page in its table just before it writes it, so one page may be between the two.
const BEHIND_MAX: u64 = 1;

/// Checks every page that the test guest has written, in a file with its RAM.
///
/// # Errors
/// [`LabError::RamDiffers`] if more pages than the one being written are not what the guest's table says;
/// [`LabError::Malformed`] if the guest has written nothing.
pub fn check_test_guest_image(image: &Path, guest: &TestGuest) -> Result<(), LabError> {
    let file = File::open(image).map_err(LabError::io(format!("open {}", image.display())))?;
    let read = |at: u64, buffer: &mut [u8]| {
        file.read_exact_at(buffer, at)
            .map_err(LabError::io(format!("read {} at {at:#x}", image.display())))
    };
    let pages_total = u64::from(guest.region_mib) << 8;
    let (mut written, mut wrong, mut first) = (0, 0, 0);
    let mut found = [0; PAGE_BYTES];
    for (index, offset) in (0_u32..)
        .zip((REGION_OFFSET..).step_by(PAGE_BYTES))
        .take(guest.region_mib as usize * 256)
    {
        let mut entry = [0; 4];
        read(TABLE_OFFSET + u64::from(index) * 4, &mut entry)?;
        let generation = u32::from_le_bytes(entry);
        if generation == 0 {
            continue;
        }
        written += 1;
        read(offset, &mut found)?;
        if found != page_content(index, generation, guest.content) {
            if wrong == 0 {
                first = offset;
            }
            wrong += 1;
        }
    }
    if written == 0 {
        return Err(LabError::Malformed {
            what: "the test guest's image".into(),
            detail: "no page is written".into(),
        });
    }
    if wrong > BEHIND_MAX {
        let detail = format!("{written} pages are written by the guest's table; one may be in writing");
        return Err(LabError::RamDiffers {
            pages: wrong,
            pages_total,
            first,
            detail,
        });
    }
    Ok(())
}

/// What the guest writes to a page: four 32-bit lanes, each counting up by an odd step of its own. The constants are those
/// of `tests/guest/dirtier.S`.
fn page_content(index: u32, generation: u32, content: Content) -> [u8; PAGE_BYTES] {
    let mut page = [0; PAGE_BYTES];
    if generation & ZERO_BIT != 0 {
        return page;
    }
    let mix = generation.wrapping_mul(0x9e37_79b1) ^ index.wrapping_mul(0x85eb_ca6b);
    let mut lanes = [index, generation, mix, MAGIC];
    let mut step = mix | 1;
    let steps = std::array::from_fn::<u32, 4, _>(|lane| {
        if lane > 0 {
            step = step.wrapping_mul(0x41c6_4e6d);
        }
        step
    });
    for (vector, bytes) in page.chunks_exact_mut(16).enumerate() {
        for (lane, word) in lanes.iter().zip(bytes.chunks_exact_mut(4)) {
            word.copy_from_slice(&lane.to_le_bytes());
        }
        let repeats = matches!(content, Content::Compressible) && vector % 4 != 0;
        if !repeats {
            lanes = std::array::from_fn(|lane| lanes[lane].wrapping_add(steps[lane]));
        }
    }
    page
}
