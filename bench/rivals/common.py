"""What the rivals share: networks, data, and how a run is measured and told to `compare`."""

import argparse, gzip, json, os, time

import torch
import torch.nn.functional as F

torch.set_num_threads(1)


class ConvNet(torch.nn.Module):
    """The network of Ray's parameter-server example: 1,960 weights."""

    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(1, 3, kernel_size=3)
        self.fc = torch.nn.Linear(192, 10)

    def forward(self, x):
        x = F.relu(F.max_pool2d(self.conv1(x), 3))
        return F.log_softmax(self.fc(x.view(-1, 192)), dim=1)


class Net(torch.nn.Module):
    """The network of PyTorch's parameter-server guide: 1,199,882 weights.

    The guide's second `Dropout2d`, on [batch, features], was the ordinary one when it was written.
    """

    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(1, 32, 3, 1)
        self.conv2 = torch.nn.Conv2d(32, 64, 3, 1)
        self.dropout1 = torch.nn.Dropout2d(0.25)
        self.dropout2 = torch.nn.Dropout(0.5)
        self.fc1 = torch.nn.Linear(9216, 128)
        self.fc2 = torch.nn.Linear(128, 10)

    def forward(self, x):
        x = F.relu(self.conv1(x))
        x = F.max_pool2d(self.conv2(x), 2)
        x = torch.flatten(self.dropout1(x), 1)
        x = self.dropout2(F.relu(self.fc1(x)))
        return F.log_softmax(self.fc2(x), dim=1)


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--mode", choices=["sync", "async"], default="sync")
    parser.add_argument("--model", choices=["convnet", "net"], default="convnet")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--seconds", type=float, default=3.0, help="length of the timed part")
    parser.add_argument("--target", type=float, default=0.0, help="train up to this accuracy first, in percent")
    parser.add_argument("--max-seconds", type=float, default=60.0, help="but for no longer than this")
    parser.add_argument("--evaluate-every", type=int, default=25, help="in steps of each worker")
    parser.add_argument("--num-test", type=int, default=10_000, help="how many test images are looked at")
    parser.add_argument("--data-dir", required=True, help="where the MNIST files are")
    return parser.parse_args()


def new_model(args):
    torch.manual_seed(0)
    return ConvNet() if args.model == "convnet" else Net()


def read_idx(directory, name, header):
    path = os.path.join(directory, name)
    with gzip.open(path + ".gz") if os.path.exists(path + ".gz") else open(path, "rb") as file:
        return torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)[header:]


def read_mnist(args, split):
    images = read_idx(args.data_dir, f"{split}-images-idx3-ubyte", 16).view(-1, 1, 28, 28)
    return images, read_idx(args.data_dir, f"{split}-labels-idx1-ubyte", 8).long()


def normalized(images):
    return (images.float() / 255 - 0.1307) / 0.3081


class Batches:
    """A worker's share of the training data, made into tensors ahead, again and again."""

    def __init__(self, args, rank, num_workers):
        images, labels = read_mnist(args, "train")
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        mine = order[rank::num_workers]
        mine = mine[: len(mine) // args.batch_size * args.batch_size]
        images, labels = normalized(images[mine]), labels[mine]
        self.batches = list(zip(images.split(args.batch_size), labels.split(args.batch_size)))
        self.position = 0

    def next(self):
        batch = self.batches[self.position % len(self.batches)]
        self.position += 1
        return batch


class Evaluator:
    def __init__(self, args):
        images, labels = read_mnist(args, "t10k")
        images, labels = normalized(images[: args.num_test]), labels[: args.num_test]
        self.batches = list(zip(images.split(256), labels.split(256)))

    def accuracy(self, model):
        """Returns the percentage of right answers."""
        model.eval()
        with torch.no_grad():
            right = sum((model(x).argmax(1) == y).sum().item() for x, y in self.batches)
        model.train()
        return 100 * right / sum(len(y) for _, y in self.batches)


def say(*words):
    print("@bench", *words, flush=True)


def measure(args, num_workers, train, evaluate):
    """Measures `train(steps)`, in which each worker takes that many steps.

    The same phases as on the other side (`ours.rs`): a first step; steps up to the wanted accuracy,
    where evaluations take no part in the time; a timed part.
    """
    train(1)
    say("first")
    metrics, seconds, steps = {}, 0.0, 0
    wanted = [mark for mark in (90, 95, 97) if mark <= args.target]
    while wanted and seconds < args.max_seconds:
        seconds += timed(train, args.evaluate_every)
        steps += args.evaluate_every
        accuracy = evaluate()
        while wanted and accuracy >= wanted[0]:
            mark = wanted.pop(0)
            metrics[f"seconds_to_{mark}"] = seconds
            metrics[f"gradients_to_{mark}"] = steps * num_workers
    if steps == 0:
        steps = args.evaluate_every if args.model == "convnet" else 2
        seconds = timed(train, steps)
    steps = max(1, round(args.seconds * steps / seconds))
    say("begin")
    seconds = timed(train, steps)
    say("end")
    metrics["gradients"] = steps * num_workers
    metrics["gradients_per_second"] = steps * num_workers / seconds
    metrics["accuracy"] = evaluate()
    say("result", json.dumps(metrics))


def timed(call, *args):
    start = time.perf_counter()
    call(*args)
    return time.perf_counter() - start


def measure_calls(seconds, empty, push_pull, new_gradient, check):
    """Measures `empty()` and `push_pull(gradient)` at several sizes, one call after the other.

    The same phases as on the other side (`transfer.rs`).
    """
    metrics = quantiles("call", seconds, empty)
    say("first")
    for name, num_weights in (("8kb", 2_000), ("4.8mb", 1_200_000), ("100mb", 25_000_000)):
        gradient, count = new_gradient(num_weights), 0

        def call():
            nonlocal count
            count += 1
            return push_pull(num_weights, gradient)

        metrics |= quantiles(name, seconds, call)
        check(call(), count)
        metrics[f"{name}_gb_per_s"] = 8e-9 * num_weights / (1e-3 * metrics[f"{name}_p50_ms"])
    say("result", json.dumps(metrics))


def quantiles(name, seconds, call):
    for _ in range(3):
        call()
    times, start = [], time.perf_counter()
    while len(times) < 5 or time.perf_counter() - start < seconds:
        times.append(timed(call))
    times.sort()

    def at(q):
        return 1e3 * times[min(len(times) - 1, int(q * len(times)))]

    return {f"{name}_p50_ms": at(0.5), f"{name}_p99_ms": at(0.99), f"{name}_count": len(times)}
