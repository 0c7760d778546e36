//! A buffer for device state: it grows by what has arrived, never by what was announced, and says before how much memory it will take.

use super::WireError;

/// Least that it is made with.
const FIRST_BYTES: usize = 64 << 10;

/// The capacity that `buffer` has after [`extend`] by so many bytes. It never has more than `most` bytes.
pub(crate) fn capacity_after(buffer: &Vec<u8>, more: usize, most: usize) -> usize {
    let needed = buffer.len().saturating_add(more);
    if needed <= buffer.capacity() {
        return buffer.capacity();
    }
    let doubled = buffer.capacity().saturating_mul(2).max(FIRST_BYTES);
    doubled.min(most).max(needed)
}

/// Appends bytes.
///
/// # Errors
/// If there is no memory for them.
pub(crate) fn extend(buffer: &mut Vec<u8>, bytes: &[u8], most: usize) -> Result<(), WireError> {
    let capacity = capacity_after(buffer, bytes.len(), most);
    let reserved = buffer.try_reserve_exact(capacity - buffer.len());
    reserved.map_err(|_| no_memory(capacity))?;
    buffer.extend_from_slice(bytes);
    Ok(())
}

/// A copy of `bytes`.
///
/// # Errors
/// If there is no memory for it.
pub(crate) fn copy(bytes: &[u8]) -> Result<Vec<u8>, WireError> {
    let mut copy = Vec::new();
    let reserved = copy.try_reserve_exact(bytes.len());
    reserved.map_err(|_| no_memory(bytes.len()))?;
    copy.extend_from_slice(bytes);
    Ok(copy)
}

fn no_memory(bytes: usize) -> WireError {
    WireError::NoMemory {
        what: "device state",
        bytes: bytes as u64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_has_the_capacity_that_it_said() {
        const MOST: usize = 1 << 20;
        let mut buffer = Vec::new();
        for piece in [1, 100, 65_536, 3, 700_000, 200_000] {
            let said = capacity_after(&buffer, piece, MOST);
            extend(&mut buffer, &vec![7; piece], MOST).unwrap();
            assert_eq!(buffer.capacity(), said, "after {} bytes", buffer.len());
            assert!(said <= MOST);
        }
        assert_eq!(copy(&buffer).unwrap(), buffer);
    }

    #[test]
    fn what_cannot_be_had_is_an_error() {
        let mut buffer = vec![1];
        let huge = capacity_after(&buffer, usize::MAX / 2, usize::MAX);
        assert!(buffer.try_reserve_exact(huge).is_err());
        assert_eq!(
            no_memory(5).to_string(),
            "there is no memory for 5 bytes of device state"
        );
    }
}
