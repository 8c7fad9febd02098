//! What holds under every schedule.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use shuttle::future::block_on;
use shuttle::thread;

use crate::actor::call::{GiveUp, ReplySlot};
use crate::actor::mailbox::Mailbox;
use crate::actor::{CallError, Reply};
use crate::stage::{Count, CountLater, Counter, Parking, Stage, under_many_schedules};

fn ask(mailbox: &Arc<Mailbox<Counter>>) -> Reply<u64> {
    Reply::started(mailbox.push(Count, false))
}

///
#[test]
fn every_call_is_answered_in_the_order_of_its_caller() {
    under_many_schedules(|| {
        let stage = Stage::new(8);
        let callers = [(); 2].map(|()| {
            let mailbox = Arc::clone(&stage.mailbox);
            thread::spawn(move || {
                let (first, second) = (ask(&mailbox), ask(&mailbox));
                let (second, first) = (second.wait().unwrap(), first.wait().unwrap());
                assert!(first < second);
            })
        });
        for caller in callers {
            caller.join().unwrap();
        }
        assert_eq!(stage.num_begun(), 4);
        stage.close();
    });
}

///
#[test]
fn a_slot_is_free_before_its_caller_sees_the_result() {
    under_many_schedules(|| {
        let stage = Stage::new(1);
        for _ in 0..3 {
            ask(&stage.mailbox).wait().unwrap();
        }
        stage.close();
    });
}

///
#[test]
fn a_call_that_is_given_up_is_handed_back_or_has_begun() {
    under_many_schedules(|| {
        let stage = Stage::new(2);
        let mailbox = Arc::clone(&stage.mailbox);
        let caller = thread::spawn(move || {
            let call = mailbox.push(Count, false).unwrap();
            let polled = block_on(poll_fn(|cx| Poll::Ready(call.poll(cx))));
            match polled {
                Poll::Ready(result) => result.map(|_| ()),
                Poll::Pending => call.give_up(GiveUp::TimedOut(Duration::ZERO)).map(|_| ()),
            }
        });
        let ended = caller.join().unwrap();
        let was_handed_back = match ended {
            Ok(()) => false,
            Err(error @ CallError::NotDelivered { .. }) => {
                error.into_message::<Count>().unwrap();
                true
            }
            Err(error) => {
                assert!(error.may_have_run());
                false
            }
        };
        // Behind the call.
        let num_before = ask(&stage.mailbox).wait().unwrap() - 1;
        assert_eq!(num_before, u64::from(!was_handed_back));
        stage.close();
    });
}

///
#[test]
fn a_reply_that_is_dropped_gives_its_slot_back_once() {
    under_many_schedules(|| {
        let stage = Stage::new(2);
        let mailbox = Arc::clone(&stage.mailbox);
        let caller = thread::spawn(move || drop(ask(&mailbox)));
        ask(&stage.mailbox).wait().unwrap();
        caller.join().unwrap();
        // Behind the dropped call, which may have been running.
        ask(&stage.mailbox).wait().unwrap();
        stage.close();
    });
}

///
#[test]
fn who_waits_for_a_slot_gets_one_or_learns_of_the_end() {
    under_many_schedules(|| {
        let stage = Stage::new(1);
        let callers = [(); 3].map(|()| {
            let mailbox = Arc::clone(&stage.mailbox);
            thread::spawn(move || {
                let call = block_on(mailbox.push_when_ready(Count));
                Reply::started(call).wait().is_ok()
            })
        });
        let mailbox = Arc::clone(&stage.mailbox);
        let closer = thread::spawn(move || mailbox.close());
        let num_answered = callers.map(|caller| caller.join().unwrap());
        let num_answered = num_answered
            .into_iter()
            .filter(|answered| *answered)
            .count();
        closer.join().unwrap();
        assert_eq!(stage.end(), num_answered as u64);
    });
}

///
#[test]
fn a_kill_leaves_no_call_without_an_end() {
    under_many_schedules(|| {
        let stage = Stage::new(8);
        let mailbox = Arc::clone(&stage.mailbox);
        let teller = thread::spawn(move || {
            let told = (0..2).filter(|_| mailbox.push(Count, true).is_ok());
            told.count() as u64
        });
        let mailbox = Arc::clone(&stage.mailbox);
        let asker = thread::spawn(move || match ask(&mailbox).wait() {
            Ok(_) => 1,
            Err(error) => {
                assert!(
                    !error.may_have_run(),
                    "a killed actor ends its running handler"
                );
                0
            }
        });
        stage.mailbox.kill();
        let (num_told, num_answered) = (teller.join().unwrap(), asker.join().unwrap());
        let mailbox = Arc::clone(&stage.mailbox);
        let num_begun = stage.end();
        assert_eq!(
            num_begun + mailbox.book().dead_letters(),
            num_told + num_answered
        );
    });
}

#[test]
fn a_response_that_comes_later_is_answered() {
    under_many_schedules(|| {
        let stage = Stage::new(1);
        let parking: Parking<_> = Arc::default();
        let call = stage.mailbox.push(CountLater(Arc::clone(&parking)), false);
        let call = call.unwrap();
        let answerer = thread::spawn(move || {
            loop {
                let taken = parking.lock().unwrap().take();
                if let Some((sender, gone)) = taken {
                    drop(gone);
                    sender.send(7).unwrap();
                    return;
                }
                thread::yield_now();
            }
        });
        let result = Reply::started(Ok(call)).wait();
        assert_eq!(result.unwrap(), 7);
        answerer.join().unwrap();
        stage.close();
    });
}

///
#[test]
fn a_handler_learns_that_its_caller_has_gone() {
    under_many_schedules(|| {
        let stage = Stage::new(1);
        let parking: Parking<_> = Arc::default();
        let call = stage.mailbox.push(CountLater(Arc::clone(&parking)), false);
        let call = call.unwrap();
        let handler = thread::spawn(move || {
            loop {
                let taken = parking.lock().unwrap().take();
                if let Some((sender, gone)) = taken {
                    block_on(gone);
                    // The response is lost, and the slot comes back.
                    return drop(sender);
                }
                if Arc::strong_count(&parking) == 1 {
                    // The call was taken back before it began.
                    return;
                }
                thread::yield_now();
            }
        });
        let error = call.give_up(GiveUp::WouldDeadlock).unwrap_err();
        drop(call);
        drop(error);
        handler.join().unwrap();
        // It waits for the slot of the call before.
        let call = block_on(stage.mailbox.push_when_ready(Count));
        Reply::started(call).wait().unwrap();
        stage.close();
    });
}
