//! Models, or parts of one, that live with a server: trainers send inputs, not gradients.
//!
//! These are the counterparts of remote references, distributed autograd and the distributed optimizer in
//! PyTorch's RPC guide. A [`PartServer`] runs a [`Part`] for trainers. Its weights are
//! those of an ordinary [`ServerGroup`](ps_actors::group::ServerGroup), with one or several servers, any
//! update rule and any consistency mode. So several part servers can compute with the same weights. A
//! trainer uses one [`Context`] for each step:
//!
//! 1. [`Context::forward`] sends a tensor to a part, and returns the part's output. The part keeps the
//!    graph, and the weights that it was computed with, under the context's id (PT-1).
//! 2. [`Context::backward`] computes the backward pass of a loss, through this process and all parts in any
//!    order. The gradients of local layers are returned. Those of a part stay with the part server.
//! 3. [`DistributedOptimizer::step`] makes each part push the context's gradient to its servers. Each
//!    gradient is applied once, however often this is tried (PT-2).
//!
//! A part forgets a context that is dropped, or that is not used for the length of
//! [`context_lease`](PartConfig::context_lease) (PT-3). The number of contexts is bounded, so nobody can
//! fill the memory of a part server with them (PT-4).
//!
//! ```
//! use ps::prelude::*;
//! use ps::served::{DistributedOptimizer, PartConfig, serve_part};
//!
//! let device = select_device(default_device_name())?;
//! let mnist = Mnist::bundled_sample();
//! let net = ConvNet::init(1, &device);
//!
//! // The server's side.
//! let config = ServerConfig { consistency: Consistency::Asp, ..ServerConfig::default() };
//! let weights = initial_weights(&net, &device)?;
//! let server = ParameterServer::new(&weights, Sgd::new(), config)?.spawn()?;
//! let part = serve_part(&net, &device, &server.into(), PartConfig::default())?;
//!
//! // A trainer's side.
//! let batch = Examples::batch(&mnist.train, &[0, 1, 2, 3]);
//! run(async {
//!     let mut optimizer = DistributedOptimizer::new(WorkerId(0), 1);
//!     optimizer.add(&part).await?;
//!     for _ in 0..3 {
//!         let mut context = optimizer.begin();
//!         context.set_num_examples(batch.labels().len());
//!         let output = context.forward(&part, batch.images_on(&device)).await?;
//!         let labels = batch.labels_on(&output.device());
//!         context.backward(&nll_loss(output, labels)).await?;
//!         optimizer.step(context).await?;
//!     }
//!     assert_eq!(optimizer.clock(), Clock(3));
//!     optimizer.leave().await?;
//!     Ok::<(), Box<dyn std::error::Error>>(())
//! })?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! | module | what it holds |
//! |---|---|
//! | `server` | the actor that computes |
//! | `messages` | its messages |
//! | `contexts` | which computations it remembers, and for how long |
//! | `context`, `optimizer` | the trainer's side |
//! | `parameter` | references to single parameters |
//!
//! What is computed inside one process is in `ps-model/src/part/`: it knows no actors. Its types that a
//! program needs are also here, so this module is the only one to name.

mod context;
mod contexts;
mod messages;
mod optimizer;
mod parameter;
mod server;

pub use context::{Context, ContextError, infer};
pub use contexts::ContextId;
pub use messages::{
    ApplyContext, ArrayMessage, Backward, Forward, GetGradient, GetLayout, GetParameter,
    GetPartStatus, GetServers, Infer, PartStatus, ReleaseContext, ServedError,
};
pub use optimizer::{DistributedOptimizer, OptimizerError};
pub use parameter::{ParameterRef, parameters};
pub use server::{PartConfig, PartServer, host_parts, serve_part};

pub use ps_model::{Activation, Array, LocalGradients, MAX_CALLS, Part, PartError, SeamError};
