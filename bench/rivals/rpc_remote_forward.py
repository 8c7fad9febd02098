"""A parameter server with PyTorch RPC in the guide's form: forward and backward run on the server.

After https://docs.pytorch.org/tutorials/intermediate/rpc_param_server_tutorial.html. One trainer: with two
the guide's program fails, "one of the variables needed for gradient computation has been modified by an
inplace operation".
"""

import threading

import torch
import torch.distributed.autograd as dist_autograd
import torch.distributed.rpc as rpc
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.distributed.optim import DistributedOptimizer

import common


def call_method(method, rref, *args, **kwargs):
    return method(rref.local_value(), *args, **kwargs)


def remote_method(method, rref, *args, **kwargs):
    return rpc.rpc_sync(rref.owner(), call_method, args=[method, rref] + list(args), kwargs=kwargs, timeout=0)


class ParameterServer(torch.nn.Module):
    def __init__(self, args):
        super().__init__()
        self.model = common.new_model(args)
        self.evaluator = common.Evaluator(args)

    def forward(self, inp):
        return self.model(inp)

    def get_param_rrefs(self):
        return [rpc.RRef(param) for param in self.model.parameters()]

    def accuracy(self):
        return self.evaluator.accuracy(self.model)


param_server = None
global_lock = threading.Lock()


def get_parameter_server(args):
    global param_server
    with global_lock:
        if not param_server:
            param_server = ParameterServer(args)
        return param_server


class TrainerNet(torch.nn.Module):
    def __init__(self, args):
        super().__init__()
        self.param_server_rref = rpc.remote("parameter_server", get_parameter_server, args=(args,))

    def get_global_param_rrefs(self):
        return remote_method(ParameterServer.get_param_rrefs, self.param_server_rref)

    def forward(self, x):
        return remote_method(ParameterServer.forward, self.param_server_rref, x)

    def accuracy(self):
        return remote_method(ParameterServer.accuracy, self.param_server_rref)


def run_trainer(args):
    net = TrainerNet(args)
    batches = common.Batches(args, 0, 1)
    opt = DistributedOptimizer(torch.optim.SGD, net.get_global_param_rrefs(), lr=args.learning_rate)

    def train(steps):
        for _ in range(steps):
            data, target = batches.next()
            with dist_autograd.context() as cid:
                loss = F.nll_loss(net(data), target)
                dist_autograd.backward(cid, [loss])
                opt.step(cid)

    common.measure(args, 1, train, net.accuracy)


def run(rank, args):
    name = "parameter_server" if rank == 0 else "trainer_1"
    rpc.init_rpc(name, rank=rank, world_size=2)
    if rank == 1:
        run_trainer(args)
    rpc.shutdown()


if __name__ == "__main__":
    mp.spawn(run, args=(common.arguments(),), nprocs=2)
