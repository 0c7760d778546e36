use super::*;
use colo_ring::host::{HugePagePool, Machine, MemoryReport, NetworkReport, NumaNode, OsError};
use colo_ring::ring::{OpcodeSupport, SetupLevel};
use std::io;

/// A machine with nothing to complain of.
fn good() -> Probe {
    let opcode = |name, essential| OpcodeSupport {
        name,
        purpose: "tests",
        essential,
        supported: true,
    };
    let host = HostReport {
        machine: Machine {
            cpu_model: "Test".to_owned(),
            cores_online: 4,
            cores_allowed: 4,
            kernel: "0".to_owned(),
            memory_bytes: 8 << 30,
            congestion_control: "cubic".to_owned(),
        },
        memory: MemoryReport {
            total_bytes: 8 << 30,
            available_bytes: 7 << 30,
            huge_page_pools: vec![HugePagePool {
                page_bytes: 2 << 20,
                pages: 8,
                pages_free: 8,
                pages_overcommit: 0,
            }],
            thp: Some("madvise".to_owned()),
            thp_shmem: Some("advise".to_owned()),
            memlock_limit_bytes: None,
            cap_ipc_lock: false,
            swap_bytes: 0,
            memfd: Ok(()),
        },
        network: NetworkReport {
            congestion_control: Some("cubic".to_owned()),
            slow_start_after_idle: Some(false),
            somaxconn: Some(4096),
            tcp_rmem_max_bytes: Some(32 << 20),
        },
        cores_allowed: vec![0, 1, 2, 3],
        numa_nodes: vec![NumaNode {
            node: 0,
            cores: vec![0, 1, 2, 3],
            memory_node: Some(0),
        }],
    };
    let ring = Ok(RingReport {
        setup: SetupLevel::DeferTaskrun,
        opcodes: vec![opcode("RECVMSG", true), opcode("READV_FIXED", false)],
        registration: RegistrationReport {
            small: Ok(()),
            beyond_limit: None,
        },
    });
    let sandbox = Ok(Vec::new());
    Probe { host, ring, sandbox }
}

/// The checks that are not ok, as `item: remedy`.
fn complaints(probe: &Probe) -> Vec<(&'static str, State, String)> {
    let bad = checks(probe).into_iter().filter(|check| check.state != State::Ok);
    bad.map(|check| {
        assert!(
            !check.meaning.is_empty(),
            "{} says nothing of what it means",
            check.item
        );
        (check.item, check.state, check.remedy.unwrap_or_default())
    })
    .collect()
}

/// Changes one thing of the good machine and expects exactly one complaint about it.
fn expect(item: &str, state: State, remedy: &str, change: impl FnOnce(&mut Probe)) {
    let mut probe = good();
    change(&mut probe);
    match complaints(&probe).as_slice() {
        [(seen, seen_state, command)] => {
            assert_eq!((*seen, *seen_state), (item, state));
            assert!(command.contains(remedy), "{item}: {command}");
        }
        other => panic!("{item}: {other:?}"),
    }
}

#[test]
fn a_good_machine_has_no_complaints() {
    assert_eq!(complaints(&good()), []);
    assert!(render(&checks(&good())).contains("has everything that a receiver can use"));
}

#[test]
fn each_lack_is_reported_with_its_remedy() {
    let warn = State::Warn;
    expect("io_uring", warn, "kernel.io_uring_disabled=0", |probe| {
        let refused = io::Error::from_raw_os_error(1);
        probe.ring = Err(RingUnavailable::explain(&refused, Some(2)));
    });
    expect("io_uring operations", warn, "", |probe| {
        probe.ring.as_mut().unwrap().opcodes[1].supported = false;
    });
    expect("registered buffers", warn, "ulimit -l unlimited", |probe| {
        probe.host.memory.memlock_limit_bytes = Some(8 << 20);
        probe.ring.as_mut().unwrap().registration.beyond_limit = Some(false);
    });
    expect("registered buffers", warn, "ulimit -l unlimited", |probe| {
        probe.host.memory.memlock_limit_bytes = Some(1 << 30);
    });
    expect("2 MiB huge pages", warn, "vm.nr_hugepages", |probe| {
        probe.host.memory.huge_page_pools[0].pages_free = 0;
    });
    expect("2 MiB huge pages", warn, "vm.nr_hugepages", |probe| {
        probe.host.memory.huge_page_pools.clear()
    });
    expect("THP, shared memory", warn, "shmem_enabled", |probe| {
        probe.host.memory.thp_shmem = Some("never".to_owned());
    });
    expect(
        "THP, private memory",
        warn,
        "transparent_hugepage/enabled",
        |probe| {
            probe.host.memory.thp = Some("never".to_owned());
        },
    );
    expect("NUMA nodes", warn, "--numa-node", |probe| {
        probe.host.numa_nodes.push(NumaNode {
            node: 1,
            cores: vec![4],
            memory_node: Some(1),
        });
    });
    expect("locked memory", warn, "ulimit -l", |probe| {
        probe.host.memory.swap_bytes = 1 << 30;
        probe.host.memory.memlock_limit_bytes = Some(8 << 20);
        // What registers buffers may do more than what locks memory.
        probe.ring.as_mut().unwrap().registration.beyond_limit = Some(true);
    });
    expect("congestion control", warn, "cubic", |probe| {
        probe.host.network.congestion_control = Some("bbr".to_owned());
    });
    expect(
        "slow start after idle",
        warn,
        "slow_start_after_idle=0",
        |probe| {
            probe.host.network.slow_start_after_idle = Some(true);
        },
    );
    expect("listen backlog", warn, "somaxconn", |probe| {
        probe.host.network.somaxconn = Some(128)
    });
    expect("receive buffers", warn, "tcp_rmem", |probe| {
        probe.host.network.tcp_rmem_max_bytes = Some(1 << 20)
    });
}

#[test]
fn without_cores_or_memory_a_receiver_does_not_work() {
    expect("cores", State::Missing, "", |probe| {
        probe.host.cores_allowed.clear()
    });
    expect("memfd", State::Missing, "", |probe| {
        probe.host.memory.memfd = Err(OsError(38))
    });
    let mut probe = good();
    probe.host.memory.memfd = Err(OsError(38));
    assert!(render(&checks(&probe)).contains("does not work here"));
}

#[test]
fn a_memory_only_node_is_no_second_node() {
    let mut probe = good();
    probe.host.numa_nodes.push(NumaNode {
        node: 1,
        cores: vec![],
        memory_node: Some(1),
    });
    assert_eq!(complaints(&probe), []);
}

#[test]
fn a_limit_that_does_not_bind_is_no_complaint() {
    let mut probe = good();
    probe.host.memory.memlock_limit_bytes = Some(8 << 20);
    probe.ring.as_mut().unwrap().registration.beyond_limit = Some(true);
    assert_eq!(complaints(&probe), []);
}
