//! Makes filters of the kernel (seccomp(2)) out of the rules of `calls.rs`, and puts threads under them.
#![expect(
    unsafe_code,
    reason = "no safe function puts a thread under a filter whose refusals the kernel logs"
)]

use super::calls::{FATAL, Only, RULES, Rule};
use super::kinds::ThreadKind;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};
use std::collections::BTreeMap;
use std::io;

/// A refused call fails with this.
const REFUSED: SeccompAction = SeccompAction::Errno(libc::EPERM.cast_unsigned());

/// A call of which the C library knows an older form.
const UNKNOWN: SeccompAction = SeccompAction::Errno(libc::ENOSYS.cast_unsigned());

/// Programs for the kernel.
#[derive(Debug)]
pub(super) struct Filters {
    /// For the whole process.
    process: Vec<(BpfProgram, Log)>,
    /// In the order of [`ThreadKind::ALL`].
    kinds: Vec<BpfProgram>,
}

impl Filters {
    /// Those of this processor; none for one that is not known.
    pub(super) fn compile() -> Self {
        let Ok(arch) = TargetArch::try_from(std::env::consts::ARCH) else {
            return Self::none();
        };
        let compiled = || {
            let process = vec![
                (fatal(arch)?, Log::Refusals),
                (without_clone3(arch)?, Log::Nothing),
            ];
            let kinds = ThreadKind::ALL.iter().map(|kind| of_kind(*kind, arch));
            let kinds = kinds.collect::<Result<_, _>>()?;
            Ok::<_, BackendError>(Self { process, kinds })
        };
        compiled().expect("the tables of `calls` make programs, as its test shows")
    }

    /// None.
    pub(super) fn none() -> Self {
        Self {
            process: Vec::new(),
            kinds: Vec::new(),
        }
    }

    /// Puts this thread, and all that it starts, under the filters of the process.
    pub(super) fn begin(&self) -> io::Result<()> {
        match self.process.is_empty() {
            true => Err(io::Error::from_raw_os_error(libc::ENOSYS)),
            false => self
                .process
                .iter()
                .try_for_each(|(filter, log)| install(filter, *log)),
        }
    }

    /// Puts this thread, and all that it starts, under the filter of a kind.
    pub(super) fn enter(&self, kind: ThreadKind) -> io::Result<()> {
        let mut filters = ThreadKind::ALL.iter().zip(&self.kinds);
        let filter = filters.find(|(other, _)| **other == kind);
        filter.map_or(Ok(()), |(_, filter)| install(filter, Log::Refusals))
    }
}

/// Ends the process at a call that no receiver makes.
fn fatal(arch: TargetArch) -> Result<BpfProgram, BackendError> {
    let calls = FATAL.iter().map(|(_, number)| (*number, Vec::new()));
    let filter = SeccompFilter::new(
        calls.collect(),
        SeccompAction::Allow,
        SeccompAction::KillProcess,
        arch,
    );
    filter?.try_into()
}

/// What `clone3` is to do lies in memory, where no filter sees it: without it the C library calls `clone`.
fn without_clone3(arch: TargetArch) -> Result<BpfProgram, BackendError> {
    let calls = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    SeccompFilter::new(calls, SeccompAction::Allow, UNKNOWN, arch)?.try_into()
}

fn of_kind(kind: ThreadKind, arch: TargetArch) -> Result<BpfProgram, BackendError> {
    let allowed = RULES.iter().filter(|rule| rule.kinds.has(kind));
    let calls = allowed.map(|rule| Ok((rule.number, conditions(rule)?)));
    let calls = calls.collect::<Result<_, BackendError>>()?;
    SeccompFilter::new(calls, REFUSED, SeccompAction::Allow, arch)?.try_into()
}

/// One of these must hold; none if the call is allowed whatever its arguments are.
fn conditions(rule: &Rule) -> Result<Vec<SeccompRule>, BackendError> {
    let length = SeccompCmpArgLen::Dword;
    let one = |argument, operator, value| {
        let condition = SeccompCondition::new(argument, length.clone(), operator, value)?;
        SeccompRule::new(vec![condition])
    };
    match rule.only {
        Only::Any => Ok(Vec::new()),
        Only::Without { argument, bits } => Ok(vec![one(argument, SeccompCmpOp::MaskedEq(bits), 0)?]),
        Only::With { argument, bits } => Ok(vec![one(argument, SeccompCmpOp::MaskedEq(bits), bits)?]),
        Only::Among { argument, values } => values
            .iter()
            .map(|value| one(argument, SeccompCmpOp::Eq, *value))
            .collect(),
    }
}

/// What the kernel logs.
#[derive(Clone, Copy, Debug)]
enum Log {
    Refusals,
    Nothing,
}

impl Log {
    fn flags(self) -> libc::c_ulong {
        match self {
            Self::Refusals => libc::SECCOMP_FILTER_FLAG_LOG,
            Self::Nothing => 0,
        }
    }
}

/// Puts the calling thread under a filter.
fn install(program: &BpfProgram, log: Log) -> io::Result<()> {
    let instructions = program.as_ptr().cast_mut();
    let program = libc::sock_fprog {
        len: u16::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
        filter: instructions.cast(),
    };
    // SAFETY: the kernel copies the program, which has that length, and writes nothing; an instruction is the same 8 bytes in both
    // crates, the kernel's `struct sock_filter`.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            log.flags(),
            &raw const program,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
