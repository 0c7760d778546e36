//! `colo-ring status --watch` on a terminal.

use colo_ring_tests::command::{RunningReceiver, Scratch, until};
use nix::pty::{Winsize, openpty};
use nix::sys::signal::Signal;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::symlink;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;

fn command() -> Command {
    Command::new(env!("CARGO_BIN_EXE_colo-ring"))
}

fn receiver() -> RunningReceiver {
    RunningReceiver::start(command(), &["--hugepages", "off"])
}

/// A view on a terminal of its own, ended when dropped.
struct Watch {
    process: Child,
    drawn: Arc<Mutex<String>>,
}

impl Watch {
    fn start(control: &str) -> Self {
        let size = Winsize {
            ws_row: 8,
            ws_col: 80,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let terminal = openpty(&size, None).unwrap();
        let mut status = command();
        status.args(["status", "--watch", "--control", control]);
        let process = status
            .stdout(terminal.slave)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let drawn: Arc<Mutex<String>> = Arc::default();
        let seen = drawn.clone();
        thread::spawn(move || {
            let (mut master, mut bytes) = (File::from(terminal.master), [0; 4096]);
            // An error at the end: the other side is closed.
            while let Ok(read @ 1..) = master.read(&mut bytes) {
                let text = String::from_utf8_lossy(&bytes[..read]).into_owned();
                seen.lock().unwrap().push_str(&text);
            }
        });
        Self { process, drawn }
    }

    /// Waits for this, and forgets what was drawn until then.
    fn wait_for(&self, part: &str) -> String {
        until(part, || {
            let mut drawn = self.drawn.lock().unwrap();
            drawn.contains(part).then(|| std::mem::take(&mut *drawn))
        })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn a_view_is_drawn_and_outlasts_a_restart() {
    let scratch = Scratch::new();
    let control = scratch.file("control");
    let first = receiver();
    symlink(first.control_path(), &control).unwrap();
    let watch = Watch::start(&format!("unix:{control}"));
    let drawn = watch.wait_for("no session");
    assert!(drawn.starts_with("\u{1b}[2J\u{1b}[Hcolo-ring, up "), "{drawn:?}");
    first.signal(Signal::SIGTERM);
    drop(first.wait());
    watch.wait_for("no answer for ");
    let second = receiver();
    fs::remove_file(&control).unwrap();
    symlink(second.control_path(), &control).unwrap();
    watch.wait_for("no session");
}
