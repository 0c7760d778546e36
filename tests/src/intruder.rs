//! Code that runs in a thread of another process, as an intruder's would: system calls that the thread makes although nothing in its program
//! does. By ptrace(2), which a parent may use.

use crate::command::until;
use nix::errno::Errno;
use nix::libc::user_regs_struct;
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use std::ffi::CStr;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;

/// Where a text is put, below what the thread's stack is in use for.
const BELOW_STACK: u64 = 4096;

/// What became of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Called {
    /// It has returned, with this value or error.
    Returned(Result<u64, Errno>),
    /// The process was ended by this signal.
    Killed(Signal),
}

/// A thread that is stopped, and makes calls of a test. It goes on when this is dropped.
#[derive(Debug)]
pub struct Intruder {
    thread: Pid,
    memory: File,
    saved: user_regs_struct,
    is_alive: bool,
}

impl Intruder {
    /// Stops a thread of `process` that waits in the kernel, by its name or its beginning.
    ///
    /// # Panics
    /// If there is none, or it cannot be stopped.
    #[must_use]
    pub fn in_thread(process: u32, name: &str) -> Self {
        let is_named = |task: &std::path::PathBuf| {
            fs::read_to_string(task.join("comm")).is_ok_and(|comm| comm.starts_with(name))
        };
        // A thread takes its name when it runs for the first time.
        let task = until(&format!("a thread {name}"), || {
            let tasks = fs::read_dir(format!("/proc/{process}/task")).expect("it runs");
            tasks.map(|task| task.expect("a thread").path()).find(is_named)
        });
        let number = task.file_name().and_then(|number| number.to_str()?.parse().ok());
        let thread = Pid::from_raw(number.expect("a number"));
        ptrace::attach(thread).unwrap_or_else(|errno| panic!("ptrace: {errno}"));
        wait(thread);
        let memory = format!("/proc/{process}/mem");
        let memory = File::options().read(true).write(true).open(memory);
        let memory = memory.expect("its memory");
        let saved = ptrace::getregs(thread).expect("its registers");
        let mut instruction = [0; 2];
        memory
            .read_exact_at(&mut instruction, saved.rip - 2)
            .expect("its code");
        assert_eq!(
            instruction,
            [0x0f, 0x05],
            "thread {name} does not wait in a system call"
        );
        Self {
            thread,
            memory,
            saved,
            is_alive: true,
        }
    }

    /// Puts a text into the thread's memory. Returns its address; the next one replaces it.
    ///
    /// # Panics
    /// If it cannot be written.
    pub fn text(&self, text: &CStr) -> u64 {
        let address = self.saved.rsp - BELOW_STACK;
        self.memory
            .write_all_at(text.to_bytes_with_nul(), address)
            .expect("its stack");
        address
    }

    /// Makes a system call in the thread.
    ///
    /// # Panics
    /// If the thread does something else.
    pub fn call(&mut self, number: i64, arguments: [u64; 6]) -> Called {
        let [rdi, rsi, rdx, r10, r8, r9] = arguments;
        let registers = user_regs_struct {
            rip: self.saved.rip - 2,
            rax: number.cast_unsigned(),
            // No call that would be begun again.
            orig_rax: u64::MAX,
            rdi,
            rsi,
            rdx,
            r10,
            r8,
            r9,
            ..self.saved
        };
        ptrace::setregs(self.thread, registers).expect("its registers");
        ptrace::step(self.thread, None).expect("a step");
        match wait(self.thread) {
            WaitStatus::Stopped(_, Signal::SIGTRAP) => {
                let result = ptrace::getregs(self.thread).expect("its registers").rax;
                let error = i32::try_from(result.wrapping_neg())
                    .ok()
                    .filter(|errno| (1..4096).contains(errno));
                Called::Returned(error.map_or(Ok(result), |errno| Err(Errno::from_raw(errno))))
            }
            WaitStatus::Signaled(_, signal, _) => {
                self.is_alive = false;
                Called::Killed(signal)
            }
            other => panic!("{other:?}"),
        }
    }

    /// Makes a call that is refused.
    ///
    /// # Panics
    /// If it is not, or in another way.
    pub fn is_refused(&mut self, what: &str, errno: Errno, number: i64, arguments: [u64; 6]) {
        assert_eq!(
            self.call(number, arguments),
            Called::Returned(Err(errno)),
            "{what} in a thread of a receiver"
        );
    }
}

impl Drop for Intruder {
    fn drop(&mut self) {
        if self.is_alive {
            // If the process has ended meanwhile, there is nothing to put right.
            let _ = ptrace::setregs(self.thread, self.saved);
            let _ = ptrace::detach(self.thread, None);
        }
    }
}

fn wait(thread: Pid) -> WaitStatus {
    waitpid(thread, Some(WaitPidFlag::__WALL)).expect("the thread")
}
