"""What a file must meet: a number of bytes, a quality, or a bound on the error of every sample."""

import math
from dataclasses import dataclass

from tinc.signal import Signal

__all__ = ["OutOfReachError", "Request", "Target", "one_request"]


class OutOfReachError(ValueError):
    """No file meets the target."""


@dataclass(frozen=True)
class Target:
    """The target of an array; exactly one field is given."""

    bytes: int | None = None
    mse: float | None = None
    """In squared samples."""
    max_error: float | None = None

    @property
    def size_limit(self) -> float:
        """Bytes that the file may have; infinite for a target of quality."""
        return math.inf if self.bytes is None else self.bytes


@dataclass(frozen=True)
class Request:
    """The one target that a caller asked for, by its name in `tinc.compress`; "lossless" is a `max_error` of 0."""

    name: str
    value: float

    def size_limit(self, num_samples: int, num_bytes: int) -> int | None:
        """Return the bytes that the file of an array may have; None for a target of quality.

        The array has `num_samples` samples that take `num_bytes` bytes.
        """
        match self.name:
            case "ratio":
                return int(num_bytes / self.value)
            case "bytes":
                return int(self.value)
            case "bpv":
                return int(num_samples * self.value / 8)
            case _:
                return None

    def target(self, signal: Signal) -> Target:
        """Return the target for this array."""
        if self.name == "max_error":
            return Target(max_error=self.value)
        if self.name == "psnr":
            mse = signal.peak**2 * 10 ** (-self.value / 10)
            return Target(mse=mse) if mse > 0 else Target(max_error=0)
        return Target(bytes=self.size_limit(signal.samples.size, signal.samples.nbytes))


def one_request(
    *, ratio: float | None, bytes: int | None, bpv: float | None, psnr: float | None, max_error: float | None,
    lossless: bool,
) -> Request:  # fmt: skip
    """Return the target that is not None. Raises ValueError unless there is exactly one, and for a wrong value.

    Args:
        ratio: bytes of the array / bytes of the file
        bytes: bytes of the file
        bpv: bits a sample
        psnr: dB
        max_error: largest error of a sample
        lossless: no error at all
    """
    options = {
        "ratio": ratio, "bytes": bytes, "bpv": bpv, "psnr": psnr, "max_error": max_error,
        "lossless": True if lossless else None,
    }  # fmt: skip
    given = {name: value for name, value in options.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"give exactly one target of {', '.join(options)}; got {', '.join(given) or 'none'}")
    ((name, value),) = given.items()
    if name == "lossless":
        return Request("max_error", 0.0)
    if isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{name}={value} must be a finite number")
    if name == "max_error":
        if value < 0:
            raise ValueError(f"max_error={value} must be at least 0")
    elif value <= (1 if name == "ratio" else 0):
        raise ValueError(f"{name}={value} must be above {1 if name == 'ratio' else 0}")
    return Request(name, float(value))
