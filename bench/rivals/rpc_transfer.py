"""Calls with PyTorch RPC: an empty one, and a gradient there and the weights back, tensors both."""

import argparse

import torch
import torch.distributed.rpc as rpc
import torch.multiprocessing as mp

import common

all_weights = {}


def empty():
    pass


def push_pull(num_weights, gradient):
    if num_weights not in all_weights:
        all_weights[num_weights] = torch.zeros(num_weights)
    return all_weights[num_weights].sub_(gradient)


def check(weights, count):
    assert weights[0] == weights[-1] == -count, (weights[0], count)


def run(rank, args):
    rpc.init_rpc("caller" if rank == 0 else "server", rank=rank, world_size=2)
    if rank == 0:
        common.measure_calls(
            args.seconds,
            lambda: rpc.rpc_sync("server", empty),
            lambda n, gradient: rpc.rpc_sync("server", push_pull, args=(n, gradient)),
            torch.ones,
            check,
        )
    rpc.shutdown()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=1.0)
    mp.spawn(run, args=(parser.parse_args(),), nprocs=2)
