//! See `ps_fuzz::update_log`.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| ps_fuzz::update_log::run(input));
