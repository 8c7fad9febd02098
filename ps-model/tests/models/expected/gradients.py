"""Writes the losses and gradients that tests/models/gradients.rs expects, computed by PyTorch.

    pip install torch==2.9.0 numpy      # scripts/install-libtorch.sh makes such an environment
    python gradients.py                 # in this directory; writes convnet.txt and net*.txt

Initial weights, images and dropout masks are those of ps-model: this program repeats its random
numbers (src/rng.rs, src/seeded.rs, src/step.rs) independently. Everything is computed in double
precision, so what remains as difference is the single precision of the backend under test.
"""

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

GAMMA = 0x9E3779B97F4A7C15
WORD = (1 << 64) - 1


def mix(z):
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


class Rng:
    def __init__(self, *parts, state=0):
        for part in parts:
            state = mix(((state + GAMMA) & WORD) ^ mix((part + GAMMA) & WORD))
        self.state = state

    def next(self):
        self.state = (self.state + GAMMA) & WORD
        return mix(self.state)

    def uniform(self, count):
        """Single precision numbers in 0..1."""
        return np.array([(self.next() >> 40) / (1 << 24) for _ in range(count)], np.float32)

    def within(self, bound, shape):
        values = (np.float32(2) * self.uniform(int(np.prod(shape))) - np.float32(1)) * bound
        return torch.tensor(values).reshape(shape)

    def mask(self, probability, shape):
        """0 with the probability, else 1 / (1 - probability); 16 bits for each, lowest first."""
        threshold = round(probability * 65536)
        factors = []
        while len(factors) < np.prod(shape):
            bits = self.next()
            lanes = [(bits >> shift) & 0xFFFF for shift in (0, 16, 32, 48)]
            factors += [65536 / (65536 - threshold) if lane >= threshold else 0.0 for lane in lanes]
        return torch.tensor(factors[: int(np.prod(shape))], dtype=torch.float64).reshape(shape)


def init(model, rng):
    for layer in model.children():
        bound = np.float32(1) / np.sqrt(np.float32(layer.weight[0].numel()))
        with torch.no_grad():
            if isinstance(layer, nn.Linear):  # burn keeps [inputs, outputs]
                layer.weight.copy_(rng.within(bound, layer.weight.T.shape).T)
            else:
                layer.weight.copy_(rng.within(bound, layer.weight.shape))
            layer.bias.copy_(rng.within(bound, layer.bias.shape))
    return model.double()


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 3, kernel_size=3)
        self.fc = nn.Linear(192, 10)

    def forward(self, x, masks):
        x = F.relu(F.max_pool2d(self.conv1(x), 3))
        return F.log_softmax(self.fc(x.view(-1, 192)), dim=1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, 1)
        self.conv2 = nn.Conv2d(32, 64, 3, 1)
        self.fc1 = nn.Linear(9216, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x, masks):
        x = F.max_pool2d(self.conv2(F.relu(self.conv1(x))), 2)
        x = torch.flatten(x * masks[0], 1)
        x = F.relu(self.fc1(x)) * masks[1]
        return F.log_softmax(self.fc2(x), dim=1)


def write(path, model, batch, masks):
    images = Rng(state=7).uniform(batch * 28 * 28).astype(np.float64)
    images = torch.tensor((images - 0.5) * 4).reshape(batch, 1, 28, 28)  # exact in f32 too
    labels = torch.tensor([7 * i % 10 for i in range(batch)])
    loss = F.nll_loss(model(images, masks), labels)
    loss.backward()
    with open(path, "w") as out:
        print(f"loss {loss.item():.9e}", file=out)
        for name, parameter in model.named_parameters():
            gradient = parameter.grad.T if name in LINEAR else parameter.grad
            flat = gradient.reshape(-1)
            print(f"{name} norm {flat.norm().item():.9e}", file=out)
            samples = min(20, flat.numel())
            for index in (i * flat.numel() // samples for i in range(samples)):
                print(f"{name} {index} {flat[index].item():.9e}", file=out)


LINEAR = {"fc.weight", "fc1.weight", "fc2.weight"}
write("convnet.txt", init(ConvNet(), Rng(state=42)), 16, None)
write("net.txt", init(Net(), Rng(state=42)), 4, [1, 1])
step = Rng(5, 1, 3)  # seed, worker, clock
masks = [step.mask(0.25, (4, 64, 1, 1)), step.mask(0.5, (4, 128))]
write("net_dropout.txt", init(Net(), Rng(state=42)), 4, masks)
