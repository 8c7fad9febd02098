//! Calls that were taken back.

use std::sync::Arc;

use actix::{Actor, Context, Handler, Message};

use crate::actor::ActorId;
use crate::actor::call::ReplySlot;
use crate::actor::mailbox::Mailbox;

struct Idle;

impl Actor for Idle {
    type Context = Context<Self>;
}

#[derive(Message)]
#[rtype(result = "()")]
struct Ping;

impl Handler<Ping> for Idle {
    type Result = ();

    fn handle(&mut self, _: Ping, _: &mut Context<Self>) {}
}

#[test]
fn calls_taken_back_do_not_fill_the_queue_of_a_stuck_actor() {
    let mailbox = Arc::new(Mailbox::<Idle>::new(ActorId::next(), "idle".into(), 16));
    let _kept: Vec<_> = (0..8).map(|_| mailbox.push(Ping, false).unwrap()).collect();
    for _ in 0..10_000 {
        mailbox.push(Ping, false).unwrap().abandon();
        assert!(mailbox.num_queued() <= 2 * 8 + 1);
    }
    assert_eq!(mailbox.book().pending(), 8);
    mailbox.finish();
}
