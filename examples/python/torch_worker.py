"""A worker in Python: computes gradients of the ConvNet with PyTorch, for servers in Rust.

    cargo run --release --example http_server -- --listen 127.0.0.1:8265 --num-workers 2
    python examples/python/torch_worker.py --address 127.0.0.1:8265 --data-dir DIR --worker 0 --num-workers 2
    python examples/python/torch_worker.py --address 127.0.0.1:8265 --data-dir DIR --worker 1 --num-workers 2

DIR has the MNIST files `train-{images-idx3,labels-idx1}-ubyte`, with or without `.gz`. A token comes from $PS_TOKEN.
"""

import argparse, gzip, os, sys

import torch
import torch.nn.functional as F

from flat_model import FlatModel
from ps_client import Refused, Worker


class ConvNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(1, 3, kernel_size=3)
        self.fc = torch.nn.Linear(192, 10)

    def forward(self, images):  # [batch, 1, 28, 28] -> [batch, 10]
        x = F.relu(F.max_pool2d(self.conv1(images), 3))
        return F.log_softmax(self.fc(x.flatten(1)), dim=1)


def read_idx(directory, name, header):
    path = os.path.join(directory, name)
    with gzip.open(path + ".gz") if os.path.exists(path + ".gz") else open(path, "rb") as file:
        return torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)[header:]


args = argparse.ArgumentParser(description="A PyTorch worker for parameter servers in Rust.")
args.add_argument("--address", default="127.0.0.1:8265", help="host and port of the servers")
args.add_argument("--data-dir", required=True, help="where the MNIST files are")
args.add_argument("--worker", type=int, default=0, help="this worker's rank")
args.add_argument("--num-workers", type=int, default=1, help="how many share the examples")
args.add_argument("--steps", type=int, default=200)
args.add_argument("--batch-size", type=int, default=128)
args = args.parse_args()

try:
    images = read_idx(args.data_dir, "train-images-idx3-ubyte", 16).view(-1, 1, 28, 28)
    labels = read_idx(args.data_dir, "train-labels-idx1-ubyte", 8).long()
    num_batches = len(labels) // args.batch_size
    with Worker(args.address, args.worker) as worker:
        net = ConvNet()
        model = FlatModel(net, worker.layout())
        for step in range(args.steps):
            model.load(worker.weights)
            first = (worker.clock * args.num_workers + args.worker) % num_batches * args.batch_size
            batch = slice(first, first + args.batch_size)
            loss = F.nll_loss(net((images[batch].float() / 255 - 0.1307) / 0.3081), labels[batch])
            outcome = worker.push_pull(model.gradient(loss), loss.item(), len(labels[batch]))
            if step % 20 == 0 or step + 1 == args.steps:
                print(f"step {step}: loss {loss.item():.3f}, {outcome}, version {worker.version}", flush=True)
except (OSError, Refused) as error:
    sys.exit(f"error: {error}")
