//! PT-3, PT-4: what part servers remember, and what they refuse.

use std::time::Duration;

use ps::model::PartError;
use ps::served::{Backward, Forward, GetPartStatus, PartStatus, ServedError};

use super::*;

fn status(part: &ActorRef<PartServer<ConvNet>>) -> PartStatus {
    part.ask(GetPartStatus).wait().unwrap()
}

fn convnet(config: PartConfig) -> ActorRef<PartServer<ConvNet>> {
    let model = ConvNet::init(1, &device());
    let servers = sgd_servers(&model, 1, self::config());
    serve_part(&model, &device(), &servers, config).unwrap()
}

fn served(error: ContextError) -> ServedError {
    match error {
        ContextError::Served { source, .. } => source,
        other => panic!("{other:?}"),
    }
}

/// PT-3: a trainer that is killed between forward and backward drops nothing.
#[test]
fn a_trainer_that_dies_leaves_no_context_after_the_lease() {
    let part = convnet(PartConfig {
        context_lease: Duration::from_millis(200),
        ..PartConfig::default()
    });
    let mut context = DistributedOptimizer::new(WorkerId(0), SEED).begin();
    let images = || batch(0, 0).images_on(&device());
    let output = run(context.forward(&part, images())).unwrap();
    let id = context.id();
    std::mem::forget(context);
    // Each call takes a while, so this does not spin; the lease is over at some time.
    while status(&part).num_contexts > 0 {
        let _ = run(ps::served::infer(&part, images())).unwrap();
    }
    assert_eq!(status(&part).num_expired, 1);
    let late = part.ask(Backward {
        context: id,
        call: 0,
        output_gradient: Array {
            shape: output.dims().to_vec(),
            values: vec![0.0; 40],
        }
        .into(),
    });
    let error = late.wait().unwrap().unwrap_err();
    assert!(
        matches!(error, ServedError::UnknownContext { .. }),
        "{error:?}"
    );
    assert!(error.to_string().contains("200 ms"), "{error}");
}

#[test]
fn a_context_that_is_dropped_or_stepped_leaves_nothing_behind() {
    let part = convnet(PartConfig::default());
    run(async {
        let mut optimizer = optimizer(0, &part).await;
        let mut context = optimizer.begin();
        compute(&mut context, &part, &batch(0, 0)).await.unwrap();
        assert_eq!(part.ask(GetPartStatus).await.unwrap().num_contexts, 1);
        drop(context);
        assert_eq!(part.ask(GetPartStatus).await.unwrap().num_contexts, 0);
        let mut context = optimizer.begin();
        compute(&mut context, &part, &batch(0, 0)).await.unwrap();
        optimizer.step(context).await.unwrap();
        let status = part.ask(GetPartStatus).await.unwrap();
        assert_eq!((status.num_contexts, status.num_expired), (0, 0));
    });
}

/// PT-4
#[test]
fn contexts_are_bounded_and_a_greedy_trainer_does_not_keep_others_out() {
    let part = convnet(PartConfig {
        max_contexts_per_trainer: 2,
        max_contexts: 3,
        ..PartConfig::default()
    });
    let begin = |trainer| {
        let mut context = DistributedOptimizer::new(WorkerId(trainer), SEED).begin();
        let output = run(context.forward(&part, batch(0, 0).images_on(&device())));
        output.map(|_| context)
    };
    let mut greedy = DistributedOptimizer::new(WorkerId(0), SEED);
    let contexts = [greedy.begin(), greedy.begin()].map(|mut context| {
        run(context.forward(&part, batch(0, 0).images_on(&device()))).unwrap();
        context
    });
    let mut third = greedy.begin();
    let error = run(third.forward(&part, batch(0, 0).images_on(&device())));
    let error = served(error.unwrap_err()).to_string();
    assert!(error.contains("max_contexts_per_trainer"), "{error}");
    let other = begin(1).unwrap();
    let error = served(begin(2).unwrap_err()).to_string();
    assert!(error.contains("PartConfig::max_contexts`"), "{error}");
    drop(contexts);
    begin(2).unwrap();
    drop(other);
}

/// PT-5
#[test]
fn what_does_not_fit_is_refused_and_the_context_goes_on() {
    let part = convnet(PartConfig::default());
    let mut context = DistributedOptimizer::new(WorkerId(0), SEED).begin();
    let forward = |call, shape: &[usize], len| {
        let input = Array {
            shape: shape.to_vec(),
            values: vec![0.5; len],
        };
        part.ask(Forward {
            context: context.id(),
            call,
            seed: context.seed(),
            input: input.into(),
            wants_input_gradient: true,
        })
        .wait()
        .unwrap()
    };
    let wrong = |error: ServedError| match error {
        ServedError::Part(error) => error,
        other => panic!("{other:?}"),
    };
    let error = wrong(forward(0, &[1, 3, 28, 28], 3 * 784).unwrap_err());
    assert!(error.to_string().contains("[batch, 1, 28, 28]"), "{error}");
    let error = wrong(forward(0, &[1, 1, 28, 28], 5).unwrap_err());
    assert!(matches!(error, PartError::WrongCount { .. }), "{error:?}");
    forward(0, &[1, 1, 28, 28], 784).unwrap();
    let error = wrong(forward(0, &[1, 1, 28, 28], 784).unwrap_err());
    assert_eq!(error, PartError::CallRepeated { call: 0 });

    let backward = |call, shape: &[usize]| {
        let output_gradient = Array {
            shape: shape.to_vec(),
            values: vec![0.5; shape.iter().product()],
        };
        part.ask(Backward {
            context: context.id(),
            call,
            output_gradient: output_gradient.into(),
        })
        .wait()
        .unwrap()
    };
    let error = wrong(backward(0, &[10, 1]).unwrap_err());
    assert!(
        matches!(error, PartError::WrongGradient { .. }),
        "{error:?}"
    );
    let error = wrong(backward(1, &[1, 10]).unwrap_err());
    assert_eq!(error, PartError::NoSuchCall { call: 1 });
    assert!(backward(0, &[1, 10]).unwrap().is_some());
    let error = wrong(backward(0, &[1, 10]).unwrap_err());
    assert_eq!(error, PartError::AlreadyBackward { call: 0 });
    // A loss without anything that can be trained, here or there.
    let loss = Tensor::<1>::from_floats([1.0], &device().autodiff());
    let error = run(context.backward(&loss)).unwrap_err();
    assert!(matches!(error, ContextError::Local(_)), "{error:?}");
}

/// A part server that is started anew after a panic has forgotten everything; the trainer is told
/// and takes the step again.
#[test]
fn a_part_server_that_is_started_anew_does_not_lose_a_step() {
    let model = ConvNet::init(1, &device());
    let servers = sgd_servers(&model, 1, config());
    let part = serve(&model, &servers);
    run(async {
        let mut optimizer = optimizer(0, &part).await;
        let mut context = optimizer.begin();
        compute(&mut context, &part, &batch(0, 0)).await.unwrap();
        // Another one in its place, as after a restart.
        part.ask(ps::served::ReleaseContext(context.id()))
            .await
            .unwrap();
        let error = optimizer.step(context).await.unwrap_err();
        assert!(
            error.to_string().contains("did not take the step"),
            "{error}"
        );
        let mut context = optimizer.begin();
        compute(&mut context, &part, &batch(0, 0)).await.unwrap();
        optimizer.step(context).await.unwrap();
        let latest = servers.pull(PullVersion::Latest).await.unwrap();
        assert_eq!(latest.version(), Version(1));
    });
}

#[test]
fn weights_of_another_model_are_an_error() {
    let net = Net::init(1, &device());
    let servers = sgd_servers(&net, 1, config());
    let part = serve_part(
        &ConvNet::init(1, &device()),
        &device(),
        &servers,
        PartConfig::default(),
    );
    let part = part.unwrap();
    let input = batch(0, 0).images_on(&device());
    let error = run(ps::served::infer(&part, input)).unwrap_err();
    let ContextError::Served { source, .. } = error else {
        panic!("{error:?}");
    };
    assert!(matches!(source, ServedError::Weights { .. }), "{source:?}");
    assert!(source.to_string().contains("another model"), "{source}");
}
