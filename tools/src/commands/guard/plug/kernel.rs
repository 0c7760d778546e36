//! What a plug is made of in the kernel: an ifb device, a plug queue on it, and the redirection of a tap device's frames to it.
//!
//! Numbers are those of the kernel's public headers: <linux/rtnetlink.h>, <linux/if_link.h>, <linux/pkt_sched.h>, <linux/pkt_cls.h>,
//! <linux/tc_act/tc_mirred.h>, <linux/gen_stats.h>.

use super::netlink::{CREATE, EXCLUSIVE, Netlink, Request, attribute, text, u32_at};
use nix::errno::Errno;
use std::io::{self, ErrorKind};
use thiserror::Error;

const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_GETLINK: u16 = 18;
const RTM_NEWQDISC: u16 = 36;
const RTM_DELQDISC: u16 = 37;
const RTM_GETQDISC: u16 = 38;
const RTM_NEWTFILTER: u16 = 44;

const NLM_F_ECHO: u16 = 0x8;

const IFLA_IFNAME: u16 = 3;
const IFLA_LINKINFO: u16 = 18;
const IFLA_CARRIER: u16 = 33;
const IFLA_INFO_KIND: u16 = 1;
const IFF_UP: u32 = 1;
const IFINFOMSG_BYTES: usize = 16;

const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_STATS2: u16 = 7;
const TCA_STATS_BASIC: u16 = 1;
const TCA_STATS_QUEUE: u16 = 3;
const TCMSG_BYTES: usize = 20;
const TC_H_ROOT: u32 = 0xffff_ffff;
const TC_H_INGRESS: u32 = 0xffff_fff1;

/// The handle of the ingress qdisc, and that of the plug: the kernel takes changes of a qdisc whose handle is named.
const INGRESS_HANDLE: u32 = 0xffff_0000;
const PLUG_HANDLE: u32 = 0x0001_0000;

const TCA_MATCHALL_ACT: u16 = 2;
const TCA_ACT_KIND: u16 = 1;
const TCA_ACT_OPTIONS: u16 = 2;
const TCA_MIRRED_PARMS: u16 = 2;
const TC_ACT_STOLEN: u32 = 4;
const TCA_EGRESS_REDIR: u32 = 1;
/// ETH_P_ALL, in the byte order of the network.
const PROTOCOL_ALL: u16 = 3_u16.to_be();
const PRIORITY: u32 = 1;

/// A plug cannot be put before a card.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub(crate) enum PlugError {
    #[error("there is no interface {0} in the network namespace of this process")]
    NoInterface(String),
    #[error("{0} is not a tap device")]
    NoTap(String),
    #[error("the kernel has no {module} ({errno}); as root: modprobe {module}")]
    Module { module: &'static str, errno: Errno },
    #[error("a plug needs root (CAP_NET_ADMIN and CAP_NET_RAW)")]
    NotAllowed,
    #[error("{0} has an ingress qdisc of another program (tc qdisc show dev {0})")]
    HasIngress(String),
    #[error("QEMU does not say or take which plug is its own: {0}")]
    Marker(String),
    #[error("cannot {what}: {errno}")]
    Failed { what: String, errno: Errno },
}

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Interface {
    pub(super) index: u32,
    pub(super) name: String,
    /// Such as `tun` or `ifb`, where the kernel says.
    pub(super) kind: Option<String>,
    /// Whether something is at its other end: for a tap device, a process that has it open.
    pub(super) has_carrier: bool,
}

impl Interface {
    /// From the kernel's description.
    fn of(link: &[u8]) -> Option<Self> {
        let attributes = link.get(IFINFOMSG_BYTES..)?;
        let info = attribute(attributes, IFLA_LINKINFO);
        Some(Self {
            index: u32_at(link, 4)?,
            name: text(attribute(attributes, IFLA_IFNAME)?),
            kind: info.and_then(|info| attribute(info, IFLA_INFO_KIND)).map(text),
            has_carrier: attribute(attributes, IFLA_CARRIER) == Some(&[1]),
        })
    }
}

/// What a plug is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Draws a line behind what waits; the next release goes up to it. Closes a plug that is open.
    Buffer,
    /// Lets go of what is before the line.
    ReleaseOne,
    /// Lets go of everything, and lets everything pass.
    ReleaseIndefinite,
    /// Holds at most so many bytes.
    Limit(u32),
}

impl Action {
    /// `struct tc_plug_qopt`: a number, and the limit for the action that has one.
    fn options(self) -> Vec<u8> {
        let words = match self {
            Self::Buffer => [0, 0],
            Self::ReleaseOne => [1, 0],
            Self::ReleaseIndefinite => [2, 0],
            Self::Limit(bytes) => [3, bytes],
        };
        words.map(u32::to_ne_bytes).concat()
    }
}

/// What a plug has and had.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Statistics {
    /// Bytes that have left.
    pub(super) left_bytes: u64,
    /// Frames that wait.
    pub(super) frames: u64,
    /// Their bytes.
    pub(super) waiting_bytes: u64,
    /// Frames that did not fit.
    pub(super) dropped: u64,
}

impl Statistics {
    /// Bytes that were ever put in.
    pub(super) fn taken_bytes(&self) -> u64 {
        self.left_bytes + self.waiting_bytes
    }

    /// From the attributes of a qdisc.
    fn of(attributes: &[u8]) -> Option<Self> {
        let all = attribute(attributes, TCA_STATS2)?;
        let (basic, queue) = (attribute(all, TCA_STATS_BASIC)?, attribute(all, TCA_STATS_QUEUE)?);
        let number = |at| u32_at(queue, at).map(u64::from);
        Some(Self {
            left_bytes: u64::from_ne_bytes(*basic.first_chunk()?),
            frames: number(0)?,
            waiting_bytes: number(4)?,
            dropped: number(8)?,
        })
    }
}

fn link_message(index: u32, flags: u32) -> Vec<u8> {
    // Family, padding and type; which of the flags are to change.
    [0, index, flags, flags]
        .iter()
        .flat_map(|word| word.to_ne_bytes())
        .collect()
}

fn queue_message(interface: u32, handle: u32, parent: u32, info: u32) -> Vec<u8> {
    let words = [0, interface, handle, parent, info];
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fn new_ifb(name: &str) -> Request {
    Request::new(RTM_NEWLINK, CREATE | EXCLUSIVE, &link_message(0, 0))
        .with_text(IFLA_IFNAME, name)
        .with_nested(IFLA_LINKINFO, |info| info.with(IFLA_INFO_KIND, b"ifb"))
}

/// A request about a plug on that interface: to make one (`flags`), which reads the limit alone, or to change it.
fn plug_request(ifb: u32, flags: u16, action: Action) -> Request {
    Request::new(
        RTM_NEWQDISC,
        flags,
        &queue_message(ifb, PLUG_HANDLE, TC_H_ROOT, 0),
    )
    .with_text(TCA_KIND, "plug")
    .with(TCA_OPTIONS, &action.options())
}

/// A filter that gives every frame that comes in on one interface to another, which sends it.
fn redirect_request(from: u32, to: u32) -> Request {
    // Index, capabilities, action, two counts of references; then what mirred does, and where to.
    let parameters = [0, 0, TC_ACT_STOLEN, 0, 0, TCA_EGRESS_REDIR, to];
    let parameters = parameters.map(u32::to_ne_bytes).concat();
    let info = PRIORITY << 16 | u32::from(PROTOCOL_ALL);
    Request::new(
        RTM_NEWTFILTER,
        CREATE | EXCLUSIVE,
        &queue_message(from, 0, INGRESS_HANDLE, info),
    )
    .with_text(TCA_KIND, "matchall")
    .with_nested(TCA_OPTIONS, |options| {
        options.with_nested(TCA_MATCHALL_ACT, |actions| {
            actions.with_nested(1, |first| {
                first
                    .with_text(TCA_ACT_KIND, "mirred")
                    .with_nested(TCA_ACT_OPTIONS, |mirred| {
                        mirred.with(TCA_MIRRED_PARMS, &parameters)
                    })
            })
        })
    })
}

/// What the errors of making a part mean.
fn needs<T>(module: &'static str, done: Result<T, Errno>) -> Result<T, PlugError> {
    done.map_err(|errno| match errno {
        Errno::EPERM | Errno::EACCES => PlugError::NotAllowed,
        // A kind of link, of qdisc or of filter that is not known.
        Errno::ENOENT | Errno::EOPNOTSUPP => PlugError::Module { module, errno },
        errno => PlugError::Failed {
            what: format!("set up {module}"),
            errno,
        },
    })
}

/// The kernel's network configuration.
#[derive(Debug)]
pub(super) struct Kernel {
    netlink: Netlink,
}

impl Kernel {
    pub(super) fn connect() -> Result<Self, PlugError> {
        let netlink = Netlink::connect().map_err(|errno| PlugError::Failed {
            what: "open a netlink socket".to_owned(),
            errno,
        })?;
        Ok(Self { netlink })
    }

    /// The interface of that name, if there is one.
    ///
    /// # Errors
    /// If the kernel does not say whether there is.
    pub(super) fn interface(&mut self, name: &str) -> Result<Option<Interface>, PlugError> {
        self.find(&Request::new(RTM_GETLINK, 0, &link_message(0, 0)).with_text(IFLA_IFNAME, name))
    }

    /// The interface of that number, if there is one.
    ///
    /// # Errors
    /// If the kernel does not say whether there is.
    pub(super) fn interface_at(&mut self, index: u32) -> Result<Option<Interface>, PlugError> {
        self.find(&Request::new(RTM_GETLINK, 0, &link_message(index, 0)))
    }

    fn find(&mut self, request: &Request) -> Result<Option<Interface>, PlugError> {
        let what = || "look for an interface".to_owned();
        match self.netlink.execute(request) {
            Ok(answer) => match Interface::of(&answer) {
                Some(interface) => Ok(Some(interface)),
                None => Err(PlugError::Failed {
                    what: what(),
                    errno: Errno::EBADMSG,
                }),
            },
            Err(Errno::ENODEV) => Ok(None),
            Err(errno) => Err(PlugError::Failed { what: what(), errno }),
        }
    }

    /// Makes an ifb device with a plug that is closed. Nothing is left when it fails.
    ///
    /// # Errors
    /// With the module that is missing.
    pub(super) fn make(&mut self, name: &str, limit_bytes: u32) -> Result<Interface, PlugError> {
        needs("ifb", self.netlink.execute(&new_ifb(name)))?;
        let ifb = self.interface(name)?;
        let ifb = ifb.ok_or_else(|| PlugError::NoInterface(name.to_owned()))?;
        let made = self.set_up(&ifb, limit_bytes);
        if made.is_err() {
            self.delete(ifb.index);
        }
        made.map(|()| ifb)
    }

    fn set_up(&mut self, ifb: &Interface, limit_bytes: u32) -> Result<(), PlugError> {
        // The kernel's own neighbour discovery would wait in the plug.
        let switch = format!("/proc/sys/net/ipv6/conf/{}/disable_ipv6", ifb.name);
        match std::fs::write(&switch, "1") {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(failed(format!("write {switch}"), &error));
            }
            // Without IPv6 there is no such file.
            _ => {}
        }
        let plug = plug_request(ifb.index, CREATE | EXCLUSIVE, Action::Limit(limit_bytes));
        needs("sch_plug", self.netlink.execute(&plug))?;
        let up = Request::new(RTM_NEWLINK, 0, &link_message(ifb.index, IFF_UP));
        needs("ifb", self.netlink.execute(&up)).map(drop)
    }

    /// Removes an interface, and drops what its plug holds. It may have gone.
    pub(super) fn delete(&mut self, index: u32) {
        let _ = self
            .netlink
            .execute(&Request::new(RTM_DELLINK, 0, &link_message(index, 0)));
    }

    /// Gives what comes in on one interface to another, which sends it.
    ///
    /// # Errors
    /// If it has an ingress qdisc already, or with the module that is missing.
    pub(super) fn redirect(&mut self, from: &Interface, to: u32) -> Result<(), PlugError> {
        let message = queue_message(from.index, INGRESS_HANDLE, TC_H_INGRESS, 0);
        let ingress = Request::new(RTM_NEWQDISC, CREATE | EXCLUSIVE, &message).with_text(TCA_KIND, "ingress");
        match self.netlink.execute(&ingress) {
            Err(Errno::EEXIST) => return Err(PlugError::HasIngress(from.name.clone())),
            done => needs("sch_ingress", done)?,
        };
        let redirected = self.netlink.execute(&redirect_request(from.index, to));
        if redirected.is_err() {
            self.stop_redirect(from.index);
        }
        needs("cls_matchall or act_mirred", redirected).map(drop)
    }

    /// Lets what comes in on an interface in as usual. The interface may have gone, with all that was on it.
    pub(super) fn stop_redirect(&mut self, from: u32) {
        let message = queue_message(from, INGRESS_HANDLE, TC_H_INGRESS, 0);
        let _ = self.netlink.execute(&Request::new(RTM_DELQDISC, 0, &message));
    }

    /// Tells a plug what to do.
    ///
    /// # Errors
    /// The kernel's own.
    pub(super) fn act(&mut self, ifb: u32, action: Action) -> io::Result<()> {
        let done = self.netlink.execute(&plug_request(ifb, 0, action));
        done.map(drop).map_err(io::Error::from)
    }

    /// What a plug has and had.
    ///
    /// # Errors
    /// The kernel's own.
    pub(super) fn statistics(&mut self, ifb: u32) -> io::Result<Statistics> {
        // Kernels before 6.8 answer only to an echo.
        let get = Request::new(RTM_GETQDISC, NLM_F_ECHO, &queue_message(ifb, 0, TC_H_ROOT, 0));
        let answer = self.netlink.execute(&get)?;
        let found = answer.get(TCMSG_BYTES..).and_then(Statistics::of);
        found.ok_or_else(|| {
            io::Error::new(
                ErrorKind::InvalidData,
                "the kernel gives no statistics of the plug",
            )
        })
    }
}

/// An error of the system, with what was tried.
pub(super) fn failed(what: String, error: &io::Error) -> PlugError {
    let errno = Errno::from_raw(error.raw_os_error().unwrap_or_default());
    PlugError::Failed { what, errno }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_are_read_where_the_kernel_puts_them() {
        let basic = [900_u64.to_ne_bytes().as_slice(), &7_u32.to_ne_bytes(), &[0; 4]].concat();
        let queue = [3_u32, 400, 5, 6, 7].map(u32::to_ne_bytes).concat();
        let request = Request::new(0, 0, &[])
            .with_text(TCA_KIND, "plug")
            .with_nested(TCA_STATS2, |all| {
                all.with(TCA_STATS_BASIC, &basic).with(TCA_STATS_QUEUE, &queue)
            });
        let statistics = Statistics::of(request.body()).unwrap();
        let expected = Statistics {
            left_bytes: 900,
            frames: 3,
            waiting_bytes: 400,
            dropped: 5,
        };
        assert_eq!(statistics, expected);
        assert_eq!(statistics.taken_bytes(), 1300);
        assert_eq!(Statistics::of(&[]), None);
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn a_redirection_is_encoded_as_the_kernel_reads_it() {
        let request = redirect_request(5, 9);
        let body = request.body();
        assert_eq!(
            body[..TCMSG_BYTES],
            queue_message(5, 0, 0xffff_0000, 0x0001_0300)[..]
        );
        let attributes = &body[TCMSG_BYTES..];
        assert_eq!(attribute(attributes, 1), Some(&b"matchall\0"[..]));
        let action = [2, 2, 1]
            .iter()
            .fold(attributes, |within, kind| attribute(within, *kind).unwrap());
        assert_eq!(attribute(action, 1), Some(&b"mirred\0"[..]));
        let parameters = attribute(attribute(action, 2).unwrap(), 2).unwrap();
        assert_eq!(parameters.len(), 28);
        let words: Vec<_> = (0..7).map(|word| u32_at(parameters, word * 4).unwrap()).collect();
        assert_eq!(words, [0, 0, 4, 0, 0, 1, 9]);
    }

    #[test]
    fn a_plug_is_told_by_action_and_limit() {
        for (action, words) in [
            (Action::Buffer, [0, 0]),
            (Action::ReleaseOne, [1, 0]),
            (Action::ReleaseIndefinite, [2, 0]),
            (Action::Limit(1 << 20), [3, 1 << 20]),
        ] {
            let request = plug_request(4, 0, action);
            let attributes = &request.body()[TCMSG_BYTES..];
            assert_eq!(attribute(attributes, TCA_KIND), Some(&b"plug\0"[..]));
            let options = attribute(attributes, TCA_OPTIONS).unwrap();
            assert_eq!([0, 4].map(|at| u32_at(options, at)), words.map(Some));
        }
    }

    #[test]
    fn errors_name_what_is_missing() {
        let missing = needs::<()>("sch_plug", Err(Errno::ENOENT))
            .unwrap_err()
            .to_string();
        assert!(missing.contains("modprobe sch_plug"), "{missing}");
        assert_eq!(needs::<()>("ifb", Err(Errno::EPERM)), Err(PlugError::NotAllowed));
    }
}
