//! Files of a checkpoint; see `ps_fuzz::checkpoint`.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| ps_fuzz::checkpoint::run(input));
