//! Where memory comes from, and what is told when it does not come as asked.

use super::*;

#[test]
fn named_files_hold_the_image_and_go_with_it() {
    let scratch = in_memory();
    let options = StoreOptions {
        ram_dir: Some(scratch.path().to_owned()),
        ..options()
    };
    let (store, notes) = Store::create(table(&BLOCKS), "guest", &options).unwrap();
    assert!(
        matches!(notes[..], [Fallback::NotDurable { .. }]),
        "a mirror: {notes:?}"
    );
    store.write(0, page(3), &content(33)).unwrap();
    let file = scratch.path().join("guest.pc.ram");
    assert_eq!(
        fs::read(&file).unwrap()[3 * PAGE_SIZE..4 * PAGE_SIZE],
        content(33)
    );
    let refused = Store::create(table(&BLOCKS), "guest", &options).err().unwrap();
    assert!(matches!(refused, StoreError::RamFileExists(_)), "{refused}");
    assert!(file.exists(), "the refused store took the other's file away");
    drop(store);
    assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 0);
}

#[test]
fn a_ram_directory_must_be_memory() {
    let options = StoreOptions {
        ram_dir: Some("/proc".into()),
        ..options()
    };
    let refused = Store::create(table(&BLOCKS), "guest", &options).err().unwrap();
    assert!(matches!(refused, StoreError::RamDirectory(_)), "{refused}");
}

#[test]
fn a_guest_beyond_the_address_space_is_an_error() {
    let refused = Store::create(table(&[("pc.ram", 1 << 43)]), "guest", &options())
        .err()
        .unwrap();
    assert!(matches!(refused, StoreError::NoImageMemory { .. }), "{refused}");
}

/// Huge pages are not what this test's machine must have: without them there are notes, with them there are none.
#[test]
fn a_lack_of_huge_pages_is_reported() {
    let free = || {
        let read = |file: &str| {
            let path = format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{file}");
            fs::read_to_string(path).map_or(0, |text| text.trim().parse::<u64>().unwrap())
        };
        read("free_hugepages").saturating_sub(read("resv_hugepages"))
    };
    // 4 MiB of image, and as much and the header area of cache.
    let before = free();
    let options = StoreOptions {
        hugepages: HugePages::Huge2M,
        ..options()
    };
    let (store, notes) = Store::create(table(&[("pc.ram", 1024), ("rom", 1)]), "guest", &options).unwrap();
    let text: Vec<_> = notes.iter().map(ToString::to_string).collect();
    match before {
        0 => {
            assert!(
                matches!(
                    notes[..],
                    [
                        Fallback::Image { needed: 2, .. },
                        Fallback::Cache { needed: 3, .. }
                    ]
                ),
                "{text:?}"
            );
            assert!(
                text.iter().all(|note| note.contains("sysctl vm.nr_hugepages=")),
                "{text:?}"
            );
        }
        1..5 => assert!(!notes.is_empty()),
        _ => {
            assert_eq!(notes, []);
            assert!(free() < before, "no huge page was taken");
        }
    }
    store.write(0, page(1024), &content(5)).unwrap();
    assert_eq!(image_stamp(&store, 1024), 5);
}

#[test]
fn transparent_huge_pages_are_used_or_the_lack_is_reported() {
    let options = StoreOptions {
        hugepages: HugePages::Thp,
        ..options()
    };
    let (_store, notes) = Store::create(table(&[("pc.ram", 1024)]), "guest", &options).unwrap();
    for note in &notes {
        let Fallback::Transparent { file, setting, .. } = note else {
            panic!("{note}")
        };
        let text = fs::read_to_string(file).unwrap_or_default();
        assert!(
            text.is_empty() || text.contains(&format!("[{setting}]")),
            "{note}"
        );
        assert!(!text.contains("[always]"), "{note}");
    }
}

/// A mapping is scarce: small blocks share one. Blocks that a QEMU may map, or that outlive the receiver, have their own.
#[test]
fn small_blocks_share_a_mapping() {
    let names: Vec<String> = (0..300).map(|number| format!("block {number}")).collect();
    let mut blocks: Vec<(&str, u64)> = names.iter().map(|name| (&**name, 3)).collect();
    blocks.insert(200, ("pc.ram", 1024));
    for kind in KINDS {
        let store = store_of(kind, &blocks);
        assert_eq!(store.image().mappings().len(), 2);
        let last = page(store.table().total_pages() - 1);
        // In a small block before the large one, in the large one, in the next one, in the last.
        let pages = [page(5), page(600), page(1623), page(1624), last];
        for (fill, page) in (1..).zip(pages) {
            store.write(0, page, &content(fill)).unwrap();
        }
        for (fill, page) in (1..).zip(pages) {
            let mut read = [0; PAGE_SIZE];
            store.read_newest(page, &mut read);
            assert_eq!(read, content(fill), "page {page:?}");
        }
    }
    let most = |options: &StoreOptions| Store::mappings_max(&table(&blocks), options);
    let mirror = options();
    assert!((3..20).contains(&most(&mirror)), "{}", most(&mirror));
    let named = StoreOptions {
        ram_dir: Some("/dev/shm".into()),
        ..options()
    };
    assert!((302..320).contains(&most(&named)), "{}", most(&named));
}
