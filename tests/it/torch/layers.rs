//! Layers whose numbers lie the same way in burn and PyTorch, the one whose do not, and the one with statistics.

use burn::module::{Module, Param};
use burn::nn::conv::{ConvTranspose1d, ConvTranspose1dConfig};
use burn::nn::{BatchNorm, BatchNormConfig, Linear, LinearConfig};
use burn::nn::{Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig};
use burn::tensor::activation::tanh;
use burn::tensor::{Device, Distribution, Int, Tensor};
use ps::model::Step;

use super::*;

/// Square matrices everywhere: a shape tells nothing here.
#[derive(Module, Debug)]
struct Mixed {
    embedding: Embedding,
    matrix: Param<Tensor<2>>,
    norm: LayerNorm,
    fc: Linear,
    up: ConvTranspose1d,
}

impl Mixed {
    fn new(device: &Device) -> Self {
        let normal = Distribution::Normal(0.0, 1.0);
        Self {
            embedding: EmbeddingConfig::new(4, 4).init(device),
            matrix: Param::from_tensor(Tensor::random([4, 4], normal, device)),
            norm: LayerNormConfig::new(4).init(device),
            fc: LinearConfig::new(4, 4).init(device),
            up: ConvTranspose1dConfig::new([2, 2], 2).init(device),
        }
    }
}

impl Model for Mixed {
    type Batch = ();

    fn loss(&self, (): &(), step: &mut Step) -> Tensor<1> {
        let ids = Tensor::<2, Int>::from_data([[0, 2], [3, 3]], step.device());
        let x = self
            .embedding
            .forward(ids)
            .matmul(self.matrix.val().unsqueeze());
        let x = tanh(self.fc.forward(self.norm.forward(x)));
        self.up.forward(x).square().mean()
    }

    fn num_examples((): &()) -> usize {
        2
    }
}

const MIXED: &str = "
import sys, torch
from torch import nn
from flat_model import FlatModel
from ps_client import Worker

class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(4, 4)
        self.matrix = nn.Parameter(torch.zeros(4, 4))
        self.norm = nn.LayerNorm(4)
        self.fc = nn.Linear(4, 4)
        self.up = nn.ConvTranspose1d(2, 2, 2)

    def forward(self, ids):
        x = self.embedding(ids) @ self.matrix
        return self.up(torch.tanh(self.fc(self.norm(x)))).square().mean()

with Worker(sys.argv[1], 0) as worker:
    model = Mixed()
    flat = FlatModel(model, worker.layout())
    flat.load(worker.weights)
    loss = model(torch.tensor([[0, 2], [3, 3]]))
    print(worker.push_pull(flat.gradient(loss), loss.item(), 2))
";

#[test]
fn embeddings_own_matrices_and_linears_have_the_gradients_of_burn() {
    let Some(python) = python() else { return };
    let device = select_device(default_device_name()).unwrap();
    let model = Mixed::new(&device);
    let initial = initial_weights(&model, &device).unwrap();
    compare(&python, MIXED, model, &initial);
}

/// The matrix of an embedding is also that of the output.
#[derive(Module, Debug)]
struct Tied {
    embedding: Embedding,
    output: Param<Tensor<2>>,
}

impl Model for Tied {
    type Batch = ();

    fn loss(&self, (): &(), step: &mut Step) -> Tensor<1> {
        let ids = Tensor::<2, Int>::from_data([[0, 2], [3, 3]], step.device());
        let x = tanh(self.embedding.forward(ids)).flatten::<2>(0, 1);
        x.matmul(self.output.val().transpose()).square().mean()
    }

    fn num_examples((): &()) -> usize {
        2
    }
}

const TIED: &str = "
import sys, torch
from torch import nn
from flat_model import FlatModel
from ps_client import Worker

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(4, 3)
        self.output = nn.Linear(3, 4, bias=False)
        self.output.weight = self.embedding.weight

with Worker(sys.argv[1], 0) as worker:
    model = Tied()
    flat = FlatModel(model, worker.layout())
    flat.load(worker.weights)
    x = model.embedding(torch.tensor([[0, 2], [3, 3]]))
    loss = model.output(torch.tanh(x)).square().mean()
    print(worker.push_pull(flat.gradient(loss), loss.item(), 2))
";

/// M-7
#[test]
fn a_tied_parameter_has_the_gradient_of_burn() {
    let Some(python) = python() else { return };
    let device = select_device(default_device_name()).unwrap();
    let embedding = EmbeddingConfig::new(4, 3).init(&device);
    let model = Tied {
        output: embedding.weight.clone(),
        embedding,
    };
    let initial = initial_weights(&model, &device).unwrap();
    assert_eq!(initial.len(), 12);
    compare(&python, TIED, model, &initial);
}

/// Compares what a worker in Python pushes for its first step with what burn computes.
#[track_caller]
fn compare<M: Model<Batch = ()>>(python: &str, program: &str, model: M, initial: &Weights) {
    let device = select_device(default_device_name()).unwrap();
    let assign = |_| -> Box<dyn UpdateRule> { Box::new(Assign) };
    let servers = ServerGroup::spawn(initial, 1, ServerConfig::default(), assign).unwrap();
    let cluster = listen(&servers);
    let worker = script(python, program, &cluster).spawn().unwrap();
    assert_eq!(finish(worker), "applied\n");

    let mut local = LocalModel::new(model, &device).unwrap();
    local.load(&initial.to_vec()).unwrap();
    let mut expected = vec![0.0; local.num_weights()];
    local
        .gradient(&(), StepSeed::default(), &mut expected)
        .unwrap();
    let got = latest(&servers).to_vec();
    for parameter in initial.layout().parameters() {
        let range = parameter.range.clone();
        for (got, expected) in got[range.clone()].iter().zip(&expected[range.clone()]) {
            let name = &parameter.name;
            // Sums of a few numbers of size 1, in another order.
            assert!(
                (got - expected).abs() <= 1e-5,
                "{name}: {got} and {expected}"
            );
        }
        let is_seen = expected[range].iter().any(|gradient| gradient.abs() > 1e-3);
        assert!(is_seen, "{} has no gradient to compare", parameter.name);
    }
}

/// A batch normalization of rows and one of images. Few values per channel show how a variance is computed.
#[derive(Module, Debug)]
struct Normalized {
    fc: Linear,
    rows: BatchNorm,
    up: ConvTranspose1d,
    images: BatchNorm,
}

impl Normalized {
    fn new(device: &Device) -> Self {
        Self {
            fc: LinearConfig::new(4, 6).with_bias(false).init(device),
            rows: BatchNormConfig::new(6).with_momentum(0.25).init(device),
            up: ConvTranspose1dConfig::new([2, 2], 2)
                .with_bias(false)
                .init(device),
            images: BatchNormConfig::new(2).with_epsilon(1e-3).init(device),
        }
    }
}

impl Model for Normalized {
    type Batch = ();

    fn loss(&self, (): &(), step: &mut Step) -> Tensor<1> {
        let rows = [
            [1.0, -2.0, 0.5, 3.0],
            [0.0, 1.0, 2.0, -1.0],
            [2.0, 0.5, -1.5, 0.0],
        ];
        let x = Tensor::<2>::from_data(rows, step.device());
        let x = tanh(self.rows.forward(self.fc.forward(x)));
        let x = self.images.forward(self.up.forward(x.reshape([3, 2, 3])));
        (x - 0.5).powi_scalar(3).mean()
    }

    fn num_examples((): &()) -> usize {
        3
    }
}

const NORMALIZED: &str = "
import sys, torch
from torch import nn
from flat_model import FlatModel
from ps_client import Worker

class Normalized(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 6, bias=False)
        self.rows = nn.BatchNorm1d(6, momentum=0.25)
        self.up = nn.ConvTranspose1d(2, 2, 2, bias=False)
        self.images = nn.BatchNorm1d(2, eps=1e-3)

    def forward(self, x):
        x = torch.tanh(self.rows(self.fc(x)))
        return ((self.images(self.up(x.view(3, 2, 3))) - 0.5) ** 3).mean()

with Worker(sys.argv[1], 0) as worker:
    model = Normalized()
    flat = FlatModel(model, worker.layout())
    flat.load(worker.weights)
    loss = model(torch.tensor([[1.0, -2.0, 0.5, 3.0], [0.0, 1.0, 2.0, -1.0], [2.0, 0.5, -1.5, 0.0]]))
    print(worker.push_pull(flat.gradient(loss), loss.item(), 3))
";

/// The statistics that a step makes of those of the servers (S-20), too: burn's variance is not PyTorch's.
#[test]
fn a_batch_normalization_has_the_gradients_and_the_statistics_of_burn() {
    let Some(python) = python() else { return };
    let device = select_device(default_device_name()).unwrap();
    let model = Normalized::new(&device);
    let initial = initial_weights(&model, &device).unwrap();
    let layout = Layout::clone(initial.layout());
    assert_eq!(layout.num_buffers(), 4);
    // The part of the old statistics in the new ones shows, too.
    let mut weights = initial.to_vec();
    for (index, statistic) in weights[layout.num_trainable()..].iter_mut().enumerate() {
        *statistic = 2.0 + index as f32;
    }
    let initial = Weights::initial(layout, weights);
    compare(&python, NORMALIZED, model, &initial);
}
