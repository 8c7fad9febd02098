//! One step of a trainer: forward and backward through local layers and parts elsewhere.

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

/// Why a step could not be computed. The context is of no use any more: drop it, begin another.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ContextError {
    /// A part server could not be reached, or did not answer.
    #[error("the part server {part} did not answer")]
    Call {
        /// Its name.
        part: String,
        /// What became of the call.
        #[source]
        source: CallError,
    },
    /// A part server refused, or failed.
    #[error("the part server {part} did not compute")]
    Served {
        /// Its name.
        part: String,
        /// Why.
        #[source]
        source: ServedError,
    },
    /// What came back is not a tensor of the part.
    #[error("what the part returned does not fit")]
    Output(#[from] PartError),
    /// The local part of the backward pass failed.
    #[error(transparent)]
    Local(#[from] SeamError),
}

/// Computes a part's output at the latest weights, without dropout and without a gradient.
///
/// # Errors
/// When the part server cannot be reached, or the input does not fit.
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

/// A part server of any type, as a context uses it.
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
        // Nobody to tell is as good.
        if let Err(error) = self.tell(ReleaseContext(context)) {
            tracing::debug!(%context, %error, "could not be released");
        }
    }
}

/// One step of a trainer, begun by [`DistributedOptimizer::begin`](super::DistributedOptimizer::begin).
///
/// Its drop lets all parts forget it.
pub struct Context {
    id: ContextId,
    seed: StepSeed,
    seams: Seams,
    next_call: u32,
    /// By the number of the seam.
    calls: HashMap<usize, Call>,
    parts: Vec<Box<dyn UsedPart>>,
    loss: f32,
    /// 0 if that is not known.
    num_examples: usize,
}

/// A forward computation elsewhere.
#[derive(Clone, Copy)]
struct Call {
    /// Its place among the context's parts.
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

    /// The name under which part servers know it.
    #[must_use]
    pub fn id(&self) -> ContextId {
        self.id
    }

    /// Decides all that is random in this step.
    #[must_use]
    pub fn seed(&self) -> StepSeed {
        self.seed
    }

    /// Says how many examples the batch of this step has, of which the loss is the mean.
    ///
    /// With [`Reduction::Mean`](ps_actors::server::Reduction::Mean) that is the weight of this trainer's
    /// gradient among those of one update. If it is not said, it is not known, and then all gradients of
    /// the update weigh the same: right where all trainers' batches have one size.
    pub fn set_num_examples(&mut self, num_examples: usize) {
        self.num_examples = num_examples;
    }

    /// Sends a tensor through a part, in training mode, and returns what comes out, on the device of
    /// `input` and with autodiff.
    ///
    /// The part takes the latest weights at the context's first call, and the same for later ones.
    /// The first call of a context draws the dropout masks that
    /// [`LocalModel::gradient`](ps_model::LocalModel::gradient) draws with the same seed.
    ///
    /// # Errors
    /// When the part server cannot be reached or has too many contexts, or the input does not fit.
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

    /// Cuts the graph at a tensor that goes to a part and also somewhere else. Use what is returned
    /// in its place; it has the same numbers.
    #[must_use]
    pub fn cut<A: Activation>(&mut self, tensor: A) -> A {
        self.seams.cut(tensor)
    }

    /// Goes back from a loss, through this process and all parts that it depends on. Returns the
    /// gradients of what can be trained here; those of the parts stay there.
    ///
    /// A second loss may follow, of computations made after this; gradients of parts add up.
    ///
    /// # Errors
    /// When a part server cannot be reached or has forgotten the context, or nothing in the loss can
    /// be trained.
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

    /// Returns a part's gradient so far, of all its weights in the order of its layout. (PyTorch's
    /// `get_gradients`.)
    ///
    /// # Errors
    /// When the part server cannot be reached, has forgotten the context, or has no gradient for it.
    pub async fn gradient<P: Part>(
        &self,
        part: &ActorRef<PartServer<P>>,
    ) -> Result<Gradient, ContextError> {
        flat_answer(part, part.ask(GetGradient(self.id)).await)
    }

    /// The loss gone back from last.
    pub(super) fn loss(&self) -> f32 {
        self.loss
    }

    /// How many examples that loss is the mean of; 0 if nobody said.
    pub(super) fn num_examples(&self) -> usize {
        self.num_examples
    }

    pub(super) fn parts(&self) -> &[Box<dyn UsedPart>] {
        &self.parts
    }

    /// The place of a part among those that this context has to do with, from now on.
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
