"""Two processes of PyTorch that average their gradients with each other (all-reduce over gloo).

After https://docs.pytorch.org/tutorials/intermediate/ddp_tutorial.html. There is no server.
"""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

import common

NUM_WORKERS = 2


def run(rank, args):
    dist.init_process_group("gloo", rank=rank, world_size=NUM_WORKERS)
    model = common.new_model(args)
    ddp_model = DDP(model)
    batches = common.Batches(args, rank, NUM_WORKERS)
    optimizer = torch.optim.SGD(ddp_model.parameters(), lr=args.learning_rate)

    def train(steps):
        for _ in range(steps):
            data, target = batches.next()
            optimizer.zero_grad()
            F.nll_loss(ddp_model(data), target).backward()
            optimizer.step()

    # The first process says how many steps both take; none at the end.
    num_steps = torch.zeros(1, dtype=torch.long)

    def train_both(steps):
        num_steps[0] = steps
        dist.broadcast(num_steps, src=0)
        train(steps)

    if rank == 0:
        evaluator = common.Evaluator(args)
        common.measure(args, NUM_WORKERS, train_both, lambda: evaluator.accuracy(model))
        train_both(0)
    else:
        while True:
            dist.broadcast(num_steps, src=0)
            if num_steps.item() == 0:
                break
            train(num_steps.item())
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(run, args=(common.arguments(),), nprocs=NUM_WORKERS)
