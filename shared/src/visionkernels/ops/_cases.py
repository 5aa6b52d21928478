"""What an op's Triton module says of its kernels for checks without a GPU: configurations to compile, and rooflines."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["AotCase", "Roofline"]


@dataclass(frozen=True, kw_only=True)
class AotCase:
    """One kernel with the argument types and constants of one configuration.

    `types` must have all pointers, and may have arguments of other kernels. Of the numbers that it leaves out, those
    with `scale` in their name are "fp32", the others "i32".
    """

    kernel: Any
    config: str
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def signature(self) -> dict[str, str]:
        """The type of each argument of the kernel, "constexpr" for constants."""

        def type_of(name: str) -> str:
            if name in self.constants:
                return "constexpr"
            number = "fp32" if "scale" in name else "i32"
            return self.types[name] if name.endswith("_ptr") else self.types.get(name, number)

        return {name: type_of(name) for name in self.kernel.arg_names}


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """The least that one call computes and moves, and the time that takes on an H100 (SXM, bfloat16).

    3.0 TB/s is the measured speed of a copy, 790 TFLOP/s that of large dense products; nothing is faster than both.
    """

    op: str
    config: str
    operations: float
    bytes_moved: float

    @property
    def bound(self) -> str:
        """The limit of the call, "memory" or "compute"."""
        return "memory" if self.bytes_moved / 3.0e12 > self.operations / 790e12 else "compute"

    @property
    def microseconds(self) -> float:
        """The least time."""
        return 1e6 * max(self.bytes_moved / 3.0e12, self.operations / 790e12)
