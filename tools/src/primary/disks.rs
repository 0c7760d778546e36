//! The synthetic guest's disks: numbered blocks, written over NBD in step with its checkpoints.
//!
//! What an epoch writes follows from the seed, the disk and the epoch alone. So what a disk must hold at a checkpoint is known
//! without having seen the session: see [`check_disk`]. Epoch 0 is written before the migration begins, epoch N between
//! the answer to checkpoint N − 1 and the request for checkpoint N; all of it is answered before that.

use super::{SynthError, SynthOptions};
use crate::nbd::{NbdClient, NbdWrite};
use crate::net::Address;
use rand::rngs::Xoshiro256PlusPlus;
use rand::{RngExt, SeedableRng};
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;
use thiserror::Error;

/// Bytes of a block.
pub const DISK_BLOCK_BYTES: u64 = BLOCK as u64;

const BLOCK: usize = 4096;
const MAGIC: u64 = 0x636f_6c6f_2d64_736b;

/// One of so many blocks is written as zeroes.
const ZERO_EVERY: u64 = 16;

/// Blocks of each epoch that are read back.
const READ_BACK: usize = 4;

/// Disks of a session.
#[derive(Clone, Debug, PartialEq)]
pub struct DiskOptions {
    /// Where the secondary serves disks.
    pub to: Address,
    /// The exports are NAME-0, NAME-1 and so on.
    pub name: String,
    /// How many.
    pub count: u8,
    /// Blocks written to each before every checkpoint.
    pub writes: u32,
}

impl DiskOptions {
    /// The export of a disk.
    #[must_use]
    pub fn export(&self, disk: u8) -> String {
        format!("{}-{disk}", self.name)
    }
}

/// A block that an epoch writes: all different ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Written {
    block: u64,
    epoch: u64,
    is_zero: bool,
}

/// What an epoch writes to a disk, in order.
fn epoch(seed: u64, disk: u8, epoch: u64, blocks: u64, writes: u32) -> Vec<Written> {
    let start = seed ^ (u64::from(disk) << 56) ^ epoch.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut random = Xoshiro256PlusPlus::seed_from_u64(start);
    let mut taken = HashSet::new();
    let drawn = (0..writes).map(|_| random.random_range(0..blocks));
    let distinct = drawn.filter(|block| taken.insert(*block));
    (0..)
        .zip(distinct.collect::<Vec<_>>())
        .map(|(number, block)| Written {
            block,
            epoch,
            is_zero: number % ZERO_EVERY == ZERO_EVERY - 1,
        })
        .collect()
}

fn content(seed: u64, disk: u8, written: Written) -> Vec<u8> {
    let Written {
        block,
        epoch,
        is_zero,
    } = written;
    if is_zero {
        return vec![0; BLOCK];
    }
    let mix = (seed ^ (block << 24) ^ (u64::from(disk) << 56)).wrapping_add(epoch);
    let word = |index: u64| match index {
        0 => MAGIC,
        1 => u64::from(disk),
        2 => block,
        3 => epoch,
        _ => mix.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(index),
    };
    (0..DISK_BLOCK_BYTES / 8)
        .flat_map(|index| word(index).to_le_bytes())
        .collect()
}

/// The connected disks.
pub(super) struct Disks {
    seed: u64,
    writes: u32,
    clients: Vec<NbdClient>,
}

impl Disks {
    /// Connects to all of them and writes epoch 0. None without disks.
    pub(super) fn connect(options: &SynthOptions) -> Result<Option<Self>, SynthError> {
        let Some(disks) = &options.disks else {
            return Ok(None);
        };
        let connect = |disk| NbdClient::connect(&disks.to, &disks.export(disk), options.patience);
        let clients: Vec<_> = (0..disks.count).map(connect).collect::<Result<_, _>>()?;
        for client in &clients {
            if client.is_read_only() || client.bytes() < DISK_BLOCK_BYTES {
                return Err(SynthError::Options("a disk must be writable and have 4096 bytes"));
            }
        }
        let mut connected = Self {
            seed: options.seed,
            writes: disks.writes,
            clients,
        };
        connected.write_epoch(0)?;
        Ok(Some(connected))
    }

    /// Writes what an epoch writes, has all of it answered, and reads some of it back. Returns how many blocks it was.
    pub(super) fn write_epoch(&mut self, number: u64) -> Result<u64, SynthError> {
        let (seed, mut count) = (self.seed, 0);
        for (disk, client) in (0..).zip(&mut self.clients) {
            let written = epoch(seed, disk, number, client.bytes() / DISK_BLOCK_BYTES, self.writes);
            count += written.len() as u64;
            let zeroes = client.has_write_zeroes();
            let write = |written: &Written| match written.is_zero && zeroes {
                true => NbdWrite::Zeroes(4096),
                false => NbdWrite::Data(content(seed, disk, *written)),
            };
            client.write_all(
                written
                    .iter()
                    .map(|one| (one.block * DISK_BLOCK_BYTES, write(one))),
            )?;
            for one in written.iter().rev().take(READ_BACK) {
                let mut found = vec![0; BLOCK];
                client.read(one.block * DISK_BLOCK_BYTES, &mut found)?;
                if found != content(seed, disk, *one) {
                    return Err(SynthError::DiskReads {
                        disk,
                        block: one.block,
                    });
                }
            }
        }
        Ok(count)
    }
}

/// What is wrong with a disk.
#[derive(Debug, Error)]
pub enum DiskCheckError {
    /// It cannot be read.
    #[error("{path}: {source}")]
    Io {
        /// The base.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// A block is of another epoch.
    #[error(
        "disk {disk}, block {block}: the checkpoint has epoch {expected}, the disk has {found}; {wrong} of {blocks} blocks differ"
    )]
    Differs {
        /// Which disk.
        disk: u8,
        /// The first that differs.
        block: u64,
        /// The epoch that wrote it last.
        expected: String,
        /// What is there.
        found: String,
        /// How many differ.
        wrong: u64,
        /// Of how many.
        blocks: u64,
    },
}

/// Checks that the file with a synthetic guest's disk is exactly as it was at a checkpoint; it held zeroes before the
/// session. Returns how many blocks were ever written.
///
/// # Errors
/// See [`DiskCheckError`].
pub fn check_disk(
    path: &Path,
    disk: u8,
    checkpoint: u64,
    seed: u64,
    writes: u32,
) -> Result<u64, DiskCheckError> {
    let failed = |source| DiskCheckError::Io {
        path: path.display().to_string(),
        source,
    };
    let mut file = File::open(path).map_err(failed)?;
    // A block device has a length for a seek alone.
    let blocks = file.seek(SeekFrom::End(0)).map_err(failed)? / DISK_BLOCK_BYTES;
    let mut last = HashMap::new();
    for number in 0..=checkpoint {
        last.extend(
            epoch(seed, disk, number, blocks, writes)
                .into_iter()
                .map(|one| (one.block, one)),
        );
    }
    let (mut wrong, mut first) = (0, None);
    let mut found = vec![0; BLOCK];
    for block in 0..blocks {
        file.read_exact_at(&mut found, block * DISK_BLOCK_BYTES)
            .map_err(failed)?;
        let expected = last
            .get(&block)
            .map_or_else(|| vec![0; BLOCK], |one| content(seed, disk, *one));
        if found != expected {
            wrong += 1;
            first.get_or_insert_with(|| (block, describe(&expected), describe(&found)));
        }
    }
    match first {
        None => Ok(last.len() as u64),
        Some((block, expected, found)) => Err(DiskCheckError::Differs {
            disk,
            block,
            expected,
            found,
            wrong,
            blocks,
        }),
    }
}

fn describe(block: &[u8]) -> String {
    let word = |index: usize| {
        block[index * 8..]
            .first_chunk()
            .map_or(0, |bytes| u64::from_le_bytes(*bytes))
    };
    match word(0) {
        MAGIC => format!("{} (of block {})", word(3), word(2)),
        _ if block.iter().all(|byte| *byte == 0) => "zeroes".to_owned(),
        other => format!("no numbered block ({other:#x})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WRITES: u32 = 40;

    /// The disk as it must be after these epochs.
    fn image(epochs: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(100 * DISK_BLOCK_BYTES).unwrap();
        for number in 0..=epochs {
            for one in epoch(7, 1, number, 100, WRITES) {
                let at = one.block * DISK_BLOCK_BYTES;
                file.as_file().write_all_at(&content(7, 1, one), at).unwrap();
            }
        }
        file
    }

    #[test]
    fn a_disk_of_the_same_checkpoint_agrees_and_another_does_not() {
        let file = image(5);
        assert!(check_disk(file.path(), 1, 5, 7, WRITES).unwrap() > u64::from(WRITES));
        for (checkpoint, found) in [(4, "has 5"), (6, "has ")] {
            let error = check_disk(file.path(), 1, checkpoint, 7, WRITES).unwrap_err();
            assert!(error.to_string().contains(found), "{error}");
        }
        file.as_file().write_all_at(&[1], 0).unwrap();
        assert!(check_disk(file.path(), 1, 5, 7, WRITES).is_err());
    }

    #[test]
    fn epochs_write_different_blocks_some_of_them_zeroes() {
        let written = epoch(1, 0, 3, 1000, 64);
        let blocks: HashSet<_> = written.iter().map(|one| one.block).collect();
        assert_eq!(blocks.len(), written.len());
        assert!(written.iter().any(|one| one.is_zero) && written.len() > 50);
        assert_ne!(written, epoch(1, 1, 3, 1000, 64));
    }
}
