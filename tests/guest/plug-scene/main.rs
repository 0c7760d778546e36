//! Runs in a guest that is a host, beside a kernel with a plug queue: a guest in a QEMU of its own, with a card of two queues and vhost,
//! its receiver and its guards. It ends them one after the other, and looks at what leaves the card.
//!
//!     plug-scene
//!
//! QEMU, its libraries and the state of a guest that runs net-server lie in /lab. The guest's datagrams have numbers. Whatever is lost, none
//! comes twice or out of order: a datagram that comes again was sent by a guest that does not remember it. Prints what it does;
//! the exit code is 0 if all was well.

mod host;
mod traffic;

use host::{
    Process, RECEIVER, RECEIVER_CONTROL, assert_no_plug, colo_ring, guard, guard_status, make_tap, number,
    plugs, qemu, receiver, serial, tap_frames, wait_checkpoints, wait_state,
};
use std::fs;
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};
use traffic::{Client, Observed, burst, connect};

const HOST: &str = "169.254.78.1";

/// Far more than anything takes: a guest of an emulated host is slow.
const LIMIT: Duration = Duration::from_secs(250);

type Done<T> = Result<T, String>;

fn wait<T>(what: &str, mut ready: impl FnMut() -> Done<Option<T>>) -> Done<T> {
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(value) = ready()? {
            return Ok(value);
        }
        if Instant::now() > deadline {
            return Err(format!("no {what} within {LIMIT:?}"));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn text<E: std::fmt::Display>(what: &str) -> impl FnOnce(E) -> String + '_ {
    move |error| format!("{what}: {error}")
}
/// What the guest sends: datagrams in bursts that are asked for over one connection, and answers over another.
struct Traffic {
    observed: Arc<Observed>,
    bursts: TcpStream,
    client: Client,
}

/// The command says how it would hold output, and changes nothing.
fn plan() -> Done<()> {
    let words = [
        "guard",
        "--qmp",
        "/tmp/primary.qmp",
        "--to",
        RECEIVER,
        "--name",
        "guest",
        "--dry-run",
    ];
    let plan = colo_ring(&words).output().map_err(text("a dry run"))?;
    let [plan, errors] = [plan.stdout, plan.stderr].map(|said| String::from_utf8_lossy(&said).into_owned());
    println!("plan: {plan}{errors}");
    assert_no_plug("after a dry run")
}

/// What is held is released, in order, and nothing is lost.
fn hold(traffic: &Traffic) -> Done<Process> {
    let mut guarded = guard("guard1", "primary", &[])?;
    wait_state(&mut guarded, "protected")?;
    println!("protected; {:?}", plugs()?);
    traffic.client.wait_answers(10)?;
    burst(&traffic.bursts, 200, 1000, 5000)?;
    traffic.observed.wait(200)?;
    traffic.observed.check_none_missing()?;
    let status = wait("status with a gate", || {
        Ok(guard_status().filter(|status| number(status, "sent") > Some(200)))
    })?;
    println!("status: {status}");
    Ok(guarded)
}

/// Without a guard nothing leaves, though checkpoints are committed; the next guard lets it go.
fn lose_guard(traffic: &Traffic, guarded: Process) -> Done<Process> {
    let Traffic {
        observed,
        bursts,
        client,
    } = traffic;
    guarded.end("-KILL")?;
    let sent = tap_frames()?;
    burst(bursts, 50, 100, 1000)?;
    // QEMU may lose the request when a checkpoint begins; then it comes again a little later.
    wait("burst", || Ok((tap_frames()? >= sent + 50).then_some(())))?;
    wait_checkpoints(3)?;
    let before = (observed.count(), client.answers());
    wait_checkpoints(3)?;
    if (observed.count(), client.answers()) != before {
        return Err("output leaves without a guard".to_owned());
    }
    println!(
        "held without a guard: {} of 250 datagrams have left",
        observed.count()
    );
    let mut guarded = guard("guard2", "primary", &[])?;
    let status = wait_state(&mut guarded, "protected")?;
    if number(&status, "session") != Some(1) {
        return Err(format!("it is not the same protection: {status}"));
    }
    let released = observed.wait(250);
    released.map_err(|error| format!("{error}; the guard: {:?}", guard_status()))?;
    observed.check_none_missing()?;
    client.wait_answers(10)?;
    println!("taken over");
    Ok(guarded)
}

/// The primary is killed in the middle of a burst, and its guest goes on in a fresh QEMU. Its plug has gone by then.
fn lose_primary(traffic: &Traffic, primary: Process, mut guarded: Process, fresh: &str) -> Done<Process> {
    let Traffic { observed, bursts, .. } = traffic;
    let status = guard_status().ok_or("no status of the guard")?;
    let session = number(&status, "session").ok_or("no session")?.to_string();
    let before = observed.count();
    burst(bursts, 1000, 200, 2000)?;
    observed.wait(before + 50)?;
    primary.end("-KILL")?;
    guarded.wait_end()?;
    assert_no_plug("after the primary's end")?;
    println!("the primary is dead: {} datagrams have come", observed.count());
    let waiting = qemu(fresh, "defer")?;
    let qmp = format!("/tmp/{fresh}.qmp");
    wait("monitor", || Ok(fs::exists(&qmp).unwrap_or(false).then_some(())))?;
    let words = [
        "failover",
        "--control",
        RECEIVER_CONTROL,
        "--session",
        &session,
        "--qmp",
        &qmp,
    ];
    let done = colo_ring(&words).output().map_err(text("failover"))?;
    if !done.status.success() {
        return Err(format!("failover: {}", String::from_utf8_lossy(&done.stderr)));
    }
    let resumed = observed.count();
    observed.wait(resumed + 50)?;
    Ok(waiting)
}

/// A lost receiver opens the plug; it is closed again with the next one. The end of the guard removes it.
fn lose_receiver(traffic: &Traffic, mut lost: Process) -> Done<Process> {
    let client = &traffic.client;
    let mut guarded = guard("guard3", "fresh1", &[])?;
    wait_state(&mut guarded, "protected")?;
    lost.signal("-KILL")?;
    lost.wait_end()?;
    wait_state(&mut guarded, "unprotected")?;
    client.wait_answers(10)?;
    println!("open without a receiver");
    let next = receiver("receiver2")?;
    let status = wait_state(&mut guarded, "protected")?;
    if number(&status, "protections") != Some(2) {
        return Err(format!("it is not protected again: {status}"));
    }
    client.wait_answers(10)?;
    println!("protected again");
    let ended = guarded.end("-TERM")?;
    if !ended.success() {
        return Err(format!("the guard's end: {ended}"));
    }
    assert_no_plug("after the guard's end")?;
    client.wait_answers(10)?;
    traffic.observed.check()?;
    println!("ended");
    Ok(next)
}

/// What does not fit into a plug is dropped and counted. Then the guard is killed, and `unprotect` removes what it has left.
fn exceed_limit(traffic: &Traffic) -> Done<()> {
    // No checkpoint comes meanwhile, however slow the guest is.
    let more = [
        "--held-max",
        "1",
        "--output-checkpoints",
        "off",
        "--interval-max",
        "3600000",
    ];
    // While its answer does not wait for a checkpoint.
    let bursts = connect()?;
    let mut guarded = guard("guard4", "fresh1", &more)?;
    wait_state(&mut guarded, "protected")?;
    burst(&bursts, 3000, 1400, 0)?;
    let dropped = wait("drops", || {
        Ok(guard_status().filter(|status| number(status, "dropped") > Some(0)))
    });
    let status = dropped.map_err(|error| {
        let seen = traffic.observed.summary();
        format!("{error}: {:?}; {seen}", guard_status())
    })?;
    println!("dropped: {status}");
    traffic.observed.check()?;
    guarded.end("-KILL")?;
    let before = plugs()?;
    let done = colo_ring(&["unprotect", "--qmp", "/tmp/fresh1.qmp"])
        .output()
        .map_err(text("unprotect"))?;
    let said = String::from_utf8_lossy(&done.stdout).into_owned() + &String::from_utf8_lossy(&done.stderr);
    println!("unprotect, with {before:?}: {said}");
    if !said.contains("its output is no longer held") {
        return Err("unprotect has not released the output".to_owned());
    }
    assert_no_plug("after unprotect")
}

/// What the gate is for, and that this program would see it: without one datagrams come again after a failover.
fn go_without(traffic: &Traffic, primary: Process) -> Done<()> {
    let mut guarded = guard("guard5", "fresh1", &["--net", "none"])?;
    wait_state(&mut guarded, "protected")?;
    // A checkpoint has the request: nobody would repeat it.
    burst(&traffic.bursts, 10_000, 200, 2000)?;
    let checkpoints = || {
        guard_status()
            .and_then(|status| number(&status, "checkpoints"))
            .unwrap_or(0)
    };
    let goal = checkpoints() + 3;
    wait("checkpoints", || Ok((checkpoints() >= goal).then_some(())))?;
    let _fresh = lose_primary(traffic, primary, guarded, "fresh2")?;
    match traffic.observed.check() {
        Err(wrong) => {
            println!("without a gate: {wrong}");
            Ok(())
        }
        Ok(()) => Err("no datagram has come again without a gate".to_owned()),
    }
}

fn run() -> Done<()> {
    // What a plug lets go at once is more than a socket takes.
    fs::write("/proc/sys/net/core/rmem_default", "16777216").map_err(text("rmem_default"))?;
    make_tap()?;
    let observed = Observed::start()?;
    let primary = qemu("primary", "file:/lab/state")?;
    let first_receiver = receiver("receiver1")?;
    let bursts = connect().map_err(|error| format!("{error}: {}", primary.log()))?;
    let client = Client::start()?;
    let traffic = Traffic {
        observed,
        bursts,
        client,
    };
    traffic.client.wait_answers(5)?;
    println!("the guest runs");
    plan()?;

    let guarded = hold(&traffic)?;
    let guarded = lose_guard(&traffic, guarded)?;
    let fresh = lose_primary(&traffic, primary, guarded, "fresh1")?;
    traffic.client.wait_answers(10)?;
    traffic.observed.check()?;
    println!(
        "resumed: {}; {}",
        traffic.client.summary(),
        traffic.observed.summary()
    );
    let _second_receiver = lose_receiver(&traffic, first_receiver)?;
    exceed_limit(&traffic)?;
    traffic.client.wait_answers(5)?;
    traffic.observed.check()?;
    if let Some(line) = serial("fresh1").lines().find(|line| line.starts_with("error")) {
        return Err(format!("the guest: {line}"));
    }
    go_without(&traffic, fresh)
}

fn main() {
    if let Err(error) = run() {
        println!("failed: {error}");
        host::print_logs();
        std::process::exit(1);
    }
    println!("passed");
}
