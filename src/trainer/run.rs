//! How a training runs: its servers and workers, what happens beside them, and the report.

use std::collections::BTreeMap;
use std::ops::Range;
use std::pin::pin;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::future::{Either, join4, select, try_join_all};
use ps_actors::actor::{self, ActorRef};
use ps_actors::checkpoint::{Checkpoint, Checkpoints, SaveReport, Start};
use ps_actors::cluster::{Cluster, Hosts, Placement, SpawnOn, SpawnOnError};
use ps_actors::group::ServerGroup;
use ps_actors::ids::{Version, WorkerId};
use ps_actors::launch::StopSignal;
use ps_actors::server::{CoordinatorStatus, GroupError, Histogram, PullVersion, WorkerStatus};
use ps_actors::weights::Weights;
use ps_actors::worker::WorkerError;
use ps_model::Model;
use ps_model::burn::tensor::Device;

use super::devices::Devices;
use super::evaluations::Evaluations;
use super::hosting::Variants;
use super::stopping::{Ending, must_stop, signalled};
use super::{Length, TrainError, Trainer};
use crate::agreement::Facts;
use crate::controls::{Listening, Pause, Running, end_pause};
use crate::data::Examples;
use crate::observe::{
    Collector, Event, Observers, RunEnded, RunSummary, ServersLost, ServersRecovered, Settings,
};
use crate::report::{CurvePoint, Report};
use crate::resume::{self, Dealing, Resumed, Terms};
use crate::source::{
    Evaluator, ModelSource, ModelWorker, SetupError, TestResult, WorkerConfig, initial_weights,
};
use crate::workers::{Worker, WorkerRun, balance, last_steps};

/// How often in a row the servers may be lost without a newer checkpoint in between.
const MAX_IN_VAIN: u32 = 3;

impl<M, E> Trainer<M, E>
where
    M: Model,
    E: Examples<Batch = M::Batch>,
{
    /// Trains on a cluster whose nodes have the [`hosts`](Self::hosts) of this training. A node that only
    /// hosts other trainings is an error. The workers are placed on the nodes in turn. If there are no
    /// nodes, they are in this process, which then needs no `hosts`.
    ///
    /// One cluster can run any number of trainings, also at the same time.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    ///
    /// # Panics
    /// As [`run`](Self::run).
    pub fn run_on(mut self, cluster: &Cluster) -> Result<Report, TrainError> {
        let observers = Observers::start(std::mem::take(&mut self.observers));
        let result = self.train_on(cluster, &observers);
        observers.tell_with(|time| {
            let report = match &result {
                Ok(report) => Some(report),
                Err(error) => error.report(),
            };
            Event::RunEnded(Box::new(RunEnded {
                time,
                error: result.as_ref().err().map(|error| actor::error_chain(error)),
                report: report.map(RunSummary::from),
            }))
        });
        observers.finish();
        result
    }

    fn dealing(&self) -> Dealing {
        Dealing {
            num_workers: self.num_workers,
            batch_size: self.batch_size,
            num_examples: self.train.num_examples(),
        }
    }

    fn train_on(mut self, cluster: &Cluster, observers: &Observers) -> Result<Report, TrainError> {
        self.check()?;
        let stop = match self.heeds_signals {
            true => Some(StopSignal::heed().map_err(TrainError::Signals)?),
            false => None,
        };
        self.server.wait_for_workers = self.num_workers;
        self.server.cut = self.cut();
        let devices = self.devices_here()?;
        let device = devices.first().clone();
        let mut evaluator = match &self.test {
            Some(test) => Some(Evaluator::new(&self.model, &device, test)?),
            None => None,
        };
        // A mistake is returned here. Otherwise it would be a worker that cannot start.
        let one = self.worker_source(0, &device)?;
        let num_steps = match self.length {
            Length::Iterations(iterations) => iterations,
            Length::Epochs(epochs) => epochs.saturating_mul(one.steps_per_epoch()),
        };
        drop(one);
        self.check_schedule(num_steps)?;
        let initial = initial_weights(&self.model, &device)?;
        self.check_groups(initial.layout())?;
        let rule = self.server_rule();
        if let Some(evaluator) = &mut evaluator {
            evaluator.measure(std::mem::take(&mut self.metrics));
            // The test data is checked now, and not after hours of training.
            evaluator.try_out(&initial).map_err(TrainError::TestData)?;
        }
        let dealing = self.dealing();
        let config = self.checkpoints.take();
        self.logs_updates = config.as_ref().is_some_and(|config| config.log.is_some());
        // An earlier process of this training may have begun to record it.
        let mut may_be_recorded = config.as_ref().is_some_and(|config| config.resume);
        let facts = match config {
            Some(_) => self.checkpoint_facts(&device),
            None => Facts::default(),
        };
        let terms = Terms {
            layout: initial.layout(),
            facts: &facts,
            dealing: Some(dealing),
        };
        let (checkpoints, mut resumed) =
            resume::open(config, rule.make_without_schedule(&device)?, &terms)?;
        let checkpoints = observers.see_checkpoints(checkpoints);
        let variants = match cluster.is_alone() {
            // There are no other processes, so there is nothing to compare.
            true => Variants::here(),
            false => Variants::of(&self.worker_facts(&device), &self.server_facts()),
        };
        let here = self.host(Hosts::new(), &devices, &variants);
        let from = resumed.as_ref().map_or(Version(0), Checkpoint::version);
        let listening = Listening::begin(&self.controls, !checkpoints.is_off());
        let evaluations = evaluator.map(|evaluator| Evaluations::new(evaluator, observers));
        let evaluations = evaluations.transpose().map_err(TrainError::Thread)?;
        observers.run_started(self.settings(&initial, num_steps, &devices), from);
        let mut run = Run {
            collector: Collector::new(observers),
            servers_lost: None,
            listening,
            evaluations,
            checkpoints,
            num_steps,
            ending: Ending::default(),
            stop: stop.as_ref(),
            recoveries: Recoveries::default(),
            num_applied_before: None,
        };
        loop {
            let start = resumed.as_ref().map_or(Start::from(&initial), Start::from);
            run.listening.adjust(&mut self.server);
            let servers = self.spawn_servers(cluster, start, &device, &variants, &here)?;
            self.record_schedule(&servers, start.weights().version(), may_be_recorded)?;
            may_be_recorded = true;
            let first = servers.servers().next().expect("a group has servers");
            run.checkpoints.start_log(first, start)?;
            let workers = self.spawn_workers(cluster, &variants, &here)?;
            let group = servers.clone();
            run.recovered(start.weights().version());
            run.collector.begin(cluster, &servers);
            let driving = self.drive(servers, workers, &mut run, resumed.as_ref());
            let result = actor::try_run(driving).map_err(TrainError::EventLoop)?;
            run.collector.end();
            let error = match result {
                Err(error) if may_recover(run.stop, &run.checkpoints, &error) => error,
                other => return other,
            };
            run.lost_servers(&error);
            // Those that are left free their memory, and record nothing more.
            group.servers().for_each(ActorRef::kill);
            let reason = actor::error_chain(&error);
            let rule = rule.make_without_schedule(&device)?;
            // Without a checkpoint yet, it starts from the beginning.
            resumed = resume::again(&mut run.checkpoints, rule, &terms).inspect_err(|_| {
                tracing::warn!(%reason, "the servers are lost, and the training cannot go on");
            })?;
            let from = resumed.as_ref().map_or(Version(0), Checkpoint::version);
            if !run.recoveries.begin(from) {
                return Err(error);
            }
            tracing::warn!(%reason, %from, "the servers are lost; going on from the last checkpoint");
        }
    }

    fn settings(&self, initial: &Weights, num_steps: u64, devices: &Devices) -> Settings {
        Settings {
            name: self.name.clone().unwrap_or_default(),
            model: std::any::type_name::<M>().to_owned(),
            num_weights: initial.len(),
            num_examples: self.train.num_examples(),
            num_workers: self.num_workers,
            num_servers: self.num_servers,
            batch_size: self.batch_size,
            steps_per_worker: num_steps,
            seed: self.seed,
            learning_rate: self.first_rate(),
            schedule: match &self.schedule {
                Some(_) => self.describe_rate(),
                None => String::new(),
            },
            consistency: self.server.consistency.to_string(),
            reduction: self.server.reduction.to_string(),
            optimizer: self.describe_optimizer(),
            device: devices.describe(),
        }
    }

    fn spawn_workers(
        &self,
        cluster: &Cluster,
        variants: &Variants,
        here: &Hosts,
    ) -> Result<Vec<Worker<ModelSource<M>>>, SpawnOnError> {
        let spawn = SpawnOn::new().variant(&variants.workers).here(here.clone());
        let configs = (0..self.num_workers).map(|rank| self.worker_config(rank));
        let started: Vec<_> = configs
            .map(|config| {
                let actor = cluster.spawn_with::<ModelWorker<M>>(spawn.clone(), config);
                (config, actor)
            })
            .collect();
        let started = started
            .into_iter()
            .map(|(config, actor)| Ok((config.worker, config, actor.wait()?)));
        let started = started.collect::<Result<_, SpawnOnError>>()?;
        let consistency = self.server.consistency;
        Ok(Worker::all(started, cluster, &spawn, consistency))
    }

    /// Makes what a worker computes its gradients with.
    pub(super) fn worker_source(
        &self,
        rank: usize,
        device: &Device,
    ) -> Result<ModelSource<M>, SetupError> {
        let (config, parts) = (self.worker_config(rank), self.num_micro_batches);
        ModelSource::in_micro_batches(&self.model, device, &self.train, config, parts)
    }

    pub(super) fn worker_config(&self, rank: usize) -> WorkerConfig {
        WorkerConfig {
            worker: WorkerId(u32::try_from(rank).expect("the number of workers was checked")),
            num_workers: self.num_workers,
            batch_size: self.batch_size,
            seed: self.seed,
        }
    }

    fn spawn_servers(
        &self,
        cluster: &Cluster,
        start: Start<'_>,
        device: &Device,
        variants: &Variants,
        here: &Hosts,
    ) -> Result<ServerGroup, TrainError> {
        if self.servers_on_nodes {
            let at = |place: Placement| {
                let place = SpawnOn::from(place).variant(&variants.servers);
                place.here(here.clone())
            };
            let mut places = vec![at(Placement::RoundRobin); self.num_servers];
            if self.logs_updates || self.record.is_some() {
                // It writes files for the driver.
                places[0] = at(Placement::Driver);
            }
            let spawn = ServerGroup::spawn_on(cluster, places, start, self.server);
            return Ok(actor::try_run(spawn).map_err(TrainError::EventLoop)??);
        }
        // All rules are made first, because a server that is started must get one.
        let rule = self.server_rule();
        let rules = (0..self.num_servers).map(|_| rule.make(device));
        let mut rules = rules.collect::<Result<Vec<_>, _>>()?.into_iter();
        let rule = |_: Range<usize>| rules.next().expect("one for each server");
        Ok(ServerGroup::spawn(
            start,
            self.num_servers,
            self.server,
            rule,
        )?)
    }

    async fn drive(
        &mut self,
        servers: ServerGroup,
        workers: Vec<Worker<ModelSource<M>>>,
        run: &mut Run<'_>,
        from: Option<&Checkpoint>,
    ) -> Result<Report, TrainError> {
        let Run {
            evaluations,
            checkpoints,
            num_steps,
            stop,
            recoveries,
            num_applied_before,
            collector,
            ending,
            listening,
            ..
        } = run;
        let (num_steps, stop, collector, ending) = (*num_steps, *stop, &*collector, &*ending);
        let evaluations = evaluations.as_ref();
        let observers = collector.observers();
        let resumed = match from {
            Some(_) => {
                let status = coordinator(&servers).await?;
                let workers = status.workers.values();
                Some(Resumed::of(status.version, workers, self.dealing()))
            }
            None => None,
        };
        let applied_before = resumed.map_or(0, |resumed| resumed.num_applied);
        let num_applied_before = *num_applied_before.get_or_insert(applied_before);
        listening.restore(&servers, &workers).await?;
        collector.follow_gradients(&servers).await;
        let started = Instant::now();
        let mut curve = Vec::new();
        let pause = listening.pause();
        let is_ending = || {
            let is_interrupted = stop.is_some_and(|stop| stop.received().is_some());
            is_interrupted || ending.is_set()
        };
        let outcome = {
            let ends = (stop, ending);
            let given_up = stop_workers(ends, &servers, &workers, &pause, observers).shared();
            let runs = workers.iter().map(|worker| {
                let first_step = from.map_or(0, |from| from.next_clock(worker.id()).0);
                worker.run(&servers, collector, first_step, num_steps, given_up.clone())
            });
            let runs = pin!(try_join_all(runs));
            let every = self.evaluate_every;
            let mut watch = pin!(async {
                match evaluations {
                    Some(evaluations) if every > 0 => {
                        let on_evaluation = |point: CurvePoint| {
                            (self.on_evaluation)(&point);
                            ending.look(&point, &mut self.stop_when);
                            curve.push(point);
                        };
                        let is_ending = || must_stop(stop, ending);
                        let watch =
                            evaluations.watch(&servers, every, started, is_ending, on_evaluation);
                        watch.await
                    }
                    _ => std::future::pending().await,
                }
            });
            let save_now = checkpoints.save_now();
            let saving = checkpoints.save_when_due(&servers);
            let obeying = listening.obey(Running {
                servers: &servers,
                workers: &workers,
                save_now: &save_now,
                is_ending: &is_ending,
                ending,
                observers,
            });
            let stopping = given_up.clone();
            // Neither of them ends the run. Stopping also works while a worker waits for something else than
            // its steps.
            let beside = pin!(async {
                let (never, _, _, ()) = join4(saving, balance(&workers), obeying, stopping).await;
                match never {}
            });
            match select(runs, select(watch.as_mut(), beside)).await {
                Either::Left((Ok(runs), _)) => match evaluations {
                    Some(evaluations) => evaluations.finish(watch).await.map(|()| runs),
                    None => Ok(runs),
                },
                Either::Left((Err(error), _)) => Err(error),
                Either::Right((Either::Left((error, _)) | Either::Right((error, _)), _)) => {
                    Err(error)
                }
            }
        };
        let seen = Seen {
            elapsed: started.elapsed(),
            curve,
            resumed,
            num_recoveries: recoveries.num_all,
            num_applied_before,
            removed_workers: listening.removed(),
        };
        let runs = match outcome {
            Ok(runs) => runs,
            Err(error) => {
                collector.fetch_last(&servers).await;
                // The other workers must not go on in the background, or wait for the one that failed.
                workers.iter().for_each(Worker::kill);
                // This must not wait for the servers. If some of them answer again, the error must stay what
                // it is.
                if may_recover(stop, checkpoints, &error) {
                    return Err(error);
                }
                let incomplete = self.incomplete(error, &servers, seen, checkpoints, collector);
                return Err(incomplete.await);
            }
        };
        let is_cut_short = runs.iter().any(|run| run.is_cut_short);
        let mut report = self.report(&servers, runs, seen, collector).await?;
        // It has pulled the last weights, so all servers have made all updates.
        collector.fetch_last_parts(&servers).await;
        report.checkpoints = save_last(checkpoints, &servers, &report).await;
        report.stopped_early = ending.met_at().filter(|_| is_cut_short);
        report.ended_by_controls = ending.is_asked() && is_cut_short;
        report.interrupted = stop.and_then(StopSignal::received).filter(|_| is_cut_short);
        if let Some(evaluations) = evaluations {
            let weights = report.weights.clone();
            match evaluations.of_final(weights, signalled(stop)).await {
                Ok(Some(TestResult {
                    evaluation,
                    metrics,
                })) => {
                    (report.final_evaluation, report.final_metrics) = (Some(evaluation), metrics);
                }
                Ok(None) => {}
                Err(error) => return Err(report.incomplete(error)),
            }
        }
        let failure = report
            .find_divergence()
            .map(|what| TrainError::Diverged { what })
            .or_else(|| report.most_refused());
        match failure {
            Some(failure) => Err(report.incomplete(failure)),
            None => Ok(report),
        }
    }

    /// Adds to an error the result until then, as far as the servers still know it.
    async fn incomplete(
        &self,
        error: TrainError,
        servers: &ServerGroup,
        seen: Seen,
        checkpoints: &mut Checkpoints,
        collector: &Collector,
    ) -> TrainError {
        let runs = (0..self.num_workers)
            .map(|_| WorkerRun::default())
            .collect();
        match self.report(servers, runs, seen, collector).await {
            Ok(mut report) if report.num_updates > 0 => {
                report.checkpoints = save_last(checkpoints, servers, &report).await;
                report.incomplete(error)
            }
            // Nothing was trained, or the weights are lost with their servers.
            _ => error,
        }
    }

    async fn report(
        &self,
        servers: &ServerGroup,
        runs: Vec<WorkerRun>,
        seen: Seen,
        collector: &Collector,
    ) -> Result<Report, GroupError> {
        let Seen {
            elapsed,
            curve,
            resumed,
            num_recoveries,
            num_applied_before,
            removed_workers,
        } = seen;
        let weights = servers.pull(PullVersion::Latest).await?;
        let status = coordinator(servers).await?;
        for (&worker, status) in &status.workers {
            collector.settled_until(worker, status.next_clock);
        }
        let mut staleness = Histogram::default();
        for worker in status.workers.values() {
            staleness.merge(&worker.staleness);
        }
        let total = |count: fn(&WorkerStatus) -> u64| status.workers.values().map(count).sum();
        let num_settled: u64 = total(WorkerStatus::num_settled);
        let sum = |number: fn(&WorkerRun) -> u64| runs.iter().map(number).sum::<u64>();
        let (num_told, told_examples) =
            (sum(|run| run.num_told), sum(|run| run.report.num_examples));
        let before = resumed.map_or(0, |resumed| resumed.num_settled);
        let examples_before = resumed.map_or(0, |resumed| resumed.num_examples);
        let num_untold = num_settled.saturating_sub(before).saturating_sub(num_told);
        let untold_examples = match num_told {
            0 => as_many(num_untold, self.batch_size as u64, 1),
            _ => as_many(num_untold, told_examples, num_told),
        };
        let time = |time: fn(&WorkerRun) -> Duration| {
            (num_untold == 0).then(|| runs.iter().map(time).sum::<Duration>())
        };
        Ok(Report {
            consistency: status.consistency,
            reduction: status.reduction,
            interrupted: None,
            stopped_early: None,
            ended_by_controls: false,
            resumed,
            checkpoints: None,
            num_recoveries,
            num_applied_before,
            num_workers: self.num_workers,
            num_servers: self.num_servers,
            weights,
            final_evaluation: None,
            final_metrics: BTreeMap::new(),
            curve,
            num_updates: status.version.0,
            num_applied: total(|worker| worker.num_applied),
            num_dropped_late: total(|worker| worker.num_dropped_late),
            num_refused: total(|worker| worker.num_refused),
            num_examples: examples_before + told_examples.saturating_add(untold_examples),
            num_untold,
            staleness,
            num_worker_restarts: runs.iter().map(|run| run.num_restarts).sum(),
            num_worker_moves: runs.iter().map(|run| run.num_moves).sum(),
            removed_workers,
            elapsed,
            compute_time: time(|run| run.report.compute_time),
            wait_time: time(|run| run.report.wait_time),
            losses: runs.into_iter().map(|run| run.report.losses).collect(),
        })
    }
}

/// What stays when the servers of a training are lost.
struct Run<'a> {
    listening: Listening,
    evaluations: Option<Evaluations>,
    checkpoints: Checkpoints,
    num_steps: u64,
    ending: Ending,
    stop: Option<&'a StopSignal>,
    recoveries: Recoveries,
    collector: Collector,
    /// When the servers were lost, in seconds since the run started, until others have taken their place.
    servers_lost: Option<f64>,
    /// How many gradients were applied when this process began. `None` before the first servers have started.
    num_applied_before: Option<u64>,
}

/// Whether the training goes on from a checkpoint after this error.
fn may_recover(stop: Option<&StopSignal>, checkpoints: &Checkpoints, error: &TrainError) -> bool {
    let is_interrupted = stop.is_some_and(|stop| stop.received().is_some());
    let source = match error {
        TrainError::Group(source) | TrainError::Worker(WorkerError::Servers { source, .. }) => {
            source
        }
        _ => return false,
    };
    source.is_server_lost() && !checkpoints.is_off() && !is_interrupted
}

impl Run<'_> {
    fn lost_servers(&mut self, error: &TrainError) {
        let observers = self.collector.observers();
        self.servers_lost = Some(observers.seconds());
        observers.tell_with(|time| {
            let reason = actor::error_chain(error);
            Event::ServersLost(ServersLost { time, reason })
        });
    }

    /// Others go on from this version in the place of the servers that were lost, if any were.
    fn recovered(&mut self, version: Version) {
        let Some(lost) = self.servers_lost.take() else {
            return;
        };
        self.collector.observers().tell_with(|time| {
            Event::ServersRecovered(ServersRecovered {
                time,
                version,
                seconds: time - lost,
            })
        });
    }
}

/// How often the servers were lost.
#[derive(Default)]
struct Recoveries {
    num_all: u32,
    /// How often in a row no newer checkpoint was written in between.
    num_in_vain: u32,
    from: Version,
}

impl Recoveries {
    /// Counts one. Returns `false` if too many in a row were in vain.
    fn begin(&mut self, from: Version) -> bool {
        self.num_in_vain = match from > self.from {
            true => 1,
            false => self.num_in_vain + 1,
        };
        self.from = from;
        self.num_all += 1;
        self.num_in_vain <= MAX_IN_VAIN
    }
}

/// What the driver itself knows at the end of a run.
struct Seen {
    elapsed: Duration,
    curve: Vec<CurvePoint>,
    resumed: Option<Resumed>,
    num_recoveries: u32,
    num_applied_before: u64,
    removed_workers: Vec<WorkerId>,
}

/// Returns how many examples the batches of so many gradients had, if they were as large as those of others on average.
/// (The last ones of an epoch are smaller.) Exact up to rounding of the result.
fn as_many(num_gradients: u64, examples_of_others: u64, num_others: u64) -> u64 {
    let product = u128::from(num_gradients) * u128::from(examples_of_others);
    let examples = product.checked_div(u128::from(num_others));
    u64::try_from(examples.unwrap_or(0)).unwrap_or(u64::MAX)
}

/// Saves the final weights, and waits until they are on the disk. Weights that are not finite are not
/// saved, because the next training would go on from them.
async fn save_last(
    checkpoints: &mut Checkpoints,
    servers: &ServerGroup,
    report: &Report,
) -> Option<SaveReport> {
    if checkpoints.is_off() {
        return None;
    }
    let saved = checkpoints.finish();
    if saved.has(report.weights.version()) || !report.has_finite_weights() {
        return Some(saved);
    }
    checkpoints.save_group(servers).await;
    Some(checkpoints.finish())
}

async fn coordinator(servers: &ServerGroup) -> Result<CoordinatorStatus, GroupError> {
    let status = servers.status().await?;
    let status = status.into_iter().find_map(|status| status.coordinator);
    Ok(status.expect("the first server of a group coordinates"))
}

/// Stops the workers when a signal or the program ends the training. Becomes ready when their time for the current step is
/// over.
async fn stop_workers<M: Model>(
    (stop, ending): (Option<&StopSignal>, &Ending),
    servers: &ServerGroup,
    workers: &[Worker<ModelSource<M>>],
    pause: &Pause,
    observers: &Observers,
) {
    must_stop(stop, ending).await;
    workers.iter().for_each(Worker::stop);
    // Their last step may wait for it.
    end_pause(pause, servers, observers).await;
    last_steps(servers, workers).await;
}

#[cfg(test)]
mod tests {
    use super::as_many;

    #[test]
    fn examples_that_were_not_reported_are_estimated_without_rounding_each_batch() {
        // Three batches of 16 and one of 8: 14 on average.
        assert_eq!(as_many(100, 3 * 16 + 8, 4), 1_400);
        // Two of 16 and one of 8: 13 and a third.
        assert_eq!(as_many(300, 2 * 16 + 8, 3), 4_000);
        assert_eq!(as_many(u64::MAX, u64::MAX, 1), u64::MAX);
    }
}
