"""The baseline of the benches computes the same losses."""

import numpy as np
import torch

from tinc.baselines import PlainTree
from tinc.official import OctreeMLP, find_recipe, normalise, plan_tree
from tinc.official.model import split
from tinc.official.procedure import weighted_loss
from tinc.recipes import LossWeight
from tinc.samples import sample_volume


def test_plain_tree_has_the_same_loss() -> None:
    volume = np.ascontiguousarray(sample_volume()[:8, :32, :32])[..., None]
    normalised, _ = normalise(volume)
    plan = plan_tree(find_recipe("multi2"), normalised, 40 * volume.nbytes)
    model, plain = OctreeMLP(plan), PlainTree(plan, normalised)
    with torch.no_grad():
        for (_, parameter), linear in zip(
            _pairs(model), [item for segment in plain.segments for item in segment], strict=True
        ):
            weight, bias = parameter
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
    points = torch.arange(0, len(plain.grid), 3)
    labels = split(torch.from_numpy(normalised), plan.num_levels)
    loss = weighted_loss(model(points), labels[:, points], LossWeight())
    torch.testing.assert_close(torch.tensor(plain.step(points)), loss.detach(), rtol=1e-4, atol=0)


def _pairs(model: OctreeMLP) -> list[tuple[str, tuple[torch.Tensor, torch.Tensor]]]:
    named = list(model.node_parameters())
    return [(named[i][0], (named[i][1], named[i + 1][1])) for i in range(0, len(named), 2)]
