//! Which of a process's devices each worker computes on.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use ps_actors::ids::WorkerId;
use ps_actors::launch::{self, env};
use ps_model::burn::tensor::Device;
use ps_model::{Model, default_device_name, select_device_for};

use super::{TrainError, Trainer};

/// The devices of this process, and the workers on them.
#[derive(Clone)]
pub(super) struct Devices {
    all: Arc<[Device]>,
    /// The place in `all` of each worker that was made here. `None` if the places follow from the ranks.
    chosen: Option<Arc<Mutex<HashMap<WorkerId, usize>>>>,
}

impl Devices {
    /// For the process that has all workers: their ranks decide, so that each run is the same.
    fn by_rank(all: Vec<Device>) -> Self {
        Self {
            all: all.into(),
            chosen: None,
        }
    }

    /// For a process that has some of the workers, and does not know beforehand which: each takes the device that has
    /// the fewest, and keeps it when it is restarted.
    fn by_load(all: Vec<Device>) -> Self {
        Self {
            all: all.into(),
            chosen: Some(Arc::default()),
        }
    }

    /// The device of the servers' optimizers and of evaluations.
    pub(super) fn first(&self) -> &Device {
        &self.all[0]
    }

    pub(super) fn describe(&self) -> String {
        let names: Vec<_> = self
            .all
            .iter()
            .map(|device| format!("{device:?}"))
            .collect();
        names.join(", ")
    }

    pub(super) fn of(&self, worker: WorkerId) -> Device {
        self.all[self.place(worker)].clone()
    }

    fn place(&self, worker: WorkerId) -> usize {
        let Some(chosen) = &self.chosen else {
            return worker.0 as usize % self.all.len();
        };
        let mut chosen = chosen.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(&place) = chosen.get(&worker) {
            return place;
        }
        let num_workers_at =
            |place: &usize| chosen.values().filter(|other| *other == place).count();
        let place = (0..self.all.len()).min_by_key(num_workers_at);
        let place = place.expect("there is at least one device");
        chosen.insert(worker, place);
        place
    }
}

impl<M: Model, E> Trainer<M, E> {
    /// Sets the device to compute on. The default is that of [`default_device_name`]. If that is a GPU, the processes
    /// of a host take its GPUs in turn, as with [`select_device_for`].
    #[must_use]
    pub fn device(self, device: &Device) -> Self {
        self.devices([device.clone()])
    }

    /// Sets the devices that the workers of each process are spread over, such as all GPUs of the machine. Without
    /// nodes, the worker of rank `r` computes on the device at `r` modulo their number. A node gives each of its
    /// workers the device that has the fewest. Servers and evaluations use the first one.
    ///
    /// The devices may be of different backends. Their gradients then differ by rounding, so the result depends on
    /// which worker computes where. A batch that contains tensors is on the device that it was made on: a model
    /// has to move it to its own, with burn's `to_device`.
    ///
    /// ```
    /// use ps::prelude::*;
    ///
    /// // For example ["cuda:0", "cuda:1"].
    /// let devices = ["flex", "flex"].map(select_device).into_iter().collect::<Result<Vec<_>, _>>()?;
    /// let report = Trainer::new(ConvNet::init(1, &devices[0]), Mnist::bundled_sample().train)
    ///     .devices(devices)
    ///     .workers(4)
    ///     .iterations(5)
    ///     .run()?;
    /// assert_eq!(report.num_applied, 20);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn devices(mut self, devices: impl IntoIterator<Item = Device>) -> Self {
        self.devices = Some(devices.into_iter().collect());
        self
    }

    /// The devices of the process that has all workers.
    pub(super) fn devices_here(&self) -> Result<Devices, TrainError> {
        Ok(Devices::by_rank(self.all_devices()?))
    }

    /// The devices of a process that may have any of the workers.
    pub(super) fn devices_of_node(&self) -> Result<Devices, TrainError> {
        Ok(Devices::by_load(self.all_devices()?))
    }

    fn all_devices(&self) -> Result<Vec<Device>, TrainError> {
        match &self.devices {
            Some(devices) if devices.is_empty() => Err(TrainError::NoDevice),
            Some(devices) => Ok(devices.clone()),
            None => {
                // Starting the processes reports variables that make no sense.
                let local_rank = launch::local_rank(env::read).unwrap_or(0);
                let device = select_device_for(default_device_name(), local_rank as usize)?;
                Ok(vec![device])
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use ps_model::select_device;

    use super::*;

    fn places(devices: &Devices, workers: &[u32]) -> Vec<usize> {
        let place = |&worker| devices.place(WorkerId(worker));
        workers.iter().map(place).collect()
    }

    fn three() -> Vec<Device> {
        vec![select_device(default_device_name()).unwrap(); 3]
    }

    #[test]
    fn ranks_decide_where_all_workers_are() {
        let devices = Devices::by_rank(three());
        assert_eq!(places(&devices, &[4, 0, 3, 1, 2, 4]), [1, 0, 0, 1, 2, 1]);
    }

    #[test]
    fn a_node_fills_its_devices_evenly_and_a_restarted_worker_stays() {
        let devices = Devices::by_load(three());
        // A node of two has every second rank.
        assert_eq!(places(&devices, &[0, 6, 12, 18]), [0, 1, 2, 0]);
        // All copies share it, as one is made for each worker.
        let copy = devices.clone();
        assert_eq!(places(&copy, &[6, 24, 0]), [1, 1, 0]);
        assert_eq!(places(&devices, &[30, 36]), [2, 0]);
    }
}
