//! Micro-benchmarks of the engine: see the files beside `src/`.
