//! Turns the panics of burn into error messages.
//!
//! burn reports wrong shapes, missing devices and the like by panicking; it unwinds and stays
//! usable. Callers that run it for somebody else (an actor for its users) need an error instead.

use std::any::Any;
use std::panic::{self, AssertUnwindSafe};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

/// Runs `work`, returning the message of its panic if it panics.
///
/// The panic hook runs as usual. The caller must not go on with values that `work` left half
/// changed.
pub(crate) fn catch<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    panic::catch_unwind(AssertUnwindSafe(work)).map_err(message)
}

/// Like [`catch`], without the panic hook's output for this thread.
///
/// Other threads keep the hook that is installed. The hook is process-wide, so calls take turns.
pub(crate) fn catch_quietly<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);

    let this_thread = thread::current().id();
    let installed: Arc<dyn Fn(&panic::PanicHookInfo<'_>) + Send + Sync> =
        Arc::from(panic::take_hook());
    let hook = Arc::clone(&installed);
    panic::set_hook(Box::new(move |info| {
        if thread::current().id() != this_thread {
            hook(info);
        }
    }));
    let result = catch(work);
    drop(panic::take_hook());
    panic::set_hook(Box::new(move |info| installed(info)));
    result
}

fn message(payload: Box<dyn Any + Send>) -> String {
    match payload.downcast::<String>() {
        Ok(message) => *message,
        Err(payload) => match payload.downcast::<&'static str>() {
            Ok(message) => (*message).to_owned(),
            Err(_) => "a panic without a message".to_owned(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_its_message() {
        assert_eq!(catch_quietly(|| 7), Ok(7));
        assert_eq!(
            catch_quietly(|| panic!("plain")),
            Err::<(), _>("plain".to_owned())
        );
        let number = 3;
        assert_eq!(
            catch_quietly(|| panic!("formatted {number}")),
            Err::<(), _>("formatted 3".to_owned())
        );
        assert_eq!(
            catch_quietly(|| panic::panic_any(5_u8)),
            Err::<(), _>("a panic without a message".to_owned())
        );
    }
}
