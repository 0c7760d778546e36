//! Which gate each of a guest's network cards gets.

use super::filter::{Filter, FilterError};
use super::gate::OutputGate;
use super::nics::{self, Nic};
use super::relay::Relay;
use super::tap::{Tap, TapError};
use super::{GuardArgs, NetMode};
use crate::output::tell;
use crate::qmp::{Qmp, QmpError};
use std::io;
use std::path::PathBuf;
use std::str::FromStr;
use thiserror::Error;

/// A card for which this process is in the way of the frames: `NETDEV=PATH,IFNAME`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RelayPlan {
    netdev: String,
    path: PathBuf,
    tap: String,
}

/// `--relay` is not `NETDEV=PATH,IFNAME`.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("write NETDEV=PATH,IFNAME, like net0=/run/web3.net,tap3")]
pub(super) struct RelayPlanError;

impl FromStr for RelayPlan {
    type Err = RelayPlanError;

    fn from_str(text: &str) -> Result<Self, RelayPlanError> {
        let (netdev, rest) = text.split_once('=').ok_or(RelayPlanError)?;
        let (path, tap) = rest.rsplit_once(',').ok_or(RelayPlanError)?;
        match [netdev, path, tap].iter().any(|part| part.is_empty()) {
            true => Err(RelayPlanError),
            false => Ok(Self {
                netdev: netdev.to_owned(),
                path: path.into(),
                tap: tap.to_owned(),
            }),
        }
    }
}

/// The guest's output cannot be held.
#[derive(Debug, Error)]
pub(super) enum GatesError {
    #[error(transparent)]
    Qmp(#[from] QmpError),
    #[error(transparent)]
    Tap(#[from] TapError),
    #[error("{}: {source}", .path.display())]
    Socket { path: PathBuf, source: io::Error },
    #[error("--relay {0}: the guest has no such -netdev; it has {1}")]
    NoSuchNic(String, String),
    #[error("--relay {netdev}: it is a -netdev {kind}, and must be a -netdev stream to the socket")]
    NoStream { netdev: String, kind: String },
    #[error("-netdev {netdev}: its output cannot be held: {source}; --net none protects the guest without")]
    Filter { netdev: String, source: FilterError },
    #[error(
        "-netdev {0} is a stream to another process, and a filter does not hold what that process has; give --relay, or --net none"
    )]
    ForeignStream(String),
}

/// How a card's output is held, and why so.
enum Way<'a> {
    Relay(&'a RelayPlan),
    Filter,
}

/// Decides for each card.
fn ways<'a>(args: &'a GuardArgs, nics: &'a [Nic]) -> Result<Vec<(&'a Nic, Way<'a>)>, GatesError> {
    let known = || {
        let names: Vec<_> = nics.iter().map(|nic| nic.netdev.as_str()).collect();
        if names.is_empty() {
            "none".to_owned()
        } else {
            names.join(", ")
        }
    };
    for plan in &args.relay {
        match nics.iter().find(|nic| nic.netdev == plan.netdev) {
            None => return Err(GatesError::NoSuchNic(plan.netdev.clone(), known())),
            Some(nic) if nic.kind != "stream" => {
                return Err(GatesError::NoStream {
                    netdev: nic.netdev.clone(),
                    kind: nic.kind.clone(),
                });
            }
            Some(_) => {}
        }
    }
    let way = |nic: &'a Nic| match args.relay.iter().find(|plan| plan.netdev == nic.netdev) {
        Some(plan) => Ok((nic, Way::Relay(plan))),
        None if nic.kind == "stream" => Err(GatesError::ForeignStream(nic.netdev.clone())),
        None => Ok((nic, Way::Filter)),
    };
    match args.net {
        NetMode::Auto => nics.iter().map(way).collect(),
        NetMode::None => Ok(Vec::new()),
    }
}

/// Says how the output of each card would be held.
///
/// # Errors
/// If one cannot be.
pub(super) fn describe(args: &GuardArgs, qmp: &mut Qmp) -> Result<Vec<String>, GatesError> {
    let nics = nics::list(qmp)?;
    let line = |(nic, way): (&Nic, Way<'_>)| match way {
        Way::Relay(plan) => format!(
            "-netdev {}: relay, through this process to the tap device {}",
            nic.netdev, plan.tap
        ),
        Way::Filter => format!(
            "-netdev {} ({}): filter, by objects that are plugged into QEMU",
            nic.netdev, nic.kind
        ),
    };
    let lines: Vec<_> = ways(args, &nics)?.into_iter().map(line).collect();
    Ok(match lines.is_empty() {
        false => lines,
        true if args.net == NetMode::None => vec!["output is not held (--net none)".to_owned()],
        true => vec!["the guest has no network card".to_owned()],
    })
}

/// Makes the gates: frames pass, unless the guest is protected already and its output `holds`.
///
/// # Errors
/// If one cannot be made: none is left then.
pub(super) fn make(
    args: &GuardArgs,
    qmp: &mut Qmp,
    holds: bool,
) -> Result<Vec<Box<dyn OutputGate>>, GatesError> {
    let nics = nics::list(qmp)?;
    let mut gates: Vec<Box<dyn OutputGate>> = Vec::new();
    for (nic, way) in ways(args, &nics)? {
        let name = format!("-netdev {}", nic.netdev);
        let gate: Box<dyn OutputGate> = match way {
            Way::Relay(plan) => {
                let relay = Relay::listen(name, &plan.path, Tap::open(&plan.tap)?, holds);
                let failed = |source| GatesError::Socket {
                    path: plan.path.clone(),
                    source,
                };
                Box::new(relay.map_err(failed)?)
            }
            Way::Filter => {
                let failed = |source| GatesError::Filter {
                    netdev: nic.netdev.clone(),
                    source,
                };
                Box::new(Filter::plug(qmp, &nic.netdev, name, holds).map_err(failed)?)
            }
        };
        gates.push(gate);
    }
    if args.net == NetMode::None {
        tell("output of the guest is not held (--net none): its connections may not survive a failover");
    }
    Ok(gates)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_relay_names_card_socket_and_tap() {
        let plan: RelayPlan = "net0=/run/a,b.net,tap3".parse().unwrap();
        assert_eq!((plan.netdev.as_str(), plan.tap.as_str()), ("net0", "tap3"));
        assert_eq!(plan.path, PathBuf::from("/run/a,b.net"));
        for wrong in [
            "",
            "net0",
            "net0=/run/x",
            "=/run/x,tap",
            "net0=,tap",
            "net0=/run/x,",
        ] {
            assert_eq!(wrong.parse::<RelayPlan>(), Err(RelayPlanError), "{wrong}");
        }
    }
}
