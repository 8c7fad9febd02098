//! PS-6 for the actor that knows which faults have happened: whatever a peer sends, it goes on.

use std::cell::RefCell;
use std::sync::Arc;

use ps_actors::actor::Spawn;
use ps_runtime::test_util::Fuzz;

use super::monitor::{Claim, Event, Ledger, Monitor, Seen};

#[test]
fn nothing_that_a_peer_sends_harms_the_monitor() {
    let known: RefCell<Option<Arc<Ledger>>> = RefCell::default();
    let fuzz = Fuzz {
        one_in: 5,
        fresh_every: 100,
    };
    let num_effects = fuzz.run::<Monitor>(
        |_| {
            let plan = "kill worker 1 @ step 3; stop worker 0 for 1s @ step 5".parse();
            let ledger = Arc::new(Ledger::new(plan.unwrap(), None, false));
            known.replace(Some(Arc::clone(&ledger)));
            let monitor = Spawn::new().start(move || Monitor(Arc::clone(&ledger)));
            monitor.expect("the system gives a thread")
        },
        |process, dice| {
            let applied = Event::Applied {
                version: dice.below(9),
                gradients: vec![(dice.below(3) as u32, dice.below(9)); dice.below(3) as usize],
            };
            let seen = Seen {
                process: (dice.below(3) as u32, dice.below(3) as u32),
                number: dice.below(9),
                events: vec![(dice.any(), Event::Made), (7, applied)],
                num_cut: dice.any(),
                num_doubled: dice.any(),
                num_delayed: dice.any(),
            };
            let fault = dice.below(3) as u32;
            vec![
                process.sent::<Monitor, _>(&seen),
                process.sent::<Monitor, _>(&Claim { fault }),
            ]
        },
        |monitor| {
            let fault = u32::MAX;
            assert!(
                !monitor.ask(Claim { fault }).wait()?,
                "there is no such fault"
            );
            let known = known.borrow();
            let known = known.as_ref().expect("the monitor was made");
            let report = known.report();
            let has_happened = report.faults.values().any(|count| count.num_happened > 0);
            Ok(known.counts().num_steps > 0 && has_happened)
        },
    );
    assert!(
        num_effects > 0,
        "no step was counted, or no fault has happened"
    );
}
