use super::super::config::ConfigError;
use super::*;
use crate::ids::Clock;
use ps_runtime::actor::{Undelivered, UnknownOutcome};
use ps_runtime::test_util::check_error_crosses;

const WORKER: WorkerId = WorkerId(3);
const LEAST: Incarnation = Incarnation(u64::MAX);

fn every_server_error() -> Vec<ServerError> {
    let (worker, least, version) = (WORKER, LEAST, Version(9));
    let got = Incarnation(5);
    let id = GradientId {
        worker,
        incarnation: got,
        clock: Clock(7),
    };
    let refusals = [
        Refusal::NotMember { worker },
        Refusal::Silent {
            worker,
            lease: std::time::Duration::MAX,
        },
        Refusal::Fenced { worker, got, least },
        Refusal::IncarnationAhead {
            worker,
            got: LEAST,
            newest: got,
        },
        Refusal::ClockAhead {
            id,
            most: Clock(u64::MAX),
        },
        Refusal::TooManyExamples {
            id,
            claimed: u64::MAX,
        },
        Refusal::TwoIncarnations {
            worker,
            one: got,
            other: LEAST,
        },
        Refusal::Forgotten { id },
        Refusal::AlreadyPushed { id },
        Refusal::FromTheFuture {
            id,
            claimed: Version(u64::MAX),
            version,
        },
        Refusal::TooManyPending { worker },
        Refusal::TooManyWorkers { worker },
        Refusal::Empty,
    ]
    .map(ServerError::from);
    let shard = [
        ShardError::WrongRange {
            id,
            got: 0..usize::MAX,
            expected: 4..7,
        },
        ShardError::WrongBuffers {
            id,
            got: 0..usize::MAX,
            expected: 4..7,
        },
        ShardError::Fenced { id, least },
        ShardError::TooManyStaged { worker },
        ShardError::TooManyStrangers { id },
        ShardError::VersionGone {
            asked: Version(1),
            oldest: version,
        },
        ShardError::WrongUpdate {
            got: version,
            expected: Version(1),
        },
        ShardError::BadUpdate { version },
    ]
    .map(ServerError::from);
    let config = [
        ConfigError::LearningRate(f64::NAN),
        ConfigError::MaxNorm(-0.5),
        ConfigError::Clipping(-0.5),
        ConfigError::Lease(std::time::Duration::from_nanos(1)),
        ConfigError::NoQuorum,
        ConfigError::RuleState("it keeps no state".to_owned()),
        ConfigError::Versions {
            of: Version(3),
            weights: version,
        },
    ]
    .map(ServerError::from);
    let own = [
        ServerError::BadNorm {
            norm: f64::INFINITY,
            limit: 1e-3,
        },
        ServerError::NotFirst,
        ServerError::GroupBroken {
            index: 2,
            reason: "it has stopped".to_owned(),
        },
        ServerError::FollowerBehind {
            index: 1,
            num_behind: 1000,
            num_kept_bytes: 3 << 30,
        },
        ServerError::TooManyWaiting { limit: 65536 },
        ServerError::NotFollowed {
            reason: "only the first server decides".to_owned(),
        },
        ServerError::Stopping,
    ];
    let every = refusals.into_iter().chain(shard).chain(config);
    every.chain(own).collect()
}

#[test]
fn every_server_error_crosses_a_wire() {
    for sent in every_server_error() {
        let got = check_error_crosses(&sent);
        assert_eq!(format!("{got:?}"), format!("{sent:?}"));
    }
}

#[test]
fn a_group_error_crosses_a_wire_with_what_caused_it() {
    let call = [
        CallError::NotDelivered {
            actor: "server-1".into(),
            reason: NotDelivered::QueueFull { limit: 64 },
            message: Undelivered::new(GetStatus),
        },
        CallError::Unknown {
            actor: "server-1".into(),
            reason: UnknownOutcome::Stopped,
        },
    ];
    let call = call.map(|source| GroupError::Call { index: 1, source });
    let server = every_server_error().into_iter();
    let server = server.map(|source| GroupError::Server { index: 0, source });
    for sent in call.into_iter().chain(server) {
        let got = check_error_crosses(&sent);
        assert_eq!(format!("{got:?}"), format!("{sent:?}"));
        assert_eq!(got.refusal(), sent.refusal());
    }
}
