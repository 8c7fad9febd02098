"""Ray's parameter-server example, synchronous and asynchronous.

After https://docs.ray.io/en/latest/ray-core/examples/plot_parameter_server.html. Gradients of a round
are averaged, where today's text sums them.
"""

import os

import numpy as np
import ray
import torch
import torch.nn.functional as F

import common

NUM_WORKERS = 2


def get_weights(model):
    return {k: v.cpu() for k, v in model.state_dict().items()}


@ray.remote
class ParameterServer:
    def __init__(self, args):
        self.model = common.new_model(args)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=args.learning_rate)

    def apply_gradients(self, *gradients):
        joined = [np.stack(gradient_zip).mean(axis=0) for gradient_zip in zip(*gradients)]
        self.optimizer.zero_grad()
        for g, p in zip(joined, self.model.parameters()):
            p.grad = torch.from_numpy(g)
        self.optimizer.step()
        return get_weights(self.model)

    def get_weights(self):
        return get_weights(self.model)


@ray.remote
class DataWorker:
    def __init__(self, args, rank):
        self.model = common.new_model(args)
        self.batches = common.Batches(args, rank, NUM_WORKERS)

    def compute_gradients(self, weights):
        self.model.load_state_dict(weights)
        data, target = self.batches.next()
        self.model.zero_grad()
        loss = F.nll_loss(self.model(data), target)
        loss.backward()
        return [p.grad.data.cpu().numpy() for p in self.model.parameters()]


def main():
    args = common.arguments()
    # A cluster of its own, whatever else runs on the machine.
    ray.init(address="local", num_cpus=NUM_WORKERS + 1, _temp_dir=os.environ.get("PS_BENCH_TEMP"), log_to_driver=False)
    ps = ParameterServer.remote(args)
    workers = [DataWorker.remote(args, rank) for rank in range(NUM_WORKERS)]
    model, evaluator = common.new_model(args), common.Evaluator(args)

    def train_sync(steps):
        current_weights = ps.get_weights.remote()
        for i in range(steps):
            gradients = [worker.compute_gradients.remote(current_weights) for worker in workers]
            current_weights = ps.apply_gradients.remote(*gradients)
            if i % 10 == 0:  # Where the example evaluates.
                ray.get(current_weights)
        ray.get(current_weights)

    def train_async(steps):
        current_weights = ps.get_weights.remote()
        gradients = {worker.compute_gradients.remote(current_weights): worker for worker in workers}
        num_missing = steps * NUM_WORKERS - len(gradients)
        for i in range(steps * NUM_WORKERS):
            ready, _ = ray.wait(list(gradients))
            worker = gradients.pop(ready[0])
            current_weights = ps.apply_gradients.remote(*ready)
            if num_missing > 0:
                gradients[worker.compute_gradients.remote(current_weights)] = worker
                num_missing -= 1
            if i % 10 == 0:
                ray.get(current_weights)
        ray.get(current_weights)

    def evaluate():
        model.load_state_dict(ray.get(ps.get_weights.remote()))
        return evaluator.accuracy(model)

    common.measure(args, NUM_WORKERS, train_sync if args.mode == "sync" else train_async, evaluate)
    ray.shutdown()


if __name__ == "__main__":
    main()
