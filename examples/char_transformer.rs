//! A small transformer that learns to write like Shakespeare, one character after the other.
//!
//! It has what trainings of language models have: burn's `TransformerEncoder` with dropout, an embedding that is also the
//! output layer, AdamW without weight decay for some of the parameters, a warm-up with a cosine schedule, and clipping.
//!
//! ```text
//! cargo run --release --example char_transformer -- --processes 3
//! ```
//!
//! Ends with the mean loss per character on a part of the text that it was not trained on, in nats, and with a few lines of
//! its own. With the default settings, the loss is 2.25 after 600 updates, which take two minutes on two cores.
//! A test checks that three processes reach a loss below 3.2 after 70 updates with batches of 8 and without dropout, with the
//! bits of one process. A model that only knows how frequent each character is has a loss of 3.31.

use std::process::ExitCode;

use anyhow::Result;
use burn::data::dataset::InMemDataset;
use burn::lr_scheduler::cosine::CosineAnnealingLrSchedulerConfig;
use burn::lr_scheduler::linear::LinearLrSchedulerConfig;
use burn::lr_scheduler::sequential::SequentialLrSchedulerConfig;
use burn::module::{Initializer, Module, ParamGroup};
use burn::nn::attention::generate_autoregressive_mask;
use burn::nn::transformer::{
    TransformerEncoder, TransformerEncoderConfig, TransformerEncoderInput,
};
use burn::nn::{Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig};
use burn::optim::AdamWConfig;
use burn::tensor::activation::{log_softmax, softmax};
use burn::tensor::{Device, Int, Tensor, TensorData};
use clap::Parser;
use ps::cli::{
    self, ChaosArgs, CheckpointArgs, ClusterArgs, DeviceArgs, ServerPlaces, ShowArgs, say,
};
use ps::model::{Rng, nll_loss};
use ps::prelude::*;

/// Training a transformer on the characters of two plays.
#[derive(Parser)]
#[command(version, after_help = EXAMPLES)]
struct Args {
    /// Number of workers.
    #[arg(long, default_value_t = 2)]
    num_workers: usize,
    /// Iterations; in each, every worker computes one gradient.
    #[arg(long, default_value_t = 600)]
    iterations: u64,
    /// Passages of 64 characters per batch of one worker.
    #[arg(long, default_value_t = 16)]
    batch_size: usize,
    /// The highest learning rate.
    #[arg(long, default_value_t = 3e-3)]
    learning_rate: f64,
    /// The share of numbers that dropout sets to zero.
    #[arg(long, default_value_t = 0.1)]
    dropout: f64,
    /// When gradients are applied: bsp, asp, ssp:BOUND or k-of-n:K.
    #[arg(long, default_value = "bsp")]
    consistency: Consistency,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    cluster: ClusterArgs,
    #[command(flatten)]
    checkpoints: CheckpointArgs,
    #[command(flatten)]
    show: ShowArgs,
    #[command(flatten)]
    chaos: ChaosArgs,
}

const EXAMPLES: &str = "Examples:
  char_transformer                     two workers in this process
  char_transformer --processes 3       two workers in processes of their own
  char_transformer --consistency ssp:2 --num-workers 4
  char_transformer --checkpoint-dir runs/plays --resume   go on after an interruption";

const TEXT: &str = include_str!("data/shakespeare.txt");

/// The number of characters from which the next one is predicted.
const CONTEXT: usize = 64;

/// The updates of the warm-up.
const WARM_UP: u64 = 50;

fn main() -> ExitCode {
    cli::main(train)
}

fn train(args: Args) -> Result<ExitCode> {
    anyhow::ensure!(
        (0.0..1.0).contains(&args.dropout),
        "--dropout must be at least 0 and less than 1, and is {}",
        args.dropout
    );
    let device = args.device.device()?;
    device.seed(7); // Initial weights of burn's own layers.
    let alphabet = Alphabet::of(TEXT);
    let model = CharTransformer::new(alphabet.len(), args.dropout, &device);
    // Every tenth passage is for the test.
    let is_test = |index: usize| index % 10 == 9;
    let passages = |test: bool| {
        let all = alphabet.passages(TEXT).into_iter().enumerate();
        let some = all.filter(move |(index, _)| is_test(*index) == test);
        let some = some.map(|(_, passage)| passage).collect();
        // Processes compare their data.
        collated(InMemDataset::new(some), |some: Vec<Passage>| some).compared_by(Passage::clone)
    };
    let decay = |decay| AdamWConfig::new().with_weight_decay(decay);
    let without_decay = ParamGroup::from_any_predicates(vec!["bias", "norm", "embedding"]);
    // The schedule must not end before the run.
    let num_updates = (args.consistency).most_updates(args.iterations, args.num_workers);
    let num_updates = num_updates.max(2);
    let warm_up = WARM_UP.min(num_updates / 2).max(1);
    let rate = args.learning_rate;
    let schedule = SequentialLrSchedulerConfig::new(
        vec![
            LinearLrSchedulerConfig::new(rate / 100.0, rate, warm_up as usize).into(),
            CosineAnnealingLrSchedulerConfig::new(rate, (num_updates - warm_up).max(1) as usize)
                .into(),
        ],
        vec![warm_up as usize],
    );
    let trainer = Trainer::new(model.clone(), passages(false))
        .test_data(passages(true))
        .device(&device)
        .workers(args.num_workers)
        .consistency(args.consistency)
        .optimizer(decay(0.1))
        .optimizer_for(&without_decay, decay(0.0))
        .lr_scheduler(schedule)
        .clip_norm(1.0)
        .batch_size(args.batch_size)
        .iterations(args.iterations)
        .checkpoints(args.checkpoints.config())
        .observe_all(args.show.observers())
        .controls(&args.show.controls)
        .evaluate_every(100)
        .on_evaluation(|point| {
            let loss = point.evaluation.mean_loss();
            say!("Iter {}: \tloss is {loss:.3}", point.version.0);
        });
    let (saving, one) = (&args.checkpoints, ServerPlaces::ONE);
    let mut chaos = (args.chaos).begin(args.num_workers, &args.cluster, saving, one)?;
    let hosts = chaos.hosts(trainer.hosts(Hosts::new())?);
    let Some(cluster) = args.cluster.launch(hosts) else {
        return Ok(ExitCode::SUCCESS);
    };
    chaos.start(&cluster)?;
    let report = trainer.run_on(&cluster)?;
    let loss = report
        .final_evaluation
        .map_or(f64::NAN, |result| result.mean_loss());
    say!("{report}");
    say!("Final loss is {loss:.3} nats per character.");
    let trained = model_with_weights(&model, &device, &report.weights)?;
    say!(
        "{}",
        write(&trained, &alphabet, "\nKING ", 200, &device.clone().inner())
    );
    saving.export(&model, &device, &report.weights)?;
    let code = cli::end_of_training(report.interrupted, report.saved_all().is_some());
    let mut done = report.done(args.iterations);
    // burn's own dropout has other random numbers if workers share a process.
    done.is_repeatable &= args.dropout == 0.0;
    Ok(chaos.conclude(Some(&done), code)?)
}

/// The numbers of `CONTEXT + 1` characters.
type Passage = Vec<u8>;

/// The characters that a text has. The number of a character is its place here.
struct Alphabet(Vec<char>);

impl Alphabet {
    /// # Panics
    /// If the text has more than 256 different characters.
    fn of(text: &str) -> Self {
        let mut all: Vec<char> = text.chars().collect();
        all.sort_unstable();
        all.dedup();
        assert!(all.len() <= 256, "a number of a character is a byte");
        Self(all)
    }

    fn len(&self) -> usize {
        self.0.len()
    }

    /// Returns the numbers of the characters. Those that are not in the alphabet are left out.
    fn numbers(&self, text: &str) -> Vec<u8> {
        let number = |c| Some(self.0.binary_search(&c).ok()? as u8);
        text.chars().filter_map(number).collect()
    }

    /// Cuts a text into passages, each of which begins with the last character of the one before.
    fn passages(&self, text: &str) -> Vec<Passage> {
        let all = self.numbers(text);
        let passages = all.windows(CONTEXT + 1).step_by(CONTEXT);
        passages.map(<[u8]>::to_vec).collect()
    }
}

/// Predicts the next character after each of a passage.
#[derive(Module, Debug)]
struct CharTransformer {
    /// Of characters. It is the output layer, too.
    embedding: Embedding,
    positional_embedding: Embedding,
    encoder: TransformerEncoder,
    norm: LayerNorm,
}

impl CharTransformer {
    fn new(num_characters: usize, dropout: f64, device: &Device) -> Self {
        const WIDTH: usize = 64;
        let embedding = |len| {
            let initializer = Initializer::Normal {
                mean: 0.0,
                std: 0.02,
            };
            EmbeddingConfig::new(len, WIDTH)
                .with_initializer(initializer)
                .init(device)
        };
        Self {
            embedding: embedding(num_characters),
            positional_embedding: embedding(CONTEXT),
            encoder: TransformerEncoderConfig::new(WIDTH, 4 * WIDTH, 4, 2)
                .with_dropout(dropout)
                .with_norm_first(true)
                .init(device),
            norm: LayerNormConfig::new(WIDTH).init(device),
        }
    }

    /// `characters: [batch, length]` → the scores of the next ones, `[batch · length, characters]`.
    fn forward(&self, characters: Tensor<2, Int>) -> Tensor<2> {
        let ([batch, length], device) = (characters.dims(), characters.device());
        let positions = Tensor::arange(0..length as i64, &device).unsqueeze::<2>();
        let x = self.embedding.forward(characters) + self.positional_embedding.forward(positions);
        let mask = generate_autoregressive_mask(batch, length, &device);
        let x = self
            .encoder
            .forward(TransformerEncoderInput::new(x).mask_attn(mask));
        let x = self.norm.forward(x).flatten::<2>(0, 1);
        x.matmul(self.embedding.weight.val().transpose())
    }
}

/// Returns characters from place `from` on of each passage: `[batch, CONTEXT]`.
fn characters(passages: &[Passage], from: usize, device: &Device) -> Tensor<2, Int> {
    let numbers = passages
        .iter()
        .flat_map(|passage| &passage[from..from + CONTEXT]);
    let numbers: Vec<i64> = numbers.map(|&number| number.into()).collect();
    Tensor::from_data(TensorData::new(numbers, [passages.len(), CONTEXT]), device)
}

impl Model for CharTransformer {
    type Batch = Vec<Passage>;

    fn loss(&self, passages: &Vec<Passage>, step: &mut Step) -> Tensor<1> {
        let scores = self.forward(characters(passages, 0, step.device()));
        let next = characters(passages, 1, step.device()).flatten::<1>(0, 1);
        nll_loss(log_softmax(scores, 1), next)
    }

    fn num_examples(passages: &Vec<Passage>) -> usize {
        passages.len()
    }
}

/// Lets the model go on after `beginning`.
fn write(
    model: &CharTransformer,
    alphabet: &Alphabet,
    beginning: &str,
    num_characters: usize,
    device: &Device,
) -> String {
    let rng = &mut Rng::new(1);
    let mut numbers = alphabet.numbers(beginning);
    for _ in 0..num_characters {
        let known = &numbers[numbers.len().saturating_sub(CONTEXT)..];
        let known: Vec<i64> = known.iter().map(|&number| number.into()).collect();
        let length = known.len();
        let known = Tensor::<2, Int>::from_data(TensorData::new(known, [1, length]), device);
        let scores = model.forward(known).narrow(0, length - 1, 1);
        let probabilities = softmax(scores, 1).into_data();
        let probabilities: Vec<f32> = probabilities.try_into_vec().unwrap_or_default();
        // The first character up to which the probabilities exceed a random number.
        let mut left = rng.uniform();
        let chosen = probabilities.iter().position(|probability| {
            left -= probability;
            left < 0.0
        });
        numbers.push(chosen.unwrap_or(0) as u8);
    }
    numbers
        .iter()
        .map(|&number| alphabet.0[usize::from(number)])
        .collect()
}
