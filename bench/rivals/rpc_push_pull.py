"""A parameter server with PyTorch RPC: workers push gradients and get the model back.

After https://docs.pytorch.org/tutorials/intermediate/rpc_async_execution.html, "Batch-updating parameter
server". `async` is the same with batches of one gradient.
"""

import threading

import torch
import torch.distributed.rpc as rpc
import torch.multiprocessing as mp
import torch.nn.functional as F

import common

NUM_WORKERS = 2


class BatchUpdateParameterServer:
    def __init__(self, args, batch_update_size):
        self.model = common.new_model(args)
        self.lock = threading.Lock()
        self.future_model = torch.futures.Future()
        self.batch_update_size = batch_update_size
        self.curr_update_size = 0
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=args.learning_rate)
        for p in self.model.parameters():
            p.grad = torch.zeros_like(p)

    def get_model(self):
        return self.model

    @staticmethod
    @rpc.functions.async_execution
    def update_and_fetch_model(ps_rref, grads):
        self = ps_rref.local_value()
        with self.lock:
            self.curr_update_size += 1
            for p, g in zip(self.model.parameters(), grads):
                p.grad += g
            fut = self.future_model
            if self.curr_update_size >= self.batch_update_size:
                for p in self.model.parameters():
                    p.grad /= self.batch_update_size
                self.curr_update_size = 0
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=False)
                fut.set_result(self.model)
                self.future_model = torch.futures.Future()
        return fut


class Trainer:
    def __init__(self, ps_rref, args, rank):
        self.ps_rref = ps_rref
        self.batches = common.Batches(args, rank, NUM_WORKERS)

    def train(self, steps):
        m = self.ps_rref.rpc_sync().get_model()
        for _ in range(steps):
            inputs, labels = self.batches.next()
            F.nll_loss(m(inputs), labels).backward()
            m = rpc.rpc_sync(
                self.ps_rref.owner(),
                BatchUpdateParameterServer.update_and_fetch_model,
                args=(self.ps_rref, [p.grad for p in m.parameters()]),
            )


def run(rank, args):
    options = rpc.TensorPipeRpcBackendOptions(num_worker_threads=16, rpc_timeout=3600)
    name = "ps" if rank == 0 else f"trainer{rank}"
    rpc.init_rpc(name, rank=rank, world_size=NUM_WORKERS + 1, rpc_backend_options=options)
    if rank == 0:
        run_ps(args)
    rpc.shutdown()


def run_ps(args):
    ps_rref = rpc.RRef(BatchUpdateParameterServer(args, NUM_WORKERS if args.mode == "sync" else 1))
    trainers = [
        rpc.remote(f"trainer{rank + 1}", Trainer, args=(ps_rref, args, rank)) for rank in range(NUM_WORKERS)
    ]
    evaluator = common.Evaluator(args)

    def train(steps):
        torch.futures.wait_all([trainer.rpc_async(timeout=0).train(steps) for trainer in trainers])

    def evaluate():
        return evaluator.accuracy(ps_rref.local_value().model)

    common.measure(args, NUM_WORKERS, train, evaluate)


if __name__ == "__main__":
    mp.spawn(run, args=(common.arguments(),), nprocs=NUM_WORKERS + 1)
