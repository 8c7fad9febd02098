//! The actor that computes through a part for trainers.

use std::fmt;
use std::pin::pin;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use actix::{
    Actor, ActorFutureExt, AsyncContext, Handler, MessageResult, ResponseActFuture, WrapFuture,
};
use futures_util::future::{Either, select};
use ps_actors::actor::{self, ActorRef, Spawn};
use ps_actors::cluster::{Hosted, Hosts};
use ps_actors::group::ServerGroup;
use ps_actors::ids::Version;
use ps_actors::remote::{Messages, Remote};
use ps_actors::server::{Outcome, PullVersion};
use ps_actors::weights::{Gradient, GradientUpdate, Weights};
use ps_model::burn::tensor::Device;
use ps_model::{Array, Part, Pass};

use super::contexts::Contexts;
use super::messages::{
    ApplyContext, ArrayMessage, Backward, Forward, GetGradient, GetLayout, GetParameter,
    GetPartStatus, GetServers, Infer, PartStatus, ReleaseContext, ServedError,
};
use crate::agreement::agree_on_model;
use crate::source::{Loadable, SetupError};

/// The limits of what a part server remembers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PartConfig {
    /// How many contexts of all trainers together it remembers at once. Each holds the activations of its
    /// batch. Default: 64.
    pub max_contexts: usize,
    /// How many contexts of one trainer it remembers at once. Default: 8.
    pub max_contexts_per_trainer: usize,
    /// How long an unused context is remembered. Too short: a trainer that takes longer between forward and
    /// backward must begin again. Too long: the contexts of a dead trainer take memory for longer. Default:
    /// 60 s.
    pub context_lease: Duration,
}

impl Default for PartConfig {
    fn default() -> Self {
        Self {
            max_contexts: 64,
            max_contexts_per_trainer: 8,
            context_lease: Duration::from_secs(60),
        }
    }
}

/// An actor that computes through a part for trainers in any process. The weights are those of a group of
/// parameter servers.
pub struct PartServer<P: Part> {
    /// Boxed, like the passes, because an actor must be `Unpin` and a part need not be.
    loadable: Box<Loadable<P>>,
    /// The version of the weights that the model has now.
    version: Option<Version>,
    servers: ServerGroup,
    contexts: Contexts<State<P>>,
}

enum State<P: Part> {
    Computing {
        pass: Box<Pass<P>>,
        computed_on: Version,
    },
    Stepping {
        gradient: Gradient,
        computed_on: Version,
    },
    Stepped(Outcome),
}

/// Starts a part server on a thread of its own, with a copy of `part`. Its weights are those of `servers`.
/// The servers must have been started with the [`initial_weights`](crate::source::initial_weights) of the
/// same part. For an example, see the [module](super).
///
/// ```
/// use ps::prelude::*;
/// use ps::served::{GetPartStatus, PartConfig, infer, serve_part};
///
/// let device = select_device(default_device_name())?;
/// let net = ConvNet::init(1, &device);
/// let weights = initial_weights(&net, &device)?;
/// let server = ParameterServer::new(&weights, Sgd::new(), ServerConfig::default())?.spawn()?;
/// let part = serve_part(&net, &device, &server.into(), PartConfig::default())?;
///
/// let images = Examples::batch(&Mnist::bundled_sample().test, &[0, 1]).images_on(&device);
/// assert_eq!(run(infer(&part, images))?.dims(), [2, 10]);
/// assert_eq!(part.ask(GetPartStatus).wait()?.version, Some(Version(0)));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// If the part has no flat weights, if the device fails, or if the operating system starts no thread.
#[expect(
    clippy::missing_panics_doc,
    reason = "what can go wrong shows in the caller's thread first"
)]
pub fn serve_part<P: Part>(
    part: &P,
    device: &Device,
    servers: &ServerGroup,
    config: PartConfig,
) -> Result<ActorRef<PartServer<P>>, SetupError> {
    // A mistake is returned here, in the caller's thread. Otherwise it would be an actor that cannot start.
    PartServer::new(part, device, servers, config)?;
    let (part, device, servers) = (part.clone(), device.clone(), servers.clone());
    let options = PartServer::<P>::options(Spawn::new());
    let started = options.start(move || {
        let server = PartServer::new(&part, &device, &servers, config);
        server.expect("it worked in the caller's thread")
    });
    Ok(started?)
}

/// Lets every process of a cluster make part servers with copies of `part`, by
/// `cluster.spawn::<PartServer<_>>(servers)`. A process with another part cannot join.
///
/// ```
/// use ps::prelude::*;
/// use ps::served::{PartConfig, PartServer, host_parts, infer};
///
/// let device = select_device(default_device_name())?;
/// let net = ConvNet::init(1, &device);
/// let hosts = host_parts(Hosts::new(), &net, &device, PartConfig::default());
/// let cluster = Cluster::alone(hosts); // Or `Cluster::listen`, and nodes with the same hosts.
///
/// let weights = initial_weights(&net, &device)?;
/// let server = ParameterServer::new(&weights, Sgd::new(), ServerConfig::default())?.spawn()?;
/// let part = cluster.spawn::<PartServer<ConvNet>>(server.into()).wait()?;
/// let images = Examples::batch(&Mnist::bundled_sample().test, &[0]).images_on(&device);
/// assert_eq!(run(infer(&part, images))?.dims(), [1, 10]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[must_use]
pub fn host_parts<P: Part>(hosts: Hosts, part: &P, device: &Device, config: PartConfig) -> Hosts {
    let hosts = agree_on_model(hosts, part, device);
    // All threads that make part servers share it, whether or not a model can be shared.
    let originals = Mutex::new((part.clone(), device.clone()));
    hosts.host(move |servers: ServerGroup| {
        let (part, device) = match originals.lock() {
            Ok(originals) => originals.clone(),
            Err(poisoned) => poisoned.into_inner().clone(),
        };
        Ok(PartServer::new(&part, &device, &servers, config)?)
    })
}

impl<P: Part> PartServer<P> {
    fn new(
        part: &P,
        device: &Device,
        servers: &ServerGroup,
        config: PartConfig,
    ) -> Result<Self, SetupError> {
        Ok(Self {
            loadable: Box::new(Loadable::new(part, device)?),
            version: None,
            servers: servers.clone(),
            contexts: Contexts::new(config),
        })
    }

    /// Loads a snapshot into the model, unless this version is already loaded.
    fn load(&mut self, weights: &Weights) -> Result<(), ServedError> {
        // A slow pull must not bring back weights that a faster one has replaced.
        if self.version >= Some(weights.version()) {
            return Ok(());
        }
        let loaded = self.loadable.load(weights);
        loaded.map_err(|error| ServedError::Weights {
            reason: error.to_string(),
        })?;
        self.version = Some(weights.version());
        Ok(())
    }

    fn forward(&mut self, forward: Forward) -> Result<ArrayMessage, ServedError> {
        let Forward {
            context,
            call,
            input,
            wants_input_gradient,
            ..
        } = forward;
        let state = self.contexts.get(context, Instant::now())?;
        let State::Computing { pass, .. } = state else {
            return Err(ServedError::Stepped { context });
        };
        let output = pass.forward(call, input.into(), wants_input_gradient)?;
        Ok(output.into())
    }

    /// Begins the context of a call with these weights.
    fn begin(&mut self, forward: &Forward, weights: &Weights) -> Result<(), ServedError> {
        // Another call of the same context may have been faster.
        if self.contexts.knows(forward.context) {
            return Ok(());
        }
        self.load(weights)?;
        self.contexts.admit(forward.context)?;
        let pass = Box::new(self.loadable.model.begin(forward.seed)?);
        let computed_on = self.version.expect("weights have just been loaded");
        let state = State::Computing { pass, computed_on };
        self.contexts.insert(forward.context, state, Instant::now());
        Ok(())
    }

    /// Takes a context's gradient out of its pass.
    fn gradient_to_apply(
        &mut self,
        apply: ApplyContext,
    ) -> Result<Result<GradientUpdate, Outcome>, ServedError> {
        let ApplyContext {
            context,
            id,
            loss,
            num_examples,
        } = apply;
        let state = self.contexts.get(context, Instant::now())?;
        if let State::Computing { pass, computed_on } = state {
            let Some(gradient) = pass.take_gradient() else {
                return Err(ServedError::NoGradient { context });
            };
            *state = State::Stepping {
                gradient: Gradient::new(gradient),
                computed_on: *computed_on,
            };
        }
        match state {
            State::Stepping {
                gradient,
                computed_on,
            } => Ok(Ok(GradientUpdate {
                id,
                computed_on: *computed_on,
                loss,
                num_examples,
                gradient: gradient.clone(),
            })),
            State::Stepped(outcome) => Ok(Err(*outcome)),
            State::Computing { .. } => unreachable!("it was replaced above"),
        }
    }
}

impl<P: Part> Actor for PartServer<P> {
    type Context = actix::Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.run_interval(self.contexts.sweep_every(), |server, _| {
            server.contexts.expire(Instant::now());
        });
    }
}

impl<P: Part> Remote for PartServer<P> {
    fn messages(messages: &mut Messages<Self>) {
        messages
            .add::<Forward>()
            .add::<Backward>()
            .add::<Infer>()
            .add::<GetGradient>()
            .add::<ApplyContext>()
            .add::<ReleaseContext>()
            .add::<GetLayout>()
            .add::<GetParameter>()
            .add::<GetServers>()
            .add::<GetPartStatus>();
    }
}

impl<P: Part> Hosted for PartServer<P> {
    type Args = ServerGroup;

    /// A part is not asynchronous, so it needs no sockets on its server's thread. They would take four file
    /// descriptors.
    fn options(options: Spawn) -> Spawn {
        options.without_io()
    }
}

/// Pulls the latest weights from the servers.
async fn latest(servers: ServerGroup) -> Result<Weights, ServedError> {
    Ok(servers.pull(PullVersion::Latest).await?)
}

impl<P: Part> Handler<Forward> for PartServer<P> {
    type Result = ResponseActFuture<Self, Result<ArrayMessage, ServedError>>;

    fn handle(&mut self, forward: Forward, _: &mut Self::Context) -> Self::Result {
        let servers = (!self.contexts.knows(forward.context)).then(|| self.servers.clone());
        let weights = async move {
            match servers {
                Some(servers) => latest(servers).await.map(Some),
                None => Ok(None),
            }
        };
        Box::pin(weights.into_actor(self).map(|weights, server, _| {
            if let Some(weights) = weights? {
                server.begin(&forward, &weights)?;
            }
            server.forward(forward)
        }))
    }
}

impl<P: Part> Handler<Backward> for PartServer<P> {
    type Result = Result<Option<ArrayMessage>, ServedError>;

    fn handle(&mut self, backward: Backward, _: &mut Self::Context) -> Self::Result {
        let Backward {
            context,
            call,
            output_gradient,
        } = backward;
        let State::Computing { pass, .. } = self.contexts.get(context, Instant::now())? else {
            return Err(ServedError::Stepped { context });
        };
        let input_gradient = pass.backward(call, output_gradient.into())?;
        Ok(input_gradient.map(ArrayMessage::from))
    }
}

impl<P: Part> Handler<Infer> for PartServer<P> {
    type Result = ResponseActFuture<Self, Result<ArrayMessage, ServedError>>;

    fn handle(&mut self, Infer(input): Infer, _: &mut Self::Context) -> Self::Result {
        let weights = latest(self.servers.clone());
        Box::pin(weights.into_actor(self).map(|weights, server, _| {
            server.load(&weights?)?;
            let output: Array = server.loadable.model.infer(input.into())?;
            Ok(output.into())
        }))
    }
}

impl<P: Part> Handler<GetGradient> for PartServer<P> {
    type Result = Result<Gradient, ServedError>;

    fn handle(&mut self, GetGradient(context): GetGradient, _: &mut Self::Context) -> Self::Result {
        match self.contexts.get(context, Instant::now())? {
            State::Computing { pass, .. } => match pass.gradient() {
                Some(gradient) => Ok(Gradient::new(gradient.to_vec())),
                None => Err(ServedError::NoGradient { context }),
            },
            State::Stepping { gradient, .. } => Ok(gradient.clone()),
            State::Stepped(_) => Err(ServedError::Stepped { context }),
        }
    }
}

impl<P: Part> Handler<ApplyContext> for PartServer<P> {
    type Result = ResponseActFuture<Self, Result<Outcome, ServedError>>;

    fn handle(&mut self, apply: ApplyContext, _: &mut Self::Context) -> Self::Result {
        let (gradients, servers) = (self.gradient_to_apply(apply), self.servers.clone());
        let (gone, context) = (actor::caller_gone(), apply.context);
        let pushed = async move {
            let gradients = match gradients? {
                Ok(gradients) => gradients,
                Err(outcome) => return Ok(outcome),
            };
            // In a synchronous mode the push waits for other trainers, perhaps for ever.
            match select(pin!(servers.push(gradients)), gone).await {
                Either::Left((outcome, _)) => Ok(outcome?),
                Either::Right(((), _)) => Err(ServedError::CallerGone { context }),
            }
        };
        Box::pin(pushed.into_actor(self).map(move |outcome, server, _| {
            // The trainer may have dropped the context in the meantime.
            if let Ok(outcome) = outcome
                && let Ok(state) = server.contexts.get(apply.context, Instant::now())
            {
                *state = State::Stepped(outcome);
            }
            outcome
        }))
    }
}

impl<P: Part> Handler<ReleaseContext> for PartServer<P> {
    type Result = ();

    fn handle(&mut self, ReleaseContext(context): ReleaseContext, _: &mut Self::Context) {
        self.contexts.release(context);
    }
}

impl<P: Part> Handler<GetLayout> for PartServer<P> {
    type Result = MessageResult<GetLayout>;

    fn handle(&mut self, _: GetLayout, _: &mut Self::Context) -> Self::Result {
        MessageResult(self.loadable.layout().clone())
    }
}

impl<P: Part> Handler<GetParameter> for PartServer<P> {
    type Result = ResponseActFuture<Self, Result<ArrayMessage, ServedError>>;

    fn handle(&mut self, GetParameter(range): GetParameter, _: &mut Self::Context) -> Self::Result {
        let weights = latest(self.servers.clone());
        let numbers = async move {
            let weights = weights.await?;
            let known = weights.range();
            if range.start > range.end || range.start < known.start || range.end > known.end {
                let reason = format!("there are no weights {range:?} among {known:?}");
                return Err(ServedError::Weights { reason });
            }
            let values = weights.read(range).into_owned();
            let shape = vec![values.len()];
            Ok(Array { shape, values }.into())
        };
        Box::pin(numbers.into_actor(self))
    }
}

impl<P: Part> Handler<GetServers> for PartServer<P> {
    type Result = MessageResult<GetServers>;

    fn handle(&mut self, _: GetServers, _: &mut Self::Context) -> Self::Result {
        MessageResult(self.servers.clone())
    }
}

impl<P: Part> Handler<GetPartStatus> for PartServer<P> {
    type Result = MessageResult<GetPartStatus>;

    fn handle(&mut self, _: GetPartStatus, _: &mut Self::Context) -> Self::Result {
        MessageResult(PartStatus {
            num_contexts: self.contexts.len(),
            num_expired: self.contexts.num_expired(),
            version: self.version,
        })
    }
}

impl<P: Part> fmt::Debug for PartServer<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PartServer")
            .field("part", &std::any::type_name::<P>())
            .field("num_contexts", &self.contexts.len())
            .finish_non_exhaustive()
    }
}
