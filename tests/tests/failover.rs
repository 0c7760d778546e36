//! Giving a checkpoint away, as the control socket does it: one conversation wins, what is given is the committed
//! checkpoint, and what fails leaves it there. What a QEMU makes of it is tested in `qemu/failover.rs`.

use colo_ring::blocks::BlockTable;
use colo_ring::failover::{Form, write_stream};
use colo_ring::receiver::ReceiverOptions;
use colo_ring::session::GuestDescription;
use colo_ring::units::{BlockId, PAGE_SIZE};
use colo_ring_tests::command::{RunningReceiver, Scratch, guest, until, wrapped};
use colo_ring_tests::hostile::{BLOCKS, Cut, HostilePrimary, RAM, header};
use colo_ring_tests::lab::SharedDirectory;
use colo_ring_tests::receiver::{LocalReceiver, options_with_files};
use colo_ring_tools::primary::SynthPrimary;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

const CHANNELS: u8 = 2;

/// A receiver with a control socket.
struct Bench {
    receiver: LocalReceiver,
    scratch: Scratch,
    ram: SharedDirectory,
}

/// A conversation on the control socket.
struct Conversation(BufReader<UnixStream>);

impl Conversation {
    fn ask(&mut self, request: &Value) -> Result<Value, String> {
        writeln!(self.0.get_mut(), "{request}").expect("the receiver listens");
        let mut line = String::new();
        self.0.read_line(&mut line).expect("an answer");
        let mut line: Value = serde_json::from_str(&line).expect("JSON");
        match line["ok"].as_bool() {
            Some(true) => Ok(line["answer"].take()),
            _ => Err(line["error"].as_str().expect("a reason").to_owned()),
        }
    }

    fn claim(&mut self, session: u32) -> Result<Value, String> {
        self.ask(&claim(session, false, false))
    }

    fn restore(&mut self, session: u32, to: &str, shared: Option<&str>) -> Result<Value, String> {
        self.ask(&json!({"command": "restore", "session": session, "to": to, "shared": shared, "keep": null}))
    }
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
            ram_limit_bytes: 64 << 20,
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
        let stream = UnixStream::connect(self.scratch.file("control")).expect("the control socket");
        Conversation(BufReader::new(stream))
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
        let path = self.scratch.file("incoming");
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).expect("a socket");
        let reader = std::thread::spawn(move || {
            let (mut bytes, mut stream) = (Vec::new(), listener.accept().expect("a connection").0);
            stream.read_to_end(&mut bytes).expect("a stream");
            bytes
        });
        let restored = conversation
            .restore(1, &format!("unix:{path}"), shared)
            .expect("it is given");
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
        json!({"command": "restore", "session": 1, "to": "file:/tmp/x", "shared": null, "keep": null}),
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
    assert!(refused.contains("was given to unix:"), "{refused}");

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
    let status = two.ask(&json!({"command": "status"})).unwrap();
    assert_eq!(status["sessions"], json!([]));
    assert_eq!(status["ram_held_bytes"], 0);
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
    let link = bench.scratch.file("link");
    std::os::unix::fs::symlink(bench.scratch.file("victim"), &link).unwrap();
    let nobody = format!("unix:{}", bench.scratch.file("nobody"));
    let link = format!("file:{link}");
    for (to, shared, says) in [
        (nobody.as_str(), None, "cannot connect to"),
        ("tcp:127.0.0.1:1", None, "cannot connect to"),
        ("file:/nonexistent/stream", None, "No such file"),
        (link.as_str(), None, "is not replaced"),
        ("fd:3", None, "is not a destination for a stream"),
        ("file:/nonexistent/stream", Some("pc.rom"), "has no ram block"),
    ] {
        let refused = conversation.restore(1, to, shared).unwrap_err();
        assert!(refused.contains(says), "{to}: {refused}");
        primary.checkpoint(&[(0, 5, 0x55)]);
    }
    assert!(!std::path::Path::new(&bench.scratch.file("victim")).exists());
    // The claim is still there, and so is the primary.
    let (stream, restored) = bench.received(&mut conversation, None);
    assert_eq!(restored["checkpoint"], 7);
    assert!(stream == expected(&primary, Form::Complete));
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

#[test]
fn what_fails_leaves_the_checkpoint_there() {
    let bench = Bench::start();
    let mut primary = bench.receiver.protected();
    primary.cut(Cut::Fin);
    bench.receiver.ended();
    let mut conversation = bench.conversation();
    let nobody = format!("unix:{}", bench.scratch.file("nobody"));
    for (to, shared, says) in [
        (nobody.as_str(), None, "cannot connect to"),
        ("tcp:127.0.0.1:1", None, "cannot connect to"),
        ("file:relative", None, "not an absolute path"),
        ("file:/nonexistent/stream", None, "No such file"),
        ("fd:3", None, "is not a destination for a stream"),
        (
            "file:/nonexistent/stream",
            Some("pc.rom"),
            "has no ram block pc.rom",
        ),
    ] {
        conversation.claim(1).unwrap();
        let refused = conversation.restore(1, to, shared).unwrap_err();
        assert!(refused.contains(says), "{to}: {refused}");
        // Nothing was given, so nothing can have run, whatever the request says.
        let released = conversation.ask(&release(1, true)).unwrap();
        assert_eq!(released["promotion"], Value::Null, "{to}");
    }
    let path = bench.scratch.file("stream");
    conversation.claim(1).unwrap();
    conversation.restore(1, &format!("file:{path}"), None).unwrap();
    assert!(std::fs::read(&path).unwrap() == expected(&primary, Form::Complete));
    assert_eq!(
        std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
        0o600
    );
    assert!(!std::path::Path::new(&format!("{path}~part")).exists());
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
