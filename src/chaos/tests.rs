use ps_actors::weights::Layout;

use super::*;

fn setting() -> Setting {
    Setting {
        rank: 0,
        is_alone: false,
        num_workers: 2,
        num_servers: 3,
        num_servers_in_driver: 1,
        workers_call_servers: true,
        learner_processes: None,
        checkpoint_dir: Some("runs/one".into()),
        resumes: false,
        has_control: false,
    }
}

#[test]
fn an_interrupted_run_is_not_compared_with_a_whole_one() {
    let setting = Setting {
        has_control: true,
        ..setting()
    };
    let plan: Plan = "".parse().unwrap();
    let chaos = Chaos {
        on: Some(On {
            ledger: Arc::new(Ledger::new(plan.clone(), None, false)),
            plan,
            setting,
            started: Instant::now(),
            monitor: None,
            num_applied_before: 0,
        }),
    };
    let done = Done {
        num_expected: None,
        num_settled: 0,
        num_applied: 0,
        num_applied_before: 0,
        weights: Weights::initial(Layout::flat(1), vec![0.0]),
        is_repeatable: true,
    };
    // It would be an error: this program does not know the flags of such a run.
    let report = chaos.finish(&done).unwrap().expect("there is a plan");
    assert!(report.control.is_none() && report.has_same_weights.is_none());
    assert!(report.is_good());
}

fn refused(plan: &str, setting: &Setting) -> String {
    let plan = plan.parse().unwrap();
    let error = check(&plan, setting).err();
    error.map_or(String::new(), |error| error.to_string())
}

#[test]
fn what_cannot_be_done_is_refused_with_a_sentence() {
    let all = "kill worker 1 @ step 4; stop worker 0 for 1s @ step 3; kill server 2 @ version 9; \
               stop server 0 for 1s @ version 2; damage checkpoint @ version 30; drop 5%; dup 2%; delay 1..2ms";
    assert_eq!(refused(all, &setting()), "");
    for (plan, says) in [
        (
            "kill worker 2 @ step 4",
            "there is no worker 2; they are numbered from 0 to 1",
        ),
        ("stop server 3 for 1s @ version 4", "there is no server 3"),
        ("lose power @ version 3", "the simulator can"),
    ] {
        let refused = refused(plan, &setting());
        assert!(refused.contains(says), "{refused}");
    }
    let unsaved = Setting {
        checkpoint_dir: None,
        ..setting()
    };
    let alone = Setting {
        is_alone: true,
        ..unsaved.clone()
    };
    let by_driver = Setting {
        workers_call_servers: false,
        ..setting()
    };
    assert_eq!(refused("kill worker 1 @ step 4", &unsaved), "");
    let learner = Setting {
        num_workers: 5,
        num_servers: 1,
        learner_processes: Some(3),
        ..unsaved.clone()
    };
    let all = "kill worker 1 @ step 4; kill worker 4 @ step 4; stop worker 0 for 1s @ step 3; \
               stop server 0 for 1s @ version 2; drop 5%; dup 2%; delay 1..2ms";
    assert_eq!(refused(all, &learner), "");
    for (plan, setting, says) in [
        (
            "kill worker 1 @ step 4",
            &alone,
            "in the driver's process: add --checkpoint-dir",
        ),
        (
            "kill server 0 @ version 4",
            &unsaved,
            "in the driver's process",
        ),
        (
            "kill server 2 @ version 4",
            &unsaved,
            "the weights of a server are lost",
        ),
        ("damage checkpoint @ version 4", &unsaved, "no checkpoints"),
        ("drop 5%", &alone, "`drop`: no process calls"),
        ("delay 1..2ms", &by_driver, "`delay`: no process calls"),
        (
            "kill worker 3 @ step 4",
            &learner,
            "not for burn's learner: this worker is in the driver's process",
        ),
        ("kill worker 5 @ step 4", &learner, "there is no worker 5"),
        (
            "kill worker 6 @ step 4",
            &learner,
            "they are numbered from 0 to 4",
        ),
        (
            "kill server 0 @ version 4",
            &learner,
            "its only server is in the driver's process",
        ),
        ("damage checkpoint @ version 4", &learner, "no checksums"),
    ] {
        let refused = refused(plan, setting);
        assert!(refused.contains(says), "{plan}: {refused}");
    }
}
