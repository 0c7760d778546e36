//! The system calls that each kind of thread makes. What is not here is refused.
//!
//! A test (`tests/tests/limits/system_calls.rs`) runs a receiver in which all kinds of threads do what they are for, and lists the calls
//! that they make: one that is not here fails it, and one here that a kind does not make, unless a rule says why it is rare. Of a rare one it is
//! enough that some kind makes it; those that the test does not bring about it lists.

use super::kinds::ThreadKind::*;
use super::kinds::{Kinds, ThreadKind};
use libc::*;

/// Which calls of that name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Only {
    Any,
    /// None of these bits is set in an argument.
    Without {
        argument: u8,
        bits: u64,
    },
    /// All of these bits are set in an argument.
    With {
        argument: u8,
        bits: u64,
    },
    /// An argument has one of these values.
    Among {
        argument: u8,
        values: &'static [u64],
    },
}

/// A system call that some kinds of threads may make.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    pub(super) name: &'static str,
    pub(super) number: c_long,
    pub(super) kinds: Kinds,
    pub(super) only: Only,
    pub(super) rare: Option<&'static str>,
}

impl Rule {
    /// What the call is called.
    pub fn name(&self) -> &'static str {
        // As in `SYS_futex`.
        self.name.strip_prefix("SYS_").unwrap_or(self.name)
    }

    /// Whether threads of that kind may make it.
    pub fn allows(&self, kind: ThreadKind) -> bool {
        self.kinds.has(kind)
    }

    /// Whether it is there for threads of that kind, and not only because they start others that make it.
    pub fn is_for(&self, kind: ThreadKind) -> bool {
        self.kinds.is_for(kind)
    }

    /// Why it is allowed although a receiver that is well hardly makes it.
    pub fn rare(&self) -> Option<&'static str> {
        self.rare
    }
}

/// All rules.
pub fn rules() -> &'static [Rule] {
    RULES
}

macro_rules! rule {
    ($number:ident, $kinds:expr) => {
        rule!($number, $kinds, Only::Any, None)
    };
    ($number:ident, $kinds:expr, rare $why:literal) => {
        rule!($number, $kinds, Only::Any, Some($why))
    };
    ($number:ident, $kinds:expr, only $only:expr) => {
        rule!($number, $kinds, $only, None)
    };
    ($number:ident, $kinds:expr, only $only:expr, rare $why:literal) => {
        rule!($number, $kinds, $only, Some($why))
    };
    ($number:ident, $kinds:expr, $only:expr, $rare:expr) => {
        Rule {
            name: stringify!($number),
            number: $number,
            kinds: $kinds,
            only: $only,
            rare: $rare,
        }
    };
}

const ALL: Kinds = Kinds::ALL;

/// Serve connections by tokio.
const SERVERS: Kinds = Kinds::of(&[Control, DiskServer, Metrics]);

/// Open files of the operator's directories. Those that receive and decode add a slab, a file in `--ram-dir`, where pages wait in a socket
/// and the cache has no place for them. The command's own thread reads its configuration again.
const OPENERS: Kinds = Kinds::of(&[
    Control, Histograms, Memory, DiskServer, Disk, Core, Channel, Worker, Main,
]);

/// List and look at directories. The command's own thread reads its configuration again.
const LISTERS: Kinds = Kinds::of(&[Control, Histograms, Memory, DiskServer, Disk, Main]);

/// Start threads, or ask how many there may be to populate memory.
const COUNTERS: Kinds = Kinds::of(&[Starter, Memory, Disk, DiskServer, Core, Channel, Worker]);

/// Add memory to the cache.
const GROWERS: Kinds = Kinds::of(&[Memory, Core, Channel, Worker]);

/// Remove files of the operator's directories; those that grow the cache a slab for which there is no memory.
const REMOVERS: Kinds = Kinds::of(&[
    Control, Histograms, Memory, DiskServer, Disk, Background, Core, Channel, Worker,
]);

/// Have sockets of peers or clients.
const TALKERS: Kinds = Kinds::of(&[
    Core, Channel, Control, DiskServer, Disk, Background, Metrics, Handshake,
]);

/// May find that a session or a connection has to end.
const ENDERS: Kinds = Kinds::of(&[
    Core, Channel, Worker, Control, DiskServer, Disk, Background, Memory, Metrics,
]);

/// Remove files: those above, and the command's own thread the socket of `--metrics` at the end.
const UNLINKERS: Kinds = Kinds::of(&[
    Control, Histograms, Memory, DiskServer, Disk, Background, Core, Channel, Worker, Main,
]);

/// Start threads.
const STARTERS: Kinds = Kinds::of(&[Starter, Memory]);

/// Wait for a time.
const SLEEPERS: Kinds = Kinds::of(&[Main, Signals, Background, Disk]);

/// No memory that is mapped is ever executed.
const NOT_EXECUTABLE: Only = Only::Without {
    argument: 2,
    bits: PROT_EXEC as u64,
};

/// A thread of this process, and no other process.
const THREAD: Only = Only::With {
    argument: 0,
    bits: (CLONE_VM | CLONE_THREAD | CLONE_SIGHAND) as u64,
};

/// Descriptors and locks, but no signals that the kernel would send to other processes.
const DESCRIPTORS: Only = Only::Among {
    argument: 1,
    values: &[
        F_GETFD as u64,
        F_SETFD as u64,
        F_GETFL as u64,
        F_SETFL as u64,
        F_DUPFD_CLOEXEC as u64,
        F_OFD_GETLK as u64,
    ],
};

/// Bytes that wait in a socket, and whether one blocks; a terminal for the progress line; a copy that shares its blocks.
const CONTROLS: Only = Only::Among {
    argument: 1,
    values: &[FIONREAD, FIONBIO, TCGETS, TIOCGWINSZ],
};

/// What makes Rust give up a crash's handler, so that the crash ends the process.
const CRASHES: Only = Only::Among {
    argument: 0,
    values: &[SIGSEGV as u64, SIGBUS as u64, SIGABRT as u64],
};

const ABORT: Only = Only::Among {
    argument: 2,
    values: &[SIGABRT as u64],
};

const NAME_OF_THREAD: Only = Only::Among {
    argument: 0,
    values: &[PR_SET_NAME as u64],
};

const A_FILTER: Only = Only::Among {
    argument: 0,
    values: &[SECCOMP_SET_MODE_FILTER as u64],
};

pub(super) const RULES: &[Rule] = &[
    // Memory, and the end of a thread.
    rule!(SYS_futex, ALL),
    rule!(SYS_mmap, ALL, only NOT_EXECUTABLE, rare "the memory of a thread that allocates for the first time"),
    rule!(SYS_mprotect, ALL, only NOT_EXECUTABLE, rare "the same"),
    rule!(SYS_munmap, ALL, rare "the end of a thread, and of what it has allocated"),
    rule!(SYS_madvise, ALL, rare "the end of a thread"),
    rule!(SYS_mremap, ALL, rare "an allocation that grows"),
    rule!(SYS_brk, ALL, rare "the memory of the first thread, which others use where many allocate"),
    rule!(SYS_sigaltstack, ALL, rare "the end of a thread"),
    rule!(SYS_rt_sigprocmask, ALL, rare "the end of a thread"),
    rule!(SYS_exit, ALL, rare "the end of a thread"),
    rule!(SYS_sched_yield, ALL, rare "another thread is about to have done something"),
    rule!(SYS_clock_gettime, ALL, rare "on hosts whose clock is not read without the kernel"),
    rule!(SYS_restart_syscall, ALL, rare "goes on after SIGSTOP, or a debugger"),
    rule!(SYS_getrandom, ALL, rare "the first table of a thread"),
    rule!(SYS_close, ALL, rare "whoever is the last to use it"),
    // Crashes.
    rule!(SYS_rt_sigreturn, ALL, rare "a crash, or a signal"),
    rule!(SYS_rt_sigaction, ALL, only CRASHES, rare "a crash"),
    rule!(SYS_tgkill, ALL, only ABORT, rare "a crash"),
    rule!(SYS_getpid, ALL, rare "a crash"),
    rule!(SYS_gettid, ALL, rare "a crash"),
    // The process.
    rule!(SYS_exit_group, Kinds::of(&[Main, Signals]), rare "the end of the process"),
    rule!(SYS_clone, STARTERS, only THREAD),
    // A filter of the process answers that there is none; one of these would answer that it is forbidden.
    rule!(SYS_clone3, STARTERS, rare "C libraries before 2.34 make none"),
    rule!(SYS_set_robust_list, STARTERS),
    rule!(SYS_rseq, STARTERS, rare "C libraries before 2.35 make none"),
    rule!(SYS_sched_getaffinity, COUNTERS, rare "how many threads may populate memory"),
    rule!(SYS_prctl, Kinds::of(&[Starter]), only NAME_OF_THREAD),
    rule!(SYS_seccomp, Kinds::of(&[Starter]), only A_FILTER),
    rule!(SYS_capget, Kinds::of(&[Starter])),
    rule!(SYS_capset, Kinds::of(&[Starter]), rare "has nothing to give up where there are no capabilities"),
    rule!(SYS_sched_setaffinity, Kinds::of(&[Channel])),
    rule!(SYS_clock_nanosleep, SLEEPERS, rare "a moment's wait for another thread"),
    // Wake-ups and the log.
    rule!(SYS_write, ALL, rare "to the log, and to wake another thread"),
    rule!(
        SYS_read,
        Kinds::of(&[
            Main, Core, Channel, Worker, Control, Histograms, Memory, DiskServer, Disk, Metrics, Handshake
        ]),
        rare "a wake-up, or a file"
    ),
    // Receiving.
    rule!(SYS_io_uring_enter, Kinds::of(&[Core])),
    rule!(SYS_io_uring_register, Kinds::of(&[Core]), rare "registered buffers"),
    rule!(SYS_recvmsg, Kinds::of(&[Core, Channel, Control])),
    rule!(SYS_sendto, Kinds::of(&[Core, Channel, Control, DiskServer, Disk, Background, Signals, Hooks, Metrics, Main, Log, Handshake]), rare "answers, and the service manager"),
    rule!(
        SYS_recvfrom,
        Kinds::of(&[Control, DiskServer, Signals, Hooks, Metrics, Handshake])
    ),
    rule!(SYS_setsockopt, TALKERS, rare "sockets of other families need less"),
    rule!(SYS_getsockopt, SERVERS, rare "clients over UNIX sockets"),
    rule!(SYS_getpeername, SERVERS, rare "the same"),
    rule!(SYS_shutdown, ENDERS, rare "an end"),
    rule!(SYS_ioctl, Kinds::of(&[Core, Channel, Control, DiskServer, Background, Main, Metrics, Handshake]), only CONTROLS, rare "how much waits in a socket"),
    rule!(SYS_socketpair, Kinds::of(&[Control]), rare "the link of a guard with TLS"),
    rule!(SYS_accept4, SERVERS),
    rule!(
        SYS_epoll_ctl,
        Kinds::of(&[Core, Control, DiskServer, Metrics, Handshake])
    ),
    rule!(SYS_fcntl, ALL, only DESCRIPTORS, rare "descriptors that are shared; in builds with assertions every one that is closed"),
    rule!(SYS_prlimit64, SERVERS, rare "the reserve of descriptors"),
    // Files.
    rule!(SYS_openat, OPENERS, rare "a cache that has to grow at once"),
    rule!(
        SYS_statx,
        UNLINKERS,
        rare "the same"
    ),
    rule!(SYS_newfstatat, LISTERS, rare "listing a directory"),
    rule!(SYS_fstat, LISTERS, rare "as newfstatat: musl, and C libraries before 2.33 and from 2.39 on"),
    rule!(SYS_getdents64, LISTERS, rare "the same"),
    rule!(SYS_lseek, UNLINKERS, rare "the same"),
    rule!(SYS_statfs, OPENERS, rare "the file system of --ram-dir, and whether a slab fits there"),
    rule!(SYS_flock, REMOVERS, rare "a guest's files are this receiver's"),
    rule!(SYS_geteuid, Kinds::of(&[Control, Histograms, Memory, DiskServer, Disk]), rare "a guest's files are this user's"),
    rule!(SYS_ftruncate, Kinds::of(&[Control, Histograms, Memory, DiskServer, Disk, Background, Core, Channel, Worker]), rare "the same"),
    rule!(
        SYS_fallocate,
        Kinds::of(&[Memory, DiskServer, Disk, Background, Core, Channel, Worker]),
        rare "the same; a failover applies what is left of a disk's log"
    ),
    rule!(SYS_fsync, Kinds::of(&[Control, Disk, Background]), rare "what must be on the disk"),
    rule!(SYS_fdatasync, Kinds::of(&[Disk, DiskServer, Background]), rare "the same"),
    rule!(
        SYS_pread64,
        Kinds::of(&[DiskServer, Disk, Background, Core]),
        rare "what is not in the page cache; copies between file systems; when a core ran"
    ),
    rule!(SYS_preadv2, Kinds::of(&[Disk])),
    rule!(SYS_readv, Kinds::of(&[Disk])),
    rule!(SYS_pwrite64, Kinds::of(&[Disk, Background])),
    rule!(SYS_pwritev, Kinds::of(&[Disk, Background]), rare "a guest is resumed before its disk's log is applied"),
    rule!(SYS_copy_file_range, Kinds::of(&[Background])),
    rule!(SYS_fadvise64, Kinds::of(&[Disk]), rare "a client that reads ahead"),
    // Guests' memory.
    rule!(SYS_memfd_create, Kinds::of(&[Memory])),
    rule!(SYS_mlock, Kinds::of(&[Memory]), rare "hosts with swap"),
    rule!(SYS_munlock, REMOVERS, rare "whoever is the last to use memory"),
    rule!(SYS_mbind, GROWERS, rare "hosts with several NUMA nodes"),
    // Calls that have another form on other processors, or in other versions of the C library.
    #[cfg(target_arch = "x86_64")]
    rule!(
        SYS_epoll_wait,
        Kinds::of(&[Core, Control, DiskServer, Metrics, Handshake])
    ),
    rule!(SYS_epoll_pwait, Kinds::of(&[Core, Control, DiskServer, Metrics, Handshake]), rare "as epoll_wait"),
    #[cfg(target_arch = "x86_64")]
    rule!(SYS_poll, TALKERS, rare "whether the other end is there"),
    rule!(SYS_ppoll, TALKERS, rare "as poll"),
    #[cfg(target_arch = "x86_64")]
    rule!(SYS_unlink, UNLINKERS, rare "a slab for which there is no memory"),
    rule!(SYS_unlinkat, UNLINKERS, rare "as unlink"),
    #[cfg(target_arch = "x86_64")]
    rule!(SYS_rename, Kinds::of(&[Histograms])),
    rule!(SYS_renameat, Kinds::of(&[Histograms]), rare "as rename"),
    #[cfg(target_arch = "x86_64")]
    rule!(SYS_readlink, LISTERS, rare "a directory's own path"),
    rule!(SYS_readlinkat, LISTERS, rare "as readlink"),
    rule!(SYS_pwritev2, Kinds::of(&[DiskServer, Disk, Background]), rare "as pwritev"),
];

/// Calls that end the process: see the module above.
pub(super) const FATAL: &[(&str, c_long)] = &[
    // Other programs and other processes.
    ("execve", SYS_execve),
    ("execveat", SYS_execveat),
    ("ptrace", SYS_ptrace),
    ("process_vm_readv", SYS_process_vm_readv),
    ("process_vm_writev", SYS_process_vm_writev),
    ("pidfd_getfd", SYS_pidfd_getfd),
    // Other namespaces and file systems.
    ("unshare", SYS_unshare),
    ("setns", SYS_setns),
    ("mount", SYS_mount),
    ("move_mount", SYS_move_mount),
    ("open_tree", SYS_open_tree),
    ("fsopen", SYS_fsopen),
    ("umount2", SYS_umount2),
    ("pivot_root", SYS_pivot_root),
    ("chroot", SYS_chroot),
    // The kernel.
    ("init_module", SYS_init_module),
    ("finit_module", SYS_finit_module),
    ("delete_module", SYS_delete_module),
    ("kexec_load", SYS_kexec_load),
    ("bpf", SYS_bpf),
    ("perf_event_open", SYS_perf_event_open),
    ("userfaultfd", SYS_userfaultfd),
    ("reboot", SYS_reboot),
    ("swapon", SYS_swapon),
    ("swapoff", SYS_swapoff),
];

#[cfg(test)]
mod tests {
    use super::*;

    /// What is rare is seen by no test of a running receiver: a slab that is added where pages wait in a socket, and the log of a disk
    /// whose base had no room, which a failover, a dump or a discard applies.
    #[test]
    fn who_adds_a_slab_or_applies_a_log_may_do_all_of_it() {
        let allows = |kind: ThreadKind, name: &str| {
            let mut rules = RULES.iter().filter(|rule| rule.name() == name);
            rules.any(|rule| rule.allows(kind))
        };
        for kind in [Core, Channel, Worker, Memory] {
            for name in [
                "statfs",
                "openat",
                "ftruncate",
                "fallocate",
                "mmap",
                "madvise",
                "unlinkat",
            ] {
                assert!(allows(kind, name), "{kind:?}, {name}");
            }
        }
        for kind in [Disk, Background] {
            for name in ["pwritev", "pwrite64", "fallocate", "fdatasync", "unlinkat"] {
                assert!(allows(kind, name), "{kind:?}, {name}");
            }
        }
    }

    /// A second rule for a call would replace the first.
    #[test]
    fn a_call_has_one_rule() {
        for (position, rule) in RULES.iter().enumerate() {
            let again = RULES[position + 1..]
                .iter()
                .find(|other| other.number == rule.number);
            assert!(again.is_none(), "{}", rule.name());
            assert!(
                FATAL.iter().all(|(_, number)| *number != rule.number),
                "{}",
                rule.name()
            );
        }
    }
}
