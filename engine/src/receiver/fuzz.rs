//! What a fuzzer gives to the parts of a receiver that read what others have sent or left: the targets of `fuzz/`.

use super::control::{ClientEvent, Conversation, RequestError, serve_client};
use super::guest::{GuestIdentity, StoredGuest};
use super::guest_memory::Budgets;
use super::links::{self, GuestMarks, Links, SessionOutput};
use super::promotion::ClientId;
use super::recovery::{recover_all, recover_orphaned_disks};
use super::refusals::Refusals;
use super::{Event, Events, Request};
use crate::budget::Budget;
use crate::link::{PREFACE, ToGuard, ToReceiver};
use crate::net::{Accepted, Origin, Peer};
use crate::ring::{Semaphore, Waker};
use crate::store::KeptFiles;
use crate::units::{CheckpointId, PAGE_SIZE, PageIndex};
use std::future::pending;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tokio::task::LocalSet;

thread_local!(static RUNTIME: Runtime = runtime());

fn runtime() -> Runtime {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    // Sockets are looked at after every task, so that what was written is read at once.
    builder.enable_all().event_interval(1).build().expect("a runtime")
}

/// A line for the operator has something in it, and commands no terminal.
fn check_event(event: &Event) {
    if let Event::Warning(remark) | Event::Note(remark) = event {
        let text = &remark.text;
        assert!(
            !text.is_empty() && !text.chars().any(char::is_control),
            "{text:?}"
        );
    }
}

/// What a client of the control socket sends. Counts the requests.
pub fn control(input: &[u8]) -> usize {
    RUNTIME.with(|runtime| runtime.block_on(converse(input)))
}

async fn converse(input: &[u8]) -> usize {
    let (client, server) = tokio::net::UnixStream::pair().expect("two descriptors");
    let (ask, mut asked) = mpsc::channel(1);
    let conversation = Conversation::new(ClientId::OWN, Rc::default());
    let (mut requests, mut answers) = (0, Vec::new());
    let talk = async {
        let (mut read, mut write) = client.into_split();
        let say = async {
            // It fails where the receiver has closed the conversation.
            let _ = write.write_all(input).await;
            drop(write);
        };
        let _ = tokio::join!(say, read.read_to_end(&mut answers));
    };
    let serve = async {
        let _ = serve_client(server, &conversation, &ask).await;
    };
    let answer = async {
        while let Some(ClientEvent::Request(pending)) = asked.recv().await {
            requests += 1;
            let text = serde_json::to_vec(&pending.request).expect("JSON");
            let again: Request = serde_json::from_slice(&text).expect("an own request");
            assert_eq!(again, pending.request);
            let _ = pending.reply.send(Err(RequestError::NoSession(1)));
        }
        pending::<()>().await;
    };
    tokio::select! {
        _ = async { tokio::join!(talk, serve) } => {}
        () = answer => {}
    }
    let lines = answers.split_inclusive(|byte| *byte == b'\n');
    let refused = lines.filter(|line| {
        let answer: serde_json::Value = serde_json::from_slice(line).expect("a line of JSON");
        answer["ok"] == false
    });
    assert!(refused.count() >= requests);
    requests
}

/// What a guard sends on its link, while its session goes on. Counts messages that are understood.
///
/// An input is steps of a byte each: the session goes on, or is to be handed over, or ends, or the guard sends bytes (their count is
/// in the byte).
pub fn link(input: &[u8]) -> usize {
    RUNTIME.with(|runtime| LocalSet::new().block_on(runtime, guard(input)))
}

/// The session of a guest without a UUID, as its main channel drives it.
struct Guarded {
    links: Arc<Links>,
    output: Arc<SessionOutput>,
    checkpoint: CheckpointId,
    is_begun: bool,
    is_committed: bool,
    is_over: bool,
}

impl Guarded {
    fn guest() -> GuestMarks {
        GuestMarks {
            uuid: None,
            origin: Origin::Process(1),
            who: None,
        }
    }

    fn go_on(&mut self) {
        if self.is_over {
            return;
        }
        if !self.is_begun {
            self.is_begun = true;
            if self.checkpoint.0 == 0 {
                let identity = GuestIdentity::recovered(1, StoredGuest::default());
                let links = &self.links;
                links.session_begins(1, Self::guest().origin);
                // Refused only where a guard was lost after the session had begun: this one begins and commits in one step.
                let _ = links.session_commits(&Arc::new(identity), Self::guest(), &self.output);
            }
            self.output.ask(self.checkpoint);
        } else if !self.is_committed {
            self.is_committed = true;
            self.output.committed(self.checkpoint);
        } else if self.output.may_acknowledge(self.checkpoint) {
            self.checkpoint.0 += 1;
            (self.is_begun, self.is_committed) = (false, false);
        }
    }

    fn end(&mut self) {
        if !self.is_over {
            self.is_over = true;
            self.output.end("its primary is lost".to_owned());
            self.links.session_ended(1);
        }
    }
}

async fn guard(input: &[u8]) -> usize {
    let links = Arc::<Links>::default();
    let mut session = Guarded {
        links: links.clone(),
        output: Arc::new(SessionOutput::new(Waker::Thread(Arc::new(Semaphore::default())))),
        checkpoint: CheckpointId(0),
        is_begun: false,
        is_committed: false,
        is_over: false,
    };
    let (mut own, socket) = UnixStream::pair().expect("two descriptors");
    own.set_nonblocking(true).expect("a socket");
    let accepted = Accepted {
        socket: socket.into(),
        is_tcp: false,
        peer: Peer {
            listener: 0,
            origin: Guarded::guest().origin,
        },
        from: "fuzz".to_owned(),
    };
    // Nothing here takes as long.
    let deadline = Duration::from_secs(600);
    let events: Arc<Events> = Arc::new(|event| check_event(&event));
    let refusals = Arc::new(Refusals::new(events.clone()));
    let served = links::serve((accepted, None), (links, Arc::default()), deadline, refusals);
    let served = tokio::task::spawn_local(served);
    let (mut rest, mut sent, mut answers) = (input, Vec::new(), Vec::new());
    while let Some((step, tail)) = rest.split_first() {
        rest = tail;
        match step {
            0..=15 => session.go_on(),
            16 => drop(session.output.begin_handover()),
            17 => session.output.cancel_handover(),
            18 => session.end(),
            length => {
                let (bytes, tail) = rest.split_at(rest.len().min(usize::from(length - 18)));
                rest = tail;
                // It fails where the receiver has closed the link.
                let _ = own.write_all(bytes);
                sent.extend_from_slice(bytes);
            }
        }
        for _ in 0..4 {
            tokio::task::yield_now().await;
        }
        read_available(&mut own, &mut answers);
    }
    // The guard is gone: its session goes on without it, unless it has handed its guest over, or has held nothing yet.
    let _ = own.shutdown(std::net::Shutdown::Write);
    served.await.expect("no panic");
    let output = &session.output;
    let is_free =
        output.may_acknowledge(session.checkpoint) || output.ends_primary() || output.is_unguarded();
    assert!(is_free, "a link that has ended holds its session up");
    read_available(&mut own, &mut answers);
    check_answers(&answers);
    let lines = sent.split(|byte| *byte == b'\n');
    lines
        .filter(|line| serde_json::from_slice::<ToReceiver>(line).is_ok())
        .count()
}

fn read_available(socket: &mut UnixStream, into: &mut Vec<u8>) {
    let mut bytes = [0; 4096];
    while let Ok(read @ 1..) = socket.read(&mut bytes) {
        into.extend_from_slice(&bytes[..read]);
    }
}

/// What the receiver says is understood by a guard.
fn check_answers(answers: &[u8]) {
    assert_ne!(answers.first_chunk(), Some(&PREFACE));
    // The last line may be cut where the receiver has closed.
    for line in answers
        .split_inclusive(|byte| *byte == b'\n')
        .filter(|line| line.ends_with(b"\n"))
    {
        let _: ToGuard = serde_json::from_slice(line).expect("a message to a guard");
    }
}

/// What is recovered of a session: its checkpoint, and a checksum of its content.
pub type Recovered = Vec<(u64, u32)>;

/// Recovers the sessions of a RAM directory. They stay there.
pub fn recover(directory: &Path) -> Recovered {
    let budgets = Budgets {
        memory: Arc::new(Budget::new(1 << 30, "--ram-limit")),
        mappings: Arc::new(Budget::of_mappings(1 << 16)),
    };
    let (all, _) = recover_all(directory, Instant::now(), &budgets, &|event| check_event(&event));
    let content = |image: &crate::store::CommittedImage| {
        let view = image.checkpoint_view().expect("it was recovered");
        let mut checksum = crc32c::crc32c(view.device_state());
        let mut page = [0; PAGE_SIZE];
        for number in 0..image.table().total_pages() {
            view.read(PageIndex::new(number), &mut page);
            checksum = crc32c::crc32c_append(checksum, &page);
        }
        (view.checkpoint().0, checksum)
    };
    let found = all.iter().map(|kept| content(&kept.image)).collect();
    for kept in all {
        assert_eq!(kept.image.keep_files(), KeptFiles::Kept);
    }
    found
}

/// Recovers the disks of a directory that no checkpoint needs. Counts those that were.
pub fn recover_disks(directory: &Path) -> usize {
    let notes = Arc::new(AtomicUsize::new(0));
    let counted = notes.clone();
    let events: Box<Events> = Box::new(move |event| {
        check_event(&event);
        counted.fetch_add(usize::from(matches!(event, Event::Note(_))), Ordering::Relaxed);
    });
    recover_orphaned_disks(directory, &*events);
    notes.load(Ordering::Relaxed)
}
