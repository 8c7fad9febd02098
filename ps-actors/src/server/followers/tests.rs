//! The first server and the others: each decision counts once, and nobody else decides.

use std::pin::pin;

use futures_util::FutureExt;
use futures_util::future::{Either, select};
use ps_runtime::actor::{error_chain, run, sleep};
use ps_runtime::test_util::SOON;

use super::super::config::ServerConfig;
use super::super::consistency::Reduction;
use super::super::protocol::{Clip, Summand, Update};
use super::super::shard::PullVersion;
use super::*;
use crate::checkpoint::Rest;
use crate::group::ServerGroup;
use crate::ids::{Clock, GradientId, Incarnation, Version, WorkerId};
use crate::rule::Sgd;
use crate::weights::{Gradient, GradientUpdate, Layout, Weights};

fn follower(secret: &GroupSecret) -> ParameterServer {
    let initial = Weights::initial(Layout::flat(2), vec![1.0; 2]);
    let (rule, config) = (Box::new(Sgd::new()), ServerConfig::default());
    let rest = Rest::default();
    let follower = ParameterServer::follower(&initial, 0..2, rest, rule, config, secret.clone());
    follower.expect("the settings work")
}

fn id(clock: u64) -> GradientId {
    GradientId {
        worker: WorkerId(0),
        incarnation: Incarnation(1),
        clock: Clock(clock),
    }
}

fn update(version: u64, gradients: Vec<GradientId>) -> Vec<Decision> {
    let stage = |id| Decision::Stage(id, Gradient::new(vec![1.0; 2]));
    let mut decisions: Vec<_> = gradients.iter().copied().map(stage).collect();
    decisions.push(decide(version, gradients, 0.5));
    decisions
}

fn decide(version: u64, gradients: Vec<GradientId>, learning_rate: f64) -> Decision {
    Decision::Update {
        update: Update {
            version: Version(version),
            gradients: gradients
                .into_iter()
                .map(|id| Summand {
                    id,
                    computed_on: Version(0),
                    norm: Gradient::new(vec![1.0; 2]).norm(),
                    num_examples: 1,
                })
                .collect(),
            reduction: Reduction::Sum,
            clip: Clip::None,
        },
        learning_rate,
    }
}

fn follow(secret: &GroupSecret, number: u64, decisions: Vec<Decision>) -> Follow {
    Follow {
        secret: secret.clone(),
        number,
        decisions,
    }
}

/// PS-10.
#[test]
fn a_stranger_is_not_followed_and_does_not_learn_the_secret() {
    let secret = GroupSecret::random();
    let mut server = follower(&secret);
    let stranger = GroupSecret::random();
    let error = server
        .take(follow(&stranger, 0, update(1, vec![id(0)])))
        .unwrap_err();
    assert!(error.to_string().contains("only the first"), "{error}");
    assert_eq!(server.shard.weights().version(), Version(0));
    let text = format!("{:?}", follow(&secret, 0, Vec::new()));
    assert!(text.contains("GroupSecret(..)"), "{text}");
    server
        .take(follow(&secret, 0, update(1, vec![id(0)])))
        .unwrap();
    assert_eq!(server.shard.weights().to_vec(), [0.5; 2]);
}

/// PS-10: the other server still answers its callers, but the first one can tell it nothing more. Here it does so at
/// once, because it has another secret.
#[test]
fn nobody_waits_for_an_update_that_another_server_is_never_told() {
    let initial = Weights::initial(Layout::flat(4), vec![1.0; 4]);
    let config = ServerConfig::default();
    let rule = || Box::new(Sgd::new());
    let secrets = [GroupSecret::random(), GroupSecret::random()];
    let [ours, theirs] = secrets;
    let rest = Rest::default();
    let other = ParameterServer::follower(&initial, 2..4, rest, rule(), config, theirs);
    let other = other.unwrap().spawn().unwrap();
    let (rest, others) = (Rest::default(), vec![other.clone()]);
    let first = ParameterServer::first(&initial, 0..2, rest, rule(), config, ours, others);
    let first = first.unwrap().spawn().unwrap();
    let servers = ServerGroup::try_from(vec![(0..2, first), (2..4, other)]).unwrap();
    let gradients = GradientUpdate {
        id: id(0),
        computed_on: Version(0),
        loss: 0.0,
        num_examples: 1,
        gradient: Gradient::new(vec![1.0; 4]),
    };
    let waits = [
        // Its update is what the other server is not told.
        servers
            .apply(vec![gradients], Reduction::Mean)
            .boxed_local(),
        servers.pull(PullVersion::Latest).boxed_local(),
        servers.pull(PullVersion::Exactly(Version(1))).boxed_local(),
    ];
    for wait in waits {
        let outcome = run(async {
            match select(wait, pin!(sleep(SOON))).await {
                Either::Left((outcome, _)) => outcome,
                Either::Right(_) => panic!("it waits"),
            }
        });
        let error = outcome.unwrap_err();
        assert!(error.is_server_lost(), "{error:?}");
        let text = error_chain(&error);
        assert!(text.contains("server 1 of the group is gone"), "{text}");
    }
    let status = run(servers.status()).unwrap();
    assert_eq!(status[0].lost.as_ref().map(|lost| lost.index), Some(1));
    assert_eq!(status[1].lost, None);
}

/// PS-10.
#[test]
fn what_is_told_again_counts_once_and_is_answered_as_the_first_time() {
    let secret = GroupSecret::random();
    let mut server = follower(&secret);
    for number in [0, 0, 1, 0, 1] {
        let decisions = update(number + 1, vec![id(number)]);
        server.take(follow(&secret, number, decisions)).unwrap();
    }
    assert_eq!(server.shard.weights().version(), Version(2));
    let gap = follow(&secret, 3, update(3, vec![id(2)]));
    assert!(server.take(gap).is_err());
    assert_eq!(server.shard.weights().to_vec(), [0.0; 2]);
}

/// S-9
#[test]
fn what_is_lacking_is_said_until_it_is_there_and_counts_once() {
    let secret = GroupSecret::random();
    let mut server = follower(&secret);
    let complete = |clock| Decision::Complete(id(clock), Gradient::new(vec![1.0; 2]));
    let named = vec![id(0), id(1)];
    for _ in 0..2 {
        let update = follow(&secret, 0, vec![decide(1, named.clone(), 0.5)]);
        assert_eq!(server.take(update).unwrap(), named);
    }
    let forged = Gradient::new(vec![9.0; 2]);
    server.shard.stage(id(0), &forged).unwrap();
    let lacking = server.take(follow(&secret, 1, vec![complete(0)])).unwrap();
    assert_eq!(lacking, [id(1)]);
    let twice = vec![complete(1), complete(1), complete(0)];
    assert_eq!(server.take(follow(&secret, 2, twice)).unwrap(), []);
    assert_eq!(server.shard.weights().to_vec(), [0.0; 2]);
    assert_eq!(server.shard.num_staged(), 0);
}

#[test]
fn the_first_server_keeps_what_another_one_may_lack_and_no_longer() {
    let first = || {
        let other = follower(&GroupSecret::random());
        let mut own = follower(&GroupSecret::random()).shard;
        own.stage(id(0), &Gradient::new(vec![1.0; 2])).unwrap();
        let mut told = Follower::new(other.spawn().unwrap());
        told.queue(decide(1, vec![id(0)], 0.5), &own);
        assert!(told.take_undelivered());
        told
    };
    let mut told = first();
    told.taken(vec![id(0)]).unwrap();
    assert!(told.take_undelivered());
    assert!(matches!(told.telling[..], [Decision::Complete(..)]));
    told.taken(Vec::new()).unwrap();
    assert!(told.kept.is_empty() && !told.take_undelivered());
    // Nonsense, also when it would go on for ever.
    assert!(first().taken(vec![id(7)]).is_err());
    let mut told = first();
    told.taken(vec![id(0)]).unwrap();
    assert!(told.take_undelivered());
    assert!(told.taken(vec![id(0)]).is_err());
}

/// S-9: there are two reasons, and the text is true for both.
#[test]
fn a_server_that_is_too_slow_is_named_with_its_delay_and_its_cost() {
    let own = follower(&GroupSecret::random()).shard;
    let fresh = || Follower::new(follower(&GroupSecret::random()).spawn().unwrap());
    let mut late = fresh();
    for clock in 0..=MAX_BEHIND as u64 {
        late.check(1).unwrap();
        late.queue(Decision::Discard(id(clock)), &own);
    }
    let mut costly = fresh();
    let large = Gradient::new(vec![0.0; 40 << 18]);
    for clock in 0..30 {
        costly.kept.insert(id(clock), large.clone());
    }
    for version in 1..=3 {
        costly.check(1).unwrap();
        costly.queue(decide(version, vec![id(version)], 0.5), &own);
    }
    for (server, delay, cost) in [
        (late, "is 4097 decisions behind", "0 MiB of gradients"),
        (costly, "is 3 decisions behind", "1200 MiB of gradients"),
    ] {
        let text = server.check(1).unwrap_err().to_string();
        assert!(text.contains(delay) && text.contains(cost), "{text}");
    }
}

#[test]
fn no_message_to_another_server_is_too_large_to_be_sent() {
    let server = follower(&GroupSecret::random());
    let mut told = Follower::new(server.spawn().unwrap());
    let own = follower(&GroupSecret::random()).shard;
    let large = Gradient::new(vec![0.0; 40 << 18]);
    for clock in 0..4 {
        told.queue(Decision::Stage(id(clock), large.clone()), &own);
    }
    (0..2000).for_each(|clock| told.queue(Decision::Discard(id(clock)), &own));
    let mut sizes = Vec::new();
    while told.take_undelivered() {
        sizes.push(told.telling.len());
        told.taken(Vec::new()).unwrap();
    }
    // Of 40 MiB each, of which one fits into 64; the last one goes with others.
    assert_eq!(sizes[..3], [1, 1, 1]);
    assert_eq!(sizes.iter().sum::<usize>(), 2004);
    assert!(sizes.iter().all(|&size| size <= 1024), "{sizes:?}");
}

#[test]
fn decisions_that_cannot_be_followed_are_errors_and_change_nothing() {
    let secret = GroupSecret::random();
    for decisions in [
        update(2, vec![id(0)]),
        update(0, vec![id(0)]),
        update(1, Vec::new()),
        update(1, vec![id(0), id(0)]),
        vec![decide(1, vec![id(0)], f64::NAN)],
        vec![decide(1, vec![id(0)], -1.0)],
    ] {
        let mut server = follower(&secret);
        let bad = follow(&secret, 0, decisions);
        let error = server.take(bad.clone()).unwrap_err();
        let again = server.take(bad).unwrap_err();
        assert_eq!(error.to_string(), again.to_string());
        let version = server.shard.weights().version();
        assert_eq!(version, Version(0), "{error}");
    }
}
