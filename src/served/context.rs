//! One step of a trainer: forward and backward through local layers and remote parts.

use std::collections::HashMap;
use std::fmt;

use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use ps_actors::actor::{ActorId, ActorRef, CallError};
use ps_actors::server::Outcome;
use ps_actors::weights::Gradient;
use ps_model::burn::tensor::Tensor;
use ps_model::{Activation, Array, LocalGradients, Part, PartError, SeamError, Seams, StepSeed};

use super::contexts::ContextId;
use super::messages::{
    ApplyContext, ArrayMessage, Backward, Forward, GetGradient, Infer, ReleaseContext, ServedError,
};
use super::server::PartServer;

/// Why a step could not be computed. Drop the context and begin another one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ContextError {
    /// A part server could not be reached, or did not answer.
    #[error("the part server {part} did not answer")]
    Call {
        /// The name of the part server.
        part: String,
        /// Why the call failed.
        #[source]
        source: CallError,
    },
    /// A part server refused the call, or failed.
    #[error("the part server {part} did not compute")]
    Served {
        /// The name of the part server.
        part: String,
        /// Why it did not compute.
        #[source]
        source: ServedError,
    },
    /// The array from the part does not fit the part's tensors.
    #[error("the array that the part returned does not fit")]
    Output(#[from] PartError),
    /// The backward pass in this process failed.
    #[error(transparent)]
    Local(#[from] SeamError),
}

/// Computes a part's output at the latest weights, without dropout and without a gradient.
///
/// ```
/// use ps::prelude::*;
/// use ps::served::{PartConfig, infer, serve_part};
///
/// let device = select_device(default_device_name())?;
/// let net = ConvNet::init(1, &device);
/// let weights = initial_weights(&net, &device)?;
/// let server = ParameterServer::new(&weights, Sgd::new(), ServerConfig::default())?.spawn()?;
/// let part = serve_part(&net, &device, &server.into(), PartConfig::default())?;
///
/// let batch = Examples::batch(&Mnist::bundled_sample().test, &[0, 1, 2]);
/// let output = run(infer(&part, batch.images_on(&device)))?;
/// assert_eq!(output.dims(), [3, 10]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// If the part server cannot be reached, or if the part does not accept the input.
pub async fn infer<P: Part>(
    part: &ActorRef<PartServer<P>>,
    input: P::Input,
) -> Result<P::Output, ContextError> {
    let device = input.plain_device();
    let output = part.ask(Infer(input.to_array().into())).await;
    Ok(P::Output::from_array(answer(part, output)?, &device)?)
}

fn answer<P: Part, T>(
    part: &ActorRef<PartServer<P>>,
    answer: Result<Result<T, ServedError>, CallError>,
) -> Result<Array, ContextError>
where
    Array: From<T>,
{
    flat_answer(part, answer).map(Array::from)
}

pub(super) fn flat_answer<P: Part, T>(
    part: &ActorRef<PartServer<P>>,
    answer: Result<Result<T, ServedError>, CallError>,
) -> Result<T, ContextError> {
    let name = || part.name().to_owned();
    let answer = answer.map_err(|source| ContextError::Call {
        part: name(),
        source,
    })?;
    answer.map_err(|source| ContextError::Served {
        part: name(),
        source,
    })
}

/// A part server with a part of any type, as a context uses it.
pub(super) trait UsedPart {
    fn id(&self) -> ActorId;

    fn backward(
        &self,
        context: ContextId,
        call: u32,
        output_gradient: Array,
    ) -> LocalBoxFuture<'_, Result<Option<Array>, ContextError>>;

    fn apply(
        &self,
        apply: ApplyContext,
    ) -> LocalBoxFuture<'_, Result<Result<Outcome, ServedError>, CallError>>;

    fn release(&self, context: ContextId);
}

impl<P: Part> UsedPart for ActorRef<PartServer<P>> {
    fn id(&self) -> ActorId {
        Self::id(self)
    }

    fn backward(
        &self,
        context: ContextId,
        call: u32,
        output_gradient: Array,
    ) -> LocalBoxFuture<'_, Result<Option<Array>, ContextError>> {
        let gradient = self.ask(Backward {
            context,
            call,
            output_gradient: output_gradient.into(),
        });
        async move {
            let gradient: Option<ArrayMessage> = flat_answer(self, gradient.await)?;
            Ok(gradient.map(Array::from))
        }
        .boxed_local()
    }

    fn apply(
        &self,
        apply: ApplyContext,
    ) -> LocalBoxFuture<'_, Result<Result<Outcome, ServedError>, CallError>> {
        self.ask(apply).boxed_local()
    }

    fn release(&self, context: ContextId) {
        // If nobody can be told, the context is gone anyway.
        if let Err(error) = self.tell(ReleaseContext(context)) {
            tracing::debug!(%context, %error, "could not be released");
        }
    }
}

/// One step of a trainer. [`DistributedOptimizer::begin`](super::DistributedOptimizer::begin) makes it.
///
/// When it is dropped, all parts forget it.
pub struct Context {
    id: ContextId,
    seed: StepSeed,
    seams: Seams,
    next_call: u32,
    /// The calls, by the number of the seam.
    calls: HashMap<usize, Call>,
    parts: Vec<Box<dyn UsedPart>>,
    loss: f32,
    /// The number of examples; 0 if it is not known.
    num_examples: usize,
}

/// A forward computation of a part server.
#[derive(Clone, Copy)]
struct Call {
    /// The index of the part among the context's parts.
    part: usize,
    number: u32,
}

impl Context {
    pub(super) fn new(id: ContextId, seed: StepSeed) -> Self {
        Self {
            id,
            seed,
            seams: Seams::new(),
            next_call: 0,
            calls: HashMap::new(),
            parts: Vec::new(),
            loss: f32::NAN,
            num_examples: 0,
        }
    }

    /// Returns the id under which part servers know this context.
    #[must_use]
    pub fn id(&self) -> ContextId {
        self.id
    }

    /// Returns the seed of all random numbers of this step.
    #[must_use]
    pub fn seed(&self) -> StepSeed {
        self.seed
    }

    /// Sets how many examples the batch of this step has. The loss is their mean.
    ///
    /// With [`Reduction::Mean`](ps_actors::server::Reduction::Mean) this is the weight of the trainer's
    /// gradient among those of one update. If it is not set, all gradients of the update have the same
    /// weight. This is right if the batches of all trainers have the same size.
    pub fn set_num_examples(&mut self, num_examples: usize) {
        self.num_examples = num_examples;
    }

    /// Sends a tensor through a part, in training mode. Returns the output, on the device of `input` and
    /// with autodiff.
    ///
    /// At the context's first call, the part takes the latest weights. Later calls use the same weights.
    /// The first call of a context draws the dropout masks that
    /// [`LocalModel::gradient`](ps_model::LocalModel::gradient) draws with the same seed.
    ///
    /// # Errors
    /// If the part server cannot be reached or has too many contexts, or if the part does not accept the
    /// input.
    pub async fn forward<P: Part>(
        &mut self,
        part: &ActorRef<PartServer<P>>,
        input: P::Input,
    ) -> Result<P::Output, ContextError> {
        let call = Call {
            part: self.index_of(part),
            number: self.next_call,
        };
        self.next_call += 1;
        let output = part.ask(Forward {
            context: self.id,
            call: call.number,
            seed: self.seed,
            input: input.to_array().into(),
            wants_input_gradient: Seams::wants_gradient(&input),
        });
        let output = answer(part, output.await)?;
        let (seam, output) = self.seams.cross(input, output)?;
        self.calls.insert(seam, call);
        Ok(output)
    }

    /// Cuts the graph at a tensor that goes to a part and also somewhere else. Use the returned tensor
    /// instead of `tensor`. It has the same numbers.
    ///
    /// ```
    /// use ps::model::burn::tensor::Tensor;
    /// use ps::prelude::*;
    /// use ps::served::{DistributedOptimizer, PartConfig, serve_part};
    ///
    /// let device = select_device(default_device_name())?;
    /// # let mnist = Mnist::bundled_sample();
    /// # let net = ConvNet::init(1, &device);
    /// # let config = ServerConfig { consistency: Consistency::Asp, ..ServerConfig::default() };
    /// # let weights = initial_weights(&net, &device)?;
    /// # let server = ParameterServer::new(&weights, Sgd::new(), config)?.spawn()?;
    /// # let part = serve_part(&net, &device, &server.into(), PartConfig::default())?;
    /// # let batch = Examples::batch(&mnist.train, &[0, 1, 2, 3]);
    /// run(async {
    ///     let mut optimizer = DistributedOptimizer::new(WorkerId(0), 1);
    ///     optimizer.add(&part).await?;
    ///     let mut context = optimizer.begin();
    ///     // This process trains a factor of the images.
    ///     let device = device.autodiff();
    ///     let factor = Tensor::<4>::ones([1, 1, 1, 1], &device).require_grad();
    ///     let scaled = context.cut(batch.images_on(&device) * factor);
    ///     let output = context.forward(&part, scaled.clone()).await?; // It goes to the part,
    ///     let loss = nll_loss(output, batch.labels_on(&device)) + scaled.square().mean() * 0.01; // and into the loss.
    ///     context.backward(&loss).await?;
    ///     optimizer.step(context).await?;
    ///     optimizer.leave().await?;
    ///     Ok::<(), Box<dyn std::error::Error>>(())
    /// })?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn cut<A: Activation>(&mut self, tensor: A) -> A {
        self.seams.cut(tensor)
    }

    /// Computes the backward pass of a loss, through this process and all parts that the loss depends on.
    /// Returns the gradients of what is trained in this process. The gradients of the parts stay with the
    /// part servers.
    ///
    /// You may call it again, with a loss of computations made after this call. The gradients of a part are
    /// added up.
    ///
    /// # Errors
    /// If a part server cannot be reached or has forgotten the context, or if nothing in the loss can be
    /// trained.
    pub async fn backward(&mut self, loss: &Tensor<1>) -> Result<LocalGradients, ContextError> {
        let mut backward = self.seams.backward(loss)?;
        let calls = std::mem::take(&mut self.calls);
        while let Some(mut seam) = backward.next_seam()? {
            let call = calls[&seam.number];
            let gradient = std::mem::take(&mut seam.output_gradient);
            let part = &self.parts[call.part];
            let gradient = part.backward(self.id, call.number, gradient).await?;
            seam.resume(gradient)?;
        }
        self.loss = loss.clone().inner().into_scalar::<f32>();
        Ok(backward.finish())
    }

    /// Returns a part's gradient so far: one number for each of its weights, in the order of its layout.
    /// (In PyTorch, this is `get_gradients`.)
    ///
    /// # Errors
    /// If the part server cannot be reached, has forgotten the context, or has no gradient for it.
    pub async fn gradient<P: Part>(
        &self,
        part: &ActorRef<PartServer<P>>,
    ) -> Result<Gradient, ContextError> {
        flat_answer(part, part.ask(GetGradient(self.id)).await)
    }

    /// Returns the loss of the latest backward pass.
    pub(super) fn loss(&self) -> f32 {
        self.loss
    }

    /// Returns how many examples that loss is the mean of; 0 if it is not known.
    pub(super) fn num_examples(&self) -> usize {
        self.num_examples
    }

    pub(super) fn parts(&self) -> &[Box<dyn UsedPart>] {
        &self.parts
    }

    /// Returns the index of a part among the parts of this context. Adds the part if it is new.
    fn index_of<P: Part>(&mut self, part: &ActorRef<PartServer<P>>) -> usize {
        let known = self.parts.iter().position(|used| used.id() == part.id());
        known.unwrap_or_else(|| {
            self.parts.push(Box::new(part.clone()));
            self.parts.len() - 1
        })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        self.parts.iter().for_each(|part| part.release(self.id));
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context")
            .field("id", &self.id)
            .field("seed", &self.seed)
            .field("num_calls", &self.next_call)
            .finish_non_exhaustive()
    }
}
