//! The command `colo-ring`.
fn main() {}
