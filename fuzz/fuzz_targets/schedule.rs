//! See `ps_fuzz::schedule`.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| ps_fuzz::schedule::run(input));
