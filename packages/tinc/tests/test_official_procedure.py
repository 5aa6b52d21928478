"""Points, losses, optimisers and the evaluation schedule; test_parity has the numbers of the official code."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from tinc.official.procedure import (
    create_optimizer,
    create_scheduler,
    draw_points,
    evaluation_schedule,
    num_steps,
    points_per_leaf,
    weighted_loss,
)
from tinc.recipes import RECIPES, LossWeight, Scheduler


class TestPoints:
    def test_official_bounds(self) -> None:
        assert points_per_leaf(513 * 8, 2, population=100) == 513
        with pytest.raises(ValueError, match=r"batch_size=262144 gives each of the 512 leaves 512 points"):
            points_per_leaf(262_144, 4, population=100)
        with pytest.raises(ValueError, match="less than 2097152"):
            points_per_leaf(2_097_152, 1, population=100)

    def test_mended(self) -> None:
        assert points_per_leaf(4096, 2, population=100, compat="none") == 100
        assert points_per_leaf(7, 2, population=100, compat="none") == 1
        points = draw_points(100, 100, torch.Generator().manual_seed(0), compat="none")
        assert sorted(points.tolist()) == list(range(100))

    def test_replacement(self) -> None:
        points = draw_points(5, 1000, torch.Generator().manual_seed(0))
        assert points.shape == (1000,) and set(points.tolist()) == set(range(5))


class TestSchedule:
    def test_last_step_counts_once(self) -> None:
        assert evaluation_schedule(10, 10, epochs=4, every=2) == [(3, 2), (4, 4)]
        assert evaluation_schedule(10, 4, epochs=3, every=1) == [(4, 1), (7, 2), (9, 3)]
        assert num_steps(10, 4, 3) == 9


class TestLoss:
    def test_reference(self) -> None:
        generator = torch.Generator().manual_seed(0)
        prediction, target = (torch.randn(3, 7, 2, generator=generator, dtype=torch.float64) for _ in range(2))
        target[0, 0] = torch.tensor([0.5, 1.0])
        weight = LossWeight(low=0.5, high=1.0, scale=0.1)
        wanted = torch.zeros((), dtype=torch.float64)
        for leaf in range(3):
            for guess, truth in zip(prediction[leaf].flatten(), target[leaf].flatten(), strict=True):
                wanted += (0.1 if 0.5 <= truth <= 1.0 else 1) * (guess - truth) ** 2 / 14
        assert_close(weighted_loss(prediction, target, weight), wanted, rtol=1e-10, atol=1e-12)
        unit = weighted_loss(prediction, target, LossWeight(scale=1.0))
        assert_close(unit, ((prediction - target) ** 2).mean() * 3)


class TestOptimizer:
    @pytest.mark.parametrize("name", ["Adamax", "Adam", "SGD"])
    def test_equals_torch(self, name: str) -> None:
        """One call for all tensors gives the same digits."""
        recipe = replace(RECIPES["default"], optimizer=name, lr=0.01)
        ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 9)) for _ in range(2))
        pairs = (
            (ours, create_optimizer([ours], recipe)),
            (theirs, getattr(torch.optim, name)([theirs], lr=0.01, foreach=False)),
        )
        for parameter, optimizer in pairs:
            for _ in range(5):
                optimizer.zero_grad()
                parameter.sin().sum().backward()
                optimizer.step()
        assert torch.equal(ours, theirs)

    @pytest.mark.parametrize(
        ("scheduler", "rates"),
        [
            (Scheduler(name="none", arguments=()), [1, 1, 1]),
            (Scheduler(name="StepLR", arguments=(("step_size", 2), ("gamma", 0.5))), [1, 1, 0.5]),
            (Scheduler(name="MultiStepLR", arguments=(("milestones", (1,)), ("gamma", 0.1))), [1, 0.1, 0.1]),
            (Scheduler(name="CyclicLR", arguments=(("base_lr", 1.0), ("max_lr", 3.0), ("step_size_up", 2))), [1, 2, 3]),
        ],
        ids=lambda value: value.name if isinstance(value, Scheduler) else "",
    )
    def test_schedulers(self, scheduler: Scheduler, rates: list[float]) -> None:
        recipe = replace(RECIPES["default"], lr=1.0, scheduler=scheduler)
        parameter = torch.nn.Parameter(torch.ones(1))
        optimizer = create_optimizer([parameter], recipe)
        stepping = create_scheduler(optimizer, recipe)
        for rate in rates:
            assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)
            parameter.grad = torch.ones(1)
            optimizer.step()
            if stepping is not None:
                stepping.step()

    def test_errors(self) -> None:
        recipe = replace(RECIPES["default"], scheduler=Scheduler(name="StepLR", arguments=(("width", 2),)))
        with pytest.raises(ValueError, match=r"arguments of StepLR: .*width"):
            create_scheduler(create_optimizer([torch.nn.Parameter(torch.ones(1))], recipe), recipe)
