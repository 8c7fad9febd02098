//! The files of checkpoints: whatever is wrong with them is found, and the checkpoint before is used.

use std::fs;
use std::path::Path;

use ps_actors::ActorRef;
use ps_actors::checkpoint::{
    Checkpoint, CheckpointConfig, CheckpointDir, CheckpointError, Checkpoints, Start,
};
use ps_actors::ids::{Clock, GradientId, Incarnation, Version, WorkerId};
use ps_actors::rule::{Sgd, UpdateRule};
use ps_actors::server::{
    ApplyGradients, GetWeights, ParameterServer, ServerConfig, ServerError, TakeCheckpoint,
};
use ps_actors::update_log::LogConfig;
use ps_actors::weights::{Gradient, GradientUpdate, Layout, Parameter, Weights};

const FILES: [&str; 5] = [
    "model.safetensors",
    "optimizer.safetensors",
    "state.bin",
    "manifest.json",
    "CHECKSUMS",
];

/// Random numbers of a seed.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, end: usize) -> usize {
        // The generator of Knuth's MMIX.
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % end.max(1)
    }
}

fn layout() -> Layout {
    let parameter = |name: &str, shape: &[usize], range| Parameter {
        name: name.to_owned(),
        shape: shape.to_vec(),
        range,
    };
    // Not in the order of their names, and one of them is a scalar.
    Layout::new(vec![
        parameter("linear.weight", &[4, 3], 0..12),
        parameter("linear.bias", &[3], 12..15),
        parameter("gain", &[], 15..16),
    ])
    .unwrap()
}

fn server() -> ActorRef<ParameterServer> {
    let initial = Weights::initial(layout(), (0..16).map(|i| i as f32).collect());
    let server = ParameterServer::new(&initial, Sgd::with_momentum(0.9), ServerConfig::default());
    server.unwrap().spawn().unwrap()
}

fn rule() -> Box<dyn UpdateRule> {
    Box::new(Sgd::with_momentum(0.9))
}

fn train(server: &ActorRef<ParameterServer>, clock: u64) {
    apply(server, clock).unwrap();
}

/// Applies a gradient. A panic of the server is a panic of the test.
fn apply(server: &ActorRef<ParameterServer>, clock: u64) -> Result<Weights, ServerError> {
    let update = GradientUpdate {
        id: GradientId {
            worker: WorkerId(0),
            incarnation: Incarnation(1),
            clock: Clock(clock),
        },
        computed_on: Version(0),
        loss: 0.0,
        num_examples: 1,
        gradient: Gradient::new((0..16).map(|i| i as f32 - 7.5).collect::<Vec<_>>()),
    };
    let applied = server.ask(ApplyGradients::mean([update]));
    applied.wait().expect("the server lives")
}

fn take(server: &ActorRef<ParameterServer>) -> Checkpoint {
    Checkpoint::of(server.ask(TakeCheckpoint).wait().unwrap().unwrap()).unwrap()
}

/// A directory with the checkpoints of versions 1 and 2.
fn two() -> (tempfile::TempDir, CheckpointDir) {
    let temporary = tempfile::tempdir().unwrap();
    let directory = CheckpointDir::open(temporary.path()).unwrap();
    let server = server();
    for clock in 0..2 {
        train(&server, clock);
        directory.save(&take(&server), 3).unwrap();
    }
    (temporary, directory)
}

fn newest(directory: &CheckpointDir) -> (Version, Vec<CheckpointError>) {
    let found = directory.newest(|_| Ok(())).unwrap().unwrap();
    (found.checkpoint.version(), found.refused)
}

#[test]
fn other_programs_can_read_the_weights_by_their_names() {
    let server = server();
    train(&server, 0);
    let checkpoint = take(&server).with_fact("optimizer", "sgd");
    let temporary = tempfile::tempdir().unwrap();
    let path = temporary.path().join("c");
    checkpoint.write(&path).unwrap();
    let bytes = fs::read(path.join("model.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut names = tensors.names();
    names.sort_unstable();
    assert_eq!(names, ["gain", "linear.bias", "linear.weight"]);
    let weights = checkpoint.weights().to_vec();
    for Parameter { name, shape, range } in layout().parameters() {
        let tensor = tensors.tensor(name).unwrap();
        assert_eq!(tensor.shape(), shape);
        let numbers: Vec<f32> = bytemuck::pod_collect_to_vec(tensor.data());
        assert_eq!(numbers, weights[range.clone()]);
    }
    let manifest: serde_json::Value =
        serde_json::from_slice(&fs::read(path.join("manifest.json")).unwrap()).unwrap();
    assert_eq!(
        (&manifest["version"], &manifest["facts"]["optimizer"]),
        (&1.into(), &"sgd".into())
    );

    let read = Checkpoint::read(&path).unwrap();
    assert_eq!(read.facts(), checkpoint.facts());
    assert_eq!(read.check_layout(&layout()), Ok(()));
    let other = read.check_layout(&Layout::flat(16)).unwrap_err();
    assert!(
        other.contains("`linear.weight` [4, 3]") && other.contains("`weights` [16]"),
        "{other}"
    );
}

/// S-13.
#[test]
fn a_damaged_checkpoint_is_refused_as_a_whole_and_the_one_before_is_used() {
    let seed = 11;
    let mut dice = Dice(seed);
    for file in FILES {
        for round in 0..24 {
            let (_temporary, directory) = two();
            let path = directory.list().unwrap()[1].1.join(file);
            let mut bytes = fs::read(&path).unwrap();
            let what = match round {
                0 => {
                    fs::remove_file(&path).unwrap();
                    "removed".to_owned()
                }
                1..=6 => {
                    let len = dice.roll(bytes.len());
                    bytes.truncate(len);
                    fs::write(&path, &bytes).unwrap();
                    format!("cut to {len}")
                }
                7 => {
                    bytes.push(b'\n');
                    fs::write(&path, &bytes).unwrap();
                    "longer".to_owned()
                }
                _ => {
                    let (at, bit) = (dice.roll(bytes.len()), dice.roll(8));
                    bytes[at] ^= 1 << bit;
                    fs::write(&path, &bytes).unwrap();
                    format!("bit {bit} of byte {at} flipped")
                }
            };
            let (version, refused) = newest(&directory);
            // Some changes of the list itself mean the same: a hexadecimal digit as a capital, a last
            // line without its end.
            if file == "CHECKSUMS" && version == Version(2) {
                continue;
            }
            assert_eq!(version, Version(1), "{file} {what} (seed {seed})");
            let reason = refused[0].to_string();
            assert!(reason.contains("checkpoint-000000000002"), "{reason}");
        }
    }
}

/// As if somebody who means harm had written the file: the checksums are right.
#[test]
fn nothing_that_a_file_says_crashes_its_reader() {
    let num_inputs = std::env::var("PS_FUZZ_INPUTS").map_or(2_000, |text| text.parse().unwrap());
    let num_inputs: usize = num_inputs / 10;
    let (_temporary, directory) = two();
    let path = directory.list().unwrap()[1].1.clone();
    let originals = FILES.map(|file| fs::read(path.join(file)).unwrap());
    let mut num_read = 0;
    for seed in 0..num_inputs as u64 {
        let mut dice = Dice(seed);
        for (file, bytes) in FILES.iter().zip(&originals) {
            fs::write(path.join(file), bytes).unwrap();
        }
        let which = dice.roll(4);
        let mut bytes = originals[which].clone();
        for _ in 0..1 + dice.roll(3) {
            let at = dice.roll(bytes.len());
            match dice.roll(5) {
                0 => bytes[at] = dice.roll(256) as u8,
                1 => bytes[at] ^= 1 << dice.roll(8),
                2 => bytes.truncate(at.max(1)),
                3 => {
                    let end = bytes.len().min(at + 8);
                    bytes.splice(at..end, u64::MAX.to_le_bytes());
                }
                _ => {
                    let end = at + dice.roll(bytes.len() - at);
                    let piece = bytes[at..end].to_vec();
                    bytes.splice(at..at, piece);
                }
            }
        }
        fs::write(path.join(FILES[which]), &bytes).unwrap();
        sign(&path);
        // The last line of a failing test.
        eprintln!("seed {seed}");
        // Whatever is read can be used, or is refused by the server that should go on from it.
        if let Ok(checkpoint) = Checkpoint::read(&path) {
            num_read += 1;
            let config = ServerConfig::default();
            if let Ok(server) = ParameterServer::new(&checkpoint, Sgd::with_momentum(0.9), config) {
                // The record of gradients may refuse it.
                let _ = apply(&server.spawn().unwrap(), 1 << 20);
            }
        }
    }
    assert!(num_read > 0, "some changes are harmless");
}

/// Writes the checksums of the files as they are.
fn sign(path: &Path) {
    let line = |file: &str| {
        let bytes = fs::read(path.join(file)).unwrap();
        format!("{:08x} {} {file}\n", crc32fast::hash(&bytes), bytes.len())
    };
    let lines: String = FILES[..4].iter().copied().map(line).collect();
    fs::write(path.join("CHECKSUMS"), lines).unwrap();
}

#[test]
fn a_later_format_is_refused_by_its_name() {
    let (_temporary, directory) = two();
    let path = directory.list().unwrap()[1].1.clone();
    let manifest = fs::read_to_string(path.join("manifest.json")).unwrap();
    let later = manifest.replace("\"format_version\": 1", "\"format_version\": 2");
    fs::write(path.join("manifest.json"), later).unwrap();
    sign(&path);
    let refused = Checkpoint::read(&path).unwrap_err().to_string();
    assert!(
        refused.contains("`ps checkpoint` 2, by ps") && refused.contains("reads `ps checkpoint` 1"),
        "{refused}"
    );
}

#[test]
fn the_newest_few_are_kept_and_a_half_written_one_is_removed() {
    let temporary = tempfile::tempdir().unwrap();
    let path = temporary.path().join("runs").join("one");
    let server = server();
    {
        let directory = CheckpointDir::open(&path).unwrap();
        for clock in 0..5 {
            train(&server, clock);
            directory.save(&take(&server), 2).unwrap();
        }
        let kept = directory.list().unwrap();
        let versions: Vec<u64> = kept.iter().map(|(version, _)| version.0).collect();
        assert_eq!(versions, [4, 5]);

        let in_use = CheckpointDir::open(&path).unwrap_err();
        assert!(matches!(in_use, CheckpointError::InUse { .. }), "{in_use}");
    }
    // A process was killed while it wrote version 6. Another file is not ours.
    let partial = path.join(".checkpoint-000000000006.partial");
    fs::create_dir(&partial).unwrap();
    fs::write(partial.join("model.safetensors"), "half").unwrap();
    fs::write(path.join("notes.txt"), "mine").unwrap();
    let directory = CheckpointDir::open(&path).unwrap();
    assert!(!partial.exists() && path.join("notes.txt").exists());
    assert_eq!(newest(&directory).0, Version(5));

    // The newest one is damaged, so the run goes on from 4. What it saves is not taken for an old one.
    fs::write(directory.list().unwrap()[1].1.join("state.bin"), "").unwrap();
    let found = directory.newest(|_| Ok(())).unwrap().unwrap();
    assert_eq!(
        (found.checkpoint.version(), found.refused.len()),
        (Version(4), 1)
    );
    let server = ParameterServer::new(
        &found.checkpoint,
        Sgd::with_momentum(0.9),
        ServerConfig::default(),
    );
    let server = server.unwrap().spawn().unwrap();
    train(&server, 4);
    directory.save(&take(&server), 1).unwrap();
    let (version, refused) = newest(&directory);
    assert_eq!((version, refused.len()), (Version(5), 0));
    let versions: Vec<u64> = directory
        .list()
        .unwrap()
        .iter()
        .map(|(version, _)| version.0)
        .collect();
    assert_eq!(versions, [5]);
}

#[test]
fn a_run_does_not_mix_its_checkpoints_with_those_of_another() {
    let (temporary, directory) = two();
    drop(directory);
    let config = CheckpointConfig::new(temporary.path());
    let refused = Checkpoints::open(config.clone(), rule(), |_| Ok(())).unwrap_err();
    assert!(
        refused
            .to_string()
            .contains("already has checkpoints, up to version 2"),
        "{refused}"
    );

    let resume = CheckpointConfig {
        resume: true,
        ..config
    };
    let only_older = |checkpoint: &Checkpoint| match checkpoint.version() {
        Version(2) => Err("its optimizer is Adam".to_owned()),
        _ => Ok(()),
    };
    let (_checkpoints, found) = Checkpoints::open(resume.clone(), rule(), only_older).unwrap();
    let found = found.unwrap();
    assert_eq!(found.checkpoint.version(), Version(1));
    let reason = found.refused[0].to_string();
    assert!(
        reason.ends_with("is of another run: its optimizer is Adam"),
        "{reason}"
    );
    drop(_checkpoints);

    let none = Checkpoints::open(resume, rule(), |_| Err("it is foreign".to_owned())).unwrap_err();
    let none = none.to_string();
    assert_eq!(none.matches("it is foreign").count(), 2, "{none}");

    // Where there is nothing yet, a run that may go on starts from the beginning.
    let empty = tempfile::tempdir().unwrap();
    let resume = CheckpointConfig {
        resume: true,
        ..CheckpointConfig::new(empty.path())
    };
    assert!(
        Checkpoints::open(resume, rule(), |_| Ok(()))
            .unwrap()
            .1
            .is_none()
    );
}

#[test]
fn a_disk_that_cannot_be_written_does_not_end_the_training() {
    let temporary = tempfile::tempdir().unwrap();
    let path = temporary.path().join("run");
    let server = server();
    let config = CheckpointConfig {
        every: 2,
        ..CheckpointConfig::new(&path)
    };
    let (mut checkpoints, _) = Checkpoints::open(config, rule(), |_| Ok(())).unwrap();
    assert!(!checkpoints.is_due(Version(1)) && checkpoints.is_due(Version(2)));

    // Somebody removes the directory, and a file takes its place.
    fs::remove_dir_all(&path).unwrap();
    fs::write(&path, "").unwrap();
    train(&server, 0);
    train(&server, 1);
    checkpoints.save(&server);
    let report = checkpoints.finish();
    assert_eq!(
        (report.num_saved, report.num_failed, report.latest),
        (0, 1, None)
    );
    assert!(!checkpoints.is_due(Version(3)) && checkpoints.is_due(Version(4)));

    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    train(&server, 2);
    train(&server, 3);
    checkpoints.save(&server);
    let report = checkpoints.finish();
    assert_eq!((report.num_saved, report.num_failed), (1, 1));
    assert!(report.has(Version(4)));

    let mut off = Checkpoints::off();
    off.save(&server);
    assert!(off.is_off() && !off.is_due(Version(1 << 40)));
    assert_eq!(off.finish().num_saved, 0);
}

fn resuming(directory: &Path, log: Option<LogConfig>) -> CheckpointConfig {
    CheckpointConfig {
        every: 0,
        resume: true,
        log,
        ..CheckpointConfig::new(directory)
    }
}

/// A server that goes on from the newest checkpoint in the directory.
fn go_on(directory: &Path, log: Option<LogConfig>) -> (Checkpoints, ActorRef<ParameterServer>) {
    let config = resuming(directory, log);
    let (mut checkpoints, found) = Checkpoints::open(config, rule(), |_| Ok(())).unwrap();
    let initial = Weights::initial(layout(), (0..16).map(|i| i as f32).collect());
    let found = found.map(|found| found.checkpoint);
    let start = found.as_ref().map_or(Start::from(&initial), Start::from);
    let server = ParameterServer::new(start, Sgd::with_momentum(0.9), ServerConfig::default());
    let server = server.unwrap().spawn().unwrap();
    checkpoints.start_log(&server, start).unwrap();
    (checkpoints, server)
}

fn version(server: &ActorRef<ParameterServer>) -> Version {
    server.ask(GetWeights).wait().unwrap().version()
}

/// S-15: a run that writes no log cuts the one that is there. Otherwise the older continuation of a version would be
/// applied to the weights that this run had at it.
#[test]
fn a_later_run_does_not_follow_the_log_of_a_history_that_was_left() {
    let temporary = tempfile::tempdir().unwrap();
    let path = temporary.path();
    let (mut checkpoints, server) = go_on(path, Some(LogConfig::default()));
    (0..5).for_each(|clock| train(&server, clock));
    checkpoints.save(&server);
    checkpoints.finish();
    (5..8).for_each(|clock| train(&server, clock));
    drop(checkpoints);
    // The disk loses the checkpoint of version 5, and a part of the log before it.
    fs::remove_dir_all(path.join("checkpoint-000000000005")).unwrap();
    let log = path.join("updates-000001.log");
    let log = fs::OpenOptions::new().write(true).open(log).unwrap();
    log.set_len(log.metadata().unwrap().len() - 1).unwrap();

    let (mut checkpoints, server) = go_on(path, None);
    assert_eq!(version(&server), Version(4));
    train(&server, 10);
    checkpoints.save(&server);
    checkpoints.finish();
    drop(checkpoints);

    let (_checkpoints, server) = go_on(path, None);
    assert_eq!(version(&server), Version(5));
}

#[test]
fn a_running_training_does_not_begin_anew_because_its_directory_was_emptied() {
    let (temporary, directory) = two();
    drop(directory);
    let path = temporary.path();
    let (mut checkpoints, server) = go_on(path, None);
    let newest = |checkpoints: &mut Checkpoints| {
        let found = checkpoints.newest(rule(), |_| Ok(()))?;
        Ok(found.map(|found| found.checkpoint.version()))
    };
    let check_gone = |checkpoints: &mut Checkpoints, version: &str| {
        let gone: Result<_, CheckpointError> = newest(checkpoints);
        let gone = gone.unwrap_err().to_string();
        assert!(
            gone.contains(&format!("had a checkpoint of {version}")),
            "{gone}"
        );
        assert!(
            gone.contains("restore it, or begin in another directory"),
            "{gone}"
        );
    };
    assert_eq!(newest(&mut checkpoints).unwrap(), Some(Version(2)));
    train(&server, 2);
    checkpoints.save(&server);
    checkpoints.finish();
    // An older copy took its place.
    fs::remove_dir_all(path.join("checkpoint-000000000003")).unwrap();
    check_gone(&mut checkpoints, "version 3");
    fs::remove_dir_all(path.join("checkpoint-000000000002")).unwrap();
    fs::remove_dir_all(path.join("checkpoint-000000000001")).unwrap();
    check_gone(&mut checkpoints, "version 3");
    fs::remove_dir_all(path).unwrap();
    check_gone(&mut checkpoints, "version 3");
    fs::create_dir(path).unwrap();

    // Before the first checkpoint, there is nothing to lose.
    let (mut checkpoints, _) = go_on(path, None);
    assert_eq!(newest(&mut checkpoints).unwrap(), None);
}

/// S-15: a worker was told that these updates were made.
#[test]
fn a_server_does_not_come_back_without_updates_that_the_log_had() {
    for num_saved in [0, 2] {
        let temporary = tempfile::tempdir().unwrap();
        let path = temporary.path();
        let (mut checkpoints, server) = go_on(path, Some(LogConfig::default()));
        // The one of version 0 begins the log.
        if num_saved > 0 {
            (0..num_saved).for_each(|clock| train(&server, clock));
            checkpoints.save(&server);
            checkpoints.finish();
        }
        (num_saved..num_saved + 3).for_each(|clock| train(&server, clock));
        for entry in fs::read_dir(path).unwrap() {
            let file = entry.unwrap().path();
            if file.extension().is_some_and(|extension| extension == "log") {
                fs::remove_file(file).unwrap();
            }
        }
        let lost = checkpoints.newest(rule(), |_| Ok(())).unwrap_err();
        let expected = format!(
            "had all updates until version {}, and only those until version {num_saved} can be read",
            num_saved + 3
        );
        assert!(lost.to_string().contains(&expected), "{lost}");
    }
    // The same with all files there.
    let temporary = tempfile::tempdir().unwrap();
    let (mut checkpoints, server) = go_on(temporary.path(), Some(LogConfig::default()));
    (0..3).for_each(|clock| train(&server, clock));
    let found = checkpoints.newest(rule(), |_| Ok(())).unwrap().unwrap();
    assert_eq!(found.checkpoint.version(), Version(3));
}

#[test]
fn two_parameters_of_one_name_cannot_be_saved_and_nothing_is_left_of_the_try() {
    let parameter = |range: std::ops::Range<usize>| Parameter {
        name: "twin".to_owned(),
        shape: vec![range.len()],
        range,
    };
    let layout = Layout::new(vec![parameter(0..2), parameter(2..4)]).unwrap();
    let initial = Weights::initial(layout, vec![0.0; 4]);
    let server = ParameterServer::new(&initial, Sgd::new(), ServerConfig::default());
    let server = server.unwrap().spawn().unwrap();
    let temporary = tempfile::tempdir().unwrap();
    let refused = take(&server)
        .write(&temporary.path().join("c"))
        .unwrap_err();
    let source = std::error::Error::source(&refused).unwrap().to_string();
    assert_eq!(source, "two parameters of the model have the same name");
    assert_eq!(fs::read_dir(temporary.path()).unwrap().count(), 0);
}

/// Reads a file of weights for a model with these parameters.
fn read_as(path: &Path, parameters: &[(&str, &[usize])]) -> Result<Weights, CheckpointError> {
    let mut start = 0;
    let parameters = parameters.iter().map(|(name, shape)| {
        let range = start..start + shape.iter().product::<usize>();
        start = range.end;
        Parameter {
            name: (*name).to_owned(),
            shape: shape.to_vec(),
            range,
        }
    });
    Weights::read_safetensors(path, &Layout::new(parameters.collect()).unwrap())
}

#[test]
fn weights_are_read_for_the_model_that_they_are_of_and_for_no_other() {
    let temporary = tempfile::tempdir().unwrap();
    let path = temporary.path().join("model.safetensors");
    let weights = Weights::initial(layout(), (0..16).map(|i| i as f32).collect());
    weights.write_safetensors(&path).unwrap();
    let read = Weights::read_safetensors(&path, &layout()).unwrap();
    assert_eq!(
        (read.version(), read.to_vec()),
        (Version(0), weights.to_vec())
    );
    // The order is that of the model.
    let (weight, bias, gain) = (
        ("linear.weight", &[4, 3][..]),
        ("linear.bias", &[3][..]),
        ("gain", &[][..]),
    );
    let other_order = read_as(&path, &[gain, weight, bias]).unwrap().to_vec();
    assert_eq!(other_order[..3], [15.0, 0.0, 1.0]);
    for (parameters, expected) in [
        (
            vec![("linear.weight", &[3, 4][..]), bias, gain],
            "linear.weight is F32 [4, 3], not F32 [3, 4]",
        ),
        (
            vec![("other.weight", &[4, 3][..]), bias, gain],
            "other.weight",
        ),
        (vec![weight, bias, gain, ("more", &[1][..])], "more"),
        (vec![weight, bias], "it has 3 tensors, not 2"),
    ] {
        let error = read_as(&path, &parameters).unwrap_err();
        assert!(
            matches!(error, CheckpointError::OtherModel { .. }),
            "{error:?}"
        );
        let text = error.to_string();
        assert!(
            text.contains("does not have the weights of this model"),
            "{text}"
        );
        assert!(text.contains(expected), "{expected}: {text}");
    }
    let missing = temporary.path().join("missing.safetensors");
    let error = Weights::read_safetensors(missing, &layout()).unwrap_err();
    assert!(matches!(error, CheckpointError::Read { .. }), "{error:?}");
}

#[test]
fn a_damaged_file_of_weights_is_an_error_or_has_other_numbers() {
    let temporary = tempfile::tempdir().unwrap();
    let path = temporary.path().join("model.safetensors");
    let weights = Weights::initial(layout(), vec![1.0; 16]);
    weights.write_safetensors(&path).unwrap();
    let whole = fs::read(&path).unwrap();
    for len in 0..whole.len() {
        fs::write(&path, &whole[..len]).unwrap();
        let error = Weights::read_safetensors(&path, &layout()).unwrap_err();
        assert!(
            matches!(error, CheckpointError::Damaged { .. }),
            "{len}: {error:?}"
        );
    }
    let mut dice = Dice(7);
    for _ in 0..2_000 {
        let mut bytes = whole.clone();
        for _ in 0..=dice.roll(3) {
            let at = dice.roll(bytes.len());
            bytes[at] = dice.roll(256) as u8;
        }
        fs::write(&path, bytes).unwrap();
        if let Ok(read) = Weights::read_safetensors(&path, &layout()) {
            assert_eq!(read.len(), 16);
        }
    }
}
