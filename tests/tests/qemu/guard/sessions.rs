//! Sessions of everyday servers survive the primary: SSH, HTTP keep-alive and PostgreSQL, of a guest with a disk.

use super::scene::Way;
use colo_ring_tests::HANG_LIMIT;
use colo_ring_tests::lab::{
    self, Company, Disk, DiskBus, Guard, Guest, Lab, LabError, Machine, Nic, Qemu, Secondary, ServicesGuest,
    TAP, services_experiment, wait_for,
};
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The receiver's name for the disk.
const EXPORT: &str = "guest-root";
const UUID: &str = "5e55107a-c010-4000-8000-000000000001";

/// Between two exchanges of a session.
const PAUSE: Duration = Duration::from_millis(20);

/// Exchanges before and after the kill.
const EXCHANGES: u64 = 50;

/// One connection to a server, in which every exchange depends on those before it.
trait Session: Send {
    fn name(&self) -> &'static str;

    /// Exchange `number`, from 1 on: fails if the answer is not what the session's state asks for.
    fn exchange(&mut self, number: u64) -> io::Result<()>;
}

fn wrong(number: u64, answer: &str) -> io::Error {
    io::Error::new(
        ErrorKind::InvalidData,
        format!("exchange {number} is answered by {answer:?}"),
    )
}

/// A client program, with a pipe to its input and one from its output.
struct Program {
    process: Child,
    output: BufReader<std::process::ChildStdout>,
}

impl Program {
    fn start(mut command: Command) -> io::Result<Self> {
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let output = BufReader::new(process.stdout.take().ok_or(ErrorKind::BrokenPipe)?);
        Ok(Self { process, output })
    }

    /// Writes a line, and reads one.
    fn exchange(&mut self, line: &str) -> io::Result<String> {
        let input = self.process.stdin.as_mut().ok_or(ErrorKind::BrokenPipe)?;
        input.write_all(format!("{line}\n").as_bytes())?;
        let mut answer = String::new();
        self.output.read_line(&mut answer)?;
        match answer.pop() {
            Some('\n') => Ok(answer),
            _ => Err(ErrorKind::UnexpectedEof.into()),
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // It may have ended by itself; either way it is reaped.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A shell that counts the lines that it has read.
struct Ssh(Program);

impl Ssh {
    const COUNTS: &str = "n=0; while read -r line; do n=$((n + 1)); echo \"$line $n\"; done";

    fn start() -> Result<Self, LabError> {
        let mut command = ServicesGuest::client("dbclient")?;
        let to = format!("root@{}", ServicesGuest::host());
        command.args(["-y", "-y", "-i", "/root/.ssh/key", &to, Self::COUNTS]);
        Program::start(command)
            .map(Self)
            .map_err(LabError::io("run dbclient"))
    }
}

impl Session for Ssh {
    fn name(&self) -> &'static str {
        "SSH"
    }

    fn exchange(&mut self, number: u64) -> io::Result<()> {
        let answer = self.0.exchange(&number.to_string())?;
        match answer == format!("{number} {number}") {
            true => Ok(()),
            false => Err(wrong(number, &answer)),
        }
    }
}

/// Rows of a table, counted by the server each time; its process stays the same.
struct PostgreSql {
    psql: Program,
    server: Option<String>,
}

impl PostgreSql {
    fn start() -> Result<Self, LabError> {
        let mut command = ServicesGuest::client("/usr/lib/postgresql/17/bin/psql")?;
        command.args(["-h", &ServicesGuest::host(), "-U", "postgres", "-qAtX"]);
        let mut psql = Program::start(command).map_err(LabError::io("run psql"))?;
        let made = psql.exchange("CREATE TABLE counted (number bigint); SELECT 'made';");
        made.map_err(LabError::io("make a table"))?;
        Ok(Self { psql, server: None })
    }
}

impl Session for PostgreSql {
    fn name(&self) -> &'static str {
        "PostgreSQL"
    }

    fn exchange(&mut self, number: u64) -> io::Result<()> {
        let statements = format!(
            "INSERT INTO counted VALUES ({number}); SELECT count(*), max(number), pg_backend_pid() FROM counted;"
        );
        let answer = self.psql.exchange(&statements)?;
        let server = answer.strip_prefix(&format!("{number}|{number}|"));
        let server = server.ok_or_else(|| wrong(number, &answer))?;
        match self.server.get_or_insert_with(|| server.to_owned()) == server {
            true => Ok(()),
            false => Err(wrong(number, &answer)),
        }
    }
}

/// Requests over one connection, which the server counts.
struct Http {
    stream: BufReader<TcpStream>,
    connection: Option<String>,
}

impl Http {
    fn start() -> Result<Self, LabError> {
        let stream = TcpStream::connect((ServicesGuest::host(), 80));
        let stream = stream.and_then(|stream| {
            stream.set_read_timeout(Some(HANG_LIMIT))?;
            Ok(BufReader::new(stream))
        });
        Ok(Self {
            stream: stream.map_err(LabError::io("connect to the HTTP server"))?,
            connection: None,
        })
    }

    /// The body of an answer.
    fn read_body(&mut self) -> io::Result<String> {
        let mut length = 0;
        loop {
            let mut line = String::new();
            if self.stream.read_line(&mut line)? == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            match line.trim_end().split_once(": ") {
                Some(("Content-Length", value)) => length = value.parse().unwrap_or(0),
                None if line.trim_end().is_empty() => break,
                _ => {}
            }
        }
        let mut body = String::new();
        (&mut self.stream).take(length).read_to_string(&mut body)?;
        Ok(body)
    }
}

impl Session for Http {
    fn name(&self) -> &'static str {
        "HTTP keep-alive"
    }

    fn exchange(&mut self, number: u64) -> io::Result<()> {
        let request = format!("GET / HTTP/1.1\r\nHost: {}\r\n\r\n", ServicesGuest::host());
        self.stream.get_mut().write_all(request.as_bytes())?;
        let body = self.read_body()?;
        let (connection, count) = body
            .trim_end()
            .split_once(' ')
            .ok_or_else(|| wrong(number, &body))?;
        let same = self.connection.get_or_insert_with(|| connection.to_owned());
        match same == connection && count == number.to_string() {
            true => Ok(()),
            false => Err(wrong(number, &body)),
        }
    }
}

/// A session that goes on and on.
struct Running {
    name: &'static str,
    done: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    /// The longest time of an exchange.
    thread: JoinHandle<io::Result<Duration>>,
}

impl Running {
    fn start(mut session: Box<dyn Session>) -> Self {
        let (done, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (counted, stopped) = (done.clone(), stop.clone());
        let name = session.name();
        let thread = std::thread::spawn(move || {
            let mut longest = Duration::ZERO;
            for number in 1_u64.. {
                if stopped.load(Ordering::Relaxed) {
                    break;
                }
                let since = Instant::now();
                session.exchange(number)?;
                longest = longest.max(since.elapsed());
                counted.store(number, Ordering::Relaxed);
                std::thread::sleep(PAUSE);
            }
            Ok(longest)
        });
        Self {
            name,
            done,
            stop,
            thread,
        }
    }

    fn wait_more(&self) -> Result<(), LabError> {
        let goal = self.done.load(Ordering::Relaxed) + EXCHANGES;
        wait_for(&format!("{goal} exchanges by {}", self.name), HANG_LIMIT, || {
            let done = self.done.load(Ordering::Relaxed);
            Ok((done >= goal || self.thread.is_finished()).then_some(()))
        })
    }

    /// Ends it, and fails if its connection has not lasted.
    fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        let done = self.done.load(Ordering::Relaxed);
        let longest = self.thread.join().expect("the client").expect(self.name);
        println!("{}: {done} exchanges, the longest took {longest:?}", self.name);
    }
}

fn machine(image: &Path, nic: Nic) -> Machine {
    Machine {
        nic: Some(nic),
        uuid: Some(UUID.to_owned()),
        disk: Some(Disk {
            bus: DiskBus::VirtioBlk,
            file: image.to_owned(),
        }),
        ..Machine::bare("q35", 256, Guest::Services(ServicesGuest))
    }
}

fn sessions_survive(way: Way) {
    services_experiment(Company::Others, |lab: &Lab| {
        let secondary = Secondary::start_with_disks(lab, 2)?;
        let (image, base) = (lab.file("primary.raw"), secondary.disk(EXPORT));
        ServicesGuest::make_disks(&image, &base)?;
        let socket = lab.file("card.sock");
        let nic = match way {
            Way::Relay => Nic::Stream(socket.clone()),
            Way::Filter | Way::None => Nic::Tap,
        };
        let mut primary = Qemu::start(lab, "primary", &machine(&image, nic))?;
        let (to, name) = (secondary.disk_address(), format!("disk0={EXPORT}"));
        let relay = format!("net0={},{TAP}", socket.display());
        let mut words = vec!["--disk", &name, "--disk-to", &to];
        if way == Way::Relay {
            words.extend(["--relay", &relay]);
        }
        primary.wait_serial("serving", HANG_LIMIT)?;
        // The guest stands during the first copy: with TCG, QEMU may miss pages that it dirties meanwhile.
        primary.stop()?;
        let mut guard = Guard::start(lab, &primary, secondary.address(), &words)?;
        guard.wait_state("protected")?;
        let sessions = [
            Running::start(Box::new(Ssh::start()?)),
            Running::start(Box::new(PostgreSql::start()?)),
            Running::start(Box::new(Http::start()?)),
        ];
        sessions.iter().try_for_each(Running::wait_more)?;

        let _ = primary.kill();
        guard.wait_end()?;
        secondary.wait_state(1, "ended")?;
        let by = lab::Way::Stream;
        let fresh = secondary.standby(lab, "fresh", &machine(&base, Nic::Tap), by, 1)?;
        secondary.failover(1, &fresh, by)?;
        sessions.iter().try_for_each(Running::wait_more)?;
        sessions.into_iter().for_each(Running::end);
        fresh.check_guest()?;
        drop(fresh);
        secondary.remove_disks()
    });
}

#[test]
#[ignore = "Debian's servers: scripts/qemu-lab services"]
fn ssh_http_and_postgresql_survive_the_primary_through_a_relay() {
    sessions_survive(Way::Relay);
}

#[test]
#[ignore = "Debian's servers: scripts/qemu-lab services"]
fn ssh_http_and_postgresql_survive_the_primary_through_a_filter() {
    sessions_survive(Way::Filter);
}
