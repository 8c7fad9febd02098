//! Which of a process's devices each worker computes on.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use ps_actors::ids::WorkerId;
use ps_model::burn::tensor::Device;
use ps_model::{Model, default_device_name};

use super::{TrainError, Trainer};
use crate::device::select_device;

/// The devices of this process, and the workers on them.
#[derive(Clone)]
pub(super) struct Devices {
    all: Arc<[Device]>,
    /// The seat of each worker that was made here. `None` if the places follow from the ranks.
    chosen: Option<Arc<Mutex<HashMap<WorkerId, Taken>>>>,
}

/// A seat that a worker got, which is free again when the worker is gone.
struct Taken {
    /// The place of the device in [`Devices::all`].
    place: usize,
    by: Weak<()>,
}

/// A worker's device. It counts as used by the worker as long as this exists.
#[derive(Clone)]
pub(crate) struct Seat {
    pub(crate) device: Device,
    _taken: Option<Arc<()>>,
}

impl Seat {
    /// A seat on the only device that there is.
    pub(crate) fn on(device: Device) -> Self {
        Self {
            device,
            _taken: None,
        }
    }
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
    /// the fewest, and keeps it when it is restarted, unless another one has fewer by then.
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

    pub(super) fn of(&self, worker: WorkerId) -> Seat {
        let (place, taken) = self.take(worker);
        Seat {
            device: self.all[place].clone(),
            _taken: taken,
        }
    }

    fn take(&self, worker: WorkerId) -> (usize, Option<Arc<()>>) {
        let Some(chosen) = &self.chosen else {
            return (worker.0 as usize % self.all.len(), None);
        };
        let mut chosen = chosen.lock().unwrap_or_else(PoisonError::into_inner);
        // A worker that is made anew may take the place of its old self before that is gone.
        let before = chosen.remove(&worker).map(|taken| taken.place);
        chosen.retain(|_, taken| taken.by.strong_count() > 0);
        let key = |place: &usize| {
            let num_workers = chosen.values().filter(|other| other.place == *place);
            (num_workers.count(), Some(*place) != before)
        };
        let place = (0..self.all.len()).min_by_key(key);
        let place = place.expect("there is at least one device");
        let taken = Arc::new(());
        let by = Arc::downgrade(&taken);
        chosen.insert(worker, Taken { place, by });
        (place, Some(taken))
    }
}

impl<M: Model, E> Trainer<M, E> {
    /// Sets the device to compute on. The default is that of [`default_device_name`]. If that is a GPU, the processes
    /// of a host take its GPUs in turn, as with [`select_device`].
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
            None => Ok(vec![select_device(default_device_name())?]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn three() -> Vec<Device> {
        vec![select_device(default_device_name()).unwrap(); 3]
    }

    #[test]
    fn ranks_decide_where_all_workers_are() {
        let devices = Devices::by_rank(three());
        let place = |worker| devices.take(WorkerId(worker)).0;
        assert_eq!([4, 0, 3, 1, 2, 4].map(place), [1, 0, 0, 1, 2, 1]);
    }

    #[test]
    fn a_node_fills_its_devices_evenly_and_a_restarted_worker_stays() {
        let devices = Devices::by_load(three());
        // All copies share it, as one is made for each worker.
        let copy = devices.clone();
        let take = |devices: &Devices, worker| devices.take(WorkerId(worker));
        // A node of two has every second rank.
        let mut seats = [0, 6, 12, 18].map(|worker| take(&devices, worker));
        assert_eq!(seats.each_ref().map(|seat| seat.0), [0, 1, 2, 0]);
        seats[1] = take(&copy, 6);
        let more = [24, 30, 36].map(|worker| take(&devices, worker));
        assert_eq!(more.each_ref().map(|seat| seat.0), [1, 2, 0]);
        // A worker of device 0 is restarted, although that has one more than the others.
        seats[0] = take(&copy, 0);
        assert_eq!((seats[0].0, seats[1].0), (0, 1));
    }

    #[test]
    fn workers_that_are_gone_leave_their_devices_free() {
        let devices = Devices::by_load(three());
        let take = |worker| devices.take(WorkerId(worker));
        let [zero, one, two] = [0, 1, 2].map(take);
        // Two of them go on at another node, and others come.
        drop((one, two));
        let [three, four, five] = [3, 4, 5].map(take);
        assert_eq!([three.0, four.0, five.0], [1, 2, 0]);
        // One of them comes back. Its old device has two workers now.
        drop(zero);
        let six = take(6);
        assert_eq!(six.0, 0);
        drop(four);
        assert_eq!(take(0).0, 2);
    }
}
