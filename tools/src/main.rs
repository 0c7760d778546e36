//! The command `colo-ring`.
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    colo_ring_tools::main()
}
