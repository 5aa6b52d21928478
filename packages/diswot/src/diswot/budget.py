"""Costs of a student and their limits: parameters, multiply-accumulates, and milliseconds on this machine."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import nn

from diswot.initialisation import preserved
from diswot.networks.counting import count_macs
from visionkernels.checks import InputError
from visionkernels.profiling import compare

__all__ = ["NO_LIMIT", "Budget", "Cost", "cost_of", "latency_of"]

_SUFFIXES = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9}


@dataclass(frozen=True)
class Cost:
    """Cost of one network."""

    params: int
    macs: int
    """Multiply-accumulates for one image."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Upper limits; None is no limit."""

    params: float | None = None
    macs: float | None = None
    """Multiply-accumulates for one image."""
    latency_ms: float | None = None
    """Median milliseconds for one image on one thread, in evaluation mode."""

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise InputError(f"budget {limit.name}={value} must be above 0")

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Read "params=5M,macs=300M,latency=20": K, M and G are thousands, millions and billions; latency is in ms."""
        limits: dict[str, float] = {}
        for part in filter(None, text.split(",")):
            match = re.fullmatch(
                r"\s*(params|macs|latency)\s*=\s*(\d+(?:\.\d+)?)\s*([kmgb]|ms|)\s*", part, re.IGNORECASE
            )
            name, number, suffix = match.groups() if match else ("", "", "")
            unit = suffix.lower() if name.lower() != "latency" else {"": "", "ms": ""}.get(suffix.lower(), "?")
            if match is None or unit not in _SUFFIXES:
                raise InputError(
                    f"budget {part!r} must be params=NUMBER, macs=NUMBER or latency=MILLISECONDS, such as params=5M"
                )
            key = "latency_ms" if name.lower() == "latency" else name.lower()
            if key in limits:
                raise InputError(f"budget {text!r} gives {name} twice")
            limits[key] = float(number) * _SUFFIXES[unit]
        return cls(**limits)

    def allows(self, cost: Cost) -> bool:
        """Return whether parameters and multiply-accumulates are within the limits."""
        return cost.params <= (self.params or math.inf) and cost.macs <= (self.macs or math.inf)

    def __str__(self) -> str:
        given = {limit.name: value for limit in fields(self) if (value := getattr(self, limit.name)) is not None}
        return ",".join(f"{name}={value:.15g}" for name, value in given.items()) or "no limit"


NO_LIMIT = Budget()


def cost_of(build: Callable[[], nn.Module], input_size: tuple[int, int, int]) -> Cost:
    """Return the cost of a network, which is built on the meta device without memory."""
    with torch.device("meta"):
        model = build()
    return Cost(sum(weight.numel() for weight in model.parameters()), count_macs(model, input_size))


def latency_of(model: nn.Module, input_size: tuple[int, int, int]) -> float:
    """Return milliseconds for one image on one thread of the CPU: the median of nine runs after warm-up."""
    image = torch.zeros(1, *input_size)
    with preserved(model), torch.inference_mode():
        model.eval()
        return 1e3 * compare({"student": lambda: model(image)}, threads=1, repeats=9)["student"].median
