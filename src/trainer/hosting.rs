//! What the processes of a cluster host for a training, and what they must agree on.

use ps_actors::actor::{RestartPolicy, Spawn};
use ps_actors::cluster::Hosts;
use ps_actors::group::ServerArgs;
use ps_model::Model;
use ps_model::burn::tensor::Device;

use super::devices::Devices;
use super::{TrainError, Trainer};
use crate::agreement::Facts;
use crate::data::Examples;
use crate::source::{WORKERS, host_variant};

const MICRO_BATCHES: &str = "the number of micro-batches";

impl<M, E> Trainer<M, E>
where
    M: Model,
    E: Examples<Batch = M::Batch>,
{
    /// Adds what the processes of a cluster must host to take part in this training. Also adds what they
    /// must agree on: model, data, optimizer, batch size, seed, learning rate and number of workers. A
    /// process that is alone needs no hosts.
    ///
    /// Several trainings can be hosted at once:
    ///
    /// ```
    /// use ps::prelude::*;
    ///
    /// let device = select_device(default_device_name())?;
    /// let train = Mnist::bundled_sample().train;
    /// let trainer = |seed| {
    ///     Trainer::new(ConvNet::init(seed, &device), train.clone()).device(&device).iterations(2)
    /// };
    /// let (first, second) = (trainer(1), trainer(2).name("with another seed"));
    /// let cluster = Cluster::alone(second.hosts(first.hosts(Hosts::new())?)?);
    /// let [one, other] = [first.run_on(&cluster)?, second.run_on(&cluster)?];
    /// assert_ne!(one.weights.to_vec(), other.weights.to_vec());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// If there is no device, or if the default device cannot be used.
    pub fn hosts(&self, hosts: Hosts) -> Result<Hosts, TrainError> {
        let devices = self.devices_of_node()?;
        let (workers, servers) = (self.worker_facts(devices.first()), self.server_facts());
        let hosts = servers.must_agree(workers.must_agree(hosts));
        let hosts = Facts::default()
            .state("the batch size", self.batch_size)
            .state("the seed", self.seed)
            .state("the learning rate", self.describe_rate())
            .state("the clipping", self.server.clipping)
            .state("the number of workers", self.num_workers)
            .must_agree(hosts);
        let variants = Variants::of(&workers, &servers);
        Ok(self.host(hosts, &devices, &variants))
    }

    /// What distinguishes the workers of this training, besides their [`WorkerConfig`].
    pub(super) fn worker_facts(&self, device: &Device) -> Facts {
        let facts = Facts::default().model(&self.model, device);
        let facts = match self.num_micro_batches {
            1 => facts,
            parts => facts.state(MICRO_BATCHES, parts),
        };
        self.named(facts.data(&self.train))
    }

    /// What a checkpoint and this training must have in common, besides the layout of the model.
    pub(super) fn checkpoint_facts(&self, device: &Device) -> Facts {
        let facts = self.worker_facts(device);
        // The layout is compared in full. The type's name may change, as a program grows.
        let facts = facts
            .without("the model's type")
            .without("the model's layout")
            .without(MICRO_BATCHES);
        facts
            .state("the optimizer", self.describe_optimizer())
            .state("the batch size", self.batch_size)
            .state("the seed", self.seed)
    }

    /// What distinguishes the servers of this training, besides their [`ServerArgs`].
    pub(super) fn server_facts(&self) -> Facts {
        let facts = Facts::default().state("the optimizer", self.describe_optimizer());
        // Servers on nodes make their schedule themselves. A constant rate comes from the driver.
        let facts = match &self.schedule {
            Some(_) => facts.state("the learning rate", self.describe_rate()),
            None => facts,
        };
        self.named(facts)
    }

    pub(super) fn named(&self, facts: Facts) -> Facts {
        match &self.name {
            Some(name) => facts.state("the name of the training", name),
            None => facts,
        }
    }

    pub(super) fn host(&self, hosts: Hosts, devices: &Devices, variants: &Variants) -> Hosts {
        let (rule, on) = (self.server_rule(), devices.first().clone());
        let hosts = hosts.host_variant(
            &variants.servers,
            // A restart would silently go back to the initial weights.
            Spawn::new().restart(RestartPolicy::NEVER),
            move |args: ServerArgs| Ok(args.into_server(rule.make(&on)?)?),
        );
        let variant = variants.workers.clone();
        let (parts, devices) = (self.num_micro_batches, devices.clone());
        let seat_of = move |worker| devices.of(worker);
        host_variant(hosts, variant, &self.model, seat_of, &self.train, parts)
    }
}

/// The variants of workers and servers that belong to one training.
pub(super) struct Variants {
    pub(super) workers: String,
    pub(super) servers: String,
}

impl Variants {
    pub(super) fn of(workers: &Facts, servers: &Facts) -> Self {
        Self {
            workers: workers.variant(WORKERS),
            servers: servers.variant("optimizer"),
        }
    }

    pub(super) fn here() -> Self {
        Self {
            workers: WORKERS.to_owned(),
            servers: "optimizer".to_owned(),
        }
    }
}
