"""Coding of a tree's weights with the spread of each layer, and of its constant leaves."""

from collections.abc import Sequence

import numpy as np

from tinc.entropy import BitReader, BitWriter
from tinc.interpolation import IntegerCoder
from tinc.tree.quantized import WEIGHT_BITS, QuantizedTree
from tinc.tree.shape import TreeShape

__all__ = ["read_constants", "read_weights", "write_constants", "write_weights"]


def write_weights(writer: BitWriter, tree: QuantizedTree) -> bytes:
    """Append all weights to the stream; return two bytes a layer, the spreads of its weights and of its biases."""
    spreads = bytearray()
    for layer in tree.layers:
        for part in (layer.weights[:, :-1], layer.weights[:, -1:]):
            spread = _spread(float(np.abs(part).mean()) if part.size else 0.0)
            spreads.append(spread)
            magnitudes = np.abs(part).reshape(-1)
            for place, ones in enumerate(_digit_probabilities(spread)):
                writer.write((magnitudes >> place) & 1, np.full(magnitudes.shape, ones))
            writer.write_raw((part.reshape(-1)[magnitudes > 0] < 0).astype(np.int64), 1)
    return bytes(spreads)


def read_weights(reader: BitReader, shape: TreeShape, spreads: Sequence[int]) -> list[np.ndarray]:
    """Return the weights of each layer."""
    layers = []
    for number, (_, (nodes, rows, outputs)) in enumerate(shape.layers):
        parts = []
        for spread, size in zip(spreads[2 * number : 2 * number + 2], (rows - 1, 1), strict=True):
            magnitudes = np.zeros(nodes * size * outputs, dtype=np.int64)
            for place, ones in enumerate(_digit_probabilities(spread)):
                magnitudes |= reader.read(np.full(magnitudes.shape, ones)) << place
            (nonzero,) = np.nonzero(magnitudes)
            magnitudes[nonzero] *= 1 - 2 * reader.read_raw(len(nonzero), 1)
            parts.append(magnitudes.reshape(nodes, size, outputs))
        layers.append(np.concatenate(parts, 1))
    return layers


def write_constants(writer: BitWriter, tree: QuantizedTree) -> None:
    """Append the values of constant leaves."""
    if tree.constants.size:
        IntegerCoder().write(writer, tree.constants)


def read_constants(reader: BitReader, shape: TreeShape) -> np.ndarray:
    """Return the values of constant leaves [constants, channels]."""
    count = shape.num_leaves - len(shape.nodes[-1])
    if not count:
        return np.zeros((0, shape.channels), dtype=np.int64)
    return IntegerCoder().read(reader, (count, shape.channels))


def _mean(spread: int) -> int:
    """Return the mean magnitude that a spread stands for, in 1 / 64."""
    return (8 + spread % 8) << (spread // 8)


def _spread(mean: float) -> int:
    return min(range(160), key=lambda spread: abs(_mean(spread) - max(64 * mean, 1)))


def _digit_probabilities(spread: int) -> list[int]:
    """Return the probabilities out of 2**16 that the binary digits of a magnitude are 1, the lowest digit first.

    The digits of a geometric magnitude, P(m) ~ ratio**m, are independent: digit j is 1 with odds ratio**(2**j).
    """
    mean = _mean(spread)
    ratio = (mean << 16) // (mean + 64)
    digits = []
    for _ in range(WEIGHT_BITS):
        digits.append(min(max((ratio << 16) // ((1 << 16) + ratio), 1), (1 << 16) - 1))
        ratio = ratio * ratio >> 16
    return digits
