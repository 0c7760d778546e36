//! Serves measurements to Prometheus and its like, over HTTP.
//!
//! The server is a thread of its own, because anyone who reaches its address can send it anything:
//! * Each connection is one request. Its head is limited in bytes and in time, and so is the time in which the answer is read.
//! * There are [`CLIENTS_MAX`] at a time. One more ends the oldest, so that clients that are silent keep no scraper out.
//! * Connections are accepted [`PACE`] apart, and what they are answered with is made at most once in [`FRESH`]: scrapers in any number cost
//!   the rest of the process one status a second.
//!
//! What is not read waits in nobody's way: a page is one shared text. Nothing here writes to the log on a client's behalf.

mod families;
mod http;
mod page;

pub(crate) use families::{About, Families, Labels, PhaseHistogram};
pub(crate) use page::Source;

use colo_ring::net::{Accepted, ListenAddress, ListenError, Listener, PassedSockets, SocketFile};
use page::Page;
use std::collections::VecDeque;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::sync::{Mutex, Notify, mpsc};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

/// Connections at a time.
const CLIENTS_MAX: usize = 16;

/// The least time between two that are accepted.
const PACE: Duration = Duration::from_millis(20);

/// How long a page is given out.
const FRESH: Duration = Duration::from_secs(1);

/// How often what was measured is taken in.
const COLLECT_EVERY: Duration = Duration::from_millis(200);

/// From a connection's beginning to its end.
const DEADLINE: Duration = Duration::from_secs(10);

/// An address that is listened on, and not served yet.
pub(crate) struct MetricsListener(Listener);

impl MetricsListener {
    /// Listens, or takes the socket of this address from those that were passed. A UNIX socket is open to the group, as far as the umask allows it.
    ///
    /// # Errors
    /// If the address is unavailable.
    pub(crate) fn obtain(address: &ListenAddress, passed: &PassedSockets) -> Result<Self, ListenError> {
        Listener::obtain(address, passed).map(Self)
    }

    /// The address with its real port.
    pub(crate) fn address(&self) -> &ListenAddress {
        self.0.address()
    }

    /// Serves `source` on a thread that calls `enter` once it has what it works with.
    ///
    /// # Errors
    /// If there is no thread for it.
    pub(crate) fn serve(
        mut self,
        source: impl Source,
        enter: impl FnOnce() + Send + 'static,
    ) -> io::Result<MetricsServer> {
        let file = self.0.take_file();
        let stop = Arc::new(Notify::new());
        let stopped = stop.clone();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let thread = std::thread::Builder::new().name("metrics".to_owned());
        let thread = thread.spawn(move || {
            enter();
            let serve = serve(self.0, source, stopped);
            tokio::task::LocalSet::new().block_on(&runtime, serve);
        })?;
        Ok(MetricsServer {
            stop,
            thread: Some(thread),
            _file: file,
        })
    }
}

/// A server that is running; dropped, it ends.
pub(crate) struct MetricsServer {
    stop: Arc<Notify>,
    thread: Option<std::thread::JoinHandle<()>>,
    /// Removed here, and not by the thread that strangers talk to.
    _file: Option<SocketFile>,
}

impl Drop for MetricsServer {
    fn drop(&mut self) {
        self.stop.notify_one();
        if let Some(thread) = self.thread.take() {
            // It reports its own panic.
            let _ = thread.join();
        }
    }
}

async fn serve<S: Source>(listener: Listener, source: S, stop: Arc<Notify>) {
    let (sender, mut accepted) = mpsc::channel(1);
    tokio::task::spawn_local(Rc::new(listener).accept_all(0, sender));
    let page = Rc::new(Mutex::new(Page::new(source)));
    let mut clients = Clients::default();
    let mut collect = interval(COLLECT_EVERY);
    collect.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut is_paced = true;
    loop {
        tokio::select! {
            () = stop.notified() => return,
            _ = collect.tick() => page.lock().await.collect(),
            () = sleep(PACE), if !is_paced => is_paced = true,
            Some(connection) = accepted.recv(), if is_paced => {
                is_paced = false;
                // Of one that could not be accepted there is nothing to serve, and the next is waited for.
                if let Ok(connection) = connection {
                    clients.serve(connection, page.clone());
                }
            }
            Some(_) = clients.tasks.join_next() => {}
        }
    }
}

/// The connections.
#[derive(Default)]
struct Clients {
    tasks: JoinSet<()>,
    /// The oldest first.
    order: VecDeque<AbortHandle>,
}

impl Clients {
    fn serve<S: Source>(&mut self, connection: Accepted, page: Rc<Mutex<Page<S>>>) {
        self.order.retain(|client| !client.is_finished());
        if self.order.len() >= CLIENTS_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            oldest.abort();
        }
        let task = self.tasks.spawn_local(async move {
            // A client that has gone, or takes too long, has no answer.
            let _ = timeout(DEADLINE, answer(connection, &page)).await;
        });
        self.order.push_back(task);
    }
}

async fn answer<S: Source>(connection: Accepted, page: &Mutex<Page<S>>) -> io::Result<()> {
    // Only read and written, whatever kind of socket it is.
    let stream = std::os::unix::net::UnixStream::from(connection.socket);
    stream.set_nonblocking(true)?;
    let mut stream = UnixStream::from_std(stream)?;
    let request = http::read_request(&mut stream).await?;
    let body = match &request {
        Ok(http::Request { format, .. }) => get(page, *format).await,
        Err(_) => None,
    };
    http::respond(&mut stream, request, body).await
}

/// The page in this form, when it is time for that. What was measured is taken in meanwhile.
async fn get<S: Source>(page: &Mutex<Page<S>>, format: http::Format) -> Option<Arc<[u8]>> {
    loop {
        let mut page = page.lock().await;
        let early = page.early();
        if early.is_zero() {
            return page.get(format).await;
        }
        drop(page);
        sleep(early).await;
    }
}

#[cfg(test)]
mod tests;
