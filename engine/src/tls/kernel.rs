//! What the kernel's TLS can do, found out by trying.
//!
//! No connection of a receiver uses it yet: this says what a host has.

use crate::net::kernel_tls::{begin_kernel_tls, set_receive_key};
use nix::errno::Errno;
use nix::sys::socket::sockopt::TlsCryptoInfo;
use std::fmt;
use std::io;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use thiserror::Error;

/// Ciphers of TLS that kernels have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cipher {
    Aes128Gcm,
    Aes256Gcm,
    Chacha20Poly1305,
}

impl fmt::Display for Cipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Aes128Gcm => "AES-128-GCM",
            Self::Aes256Gcm => "AES-256-GCM",
            Self::Chacha20Poly1305 => "ChaCha20-Poly1305",
        })
    }
}

/// A version and a cipher.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Suite {
    is_13: bool,
    cipher: Cipher,
}

impl Suite {
    fn all() -> impl Iterator<Item = Self> {
        let ciphers = [Cipher::Aes128Gcm, Cipher::Aes256Gcm, Cipher::Chacha20Poly1305];
        [false, true]
            .into_iter()
            .flat_map(move |is_13| ciphers.map(|cipher| Self { is_13, cipher }))
    }

    /// A key of zeroes, for a trial.
    fn trial_key(self) -> TlsCryptoInfo {
        let version = match self.is_13 {
            true => libc::TLS_1_3_VERSION,
            false => libc::TLS_1_2_VERSION,
        };
        let info = |cipher_type| libc::tls_crypto_info { version, cipher_type };
        match self.cipher {
            Cipher::Aes128Gcm => TlsCryptoInfo::Aes128Gcm(libc::tls12_crypto_info_aes_gcm_128 {
                info: info(libc::TLS_CIPHER_AES_GCM_128),
                iv: [0; 8],
                key: [0; 16],
                salt: [0; 4],
                rec_seq: [0; 8],
            }),
            Cipher::Aes256Gcm => TlsCryptoInfo::Aes256Gcm(libc::tls12_crypto_info_aes_gcm_256 {
                info: info(libc::TLS_CIPHER_AES_GCM_256),
                iv: [0; 8],
                key: [0; 32],
                salt: [0; 4],
                rec_seq: [0; 8],
            }),
            Cipher::Chacha20Poly1305 => {
                TlsCryptoInfo::Chacha20Poly1305(libc::tls12_crypto_info_chacha20_poly1305 {
                    info: info(libc::TLS_CIPHER_CHACHA20_POLY1305),
                    iv: [0; 12],
                    key: [0; 32],
                    salt: [],
                    rec_seq: [0; 8],
                })
            }
        }
    }
}

impl fmt::Display for Suite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let version = if self.is_13 { "TLS 1.3" } else { "TLS 1.2" };
        write!(f, "{version} with {}", self.cipher)
    }
}

/// Why this host's kernel can open no records.
#[derive(Debug, Error)]
pub enum KernelLack {
    /// The module is not there, or not loaded.
    #[error("this host's kernel has no TLS, or its module `tls` is not loaded")]
    Module,
    /// It cannot be tried.
    #[error("whether this host's kernel has TLS cannot be tried: {0}")]
    Trial(#[from] io::Error),
    /// It has TLS, and none of the ciphers.
    #[error("this host's kernel has TLS, and none of its ciphers: {0}")]
    Ciphers(Errno),
}

/// What this host's kernel can open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelTls {
    suites: Vec<Suite>,
    follows_key_changes: bool,
}

impl KernelTls {
    /// Tries it, on connections of this process to itself.
    ///
    /// # Errors
    /// If it can open nothing.
    pub fn probe() -> Result<Self, KernelLack> {
        // A connection is established before it is accepted.
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let mut suites = Vec::new();
        let mut follows_key_changes = false;
        let mut refused = Errno::EOPNOTSUPP;
        for suite in Suite::all() {
            let socket = TcpStream::connect(listener.local_addr()?)?;
            begin_kernel_tls(&socket).map_err(|errno| match errno {
                Errno::ENOENT => KernelLack::Module,
                errno => KernelLack::Trial(errno.into()),
            })?;
            let key = suite.trial_key();
            match set_receive_key(&socket, &key) {
                Ok(()) => suites.push(suite),
                Err(errno) => {
                    refused = errno;
                    continue;
                }
            }
            // Kernels before 6.14 take one key for a direction. TLS 1.2 has no other.
            follows_key_changes |= suite.is_13 && set_receive_key(&socket, &key).is_ok();
        }
        match suites.is_empty() {
            true => Err(KernelLack::Ciphers(refused)),
            false => Ok(Self {
                suites,
                follows_key_changes,
            }),
        }
    }

    /// Whether it can go on when a peer changes its keys, as GnuTLS does in TLS 1.3 after some 2^24 records.
    pub fn follows_key_changes(&self) -> bool {
        self.follows_key_changes
    }
}

impl fmt::Display for KernelTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, suite) in self.suites.iter().enumerate() {
            let comma = if position == 0 { "" } else { ", " };
            write!(f, "{comma}{suite}")?;
        }
        Ok(())
    }
}

#[cfg(all(test, not(loom), not(miri)))]
mod tests {
    use super::*;

    /// /proc/net/tls_stat is there with the module.
    #[test]
    fn a_host_with_the_module_has_ciphers_and_one_without_says_so() {
        let has_module = std::path::Path::new("/proc/net/tls_stat").exists();
        match KernelTls::probe() {
            Ok(kernel) => assert!(
                kernel.to_string().contains("TLS 1.2 with AES-128-GCM"),
                "{kernel}"
            ),
            Err(KernelLack::Module) => assert!(!has_module),
            Err(lack) => panic!("{lack}"),
        }
    }
}
