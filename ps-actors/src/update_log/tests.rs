use std::fs::{self, File};

use super::writer::UpdateLog;
use super::*;
use crate::checkpoint::{Checkpoint, CheckpointDir};
use crate::ids::{Clock, GradientId, Incarnation, JoinRequest, Version, WorkerId};
use crate::learning_rate::{LearningRateSchedule, Scheduled};
use crate::rule::{Sgd, UpdateRule};
use crate::server::{
    ApplyGradients, Clipping, Consistency, GetStatus, Join, ParameterServer, Push, ServerConfig,
    ServerError, TakeCheckpoint,
};
use crate::weights::{Gradient, GradientUpdate, Layout, Parameter, Weights};
use ps_runtime::ActorRef;

const LEN: usize = 5;

/// The numbers behind these are buffers. Most gradients are computed on old ones (S-20).
const NUM_TRAINABLE: usize = 3;

fn initial() -> Weights {
    let parameter = |name: &str, range: std::ops::Range<usize>| Parameter {
        name: name.to_owned(),
        shape: vec![range.len()],
        range,
    };
    let parameters = vec![
        parameter("weights", 0..NUM_TRAINABLE),
        parameter("statistics", NUM_TRAINABLE..LEN),
    ];
    Weights::initial(Layout::with_buffers(parameters, 1).unwrap(), vec![1.0; LEN])
}

fn rule() -> Box<dyn UpdateRule> {
    Box::new(Sgd::with_momentum(0.9))
}

/// A server with a log, the checkpoint that the log continues, and the directory of both.
struct Run {
    server: ActorRef<ParameterServer>,
    log: UpdateLog,
    base: Checkpoint,
    directory: tempfile::TempDir,
}

/// Falls from update to update.
#[derive(Debug)]
struct Falling;

impl LearningRateSchedule for Falling {
    fn learning_rate(&mut self, version: Version) -> f64 {
        0.1 / (version.0 as f64).sqrt()
    }
}

fn start(config: LogConfig) -> Run {
    start_with(config, Clipping::Off, Sgd::with_momentum(0.9))
}

fn start_with(config: LogConfig, clipping: Clipping, rule: impl UpdateRule) -> Run {
    let directory = tempfile::tempdir().unwrap();
    let initial = initial();
    let settings = ServerConfig {
        consistency: Consistency::KofN { k: 1 },
        max_norm: 1e3,
        clipping,
        ..ServerConfig::default()
    };
    let server = ParameterServer::new(&initial, rule, settings).unwrap();
    let server = server.spawn().unwrap();
    let base = take(&server);
    let chain = Chain::of_nothing(directory.path()).unwrap();
    let log = UpdateLog::open(directory.path(), config, chain, facts(), None).unwrap();
    server.ask(LogUpdates(log.clone())).wait().unwrap().unwrap();
    Run {
        server,
        log,
        base,
        directory,
    }
}

fn facts() -> std::collections::BTreeMap<String, String> {
    [("the seed".to_owned(), "7".to_owned())].into()
}

fn take(server: &ActorRef<ParameterServer>) -> Checkpoint {
    Checkpoint::of(server.ask(TakeCheckpoint).wait().unwrap().unwrap()).unwrap()
}

fn update(worker: u32, incarnation: u64, clock: u64, size: f32) -> GradientUpdate {
    GradientUpdate {
        id: GradientId {
            worker: WorkerId(worker),
            incarnation: Incarnation(incarnation),
            clock: Clock(clock),
        },
        computed_on: Version(0),
        loss: 0.0,
        num_examples: 1,
        gradient: Gradient::with_buffers(
            (0..LEN)
                .map(|i| size * (i as f32 + 0.5))
                .collect::<Vec<_>>(),
            NUM_TRAINABLE,
        ),
    }
}

impl Run {
    fn apply(&self, updates: Vec<GradientUpdate>) -> Result<Weights, ServerError> {
        self.server
            .ask(ApplyGradients::mean(updates))
            .wait()
            .unwrap()
    }

    /// Everything that a log can have: joins, a push that is applied, one that is too late, one that is too
    /// large, and updates of a driver with one and two gradients.
    fn work(&self, round: u64) {
        let request = JoinRequest(round);
        let joined = self.server.ask(Join {
            worker: WorkerId(9),
            request,
        });
        let joined = joined.wait().unwrap().unwrap();
        let (incarnation, clock) = (joined.incarnation.0, joined.next_clock.0);
        for (step, size) in [(0, 0.25), (1, 0.5), (2, 1e9)] {
            let computed_on = match step {
                0 => joined.version,
                _ => Version(0),
            };
            let push = GradientUpdate {
                computed_on,
                ..update(9, incarnation, clock + step, size)
            };
            self.server.ask(Push(push)).wait().unwrap().unwrap();
        }
        self.apply(vec![update(0, 1, round, 0.5)]).unwrap();
        self.apply(vec![update(1, 4, round, 0.25), update(2, 1, round, -3.0)])
            .unwrap();
    }

    fn followed(&self) -> (Checkpoint, Chain) {
        follow(self.directory.path(), self.base.clone(), rule()).unwrap()
    }

    fn files(&self) -> Vec<String> {
        let files = fs::read_dir(self.directory.path()).unwrap();
        let mut files: Vec<_> = files
            .map(|file| file.unwrap().file_name().into_string().unwrap())
            .collect();
        files.sort_unstable();
        files
    }
}

/// Checks that a state has the same weights, the same state of the update rule and the same outcomes.
#[track_caller]
fn check_same(one: &Checkpoint, other: &Checkpoint) {
    assert_eq!(one.version(), other.version());
    assert_eq!(one.weights.to_vec(), other.weights.to_vec());
    assert_eq!(format!("{:?}", one.rule), format!("{:?}", other.rule));
    assert_eq!(one.learning_rate.to_bits(), other.learning_rate.to_bits());
    assert!(one.coordinator.has_same_outcomes(&other.coordinator));
}

/// S-15. The log has the learning rates and the factors, so who follows it needs neither settings nor schedule.
#[test]
fn a_log_is_followed_with_the_learning_rates_and_the_clipping_of_the_server() {
    let mut ends = Vec::new();
    for clipping in [Clipping::Off, Clipping::Norm(0.75), Clipping::Value(0.5)] {
        let rule = Scheduled::new(Sgd::with_momentum(0.9), Falling);
        let run = start_with(LogConfig::default(), clipping, rule);
        for round in 0..10 {
            run.work(round);
        }
        let expected = take(&run.server);
        check_same(&run.followed().0, &expected);
        ends.push(expected.weights.to_vec());
    }
    assert!(ends[0] != ends[1] && ends[1] != ends[2]);
}

/// S-15.
#[test]
fn a_state_that_follows_the_log_is_that_of_the_server() {
    let run = start(LogConfig::default());
    for round in 0..40 {
        run.work(round);
        let (followed, chain) = run.followed();
        let server = take(&run.server);
        check_same(&followed, &server);
        assert_eq!(followed.version(), Version(3 * (round + 1)));
        assert_eq!(followed.facts(), &facts());
        assert!(chain.unused.is_empty());
        // The checkpoint has begun a segment, which changes nothing.
        check_same(&run.followed().0, &server);
    }
}

#[test]
fn a_log_that_is_cut_or_damaged_anywhere_gives_an_earlier_state() {
    let run = start(LogConfig {
        sync: LogSync::Never,
        ..LogConfig::default()
    });
    let mut states = vec![run.base.clone()];
    for round in 0..3 {
        run.apply(vec![update(0, 1, round, 0.5)]).unwrap();
        states.push(run.followed().0);
    }
    let path = run.directory.path().join(&run.files()[0]);
    let whole = fs::read(&path).unwrap();
    let mut versions = std::collections::BTreeSet::new();
    let mut check = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        let (followed, chain) = run.followed();
        let version = followed.version();
        check_same(&followed, &states[version.0 as usize]);
        versions.insert(version);
        // Whoever goes on writes after what was followed, and nothing else is left.
        let config = LogConfig::default();
        UpdateLog::open(run.directory.path(), config, chain, facts(), None).unwrap();
        let (again, chain) = run.followed();
        check_same(&again, &followed);
        assert!(chain.unused.is_empty());
    };
    for len in 0..whole.len() {
        check(&whole[..len]);
    }
    for at in 0..whole.len() {
        let mut damaged = whole.clone();
        damaged[at] ^= 1 << (at % 8);
        check(&damaged);
    }
    // All states but the last one.
    assert_eq!(versions.len(), 3);
}

#[test]
fn segments_are_written_over_and_what_is_left_of_older_ones_does_not_count() {
    let mut run = start(LogConfig::default());
    let mut names = std::collections::BTreeSet::new();
    for round in 0..20 {
        // Ever less, so that more of the older segment is left behind the newer one.
        (0..20 - round).for_each(|step| run.work(100 * round + step));
        let server = take(&run.server);
        check_same(&run.followed().0, &server);
        let needed = run.base.version();
        run.base = server;
        run.log.free_before(needed);
        let files = run.files();
        assert!(files.len() <= 4, "{files:?}");
        names.extend(files);
    }
    assert_eq!(
        names.len(),
        21,
        "each segment has a name of its own: {names:?}"
    );
    let len = |name: &String| fs::metadata(run.directory.path().join(name)).unwrap().len();
    assert!(
        len(names.last().unwrap()) > 5_000,
        "it was written over a longer one"
    );
}

/// S-15: with a gap, nothing after the gap counts.
#[test]
fn a_missing_segment_ends_the_log() {
    let run = start(LogConfig::default());
    run.work(0);
    let middle = take(&run.server);
    run.work(1);
    take(&run.server);
    run.work(2);
    let files = run.files();
    fs::remove_file(run.directory.path().join(&files[1])).unwrap();
    let (followed, chain) = run.followed();
    check_same(&followed, &middle);
    assert_eq!(chain.unused.len(), 1);
    // A checkpoint of a time without a log is not followed by anything.
    fs::remove_file(run.directory.path().join(&files[0])).unwrap();
    assert_eq!(run.followed().0.version(), Version(0));
}

/// S-15: two servers never write one log.
#[test]
fn a_server_that_was_replaced_changes_nothing_and_answers_with_an_error() {
    let run = start(LogConfig::default());
    run.work(0);
    run.log.close();
    let before = run.followed().0;
    let refused = run.apply(vec![update(0, 1, 1, 0.5)]).unwrap_err();
    assert!(matches!(refused, ServerError::Stopping), "{refused}");
    let weights = run.server.ask(crate::server::GetWeights).wait().unwrap();
    assert_eq!(weights.version(), before.version());
    check_same(&run.followed().0, &before);
}

#[test]
fn a_full_disk_ends_the_log_until_the_next_checkpoint_and_not_the_training() {
    for sync in [LogSync::Never, LogSync::Always] {
        let mut run = start(LogConfig {
            sync,
            ..LogConfig::default()
        });
        run.work(0);
        let known = run.followed().0;
        run.log
            .write_to(File::options().write(true).open("/dev/full").unwrap());
        assert!(!run.log.is_full());
        run.work(1);
        assert_eq!(run.log.num_failures(), 1);
        check_same(&run.followed().0, &known);
        assert!(run.log.is_full(), "a checkpoint begins the log anew");
        run.base = take(&run.server);
        assert!(!run.log.is_full());
        run.work(2);
        check_same(&run.followed().0, &take(&run.server));
        assert_eq!(run.log.num_failures(), 1);
    }
}

/// A checkpoint at each update would not help.
#[test]
fn a_disk_that_stays_broken_is_not_tried_at_each_update() {
    let run = start(LogConfig {
        sync: LogSync::Never,
        ..LogConfig::default()
    });
    let break_file = || {
        let full = File::options().write(true).open("/dev/full").unwrap();
        run.log.write_to(full);
    };
    break_file();
    run.work(0);
    assert!(run.log.is_full());
    take(&run.server);
    break_file();
    run.work(1);
    assert_eq!(run.log.num_failures(), 2);
    assert!(!run.log.is_full());
    // No segment can be begun.
    let path = run.directory.path();
    let elsewhere = path.with_extension("elsewhere");
    fs::rename(path, &elsewhere).unwrap();
    take(&run.server);
    assert_eq!(run.log.num_failures(), 3);
    assert!(!run.log.is_full());
    run.work(2);
    assert!(!run.log.is_full());
    fs::rename(&elsewhere, path).unwrap();
}

/// A segment is of no use without a checkpoint that it continues.
#[test]
fn a_log_that_failed_is_tried_again_until_a_checkpoint_is_saved() {
    let run = start(LogConfig {
        sync: LogSync::Never,
        ..LogConfig::default()
    });
    assert_eq!(run.log.whole_until(), Some(Version(0)));
    run.log
        .write_to(File::options().write(true).open("/dev/full").unwrap());
    run.work(0);
    // The log begins anew, but this checkpoint cannot be written.
    let state = take(&run.server);
    assert!(!run.log.is_full() && !run.log.is_retried());
    run.log.not_saved();
    assert!(run.log.is_retried());
    assert_eq!(run.log.whole_until(), None);
    // One that is older than the gap is no help. The next one is.
    let next = take(&run.server);
    assert!(!run.log.is_retried());
    run.log.saved(Version(0));
    assert_eq!(run.log.whole_until(), None);
    run.log.saved(next.version());
    assert_eq!(run.log.whole_until(), Some(next.version()));
    run.log.not_saved();
    assert!(!run.log.is_retried(), "it is whole");
    let status = run.server.ask(GetStatus).wait().unwrap().log.unwrap();
    assert_eq!(status.since, Some(state.version()));
}

/// A segment that is not found under its name is lost as a whole.
#[test]
fn the_names_of_segments_are_synced_like_their_entries() {
    let run = start(LogConfig {
        sync: LogSync::Every(std::time::Duration::from_secs(3600)),
        ..LogConfig::default()
    });
    let path = run.directory.path();
    let elsewhere = path.with_extension("elsewhere");
    let sync_without_directory = || {
        fs::rename(path, &elsewhere).unwrap();
        run.log.sync();
        fs::rename(&elsewhere, path).unwrap();
        run.log.num_failures()
    };
    run.work(0);
    run.log.sync();
    run.work(1);
    assert_eq!(sync_without_directory(), 0, "there is no new name");
    take(&run.server);
    assert_eq!(sync_without_directory(), 1);
}

#[test]
fn workers_that_are_dealt_the_data_anew_stay_so() {
    let run = start(LogConfig::default());
    run.work(0);
    let (followed, chain) = run.followed();
    let clock = Clock(1000);
    let dealt = followed.restart_workers_at(clock);
    let config = LogConfig::default();
    let directory = run.directory.path();
    let log = UpdateLog::open(directory, config, chain, facts(), dealt.restarted_at).unwrap();
    let settings = ServerConfig {
        max_norm: 1e3,
        ..ServerConfig::default()
    };
    let server = ParameterServer::new(&dealt, Sgd::with_momentum(0.9), settings).unwrap();
    let server = server.spawn().unwrap();
    server.ask(LogUpdates(log.clone())).wait().unwrap().unwrap();
    // What was followed should not have to be followed again.
    assert!(log.is_full());
    let push = update(0, 1, clock.0, 0.5);
    server
        .ask(ApplyGradients::mean([push]))
        .wait()
        .unwrap()
        .unwrap();
    let (followed, _) = run.followed();
    check_same(&followed, &take(&server));
    assert_eq!(followed.next_clock(WorkerId(0)), Clock(1001));
    assert_eq!(followed.next_clock(WorkerId(5)), clock);
    assert!(!log.is_full(), "a checkpoint was taken");
}

#[test]
fn a_rule_of_another_kind_is_refused() {
    let run = start(LogConfig::default());
    run.work(0);
    let base = take(&run.server);
    run.work(1);
    let error = follow(run.directory.path(), base, Box::new(Sgd::new())).unwrap_err();
    assert!(error.to_string().contains("another run"), "{error}");
}

#[test]
fn a_log_that_is_full_says_so_until_a_checkpoint_begins_a_new_segment() {
    let run = start(LogConfig {
        max_bytes: 2000,
        ..LogConfig::default()
    });
    let num_rounds = (0..100).take_while(|&round| {
        run.work(round);
        !run.log.is_full()
    });
    assert!((2..50).contains(&num_rounds.count()));
    ps_runtime::actor::run(run.log.became_full());
    take(&run.server);
    assert!(!run.log.is_full());
}

#[test]
fn nothing_of_a_run_that_begins_anew_continues_an_older_one() {
    let run = start(LogConfig::default());
    run.work(0);
    let chain = Chain::of_nothing(run.directory.path()).unwrap();
    let config = LogConfig::default();
    let log = UpdateLog::open(run.directory.path(), config, chain, facts(), None).unwrap();
    log.rotate(Version(0));
    assert_eq!(run.followed().0.version(), Version(0));
    let directory = CheckpointDir::open(run.directory.path()).unwrap();
    assert!(directory.newest(|_| Ok(())).unwrap().is_none());
}

#[test]
fn a_server_says_what_there_is_of_its_log() {
    // A sync would be another failure.
    let mut run = start(LogConfig {
        sync: LogSync::Never,
        ..LogConfig::default()
    });
    let status = |run: &Run| run.server.ask(GetStatus).wait().unwrap().log.unwrap();
    let on_disk = |run: &Run| {
        let files = run.files().into_iter();
        let sizes = files.map(|name| fs::metadata(run.directory.path().join(name)).unwrap().len());
        sizes.sum::<u64>()
    };
    let expected = |run: &Run, since, num_segments| LogStatus {
        since: Some(Version(since)),
        bytes: on_disk(run),
        num_segments,
        is_written: true,
        num_failures: 0,
    };
    run.work(0);
    assert_eq!(status(&run), expected(&run, 0, 1));
    run.base = take(&run.server);
    run.work(1);
    assert_eq!(status(&run), expected(&run, 0, 2));
    // Whoever goes on from there knows the size of what is there.
    let bytes = on_disk(&run);
    let sizes = run.followed().1.segments;
    assert_eq!(sizes.iter().map(|one| one.num_bytes).sum::<u64>(), bytes);
    // The first segment is a spare file now.
    run.log.free_before(run.base.version());
    let one = status(&run);
    assert_eq!((one.since, one.num_segments), (Some(Version(3)), 1));
    assert!(one.bytes > 0 && one.bytes < bytes, "{one:?}");
    run.log
        .write_to(File::options().write(true).open("/dev/full").unwrap());
    run.work(2);
    let failed = status(&run);
    assert_eq!((failed.is_written, failed.num_failures), (false, 1));
    assert_eq!((failed.since, failed.bytes), (one.since, one.bytes));
}
