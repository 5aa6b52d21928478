"""What all attempts to compress one array share: the signal, the target, and how long and for whom to search."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from tinc.contents import Contents
from tinc.encoding.targets import Target
from tinc.signal import Signal

__all__ = ["Job", "Layers", "Preset", "Report"]

Preset = Literal["fast", "balanced", "best"]
Layers = Literal["auto", "tree", "residual", "both"]


class Report:
    """Tells a callback the stage of the search; a KeyboardInterrupt from the callback stops the search."""

    def __init__(self, callback: Callable[[str, float], None] | None) -> None:
        self.callback, self.is_stopped = callback, False

    def __call__(self, stage: str, psnr: float) -> None:
        if self.callback is None or self.is_stopped:
            return
        try:
            self.callback(stage, psnr)
        except KeyboardInterrupt:
            self.is_stopped = True


@dataclass(frozen=True)
class Job:
    """One array to compress."""

    signal: Signal
    target: Target
    preset: Preset
    seed: int
    deadline: float | None
    """When training ends, on the clock of `time.monotonic`; None for no limit."""
    report: Report
    metadata: bytes = b""

    @property
    def contents(self) -> Contents:
        """The contents of a file without any layer."""
        channels, *shape = self.signal.extent
        return Contents(
            tuple(shape), channels, self.signal.channel_axis, self.signal.format, metadata=self.metadata
        )  # fmt: skip

    @property
    def allowed_error(self) -> float | None:
        """Largest sum of squared errors, in squared working units, that a target of quality allows; else None."""
        if self.target.mse is None:
            return None
        return self.target.mse / 4.0**self.signal.format.exponent * self.signal.working.size
