//! Disks that are full, read-only, slow or broken: each costs a checkpoint, which is logged and counted, and the training
//! goes on (S-13).
//!
//! A test binary of its own, because a process has at most one watch, which takes the place of the disk here.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Once, mpsc};
use std::time::Duration;

use ps_actors::ActorRef;
use ps_actors::chaos::points::{Point, Watch, watch};
use ps_actors::checkpoint::{Checkpoint, CheckpointConfig, Checkpoints};
use ps_actors::ids::{Clock, GradientId, Incarnation, Version, WorkerId};
use ps_actors::rule::{Sgd, UpdateRule};
use ps_actors::server::{ApplyGradients, ParameterServer, ServerConfig};
use ps_actors::weights::{Gradient, GradientUpdate, Layout, Weights};

/// 256 KiB of weights and as much of momentum, so that a checkpoint fills a quarter of a disk of 2 MiB.
const NUM_WEIGHTS: usize = 64 << 10;

/// Bounds every wait.
const SOON: Duration = Duration::from_secs(60);

fn rule() -> Box<dyn UpdateRule> {
    Box::new(Sgd::with_momentum(0.9))
}

fn server() -> ActorRef<ParameterServer> {
    let initial = Weights::initial(Layout::flat(NUM_WEIGHTS), vec![1.0; NUM_WEIGHTS]);
    let server = ParameterServer::new(&initial, Sgd::with_momentum(0.9), ServerConfig::default());
    server.unwrap().spawn().unwrap()
}

/// Lets a worker take a step, and waits for the server's answer.
fn train(server: &ActorRef<ParameterServer>, clock: u64) {
    let update = GradientUpdate {
        id: GradientId {
            worker: WorkerId(0),
            incarnation: Incarnation(1),
            clock: Clock(clock),
        },
        computed_on: Version(clock),
        loss: 0.0,
        num_examples: 1,
        gradient: Gradient::new(vec![0.5; NUM_WEIGHTS]),
    };
    let applied = server
        .ask(ApplyGradients::mean([update]))
        .wait_timeout(SOON);
    let weights = applied.expect("the server answers").expect("it applies");
    assert_eq!(weights.version(), Version(clock + 1));
}

/// Checkpoints every two updates, of which one is kept.
fn checkpoints(directory: &Path) -> Checkpoints {
    let config = CheckpointConfig {
        every: 2,
        keep: 1,
        ..CheckpointConfig::new(directory)
    };
    Checkpoints::open(config, rule(), |_| Ok(())).unwrap().0
}

/// The checkpoints that can be read in a directory; that nothing half written is beside them.
fn versions(directory: &Path) -> Vec<Version> {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap());
    let names = entries.map(|entry| entry.file_name().into_string().unwrap());
    let names: Vec<String> = names.filter(|name| name.contains("checkpoint")).collect();
    assert!(
        names.iter().all(|name| name.starts_with("checkpoint-")),
        "{names:?}"
    );
    let read = |name: &String| Checkpoint::read(&directory.join(name)).unwrap().version();
    names.iter().map(read).collect()
}

type Fault = Arc<dyn Fn(&Path) -> io::Result<()> + Send + Sync>;

/// What stands in for the disk, by directory.
static DISKS: Mutex<BTreeMap<PathBuf, Fault>> = Mutex::new(BTreeMap::new());

struct Disks;

impl Watch for Disks {
    fn reached(&self, _: &Point<'_>) {}

    fn before_write(&self, file: &Path) -> io::Result<()> {
        let disks = DISKS.lock().unwrap();
        let disk = disks
            .iter()
            .find(|(directory, _)| file.starts_with(directory));
        let Some(fault) = disk.map(|(_, fault)| Arc::clone(fault)) else {
            return Ok(());
        };
        drop(disks);
        fault(file)
    }
}

/// Lets this fault be asked before each file that is written below the directory.
fn harm(directory: &Path, fault: impl Fn(&Path) -> io::Result<()> + Send + Sync + 'static) {
    static WATCHED: Once = Once::new();
    WATCHED.call_once(|| watch(Disks).unwrap());
    DISKS
        .lock()
        .unwrap()
        .insert(directory.to_owned(), Arc::new(fault));
}

fn heal(directory: &Path) {
    DISKS.lock().unwrap().remove(directory);
}

#[test]
fn a_disk_that_fails_at_any_file_costs_one_checkpoint() {
    for name in [
        "model.safetensors",
        "optimizer.safetensors",
        "state.bin",
        "manifest.json",
        "CHECKSUMS",
    ] {
        let temporary = tempfile::tempdir().unwrap();
        let path = temporary.path();
        let (server, mut checkpoints) = (server(), checkpoints(path));
        (0..2).for_each(|clock| train(&server, clock));
        checkpoints.save(&server);
        assert_eq!(checkpoints.finish().num_saved, 1);

        harm(path, move |file| match file.ends_with(name) {
            true => Err(io::Error::other("the disk is broken")),
            false => Ok(()),
        });
        (2..4).for_each(|clock| train(&server, clock));
        checkpoints.save(&server);
        let report = checkpoints.finish();
        assert_eq!((report.num_saved, report.num_failed), (1, 1), "{name}");
        // The one before is not removed for it.
        assert_eq!(versions(path), [Version(2)], "{name}");

        heal(path);
        (4..6).for_each(|clock| train(&server, clock));
        checkpoints.save(&server);
        let report = checkpoints.finish();
        assert_eq!((report.num_saved, report.num_failed), (2, 1), "{name}");
        assert_eq!(versions(path), [Version(6)], "{name}");
    }
}

#[test]
fn a_slow_disk_holds_up_no_update() {
    let temporary = tempfile::tempdir().unwrap();
    let path = temporary.path();
    let (server, mut checkpoints) = (server(), checkpoints(path));
    // Each file waits until the test lets it go.
    let (arrives, arrived) = mpsc::channel();
    let (goes, may_go) = mpsc::channel::<()>();
    let may_go = Mutex::new(may_go);
    harm(path, move |_| {
        arrives.send(()).map_err(io::Error::other)?;
        let gone = may_go.lock().unwrap().recv_timeout(SOON);
        gone.map_err(io::Error::other)
    });
    (0..2).for_each(|clock| train(&server, clock));
    assert!(checkpoints.is_due(Version(2)));
    checkpoints.save(&server);
    let mut clock = 2;
    for _ in 0..5 {
        arrived.recv_timeout(SOON).expect("the next file is begun");
        // The disk has the file under way, and the server answers.
        for _ in 0..2 {
            train(&server, clock);
            clock += 1;
        }
        assert!(!checkpoints.is_due(Version(clock)));
        goes.send(()).unwrap();
    }
    let report = checkpoints.finish();
    assert_eq!(
        (report.num_saved, report.num_failed, report.num_skipped),
        (1, 0, 5)
    );
    // What was fixed when it was taken.
    assert_eq!(versions(path), [Version(2)]);
    heal(path);
    assert!(checkpoints.is_due(Version(14)));
    checkpoints.save(&server);
    assert_eq!(checkpoints.finish().num_saved, 2);
    assert_eq!(versions(path), [Version(12)]);
}

/// The directory of the small disk, in the process that runs in a namespace of its own.
#[cfg(target_os = "linux")]
const SMALL_DISK: &str = "PS_TEST_SMALL_DISK";

/// On a real file system that is too small, and that is then mounted read-only. A child process sees it, in a namespace
/// of its own, which needs no root where users may make namespaces.
#[cfg(target_os = "linux")]
#[test]
fn a_full_and_a_read_only_disk_cost_checkpoints_and_not_the_training() {
    use std::process::Command;

    if let Some(directory) = std::env::var_os(SMALL_DISK) {
        return on_a_small_disk(Path::new(&directory));
    }
    let temporary = tempfile::tempdir().unwrap();
    let inside = |program: &Path| {
        let mount = "mount -t tmpfs -o size=2m tmpfs \"$0\" && exec \"$@\"";
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "--mount", "sh", "-c", mount]);
        command.arg(temporary.path()).arg(program);
        command
    };
    match inside(Path::new("true")).output() {
        Ok(output) if output.status.success() => {}
        Ok(output) => {
            let why = String::from_utf8_lossy(&output.stderr);
            println!(
                "skipped: no file system can be mounted here: {}",
                why.trim()
            );
            return;
        }
        Err(error) => {
            println!("skipped: unshare cannot be run: {error}");
            return;
        }
    }
    let name = "a_full_and_a_read_only_disk_cost_checkpoints_and_not_the_training";
    let output = inside(&std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(SMALL_DISK, temporary.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}{errors}");
    assert!(text.contains("1 passed"), "{text}{errors}");
}

#[cfg(target_os = "linux")]
fn on_a_small_disk(path: &Path) {
    use std::io::Write as _;
    use std::process::Command;

    let (server, mut checkpoints) = (server(), checkpoints(path));
    let mut clock = 0;
    let mut next = |checkpoints: &mut Checkpoints| {
        for _ in 0..2 {
            train(&server, clock);
            clock += 1;
        }
        checkpoints.save(&server);
        let report = checkpoints.finish();
        (report.num_saved, report.num_failed)
    };
    assert_eq!(next(&mut checkpoints), (1, 0));

    // Somebody else fills the disk.
    let ballast = path.join("ballast");
    let mut file = fs::File::create(&ballast).unwrap();
    let full = loop {
        if let Err(error) = file.write_all(&[7; 4096]) {
            break error;
        }
    };
    assert_eq!(full.kind(), io::ErrorKind::StorageFull);
    assert_eq!(next(&mut checkpoints), (1, 1));
    assert_eq!(versions(path), [Version(2)]);
    // There is room for the weights, and not for the momentum.
    file.set_len(file.metadata().unwrap().len() - (300 << 10))
        .unwrap();
    assert_eq!(next(&mut checkpoints), (1, 2));
    assert_eq!(versions(path), [Version(2)]);
    drop(file);
    fs::remove_file(ballast).unwrap();
    assert_eq!(next(&mut checkpoints), (2, 2));
    assert_eq!(versions(path), [Version(8)]);

    // From now on the directory is read-only. (To mount the same file system again so, no file may be open for writing,
    // and the directory's lock is.)
    let run = |program: &str, arguments: &[&str]| {
        let mut command = Command::new(program);
        let status = command.args(arguments).arg(path).status().unwrap();
        assert!(status.success(), "{program} {arguments:?}: {status}");
    };
    run("mount", &["-t", "tmpfs", "-o", "ro", "tmpfs"]);
    let refused = fs::write(path.join("file"), "").unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::ReadOnlyFilesystem);
    assert_eq!(next(&mut checkpoints), (2, 3));
    // A run that begins with such a directory is told at once.
    let config = CheckpointConfig::new(path);
    let error = Checkpoints::open(config, rule(), |_| Ok(())).unwrap_err();
    let reason = ps_actors::actor::error_chain(&error);
    assert!(reason.contains("Read-only file system"), "{reason}");

    run("umount", &[]);
    assert_eq!(versions(path), [Version(8)]);
    assert_eq!(next(&mut checkpoints), (3, 3));
    assert_eq!(versions(path), [Version(12)]);
}
