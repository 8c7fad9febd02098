//! Turns the panics of burn into error messages.
//!
//! burn panics if a shape is wrong or a device is missing, for example. It unwinds and stays usable. A
//! caller that runs burn for somebody else, such as an actor for its users, needs an error instead.

use std::any::Any;
use std::cell::Cell;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;

/// Runs `work`, returning the message of its panic if it panics.
///
/// The panic hook runs as usual. The caller must not continue to use values that `work` left half changed.
pub(crate) fn catch<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    panic::catch_unwind(AssertUnwindSafe(work)).map_err(message)
}

thread_local! {
    /// How many calls of [`catch_quietly`] are running on this thread.
    static DEPTH: Cell<u32> = const { Cell::new(0) };
}

/// Like [`catch`], without the panic hook's output for this thread.
///
/// For all other threads, the hook of the first call stays in use. It is wrapped once. If another hook is
/// set later, that one replaces the wrapper, and its output is not suppressed.
pub(crate) fn catch_quietly<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    static WRAPPED: Once = Once::new();
    WRAPPED.call_once(|| {
        let hook = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if DEPTH.get() == 0 {
                hook(info);
            }
        }));
    });
    DEPTH.set(DEPTH.get() + 1);
    let result = catch(work);
    DEPTH.set(DEPTH.get() - 1);
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

    /// One hook for any number of calls, at the same time, too.
    #[test]
    fn a_quiet_panic_does_not_reach_the_hook_and_others_do() {
        use std::sync::atomic::{AtomicUsize, Ordering};
        static NUM_HEARD: AtomicUsize = AtomicUsize::new(0);
        static NUM_DROPPED: AtomicUsize = AtomicUsize::new(0);
        struct Counted;
        impl Drop for Counted {
            fn drop(&mut self) {
                NUM_DROPPED.fetch_add(1, Ordering::SeqCst);
            }
        }
        // In whatever order the tests run, the hook is wrapped now; this is what it does per call.
        assert_eq!(catch_quietly(|| 1), Ok(1));
        let (hook, counted) = (panic::take_hook(), Counted);
        panic::set_hook(Box::new(move |info| {
            let _ = &counted;
            let is_ours = info.payload().downcast_ref::<&str>() == Some(&"loud in this test");
            NUM_HEARD.fetch_add(usize::from(is_ours), Ordering::SeqCst);
            hook(info);
        }));
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| catch_quietly(|| panic!("quiet")).map_err(drop));
            }
            scope.spawn(|| catch(|| panic!("loud in this test")).map_err(drop));
        });
        assert_eq!(NUM_HEARD.load(Ordering::SeqCst), 1);
        let kept = NUM_DROPPED.load(Ordering::SeqCst);
        assert_eq!(kept, 0, "the hook that is there is left alone");
    }

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
