//! Tests of private parts. They have files of their own, because `tests/schedules` compiles the tested files a
//! second time.

mod error;
mod mailbox;
mod queued;
#[cfg(target_os = "linux")]
mod spawn;
