//! Controls of a driver's own loop, and of a training that ends.

use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ps::controls::{ControlError, Controls, LoopControls};
use ps::observe::{Change, Event, Observers, Settings};
use ps::prelude::*;

const PATIENCE: Duration = Duration::from_secs(60);

/// A driver's own loop, with one worker.
struct Loop {
    controls: Controls,
    server: ActorRef<ParameterServer>,
    events: Receiver<Event>,
    must_end: Arc<AtomicBool>,
    running: JoinHandle<()>,
}

fn begin(directory: Option<&Path>) -> Loop {
    let device = select_device(default_device_name()).unwrap();
    let model = ConvNet::init(3, &device);
    let initial = initial_weights(&model, &device).unwrap();
    let server = ParameterServer::new(&initial, Sgd::new(), ServerConfig::default()).unwrap();
    let server = server.spawn().unwrap();
    let config = WorkerConfig {
        worker: WorkerId(0),
        num_workers: 1,
        batch_size: 8,
        seed: 3,
    };
    let train = Mnist::bundled_sample().train;
    let worker = spawn_worker(&model, &device, &train, config).unwrap();
    let checkpoints = match directory {
        Some(directory) => {
            let config = CheckpointConfig {
                every: 0,
                ..CheckpointConfig::new(directory)
            };
            Checkpoints::open(config, Box::new(Sgd::new()), |_| Ok(()))
                .unwrap()
                .0
        }
        None => Checkpoints::off(),
    };
    let (sender, events) = channel();
    let told = move |event: &Event| _ = sender.send(event.clone());
    let observers = Observers::start(vec![Box::new(told)]);
    observers.run_started(Settings::default(), Version(0));
    let mut checkpoints = observers.see_checkpoints(checkpoints);
    let controls = Controls::new();
    let mut heeding = controls.in_loop(server.clone(), &observers, &checkpoints);
    let must_end = Arc::new(AtomicBool::new(false));
    let (its_server, ends) = (server.clone(), Arc::clone(&must_end));
    let running = std::thread::spawn(move || {
        let stop = StopSignal::heed().unwrap();
        let mut weights = its_server.ask(GetWeights).wait().unwrap();
        while !ends.load(Ordering::SeqCst) {
            heeding.heed(&stop, &mut checkpoints);
            let gradient = worker.ask(ComputeGradients(weights)).flatten().wait();
            let update = ApplyGradients::sum([gradient.unwrap()]);
            weights = its_server.ask(update).flatten().wait().unwrap();
        }
        checkpoints.finish();
        observers.run_ended();
    });
    Loop {
        controls,
        server,
        events,
        must_end,
        running,
    }
}

impl Loop {
    fn version(&self) -> Version {
        self.server.ask(GetStatus).wait().unwrap().version
    }

    fn end(self) -> (Controls, Vec<Event>) {
        self.must_end.store(true, Ordering::SeqCst);
        self.running.join().unwrap();
        (self.controls, self.events.iter().collect())
    }
}

#[test]
fn a_loop_makes_no_update_while_it_is_paused_and_does_what_else_is_asked() {
    let folder = tempfile::tempdir().unwrap();
    let running = begin(Some(folder.path()));
    let controls = &running.controls;
    assert!(controls.is_running() && controls.saves_checkpoints());
    assert!(!controls.changes_consistency() && !controls.removes_workers());
    assert!(!controls.can_end());
    controls.pause().wait().unwrap();
    assert!(controls.is_paused());
    let version = running.version();
    controls.set_learning_rate(0.125).wait().unwrap();
    controls.save_checkpoint().wait().unwrap();
    // What cannot be done is refused, and does not end the pause.
    let refused = controls.set_learning_rate(-1.0).wait().unwrap_err();
    assert!(matches!(refused, ControlError::Servers(_)), "{refused:?}");
    let refused = controls.set_consistency(Consistency::Asp).wait();
    let refused = refused.unwrap_err().to_string();
    assert!(refused.contains("when gradients are applied"), "{refused}");
    let refused = controls.remove_worker(WorkerId(0)).wait();
    let refused = refused.unwrap_err().to_string();
    assert!(refused.contains("which workers there are"), "{refused}");
    let refused = controls.end().wait().unwrap_err().to_string();
    assert!(refused.contains("when it ends"), "{refused}");
    let status = running.server.ask(GetStatus).wait().unwrap();
    assert_eq!((status.version, status.learning_rate), (version, 0.125));
    controls.resume().wait().unwrap();
    let deadline = Instant::now() + PATIENCE;
    while running.version() <= version {
        assert!(Instant::now() < deadline, "it does not go on");
        std::thread::yield_now();
    }
    let (controls, events) = running.end();
    assert!(matches!(controls.pause().wait(), Err(ControlError::Ended)));
    let changes = events.iter().filter_map(|event| match event {
        Event::Controlled(controlled) => Some(&controlled.change),
        _ => None,
    });
    let learning_rate = 0.125;
    assert_eq!(
        changes.collect::<Vec<_>>(),
        [
            &Change::Paused,
            &Change::LearningRate { learning_rate },
            &Change::CheckpointAsked,
            &Change::Resumed
        ]
    );
    let saved = events.iter().find_map(|event| match event {
        Event::CheckpointSaved(saved) => Some(saved.version),
        _ => None,
    });
    assert_eq!(saved, Some(version));
}

#[test]
fn a_loop_saves_a_version_once_however_often_that_is_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let running = begin(Some(folder.path()));
    running.controls.pause().wait().unwrap();
    let version = running.version();
    for _ in 0..3 {
        running.controls.save_checkpoint().wait().unwrap();
    }
    running.controls.resume().wait().unwrap();
    let (_, events) = running.end();
    let saved = events.iter().filter_map(|event| match event {
        Event::CheckpointSaved(saved) => Some(saved.version),
        _ => None,
    });
    assert_eq!(saved.collect::<Vec<_>>(), [version]);
}

/// Controls of a loop that trains nothing.
fn in_loop(controls: &Controls, observers: &Observers) -> LoopControls {
    let initial = Weights::initial(Layout::flat(2), vec![0.0; 2]);
    let server = ParameterServer::new(&initial, Sgd::new(), ServerConfig::default()).unwrap();
    controls.in_loop(server.spawn().unwrap(), observers, &Checkpoints::off())
}

fn heed(mut heeding: LoopControls) -> JoinHandle<LoopControls> {
    std::thread::spawn(move || {
        heeding.heed(&StopSignal::heed().unwrap(), &mut Checkpoints::off());
        heeding
    })
}

#[test]
fn a_loop_that_another_one_has_replaced_leaves_the_pause_of_that_one_alone() {
    let (controls, observers) = (Controls::new(), Observers::none());
    let mut replaced = in_loop(&controls, &observers);
    let newer = in_loop(&controls, &observers);
    let paused = controls.pause();
    let newer = heed(newer);
    paused.wait().unwrap();
    // It does not wait either.
    replaced.heed(&StopSignal::heed().unwrap(), &mut Checkpoints::off());
    assert!(controls.is_paused());
    drop(replaced);
    assert!(controls.is_paused() && controls.is_running());
    controls.resume().wait().unwrap();
    drop(newer.join().unwrap());
}

#[test]
fn a_pause_that_nobody_can_end_any_more_ends_and_observers_learn_of_it() {
    let (sender, events) = channel();
    let told = move |event: &Event| _ = sender.send(event.clone());
    let (controls, observers) = (Controls::new(), Observers::start(vec![Box::new(told)]));
    let waiting = in_loop(&controls, &observers);
    let paused = controls.pause();
    let waiting = heed(waiting);
    paused.wait().unwrap();
    let newer = in_loop(&controls, &Observers::none());
    drop(waiting.join().unwrap());
    drop(newer);
    observers.run_ended();
    let changes = events.iter().filter_map(|event| match event {
        Event::Controlled(controlled) => Some(controlled.change),
        _ => None,
    });
    let changes: Vec<Change> = changes.collect();
    assert_eq!(changes, [Change::Paused, Change::Resumed]);
}

/// The pause is asked for while the evaluation runs that ends the training.
#[test]
fn a_training_that_an_evaluation_ends_refuses_to_be_paused() {
    let device = select_device(default_device_name()).unwrap();
    let Mnist { train, test, .. } = Mnist::bundled_sample();
    let controls = Controls::new();
    let asked = Rc::new(RefCell::new(None));
    let (asks, keeps) = (controls.clone(), Rc::clone(&asked));
    let report = Trainer::new(ConvNet::init(3, &device), train)
        .test_data(test)
        .device(&device)
        .workers(2)
        .batch_size(8)
        .iterations(100_000)
        .evaluate_every(10)
        .heed_signals(false)
        .controls(&controls)
        .stop_when(move |_| {
            keeps.borrow_mut().get_or_insert_with(|| asks.pause());
            true
        })
        .run()
        .unwrap();
    assert!(report.stopped_early.is_some());
    let asked = asked.take().expect("there was an evaluation");
    let refused = asked.wait();
    assert!(matches!(refused, Err(ControlError::Ending)), "{refused:?}");
}

#[test]
fn a_loop_without_a_directory_promises_no_checkpoint() {
    let running = begin(None);
    let refused = running.controls.save_checkpoint().wait();
    assert!(matches!(refused, Err(ControlError::NoCheckpoints)));
    running.end();
}
