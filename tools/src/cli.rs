//! The command line: which subcommands there are.

use crate::commands::{
    capture, check, compare, demo, discard, doctor, dump, end, failover, guard, import, inspect, protect,
    receive, replay, sink, slow, status, synth, unprotect,
};
use crate::configuration::{self, Configuration, Faults};
use crate::output::{CommandError, errors_as_json, print_error};
use crate::stderr;
use clap::{CommandFactory, Parser, Subcommand};
use std::ffi::OsString;
use std::process::ExitCode;

/// The secondary side of QEMU COLO as a program of its own
///
/// An unmodified QEMU primary migrates to it with x-colo and is then checkpointed for as long as it runs;
/// colo-ring keeps the guest's RAM and device state as of the last committed checkpoint.
///
/// Exit codes: 0 done, 1 failed, 2 wrong usage.
#[derive(Debug, Parser)]
#[command(name = "colo-ring", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Be the secondary: accept primaries and keep the last committed checkpoint of each
    ///
    /// One receiver holds many guests: each primary that migrates to it is a session. A lost primary's checkpoint
    /// is kept until it is discarded or the receiver ends. Events are printed on standard error, the report at the
    /// end is printed on standard output. SIGINT and SIGTERM end it cleanly.
    #[command(
        after_help = "Example:\n  colo-ring receive --listen tcp:0.0.0.0:4444 --channels 4 \\\n      --control unix:/run/colo-ring.sock --hist /var/log/colo-ring\n\nThe primary then needs, over QMP: x-colo, return-path and multifd on, multifd-channels 4,\nx-checkpoint-delay as wanted, and migrate to this address: see docs/primary.md."
    )]
    Receive(Box<receive::ReceiveArgs>),

    /// Read the configuration of `receive` and say what is wrong with it
    ///
    /// Every fault with its line and column. Exit code 0 if there is none, 1 if there is one. Nothing is started or changed.
    #[command(after_help = "Example:\n  colo-ring check\n  colo-ring check --config ./receive.toml")]
    Check(check::CheckArgs),

    /// Put a running QEMU under the protection of a receiver, over QMP
    ///
    /// Mirrors every disk that the guest can write to (receive --disks), sets what COLO needs, switches off what it cannot
    /// have (and says so), starts the migration and waits until the guest is protected. Ctrl-C gives up while disks are
    /// copied; later it ends the waiting, not the migration, and says how the primary is left.
    #[command(
        after_help = "Example:\n  colo-ring protect --qmp /run/web3.qmp --to tcp:192.0.2.2:4444 --name web3 --interval 300\n  colo-ring protect --qmp /run/guest1.qmp --to tcp:192.0.2.2:4444 --disk drive0=web3-root --disk drive1=web3-data"
    )]
    Protect(Box<protect::ProtectArgs>),

    /// Stay beside a running QEMU: protect it, hold its output until it is committed, and protect it again when a receiver was lost
    ///
    /// What the guest sends waits until the checkpoint that contains it is committed, so that its connections survive the primary; a packet
    /// that waits asks for a checkpoint at once. When the receiver is lost, the guest runs on within a second and is protected
    /// again as soon as there is a receiver. SIGINT and SIGTERM end the protection, too, and the guest runs on. Exit code 4 when QEMU
    /// has ended.
    #[command(
        after_help = "Example:\n  colo-ring guard --qmp /run/web3.qmp --to tcp:192.0.2.2:4444 --name web3\n  colo-ring guard --qmp /run/web3.qmp --to tcp:192.0.2.2:4444 --name web3 --relay net0=/run/web3.net,tap3"
    )]
    Guard(Box<guard::GuardArgs>),

    /// End the protection of a running QEMU, over QMP: its guest runs on, alone
    ///
    /// For a receiver that is lost as well as for one that is not needed any more. Ends COLO (or a first copy that is not
    /// finished), cancels the mirrors of the guest's disks and removes them. A connection that hangs is cut first, so
    /// that a guest that stands still for a checkpoint runs again.
    #[command(after_help = "Example:\n  colo-ring unprotect --qmp /run/guest1.qmp")]
    Unprotect(unprotect::UnprotectArgs),

    /// Resume a lost primary's guest from its last committed checkpoint, in a fresh QEMU
    ///
    /// The QEMU is started here, from the primary's own command line, or waits already. Where the receiver keeps the
    /// guest's memory in a named file (receive --ram-dir), the fresh QEMU runs on that very file and only the rest
    /// travels; otherwise, and with --stream, all of it travels. The memory is the guest's then: one failover wins,
    /// and if its QEMU does not start, the checkpoint is still there. It returns once the guest runs.
    #[command(
        after_help = "Example:\n  colo-ring failover --control unix:/run/colo-ring.sock --guest web3 \\\n      --fence 'ipmitool -H bmc-a chassis power off' -- qemu-system-x86_64 -machine pc -m 4G …\n  colo-ring failover --control unix:/run/colo-ring.sock --guest web3 --qmp /run/standby.qmp\n  colo-ring failover --control unix:/run/colo-ring.sock --session 1 --to - | ssh host-c …"
    )]
    Failover(Box<failover::FailoverArgs>),

    /// Print the state of a running receiver and its sessions
    #[command(after_help = "Example:\n  colo-ring status --control unix:/run/colo-ring.sock")]
    Status(status::StatusArgs),

    /// Write the last committed checkpoint of a session to files: RAM blocks, device state, and disks
    ///
    /// What is written is one checkpoint, the last one when the dump ends; the primary goes on meanwhile, and one of its
    /// checkpoints waits a little at the end. This command opens the files, and the receiver writes them: one per RAM block,
    /// the device state, and checkpoint.json that lists them. The guest's disks are written only if the session has ended, because they change
    /// as long as it is live.
    #[command(
        after_help = "Example:\n  colo-ring dump --control unix:/run/colo-ring.sock --session 1 --out /tmp/checkpoint"
    )]
    Dump(dump::DumpArgs),

    /// Give up the checkpoint and the memory of a session that has ended
    #[command(
        after_help = "Example:\n  colo-ring discard --control unix:/run/colo-ring.sock --session 1\n  colo-ring discard --control unix:/run/colo-ring.sock --guest web3"
    )]
    Discard(discard::DiscardArgs),

    /// End a running session: its primary loses its receiver, and its last committed checkpoint is kept
    ///
    /// Also in its first copy, of which nothing is kept. For the primary it is as if the receiver had ended: `unprotect` or
    /// `guard` on its host lets its guest run on. It returns when the session is over. --on-loss is not run.
    #[command(after_help = "Example:\n  colo-ring end --control unix:/run/colo-ring.sock --guest web3")]
    End(end::EndArgs),

    /// Record a session: a transparent recorder between a primary and any secondary
    ///
    /// The primary migrates to --listen, and every connection is passed on to --to, both ways, with its bytes, ends
    /// and resets as they are. One session is recorded: the command ends when the primary's last connection has ended. The
    /// file can be read while it grows.
    ///
    /// Recording never holds a protected guest up and never ends its connection: when the disk is full or too slow, the recording
    /// ends with what is there, says so, and forwarding goes on. SIGINT and SIGTERM end the recording, too; open
    /// connections go on until they end, or until a second signal. Exit code 1 if the recording is not complete.
    ///
    /// The report says by how much forwarding lengthened each checkpoint: from the last of the checkpoint's bytes read to
    /// the last of them written to the secondary's socket, on whichever connection, plus the same of the secondary's
    /// VMSTATE_LOADED. What it takes until this process is woken, and the second way through the network, are not in it.
    #[command(
        after_help = "Example:\n  colo-ring capture --listen tcp:0.0.0.0:4445 --to tcp:192.0.2.7:4444 --out guest1.cap\n\nThen migrate the primary to port 4445 of this host instead of to the secondary."
    )]
    Capture(capture::CaptureArgs),

    /// Be a primary without a guest: make a session of a chosen shape, live or into a capture
    ///
    /// Speaks as a QEMU primary does. The secondary is a receiver or anything else that does not look into the device
    /// state. QEMU does, and refuses it: it only has the form of a machine's. Checkpoints are due at fixed times
    /// whatever the secondary does, and received and loaded are counted from these times, so that a checkpoint which
    /// waits for the one before it counts its wait. Pages are made before they are due, and this side's own delay is
    /// counted apart. With --out nothing is measured.
    #[command(
        after_help = "Example:\n  colo-ring synth --to tcp:127.0.0.1:4444 --ram 1G --pages lognormal:3000,0.5 --interval 600\n  colo-ring synth --to unix:/run/colo.sock --preset file-upload --run /tmp/upload --name colo-ring\n  colo-ring synth --out /tmp/idle.cap --preset idle --checkpoints 20"
    )]
    Synth(Box<synth::SynthArgs>),

    /// Make a capture file of a session that was recorded with tcpdump
    ///
    /// Retransmissions and packets out of order are resolved; bytes that the recorder has lost are reported with
    /// connection and byte. The capture then holds what came before.
    #[command(
        after_help = "Example:\n  tcpdump -i any -s 0 -B 65536 -w session.pcap tcp port 4444\n  colo-ring import session.pcap --port 4444 --out session.cap\n  colo-ring replay session.cap --sink"
    )]
    Import(import::ImportArgs),

    /// Play a capture as its primary would, against any secondary, and measure from the primary's side
    ///
    /// Every answer is waited for as the primary did, and nothing else. The capture is held in memory. received and loaded
    /// are VMSTATE_SEND to VMSTATE_RECEIVED and to VMSTATE_LOADED. A secondary that fails ends the replay with exit code 1;
    /// what was measured before is written and printed.
    #[command(
        after_help = "Example:\n  colo-ring replay guest.cap --to tcp:127.0.0.1:4444 --interval 100 --checkpoints 300 \\\n      --pid $(pidof colo-ring) --out /tmp/mine --name colo-ring\n  colo-ring replay guest.cap --sink --pace max"
    )]
    Replay(Box<replay::ReplayArgs>),

    /// Be a secondary that keeps nothing: the floor of the transport, for comparison
    ///
    /// Reads every byte into a small buffer and answers as soon as it may. It keeps nothing: a guest cannot be resumed from it.
    #[command(
        after_help = "Example:\n  colo-ring sink --listen tcp:127.0.0.1:4444 --channels 4\n  colo-ring replay guest.cap --to tcp:127.0.0.1:4444"
    )]
    Sink(sink::SinkArgs),

    /// Measure how long a guest stands still for a checkpoint, on this machine alone
    ///
    /// A synthetic primary against four secondaries: this receiver, the same with epoll, one that receives as QEMU does, and a
    /// sink as the floor; with --all every backend, cache and commit mode. Needs no root, no huge pages and no QEMU; it prints
    /// what is missing. Prints a table and the result in a sentence, and writes a page of plots. Primary and secondary share the
    /// machine's cores, so the figures compare secondaries and are not those of two hosts.
    #[command(
        after_help = "Example:\n  colo-ring demo\n  colo-ring demo --ram 256M --pages 10000 --interval 100"
    )]
    Demo(demo::DemoArgs),

    /// Show the slowest checkpoints of a session, and whose time they were
    ///
    /// A receiver records of the last 65,536 checkpoints of each guest when what happened and what its core did meanwhile. The
    /// slowest are listed with the part of the primary and the network, of this host's scheduler, and of this receiver.
    #[command(
        after_help = "Example:\n  colo-ring slow --control unix:/run/colo-ring.sock\n  colo-ring slow --control unix:/run/colo-ring.sock --guest web3 --top 50 --html slow.html"
    )]
    Slow(slow::SlowArgs),

    /// Print what is in a capture, an interval log, a flight recorder, a measured run or a receiver's report
    ///
    /// An overview, or with --kind everything of a kind, one by one; with --json also its place in the file or stream.
    /// A file that ends early is shown up to there; damage is reported with its offset.
    #[command(
        after_help = "Example:\n  colo-ring inspect session.cap --kind packets --channel 0 --checkpoint 1..3\n  colo-ring inspect /var/log/colo-ring.pause.hlog"
    )]
    Inspect(inspect::InspectArgs),

    /// Compare measured runs: a table, JSON, or one HTML page with plots
    ///
    /// For each phase: mean, percentiles and maximum of every run, and their ratios to the baseline with a 95 %
    /// interval from resampling. An interval that includes 1 shows no difference. See docs/reports.md.
    #[command(
        after_help = "Example:\n  colo-ring compare QEMU=qemu.run.json ring.run.json --phase loaded --html report.html\n  colo-ring compare /var/log/colo/guest1.json /var/log/colo/guest2.json"
    )]
    Compare(compare::CompareArgs),

    /// Print what this machine lacks, what that means, and the command that fixes it
    ///
    /// Everything is tried or read, nothing is changed. Exit code 0 if a receiver works here, 1 if something
    /// essential is missing.
    #[command(
        after_help = "Example:\n  colo-ring doctor\n  colo-ring doctor --qmp /run/guest1.qmp\n  colo-ring doctor --json | jq '.checks[] | select(.state != \"ok\")'"
    )]
    Doctor(doctor::DoctorArgs),

    /// Runs the hooks of a receiver, which starts it
    #[command(hide = true)]
    RunHooks {
        /// What sh is to run: one of these, as the receiver asks
        #[arg(long)]
        command: Vec<String>,
    },
}

/// The definition of the command line.
pub fn command_line() -> clap::Command {
    Cli::command()
}

/// The command line, with what a configuration adds to `receive`, and that configuration.
fn with_configuration(given: &[OsString]) -> Result<(Vec<OsString>, Option<Configuration>), Faults> {
    let words = match given {
        [_, command, words @ ..] if command == "receive" => words,
        _ => return Ok((given.to_vec(), None)),
    };
    // Help is there also where the file is wrong.
    if words.iter().any(|word| word == "--help" || word == "-h") {
        return Ok((given.to_vec(), None));
    }
    let merged = configuration::merge(words.to_vec(), &receive::command())?;
    let words = given[..2].iter().cloned().chain(merged.words).collect();
    Ok((words, merged.configuration))
}

/// Whether what is printed is for machines, also where the words make no sense otherwise. Those behind `--` are another program's.
fn wants_json(words: &[OsString]) -> bool {
    let own = words.iter().skip(1).take_while(|word| *word != "--");
    own.into_iter().any(|word| word == "--json" || word == "--events")
}

/// Tells what is wrong with the command line; or prints the help that was asked for.
fn misused(error: &clap::Error) -> ExitCode {
    // As clap does it; nothing is left to do where it cannot be printed.
    let _ = error.print();
    if !error.use_stderr() {
        return ExitCode::SUCCESS;
    }
    let exit_code = 2;
    print_error(&configuration::in_a_line(error), exit_code);
    ExitCode::from(exit_code)
}

/// Runs the command that the process was started with.
pub fn main() -> ExitCode {
    let given: Vec<_> = std::env::args_os().collect();
    if wants_json(&given) {
        errors_as_json();
    }
    let (words, configuration) = match with_configuration(&given) {
        Ok(found) => found,
        Err(faults) => return CommandError::Usage(faults.to_string()).report(),
    };
    // The configuration may ask for it, too.
    if wants_json(&words) {
        errors_as_json();
    }
    let cli = match Cli::try_parse_from(words) {
        Ok(cli) => cli,
        Err(error) => {
            let message = configuration::in_a_line(&error);
            let fault = configuration.and_then(|configuration| configuration.fault(&message));
            return fault.map_or_else(
                || misused(&error),
                |fault| CommandError::Usage(fault.to_string()).report(),
            );
        }
    };
    let result = match cli.command {
        Command::Receive(args) => receive::run(*args, given.into_iter().skip(2).collect()),
        Command::Check(args) => check::run(&args),
        Command::Protect(args) => protect::run(&args),
        Command::Guard(args) => guard::run(&args),
        Command::Unprotect(args) => unprotect::run(&args),
        Command::Failover(args) => failover::run(&args),
        Command::Status(args) => status::run(&args),
        Command::Dump(args) => dump::run(&args),
        Command::Discard(args) => discard::run(&args),
        Command::End(args) => end::run(&args),
        Command::Capture(args) => capture::run(&args),
        Command::Synth(args) => synth::run(&args),
        Command::Import(args) => import::run(&args),
        Command::Replay(args) => replay::run(&args),
        Command::Sink(args) => sink::run(&args),
        Command::Demo(args) => demo::run(&args),
        Command::Slow(args) => slow::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Compare(args) => compare::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::RunHooks { command } => receive::run_hooks(&command),
    };
    let code = result.unwrap_or_else(|error| error.report());
    stderr::flush();
    code
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent_and_every_subcommand_has_an_example() {
        let mut cli = Cli::command();
        cli.build();
        for command in cli
            .get_subcommands()
            .filter(|command| command.get_name() != "help" && !command.is_hide_set())
        {
            let help = command.clone().render_long_help().to_string();
            assert!(help.contains("Example"), "{} has no example", command.get_name());
            assert!(
                help.contains("--json"),
                "{} prints nothing for machines",
                command.get_name()
            );
        }
        cli.debug_assert();
    }
}
