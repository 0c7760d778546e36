//! What hooks print, which goes to the receiver's standard error.
//!
//! Nobody may be reading that, and a hook has to end all the same. So each hook writes into a pipe of its own, which the process that runs hooks
//! reads at once; what standard error does not take is dropped and counted there ([`crate::stderr`]).

use crate::output::tell;
use crate::stderr;
use nix::poll::{PollFd, PollFlags};
use std::io::{self, ErrorKind, PipeReader, Read};
use std::os::fd::AsFd;
use std::process::Stdio;

/// Longest line, in bytes: what is longer becomes several.
const LINE_MAX: usize = 4 << 10;

/// Most of one hook's output that is read before that of the others.
const TURN_MAX: usize = 64 << 10;

/// Most pipes: what a hook has left in the background may hold one for ever. The output of further hooks goes nowhere.
const PIPES_MAX: usize = 512;

/// See the module.
#[derive(Default)]
pub(super) struct Outputs(Vec<Output>);

/// One hook's.
struct Output {
    pipe: PipeReader,
    line: Vec<u8>,
}

impl Outputs {
    /// Where a hook is to print to, its standard output and its standard error.
    pub(super) fn begin(&mut self) -> (Stdio, Stdio) {
        let pipe = match self.0.len() < PIPES_MAX {
            true => self.pipe().map_err(|error| error.to_string()),
            false => Err(format!("{PIPES_MAX} earlier ones have not closed theirs")),
        };
        // A hook is more important than what it prints.
        pipe.unwrap_or_else(|why| {
            tell(&format!("warning: what a hook prints goes nowhere: {why}"));
            (Stdio::null(), Stdio::null())
        })
    }

    fn pipe(&mut self) -> io::Result<(Stdio, Stdio)> {
        let (pipe, out) = io::pipe()?;
        rustix::io::ioctl_fionbio(&pipe, true)?;
        let error = out.try_clone()?;
        let line = Vec::new();
        self.0.push(Output { pipe, line });
        Ok((out.into(), error.into()))
    }

    /// Whether no hook, and nothing that one has left behind, can print anything.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What to wait for.
    pub(super) fn polled(&self) -> impl Iterator<Item = PollFd<'_>> {
        let pipes = self.0.iter().map(|output| output.pipe.as_fd());
        pipes.map(|pipe| PollFd::new(pipe, PollFlags::POLLIN))
    }

    /// Passes on what has come from those that are `ready`, in the order of [`Self::polled`].
    pub(super) fn pass_on(&mut self, ready: &[bool]) {
        let mut ready = ready.iter();
        self.0.retain_mut(|output| match ready.next() {
            Some(true) => output.pass_on(stderr::write),
            _ => true,
        });
    }
}

impl Output {
    /// False at its end.
    fn pass_on(&mut self, mut write: impl FnMut(String)) -> bool {
        let mut bytes = [0; LINE_MAX];
        for _ in 0..TURN_MAX / LINE_MAX {
            match self.pipe.read(&mut bytes) {
                Ok(0) => {
                    self.end_line(&mut write);
                    return false;
                }
                Ok(read) => self.take(&bytes[..read], &mut write),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return error.kind() == ErrorKind::WouldBlock,
            }
        }
        true
    }

    fn take(&mut self, mut bytes: &[u8], write: &mut impl FnMut(String)) {
        while !bytes.is_empty() {
            let room = LINE_MAX - self.line.len();
            let end = bytes.iter().position(|byte| *byte == b'\n');
            let part = end.unwrap_or(bytes.len()).min(room);
            self.line.extend_from_slice(&bytes[..part]);
            bytes = &bytes[part..];
            if let Some(rest) = bytes.strip_prefix(b"\n") {
                bytes = rest;
                write(self.take_line());
            } else if self.line.len() == LINE_MAX {
                write(self.take_line());
            }
        }
    }

    fn end_line(&mut self, write: &mut impl FnMut(String)) {
        if !self.line.is_empty() {
            write(self.take_line());
        }
    }

    fn take_line(&mut self) -> String {
        let line = String::from_utf8_lossy(&self.line).into_owned() + "\n";
        self.line.clear();
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn what_a_hook_prints_comes_in_lines() {
        let (pipe, mut hook) = io::pipe().unwrap();
        rustix::io::ioctl_fionbio(&pipe, true).unwrap();
        let line = Vec::new();
        let mut output = Output { pipe, line };
        let pass_on = |output: &mut Output| {
            let mut lines = Vec::new();
            let goes_on = output.pass_on(|line| lines.push(line));
            (goes_on, lines)
        };
        assert_eq!(pass_on(&mut output), (true, Vec::new()));
        hook.write_all(b"one\n\ntw").unwrap();
        let lines = vec!["one\n".to_owned(), "\n".to_owned()];
        assert_eq!(pass_on(&mut output), (true, lines));
        hook.write_all(b"o\xff\n").unwrap();
        assert_eq!(pass_on(&mut output), (true, vec!["two\u{fffd}\n".to_owned()]));
        // One that is too long, of just so many bytes, and without an end.
        hook.write_all(&[b'x'; LINE_MAX + 1]).unwrap();
        hook.write_all(b"\n").unwrap();
        let (_, lines) = pass_on(&mut output);
        let lengths: Vec<_> = lines.iter().map(String::len).collect();
        assert_eq!(lengths, [LINE_MAX + 1, 2]);
        hook.write_all(b"rest").unwrap();
        assert_eq!(pass_on(&mut output), (true, Vec::new()));
        drop(hook);
        assert_eq!(pass_on(&mut output), (false, vec!["rest\n".to_owned()]));
    }

    #[test]
    fn a_hook_without_a_pipe_prints_nowhere() {
        let mut outputs = Outputs::default();
        for _ in 0..PIPES_MAX + 1 {
            drop(outputs.begin());
        }
        assert_eq!(outputs.polled().count(), PIPES_MAX);
        outputs.pass_on(&[true; PIPES_MAX]);
        assert!(outputs.is_empty());
    }
}
