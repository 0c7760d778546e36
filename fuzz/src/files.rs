//! Files that the tools read: captures, latency logs, measured runs.

use colo_ring_tools::capture_file::{CaptureReader, CaptureWriter, Compression, Event};
use colo_ring_tools::hlog::{Log, Reader};
use colo_ring_tools::run_file::RunFile;
use colo_ring_tools::streams::Streams;
use std::io::Cursor;
use std::path::Path;

/// Records of a capture; one that is whole is written again and is the same, and its session is looked for.
pub fn capture(input: &[u8]) -> usize {
    let Ok(mut reader) = CaptureReader::new(Cursor::new(input)) else {
        return 0;
    };
    let mut records = 0;
    let mut copy = CaptureWriter::new(Vec::new(), reader.info(), Compression::None).ok();
    let read_all = loop {
        match reader.next() {
            Ok(Some(record)) => {
                records += 1;
                if let (Some(copy), false) = (&mut copy, matches!(record.event, Event::Finish(_))) {
                    copy.write(record.at, record.event)
                        .expect("what could be read can be written");
                }
            }
            Ok(None) => break true,
            Err(error) => {
                assert!(!error.to_string().is_empty());
                break false;
            }
        }
    };
    if let (true, Some(copy)) = (read_all, copy) {
        let totals = reader.totals();
        assert_eq!(copy.finish().expect("a vector takes everything"), totals);
    }
    let streams = CaptureReader::new(Cursor::new(input)).map(Streams::read);
    if let Ok(Ok(streams)) = streams {
        records += streams.checkpoints.len();
    }
    records
}

/// Intervals of a latency log.
pub fn hlog(input: &[u8]) -> usize {
    let path = Path::new("input.hlog");
    match Log::collect(&mut Reader::new(input, path)) {
        Ok(log) => {
            assert!(log.intervals > 0);
            usize::try_from(log.intervals).unwrap_or(usize::MAX)
        }
        Err(error) => {
            assert!(!error.to_string().is_empty());
            0
        }
    }
}

/// A measured run; one that can be read is the same when it is written and read again.
pub fn run_file(input: &[u8]) -> usize {
    let path = Path::new("input.run.json");
    let Ok(run) = RunFile::parse(path, input) else {
        return 0;
    };
    let text = serde_json::to_vec(&run).expect("it was JSON");
    assert!(RunFile::parse(path, &text).expect("an own file") == run);
    for phase in run.phases() {
        let measured = run
            .checkpoints
            .iter()
            .filter(|checkpoint| checkpoint.phases_ns.contains_key(phase));
        assert_eq!(run.histogram(phase).len(), measured.count() as u64);
    }
    1 + run.checkpoints.len()
}
