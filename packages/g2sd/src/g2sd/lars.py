"""LARS, as MAE's linear probe uses it (MAE, appendix A.1)."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from visionkernels.checks import check

__all__ = ["Lars"]


class Lars(Optimizer):
    """Momentum SGD whose step on a matrix is in proportion to its norm.

    For parameters of two or more axes g += weight_decay p, then g *= trust_coefficient |p| / |g| (1 where a norm is 0);
    others take g as it is. Then v = momentum v + g and p -= lr v. timm's `Lars` divides by another norm, and does not
    adapt at all without weight decay.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.1,
        *,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust_coefficient: float = 0.001,
    ) -> None:
        check(lr >= 0, "lr", lr, "at least 0")
        check(weight_decay >= 0, "weight_decay", weight_decay, "at least 0")
        check(0 <= momentum < 1, "momentum", momentum, "in [0, 1)")
        check(trust_coefficient > 0, "trust_coefficient", trust_coefficient, "above 0")
        defaults = {
            "lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust_coefficient": trust_coefficient
        }  # fmt: skip
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Make one step; `closure` computes the loss anew."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        gradient = parameter.grad
        assert gradient is not None
        if parameter.ndim > 1:
            gradient = gradient.add(parameter, alpha=group["weight_decay"])
            lengths = torch.linalg.vector_norm(parameter), torch.linalg.vector_norm(gradient)
            ratio = group["trust_coefficient"] * lengths[0] / lengths[1]
            is_defined = (lengths[0] > 0) & (lengths[1] > 0)
            gradient = gradient * torch.where(is_defined, ratio, torch.ones_like(ratio))
        state = self.state[parameter]
        if "velocity" not in state:
            state["velocity"] = torch.zeros_like(parameter)
        velocity: Tensor = state["velocity"]
        velocity.mul_(group["momentum"]).add_(gradient)
        parameter.sub_(velocity, alpha=group["lr"])
