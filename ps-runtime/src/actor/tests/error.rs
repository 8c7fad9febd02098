//! Errors that cross a wire, and what they say.

use std::time::Duration;

use crate::actor::{CallError, NotDelivered, Undelivered, UnknownOutcome};
use crate::test_util::check_error_crosses;

const AFTER: Duration = Duration::from_millis(1500);

fn not_delivered(reason: NotDelivered) -> CallError {
    CallError::NotDelivered {
        actor: "server-0".into(),
        reason,
        message: Undelivered::new(7u64),
    }
}

fn unknown(reason: UnknownOutcome) -> CallError {
    CallError::Unknown {
        actor: "server-0".into(),
        reason,
    }
}

fn every_error() -> Vec<CallError> {
    let reason = || "connection refused".to_owned();
    let panic = Some("größer".into());
    let not_delivered = [
        NotDelivered::QueueFull { limit: usize::MAX },
        NotDelivered::Stopped { panic: None },
        NotDelivered::Stopped { panic },
        NotDelivered::TimedOut {
            after: Duration::MAX,
        },
        NotDelivered::WouldDeadlock,
        NotDelivered::Unreachable { reason: reason() },
        NotDelivered::NotRegistered {
            message: "app::GetLoss".to_owned(),
            actor_type: "app::Trainer".to_owned(),
        },
        NotDelivered::TooLarge { reason: reason() },
        NotDelivered::Encode { reason: reason() },
        NotDelivered::Refused { reason: reason() },
    ]
    .map(not_delivered);
    let unknown = [
        UnknownOutcome::TimedOut { after: AFTER },
        UnknownOutcome::Stopped,
        UnknownOutcome::NoReply,
        UnknownOutcome::WouldDeadlock,
        UnknownOutcome::ConnectionLost { reason: reason() },
        UnknownOutcome::BadReply { reason: reason() },
    ]
    .map(unknown);
    let failed = CallError::Failed {
        actor: "".into(),
        panic: "index 3 is out of range".into(),
    };
    let every = not_delivered.into_iter().chain(unknown);
    every.chain([failed]).collect()
}

#[test]
fn every_call_error_crosses_a_wire() {
    for sent in every_error() {
        let got = check_error_crosses(&sent);
        assert_eq!(format!("{got:?}"), format!("{sent:?}"));
        assert_eq!(got.may_have_run(), sent.may_have_run());
        assert_eq!(got.is_connection_lost(), sent.is_connection_lost());
    }
}

#[test]
fn the_message_of_an_error_that_crossed_stays_behind() {
    let sent = not_delivered(NotDelivered::WouldDeadlock);
    let got = check_error_crosses(&sent).into_message::<u64>();
    let got = got.expect_err("the message does not cross");
    let CallError::NotDelivered { message, .. } = check_error_crosses(&got) else {
        panic!("{got:?}");
    };
    assert_eq!(message.type_name(), "u64");
    assert!(message.into_message::<u64>().is_err());
    assert_eq!(sent.into_message::<u64>().expect("it is still here"), 7);
}

#[test]
fn a_message_of_another_type_stays_in_the_error() {
    let error = not_delivered(NotDelivered::WouldDeadlock);
    let error = error.into_message::<String>().expect_err("it is a u64");
    assert_eq!(error.into_message::<u64>().expect("it is a u64"), 7);
}

#[test]
fn a_lost_connection_is_told_from_all_other_ends() {
    let lost = every_error()
        .into_iter()
        .filter(CallError::is_connection_lost);
    let lost: Vec<_> = lost.map(|error| error.to_string()).collect();
    assert_eq!(
        lost,
        [
            "call was not delivered to actor server-0: \
             its process cannot be reached: connection refused",
            "outcome of the call to actor server-0 is unknown: \
             the connection was lost while the call was under way: connection refused",
        ]
    );
}

#[test]
fn an_unregistered_message_says_where_to_add_it() {
    let error = every_error()
        .into_iter()
        .map(|error| error.to_string())
        .find(|text| text.contains("app::GetLoss"))
        .expect("it names the message");
    assert!(
        error.contains("app::Trainer") && error.contains("Remote::messages"),
        "{error}"
    );
}
