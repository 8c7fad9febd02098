"""The PyTorch side of step.rs: does a training step of the net that a line of input names, on one
thread, and prints the milliseconds that forward and backward took."""

import sys
import time

import torch
from torch import nn
from torch.nn import functional as F


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3)
        self.conv2 = nn.Conv2d(32, 64, 3)
        self.dropout1 = nn.Dropout2d(0.25)
        self.dropout2 = nn.Dropout(0.5)
        self.fc1 = nn.Linear(9216, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x):
        x = F.max_pool2d(self.conv2(F.relu(self.conv1(x))), 2)
        x = self.dropout1(x).flatten(1)
        x = self.dropout2(F.relu(self.fc1(x)))
        return F.log_softmax(self.fc2(x), 1)


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 3, 3)
        self.fc = nn.Linear(192, 10)

    def forward(self, x):
        x = F.relu(F.max_pool2d(self.conv1(x), 3))
        return F.log_softmax(self.fc(x.flatten(1)), 1)


torch.set_num_threads(1)
nets = {}
for net, batch in (Net(), 32), (ConvNet(), 128):
    nets[type(net).__name__] = net, torch.rand(batch, 1, 28, 28), torch.randint(10, (batch,))
print(torch.__version__, flush=True)
for line in sys.stdin:
    net, images, labels = nets[line.strip()]
    net.zero_grad()
    started = time.perf_counter()
    F.nll_loss(net(images), labels).backward()
    print(1e3 * (time.perf_counter() - started), flush=True)
