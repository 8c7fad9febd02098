"""Calls to a Ray actor: an empty one, and a gradient there and the weights back, NumPy arrays both."""

import argparse, os

import numpy as np
import ray

import common


@ray.remote
class Server:
    def __init__(self):
        self.weights = {}

    def empty(self):
        pass

    def push_pull(self, num_weights, gradient):
        weights = self.weights.setdefault(num_weights, np.zeros(num_weights, np.float32))
        weights -= gradient
        return weights


def check(weights, count):
    assert weights[0] == weights[-1] == -count, (weights[0], count)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=1.0)
    args = parser.parse_args()
    ray.init(address="local", _temp_dir=os.environ.get("PS_BENCH_TEMP"), log_to_driver=False)
    server = Server.remote()
    common.measure_calls(
        args.seconds,
        lambda: ray.get(server.empty.remote()),
        lambda n, gradient: ray.get(server.push_pull.remote(n, gradient)),
        lambda n: np.ones(n, np.float32),
        check,
    )
    ray.shutdown()


if __name__ == "__main__":
    main()
