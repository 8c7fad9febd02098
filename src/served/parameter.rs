//! References to single parameters of a part.

use std::fmt;

use ps_actors::actor::ActorRef;
use ps_actors::weights::Parameter;
use ps_model::{Array, Part, PartError};
use serde::{Deserialize, Serialize};

use super::context::{Context, ContextError, flat_answer};
use super::messages::{GetLayout, GetParameter};
use super::server::PartServer;

/// A reference to a parameter of a part on a part server. It can be sent in messages. Like any reference to
/// the part server, it keeps that alive. (In PyTorch, this is an `RRef` to a parameter.)
#[derive(Serialize, Deserialize)]
#[serde(bound = "")]
pub struct ParameterRef<P: Part> {
    owner: ActorRef<PartServer<P>>,
    parameter: Parameter,
}

/// Returns references to all parameters of a part. (In PyTorch, this is `get_param_rrefs`.)
///
/// ```
/// use ps::prelude::*;
/// use ps::served::{PartConfig, parameters, serve_part};
///
/// # let device = select_device(default_device_name())?;
/// # let net = ConvNet::init(1, &device);
/// # let config = ServerConfig { consistency: Consistency::Asp, ..ServerConfig::default() };
/// # let weights = initial_weights(&net, &device)?;
/// # let server = ParameterServer::new(&weights, Sgd::new(), config)?.spawn()?;
/// # let part = serve_part(&net, &device, &server.clone().into(), PartConfig::default())?;
/// run(async {
///     let parameters = parameters(&part).await?;
///     let bias = parameters.iter().find(|parameter| parameter.name() == "fc.bias");
///     let bias = bias.expect("the net has this layer");
///     assert_eq!(bias.shape(), [10]);
///     assert_eq!(bias.fetch().await?.values.len(), 10);
///     Ok::<(), Box<dyn std::error::Error>>(())
/// })?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// If the part server cannot be reached.
pub async fn parameters<P: Part>(
    part: &ActorRef<PartServer<P>>,
) -> Result<Vec<ParameterRef<P>>, ContextError> {
    let layout = flat_answer(part, part.ask(GetLayout).await.map(Ok))?;
    let parameters: Vec<Parameter> = layout.into();
    let refer = |parameter| ParameterRef {
        owner: part.clone(),
        parameter,
    };
    Ok(parameters.into_iter().map(refer).collect())
}

impl<P: Part> ParameterRef<P> {
    /// Returns the part server that computes with the parameter.
    #[must_use]
    pub fn owner(&self) -> &ActorRef<PartServer<P>> {
        &self.owner
    }

    /// Returns the path of the parameter in the part, such as `conv1.weight`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.parameter.name
    }

    /// Returns the dimensions of the parameter.
    #[must_use]
    pub fn shape(&self) -> &[usize] {
        &self.parameter.shape
    }

    /// Fetches the current numbers of the parameter.
    ///
    /// # Errors
    /// If the part server or its servers cannot be reached.
    pub async fn fetch(&self) -> Result<Array, ContextError> {
        let range = self.parameter.range.clone();
        let row = self.owner.ask(GetParameter(range)).await;
        let row: Array = flat_answer(&self.owner, row)?.into();
        self.shaped(row.values)
    }

    /// Fetches the gradient of the parameter in a context.
    ///
    /// # Errors
    /// As [`Context::gradient`].
    pub async fn gradient(&self, context: &Context) -> Result<Array, ContextError> {
        let gradient = context.gradient(&self.owner).await?;
        // The gradient comes from another process, so it may cover any range.
        let (all, own) = (gradient.range(), self.parameter.range.clone());
        let covers = all.start <= own.start && own.end <= all.end;
        let values = covers.then(|| gradient.slice(own).values().to_vec());
        self.shaped(values.unwrap_or_default())
    }

    fn shaped(&self, values: Vec<f32>) -> Result<Array, ContextError> {
        let shape = self.parameter.shape.clone();
        match values.len() == self.parameter.range.len() {
            true => Ok(Array { shape, values }),
            false => {
                let got = values.len();
                Err(PartError::WrongCount { shape, got }.into())
            }
        }
    }
}

impl<P: Part> Clone for ParameterRef<P> {
    fn clone(&self) -> Self {
        let (owner, parameter) = (self.owner.clone(), self.parameter.clone());
        Self { owner, parameter }
    }
}

impl<P: Part> fmt::Debug for ParameterRef<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, owner) = (self.name(), self.owner.name());
        write!(f, "ParameterRef({name} of {owner})")
    }
}
