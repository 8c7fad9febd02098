"""A PyTorch model as one vector: which layers match burn's, and how. Needs PyTorch; skipped without."""

import os, struct, sys, unittest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "../../examples/python"))

try:
    import torch
    from torch import nn
except ImportError:
    torch = None
else:
    from flat_model import FlatModel, Frozen, LayoutMismatch, UnknownLayer, WrongStatistics
    from ps_client import InvalidInput, WrongDtype, WrongKind, WrongSize


def layout(*parameters, statistics=()):
    places, start = [], 0
    for name, shape in (*parameters, *statistics):
        count = 1
        for dimension in shape:
            count *= dimension
        places.append({"name": name, "shape": shape, "start": start, "len": count})
        start += count
    num_trainable = sum(place["len"] for place in places[:len(parameters)])
    return {"num_weights": start, "num_trainable": num_trainable, "parameters": places}


def of_norm(prefix, width=2):
    """The layout of a model that is one batch normalization."""
    return layout((prefix + "gamma", [width]), (prefix + "beta", [width]),
                  statistics=[(prefix + "running_mean", [width]), (prefix + "running_var", [width])])


@unittest.skipIf(torch is None, "PyTorch is not installed")
class Models(unittest.TestCase):
    def loaded(self, model, parameters):
        """Loads 0, 1, 2, ... and checks that the gradient of the sum of halves of squares is what was loaded."""
        flat = FlatModel(model, layout(*parameters))
        body = struct.pack(f"<{flat.num_weights}f", *range(flat.num_weights))
        flat.load(body)
        gradient = flat.gradient(sum((p * p).sum() / 2 for p in model.parameters()))
        self.assertEqual(bytes(gradient), body)
        return model

    def refuses(self, error, text, action, *arguments, **options):
        with self.assertRaises(error) as caught:
            action(*arguments, **options)
        self.assertIn(text, str(caught.exception))
        self.assertIsInstance(caught.exception, InvalidInput)

    def test_the_weight_of_a_linear_is_transposed_and_no_other_matrix_is(self):
        class Mine(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(2, 3)
                self.table = nn.Embedding(2, 3)
                self.matrix = nn.Parameter(torch.zeros(2, 3))
                self.square = nn.Parameter(torch.zeros(2, 2))
                self.many = nn.ParameterList([torch.zeros(3, 2)])

        model = self.loaded(Mine(), [
            ("fc.weight", [2, 3]), ("fc.bias", [3]), ("table.weight", [2, 3]), ("matrix", [2, 3]),
            ("square", [2, 2]), ("many.0", [3, 2])])
        self.assertEqual(model.fc.weight.tolist(), [[0, 3], [1, 4], [2, 5]])
        self.assertEqual(model.table.weight.tolist(), [[9, 10, 11], [12, 13, 14]])
        self.assertEqual(model.matrix.tolist(), [[15, 16, 17], [18, 19, 20]])
        self.assertEqual(model.square.tolist(), [[21, 22], [23, 24]])

    def test_a_square_linear_is_transposed_too_and_so_is_a_class_made_from_it(self):
        class Other(nn.Linear):
            pass

        for kind in (nn.Linear, Other):
            model = self.loaded(nn.Sequential(kind(2, 2, bias=False)), [("0.weight", [2, 2])])
            self.assertEqual(model[0].weight.tolist(), [[0, 2], [1, 3]])

    def test_a_container_with_a_parameter_of_its_own_is_ones_own(self):
        class Scaled(nn.Sequential):
            def __init__(self):
                super().__init__(nn.Linear(1, 2))
                self.scale = nn.Parameter(torch.ones(1, 2))

        self.loaded(Scaled(), [("0.weight", [1, 2]), ("0.bias", [2]), ("scale", [1, 2])])

    def test_convolutions_and_norms_have_burns_names_and_shapes(self):
        self.loaded(nn.Conv2d(1, 3, 2), [("weight", [3, 1, 2, 2]), ("bias", [3])])
        self.loaded(nn.ConvTranspose1d(2, 3, 4), [("weight", [2, 3, 4]), ("bias", [3])])
        self.loaded(nn.LayerNorm(4), [("gamma", [4]), ("beta", [4])])
        self.loaded(nn.GroupNorm(2, 4), [("gamma", [4]), ("beta", [4])])
        self.loaded(nn.InstanceNorm2d(4, affine=True), [("gamma", [4]), ("beta", [4])])
        self.loaded(nn.PReLU(), [("alpha", [1])])

    def test_the_order_is_the_layouts(self):
        model = nn.Sequential(nn.Linear(1, 2), nn.LayerNorm(2))
        self.loaded(model, [("1.beta", [2]), ("0.weight", [1, 2]), ("1.gamma", [2]), ("0.bias", [2])])

    def test_layers_that_are_not_known_to_match_are_refused_by_name(self):
        for layer in (nn.LSTM(2, 2), nn.GRU(2, 2), nn.RNNCell(2, 2), nn.MultiheadAttention(2, 1), nn.Bilinear(2, 2, 2)):
            self.refuses(UnknownLayer, type(layer).__name__, FlatModel, nn.Sequential(layer), layout())

        class Mine(nn.LSTM):
            pass

        self.refuses(UnknownLayer, "belongs to a Mine", FlatModel, Mine(2, 2), layout())
        weighed = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
        self.refuses(UnknownLayer, "original0", FlatModel, weighed, layout())

    def numbers(self, body):
        return list(struct.unpack(f"<{len(body) // 4}f", body))

    def step(self, model, flat, batch, loaded=(1, 1, 0, 0, 10, 10, 4, 4), **options):
        """Loads numbers and returns what is pushed."""
        flat.load(struct.pack(f"<{flat.num_weights}f", *loaded))
        return self.numbers(flat.gradient(model(batch).square().sum(), **options))

    def test_a_batch_normalization_sends_the_new_statistics_with_burns_variance(self):
        # Each channel has the mean 3; the squares of the differences are 4, 1, 0, 1 and 4, or 0.
        column = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
        rows = torch.stack([column, torch.full([5], 3.0)], 1)
        images = rows[:, :, None, None]
        for norm, batch in ((nn.BatchNorm1d, rows), (nn.BatchNorm2d, images), (nn.BatchNorm3d, images[..., None])):
            model = norm(2, momentum=0.25)
            flat = FlatModel(model, of_norm(""))
            for share, mean, variances in ((1, 8.25, [3.5, 3.0]), (0.5, 9.125, [3.75, 3.5]), (0, 10, [4, 4])):
                pushed = self.step(model, flat, batch, share=share)
                for got, expected in zip(pushed[4:], [mean, mean, *variances], strict=True):
                    self.assertAlmostEqual(got, expected, places=5)
            self.refuses(InvalidInput, "from 0 to 1", self.step, model, flat, batch, share=1.5)

    def test_values_along_an_image_count_for_the_variance(self):
        model = nn.BatchNorm2d(1, momentum=1.0)
        pushed = self.step(model, FlatModel(model, of_norm("", 1)), torch.tensor([[[[0.0, 2.0]]]]), (1, 0, 5, 5))
        self.assertEqual(pushed[2:], [1, 1])

    def test_statistics_are_loaded_and_an_evaluation_changes_none(self):
        model = nn.Sequential(nn.BatchNorm1d(2))
        flat = FlatModel(model, of_norm("norm."), names={
            "0.weight": "norm.gamma", "0.bias": "norm.beta",
            "0.running_mean": "norm.running_mean", "0.running_var": "norm.running_var"})
        flat.load(struct.pack("<8f", 1, 1, 0, 0, 1, 2, 3, 4))
        model.eval()(torch.rand(3, 2))
        self.assertEqual((model[0].running_mean.tolist(), model[0].running_var.tolist()), ([1, 2], [3, 4]))
        # Nor is it a pass of the step.
        loss = model.train()(torch.rand(3, 2)).square().sum()
        self.assertNotEqual(self.numbers(flat.gradient(loss))[4:], [1, 2, 3, 4])

    def test_a_step_that_does_not_make_each_statistic_once_is_refused(self):
        model, batch = nn.BatchNorm1d(2), torch.rand(3, 2)
        flat = FlatModel(model, of_norm(""))
        loss = lambda: model(batch).square().sum()
        self.refuses(WrongStatistics, "call `load`", flat.gradient, loss())
        self.step(model, flat, batch)
        self.refuses(WrongStatistics, "ran 2 times", flat.gradient, loss())
        self.step(model, flat, batch)
        weights = struct.pack("<8f", *range(8))
        flat.load(weights)
        self.refuses(WrongStatistics, "ran 0 times", flat.gradient, model.weight.sum())
        flat.load(weights)
        self.refuses(WrongStatistics, "ran 2 times", flat.gradient, loss() + loss())
        flat.load(weights)
        again = torch.utils.checkpoint.checkpoint(model, batch, use_reentrant=False).square().sum()
        self.refuses(WrongStatistics, "ran 2 times", flat.gradient, again)
        flat.load(weights)
        self.assertEqual(len(flat.gradient(model(input=batch).square().sum())), 32)
        model.eval()
        self.refuses(WrongStatistics, "in eval mode", self.step, model, flat, batch)
        model.train().momentum = None
        self.refuses(UnknownLayer, "momentum None", self.step, model, flat, batch)

    def test_layers_whose_statistics_cannot_be_burns_are_refused(self):
        for layer, text in (
            (nn.BatchNorm1d(2, momentum=None), "momentum None"),
            (nn.SyncBatchNorm(2), "is a SyncBatchNorm"),
            (nn.BatchNorm1d(2, track_running_stats=False), "without running statistics"),
            (nn.InstanceNorm1d(2, affine=True, track_running_stats=True), "is a InstanceNorm1d"),
        ):
            self.refuses(UnknownLayer, text, FlatModel, layer, of_norm(""))
        self.refuses(LayoutMismatch, "no shape yet", FlatModel, nn.LazyBatchNorm1d(), of_norm(""))
        self.refuses(LayoutMismatch, "no shape yet", FlatModel, nn.LazyBatchNorm1d(affine=False), of_norm(""))
        self.refuses(WrongDtype, "running_mean", FlatModel, nn.BatchNorm1d(2, affine=False).double(), of_norm(""))
        self.refuses(LayoutMismatch, "keep the running statistic `running_mean` [2]",
                     FlatModel, nn.LayerNorm(2), of_norm(""))
        self.refuses(LayoutMismatch, "`running_mean` has the shape [3]", FlatModel, nn.BatchNorm1d(3), layout(
            ("gamma", [3]), ("beta", [3]), statistics=[("running_mean", [2])]))

    def test_what_the_servers_freeze_is_frozen_here_too(self):
        for layer in (nn.BatchNorm2d(2), nn.BatchNorm1d(2, affine=False), nn.SyncBatchNorm(2)):
            model = nn.Sequential(layer, nn.Linear(1, 1))
            without = layout(("1.weight", [1, 1]), ("1.bias", [1]))
            self.refuses(LayoutMismatch, "`0.running_mean`, so their layer is frozen", FlatModel, model, without)
            layer.eval().requires_grad_(False)
            flat = FlatModel(model, without)
            model.train()
            self.refuses(LayoutMismatch, "after each `model.train()`", flat.gradient, model[1](torch.ones(1, 1)).sum())
        layer = nn.InstanceNorm1d(2, track_running_stats=True).eval().requires_grad_(False)
        FlatModel(layer, layout())
        # Only the statistics are frozen.
        norm = nn.BatchNorm1d(1, eps=0).eval()
        flat = FlatModel(norm, layout(("gamma", [1]), ("beta", [1])))
        flat.load(struct.pack("<2f", 1, 0))
        self.assertEqual(self.numbers(flat.gradient(norm(torch.tensor([[3.0]])).sum())), [3, 1])

    def test_a_mismatch_names_the_parameter(self):
        fc = lambda: nn.Linear(2, 3, bias=False)
        self.refuses(LayoutMismatch, "`weight` has the shape [3, 2], for the servers' `weight` it should be [2, 3]",
                     FlatModel, fc(), layout(("weight", [3, 2])))
        self.refuses(LayoutMismatch, "the servers train `w` [2, 3]", FlatModel, fc(), layout(("w", [2, 3])))
        self.refuses(LayoutMismatch, "do not have ['weight']", FlatModel, fc(), layout())
        self.refuses(LayoutMismatch, "do not have ['head.weight', 'table.weight']", FlatModel, self.tied(), layout())
        both = layout(("table.weight", [2, 2]), ("head.weight", [2, 2]))
        self.refuses(LayoutMismatch, "`head.weight` and `table.weight` are one tensor", FlatModel, self.tied(), both)
        damaged = layout(("weight", [2, 3]))
        damaged["parameters"][0]["start"] = 1
        self.refuses(LayoutMismatch, "damaged", FlatModel, fc(), damaged)
        damaged = layout(("weight", [2, 3])) | {"num_weights": 7}
        self.refuses(LayoutMismatch, "damaged", FlatModel, fc(), damaged)
        FlatModel(fc(), layout(("w", [2, 3])), names={"weight": "w"})
        self.refuses(LayoutMismatch, "['wrong']", FlatModel, fc(), layout(("weight", [2, 3])), names={"wrong": "w"})
        lazy = nn.LazyLinear(3)
        self.refuses(LayoutMismatch, "no shape yet", FlatModel, lazy, layout(("weight", [2, 3])))

    def tied(self):
        model = nn.ModuleDict({"table": nn.Embedding(2, 2), "head": nn.Linear(2, 2, bias=False)})
        model["head"].weight = model["table"].weight
        return model

    def test_a_parameter_in_two_places_travels_once(self):
        for name in ("table.weight", "head.weight"):
            model = self.tied()
            flat = FlatModel(model, layout((name, [2, 2])))
            flat.load(struct.pack("<4f", 1, 2, 3, 4))
            row = torch.tensor([1.0, 10.0])
            # Row 1 of the table gets 1 and 1. Each row of the head's matrix gets `row`.
            loss = model["table"](torch.tensor([1])).sum() + model["head"](row).sum()
            rows = [[1, 10], [2, 11]]
            # The servers have the matrix of a `Linear` transposed.
            expected = rows if name == "table.weight" else zip(*rows)
            self.assertEqual(self.numbers(flat.gradient(loss)), [number for row in expected for number in row])
            self.assertIs(model["head"].weight, model["table"].weight)

    def test_two_that_would_have_one_name_are_refused(self):
        one = layout(("table.weight", [2, 2]))
        # The order of the numbers depends on the place.
        self.refuses(LayoutMismatch, "`head.weight` and `table.weight` would both be the servers' `table.weight`",
                     FlatModel, self.tied(), one, names={"head.weight": "table.weight"})
        FlatModel(self.tied(), one, names={"head.weight": "table.weight", "table.weight": "other"})
        two = nn.ModuleDict({"a": nn.Linear(1, 1, bias=False), "b": nn.Linear(1, 1, bias=False)})
        shared = layout(("shared", [1, 1]))
        both = {"a.weight": "shared", "b.weight": "shared"}
        self.refuses(LayoutMismatch, "`b.weight` and `a.weight` would both be", FlatModel, two, shared, names=both)
        two["b"].weight = two["a"].weight
        FlatModel(two, shared, names=both)
        norms = nn.ModuleDict({"a": nn.BatchNorm1d(1), "b": nn.BatchNorm1d(1)})
        self.refuses(LayoutMismatch, "`b.running_var` and `a.running_var` would both be",
                     FlatModel, norms, layout(), names={"b.running_var": "a.running_var"})

    def test_numbers_of_another_precision_are_refused(self):
        for model in (nn.Linear(1, 1).double(), nn.Linear(1, 1).bfloat16()):
            self.refuses(WrongDtype, "model.float()", FlatModel, model, layout(("weight", [1, 1]), ("bias", [1])))
        model = nn.Linear(1, 1, bias=False)
        flat = FlatModel(model, layout(("weight", [1, 1])))
        model.double()
        loss = model(torch.ones(1, 1, dtype=torch.float64)).sum()
        self.refuses(WrongDtype, "model.float()", flat.gradient, loss)

    def test_what_is_frozen_is_named(self):
        model = nn.Linear(1, 1)
        model.bias.requires_grad_(False)
        both = layout(("weight", [1, 1]), ("bias", [1]))
        self.refuses(Frozen, "`bias` is frozen", FlatModel, model, both)
        FlatModel(model, layout(("weight", [1, 1])))  # What is frozen need not travel.
        flat = FlatModel(model, both, frozen=["bias"])
        self.assertEqual(bytes(flat.gradient(model(torch.full((1, 1), 2.0)).sum())), struct.pack("<2f", 2, 0))
        model.weight.requires_grad_(False)
        self.refuses(Frozen, "no parameter", flat.gradient, model(torch.ones(1, 1)).sum())

    def test_a_parameter_that_is_frozen_later_is_named(self):
        model = nn.Linear(1, 1)
        flat = FlatModel(model, layout(("weight", [1, 1]), ("bias", [1])))
        model.bias.requires_grad_(False)
        self.refuses(Frozen, "`bias` is frozen", flat.gradient, model(torch.ones(1, 1)).sum())

    def test_a_parameter_without_part_in_the_loss_has_the_gradient_zero(self):
        model = nn.Linear(1, 1)
        flat = FlatModel(model, layout(("weight", [1, 1]), ("bias", [1])))
        flat.gradient(model(torch.ones(1, 1)).sum())
        self.assertEqual(bytes(flat.gradient(3 * model.weight.sum())), struct.pack("<2f", 3, 0))

    def test_sparse_gradients_are_taken(self):
        model = nn.Embedding(3, 1, sparse=True)
        flat = FlatModel(model, layout(("weight", [3, 1])))
        loss = model(torch.tensor([1, 1])).sum()
        self.assertEqual(bytes(flat.gradient(loss)), struct.pack("<3f", 0, 2, 0))

    def test_what_is_no_loss_and_no_weights_is_refused_and_changes_nothing(self):
        model = nn.Linear(1, 1, bias=False)
        flat = FlatModel(model, layout(("weight", [1, 1])))
        before = model.weight.item()
        for loss in (1.0, b"1", None):
            self.refuses(WrongKind, "not a tensor", flat.gradient, loss)
        self.refuses(InvalidInput, "take its mean", flat.gradient, model(torch.ones(2, 1)))
        self.refuses(Frozen, "no_grad", flat.gradient, torch.tensor(1.0))
        self.refuses(WrongKind, "is a Tensor", flat.load, torch.ones(1))
        self.refuses(WrongSize, "8 bytes, expected 4", flat.load, bytes(8))
        self.refuses(WrongKind, "not a torch.nn.Module", FlatModel, {}, layout())
        self.assertEqual(model.weight.item(), before)


if __name__ == "__main__":
    unittest.main()
