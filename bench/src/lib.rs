//! Only benchmarks: see `benches/`, and `docs/benchmarks.md` for what they showed.
