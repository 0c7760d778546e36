//! Guest memory: RAM image, cache slots, dirty bitmap, flush, commit.
