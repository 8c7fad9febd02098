//! Counts what a coordinator looks at, for the test that a push costs the same whatever the number of workers. The lists
//! of members, pushes and answers can only be gone through by methods that say so here.

#[cfg(test)]
std::thread_local! {
    static NUM_LOOKED_AT: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
}

/// Notes that so many entries of a list are looked at. It costs nothing outside tests.
#[inline]
pub(super) fn looks_at(num: usize) {
    #[cfg(test)]
    NUM_LOOKED_AT.set(NUM_LOOKED_AT.get() + num as u64);
    #[cfg(not(test))]
    let _ = num;
}

/// Returns how many entries the coordinators of this thread have looked at since the last question.
#[cfg(test)]
pub(in crate::server) fn num_looked_at() -> u64 {
    NUM_LOOKED_AT.take()
}
