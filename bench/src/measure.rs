//! How a contender of ours measures itself and tells it, line by line on standard output. The rivals
//! do the same in `rivals/common.py`; the two must stay alike.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::Result;

/// What a contender says before each of its words.
pub(crate) const PREFIX: &str = "@bench ";

/// Numbers by name, such as `gradients_per_second`.
pub(crate) type Metrics = BTreeMap<String, f64>;

/// What is trained, and for how long.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Training {
    /// `convnet`, of 2 thousand weights, or `net`, of 1.2 million.
    #[arg(long, default_value = "convnet")]
    pub(crate) model: String,
    #[arg(long, default_value_t = 128)]
    pub(crate) batch_size: usize,
    #[arg(long, default_value_t = 0.1)]
    pub(crate) learning_rate: f64,
    /// Length of the timed part.
    #[arg(long, default_value_t = 3.0)]
    pub(crate) seconds: f64,
    /// Train up to this accuracy first, in percent.
    #[arg(long, default_value_t = 0.0)]
    pub(crate) target: f64,
    /// But for no longer than this.
    #[arg(long, default_value_t = 60.0)]
    pub(crate) max_seconds: f64,
    /// In steps of each worker.
    #[arg(long, default_value_t = 25)]
    pub(crate) evaluate_every: u64,
    /// How many test images are looked at.
    #[arg(long, default_value_t = 10_000)]
    pub(crate) num_test: usize,
}

pub(crate) fn say(words: &str) {
    println!("{PREFIX}{words}");
}

pub(crate) fn say_result(metrics: &Metrics) -> Result<()> {
    say(&format!("result {}", serde_json::to_string(metrics)?));
    Ok(())
}

/// Measures `train(steps)`, in which each worker takes that many steps: a first step; steps up to the
/// wanted accuracy, where evaluations take no part in the time; a timed part.
///
/// `evaluate` returns the percentage of right answers.
pub(crate) fn measure(
    settings: &Training,
    num_workers: usize,
    mut train: impl FnMut(u64) -> Result<()>,
    mut evaluate: impl FnMut() -> Result<f64>,
) -> Result<()> {
    train(1)?;
    say("first");
    let gradients = |steps: u64| (steps * num_workers as u64) as f64;
    let (mut metrics, mut seconds, mut steps) = (Metrics::new(), 0.0, 0);
    let mut wanted = [90, 95, 97].into_iter().peekable();
    let is_wanted = |mark: &i32| f64::from(*mark) <= settings.target;
    while wanted.peek().is_some_and(is_wanted) && seconds < settings.max_seconds {
        seconds += timed(|| train(settings.evaluate_every))?;
        steps += settings.evaluate_every;
        let accuracy = evaluate()?;
        while let Some(mark) =
            wanted.next_if(|mark| is_wanted(mark) && accuracy >= f64::from(*mark))
        {
            metrics.insert(format!("seconds_to_{mark}"), seconds);
            metrics.insert(format!("gradients_to_{mark}"), gradients(steps));
        }
    }
    if steps == 0 {
        steps = match settings.model.as_str() {
            "convnet" => settings.evaluate_every,
            _ => 2,
        };
        seconds = timed(|| train(steps))?;
    }
    let steps = (settings.seconds * steps as f64 / seconds).round().max(1.0) as u64;
    say("begin");
    let seconds = timed(|| train(steps))?;
    say("end");
    metrics.insert("gradients".into(), gradients(steps));
    metrics.insert("gradients_per_second".into(), gradients(steps) / seconds);
    metrics.insert("accuracy".into(), evaluate()?);
    say_result(&metrics)
}

fn timed(work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let start = Instant::now();
    work()?;
    Ok(start.elapsed().as_secs_f64())
}

/// Repeats a call for some time, and puts the quantiles of its duration under `name`.
pub(crate) fn measure_call(
    metrics: &mut Metrics,
    name: &str,
    seconds: f64,
    mut call: impl FnMut() -> Result<()>,
) -> Result<()> {
    for _ in 0..3 {
        call()?;
    }
    let length = Duration::from_secs_f64(seconds);
    let (start, mut times) = (Instant::now(), Vec::new());
    while times.len() < 5 || start.elapsed() < length {
        times.push(timed(&mut call)?);
    }
    times.sort_by(f64::total_cmp);
    let at = |q: f64| 1e3 * times[((q * times.len() as f64) as usize).min(times.len() - 1)];
    metrics.insert(format!("{name}_p50_ms"), at(0.5));
    metrics.insert(format!("{name}_p99_ms"), at(0.99));
    metrics.insert(format!("{name}_count"), times.len() as f64);
    Ok(())
}
