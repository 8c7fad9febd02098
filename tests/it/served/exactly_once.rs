//! PT-2: a step is taken once, whatever goes wrong.

use std::pin::pin;
use std::time::{Duration, Instant};

use futures_util::future::{Either, select};
use ps::actors::server::Leave;
use ps::actors::session::Session;
use ps::served::{ApplyContext, OptimizerError, ServedError};

use super::*;

#[test]
fn a_step_that_the_servers_refuse_can_still_be_taken() {
    let model = ConvNet::init(1, &device());
    let servers = sgd_servers(&model, 1, config());
    let part = serve(&model, &servers);
    run(async {
        let mut optimizer = optimizer(0, &part).await;
        let mut context = optimizer.begin();
        compute(&mut context, &part, &batch(0, 0)).await.unwrap();
        let session = Session::join(&servers, WorkerId(7)).await.unwrap();
        let id = session.gradient_id(Clock(0));
        // Nobody may push for a trainer that has left.
        session.leave().await.unwrap();
        let apply = ApplyContext {
            context: context.id(),
            id,
            loss: 1.0,
            num_examples: 4,
        };
        let refused = part.ask(apply).await.unwrap().unwrap_err();
        assert!(matches!(refused, ServedError::Servers(_)), "{refused:?}");
        let outcome = optimizer.step(context).await.unwrap();
        assert_eq!(outcome[0].version(), Version(1));
    });
}

/// The answers of an earlier step, and of an earlier attempt at the same one.
#[test]
fn a_lost_answer_changes_nothing() {
    let model = ConvNet::init(1, &device());
    let servers = sgd_servers(&model, 2, config());
    let part = serve(&model, &servers);
    run(async {
        let session = Session::join(&servers, WorkerId(0)).await.unwrap();
        let mut optimizer = DistributedOptimizer::new(WorkerId(1), SEED);
        let apply = |context: &Context| ApplyContext {
            context: context.id(),
            id: session.gradient_id(Clock(0)),
            loss: 1.0,
            num_examples: 4,
        };
        let mut first = optimizer.begin();
        compute(&mut first, &part, &batch(0, 0)).await.unwrap();
        let once = part.ask(apply(&first)).await.unwrap().unwrap();
        let weights = servers.pull(PullVersion::Latest).await.unwrap();
        let twice = part.ask(apply(&first)).await.unwrap().unwrap();
        assert_eq!(once, twice);
        // The trainer has not heard of it and computes the step anew.
        let mut second = optimizer.begin();
        compute(&mut second, &part, &batch(0, 1)).await.unwrap();
        let again = part.ask(apply(&second)).await.unwrap().unwrap();
        assert_eq!(once, again);
        let latest = servers.pull(PullVersion::Latest).await.unwrap();
        assert_eq!(latest.version(), Version(1));
        assert_eq!(latest.to_vec(), weights.to_vec());
    });
}

/// PS-9, A-23: the call waits for another trainer, and ends with its caller; the step stays taken.
#[test]
fn a_step_that_waits_ends_with_its_caller_and_counts_once() {
    let model = ConvNet::init(1, &device());
    let consistency = Consistency::Bsp;
    let servers = sgd_servers(
        &model,
        1,
        ServerConfig {
            consistency,
            ..config()
        },
    );
    let part = serve(&model, &servers);
    let wait_until = |what: &str, holds: &dyn Fn() -> bool| {
        let start = Instant::now();
        while !holds() {
            assert!(start.elapsed() < Duration::from_secs(60), "{what}");
            std::thread::yield_now();
        }
    };
    let server = servers.servers().next().unwrap();
    let num_waiting = || server.ask(GetStatus).wait().unwrap().num_waiting;
    let session = run(Session::join(&servers, WorkerId(0))).unwrap();
    let other = run(Session::join(&servers, WorkerId(1))).unwrap();
    let mut context = DistributedOptimizer::new(WorkerId(0), SEED).begin();
    run(compute(&mut context, &part, &batch(0, 0))).unwrap();
    let apply = ApplyContext {
        context: context.id(),
        id: session.gradient_id(Clock(0)),
        loss: 1.0,
        num_examples: 4,
    };
    let waits = part.ask(apply);
    wait_until("it is pushed", &|| num_waiting() == 1);
    drop(waits);
    wait_until("nobody waits", &|| {
        num_waiting() == 0 && part.pending() == 0
    });
    let again = part.ask(apply);
    let leave = Leave {
        worker: WorkerId(1),
        incarnation: other.gradient_id(Clock(0)).incarnation,
    };
    wait_until("it is pushed again", &|| num_waiting() == 1);
    server.ask(leave).wait().unwrap().unwrap();
    let outcome = again.wait().unwrap().unwrap();
    assert_eq!(outcome.version(), Version(1));
    let latest = run(servers.pull(PullVersion::Latest)).unwrap();
    assert_eq!(latest.version(), Version(1));
}

#[test]
fn a_trainer_that_was_given_up_joins_again_and_takes_its_step() {
    let model = ConvNet::init(1, &device());
    let servers = sgd_servers(&model, 1, config());
    let part = serve(&model, &servers);
    run(async {
        let mut optimizer = optimizer(0, &part).await;
        for step in 1..=3 {
            let mut context = optimizer.begin();
            compute(&mut context, &part, &batch(0, 0)).await.unwrap();
            servers.report_lost(WorkerId(0)).await.unwrap();
            let outcomes = optimizer.step(context).await.unwrap();
            assert_eq!(outcomes[0].version(), Version(step));
        }
    });
}

/// PT-2: one part has taken the step and another one has not, when the trainer gives the call up and is
/// declared lost.
#[test]
fn a_step_that_is_repeated_after_the_trainer_was_lost_counts_once_and_is_answered_as_before() {
    let model = ConvNet::init(1, &device());
    let fast = sgd_servers(&model, 1, config());
    let consistency = Consistency::Bsp;
    let bsp = ServerConfig {
        consistency,
        ..config()
    };
    let slow = sgd_servers(&model, 1, bsp);
    let (one, other) = (serve(&model, &fast), serve(&model, &slow));
    run(async {
        // The step on the other part waits for this trainer.
        let awaited = Session::join(&slow, WorkerId(9)).await.unwrap();
        let mut optimizer = optimizer(0, &one).await;
        optimizer.add(&other).await.unwrap();
        let compute_both = async |optimizer: &mut DistributedOptimizer, clock| {
            let mut context = optimizer.begin();
            compute(&mut context, &one, &batch(0, clock)).await.unwrap();
            compute(&mut context, &other, &batch(0, clock))
                .await
                .unwrap();
            context
        };
        let context = compute_both(&mut optimizer, 0).await;
        let is_taken_by_one = async {
            let start = Instant::now();
            let status = async |servers: &ServerGroup| servers.status().await.unwrap().remove(0);
            while status(&fast).await.version < Version(1) || status(&slow).await.num_waiting < 1 {
                assert!(start.elapsed() < Duration::from_secs(60), "it is not taken");
            }
        };
        match select(pin!(optimizer.step(context)), pin!(is_taken_by_one)).await {
            Either::Left((done, _)) => panic!("it waits for another trainer: {done:?}"),
            Either::Right(((), _given_up)) => {}
        }
        let weights = fast.pull(PullVersion::Latest).await.unwrap();
        fast.report_lost(WorkerId(0)).await.unwrap();
        awaited.leave().await.unwrap();
        let context = compute_both(&mut optimizer, 1).await;
        let outcomes = optimizer.step(context).await.unwrap();
        let applied = Outcome::Applied {
            version: Version(1),
            staleness: 0,
        };
        assert_eq!(outcomes, [applied, applied]);
        let latest = fast.pull(PullVersion::Latest).await.unwrap();
        assert_eq!(latest.version(), Version(1));
        assert_eq!(latest.to_vec(), weights.to_vec());
        // The trainer goes on.
        assert_eq!(optimizer.clock(), Clock(1));
        let context = compute_both(&mut optimizer, 1).await;
        let outcomes = optimizer.step(context).await.unwrap();
        assert!(
            outcomes
                .iter()
                .all(|outcome| outcome.version() == Version(2))
        );
    });
}

#[test]
fn a_trainer_in_another_life_goes_on_where_the_earlier_one_ended() {
    let model = ConvNet::init(1, &device());
    let servers = sgd_servers(&model, 1, config());
    let part = serve(&model, &servers);
    run(async {
        let mut first = optimizer(0, &part).await;
        for clock in 0..2 {
            let mut context = first.begin();
            compute(&mut context, &part, &batch(0, clock))
                .await
                .unwrap();
            first.step(context).await.unwrap();
        }
        let mut left = first.begin();
        compute(&mut left, &part, &batch(0, 2)).await.unwrap();
        let mut second = optimizer(0, &part).await;
        assert_eq!(second.clock(), Clock(2));
        let mut context = second.begin();
        compute(&mut context, &part, &batch(0, 2)).await.unwrap();
        second.step(context).await.unwrap();
        // The earlier incarnation is over: its step is neither applied nor taken for the later one's.
        let error = first.step(left).await.unwrap_err();
        assert!(matches!(error, OptimizerError::Served { .. }), "{error:?}");
        let latest = servers.pull(PullVersion::Latest).await.unwrap();
        assert_eq!(latest.version(), Version(3));
    });
}

#[test]
fn a_step_needs_a_gradient_of_a_part_that_is_trained() {
    let model = ConvNet::init(1, &device());
    let part = serve(&model, &sgd_servers(&model, 1, config()));
    let other = serve(&model, &sgd_servers(&model, 1, config()));
    run(async {
        let mut optimizer = optimizer(0, &part).await;
        let context = optimizer.begin();
        let error = optimizer.step(context).await.unwrap_err();
        assert!(matches!(error, OptimizerError::NothingToStep), "{error:?}");
        let mut context = optimizer.begin();
        compute(&mut context, &other, &batch(0, 0)).await.unwrap();
        let error = optimizer.step(context).await.unwrap_err();
        assert!(matches!(error, OptimizerError::NothingToStep), "{error:?}");
        let mut context = optimizer.begin();
        let images = batch(0, 0).images_on(&device());
        context.forward(&part, images).await.unwrap();
        let error = optimizer.step(context).await.unwrap_err();
        let OptimizerError::Served { source, .. } = error else {
            panic!("{error:?}");
        };
        assert!(
            matches!(source, ServedError::NoGradient { .. }),
            "{source:?}"
        );
        assert_eq!(optimizer.clock(), Clock(0));
    });
}

#[test]
fn two_parts_with_the_same_weights_are_not_trained_by_one_trainer() {
    let model = ConvNet::init(1, &device());
    let servers = sgd_servers(&model, 1, config());
    let (one, other) = (serve(&model, &servers), serve(&model, &servers));
    run(async {
        let mut optimizer = optimizer(0, &one).await;
        optimizer.add(&one).await.unwrap();
        let error = optimizer.add(&other).await.unwrap_err();
        assert!(
            matches!(error, OptimizerError::SharedServers { .. }),
            "{error:?}"
        );
    });
}
