//! Open files that pass from one process to another over a UNIX socket, with the bytes of a request.
//!
//! Whoever asks for something to be written opens the destination, with its own rights, and passes it: the process that writes needs no
//! right to open anything.

use rustix::cmsg_space;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Most files of one message, the kernel's limit.
const MESSAGE_FILES_MAX: usize = 253;

/// What was received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    /// Bytes; 0 is the end.
    pub bytes: usize,
    /// Whether files were lost, because this process has too many open.
    pub files_lost: bool,
}

/// Sends `bytes`, and `files` with them.
///
/// # Errors
/// Those of the socket; and if there are so many files for so few bytes that they cannot go with them.
pub fn send(socket: impl AsFd, mut bytes: &[u8], mut files: &[BorrowedFd<'_>]) -> io::Result<()> {
    if files.len().div_ceil(MESSAGE_FILES_MAX) > bytes.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    while !bytes.is_empty() {
        let (now, later) = files.split_at(files.len().min(MESSAGE_FILES_MAX));
        // A message with files has at least a byte: what is left must do for what is left.
        let length = match later.is_empty() {
            true => bytes.len(),
            false => 1,
        };
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MESSAGE_FILES_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !now.is_empty() {
            // It has room for as many.
            control.push(SendAncillaryMessage::ScmRights(now));
        }
        match sendmsg(
            &socket,
            &[IoSlice::new(&bytes[..length])],
            &mut control,
            SendFlags::NOSIGNAL,
        ) {
            Ok(sent) => (bytes, files) = (&bytes[sent..], later),
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// Receives once, and appends the files that came along to `files`.
///
/// # Errors
/// Those of the socket.
pub fn receive(socket: impl AsFd, bytes: &mut [u8], files: &mut Vec<OwnedFd>) -> io::Result<Received> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MESSAGE_FILES_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC;
    let message = loop {
        match recvmsg(&socket, &mut [IoSliceMut::new(bytes)], &mut control, flags) {
            Err(rustix::io::Errno::INTR) => {}
            done => break done?,
        }
    };
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = part {
            files.extend(received);
        }
    }
    Ok(Received {
        bytes: message.bytes,
        files_lost: message.flags.contains(ReturnFlags::CTRUNC),
    })
}

#[cfg(all(test, not(loom), not(miri)))]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read, Seek, Write};
    use std::os::unix::net::UnixStream;

    #[test]
    fn more_files_than_a_message_has_arrive_in_order() {
        const FILES: usize = 3 * MESSAGE_FILES_MAX + 1;
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"content").unwrap();
        file.rewind().unwrap();
        let null = File::open("/dev/null").unwrap();
        let mut files = vec![null.as_fd(); FILES];
        files[FILES - 1] = file.as_fd();
        let (one, other) = UnixStream::pair().unwrap();
        assert!(send(&one, b"abc", &files).is_err(), "too few bytes for so many");
        send(&one, b"some bytes", &files).unwrap();
        drop(one);
        let (mut bytes, mut received) = (Vec::new(), Vec::new());
        loop {
            let mut some = [0; 64];
            let got = receive(&other, &mut some, &mut received).unwrap();
            assert!(!got.files_lost);
            match got.bytes {
                0 => break,
                count => bytes.extend(&some[..count]),
            }
        }
        assert_eq!((&bytes[..], received.len()), (&b"some bytes"[..], FILES));
        let mut content = String::new();
        File::from(received.pop().unwrap())
            .read_to_string(&mut content)
            .unwrap();
        assert_eq!(content, "content");
    }
}
