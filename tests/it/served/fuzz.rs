//! PS-6 for part servers: whatever a peer sends, they go on.

use ps::actors::ids::{GradientId, Incarnation, JoinRequest};
use ps::served::{
    ApplyContext, ArrayMessage, Backward, ContextId, Forward, GetGradient, GetLayout, GetParameter,
    GetPartStatus, GetServers, Infer, ReleaseContext,
};
use ps_runtime::test_util::{Dice, Fed, Fuzz, Sent};

use super::*;

fn array(shape: &[usize]) -> ArrayMessage {
    let values = vec![0.5; shape.iter().product()];
    let shape = shape.to_vec();
    Array { shape, values }.into()
}

/// One of each message that a part server takes.
fn messages(process: &Fed, dice: &mut Dice, incarnation: Incarnation) -> Vec<Sent> {
    fn part<M: actix::Message + 'static>(process: &Fed, message: &M) -> Sent {
        process.sent::<PartServer<ConvNet>, M>(message)
    }
    let context = ContextId {
        trainer: WorkerId(0),
        incarnation,
        number: dice.below(3),
    };
    let call = dice.below(2) as u32;
    let forward = Forward {
        context,
        call,
        seed: seed(0, 0),
        input: array(&dice.one_of(&[[1, 1, 28, 28], [1, 1, 28, 28], [1, 28, 1, 28]])),
        wants_input_gradient: dice.once_in(2),
    };
    let backward = Backward {
        context,
        call,
        output_gradient: array(&dice.one_of(&[[1, 10], [1, 10], [10, 1]])),
    };
    let apply = ApplyContext {
        context,
        id: GradientId {
            worker: WorkerId(0),
            incarnation,
            clock: Clock(dice.below(100)),
        },
        loss: 1.0,
        num_examples: 1,
    };
    let compute = vec![
        part(process, &forward),
        part(process, &backward),
        part(process, &apply),
    ];
    if dice.once_in(2) {
        return compute;
    }
    let parameter = dice.below(4) as usize;
    let others = [
        part(process, &Infer(array(&[1, 1, 28, 28]))),
        part(process, &GetGradient(context)),
        part(process, &ReleaseContext(context)),
        part(process, &GetLayout),
        part(process, &GetParameter(parameter..9)),
        part(process, &GetServers),
        part(process, &GetPartStatus),
    ];
    compute.into_iter().chain(others).collect()
}

#[test]
fn nothing_that_a_peer_sends_harms_a_part_server() {
    let model = ConvNet::init(1, &device());
    let servers = sgd_servers(&model, 1, config());
    let joined = run(servers.join(WorkerId(0), JoinRequest(1))).unwrap();
    let incarnation = joined.incarnation;
    let fuzz = Fuzz {
        one_in: 20,
        fresh_every: 100,
    };
    let num_stepped = fuzz.run::<PartServer<ConvNet>>(
        |_| serve(&model, &servers),
        |process, dice| messages(process, dice, incarnation),
        |part| {
            part.ask(GetPartStatus).wait()?;
            let weights = run(servers.pull(PullVersion::Latest)).unwrap();
            Ok(weights.version() > Version(0))
        },
    );
    assert!(num_stepped > 0, "no context's gradient was applied");
}
