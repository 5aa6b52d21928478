"""LARS by its formula, step by step."""

import numpy as np
import pytest
import torch
from torch import nn

from g2sd.lars import Lars


class TestLars:
    @pytest.mark.parametrize("weight_decay", [0.0, 0.01])
    @pytest.mark.parametrize("shape", [(4, 6), (2, 3, 2, 2), (5,), ()], ids=str)
    def test_definition(self, shape, weight_decay):
        parameter = nn.Parameter(torch.randn(shape, dtype=torch.float64))
        optimizer = Lars([parameter], 0.2, weight_decay=weight_decay, momentum=0.8, trust_coefficient=0.01)
        wanted, velocity = parameter.detach().numpy().copy(), 0
        for _ in range(3):
            parameter.grad = torch.randn(shape, dtype=torch.float64)
            gradient = parameter.grad.numpy().copy()
            if len(shape) > 1:
                gradient = gradient + weight_decay * wanted
                gradient = gradient * 0.01 * np.linalg.norm(wanted) / np.linalg.norm(gradient)
            velocity = 0.8 * velocity + gradient
            wanted = wanted - 0.2 * velocity
            optimizer.step()
        torch.testing.assert_close(parameter.detach(), torch.as_tensor(wanted))

    def test_zero_norms(self):
        """Where a norm is 0 the gradient is taken as it is."""
        zero, still = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.ones(2, 2))
        zero.grad, still.grad = torch.ones(2, 2), torch.zeros(2, 2)
        Lars([zero, still], 0.5).step()
        torch.testing.assert_close(zero.detach(), torch.full((2, 2), -0.5))
        torch.testing.assert_close(still.detach(), torch.ones(2, 2))

    def test_without_gradient(self):
        parameter = nn.Parameter(torch.ones(2, 2))
        Lars([parameter]).step()
        torch.testing.assert_close(parameter.detach(), torch.ones(2, 2))

    def test_gradient_stays(self):
        parameter = nn.Parameter(torch.ones(2, 2))
        parameter.grad = torch.full((2, 2), 3.0)
        Lars([parameter], weight_decay=0.1).step()
        torch.testing.assert_close(parameter.grad, torch.full((2, 2), 3.0))

    def test_groups_and_closure(self):
        slow, fast = (nn.Parameter(torch.ones(3)) for _ in range(2))
        optimizer = Lars([{"params": [slow], "lr": 0.1}, {"params": [fast]}], 1.0)

        def closure():
            optimizer.zero_grad()
            loss = (slow + fast).sum()
            loss.backward()
            return loss

        assert optimizer.step(closure).item() == 6
        torch.testing.assert_close(slow.detach(), torch.full((3,), 0.9))
        torch.testing.assert_close(fast.detach(), torch.zeros(3))

    def test_resumes(self):
        """State and parameters, saved in between, end where an undisturbed run does."""
        start, gradients = torch.randn(4, 3), torch.randn(4, 4, 3)

        def steps(parameter, optimizer, chosen):
            for gradient in chosen:
                parameter.grad = gradient.clone()
                optimizer.step()

        whole = nn.Parameter(start.clone())
        steps(whole, Lars([whole]), gradients)
        first = nn.Parameter(start.clone())
        optimizer = Lars([first])
        steps(first, optimizer, gradients[:2])
        second = nn.Parameter(first.detach().clone())
        again = Lars([second])
        again.load_state_dict(optimizer.state_dict())
        steps(second, again, gradients[2:])
        torch.testing.assert_close(second, whole, rtol=0, atol=0)

    @pytest.mark.parametrize(
        "options",
        [{"lr": -1.0}, {"weight_decay": -0.1}, {"momentum": 1.0}, {"momentum": -0.1}, {"trust_coefficient": 0}],
    )
    def test_errors(self, options):
        (name, value) = next(iter(options.items()))
        with pytest.raises(ValueError, match=f"{name}={value} must be"):
            Lars([nn.Parameter(torch.zeros(1))], **options)
