"""A PyTorch model as one vector, in the order of the servers' layout.

The servers' side is a burn model. A layer of `torch.nn` has the values of burn's layer of the same name, except that
a `Linear`'s weight is the transposed matrix, and that burn says `gamma`, `beta` and `alpha` where PyTorch says
`weight` and `bias`. Layers of which it is not known that they match (`LSTM`, `MultiheadAttention`, ...) are refused by
name. Parameters of your own modules are taken as they are: same shape, same order of the numbers.

The running statistics of a batch normalization stand behind the parameters. In their place, a push has what the step
has made of those that were loaded. Momentum and epsilon are not in the layout: they must be those of the servers'
model.
"""

import math

import torch
from torch import nn

from ps_client import InvalidInput, WrongDtype, WrongKind, float32_bytes

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LOOKUPS = (nn.Embedding, nn.EmbeddingBag)
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.RMSNorm)
BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)
STATISTICS = ("running_mean", "running_var")
PLAIN = (nn.Module, nn.ParameterList, nn.ParameterDict, nn.Sequential, nn.ModuleList, nn.ModuleDict)


class UnknownLayer(InvalidInput):
    """A layer of PyTorch whose parameters are not known to match burn's."""


class LayoutMismatch(InvalidInput):
    """The model and the servers' layout do not have the same parameters."""


class Frozen(InvalidInput):
    """A parameter that the servers train has no gradient here."""


class WrongStatistics(InvalidInput):
    """The step did not make the running statistics as the servers' model would."""


def known_names(module):
    """Returns burn's names of the module's own parameters and which are transposed; None if that is not known."""
    if isinstance(module, nn.Linear):
        return {"weight": ("weight", True), "bias": ("bias", False)}
    if isinstance(module, CONVOLUTIONS + LOOKUPS):
        return {"weight": ("weight", False), "bias": ("bias", False)}
    if isinstance(module, NORMS + BATCH_NORMS):
        return {"weight": ("gamma", False), "bias": ("beta", False)}
    if isinstance(module, nn.PReLU):
        return {"weight": ("alpha", False)}
    # One's own class, made of nothing of PyTorch's that has parameters.
    if not any(base.__module__.startswith("torch.") and base not in PLAIN for base in type(module).__mro__):
        return {name: (name, False) for name in module._parameters}
    return None


def check_tensor(full, tensor, kind):
    """Checks that a parameter or statistic can be sent."""
    if nn.parameter.is_lazy(tensor):
        raise LayoutMismatch(f"`{full}` has no shape yet: run the {kind} on one batch first")
    if tensor.dtype != torch.float32:
        raise WrongDtype(f"`{full}` is {tensor.dtype}, the servers' numbers are float32: call `model.float()`")
    if tensor.is_meta:
        raise WrongKind(f"`{full}` is on the device `meta` and has no numbers: call `model.to_empty(device='cpu')`")


def parameters_by_name(model):
    """Returns burn's path, PyTorch's path, the parameter, and whether it is transposed, of all that a model has. A
    parameter that is in several places is there once for each of them."""
    found = []
    for path, module in model.named_modules():
        prefix, kind = path + "." if path else "", type(module).__name__
        has_statistics = getattr(module, "track_running_stats", False) and not isinstance(module, BATCH_NORMS)
        is_frozen = not any(p.requires_grad for p in module.parameters(recurse=False)) and not module.training
        if has_statistics and not is_frozen:
            raise UnknownLayer(
                f"`{path or kind}` is a {kind}, whose running statistics this worker cannot send: use a BatchNorm, "
                "GroupNorm or LayerNorm, or freeze it (`eval()` and `requires_grad_(False)`)")
        names = known_names(module)
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            full = prefix + name
            if names is None or name not in names:
                raise UnknownLayer(
                    f"`{full}` belongs to a {kind}, of which it is not known that its numbers lie as burn's do: "
                    "write it as a module of your own, with the parameters that the servers' model has")
            check_tensor(full, parameter, kind)
            theirs, is_transposed = names[name]
            found.append((prefix + theirs, full, parameter, is_transposed))
    return found


class BatchNorm:
    """A batch normalization of a model. As the layer's hook, it notes each pass that changes the statistics."""

    def __init__(self, path, module):
        self.module, self.kind = module, type(module).__name__
        self.path = path or self.kind
        self.loaded, self.num_passes, self.num_values = {}, 0, 0
        for name in STATISTICS:
            statistic = getattr(module, name)
            if statistic is None:
                raise UnknownLayer(f"`{self.path}` is a {self.kind} without running statistics, which burn's has: "
                                   "make it with `track_running_stats=True`")
            check_tensor(f"{path}.{name}" if path else name, statistic, self.kind)

    def __call__(self, module, arguments, named):
        if module.training:
            batch = arguments[0] if arguments else named["input"]
            self.num_passes += 1
            self.num_values = batch.numel() // module.num_features  # Those of one channel.

    def load(self, name, values):
        getattr(self.module, name).copy_(values)
        self.loaded[name] = values.clone()
        self.num_passes = 0

    def check_layer(self):
        """Checks that the layer can make its statistics as burn's does."""
        if isinstance(self.module, nn.SyncBatchNorm):
            raise UnknownLayer(f"`{self.path}` is a SyncBatchNorm, but the servers take the mean of the statistics of "
                               "workers that each know their own batch: use a BatchNorm1d, BatchNorm2d or BatchNorm3d")
        if self.module.momentum is None:
            raise UnknownLayer(f"`{self.path}` is a {self.kind} with the momentum None, which makes the mean of all "
                               "batches: set it to the momentum of the servers' layer, a number")

    def check_pass(self):
        """Checks that the statistics are those of one batch."""
        if not self.module.training:
            raise WrongStatistics(f"`{self.path}` is in eval mode and keeps its statistics, which the servers train: "
                                  "call `model.train()` before the step; or freeze the layer in the servers' model too")
        if not self.loaded:
            raise WrongStatistics(f"`{self.path}` has no statistics of the servers: call `load` before the step")
        if self.num_passes != 1:
            raise WrongStatistics(
                f"`{self.path}` ran {self.num_passes} times in training mode since the weights were loaded, expected "
                "one pass: load the weights before each step, and run the layer once in it, without computing it "
                "again for the gradient (checkpointing)")

    def new(self, name):
        """Returns what burn's layer makes of the statistic that was loaded."""
        old, new = self.loaded[name], getattr(self.module, name).to("cpu", torch.float32)
        if name == "running_var":
            # PyTorch adds `momentum` times the batch's unbiased variance, burn the biased one, which is smaller
            # by (n - 1) / n. The part of the old statistic is the same.
            n = self.num_values
            new = new * ((n - 1) / n) + old * ((1 - self.module.momentum) / n)
        return new


def statistics_by_name(model):
    """Returns the path, the name and the layer of all running statistics of batch normalizations."""
    found = []
    for path, module in model.named_modules():
        if isinstance(module, BATCH_NORMS):
            norm = BatchNorm(path, module)
            found += [(f"{path}.{name}" if path else name, name, norm) for name in STATISTICS]
    return found


def place_under(places, theirs, place):
    """Notes what has the servers' name `theirs`, with its path here first. One tensor in several places may be there
    several times, if the order of its numbers is the same in each."""
    full, *what = place
    other, *others = places.setdefault(theirs, place)
    if any(one is not two for one, two in zip(what, others)):
        raise LayoutMismatch(f"`{full}` and `{other}` would both be the servers' `{theirs}`: say with `names` which of "
                             "them it is, and give the other one another name")


class FlatModel:
    """`names` renames: the servers' path of a parameter or statistic by its path here, where they differ. `frozen` are
    the paths here of parameters that the servers' model freezes too: their gradient is zero."""

    def __init__(self, model, layout, names=None, frozen=()):
        if not isinstance(model, nn.Module):
            raise WrongKind(f"the model is a {type(model).__name__}, not a torch.nn.Module")
        self.model, self.num_weights, self.places = model, layout["num_weights"], []
        self.statistics, self.batch_norms = [], []  # Those that the servers keep.
        names, self.frozen = dict(names or {}), set(frozen)
        ours, statistics, placed = {}, {}, {}
        for theirs, full, parameter, is_transposed in parameters_by_name(model):
            place_under(ours, names.pop(full, theirs), (full, parameter, is_transposed))
        for full, name, norm in statistics_by_name(model):
            place_under(statistics, names.pop(full, full), (full, name, norm))
        if names:
            raise LayoutMismatch(f"`names` has {sorted(names)}, which the model does not have")
        end = 0
        for p in layout["parameters"]:
            name, shape, start, count = p["name"], list(p["shape"]), p["start"], p["len"]
            is_statistic = start >= layout["num_trainable"]
            there, keep = (statistics, "keep the running statistic") if is_statistic else (ours, "train")
            if name not in there:
                raise LayoutMismatch(
                    f"the servers {keep} `{name}` {shape}, which the model does not have; it has {sorted(there)}: "
                    "rename it, or say which it is with `names`")
            if is_statistic:
                full, which, norm = statistics.pop(name)
                found, is_transposed = list(getattr(norm.module, which).shape), False
            else:
                full, parameter, is_transposed = ours.pop(name)
                found = list(parameter.shape)
                other = placed.setdefault(id(parameter), full)
                if other != full:
                    raise LayoutMismatch(f"`{full}` and `{other}` are one tensor, but two parameters for the servers, "
                                         "which would drift apart: give each its own")
            if (found[::-1] if is_transposed else found) != shape:
                wanted = shape[::-1] if is_transposed else shape
                raise LayoutMismatch(f"`{full}` has the shape {found}, for the servers' `{name}` it should be {wanted}")
            if start != end or count != math.prod(shape):
                raise LayoutMismatch(
                    f"the layout is damaged: `{name}` {shape} has {count} numbers from {start}, expected from {end}")
            end += count
            if is_statistic:
                self.statistics.append((norm, which, slice(start, end)))
            else:
                self.places.append((full, parameter, is_transposed, shape, slice(start, end)))
        # A layer's statistics stay here if the servers' model freezes it.
        self.fixed = [(full, norm) for full, _, norm in statistics.values()]
        self.batch_norms = list(dict.fromkeys(norm for norm, *_ in self.statistics))
        self._check_frozen()
        if end != self.num_weights:
            raise LayoutMismatch(f"the layout is damaged: it has {self.num_weights} weights, its parameters {end}")
        # What is frozen need not travel; what is trained has to. A parameter in several places travels once, and
        # PyTorch adds up the gradients of all of them.
        extra = sorted(full for full, parameter, _ in ours.values()
                       if parameter.requires_grad and id(parameter) not in placed)
        if extra:
            raise LayoutMismatch(f"the servers do not have {extra}, which would never be trained: "
                                 "remove them, or call `requires_grad_(False)` on them")
        for norm in self.batch_norms:
            norm.check_layer()
            # A pass that is computed again for the gradient may stop before its end, so it is noted at its beginning.
            norm.module.register_forward_pre_hook(norm, with_kwargs=True)

    def _check_frozen(self):
        for full, parameter, *_ in self.places:
            if not parameter.requires_grad and full not in self.frozen:
                raise Frozen(
                    f"`{full}` is frozen here, but the servers expect its gradient: call `requires_grad_()` on it; "
                    "or freeze it in the servers' model too, and name it in `frozen`")
        for full, norm in self.fixed:
            if norm.module.training:
                raise LayoutMismatch(
                    f"the servers do not have `{full}`, so their layer is frozen: call `eval()` on this {norm.kind} "
                    "too, after each `model.train()`")

    def load(self, body):
        """Takes weights as bytes."""
        flat = torch.frombuffer(bytearray(float32_bytes(body, self.num_weights, "weights")), dtype=torch.float32)
        with torch.no_grad():
            for _, parameter, is_transposed, shape, place in self.places:
                values = flat[place].view(shape)
                parameter.copy_(values.T if is_transposed else values)
            for norm, name, place in self.statistics:
                norm.load(name, flat[place])

    def gradient(self, loss, share=1.0):
        """Returns the gradient of a loss, as bytes; in the places of running statistics, the new ones. `share` is the
        batch's part of a full one: a small batch moves the statistics less."""
        if not isinstance(loss, torch.Tensor):
            raise WrongKind(f"the loss is a {type(loss).__name__}, not a tensor: compute it with PyTorch, "
                            "without `.item()`, `.numpy()` or `.detach()`")
        if loss.numel() != 1:
            raise InvalidInput(f"the loss has the shape {list(loss.shape)}, not one number: take its mean")
        if not loss.requires_grad:
            raise Frozen("the loss depends on no parameter that is trained: compute it from the model's output, "
                         "outside of `torch.no_grad()`")
        if not 0 <= share <= 1:
            raise InvalidInput(f"the share of a full batch is {share}: it is from 0 to 1")
        self._check_frozen()
        self.model.zero_grad()
        loss.backward()
        # A backward pass may compute a layer again.
        for norm in self.batch_norms:
            norm.check_layer()
            norm.check_pass()
        body = bytearray(4 * self.num_weights)
        flat = torch.frombuffer(body, dtype=torch.float32)
        for full, parameter, is_transposed, shape, place in self.places:
            gradient = parameter.grad
            if gradient is None:
                continue  # It has no part in this loss: zero, as burn has it.
            if gradient.dtype != torch.float32:
                raise WrongDtype(f"the gradient of `{full}` is {gradient.dtype}, the servers' numbers are float32: "
                                 "call `model.float()`")
            gradient = gradient.to_dense() if gradient.layout != torch.strided else gradient
            flat[place].view(shape).copy_(gradient.T if is_transposed else gradient)
        for norm, name, place in self.statistics:
            flat[place] = torch.lerp(norm.loaded[name], norm.new(name), share)
        return body
