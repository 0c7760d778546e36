//! A receiver in this process whose images are files, and the ends of its sessions.

use crate::hostile::HostilePrimary;
use crate::lab::SharedDirectory;
use crate::{HANG_LIMIT, receiver_options};
use colo_ring::receiver::{
    DumpFiles, Dumped, Event, ListenAddress, Receiver, ReceiverOptions, Request, Response, SessionStatus,
};
use colo_ring::ring::BackendKind;
use colo_ring::store::{HugePages, StoreOptions};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::mpsc;

/// Stopped when dropped.
pub struct LocalReceiver {
    /// Some until it is dropped.
    receiver: Option<Receiver>,
    channels: u8,
    events: mpsc::Receiver<Event>,
}

/// The options of a receiver whose images are files of this directory.
///
/// # Panics
/// Where the cores that it may use are unknown.
#[must_use]
pub fn options_with_files(channels: u8, ram: &SharedDirectory) -> ReceiverOptions {
    ReceiverOptions {
        registered: false,
        store: StoreOptions {
            hugepages: HugePages::Off,
            ram_dir: Some(ram.path().to_owned()),
            ..StoreOptions::default()
        },
        ..receiver_options(BackendKind::Epoll, channels)
    }
}

/// The address and port of a TCP address.
///
/// # Panics
/// If it is of another kind.
#[must_use]
pub fn tcp(address: &ListenAddress) -> SocketAddr {
    match address {
        ListenAddress::Tcp(address) => *address,
        ListenAddress::Unix(_) => panic!("the receiver listens on TCP"),
    }
}

/// A session's last committed checkpoint, dumped into a directory as `colo-ring dump` does it.
///
/// # Errors
/// What the receiver says.
///
/// # Panics
/// If the files cannot be made.
pub fn dump(receiver: &Receiver, session: u32, directory: &Path) -> Result<Dumped, String> {
    let refused = |error: colo_ring::receiver::RequestError| error.to_string();
    let contents = match receiver.ask(Request::Contents { session }).map_err(refused)? {
        Response::Contents(contents) => contents,
        other => panic!("{other:?}"),
    };
    let files = DumpFiles::create(directory, contents).expect("files");
    let open = files.descriptors();
    let open = open
        .iter()
        .map(|file| file.try_clone_to_owned().expect("a descriptor"));
    let disks = files.disks();
    let request = Request::Dump { session, disks };
    match receiver.ask_with(request, open.collect()).map_err(refused)? {
        Response::Dumped(dumped) => Ok(files.finish(dumped).expect("complete files")),
        other => panic!("{other:?}"),
    }
}

impl LocalReceiver {
    /// Starts it.
    ///
    /// # Panics
    /// If that fails.
    #[must_use]
    pub fn start(options: ReceiverOptions) -> Self {
        let (tell, events) = mpsc::channel();
        let channels = options.channels;
        let receiver = Receiver::start(options, move |event| {
            // At the very end the other side of the queue is gone.
            let _ = tell.send(event);
        });
        Self {
            receiver: Some(receiver.expect("a receiver")),
            channels,
            events,
        }
    }

    /// The receiver itself.
    ///
    /// # Panics
    /// Never: it runs until this is dropped.
    #[must_use]
    pub fn get(&self) -> &Receiver {
        self.receiver.as_ref().expect("it runs until it is dropped")
    }

    /// A primary that has its connections, and has sent nothing yet.
    #[must_use]
    pub fn connected(&self) -> HostilePrimary {
        HostilePrimary::connect(tcp(&self.get().addresses()[0]), self.channels)
    }

    /// A session with one committed checkpoint.
    #[must_use]
    pub fn protected(&self) -> HostilePrimary {
        HostilePrimary::protected(tcp(&self.get().addresses()[0]), self.channels)
    }

    /// Waits for a warning with these words.
    ///
    /// # Panics
    /// If none comes.
    pub fn warned(&self, words: &str) {
        loop {
            match self.events.recv_timeout(HANG_LIMIT).expect("a warning") {
                Event::Warning(remark) if remark.text.contains(words) => return,
                _ => {}
            }
        }
    }

    /// Waits for the end of a session.
    ///
    /// # Panics
    /// If none ends.
    pub fn ended(&self) -> SessionStatus {
        loop {
            if let Event::Ended(status) = self.events.recv_timeout(HANG_LIMIT).expect("the session's end") {
                return *status;
            }
        }
    }
}

impl Drop for LocalReceiver {
    fn drop(&mut self) {
        if let Some(receiver) = self.receiver.take() {
            receiver.stop_handle().stop();
            let _ = receiver.wait();
        }
    }
}
