//! The command `colo-ring`.

fn main() -> std::process::ExitCode {
    colo_ring_tools::main()
}
