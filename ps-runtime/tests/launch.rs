//! Real processes: however their driver ends, its copies end, and in a known order.
//!
//! Each test starts this very test program once more, as a driver; the driver's `ProcessGroup`
//! starts it again, as copies. `play_a_role` is what they all run. Copies inherit the driver's
//! standard output, which is a pipe to the test: what is said there is what the tests see, and its
//! end says that driver and copies are gone, all of them. So no test sleeps or asks for pids.

#![cfg(target_os = "linux")]

use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio, exit};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use ps_runtime::cluster::{Cluster, ClusterConfig, Hosts, Node, Transport};
use ps_runtime::launch::{self, Exited, LaunchOptions, ProcessConfig, ProcessError, ProcessGroup};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, kill_process_group, wait};

/// What copies do: see [`copy`].
const ROLE: &str = "PS_LAUNCH_TEST_ROLE";

/// The driver that a process with the role `node` joins.
const DRIVER: &str = "PS_LAUNCH_TEST_DRIVER";

/// The limit of all waits. Only a failing test waits this long.
const PATIENCE: Duration = Duration::from_secs(30);

/// A grace that is so long that a test which waits for its end fails.
const LONG: Duration = Duration::from_secs(600);

// The driver and its copies.

/// Not a test: what this program does when a test, or a driver, starts it again.
#[test]
fn play_a_role() {
    let Ok(role) = std::env::var(ROLE) else {
        return;
    };
    launch::die_with_parent().unwrap();
    if role == "refused" && std::env::var_os(launch::env::PARENT_PID).is_some() {
        let hosts = Hosts::new().must_agree("its role", "node");
        let launched = Cluster::launch(&LaunchOptions::default(), ClusterConfig::default(), hosts);
        exit(launched.unwrap_err().exit_code().into());
    }
    if role == "node" {
        let driver = std::env::var(DRIVER).unwrap();
        let mut config = ClusterConfig::default();
        config.net.process_lease = LONG;
        let node = Node::new(config, 1, 0, driver, Hosts::new());
        node.serve().wait().unwrap();
        exit(0);
    }
    match launch::from_env(launch::env::read).unwrap() {
        Some(place) if std::env::var_os(launch::env::PARENT_PID).is_some() => copy(&role, &place),
        _ => driver(&role),
    }
}

/// Leaves when asked to, unless it is stubborn.
fn copy(role: &str, place: &launch::Place) {
    actix_rt::System::new().block_on(async {
        let terminated = launch::terminated().unwrap();
        let launch::Place {
            rank,
            world_size,
            attempt,
            rendezvous,
            ..
        } = place;
        let token = std::env::var(launch::env::TOKEN).unwrap();
        let foreign = std::env::var("MASTER_ADDR").is_ok();
        let address = rendezvous.as_ref().unwrap();
        say(&format!(
            "{rank}/{world_size}#{attempt} at {address} token {token} foreign {foreign}"
        ));
        match role {
            "obedient" => drop(terminated.await),
            "stubborn" => std::future::pending().await,
            "mixed" if *rank == 1 => drop(terminated.await),
            "mixed" => std::future::pending().await,
            "crashing" if *attempt == 0 => exit(3),
            "crashing" => drop(terminated.await),
            _ => panic!("no such role: {role}"),
        }
    });
    exit(launch::EXIT_OK.into());
}

/// Starts copies, unless its role does that by itself. Then it runs the commands of its standard input, one
/// per line, and ends at the end of the input.
fn driver(role: &str) {
    let runtime = actix_rt::System::new();
    let mut group = (role != "refused").then(|| runtime.block_on(async { start_group() }));
    let mut terminated = None;
    for line in io::stdin().lines().map_while(Result::ok) {
        let (command, argument) = line.split_once(' ').unwrap_or((&line, ""));
        let number = argument.parse::<u32>();
        let running = group.as_mut();
        match command {
            "exited" => match runtime.block_on(running.unwrap().exited()) {
                Some(exited) => say_exited(exited),
                None => say("nobody runs"),
            },
            "look" => match running.unwrap().try_wait(number.unwrap()) {
                Ok(Some(exited)) => say_exited(exited),
                Ok(None) => say("runs"),
                Err(error) => say(&error.to_string()),
            },
            "restart" => match running.unwrap().restart(number.unwrap()) {
                Ok(attempt) => say(&format!("attempt {attempt}")),
                Err(error) => say(&error.to_string()),
            },
            "kill" => running.unwrap().kill(number.unwrap()).unwrap(),
            "shutdown" => {
                let grace = Duration::from_millis(number.unwrap().into());
                let ends = runtime.block_on(group.take().unwrap().shutdown(grace));
                ends.into_iter().for_each(say_exited);
                say_children();
            }
            "abandon-shutdown" => {
                let shutdown = group.take().unwrap().shutdown(LONG);
                runtime.block_on(async {
                    let moment = Duration::from_millis(1);
                    assert!(tokio::time::timeout(moment, shutdown).await.is_err());
                });
                say_children();
            }
            "panic" => {
                let group = group.take().unwrap();
                let result = catch_unwind(AssertUnwindSafe(|| {
                    let _group = group;
                    panic!("on purpose");
                }));
                assert!(result.is_err());
                say_children();
            }
            "launch" => {
                let options = LaunchOptions::processes(3);
                let hosts = Hosts::new().must_agree("its role", "driver");
                match Cluster::launch(&options, ClusterConfig::default(), hosts) {
                    Ok(_) => say("launched"),
                    Err(error) => say(&format!("{}: {error}", error.exit_code())),
                }
            }
            "exit" => exit(0),
            "listen" => {
                let signals = runtime.block_on(async { launch::terminated() });
                terminated = Some(signals.unwrap());
                say("listens");
            }
            "until-terminated" => {
                let signal = runtime.block_on(terminated.take().unwrap());
                say(&signal.to_string());
            }
            _ => panic!("no such command: {line}"),
        }
    }
}

fn start_group() -> ProcessGroup {
    ProcessGroup::start(ProcessConfig {
        world_size: 3,
        rendezvous: "127.0.0.1:4000".parse().unwrap(),
        token: Some("hush".to_owned()),
        run_id: None,
    })
    .unwrap()
}

fn say_exited(exited: Exited) {
    let Exited {
        rank,
        attempt,
        status,
    } = exited;
    let status = status.unwrap();
    match (status.code(), status.signal()) {
        (Some(code), _) => say(&format!("{rank}#{attempt} left with {code}")),
        (_, Some(signal)) => say(&format!("{rank}#{attempt} died of {signal}")),
        _ => unreachable!("a process ends by a code or by a signal"),
    }
}

/// Whether this process has children, dead ones that nobody has waited for among them.
fn say_children() {
    match wait(WaitOptions::NOHANG) {
        Err(rustix::io::Errno::CHILD) => say("no children"),
        other => say(&format!("children: {other:?}")),
    }
}

/// Says a line to the test. In one write, so that lines of several processes do not mix; on a line
/// of its own, and marked, because the test harness writes to the same place.
fn say(line: &str) {
    let mut out = io::stdout().lock();
    out.write_all(format!("\n@{line}\n").as_bytes()).unwrap();
    out.flush().unwrap();
}

// The test's side.

/// A driver with two copies, and what they say.
struct Driver {
    process: Child,
    commands: Option<ChildStdin>,
    lines: Receiver<String>,
}

impl Driver {
    /// Starts one, in a process group of its own as a shell does, and waits until both copies are
    /// ready.
    fn start(role: &str) -> Self {
        let driver = Self::start_unready(role);
        let mut ranks: Vec<String> = (0..2).map(|_| driver.line()).collect();
        ranks.sort();
        assert!(ranks[0].starts_with("1/3#0"), "{ranks:?}");
        assert!(ranks[1].starts_with("2/3#0"), "{ranks:?}");
        driver
    }

    fn start_unready(role: &str) -> Self {
        let mut command = play(role);
        // What an outer launcher leaves behind.
        command.env("RANK", "0").env("WORLD_SIZE", "1");
        command.env("MASTER_ADDR", "elsewhere");
        command.stdin(Stdio::piped()).process_group(0);
        let mut process = command.spawn().unwrap();
        let lines = listen(&mut process);
        Self {
            commands: process.stdin.take(),
            process,
            lines,
        }
    }

    fn tell(&mut self, command: &str) {
        let commands = self.commands.as_mut().unwrap();
        writeln!(commands, "{command}").unwrap();
    }

    /// Returns the next line.
    fn line(&self) -> String {
        let line = self.lines.recv_timeout(PATIENCE);
        line.expect("the driver, or a copy, says something")
    }

    #[track_caller]
    fn expect(&self, expected: &str) {
        assert_eq!(self.line(), expected);
    }

    /// Expects lines in any order.
    #[track_caller]
    fn expect_all(&self, expected: &[&str]) {
        let mut lines: Vec<String> = expected.iter().map(|_| self.line()).collect();
        lines.sort();
        assert_eq!(lines, expected);
    }

    fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.process)
    }

    /// Waits until the driver and all copies are gone, and returns how the driver ended.
    #[track_caller]
    fn all_gone(&mut self) -> ExitStatus {
        assert_silence_until_end(&self.lines);
        self.process.wait().unwrap()
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        // Its copies follow.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// This program, to be started in a role.
fn play(role: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["play_a_role", "--exact", "--nocapture"])
        .env(ROLE, role)
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    command
}

/// Passes lines on until all processes that could write have ended.
fn listen(process: &mut Child) -> Receiver<String> {
    let output = BufReader::new(process.stdout.take().unwrap());
    let (sender, lines) = channel();
    thread::spawn(move || {
        for line in output.lines().map_while(Result::ok) {
            if let Some(line) = line.strip_prefix('@')
                && sender.send(line.to_owned()).is_err()
            {
                return;
            }
        }
    });
    lines
}

#[track_caller]
fn assert_silence_until_end(lines: &Receiver<String>) {
    let deadline = Instant::now() + PATIENCE;
    match lines.recv_timeout(deadline - Instant::now()) {
        Err(RecvTimeoutError::Disconnected) => {}
        Err(RecvTimeoutError::Timeout) => panic!("somebody is still there"),
        Ok(line) => panic!("somebody says {line:?}"),
    }
}

// The tests.

#[test]
fn copies_are_told_their_places_and_nothing_of_an_outer_launcher() {
    let mut driver = Driver::start_unready("obedient");
    driver.expect_all(&[
        "1/3#0 at 127.0.0.1:4000 token hush foreign false",
        "2/3#0 at 127.0.0.1:4000 token hush foreign false",
    ]);
    driver.tell("look 1");
    driver.expect("runs");
    driver.tell("look 0");
    driver.expect("the group has no rank 0: it started ranks 1 to 2, rank 0 is the driver");
    driver.tell("look 3");
    driver.expect("the group has no rank 3: it started ranks 1 to 2, rank 0 is the driver");
}

/// If a start would fail again, the driver does not wait for that copy.
#[test]
fn a_driver_whose_copies_are_refused_does_not_wait_for_them() {
    let mut driver = Driver::start_unready("refused");
    driver.tell("launch");
    let said = driver.line();
    assert!(
        said.starts_with("64: 0 of 2 nodes have joined, and no more will; rank ")
            && said.contains("its role is node here, but driver in the driver"),
        "{said}"
    );
    drop(driver.commands.take());
    assert!(driver.all_gone().success());
}

#[test]
fn copies_that_leave_when_asked_to_are_not_killed() {
    let mut driver = Driver::start("obedient");
    driver.tell(&format!("shutdown {}", LONG.as_millis()));
    driver.expect_all(&["1#0 left with 0", "2#0 left with 0", "no children"]);
    drop(driver.commands.take());
    assert!(driver.all_gone().success());
}

#[test]
fn a_copy_that_ignores_sigterm_is_killed_after_the_grace() {
    let mut driver = Driver::start("mixed");
    driver.tell("shutdown 3000");
    driver.expect("1#0 left with 0");
    driver.expect("2#0 died of 9");
    driver.expect("no children");
}

#[test]
fn a_shutdown_that_is_abandoned_still_ends_all_copies() {
    let mut driver = Driver::start("stubborn");
    driver.tell("abandon-shutdown");
    driver.expect("no children");
}

#[test]
fn a_panic_of_the_driver_ends_all_copies() {
    let mut driver = Driver::start("mixed");
    driver.tell("panic");
    driver.expect("no children");
}

#[test]
fn a_driver_that_exits_without_clean_up_takes_all_copies_along() {
    let mut driver = Driver::start("stubborn");
    driver.tell("exit");
    assert!(driver.all_gone().success());
}

#[test]
fn kill_9_of_the_driver_ends_all_copies() {
    let mut driver = Driver::start("stubborn");
    driver.signal(Signal::KILL);
    assert_eq!(driver.all_gone().signal(), Some(9));
}

#[test]
fn a_signal_that_only_the_driver_gets_and_does_not_handle_ends_all_copies() {
    let mut driver = Driver::start("stubborn");
    driver.signal(Signal::TERM);
    assert_eq!(driver.all_gone().signal(), Some(15));
}

#[test]
fn a_sigint_that_only_the_driver_gets_lets_it_end_its_copies() {
    let mut driver = Driver::start("obedient");
    driver.tell("listen");
    driver.expect("listens");
    driver.signal(Signal::INT);
    driver.tell("until-terminated");
    driver.expect("SIGINT");
    driver.tell(&format!("shutdown {}", LONG.as_millis()));
    driver.expect_all(&["1#0 left with 0", "2#0 left with 0", "no children"]);
}

/// The driver may still need its copies to end in order.
#[test]
fn a_ctrl_c_that_all_get_is_left_to_the_driver() {
    let mut driver = Driver::start("obedient");
    driver.tell("listen");
    driver.expect("listens");
    kill_process_group(driver.pid(), Signal::INT).unwrap();
    driver.tell("until-terminated");
    driver.expect("SIGINT");
    for rank in [1, 2] {
        driver.tell(&format!("look {rank}"));
        driver.expect("runs");
    }
    driver.tell("kill 1");
    driver.tell("exited");
    driver.expect("1#0 died of 9");
    driver.tell(&format!("shutdown {}", LONG.as_millis()));
    driver.expect_all(&["2#0 left with 0", "no children"]);
    drop(driver.commands.take());
    assert!(driver.all_gone().success());
}

#[test]
fn a_restarted_rank_has_a_higher_attempt() {
    let mut driver = Driver::start("crashing");
    driver.tell("exited");
    driver.tell("exited");
    driver.expect_all(&["1#0 left with 3", "2#0 left with 3"]);
    driver.tell("restart 2");
    driver.expect_all(&[
        "2/3#1 at 127.0.0.1:4000 token hush foreign false",
        "attempt 1",
    ]);
    driver.tell("restart 2");
    driver.expect(&ProcessError::StillRunning { rank: 2 }.to_string());
    driver.tell("kill 2");
    driver.tell("exited");
    driver.expect("2#1 died of 9");
    driver.tell("look 2");
    driver.expect("2#1 died of 9");
    // Killing a process that has ended is not an error.
    driver.tell("kill 2");
    driver.tell("restart 2");
    driver.expect_all(&[
        "2/3#2 at 127.0.0.1:4000 token hush foreign false",
        "attempt 2",
    ]);
    driver.tell(&format!("shutdown {}", LONG.as_millis()));
    driver.expect("2#2 left with 0");
    driver.expect("no children");
}

#[test]
fn a_copy_whose_parent_is_gone_already_leaves_at_once() {
    let mut command = play("stubborn");
    command.env(launch::env::PARENT_PID, i32::MAX.to_string());
    let mut process = command.spawn().unwrap();
    let lines = listen(&mut process);
    assert_silence_until_end(&lines);
    assert_eq!(process.wait().unwrap().code(), Some(1));
}

/// The driver did not start the node, so it learns of its end from the connection alone.
#[test]
fn a_node_that_is_killed_is_lost_without_waiting_for_the_lease() {
    for transport in [Transport::Sockets, Transport::Tcp] {
        let mut config = ClusterConfig {
            transport,
            ..ClusterConfig::default()
        };
        config.net.process_lease = LONG;
        let cluster = Cluster::listen(config, ([127, 0, 0, 1], 0).into(), Hosts::new()).unwrap();
        let driver = cluster.address().expect("it listens").to_string();
        let mut node = play("node").env(DRIVER, driver).spawn().unwrap();
        cluster.wait_for_nodes(1, PATIENCE).wait().unwrap();
        node.kill().unwrap();
        node.wait().unwrap();
        let deadline = Instant::now() + PATIENCE;
        while !cluster.nodes().is_empty() {
            assert!(Instant::now() < deadline, "the driver waits for the lease");
            thread::yield_now();
        }
    }
}
