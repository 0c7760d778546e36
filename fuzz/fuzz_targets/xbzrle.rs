#![no_main]

use colo_ring::units::PAGE_SIZE;
use colo_ring::wire::xbzrle;

// A delta that is refused leaves the page as it was; one that is taken gives what its runs say, within the page.
libfuzzer_sys::fuzz_target!(|delta: &[u8]| {
    let before = [0x5a; PAGE_SIZE];
    let mut page = before;
    if xbzrle::apply(delta, &mut page).is_err() {
        assert_eq!(page, before);
        return;
    }
    let mut again = before;
    for run in xbzrle::runs(delta) {
        let run = run.expect("it was applied");
        again[run.at..run.at + run.bytes.len()].copy_from_slice(run.bytes);
    }
    assert_eq!(page, again);
    let mut encoded = Vec::new();
    xbzrle::encode(&before, &page, &mut encoded);
    if !encoded.is_empty() {
        let mut decoded = before;
        xbzrle::apply(&encoded, &mut decoded).expect("an own delta");
        assert_eq!(decoded, page);
    }
});
