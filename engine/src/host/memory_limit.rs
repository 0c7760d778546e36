//! How much memory this process may take: by this host, by the cgroups that it is in, and by its limit of address space.

use super::{memory, proc};
use crate::text::mebibytes;
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
use std::path::{Component, Path, PathBuf};

/// What a limit has to leave for what is not a guest's, beside a sixteenth of it: the program, its threads' stacks, rings, connections
/// and their sockets.
const OWN_BYTES: u64 = 48 << 20;

/// The same of address space, beside an eighth and what threads take.
const OWN_ADDRESSES: u64 = 64 << 20;

/// Address space of a thread: its stack, and what the allocator reserves for it, of which it uses little.
const THREAD_ADDRESSES: u64 = 68 << 20;

/// A limit on the memory of this process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MemoryBound {
    /// What of it guests may take.
    pub(crate) for_guests: u64,
    /// What it is, in words.
    pub(crate) what: String,
}

/// Memory of this host in bytes: what there is, or what a kernel that does not overcommit hands out.
pub(crate) fn host_bytes() -> u64 {
    let total = memory::total_bytes();
    // 2: a kernel that hands out no more than this.
    match proc::number("/proc/sys/vm/overcommit_memory") {
        Some(2) => total.min(memory::meminfo("CommitLimit")),
        _ => total,
    }
}

/// The smallest of this process's limits; none if nothing is known. The process will start so many threads.
pub(crate) fn smallest_bound(threads: usize) -> Option<MemoryBound> {
    let host = Some(host_bytes()).filter(|bytes| *bytes > 0).map(|bytes| {
        let what = format!("this host's memory of {}", mebibytes(bytes));
        MemoryBound::of_memory(bytes, what)
    });
    let read = |path: &Path| proc::text(path);
    let all = [host, cgroup_bound(&read), address_space_bound(threads)];
    all.into_iter().flatten().min_by_key(|bound| bound.for_guests)
}

impl MemoryBound {
    fn of_memory(bytes: u64, what: String) -> Self {
        Self {
            for_guests: bytes.saturating_sub(OWN_BYTES + bytes / 16),
            what,
        }
    }

    /// `limit` of which `used` is mapped already, by a process that will start so many threads.
    fn of_addresses(limit: u64, used: u64, threads: usize) -> Self {
        let left = limit.saturating_sub(used);
        let own = OWN_ADDRESSES + threads as u64 * THREAD_ADDRESSES;
        Self {
            for_guests: left.saturating_sub(own + left / 8),
            what: format!("this process's address space of {} (ulimit -v)", mebibytes(limit)),
        }
    }
}

fn address_space_bound(threads: usize) -> Option<MemoryBound> {
    let (limit, _) = getrlimit(Resource::RLIMIT_AS).ok()?;
    if limit == RLIM_INFINITY {
        return None;
    }
    let pages = proc::text("/proc/self/statm")?;
    let pages: u64 = pages.split_whitespace().next()?.parse().ok()?;
    let used = pages.saturating_mul(crate::units::PAGE_BYTES);
    Some(MemoryBound::of_addresses(limit, used, threads))
}

/// A version of control groups, as far as it limits memory.
struct Version {
    file_system: &'static str,
    /// Files with a limit, of which the smallest counts.
    limits: &'static [&'static str],
}

const FIRST: Version = Version {
    file_system: "cgroup",
    limits: &["memory.limit_in_bytes"],
};

/// Above `memory.high` a group is slowed down until it hardly runs.
const SECOND: Version = Version {
    file_system: "cgroup2",
    limits: &["memory.max", "memory.high"],
};

/// The smallest limit of this process's cgroup and of those above it. `read` returns a file's text.
fn cgroup_bound(read: &dyn Fn(&Path) -> Option<String>) -> Option<MemoryBound> {
    let groups = read(Path::new("/proc/self/cgroup"))?;
    let mounts = read(Path::new("/proc/self/mountinfo"))?;
    let bounds = [FIRST, SECOND].into_iter().filter_map(|version| {
        let group = version.group(&groups)?;
        let (root, mount) = mounts.lines().find_map(|line| version.mount(line))?;
        smallest_limit(&version, mount, &below(group, root), read)
    });
    bounds.min_by_key(|bound| bound.for_guests)
}

impl Version {
    /// The group that this process is in, of the lines in /proc/self/cgroup: `ID:CONTROLLERS:PATH`.
    fn group<'a>(&self, groups: &'a str) -> Option<&'a Path> {
        groups.lines().find_map(|line| {
            let (id, rest) = line.split_once(':')?;
            let (controllers, path) = rest.split_once(':')?;
            let is_ours = match self.limits == SECOND.limits {
                true => id == "0",
                false => controllers.split(',').any(|name| name == "memory"),
            };
            is_ours.then_some(Path::new(path))
        })
    }

    /// Of a line of /proc/self/mountinfo: the group that is mounted, and where, if it is such a mount.
    fn mount<'a>(&self, line: &'a str) -> Option<(&'a Path, &'a Path)> {
        let (mount, system) = line.split_once(" - ")?;
        let mut system = system.split(' ');
        let (kind, _, options) = (system.next()?, system.next()?, system.next()?);
        let has_memory = self.limits == SECOND.limits || options.split(',').any(|option| option == "memory");
        let mut fields = mount.split(' ').skip(3);
        let found = (Path::new(fields.next()?), Path::new(fields.next()?));
        (kind == self.file_system && has_memory).then_some(found)
    }
}

/// The part of a group's path that is below the mounted one. A group that is outside of it, as a container may see its own, has the
/// limit of the mounted one at least.
fn below(group: &Path, root: &Path) -> PathBuf {
    let inside = group.strip_prefix(root).unwrap_or(Path::new(""));
    let is_plain = inside
        .components()
        .all(|part| matches!(part, Component::Normal(_)));
    match is_plain {
        true => inside.to_owned(),
        false => PathBuf::new(),
    }
}

/// From the group up to the mounted one.
fn smallest_limit(
    version: &Version,
    mount: &Path,
    group: &Path,
    read: &dyn Fn(&Path) -> Option<String>,
) -> Option<MemoryBound> {
    let limits = group.ancestors().flat_map(|group| {
        version.limits.iter().filter_map(move |file| {
            // Without a limit a file says `max`, or in the first version a number that no memory reaches.
            let bytes = read(&mount.join(group).join(file))?.trim().parse::<u64>().ok()?;
            Some((bytes, group, *file))
        })
    });
    let (bytes, group, file) = limits.min_by_key(|(bytes, ..)| *bytes)?;
    let what = format!("cgroup /{}, whose {file} is {bytes} bytes", group.display());
    Some(MemoryBound::of_memory(bytes, what))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// What a limit of so many bytes leaves for guests.
    fn left(bytes: u64) -> u64 {
        bytes - OWN_BYTES - bytes / 16
    }

    fn bound(files: &[(&str, &str)]) -> Option<MemoryBound> {
        let read = |path: &Path| {
            let file = files.iter().find(|(name, _)| Path::new(name) == path);
            file.map(|(_, text)| (*text).to_owned())
        };
        cgroup_bound(&read)
    }

    const FIRST_MOUNT: &str =
        "36 25 0:31 / /sys/fs/cgroup/memory rw,nosuid shared:9 - cgroup cgroup rw,memory";
    const SECOND_MOUNT: &str =
        "25 20 0:22 / /sys/fs/cgroup rw,nosuid shared:5 - cgroup2 cgroup2 rw,nsdelegate";
    const NO_LIMIT: &str = "9223372036854771712";

    #[test]
    fn the_smallest_limit_up_the_hierarchy_counts() {
        let second = |leaf, middle, high| {
            bound(&[
                ("/proc/self/cgroup", "0::/colo.slice/colo.service\n"),
                ("/proc/self/mountinfo", SECOND_MOUNT),
                ("/sys/fs/cgroup/colo.slice/colo.service/memory.max", leaf),
                ("/sys/fs/cgroup/colo.slice/memory.max", middle),
                ("/sys/fs/cgroup/colo.slice/memory.high", high),
            ])
        };
        assert_eq!(second("max", "max", "max"), None);
        let found = second("1073741824\n", "max", "max").unwrap();
        assert_eq!(found.for_guests, left(1 << 30));
        assert_eq!(
            found.what,
            "cgroup /colo.slice/colo.service, whose memory.max is 1073741824 bytes"
        );
        let found = second("1073741824\n", "314572800\n", "max").unwrap();
        assert_eq!(
            found.what,
            "cgroup /colo.slice, whose memory.max is 314572800 bytes"
        );
        let found = second("1073741824\n", "max", "314572800\n").unwrap();
        assert_eq!(
            (found.for_guests, found.what.contains("memory.high")),
            (left(300 * MIB), true)
        );
    }

    #[test]
    fn the_first_version_is_read_beside_the_second() {
        let first = |group, leaf, root| {
            bound(&[
                ("/proc/self/cgroup", group),
                ("/proc/self/mountinfo", &format!("{SECOND_MOUNT}\n{FIRST_MOUNT}")),
                ("/sys/fs/cgroup/memory/machine/colo/memory.limit_in_bytes", leaf),
                ("/sys/fs/cgroup/memory/machine/memory.limit_in_bytes", NO_LIMIT),
                ("/sys/fs/cgroup/memory/memory.limit_in_bytes", root),
            ])
            .unwrap()
        };
        let groups = "9:pids:/\n4:cpu,memory:/machine/colo\n0::/\n";
        assert_eq!(first(groups, "314572800", NO_LIMIT).for_guests, left(300 * MIB));
        assert_eq!(first(groups, NO_LIMIT, "419430400").for_guests, left(400 * MIB));
        // Nothing is limited: more than any host has.
        assert!(first(groups, NO_LIMIT, NO_LIMIT).for_guests > 1 << 60);
    }

    /// A container sees its own group as the root, and with the first version the path of the host.
    #[test]
    fn a_container_finds_its_own_group() {
        let mount = "36 25 0:31 /docker/7 /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory";
        let inside = |group| {
            bound(&[
                ("/proc/self/cgroup", group),
                ("/proc/self/mountinfo", mount),
                ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "314572800"),
                ("/sys/fs/cgroup/memory/sub/memory.limit_in_bytes", "209715200"),
            ])
            .map(|bound| bound.for_guests)
        };
        assert_eq!(inside("4:memory:/docker/7"), Some(left(300 * MIB)));
        assert_eq!(inside("4:memory:/docker/7/sub"), Some(left(200 * MIB)));
        assert_eq!(inside("4:memory:/../8"), Some(left(300 * MIB)));
        assert_eq!(inside("4:pids:/"), None);
    }

    #[test]
    fn a_small_limit_leaves_nothing() {
        assert_eq!(MemoryBound::of_memory(40 * MIB, String::new()).for_guests, 0);
        assert_eq!(MemoryBound::of_addresses(1 << 30, 2 << 30, 0).for_guests, 0);
        assert_eq!(MemoryBound::of_addresses(1 << 30, 0, 100).for_guests, 0);
        let left = MemoryBound::of_addresses(5 << 30, 1 << 30, 10).for_guests;
        assert_eq!(left, (4 << 30) - (512 + 64 + 680) * MIB);
    }

    #[test]
    fn this_process_has_a_bound() {
        let bound = smallest_bound(1).unwrap();
        assert!(bound.for_guests < memory::total_bytes(), "{bound:?}");
    }
}
