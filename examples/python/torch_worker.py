"""A worker in Python: computes gradients of the ConvNet with PyTorch, for servers in Rust.

Needs nothing but PyTorch. Start the servers, then any number of these, each with a rank of its own:

    cargo run --release --example http_server -- --listen 127.0.0.1:8265 --num-workers 2
    python examples/python/torch_worker.py --address 127.0.0.1:8265 --data-dir DIR --worker 0 --num-workers 2
    python examples/python/torch_worker.py --address 127.0.0.1:8265 --data-dir DIR --worker 1 --num-workers 2

DIR has the MNIST files `train-{images-idx3,labels-idx1}-ubyte`, with or without `.gz`. The API is
described in docs/http-api.md. A token, if the servers ask for one, comes from $PS_TOKEN.
"""

import argparse, gzip, http.client, json, os, sys, time

import torch
import torch.nn.functional as F

PATIENCE_S = 60  # How long to look for a server that does not answer.
ROUND_S = 3600  # How long a synchronous round may take.


class ConvNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(1, 3, kernel_size=3)
        self.fc = torch.nn.Linear(192, 10)

    def forward(self, images):  # [batch, 1, 28, 28] -> [batch, 10]
        x = F.relu(F.max_pool2d(self.conv1(images), 3))
        return F.log_softmax(self.fc(x.flatten(1)), dim=1)


class FlatModel:
    """A model as one vector, in the servers' order."""

    def __init__(self, model, layout):
        self.model, self.num_weights = model, layout["num_weights"]
        named, self.places = dict(model.named_parameters()), []
        for p in layout["parameters"]:
            parameter, shape = named.pop(p["name"]), p["shape"]
            # A Linear's weight is [in, out] there and [out, in] here.
            is_transposed = parameter.ndim == 2
            assert list(parameter.T.shape if is_transposed else parameter.shape) == shape, p
            self.places.append((parameter, is_transposed, shape, slice(p["start"], p["start"] + p["len"])))
        assert not named, f"the servers do not have {list(named)}"

    def load(self, body):
        flat = torch.frombuffer(bytearray(body), dtype=torch.float32)
        with torch.no_grad():
            for parameter, is_transposed, shape, place in self.places:
                values = flat[place].view(shape)
                parameter.copy_(values.T if is_transposed else values)

    def gradient(self, images, labels):
        """Returns the mean loss, and its gradient as bytes."""
        self.model.zero_grad()
        loss = F.nll_loss(self.model(images), labels)
        loss.backward()
        body = bytearray(4 * self.num_weights)
        flat = torch.frombuffer(body, dtype=torch.float32)
        for parameter, is_transposed, shape, place in self.places:
            flat[place].view(shape).copy_(parameter.grad.T if is_transposed else parameter.grad)
        return loss.item(), body


class Servers:
    """Requests that are repeated until they are answered: a push is applied once all the same."""

    def __init__(self, address):
        self.connection = http.client.HTTPConnection(address, timeout=ROUND_S)
        token = os.environ.get("PS_TOKEN")
        self.token = {"authorization": f"Bearer {token}"} if token else {}

    def call(self, method, path, headers={}, body=b""):
        give_up = time.monotonic() + PATIENCE_S
        while True:
            try:
                self.connection.request(method, path, body, self.token | headers)
                reply = self.connection.getresponse()
                reply.body = reply.read()
                if reply.status not in (429, 503) or time.monotonic() > give_up:
                    return reply
            except (OSError, http.client.HTTPException):
                # The next request connects anew. An idle connection is closed after some seconds.
                self.connection.close()
                if time.monotonic() > give_up:
                    raise
            time.sleep(0.1)

    def join(self, worker):
        """Begins a new life of the worker, and returns its headers and the clock of its first step."""
        least = 0
        while True:
            me = {"ps-worker": str(worker), "ps-incarnation": str(max(least, time.time_ns()))}
            reply = self.call("POST", "/v1/join", me)
            least = int(reply.headers.get("ps-least-incarnation", 0))
            if not least:
                return me, int(ok(reply).headers["ps-clock"])


def ok(reply):
    if reply.status != 200:
        sys.exit(f"the servers say {reply.status}: {reply.body.decode().strip()}")
    return reply


def read_idx(directory, name, header):
    path = os.path.join(directory, name)
    with gzip.open(path + ".gz") if os.path.exists(path + ".gz") else open(path, "rb") as file:
        return torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)[header:]


def main():
    args = argparse.ArgumentParser(description="A PyTorch worker for parameter servers in Rust.")
    args.add_argument("--address", default="127.0.0.1:8265", help="host and port of the servers")
    args.add_argument("--data-dir", required=True, help="where the MNIST files are")
    args.add_argument("--worker", type=int, default=0, help="this worker's rank")
    args.add_argument("--num-workers", type=int, default=1, help="how many share the examples")
    args.add_argument("--steps", type=int, default=200)
    args.add_argument("--batch-size", type=int, default=128)
    args = args.parse_args()
    assert sys.byteorder == "little", "the numbers on the wire are little-endian"

    images = read_idx(args.data_dir, "train-images-idx3-ubyte", 16).view(-1, 1, 28, 28)
    labels = read_idx(args.data_dir, "train-labels-idx1-ubyte", 8).long()
    num_batches = len(labels) // args.batch_size

    servers = Servers(args.address)
    me, clock = servers.join(args.worker)
    model = FlatModel(ConvNet(), json.loads(ok(servers.call("GET", "/v1/layout")).body))
    weights = ok(servers.call("GET", "/v1/weights"))
    for step in range(args.steps):
        model.load(weights.body)
        first = (clock * args.num_workers + args.worker) % num_batches * args.batch_size
        batch = slice(first, first + args.batch_size)
        pixels = (images[batch].float() / 255 - 0.1307) / 0.3081
        loss, gradient = model.gradient(pixels, labels[batch])
        stamp = {"ps-clock": str(clock), "ps-version": weights.headers["ps-version"],
                 "ps-loss": str(loss), "ps-num-examples": str(len(pixels))}
        reply = servers.call("POST", "/v1/push-pull", me | stamp, gradient)
        if reply.status == 409:  # Taken for dead: what was pending is computed again.
            me, clock = servers.join(args.worker)
            weights = ok(servers.call("GET", "/v1/weights"))
            continue
        weights, clock = ok(reply), clock + 1
        if step % 20 == 0 or step + 1 == args.steps:
            outcome, version = weights.headers["ps-outcome"], weights.headers["ps-version"]
            print(f"step {step}: loss {loss:.3f}, {outcome}, version {version}", flush=True)
    ok(servers.call("POST", "/v1/leave", me))


if __name__ == "__main__":
    main()
