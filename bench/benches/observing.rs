//! What observing a training costs: gradients per second with everything on, against everything off. `ConvNet`, batch 128,
//! two workers, `asp`, in one process. The runs come in turn, off, on, and off again, ten times. A run that is on is compared
//! with the mean of the two around it, so a machine that becomes slower or faster does not count. The two that are off show
//! the noise.
//! On: the progress bar, drawn to a terminal that nobody sees, the run directory, event files for TensorBoard, a trace, traces for
//! OpenTelemetry, which a collector on this machine takes and forgets, metrics, which are fetched once per second, and the
//! dashboard, whose stream of events is read all the time, as a browser with the page does. The processor time per gradient
//! is compared, too, because it varies less on a busy machine. It includes that of the threads that play the browser and the
//! collector, and that of drawing the pictures after the training, which the speed does not.
//!
//! What is left of it with everything off cannot be switched off, so it has no other run beside it. It is that each step
//! reads the clock, nowhere more often than [`NUM_READINGS`] times, and makes a record that nobody keeps. The time of
//! these readings is compared with the processor time of a gradient.
//!
//! `cargo bench -p ps-bench --bench observing`. The files are in `$PS_BENCH_DIR`, or in a temporary directory.

mod pairs;

use std::fmt;
use std::hint::black_box;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use ps::cli::Progress;
use ps::controls::Controls;
use ps::dashboard::{Dashboard, DashboardConfig};
use ps::metrics::Exporter;
use ps::otel::OpenTelemetry;
use ps::prelude::*;
use ps::runs::RunDir;
use ps::tensorboard::TensorBoard;
use ps::trace::Trace;

use pairs::{processor_seconds, spread};

const NUM_ROUNDS: usize = 10;

/// Of each worker.
const NUM_STEPS: u64 = 3000;

/// How often the clock is read for one gradient: by a worker's data 2 times, its loop 5, the first server 4.
const NUM_READINGS: u32 = 11;

fn main() -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let directory = std::env::var_os("PS_BENCH_DIR").map(std::path::PathBuf::from);
    let directory = directory.unwrap_or_else(|| temporary.path().to_owned());
    let mnist = Mnist::load(&MnistOptions::default())?;
    // The first run warms caches up.
    train(&mnist, None)?;
    let (mut speeds, mut noises) = (Vec::new(), Vec::new());
    let (mut costs, mut noises_of_costs) = (Vec::new(), Vec::new());
    let mut remains = Vec::new();
    for round in 0..NUM_ROUNDS {
        let off = train(&mnist, None)?;
        let on = train(&mnist, Some(&directory.join(format!("round-{round}"))))?;
        let again = train(&mnist, None)?;
        println!("round {round}: off {off}, on {on}, off again {again}");
        speeds.push(2.0 * on.speed / (off.speed + again.speed));
        noises.push(again.speed / off.speed);
        costs.push(2.0 * on.cost / (off.cost + again.cost));
        noises_of_costs.push(again.cost / off.cost);
        remains.push(100.0 * f64::from(NUM_READINGS) * reading_of_the_clock() / off.cost);
    }
    println!("speed, on / off: {}", spread(&mut speeds));
    println!("speed, off / off: {}", spread(&mut noises));
    println!("processor time, on / off: {}", spread(&mut costs));
    println!(
        "processor time, off / off: {}",
        spread(&mut noises_of_costs)
    );
    let remains = spread(&mut remains);
    println!("{NUM_READINGS} readings of the clock, in percent of a gradient, off: {remains}");
    Ok(())
}

/// What a training took.
struct Took {
    /// In gradients per second.
    speed: f64,
    /// Processor time per gradient, in seconds.
    cost: f64,
}

impl fmt::Display for Took {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.1}/s and {:.3} ms", self.speed, 1e3 * self.cost)
    }
}

fn train(mnist: &Mnist, observed: Option<&Path>) -> Result<Took> {
    let begun = processor_seconds()?;
    let report = run(mnist, observed)?;
    let used = processor_seconds()? - begun;
    Ok(Took {
        speed: report.gradients_per_second(),
        cost: used / report.num_applied as f64,
    })
}

/// How long one reading takes, in seconds.
fn reading_of_the_clock() -> f64 {
    const NUM: u32 = 1_000_000;
    let started = Instant::now();
    for _ in 0..NUM {
        black_box(Instant::now());
    }
    started.elapsed().as_secs_f64() / f64::from(NUM)
}

/// Trains once.
fn run(mnist: &Mnist, observed: Option<&Path>) -> Result<Report> {
    let device = select_device(default_device_name())?;
    let trainer = Trainer::new(ConvNet::init(0, &device), mnist.train.clone())
        .device(&device)
        .workers(2)
        .batch_size(128)
        .consistency(Consistency::Asp)
        .iterations(NUM_STEPS);
    let Some(directory) = observed else {
        return Ok(trainer.run()?);
    };
    let exporter = Exporter::new();
    let listener = exporter.listen(([127, 0, 0, 1], 0).into(), None)?;
    let (address, (end, ended)) = (listener.address(), channel::<()>());
    let scraper = std::thread::spawn(move || -> Result<usize> {
        let mut num_read = 0;
        while let Err(RecvTimeoutError::Timeout) = ended.recv_timeout(Duration::from_secs(1)) {
            num_read += fetch(address)?;
        }
        Ok(num_read)
    });
    let (controls, (ready, page)) = (Controls::new(), channel());
    let dashboard = DashboardConfig {
        address: ([127, 0, 0, 1], 0).into(),
        on_ready: Arc::new(move |address| _ = ready.send(address)),
        ..DashboardConfig::default()
    };
    let dashboard = Dashboard::new(dashboard, &controls)?;
    let browser = std::thread::spawn(move || -> Result<usize> {
        let address = page.recv().context("the page is not served")?;
        count_events(address)
    });
    let (collector, is_over) = (TcpListener::bind(("127.0.0.1", 0))?, Arc::default());
    let collector_at = collector.local_addr()?;
    let must_end = Arc::clone(&is_over);
    let collector = std::thread::spawn(move || take_spans(&collector, &must_end));
    let report = trainer
        .observe(Progress::unseen())
        .observe(RunDir::new(directory))
        .observe(TensorBoard::new(directory))
        .observe(Trace::new(&directory.join("trace.json")))
        .observe(OpenTelemetry::new(
            format!("http://{collector_at}").parse()?,
        ))
        .observe(exporter.observer())
        .observe(dashboard)
        .controls(&controls)
        .run()?;
    drop(end);
    is_over.store(true, Ordering::SeqCst);
    // It waits for a connection.
    drop(TcpStream::connect(collector_at)?);
    let num_posts = collector.join().ok().context("the collector panicked")??;
    let num_read = scraper.join().ok().context("the scraper panicked")??;
    let num_events = browser.join().ok().context("the browser panicked")??;
    anyhow::ensure!(
        num_read > 0 && num_events > 2 && num_posts > 0,
        "nobody has read the metrics or the page, or taken the spans: the run is too short"
    );
    Ok(report)
}

/// Reads the stream of the page to its end, which is that of the training. Returns how many events came.
fn count_events(address: SocketAddr) -> Result<usize> {
    let mut stream = TcpStream::connect(address)?;
    write!(
        stream,
        "GET /api/events HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n"
    )?;
    let mut num_events = 0;
    for line in BufReader::new(stream).lines() {
        num_events += usize::from(line?.starts_with("data: "));
    }
    Ok(num_events)
}

/// Takes posts of spans and forgets them. Returns how many came.
fn take_spans(listener: &TcpListener, is_over: &AtomicBool) -> Result<usize> {
    let mut num_posts = 0;
    for stream in listener.incoming() {
        if is_over.load(Ordering::SeqCst) {
            break;
        }
        // Each post has a connection of its own.
        let mut stream = BufReader::new(stream?);
        let (mut line, mut num_bytes) = (String::new(), 0);
        while stream.read_line(&mut line)? > 2 {
            let lower = line.trim_end().to_ascii_lowercase();
            if let Some(length) = lower.strip_prefix("content-length: ") {
                num_bytes = length.parse()?;
            }
            line.clear();
        }
        let body = &mut (&mut stream).take(num_bytes);
        std::io::copy(body, &mut std::io::sink())?;
        let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}";
        stream.get_mut().write_all(answer)?;
        num_posts += 1;
    }
    Ok(num_posts)
}

/// Fetches the metrics. Returns how many bytes they have.
fn fetch(address: SocketAddr) -> Result<usize> {
    let mut stream = TcpStream::connect(address)?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: ps\r\nconnection: close\r\n\r\n")?;
    let mut answer = String::new();
    Ok(stream.read_to_string(&mut answer)?)
}
