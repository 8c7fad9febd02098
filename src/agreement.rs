//! What all processes of a training must have in common, as text that an error can show.
//!
//! Every process has its own copy of model and data. Each property of them that changes the result is
//! stated here, by name. If a node states something else than the driver, it cannot join, and the error
//! names the difference. The same facts distinguish several trainings of one program (their *variants*).

use std::collections::BTreeMap;
use std::sync::Once;

use ps_actors::cluster::Hosts;
use ps_model::burn::module::Module;
use ps_model::burn::tensor::Device;
use ps_model::{LocalModel, ModelError, ParameterSpec, TiedField};
use sha2::{Digest as _, Sha256};

use crate::data::{Examples, hex};

/// How many parameters a fact lists by name and shape. A digest covers all of them.
const NUM_LISTED: usize = 8;

/// Statements by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Facts(BTreeMap<&'static str, String>);

impl Facts {
    pub(crate) fn state(mut self, name: &'static str, value: impl ToString) -> Self {
        self.0.insert(name, value.to_string());
        self
    }

    /// States a model's type, the names and shapes of its weights, which fields have one in common, and the
    /// values of everything that training does not change. The weights themselves come from the servers.
    pub(crate) fn model<M: Module>(self, model: &M, device: &Device) -> Self {
        let described = LocalModel::new(model.clone(), device)
            .and_then(|model| Ok((describe(&model), fixed_values(&model)?)));
        let facts = self.state("the model's type", std::any::type_name::<M>());
        match described {
            Ok((layout, fixed)) => {
                let facts = facts.state("the model's layout", layout);
                match fixed {
                    Some(fixed) => facts.state("what is not trained in the model", fixed),
                    None => facts,
                }
            }
            // The error appears when a worker is made of the model.
            Err(error) => facts.state("the model's layout", error),
        }
    }

    /// States the number of examples, and their fingerprint if there is one.
    pub(crate) fn data<E: Examples>(self, data: &E) -> Self {
        let facts = self.state("the number of training examples", data.num_examples());
        let Some(fingerprint) = data.fingerprint() else {
            static SAID: Once = Once::new();
            SAID.call_once(|| {
                tracing::info!(
                    "of the training data only the number of examples is compared between processes: \
                     `Examples::fingerprint` or `Collated::compared_by` can say more"
                );
            });
            return facts;
        };
        facts.state("the content of the training data", fingerprint)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.0.iter().map(|(&name, value)| (name, value.as_str()))
    }

    /// Leaves out a statement that is not needed.
    pub(crate) fn without(mut self, name: &str) -> Self {
        self.0.remove(name);
        self
    }

    /// Lets only nodes join that state the same.
    pub(crate) fn must_agree(&self, hosts: Hosts) -> Hosts {
        let facts = self.0.iter();
        facts.fold(hosts, |hosts, (name, value)| hosts.must_agree(*name, value))
    }

    /// Returns a name for the variant that these facts describe.
    pub(crate) fn variant(&self, of: &str) -> String {
        let mut hash = Sha256::new();
        for text in self.0.iter().flat_map(|(name, value)| [*name, value]) {
            hash.update((text.len() as u64).to_le_bytes());
            hash.update(text);
        }
        format!("{of} {}", hex(&hash.finalize()))
    }
}

/// Lets a node join only if its `model` is the same: its type, the names and shapes of its weights, and the
/// values of everything that training does not change.
///
/// ```
/// use ps::actors::cluster::{ClusterConfig, Node};
/// use ps::prelude::*;
///
/// let device = select_device(default_device_name())?;
/// let driver = agree_on_model(Hosts::new(), &ConvNet::init(1, &device), &device);
/// let local = ([127, 0, 0, 1], 0).into();
/// let cluster = Cluster::listen(ClusterConfig::default(), local, driver)?;
/// let address = cluster.address().expect("it has a TCP socket").to_string();
///
/// let other = agree_on_model(Hosts::new(), &Net::init(1, &device), &device);
/// let node = Node::new(ClusterConfig::default(), 1, 0, address, other);
/// let error = node.serve().wait().expect_err("the node has another model");
/// assert!(error.to_string().contains("the model's layout"), "{error}");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[must_use]
pub fn agree_on_model<M: Module>(hosts: Hosts, model: &M, device: &Device) -> Hosts {
    Facts::default().model(model, device).must_agree(hosts)
}

/// Lets a node join only if it has the same training data: the same number of examples, and the same
/// [fingerprint](Examples::fingerprint).
///
/// ```
/// use ps::prelude::*;
///
/// let hosts = agree_on_data(Hosts::new(), &Mnist::bundled_sample().train);
/// assert!(hosts.agreed().count() > 0);
/// ```
///
/// [`agree_on_model`] has an example with a node that is refused.
#[must_use]
pub fn agree_on_data<E: Examples>(hosts: Hosts, data: &E) -> Hosts {
    Facts::default().data(data).must_agree(hosts)
}

/// Lists the names and shapes of a model's weights, and which fields are tied to which.
fn describe<M: Module>(model: &LocalModel<M>) -> String {
    let weights = model.layout().iter();
    let weights = weights.map(|ParameterSpec { name, shape, .. }| format!("{name} {shape:?}"));
    let tied = model.tied().iter();
    let tied = tied.map(|TiedField { name, first }| format!("{name} = {first}"));
    let mut hash = Sha256::new();
    let mut listed = Vec::new();
    let mut num_left_out = 0;
    for one in weights.chain(tied) {
        hash.update(&one);
        hash.update("\n");
        match listed.len() < NUM_LISTED {
            true => listed.push(one),
            false => num_left_out += 1,
        }
    }
    if num_left_out > 0 {
        let digest = hex(&hash.finalize());
        listed.push(format!("and {num_left_out} more (digest {digest})"));
    }
    listed.join(", ")
}

/// Returns a digest of all values that training does not change. `None` if there are none.
fn fixed_values<M: Module>(model: &LocalModel<M>) -> Result<Option<String>, ModelError> {
    let (mut hash, mut num) = (Sha256::new(), 0);
    model.fixed_tensors(|name, shape, bytes| {
        hash.update(format!("{name} {shape:?} {}\n", bytes.len()));
        hash.update(bytes);
        num += shape.iter().product::<usize>();
    })?;
    Ok((num > 0).then(|| {
        let noun = if num == 1 { "value" } else { "values" };
        format!("{num} {noun} (digest {})", hex(&hash.finalize()))
    }))
}
