//! Giving a checkpoint away, as the control socket does it: one conversation wins, what is given is the committed
//! checkpoint, and what fails leaves it there. What a QEMU makes of it is tested in `qemu/failover.rs`.

use colo_ring::blocks::BlockTable;
use colo_ring::failover::{Form, write_stream};
use colo_ring::receiver::{RamLimit, ReceiverOptions};
use colo_ring::session::GuestDescription;
use colo_ring::units::{BlockId, PAGE_SIZE};
use colo_ring_tests::command::{RunningReceiver, Scratch, guest, run, until, wrapped};
use colo_ring_tests::conversation::{Conversation, restore};
use colo_ring_tests::hostile::{BLOCKS, Cut, HostilePrimary, RAM, header};
use colo_ring_tests::lab::SharedDirectory;
use colo_ring_tests::receiver::{LocalReceiver, options_with_files};
use colo_ring_tools::primary::SynthPrimary;
use serde_json::{Value, json};
use std::fs::File;
use std::io::Read;
use std::net::TcpListener;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

const CHANNELS: u8 = 2;

/// A receiver with a control socket.
struct Bench {
    receiver: LocalReceiver,
    scratch: Scratch,
    ram: SharedDirectory,
}

fn claim(session: u32, force: bool, retry: bool) -> Value {
    json!({"command": "claim", "session": session, "force": force, "retry": retry})
}

fn release(session: u32, may_have_run: bool) -> Value {
    json!({"command": "release", "session": session, "may_have_run": may_have_run})
}

impl Bench {
    fn start() -> Self {
        let (scratch, ram) = (Scratch::new(), SharedDirectory::new().expect("a directory"));
        let receiver = LocalReceiver::start(ReceiverOptions {
            ram_limit: RamLimit::exactly(256 << 20),
            control: Some(scratch.file("control").into()),
            ..options_with_files(CHANNELS, &ram)
        });
        Self {
            receiver,
            scratch,
            ram,
        }
    }

    fn conversation(&self) -> Conversation {
        Conversation::open(self.scratch.file("control").as_ref())
    }

    /// A claim that succeeds as soon as the one before is noticed to have gone.
    fn claim_soon(&self, request: &Value) -> Conversation {
        until("the claim", || {
            let mut conversation = self.conversation();
            conversation.ask(request).is_ok().then_some(conversation)
        })
    }

    /// What a QEMU at a socket is given, and the receiver's answer.
    fn received(&self, conversation: &mut Conversation, shared: Option<&str>) -> (Vec<u8>, Value) {
        let (mut stream, other) = UnixStream::pair().expect("a socket");
        let reader = std::thread::spawn(move || {
            let mut bytes = Vec::new();
            stream.read_to_end(&mut bytes).expect("a stream");
            bytes
        });
        let restored = conversation
            .restore(1, shared, &[other.as_fd()])
            .expect("it is given");
        drop(other);
        (reader.join().expect("the reader"), restored)
    }
}

/// The stream of what this primary knows to be committed.
fn expected(primary: &HostilePrimary, form: Form) -> Vec<u8> {
    let entries: Vec<_> = BLOCKS
        .iter()
        .map(|(name, bytes)| (name.as_bytes().into(), *bytes))
        .collect();
    let total = BLOCKS.iter().map(|(_, bytes)| bytes).sum();
    let description = GuestDescription {
        header: header(),
        machine_type: "pc-i440fx-11.1".into(),
        ram_section: RAM,
        blocks: Arc::new(BlockTable::new(entries, total).expect("a good list")),
        vmdesc: Vec::new(),
    };
    let image: Vec<u8> = primary.image().flat_map(|(_, bytes)| bytes.to_vec()).collect();
    let pages: Vec<_> = image.chunks_exact(PAGE_SIZE).collect();
    let read = |page: colo_ring::units::PageIndex, out: &mut [u8; PAGE_SIZE]| {
        out.copy_from_slice(pages[usize::try_from(page.get()).expect("few pages")]);
    };
    let mut bytes = Vec::new();
    write_stream(&description, primary.device_state(), read, form, &mut bytes).expect("memory");
    bytes
}

#[test]
fn there_must_be_a_checkpoint_and_no_primary() {
    let bench = Bench::start();
    let mut conversation = bench.conversation();
    assert!(conversation.claim(1).unwrap_err().contains("no session 1"));
    // In precopy: only the beginning has been sent.
    let mut primary = bench.receiver.connected();
    for (_, bytes) in &primary.precopy_parts()[..3] {
        primary.main.send(bytes);
    }
    let refused = until("the session", || {
        let refused = conversation.claim(1).unwrap_err();
        refused.contains("precopy").then_some(refused)
    });
    assert!(refused.contains("nothing to resume"), "{refused}");
    primary.cut(Cut::Fin);
    assert!(bench.receiver.ended().lost);
    let refused = conversation.claim(1).unwrap_err();
    assert!(
        refused.contains("left no checkpoint") && refused.contains("continues there"),
        "{refused}"
    );
    // Protected: its guest runs there.
    let _primary = bench.receiver.protected();
    let refused = conversation.claim(2).unwrap_err();
    assert!(
        refused.contains("is connected") && refused.contains("--force"),
        "{refused}"
    );
}

#[test]
fn one_conversation_wins_and_its_end_frees_the_claim() {
    let bench = Bench::start();
    let mut primary = bench.receiver.protected();
    primary.cut(Cut::Rst);
    bench.receiver.ended();
    let (mut one, mut two) = (bench.conversation(), bench.conversation());
    let claimed = one.claim(1).unwrap();
    assert_eq!(claimed["checkpoint"], 1);
    assert_eq!(claimed["machine"], "pc-i440fx-11.1");
    assert_eq!(claimed["blocks"][0]["used_length"], BLOCKS[0].1);
    assert!(
        claimed["end"]
            .as_str()
            .unwrap()
            .contains("the last committed checkpoint is 1")
    );
    assert!(
        two.claim(1)
            .unwrap_err()
            .contains("another failover of it is under way")
    );
    for request in [
        restore(1, None),
        release(1, false),
        json!({"command": "promoted", "session": 1}),
        json!({"command": "discard", "session": 1}),
    ] {
        assert!(two.ask(&request).is_err(), "{request}");
    }
    drop(one);
    let mut three = bench.claim_soon(&claim(1, false, false));
    three.ask(&release(1, false)).unwrap();
    two.claim(1).unwrap();
}

#[test]
fn what_is_given_is_the_committed_checkpoint_and_only_once() {
    let bench = Bench::start();
    let mut primary = bench.receiver.protected();
    // A checkpoint that is on its way when the primary is lost.
    primary.request();
    let bytes = primary.checkpoint_bytes(9, &[]);
    primary.main.send(&bytes[..bytes.len() - 1]);
    primary.cut(Cut::Fin);
    assert!(bench.receiver.ended().end.unwrap().contains("which is dropped"));

    let mut one = bench.conversation();
    let claimed = one.claim(1).unwrap();
    let file = claimed["blocks"][0]["file"].as_str().expect("a file with a name");
    assert_eq!(std::fs::read(file).unwrap(), primary.image().next().unwrap().1);
    let (stream, restored) = bench.received(&mut one, None);
    assert!(stream == expected(&primary, Form::Complete), "{restored}");
    assert_eq!(restored["stream"]["bytes"], u64::try_from(stream.len()).unwrap());
    // It dies before it can say what became of it.
    drop(one);
    let refused = until("the end of its claim", || {
        let refused = bench.conversation().claim(1).unwrap_err();
        refused.contains("--retry").then_some(refused)
    });
    assert!(refused.contains("was given to a test"), "{refused}");

    let mut two = bench.claim_soon(&claim(1, false, true));
    let (stream, _) = bench.received(&mut two, Some("pc.ram"));
    assert!(stream == expected(&primary, Form::Shared(BlockId(0))));
    assert!(bench.ram.files() > 0);
    two.ask(&json!({"command": "promoted", "session": 1})).unwrap();
    // The guest's memory is the guest's alone: here it has no name and no mapping any more.
    assert_eq!(bench.ram.files(), 0);
    for retry in [false, true] {
        let refused = bench.conversation().ask(&claim(1, true, retry)).unwrap_err();
        assert!(refused.contains("was promoted at checkpoint 1"), "{refused}");
    }
    // What holds it last is another thread's.
    let status = until("its memory to be given back", || {
        let status = two.ask(&json!({"command": "status"})).unwrap();
        (status["ram_held_bytes"] == 0).then_some(status)
    });
    assert_eq!(status["sessions"], json!([]));
}

#[test]
fn a_primary_that_is_connected_is_closed_by_force_alone() {
    let bench = Bench::start();
    let mut primary = bench.receiver.protected();
    let mut conversation = bench.conversation();
    conversation.ask(&claim(1, true, false)).unwrap();
    // A claim alone changes nothing.
    primary.checkpoint(&[(0, 5, 0x55)]);
    let (stream, restored) = bench.received(&mut conversation, None);
    assert_eq!(restored["checkpoint"], 2);
    assert!(stream == expected(&primary, Form::Complete));
    assert!(primary.is_closed(), "connections were left open");
    let status = bench.receiver.ended();
    assert!(!status.lost && status.end.unwrap().contains("failover"));
}

/// A typing error in the destination must not cost a guest its protection.
#[test]
fn a_target_that_cannot_be_opened_ends_no_session() {
    let bench = Bench::start();
    let mut primary = bench.receiver.protected();
    let mut conversation = bench.conversation();
    conversation.ask(&claim(1, true, false)).unwrap();
    let refusals = |conversation: &mut Conversation, primary: &mut HostilePrimary| {
        let file = tempfile::tempfile().expect("a file");
        let both = [file.as_fd(), file.as_fd()];
        for (shared, files, says) in [
            (None, &[][..], "and 0 came"),
            (None, &both, "and 2 came"),
            (Some("pc.rom"), &both[..1], "has no ram block"),
        ] {
            let refused = conversation.restore(1, shared, files).unwrap_err();
            assert!(refused.contains(says), "{refused}");
            primary.checkpoint(&[(0, 5, 0x55)]);
        }
        let keep = json!({"command": "restore", "session": 1, "to": "x", "shared": null, "keep": {"disks": ["root"]}});
        let refused = conversation.ask_with(&keep, &both).unwrap_err();
        assert!(refused.contains("needs 3 open files"), "{refused}");
    };
    refusals(&mut conversation, &mut primary);
    // The claim is still there, and so is the primary.
    let (stream, restored) = bench.received(&mut conversation, None);
    assert_eq!(restored["checkpoint"], 4);
    assert!(stream == expected(&primary, Form::Complete));
}

/// A failover of session 1 to somewhere else, though its primary is connected.
fn forced<'a>(control: &'a str, fence: &'a str, to: &'a str) -> [&'a str; 10] {
    [
        "failover",
        "--control",
        control,
        "--session",
        "1",
        "--force",
        "--fence",
        fence,
        "--to",
        to,
    ]
}

/// The command opens it, before anything is asked of the receiver but the claim.
#[test]
fn a_mistyped_destination_ends_no_session() {
    let bench = Bench::start();
    let mut primary = bench.receiver.protected();
    let [victim, link, nobody] = ["victim", "link", "nobody"].map(|name| bench.scratch.file(name));
    std::os::unix::fs::symlink(&victim, &link).unwrap();
    let (nobody, link) = (format!("unix:{nobody}"), format!("file:{link}"));
    let control = format!("unix:{}", bench.scratch.file("control"));
    let fenced = bench.scratch.file("fenced");
    let fence =
        format!("[ \"$COLO_RING_SESSION $COLO_RING_MACHINE\" = '1 pc-i440fx-11.1' ] && touch {fenced}");
    for (to, more, says) in [
        (nobody.as_str(), &[][..], "cannot connect to"),
        ("tcp:127.0.0.1:1", &[], "cannot connect to"),
        ("file:/nonexistent/stream", &[], "No such file"),
        (&link, &[], "exists already"),
        (&link, &["--overwrite"], "is not replaced"),
        ("fd:3", &[], "write file:PATH, unix:PATH"),
        ("-", &["--keep", "/nonexistent/stream"], "No such file"),
    ] {
        let refused = run(&[&forced(&control, &fence, to)[..], more].concat());
        let text = String::from_utf8_lossy(&refused.stderr);
        assert!(!refused.status.success() && text.contains(says), "{to}: {text}");
        assert!(!std::path::Path::new(&fenced).exists(), "{to} {more:?}");
        primary.checkpoint(&[(0, 5, 0x55)]);
    }
    assert!(!std::path::Path::new(&victim).exists());
}

/// The fence is run when it is certain that something takes the checkpoint; a fence that fails has cost a connection alone.
#[test]
fn a_connection_is_there_before_the_fence() {
    let bench = Bench::start();
    let mut primary = bench.receiver.protected();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let port = listener.local_addr().unwrap().port();
    let to = format!("tcp:127.0.0.1:{port}");
    let control = format!("unix:{}", bench.scratch.file("control"));
    // One that listens has 0A there, and one that is connected 01.
    let fence = |result: &str| format!("grep -qi ':{port:04X} 01 ' /proc/net/tcp && exit {result}");
    let failover = |result: &str| run(&forced(&control, &fence(result), &to));
    let refused = failover("7");
    let text = String::from_utf8_lossy(&refused.stderr);
    assert!(
        !refused.status.success() && text.contains("exit status: 7") && text.contains("nothing was given"),
        "{text}"
    );
    let given = || {
        let (mut connection, _) = until("a connection", || listener.accept().ok());
        let mut bytes = Vec::new();
        connection.read_to_end(&mut bytes).unwrap();
        bytes
    };
    assert!(given().is_empty());
    primary.checkpoint(&[(0, 5, 0x55)]);
    std::thread::scope(|threads| {
        let done = threads.spawn(|| failover("0"));
        assert!(given() == expected(&primary, Form::Complete));
        let done = done.join().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    });
}

/// A guest that runs twice destroys its disks: that its primary is off must be made sure of, or be stated.
#[test]
fn force_needs_a_fence_or_a_statement() {
    let receiver = RunningReceiver::start(wrapped(&[]), &[]);
    let mut primary = SynthPrimary::connect(receiver.address(), &guest()).expect("precopy");
    primary.checkpoint().expect("a checkpoint");
    let scratch = Scratch::new();
    let to = format!("file:{}", scratch.file("stream"));
    let failover = |more: &[&str]| {
        let arguments = [&["failover", "--session", "1", "--to", &to], more].concat();
        receiver.command(&arguments)
    };
    for (more, says) in [
        (&[][..], "--unfenced"),
        (&["--force"], "--unfenced"),
        (&["--unfenced"], "--force"),
        (&["--force", "--fence", "exit 7"], "--fence 'exit 7' failed"),
    ] {
        let refused = failover(more);
        let text = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(
            !refused.status.success() && text.contains(says),
            "{more:?}: {text}"
        );
        primary.checkpoint().expect("the session goes on");
    }
    let done = failover(&["--force", "--unfenced"]);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    assert!(std::fs::metadata(scratch.file("stream")).is_ok());
}

/// The receiver finds a closed socket then, which is not what is wrong.
#[test]
fn a_standard_output_that_takes_nothing_is_named() {
    let receiver = RunningReceiver::start(wrapped(&[]), &[]);
    let mut primary = SynthPrimary::connect(receiver.address(), &guest()).expect("precopy");
    primary.checkpoint().expect("a checkpoint");
    let control = format!("unix:{}", receiver.control_path());
    let line = [
        "failover",
        "--control",
        &control,
        "--session",
        "1",
        "--force",
        "--unfenced",
        "--to",
        "-",
    ];
    let full = File::options().write(true).open("/dev/full").unwrap();
    let refused = wrapped(&[])
        .args(line)
        .stdout(full)
        .stderr(Stdio::piped())
        .spawn();
    let refused = refused.unwrap().wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&refused.stderr);
    assert!(
        !refused.status.success() && text.contains("standard output: No space left"),
        "{text}"
    );
}

#[test]
fn what_fails_leaves_the_checkpoint_there() {
    let bench = Bench::start();
    let mut primary = bench.receiver.protected();
    primary.cut(Cut::Fin);
    bench.receiver.ended();
    let mut conversation = bench.conversation();
    let full = File::options().write(true).open("/dev/full").unwrap();
    let (gone, _) = UnixStream::pair().unwrap();
    for (shared, target, says) in [
        (None, full.as_fd(), "No space left"),
        (None, gone.as_fd(), "did not take the checkpoint"),
        (Some("pc.rom"), full.as_fd(), "has no ram block pc.rom"),
    ] {
        conversation.claim(1).unwrap();
        let refused = conversation.restore(1, shared, &[target]).unwrap_err();
        assert!(refused.contains(says), "{refused}");
        // Nothing was given, so nothing can have run, whatever the request says.
        let released = conversation.ask(&release(1, true)).unwrap();
        assert_eq!(released["promotion"], Value::Null, "{says}");
    }
    let path = bench.scratch.file("stream");
    let control = format!("unix:{}", bench.scratch.file("control"));
    let line = ["failover", "--control", &control, "--session", "1", "--to"];
    let file = format!("file:{path}");
    // Somebody's disk is not replaced by a slip.
    std::fs::write(&path, "a disk").expect("a file");
    let kept = ["-", "--keep", &path];
    for target in [&[&*file][..], &kept] {
        let refused = run(&[&line[..], target].concat());
        let text = String::from_utf8_lossy(&refused.stderr);
        assert!(
            text.contains("exists already") && text.contains("nothing was given"),
            "{text}"
        );
        assert_eq!(std::fs::read(&path).expect("a file"), b"a disk");
    }
    let given = run(&[&line[..], &[&file, "--overwrite"]].concat());
    assert!(
        given.status.success(),
        "{}",
        String::from_utf8_lossy(&given.stderr)
    );
    assert!(std::fs::read(&path).unwrap() == expected(&primary, Form::Complete));
    assert_eq!(
        std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
        0o600
    );
    assert!(!std::path::Path::new(&format!("{path}~part")).exists());
    let mut conversation = bench.claim_soon(&claim(1, false, true));
    // The file may be lost: whoever knows that no guest runs from it may have another.
    assert_eq!(
        conversation.ask(&release(1, false)).unwrap()["promotion"],
        Value::Null
    );
    conversation.claim(1).unwrap();
}

/// A plain migration by mistake: the guest may live only here, so not even `--once` gives it up.
#[test]
fn the_only_copy_of_a_guest_is_kept() {
    let receiver = RunningReceiver::start(wrapped(&[]), &["--once"]);
    let primary = SynthPrimary::connect(receiver.address(), &guest()).expect("precopy");
    primary.close().expect("its end");
    receiver.wait_for_log("keeps running although it was started with --once");
    receiver.wait_for_log("colo-ring failover --session 1");
    assert_eq!(receiver.status()["sessions"][0]["checkpoint"], 0);
    receiver.signal(nix::sys::signal::Signal::SIGTERM);
    let ended = receiver.wait();
    assert!(ended.status.success(), "{}", ended.log);
}

/// The hook is run for a lost primary, and for nothing else.
#[test]
fn a_lost_primary_runs_the_hook() {
    let scratch = Scratch::new();
    let (part, told) = (scratch.file("part"), scratch.file("told"));
    let hook = format!("env | grep ^COLO_RING_ | sort > {part} && cat {part} >> {told}; exit 3");
    let receiver = RunningReceiver::start(wrapped(&[]), &["--on-loss", &hook]);
    let mut primary = SynthPrimary::connect(receiver.address(), &guest()).expect("precopy");
    let before = Instant::now();
    primary.checkpoint().expect("a checkpoint");
    std::thread::sleep(Duration::from_millis(150));
    drop(primary);
    receiver.wait_for_log("--on-loss failed (exit status: 3)");
    let text = std::fs::read_to_string(&told).expect("what the hook wrote");
    let value = |key: &str| {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        line.unwrap_or_else(|| panic!("{key} is missing in {text}"))
            .to_owned()
    };
    assert_eq!(value("COLO_RING_SESSION"), "1");
    assert_eq!(value("COLO_RING_CHECKPOINT"), "1");
    let age: u64 = value("COLO_RING_CHECKPOINT_AGE_MS").parse().expect("a number");
    assert!(
        (150..=before.elapsed().as_millis().try_into().unwrap()).contains(&age),
        "{age} ms"
    );
    assert!(value("COLO_RING_REASON").contains("the last committed checkpoint is 1"));
    assert!(value("COLO_RING_PEER").starts_with("127.0.0.1:"));
    assert!(value("COLO_RING_CONTROL").starts_with("unix:/"));
    assert!(!value("COLO_RING_MACHINE").is_empty());
    // The receiver's own end is no loss.
    let _primary = SynthPrimary::connect(receiver.address(), &guest()).expect("precopy");
    receiver.signal(nix::sys::signal::Signal::SIGTERM);
    assert!(receiver.wait().status.success());
    assert_eq!(std::fs::read_to_string(&told).expect("the same"), text);
}
