//! A receiver under a service manager that the test plays: notifications, a watchdog, and sockets that pass from one process to the next.

use colo_ring_tests::HANG_LIMIT;
use colo_ring_tests::command::{Scratch, guest, until};
use colo_ring_tools::primary::SynthPrimary;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::File;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::process::{Child, Command, Stdio};

/// The manager's end.
struct Manager {
    scratch: Scratch,
    socket: UnixDatagram,
}

/// A receiver, killed when dropped.
struct Service(Child);

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Service {
    fn end(mut self) {
        let process = Pid::from_raw(i32::try_from(self.0.id()).unwrap());
        kill(process, Signal::SIGTERM).unwrap();
        assert!(self.0.wait().unwrap().success());
    }
}

impl Manager {
    fn new() -> Self {
        let scratch = Scratch::new();
        let socket = UnixDatagram::bind(scratch.file("notify")).unwrap();
        // A message that does not come is an error, not a wait for ever.
        socket.set_read_timeout(Some(HANG_LIMIT)).unwrap();
        Self { scratch, socket }
    }

    /// Starts a receiver with this socket as the first that is passed, by a shell, which has the process id that the variables must name.
    fn start(&self, listen: &str, passed: Option<OwnedFd>, variables: &[(&str, &str)]) -> Service {
        let script = match passed {
            Some(_) => "exec 3<&0 0</dev/null; LISTEN_FDS=1 LISTEN_PID=$$ exec \"$0\" \"$@\"",
            None => "exec \"$0\" \"$@\"",
        };
        let mut command = Command::new("/bin/sh");
        command
            .args([
                "-c",
                script,
                env!("CARGO_BIN_EXE_colo-ring"),
                "receive",
                "--channels",
                "2",
            ])
            .args(["--hugepages", "off", "--listen", listen])
            .env("NOTIFY_SOCKET", self.scratch.file("notify"))
            .envs(variables.iter().copied())
            .stdin(passed.map_or_else(Stdio::null, Stdio::from))
            .stdout(Stdio::null())
            .stderr(File::create(self.scratch.file("log")).unwrap());
        Service(command.spawn().unwrap())
    }

    /// What is said next, with the sockets that come along.
    fn hear(&self) -> (String, Vec<OwnedFd>) {
        let (mut bytes, mut files) = ([0; 1024], Vec::new());
        let received = colo_ring::net::passing::receive(&self.socket, &mut bytes, &mut files).unwrap();
        let text = String::from_utf8(bytes[..received.bytes].to_vec()).unwrap();
        (text, files)
    }

    /// Waits until this is said, and returns everything from there to the end of that message.
    fn wait_for(&self, part: &str) -> (String, Vec<OwnedFd>) {
        until(part, || {
            let (text, files) = self.hear();
            text.contains(part).then_some((text, files))
        })
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.scratch.file("log")).unwrap()
    }
}

/// An instance is one more receiver like the first, in directories of its own.
#[test]
fn the_units_differ_in_their_names_only() {
    let [one, instance] = ["colo-ring.service", "colo-ring@.service"].map(|name| {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("packaging")
            .join(name);
        let text = std::fs::read_to_string(path).unwrap();
        let lines = text.lines().filter(|line| !line.starts_with("Description="));
        lines.map(str::to_owned).collect::<Vec<_>>()
    });
    let same: Vec<_> = (instance.iter())
        .map(|line| line.replace("/%i", "").replace("-%i", ""))
        .collect();
    assert_eq!(same, one);
}

#[test]
fn a_manager_hears_that_the_receiver_is_ready_alive_and_ending() {
    let manager = Manager::new();
    let own = format!("unix:{}", manager.scratch.file("listen"));
    let service = manager.start(&own, None, &[("WATCHDOG_USEC", "400000")]);
    assert_eq!(manager.hear().0, "READY=1");
    for _ in 0..3 {
        assert_eq!(manager.hear().0, "WATCHDOG=1");
        assert!(manager.hear().0.starts_with("STATUS=guests: 0 protected"));
    }
    let mut primary = SynthPrimary::connect(&own.parse().unwrap(), &guest()).unwrap();
    primary.checkpoint().unwrap();
    manager.wait_for("STATUS=guests: 1 protected");
    service.end();
    manager.wait_for("STOPPING=1");
}

/// A connection that comes while no receiver is there waits for the next.
#[test]
fn a_passed_socket_loses_no_connection_over_a_restart() {
    let manager = Manager::new();
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let listen = format!("tcp:{}", socket.local_addr().unwrap());
    let passed = || Some(OwnedFd::from(socket.try_clone().unwrap()));
    let service = manager.start(&listen, passed(), &[]);
    manager.wait_for("READY=1");
    let mut primary = SynthPrimary::connect(&listen.parse().unwrap(), &guest()).unwrap();
    primary.checkpoint().unwrap();
    service.end();
    let address = listen.parse().unwrap();
    let waiting = std::thread::spawn(move || {
        let mut primary = SynthPrimary::connect(&address, &guest()).unwrap();
        primary.checkpoint().unwrap();
    });
    let _next = manager.start(&listen, passed(), &[]);
    waiting.join().unwrap();
}

#[test]
fn a_socket_is_kept_and_one_that_no_option_names_is_given_up() {
    let manager = Manager::new();
    let service = manager.start("tcp:127.0.0.1:0", None, &[("FDSTORE", "16")]);
    let (said, mut sockets) = manager.wait_for("FDSTORE=1");
    let socket = TcpListener::from(sockets.pop().unwrap());
    let address = socket.local_addr().unwrap();
    assert!(
        said.contains(&format!("FDNAME=tcp_127.0.0.1_{}", address.port())),
        "{said}"
    );
    manager.wait_for("READY=1");
    service.end();
    // It listens still, and is taken by its address.
    let listen = format!("tcp:{address}");
    let passed = || Some(OwnedFd::from(socket.try_clone().unwrap()));
    let service = manager.start(&listen, passed(), &[("FDSTORE", "16")]);
    manager.wait_for("READY=1");
    let mut primary = SynthPrimary::connect(&listen.parse().unwrap(), &guest()).unwrap();
    primary.checkpoint().unwrap();
    service.end();
    let other = format!("unix:{}", manager.scratch.file("listen"));
    let _service = manager.start(&other, passed(), &[]);
    let (said, _) = manager.wait_for("FDSTOREREMOVE=1");
    assert!(said.contains("FDNAME=tcp_127.0.0.1_"), "{said}");
    until("a warning", || {
        let log = manager.log();
        log.contains("but no option listens there: closed").then_some(())
    });
}

/// Its file stays, so that primaries connect to it while no receiver is there.
#[test]
fn a_unix_socket_is_kept_with_its_file() {
    let manager = Manager::new();
    let listen = format!("unix:{}", manager.scratch.file("listen"));
    let service = manager.start(&listen, None, &[("FDSTORE", "16")]);
    let (said, mut sockets) = manager.wait_for("FDSTORE=1");
    assert!(said.contains("FDNAME=unix_"), "{said}");
    manager.wait_for("READY=1");
    service.end();
    let waiting = UnixStream::connect(manager.scratch.file("listen")).unwrap();
    let passed = sockets.pop();
    let _next = manager.start(&listen, passed, &[("FDSTORE", "16")]);
    manager.wait_for("READY=1");
    drop(waiting);
    let mut primary = SynthPrimary::connect(&listen.parse().unwrap(), &guest()).unwrap();
    primary.checkpoint().unwrap();
}

#[test]
fn without_a_manager_the_variables_of_another_process_mean_nothing() {
    let manager = Manager::new();
    let listen = format!("unix:{}", manager.scratch.file("listen"));
    let variables = [
        ("NOTIFY_SOCKET", "/nonexistent/notify"),
        ("LISTEN_PID", "1"),
        ("LISTEN_FDS", "3"),
    ];
    let _service = manager.start(&listen, None, &variables);
    until("it listens", || {
        let log = manager.log();
        log.contains("listening on").then_some(())
    });
    assert!(manager.log().contains("cannot be reached at NOTIFY_SOCKET"));
}
