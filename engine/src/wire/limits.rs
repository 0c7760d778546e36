//! Limits on what a primary may send (spec §21). Each is far above anything seen from a real primary and far below
//! what would exhaust the receiver.

/// Longest name of a machine type. The wire has 32 bits for the length; real names have some 20 bytes.
pub const MACHINE_NAME_MAX: u32 = 255;

/// Shortest device state of a checkpoint: one section's type byte and the EOF byte (spec §12.3).
pub const VMSTATE_MIN: u64 = 2;

/// Longest device state of a checkpoint. Seen: 13 KB to 405 KB; machines with many devices have a few MB.
pub const VMSTATE_MAX: u64 = 1 << 30;

/// Most bytes of initial device state and vmdesc together, which are buffered until the end is found (spec §11.1).
pub const INITIAL_STATE_MAX: usize = 256 << 20;

/// Longest vmdesc. Seen: 45 KB to 128 KB; some KB for each CPU. It is checked in one go, by the thread that receives.
pub const VMDESC_MAX: usize = 4 << 20;

/// Deepest nesting of the vmdesc's JSON. Real ones have about 10 levels (spec §20, 22).
pub const VMDESC_DEPTH_MAX: usize = 64;
