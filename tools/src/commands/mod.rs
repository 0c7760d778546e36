//! The subcommands: one file or folder each, with its options and what it does.

pub mod capture;
pub mod check;
pub mod compare;
pub mod demo;
pub mod discard;
pub mod doctor;
pub mod dump;
pub mod end;
pub mod failover;
pub mod guard;
pub mod import;
pub mod inspect;
pub mod protect;
pub mod receive;
pub mod replay;
pub mod sink;
pub mod slow;
pub mod status;
pub mod synth;
pub mod unprotect;
