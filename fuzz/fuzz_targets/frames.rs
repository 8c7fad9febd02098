//! Frames from a peer, to a server and to a worker; see `ps_fuzz::frames`.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| ps_fuzz::frames::run(input));
