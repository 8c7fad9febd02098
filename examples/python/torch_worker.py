"""A worker in Python: computes gradients of the ConvNet with PyTorch, for servers in Rust.

    cargo run --release --example http_server -- --listen 127.0.0.1:8265 --num-workers 2
    python examples/python/torch_worker.py --address 127.0.0.1:8265 --data-dir DIR --worker 0 --num-workers 2
    python examples/python/torch_worker.py --address 127.0.0.1:8265 --data-dir DIR --worker 1 --num-workers 2

DIR has the MNIST files `train-{images-idx3,labels-idx1}-ubyte`, with or without `.gz`, as they were downloaded or as
torchvision and Kaggle lay them out. A token comes from $PS_TOKEN.
"""

import argparse, sys

import torch
import torch.nn.functional as F

import mnist
from flat_model import FlatModel
from ps_client import InvalidInput, Refused, Worker


class ConvNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(1, 3, kernel_size=3)
        self.fc = torch.nn.Linear(192, 10)

    def forward(self, images):  # [batch, 1, 28, 28] -> [batch, 10]
        x = F.relu(F.max_pool2d(self.conv1(images), 3))
        return F.log_softmax(self.fc(x.flatten(1)), dim=1)


args = argparse.ArgumentParser(description="A PyTorch worker for parameter servers in Rust.")
args.add_argument("--address", default="127.0.0.1:8265", help="host and port of the servers")
args.add_argument("--data-dir", required=True, help="where the MNIST files are")
args.add_argument("--worker", type=int, default=0, help="this worker's rank")
args.add_argument("--num-workers", type=int, default=1, help="how many share the examples")
args.add_argument("--steps", type=int, default=200)
args.add_argument("--batch-size", type=int, default=128)
args = args.parse_args()

try:
    if not 0 <= args.worker < args.num_workers:
        raise InvalidInput(f"--worker {args.worker} is not one of 0 to {args.num_workers - 1}: see --num-workers")
    images, labels = (torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in mnist.load(args.data_dir))
    images, labels = images.view(-1, 1, mnist.HEIGHT, mnist.WIDTH), labels.long()
    if not 1 <= args.batch_size <= len(labels):
        raise InvalidInput(f"--batch-size {args.batch_size}: it is at least 1, and there are {len(labels)} examples")
    num_batches = -(-len(labels) // args.batch_size)  # The last one may be smaller.
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
except (OSError, Refused, InvalidInput, mnist.DataError) as error:
    sys.exit(f"error: {error}")
except KeyboardInterrupt:
    sys.exit("interrupted: the servers go on without this worker after their lease")
