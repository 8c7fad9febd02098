"""A PyTorch model as one vector, in the order of the servers' layout.

The servers' side is a burn model. A layer of `torch.nn` has the values of burn's layer of the same name, except that
a `Linear`'s weight is the transposed matrix, and that burn says `gamma`, `beta` and `alpha` where PyTorch says
`weight` and `bias`. Layers of which it is not known that they match (`LSTM`, `MultiheadAttention`, ...) are refused by
name. Parameters of your own modules are taken as they are: same shape, same order of the numbers.
"""

import math

import torch
from torch import nn

from ps_client import InvalidInput, WrongDtype, WrongKind, float32_bytes

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LOOKUPS = (nn.Embedding, nn.EmbeddingBag)
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.RMSNorm)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
PLAIN = (nn.Module, nn.ParameterList, nn.ParameterDict, nn.Sequential, nn.ModuleList, nn.ModuleDict)


class UnknownLayer(InvalidInput):
    """A layer of PyTorch whose parameters are not known to match burn's."""


class LayoutMismatch(InvalidInput):
    """The model and the servers' layout do not have the same parameters."""


class Frozen(InvalidInput):
    """A parameter that the servers train has no gradient here."""


def known_names(module):
    """Returns burn's names of the module's own parameters and which are transposed; None if that is not known."""
    if isinstance(module, nn.Linear):
        return {"weight": ("weight", True), "bias": ("bias", False)}
    if isinstance(module, CONVOLUTIONS + LOOKUPS):
        return {"weight": ("weight", False), "bias": ("bias", False)}
    if isinstance(module, NORMS):
        return {"weight": ("gamma", False), "bias": ("beta", False)}
    if isinstance(module, nn.PReLU):
        return {"weight": ("alpha", False)}
    # One's own class, made of nothing of PyTorch's that has parameters.
    if not any(base.__module__.startswith("torch.") and base not in PLAIN for base in type(module).__mro__):
        return {name: (name, False) for name in module._parameters}
    return None


def parameters_by_name(model):
    """Returns burn's path, PyTorch's path, the parameter, and whether it is transposed, of all that a model has."""
    found, owners = [], {}
    for path, module in model.named_modules():
        prefix, kind = path + "." if path else "", type(module).__name__
        has_statistics = getattr(module, "track_running_stats", False) or isinstance(module, BATCH_NORMS)
        is_frozen = not any(p.requires_grad for p in module.parameters(recurse=False)) and not module.training
        if has_statistics and not is_frozen:
            raise UnknownLayer(
                f"`{path or kind}` is a {kind}, whose running statistics this worker cannot send: "
                "use a GroupNorm or LayerNorm, or freeze it (`eval()` and `requires_grad_(False)`)")
        names = known_names(module)
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            full = prefix + name
            if isinstance(module, BATCH_NORMS):
                names = {"weight": ("gamma", False), "bias": ("beta", False)}
            if names is None or name not in names:
                raise UnknownLayer(
                    f"`{full}` belongs to a {kind}, of which it is not known that its numbers lie as burn's do: "
                    "write it as a module of your own, with the parameters that the servers' model has")
            if nn.parameter.is_lazy(parameter):
                raise LayoutMismatch(f"`{full}` has no shape yet: run the {kind} on one batch first")
            if id(parameter) in owners:
                raise LayoutMismatch(
                    f"`{full}` and `{owners[id(parameter)]}` are one tensor, but two parameters for the servers, "
                    "which would drift apart: give each its own")
            owners[id(parameter)] = full
            if parameter.dtype != torch.float32:
                raise WrongDtype(f"`{full}` is {parameter.dtype}, the servers' numbers are float32: call `model.float()`")
            if parameter.is_meta:
                raise WrongKind(f"`{full}` is on the device `meta` and has no numbers: call `model.to_empty(device='cpu')`")
            theirs, is_transposed = names[name]
            found.append((prefix + theirs, full, parameter, is_transposed))
    return found


class FlatModel:
    """`names` renames: the servers' path of a parameter by its path here, where they differ. `frozen` are the paths
    here of parameters that the servers' model freezes too: their gradient is zero."""

    def __init__(self, model, layout, names=None, frozen=()):
        if not isinstance(model, nn.Module):
            raise WrongKind(f"the model is a {type(model).__name__}, not a torch.nn.Module")
        self.model, self.num_weights, self.places = model, layout["num_weights"], []
        names, self.frozen = dict(names or {}), set(frozen)
        ours = {}
        for theirs, full, parameter, is_transposed in parameters_by_name(model):
            ours[names.pop(full, theirs)] = full, parameter, is_transposed
        if names:
            raise LayoutMismatch(f"`names` has {sorted(names)}, which the model does not have")
        end = 0
        for p in layout["parameters"]:
            name, shape, start, count = p["name"], list(p["shape"]), p["start"], p["len"]
            if name not in ours:
                raise LayoutMismatch(
                    f"the servers train `{name}` {shape}, which the model does not have; it has {sorted(ours)}: "
                    "rename it, or say which it is with `names`")
            full, parameter, is_transposed = ours.pop(name)
            found = list(parameter.shape)
            if (found[::-1] if is_transposed else found) != shape:
                wanted = shape[::-1] if is_transposed else shape
                raise LayoutMismatch(f"`{full}` has the shape {found}, for the servers' `{name}` it should be {wanted}")
            if start != end or count != math.prod(shape):
                raise LayoutMismatch(
                    f"the layout is damaged: `{name}` {shape} has {count} numbers from {start}, expected from {end}")
            end += count
            self.places.append((full, parameter, is_transposed, shape, slice(start, end)))
        self._check_frozen()
        if end != self.num_weights:
            raise LayoutMismatch(f"the layout is damaged: it has {self.num_weights} weights, its parameters {end}")
        # What is frozen need not travel; what is trained has to.
        extra = sorted(full for full, parameter, _ in ours.values() if parameter.requires_grad)
        if extra:
            raise LayoutMismatch(f"the servers do not have {extra}, which would never be trained: "
                                 "remove them, or call `requires_grad_(False)` on them")

    def _check_frozen(self):
        for full, parameter, *_ in self.places:
            if not parameter.requires_grad and full not in self.frozen:
                raise Frozen(
                    f"`{full}` is frozen here, but the servers expect its gradient: call `requires_grad_()` on it; "
                    "or freeze it in the servers' model too, and name it in `frozen`")

    def load(self, body):
        """Takes weights as bytes."""
        flat = torch.frombuffer(bytearray(float32_bytes(body, self.num_weights, "weights")), dtype=torch.float32)
        with torch.no_grad():
            for _, parameter, is_transposed, shape, place in self.places:
                values = flat[place].view(shape)
                parameter.copy_(values.T if is_transposed else values)

    def gradient(self, loss):
        """Returns the gradient of a loss, as bytes."""
        if not isinstance(loss, torch.Tensor):
            raise WrongKind(f"the loss is a {type(loss).__name__}, not a tensor: compute it with PyTorch, "
                            "without `.item()`, `.numpy()` or `.detach()`")
        if loss.numel() != 1:
            raise InvalidInput(f"the loss has the shape {list(loss.shape)}, not one number: take its mean")
        if not loss.requires_grad:
            raise Frozen("the loss depends on no parameter that is trained: compute it from the model's output, "
                         "outside of `torch.no_grad()`")
        self._check_frozen()
        self.model.zero_grad()
        loss.backward()
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
        return body
