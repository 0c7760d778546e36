//! Random choices of a test, which its seed repeats.

use rand::SeedableRng;
use rand::rngs::Xoshiro256PlusPlus;
use std::time::SystemTime;

/// A generator whose seed an environment variable gives, or else the clock. The seed is printed.
///
/// # Panics
/// If the variable is no number.
#[must_use]
pub fn generator(variable: &str) -> Xoshiro256PlusPlus {
    let now = || {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        u64::try_from(since.expect("a clock after 1970").as_nanos()).expect("64 bits last until 2554")
    };
    let given = std::env::var(variable).ok();
    let seed = given.map_or_else(now, |text| text.parse().expect("a seed"));
    println!("{variable}={seed}");
    Xoshiro256PlusPlus::seed_from_u64(seed)
}
