//! Which gate each of a guest's network cards gets.

use super::filter::{self, Filter, FilterError};
use super::gate::OutputGate;
use super::nics::{self, Nic};
use super::plug::{self, Plug, PlugError};
use super::relay::{Relay, RelayError};
use super::tap::TapError;
use super::{GuardArgs, MIB, NetMode};
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

/// A card whose output the kernel holds: `NETDEV=IFNAME`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PlugPlan {
    netdev: String,
    tap: String,
}

/// `--plug` is not `NETDEV=IFNAME`.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("write NETDEV=IFNAME, like net0=vnet3")]
pub(super) struct PlugPlanError;

impl FromStr for PlugPlan {
    type Err = PlugPlanError;

    fn from_str(text: &str) -> Result<Self, PlugPlanError> {
        match text.split_once('=') {
            Some((netdev, tap)) if !netdev.is_empty() && !tap.is_empty() => Ok(Self {
                netdev: netdev.to_owned(),
                tap: tap.to_owned(),
            }),
            _ => Err(PlugPlanError),
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
    #[error("{option} {netdev}: the guest has no such -netdev; it has {known}")]
    NoSuchNic {
        option: &'static str,
        netdev: String,
        known: String,
    },
    #[error("--relay {netdev}: it is a -netdev {kind}, and must be a -netdev stream to the socket")]
    NoStream { netdev: String, kind: String },
    #[error("-netdev {netdev}: its output cannot be held: {source}; --net none protects the guest without")]
    Filter { netdev: String, source: FilterError },
    #[error("-netdev {netdev}: its output cannot be held by a plug: {source}")]
    Plug { netdev: String, source: PlugError },
    #[error(
        "-netdev {netdev}: its output cannot be held: by a filter, because {filter}; nor by a plug, because {plug}; \
         --net none protects the guest without"
    )]
    Neither {
        netdev: String,
        filter: QmpError,
        plug: String,
    },
    #[error(
        "-netdev {0} is a stream to another process, and a filter does not hold what that process has; give --relay, or --net none"
    )]
    ForeignStream(String),
    #[error("a plug of an earlier guard is left before {tap}: {source}")]
    Left { tap: String, source: PlugError },
}

/// How a card's output is held, and why so.
enum Way<'a> {
    Relay(&'a RelayPlan),
    Filter,
    Plug { tap: String, why: String },
}

impl Way<'_> {
    fn describe(&self, nic: &Nic) -> String {
        let Nic { netdev, kind, .. } = nic;
        match self {
            Self::Relay(plan) => format!(
                "-netdev {netdev}: relay, through this process to the tap device {}",
                plan.tap
            ),
            Self::Filter => {
                format!("-netdev {netdev} ({kind}): filter, by objects that are plugged into QEMU")
            }
            Self::Plug { tap, why } => {
                format!("-netdev {netdev} ({kind}): plug, by the kernel before the tap device {tap}: {why}")
            }
        }
    }
}

/// What the end of this guard means for cards whose frames go through it, if there are any.
pub(super) fn relays_end(args: &GuardArgs) -> Option<String> {
    let cards: Vec<_> = args.relay.iter().map(|plan| plan.netdev.as_str()).collect();
    (!cards.is_empty()).then(|| {
        format!(
            "-netdev {}: no connection without a guard, whose relay it has: start one with --relay again",
            cards.join(", ")
        )
    })
}

/// The plans are of cards that there are, and that fit.
fn check_plans(args: &GuardArgs, nics: &[Nic]) -> Result<(), GatesError> {
    let relays = args.relay.iter().map(|plan| ("--relay", &plan.netdev));
    let plugs = args.plug.iter().map(|plan| ("--plug", &plan.netdev));
    for (option, netdev) in relays.chain(plugs) {
        let Some(nic) = nics.iter().find(|nic| nic.netdev == *netdev) else {
            let names: Vec<_> = nics.iter().map(|nic| nic.netdev.as_str()).collect();
            return Err(GatesError::NoSuchNic {
                option,
                netdev: netdev.clone(),
                known: match names.is_empty() {
                    true => "none".to_owned(),
                    false => names.join(", "),
                },
            });
        };
        if option == "--relay" && nic.kind != "stream" {
            return Err(GatesError::NoStream {
                netdev: nic.netdev.clone(),
                kind: nic.kind.clone(),
            });
        }
    }
    Ok(())
}

/// Decides for a card: what the operator has said, or else the first that fits.
fn way<'a>(args: &'a GuardArgs, qmp: &mut Qmp, nic: &Nic) -> Result<Way<'a>, GatesError> {
    if let Some(plan) = args.relay.iter().find(|plan| plan.netdev == nic.netdev) {
        return Ok(Way::Relay(plan));
    }
    if let Some(plan) = args.plug.iter().find(|plan| plan.netdev == nic.netdev) {
        return Ok(Way::Plug {
            tap: plan.tap.clone(),
            why: "as --plug says".to_owned(),
        });
    }
    if nic.kind == "stream" {
        return Err(GatesError::ForeignStream(nic.netdev.clone()));
    }
    let refused = match Filter::probe(qmp, &nic.netdev) {
        Ok(()) => return Ok(Way::Filter),
        Err(error @ QmpError::Refused { .. }) => error,
        Err(error) => return Err(error.into()),
    };
    match plug_for(nic) {
        Ok(tap) => Ok(Way::Plug {
            tap,
            why: refused.to_string(),
        }),
        Err(plug) => Err(GatesError::Neither {
            netdev: nic.netdev.clone(),
            filter: refused,
            plug,
        }),
    }
}

/// The tap device before which a plug can be put for that card, or why there is none.
fn plug_for(nic: &Nic) -> Result<String, String> {
    if nic.kind != "tap" {
        return Err(format!("a -netdev {} has no tap device", nic.kind));
    }
    let Some(tap) = &nic.interface else {
        return Err(format!(
            "QEMU does not tell the name of its tap device; give --plug {}=IFNAME",
            nic.netdev
        ));
    };
    plug::check(tap).map_err(|error| error.to_string())?;
    Ok(tap.clone())
}

/// Decides for each card.
fn ways<'a, 'n>(
    args: &'a GuardArgs,
    qmp: &mut Qmp,
    nics: &'n [Nic],
) -> Result<Vec<(&'n Nic, Way<'a>)>, GatesError> {
    check_plans(args, nics)?;
    match args.net {
        NetMode::Auto => (nics.iter().map(|nic| Ok((nic, way(args, qmp, nic)?)))).collect(),
        NetMode::None => Ok(Vec::new()),
    }
}

/// Says how the output of each card would be held. What it tries for that is removed again.
///
/// # Errors
/// If one cannot be.
pub(super) fn describe(args: &GuardArgs, qmp: &mut Qmp) -> Result<Vec<String>, GatesError> {
    let nics = nics::list(qmp)?;
    let ways = ways(args, qmp, &nics)?;
    let lines: Vec<_> = ways.iter().map(|(nic, way)| way.describe(nic)).collect();
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
    let ways = ways(args, qmp, &nics)?;
    let mut gates: Vec<Box<dyn OutputGate>> = Vec::new();
    for nic in &nics {
        let way = ways.iter().find(|(of, _)| of.netdev == nic.netdev);
        let way = way.map(|(_, way)| way);
        if !matches!(way, Some(Way::Plug { .. })) {
            remove_left_plug(nic)?;
        }
        if let Some(way) = way {
            tell(&way.describe(nic));
            gates.push(make_one(args, qmp, nic, way, holds)?);
        }
        if !matches!(way, Some(Way::Filter)) {
            remove_left_filters(qmp, nic, way)?;
        }
    }
    if args.net == NetMode::None {
        tell("output of the guest is not held (--net none): its connections may not survive a failover");
    }
    Ok(gates)
}

/// A plug that the guard of an earlier QEMU has left before a card that gets another gate, or none.
fn remove_left_plug(nic: &Nic) -> Result<(), GatesError> {
    let Some(tap) = &nic.interface else { return Ok(()) };
    let removed = plug::remove_left(tap).map_err(|source| GatesError::Left {
        tap: tap.clone(),
        source,
    })?;
    if let Some(dropped) = removed {
        tell(&format!(
            "warning: -netdev {}: a plug of an earlier guard was left before {tap} and is removed; the {dropped} frames that it held are dropped",
            nic.netdev
        ));
    }
    Ok(())
}

/// Filters that an earlier guard has left on a card that gets another gate, or none. With another gate, which is behind them, that one holds what
/// they have held.
fn remove_left_filters(qmp: &mut Qmp, nic: &Nic, way: Option<&Way<'_>>) -> Result<(), GatesError> {
    if filter::remove_left(qmp, &nic.netdev)? {
        let what = match way {
            Some(_) => "goes through the new gate",
            None => "has left, committed or not",
        };
        tell(&format!(
            "warning: -netdev {}: filters of an earlier guard were left there and are removed; what they held {what}",
            nic.netdev
        ));
    }
    Ok(())
}

fn make_one(
    args: &GuardArgs,
    qmp: &Qmp,
    nic: &Nic,
    way: &Way<'_>,
    holds: bool,
) -> Result<Box<dyn OutputGate>, GatesError> {
    let netdev = nic.netdev.clone();
    let name = format!("-netdev {netdev}");
    let held_max = args.held_max * MIB;
    Ok(match way {
        Way::Relay(plan) => {
            let relay = Relay::listen(name, &plan.path, &plan.tap, held_max, holds);
            let failed = |error| match error {
                RelayError::Tap(error) => GatesError::Tap(error),
                RelayError::Socket(source) => GatesError::Socket {
                    path: plan.path.clone(),
                    source,
                },
            };
            Box::new(relay.map_err(failed)?)
        }
        Way::Filter => {
            let filter = Filter::plug(qmp, &netdev, name, holds);
            Box::new(filter.map_err(|source| GatesError::Filter { netdev, source })?)
        }
        Way::Plug { tap, .. } => {
            let plug = Plug::make(qmp, name, tap, held_max, holds);
            Box::new(plug.map_err(|source| GatesError::Plug { netdev, source })?)
        }
    })
}

#[cfg(test)]
mod tests {
    use super::super::OnlyGuard;
    use super::*;
    use clap::Parser;

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

    #[test]
    fn the_end_of_a_relay_is_said() {
        let words = "guard --qmp /run/q --to tcp:192.0.2.3:4444 --name web3";
        let args = |more: &str| OnlyGuard::parse_from(format!("{words}{more}").split(' ')).args;
        assert_eq!(relays_end(&args("")), None);
        let said = relays_end(&args(" --relay net0=/run/a,tap3 --relay net1=/run/b,tap4")).unwrap();
        assert!(said.contains("net0, net1: no connection"), "{said}");
    }

    #[test]
    fn a_plug_names_card_and_tap() {
        let plan: PlugPlan = "net0=vnet3".parse().unwrap();
        assert_eq!((plan.netdev.as_str(), plan.tap.as_str()), ("net0", "vnet3"));
        for wrong in ["", "net0", "=vnet3", "net0="] {
            assert_eq!(wrong.parse::<PlugPlan>(), Err(PlugPlanError), "{wrong}");
        }
    }

    #[test]
    fn a_card_without_a_named_tap_device_gets_no_plug() {
        let nic = |kind: &str| Nic {
            netdev: "net0".to_owned(),
            kind: kind.to_owned(),
            interface: None,
        };
        assert!(plug_for(&nic("tap")).unwrap_err().contains("--plug net0=IFNAME"));
        assert!(plug_for(&nic("user")).unwrap_err().contains("no tap device"));
    }
}
