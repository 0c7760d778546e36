//! `colo-ring guard` as a process, and clients of a guest that it guards.

use crate::HANG_LIMIT;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::{Address, GUEST_ADDRESS, Lab, LabError, Qemu, command_under_test, wait_for};

/// A running guard, killed when dropped.
#[derive(Debug)]
pub struct Guard {
    process: Child,
    control: PathBuf,
    log: PathBuf,
}

impl Guard {
    /// Starts a guard of that primary, with further arguments.
    ///
    /// # Errors
    /// When there is no command.
    pub fn start(lab: &Lab, primary: &Qemu, to: &Address, extra: &[&str]) -> Result<Self, LabError> {
        let command = command_under_test()?;
        let control = lab.fresh_file("guard", "sock");
        let log = lab.fresh_file("guard", "log");
        let stderr = File::create(&log).map_err(LabError::io(format!("create {}", log.display())))?;
        let process = Command::new(&command)
            .arg("guard")
            .arg("--qmp")
            .arg(primary.free_monitor())
            .args(["--to", &to.to_string(), "--channels", "2", "--name", "guest"])
            .args(["--control", &format!("unix:{}", control.display())])
            .args(extra)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn();
        let process = process.map_err(LabError::io(format!("start {}", command.display())))?;
        Ok(Self {
            process,
            control,
            log,
        })
    }

    /// Its state, as its control socket gives it.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn status(&self) -> Result<Value, LabError> {
        let mut text = String::new();
        UnixStream::connect(&self.control)
            .and_then(|mut socket| socket.read_to_string(&mut text))
            .map_err(LabError::io("ask the guard"))?;
        serde_json::from_str(&text).map_err(|_| LabError::Malformed {
            what: "the guard's answer".into(),
            detail: text,
        })
    }

    /// Waits until its guest is in this state.
    ///
    /// # Errors
    /// [`LabError::Timeout`], and [`LabError::Ended`] when the guard has ended.
    pub fn wait_state(&mut self, state: &str) -> Result<Value, LabError> {
        wait_for(&format!("the guest to be {state}"), HANG_LIMIT, || {
            if let Ok(Some(status)) = self.process.try_wait() {
                return Err(LabError::Ended {
                    what: format!("the guard ({status})"),
                    detail: self.log(),
                });
            }
            // It makes its socket first.
            Ok(self.status().ok().filter(|status| status["state"] == state))
        })
    }

    /// What it has printed.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Ends it by a signal, and waits for its end.
    ///
    /// # Errors
    /// When it does not end.
    pub fn end(&mut self, signal: Signal) -> Result<ExitStatus, LabError> {
        let pid = i32::try_from(self.process.id()).map_err(|_| LabError::Malformed {
            what: "the guard's process id".into(),
            detail: self.process.id().to_string(),
        })?;
        // It may have ended.
        let _ = kill(Pid::from_raw(pid), signal);
        self.wait_end()
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it does not end.
    pub fn wait_end(&mut self) -> Result<ExitStatus, LabError> {
        wait_for("the guard to end", HANG_LIMIT, || {
            self.process
                .try_wait()
                .map_err(LabError::io("wait for the guard"))
        })
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// What a client has seen.
#[derive(Clone, Debug, Default)]
pub struct ClientReport {
    /// Numbers that came back.
    pub answers: u64,
    /// The longest time between two of them.
    pub longest_gap: Duration,
    /// How long each took, in microseconds, in order.
    pub latencies_us: Vec<u64>,
    /// What went wrong, if something has.
    pub error: Option<String>,
}

/// A client of the guest's service, which counts over one connection.
#[derive(Debug)]
pub struct Client {
    answers: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<ClientReport>,
}

impl Client {
    /// Connects and counts, with that pause after each answer.
    ///
    /// # Errors
    /// When the guest does not answer.
    pub fn start(pause: Duration) -> Result<Self, LabError> {
        let stream = wait_for("the guest's service", HANG_LIMIT, || {
            Ok(TcpStream::connect(GUEST_ADDRESS).ok())
        })?;
        let connected = stream
            .set_nodelay(true)
            .and_then(|()| stream.set_read_timeout(Some(HANG_LIMIT)));
        connected.map_err(LabError::io("set up the client"))?;
        let answers = Arc::new(AtomicU64::new(0));
        let stop = Arc::new(AtomicBool::new(false));
        let (counted, stopped) = (answers.clone(), stop.clone());
        let thread = std::thread::spawn(move || count(&stream, pause, &counted, &stopped));
        Ok(Self {
            answers,
            stop,
            thread,
        })
    }

    /// Answers so far.
    #[must_use]
    pub fn answers(&self) -> u64 {
        self.answers.load(Ordering::Relaxed)
    }

    /// Waits until so many more answers have come.
    ///
    /// # Errors
    /// [`LabError::Timeout`]; [`LabError::Ended`] when the connection has ended.
    pub fn wait_answers(&self, more: u64) -> Result<(), LabError> {
        let goal = self.answers() + more;
        wait_for(&format!("{goal} answers"), HANG_LIMIT, || {
            if self.answers() < goal && self.thread.is_finished() {
                return Err(LabError::Ended {
                    what: "the client's connection".into(),
                    detail: format!("after {} answers", self.answers()),
                });
            }
            Ok((self.answers() >= goal).then_some(()))
        })
    }

    /// Whether so many answers come within that time.
    #[must_use]
    pub fn goes_on(&self, more: u64, within: Duration) -> bool {
        let (goal, deadline) = (self.answers() + more, Instant::now() + within);
        while self.answers() < goal && !self.thread.is_finished() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        self.answers() >= goal
    }

    /// Ends it.
    ///
    /// # Panics
    /// If its thread has.
    #[must_use]
    pub fn end(self) -> ClientReport {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the client")
    }
}

fn count(stream: &TcpStream, pause: Duration, answers: &AtomicU64, stop: &AtomicBool) -> ClientReport {
    let mut report = ClientReport::default();
    let (mut reader, mut last, mut line) = (BufReader::new(stream), Instant::now(), String::new());
    for number in 1_u64.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let asked = Instant::now();
        line.clear();
        let mut writer = stream;
        let answered = writer
            .write_all(format!("{number}\n").as_bytes())
            .and_then(|()| reader.read_line(&mut line));
        match answered {
            Ok(_) if line == format!("{number}\n") => {}
            Ok(_) => report.error = Some(format!("{number} was answered by {line:?}")),
            Err(error) => report.error = Some(format!("{number}: {error}")),
        }
        if report.error.is_some() {
            break;
        }
        let now = Instant::now();
        report.answers = number;
        report.longest_gap = report.longest_gap.max(now - last);
        report
            .latencies_us
            .push(u64::try_from((now - asked).as_micros()).unwrap_or(u64::MAX));
        last = now;
        answers.store(number, Ordering::Relaxed);
        std::thread::sleep(pause);
    }
    report
}
