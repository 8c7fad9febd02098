"""A PyTorch model as one vector, in the order of the servers' layout."""

import torch


class FlatModel:
    def __init__(self, model, layout):
        self.model, self.num_weights = model, layout["num_weights"]
        named, self.places = dict(model.named_parameters()), []
        for p in layout["parameters"]:
            parameter, shape = named.pop(p["name"]), p["shape"]
            # A Linear's weight is [in, out] there and [out, in] here.
            is_transposed = parameter.ndim == 2
            assert list(parameter.T.shape if is_transposed else parameter.shape) == shape, p
            self.places.append((parameter, is_transposed, shape, slice(p["start"], p["start"] + p["len"])))
        assert not named, f"the servers do not have {list(named)}"

    def load(self, body):
        """Takes weights as bytes."""
        flat = torch.frombuffer(bytearray(body), dtype=torch.float32)
        with torch.no_grad():
            for parameter, is_transposed, shape, place in self.places:
                values = flat[place].view(shape)
                parameter.copy_(values.T if is_transposed else values)

    def gradient(self, loss):
        """Returns the gradient of a loss, as bytes."""
        self.model.zero_grad()
        loss.backward()
        body = bytearray(4 * self.num_weights)
        flat = torch.frombuffer(body, dtype=torch.float32)
        for parameter, is_transposed, shape, place in self.places:
            flat[place].view(shape).copy_(parameter.grad.T if is_transposed else parameter.grad)
        return body
