"""A finished way to compress an array: contents with layers, measured as the file that they become."""

from dataclasses import dataclass

from tinc.container import pack
from tinc.contents import Contents
from tinc.encoding.targets import Target

__all__ = ["Candidate", "packed_size"]


@dataclass(frozen=True)
class Candidate:
    """Contents of a file, its size and its error."""

    contents: Contents
    size: int
    """Bytes of the whole file."""
    error: float
    """Sum of squared errors, in squared working units."""

    def is_better(self, other: "Candidate", target: Target) -> bool:
        """Tell which of two candidates that meet the target is better."""
        return self.error < other.error if target.bytes is not None else self.size < other.size


def packed_size(contents: Contents) -> int:
    """Return the bytes of a file."""
    return len(pack(contents))
