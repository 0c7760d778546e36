//! The real command on hosts that this one is not: with two NUMA nodes, and with older kernels. Each is a guest of the
//! laboratory in which a receiver and a synthetic primary run.

use colo_ring_tests::lab::{Host, HostGuest, HostKernel, NumaMap, experiment};

/// 4 KiB pages of the synthetic guest's main memory, 64 MiB.
const IMAGE_PAGES: u64 = 16384;

/// Pages of one slab of its pool.
const SLAB_PAGES: u64 = 33 * 257;

/// Pages of some mappings on node 0 and 1.
fn pages_on<'a>(maps: impl Iterator<Item = &'a NumaMap> + Clone) -> [u64; 2] {
    [0, 1].map(|node| maps.clone().filter_map(|map| map.pages.get(&node)).sum())
}

fn is_image(map: &&NumaMap) -> bool {
    let file = map.file.as_deref();
    file.is_some_and(|file| file.starts_with("/memfd:colo-ring-ram"))
}

/// The session was protected to its end, with io_uring, without a complaint about placement or locks.
fn assert_was_protected(guest: &HostGuest, what: &str) {
    let receiver = guest.printed(what, "receive");
    let told = format!("{receiver}\n{}", guest.printed(what, "synth"));
    assert_eq!(guest.code(what), "0", "{told}");
    let status = guest.json(what, "status").unwrap();
    assert_eq!(status["backend"], "uring", "{status:#}");
    let session = &status["sessions"][0];
    assert_eq!(session["checkpoint"], 40, "{status:#}\n{told}");
    assert_eq!(session["orderly"], true, "{status:#}");
    // Such a small machine has no huge pages to spare; that is all it lacks.
    for fallback in session["fallbacks"].as_array().unwrap() {
        assert!(fallback.as_str().unwrap().contains("huge pages"), "{fallback}");
    }
}

#[test]
fn memory_lies_on_the_nodes_of_the_cores() {
    experiment(|lab| {
        let guest = HostGuest::run(
            lab,
            &Host::with_two_nodes(HostKernel::Trixie),
            &["doctor", "node=1", "cores=1-2", "node=7"],
        )?;
        assert!(guest.kernel().starts_with("6.12."), "{}", guest.kernel());
        assert_eq!(guest.code("doctor"), "0");

        // One node: all on it.
        assert_was_protected(&guest, "node=1");
        let told = guest.printed("node=1", "receive");
        assert!(
            told.contains("receiving on cores 2-3 of NUMA node 1; memory on node 1"),
            "{told}"
        );
        let maps = guest.numa_maps("node=1");
        let [far, near] = pages_on(maps.iter().filter(is_image));
        assert!(
            far == 0 && near >= IMAGE_PAGES,
            "image: {far} and {near} pages: {maps:?}"
        );
        let slabs = maps
            .iter()
            .filter(|map| map.anonymous && map.policy == "prefer:1");
        let [far, near] = pages_on(slabs);
        assert!(
            far == 0 && near >= 2 * SLAB_PAGES,
            "slabs: {far} and {near} pages: {maps:?}"
        );
        let status = guest.json("node=1", "status")?;
        assert_eq!(status["placement"]["cores"][1]["memory_node"], 1);
        assert_eq!(status["placement"]["image_nodes"], serde_json::json!([1]));

        // Both nodes: a slab on each, the image on both.
        assert_was_protected(&guest, "cores=1-2");
        let maps = guest.numa_maps("cores=1-2");
        let image = pages_on(maps.iter().filter(is_image));
        assert!(
            image.iter().all(|pages| pages * 20 >= IMAGE_PAGES * 9),
            "image: {image:?}"
        );
        for (node, policy) in [(0, "prefer:0"), (1, "prefer:1")] {
            let slab = maps.iter().filter(|map| map.anonymous && map.policy == policy);
            let pages = pages_on(slab);
            assert!(
                pages[node] >= SLAB_PAGES && pages[1 - node] == 0,
                "{policy}: {pages:?}: {maps:?}"
            );
        }

        // No such node: said with those that there are.
        let refused = guest.printed("node=7", "receive");
        assert_eq!(guest.code("node=7"), "2");
        assert!(
            refused.contains("node 0 (cores 0-1), node 1 (cores 2-3)"),
            "{refused}"
        );
        Ok(())
    });
}

#[test]
fn linux_6_1_is_used_as_far_as_it_goes() {
    experiment(|lab| {
        let guest = HostGuest::run(
            lab,
            &Host::with_two_nodes(HostKernel::Bookworm),
            &["doctor", "node=0"],
        )?;
        assert!(guest.kernel().starts_with("6.1."), "{}", guest.kernel());
        assert_eq!(guest.code("doctor"), "0");
        let host = &guest.json("doctor", "doctor")?["host"];
        let opcodes = host["ring"]["Ok"]["opcodes"].as_array().unwrap();
        let lacking: Vec<_> = opcodes
            .iter()
            .filter(|opcode| opcode["supported"] == false)
            .collect();
        assert_eq!(lacking.len(), 1, "{lacking:?}");
        assert_eq!(lacking[0]["name"], "READV_FIXED");
        assert_was_protected(&guest, "node=0");
        let status = guest.json("node=0", "status")?;
        let ring = status["ring"].as_str().unwrap();
        assert!(
            ring.starts_with("SINGLE_ISSUER|DEFER_TASKRUN; registered buffers by READ_FIXED"),
            "{ring}"
        );
        Ok(())
    });
}
