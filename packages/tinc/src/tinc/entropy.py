"""Bits in as many bytes as their probabilities ask for: a range coder, and counts that learn the probabilities.

The coder is constriction's range coder (32-bit words, 64-bit state, 24 bits of probability); `docs/tinc-format.md` says
it in full. Probabilities are integers out of 2**16 and come from integer counts, so both ends agree on every machine.
"""

from collections.abc import Sequence

import constriction
import numpy as np

from tinc.errors import TincFormatError

__all__ = ["AdaptiveBits", "BitReader", "BitRecorder", "BitWriter"]

ONE = 1 << 16
_BIT = constriction.stream.model.Bernoulli(perfect=False)
_LEAST = 24
"""Of 2**16: no bit costs more than 11.4 bits, whatever the counts say."""
_PORTIONS = (16, 4096)
"""Least and most bits that are coded between two looks at the counts; in between an eighth of those before."""
_INCREMENT = 24
_LIMIT = 24 * 400
"""Counts are halved here, so that they follow what changes."""


class BitWriter:
    """Collects bits with their probabilities."""

    def __init__(self) -> None:
        self._encoder = constriction.stream.queue.RangeEncoder()

    def write(self, bits: np.ndarray, ones: np.ndarray) -> None:
        """Append 0s and 1s; `ones` is the probability of each to be 1, out of 2**16."""
        if bits.size:
            self._encoder.encode(bits.astype(np.int32), _BIT, ones / ONE)

    def write_raw(self, values: np.ndarray, width: int | np.ndarray) -> None:
        """Append the lowest `width` bits of each value, highest first."""
        for place in range(_most(width) - 1, -1, -1):
            chosen = values if isinstance(width, int) else values[width > place]
            self.write((chosen >> place) & 1, np.full(chosen.shape, ONE // 2))

    def finish(self) -> bytes:
        """Return the stream; trailing zero bytes are left out, since the reader supplies them."""
        return self._encoder.get_compressed().astype("<u4").tobytes().rstrip(b"\0")


class BitRecorder(BitWriter):
    """Keeps bits and probabilities, to be written later and more than once."""

    def __init__(self) -> None:
        super().__init__()
        self._parts: list[tuple[np.ndarray, np.ndarray]] = []

    def write(self, bits: np.ndarray, ones: np.ndarray) -> None:
        """Keep 0s and 1s."""
        self._parts.append((bits, ones))

    def recorded(self) -> tuple[np.ndarray, np.ndarray]:
        """Return all bits and their probabilities."""
        bits, ones = zip(*self._parts, strict=True)
        return np.concatenate(bits), np.concatenate(ones)


class BitReader:
    """Gives back what a `BitWriter` wrote, for the same probabilities in the same portions."""

    def __init__(self, stream: bytes) -> None:
        words = np.frombuffer(stream + bytes(-len(stream) % 4), dtype="<u4")
        self._decoder = constriction.stream.queue.RangeDecoder(words.astype(np.uint32))

    def read(self, ones: np.ndarray) -> np.ndarray:
        """Return a bit for each probability, as int64."""
        if not ones.size:
            return np.zeros(ones.shape, dtype=np.int64)
        try:
            return self._decoder.decode(_BIT, ones / ONE).astype(np.int64)
        except AssertionError as error:  # a state that no encoder leaves
            raise TincFormatError("a coded section is damaged") from error

    def read_raw(self, count: int, width: int | np.ndarray) -> np.ndarray:
        """Return `count` values of `width` bits."""
        values = np.zeros(count, dtype=np.int64)
        for place in range(_most(width) - 1, -1, -1):
            chosen = slice(None) if isinstance(width, int) else np.flatnonzero(width > place)
            values[chosen] |= self.read(np.full(len(values[chosen]), ONE // 2)) << place
        return values


class AdaptiveBits:
    """Probabilities of bits in numbered contexts, learned from the bits that were coded before."""

    def __init__(self, ones: Sequence[int] | np.ndarray, strength: int = 48) -> None:
        """`ones` is the first guess for each context, out of 2**16; `strength` its weight (a bit weighs 24)."""
        guess = np.asarray(ones, dtype=np.int64)
        self.counts = np.maximum((np.stack([ONE - guess, guess], 1) * strength) >> 16, 1)
        self._seen = 0
        self._strength = strength

    def ones(self, contexts: np.ndarray) -> np.ndarray:
        """Return the probability of a 1 in each context, out of 2**16."""
        return _probabilities(self.counts[contexts])

    def table(self) -> np.ndarray:
        """Return the probabilities of a 1 in all contexts."""
        return _probabilities(self.counts)

    def learn(self, contexts: np.ndarray, bits: np.ndarray) -> None:
        """Count bits that were coded."""
        size = len(self.counts)
        self._seen += len(bits)
        # no context can have counted more than all bits
        is_low = self._strength + 2 + _INCREMENT * self._seen <= _LIMIT
        if 8 * len(bits) < size:  # few bits in many contexts: only their contexts change
            np.add.at(self.counts, (contexts, bits), _INCREMENT)
            if is_low:
                return
            over = contexts[self.counts[contexts].sum(1) > _LIMIT]
            over = np.unique(over) if over.size else over
        else:
            seen = np.bincount(2 * contexts + bits, minlength=2 * size).reshape(size, 2)
            self.counts += _INCREMENT * seen
            if is_low:
                return
            (over,) = np.nonzero(self.counts.sum(1) > _LIMIT)
        while over.size:
            self.counts[over] = np.maximum(self.counts[over] >> 1, 1)
            over = over[self.counts[over].sum(1) > _LIMIT]

    def write(self, writer: BitWriter, contexts: np.ndarray, bits: np.ndarray) -> None:
        """Code bits and learn from them."""
        first = 0
        while first < len(bits):
            last = first + self._portion()
            places, part = contexts[first:last], bits[first:last]
            writer.write(part, self.ones(places))
            self.learn(places, part)
            first = last

    def read(self, reader: BitReader, contexts: np.ndarray) -> np.ndarray:
        """Decode bits and learn from them."""
        bits = np.empty(contexts.shape, dtype=np.int64)
        first = 0
        while first < len(bits):
            last = first + self._portion()
            places = contexts[first:last]
            bits[first:last] = part = reader.read(self.ones(places))
            self.learn(places, part)
            first = last
        return bits

    def _portion(self) -> int:
        """Return how many bits to code before the next look at the counts."""
        least, most = _PORTIONS
        return min(max(self._seen >> 3, least), most)


def _probabilities(counts: np.ndarray) -> np.ndarray:
    ones = counts[:, 1]
    shares = (ones << 16) // (counts[:, 0] + ones)
    return np.minimum(np.maximum(shares, _LEAST), ONE - _LEAST)


def _most(width: int | np.ndarray) -> int:
    return width if isinstance(width, int) else int(width.max(initial=0))
