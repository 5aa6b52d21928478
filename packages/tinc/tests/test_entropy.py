"""The range coder compared with the format's description, adaptive probabilities, and truncated streams."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinc.entropy import AdaptiveBits, BitReader, BitRecorder, BitWriter
from tinc.errors import TincFormatError

seeds = st.integers(0, 2**32 - 1)


class PlainEncoder:
    """The encoder of docs/tinc-format.md, section 3, with integers of any length."""

    def __init__(self) -> None:
        self.lower, self.range, self.words = 0, (1 << 64) - 1, 1

    def write(self, bit: int, ones: int) -> None:
        p = ones / 65536
        zero = int((1 - p) * (((1 << 24) - 2) / ((1 - p) + p))) + 1
        scale = self.range >> 24
        self.range = scale * ((1 << 24) - zero if bit else zero)
        self.lower += scale * zero * bit
        while self.range < 1 << 32:
            self.lower, self.range, self.words = self.lower << 32, self.range << 32, self.words + 1

    def finish(self) -> bytes:
        if self.range == (1 << 64) - 1:
            return b""
        last = (self.lower + (1 << 32) - 1) >> 32
        words = [last >> 32 * place & 0xFFFFFFFF for place in range(self.words - 1, -1, -1)]
        return struct.pack(f"<{len(words)}I", *words).rstrip(b"\0")


def draw(seed: int, count: int, skew: float) -> tuple[np.ndarray, np.ndarray]:
    """Return bits and probabilities; a large skew makes both extreme and sometimes contradictory."""
    rng = np.random.default_rng(seed)
    ones = np.clip(65536 * rng.beta(1 / skew, 1 / skew, count), 1, 65535).astype(np.int64)
    return (rng.random(count) < ones / 65536).astype(np.int64) ^ (rng.random(count) < 0.03), ones


class TestRangeCoder:
    @given(seeds, st.integers(0, 400), st.floats(1, 8))
    @settings(max_examples=60, deadline=None, derandomize=True)
    def test_reference(self, seed: int, count: int, skew: float) -> None:
        """constriction writes the bytes that the description specifies."""
        bits, ones = draw(seed, count, skew)
        writer, plain = BitWriter(), PlainEncoder()
        writer.write(bits, ones)
        for bit, p in zip(bits.tolist(), ones.tolist(), strict=True):
            plain.write(bit, p)
        assert writer.finish() == plain.finish()

    def test_carry(self) -> None:
        """Ones of the smallest probability after zeros repeatedly carry `lower` over the end of its words."""
        writer, plain = BitWriter(), PlainEncoder()
        bits = np.array([1, 0, 0, 1, 1] * 400)
        ones = np.array([1, 65535, 1, 65535, 32768] * 400)
        writer.write(bits, ones)
        for bit, p in zip(bits.tolist(), ones.tolist(), strict=True):
            plain.write(bit, p)
        content = writer.finish()
        assert content == plain.finish()
        assert np.array_equal(BitReader(content).read(ones), bits)

    @given(seeds, st.lists(st.integers(0, 50), max_size=8), st.floats(1, 8))
    @settings(max_examples=60, deadline=None, derandomize=True)
    def test_round_trip(self, seed: int, counts: list[int], skew: float) -> None:
        """Bits are read correctly for any portions of writing and reading."""
        bits, ones = draw(seed, sum(counts), skew)
        writer = BitWriter()
        for part in np.split(np.arange(len(bits)), np.cumsum(counts)):
            writer.write(bits[part], ones[part])
        content = writer.finish()
        assert not content.endswith(b"\0")
        assert np.array_equal(BitReader(content).read(ones), bits)

    @given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 2**40 - 1)), max_size=30))
    @settings(max_examples=60, deadline=None, derandomize=True)
    def test_raw(self, pairs: list[tuple[int, int]]) -> None:
        widths = np.array([width for width, _ in pairs], dtype=np.int64)
        values = np.array([value & ((1 << width) - 1) for width, value in pairs], dtype=np.int64)
        writer = BitWriter()
        writer.write_raw(values, widths)
        content = writer.finish()
        assert len(content) <= -(-int(widths.sum()) // 8) + 4
        assert np.array_equal(BitReader(content).read_raw(len(values), widths), values)

    def test_size(self) -> None:
        """A stream takes at most one word more than its probabilities require."""
        bits, ones = draw(1, 20000, 2)
        share = np.where(bits > 0, ones, 65536 - ones) / 65536
        writer = BitWriter()
        writer.write(bits, ones)
        assert len(writer.finish()) <= -np.log2(share).sum() / 8 * 1.001 + 8

    def test_recorder(self) -> None:
        bits, ones = draw(2, 300, 2)
        recorder, once, twice = BitRecorder(), BitWriter(), BitWriter()
        for part in (slice(0, 100), slice(100, 300)):
            recorder.write(bits[part], ones[part])
        once.write(bits, ones)
        twice.write(*recorder.recorded())
        assert once.finish() == twice.finish()

    @given(seeds, st.floats(1, 8))
    @settings(max_examples=40, deadline=None, derandomize=True)
    def test_truncated(self, seed: int, skew: float) -> None:
        """A stream that is truncated, damaged or random decodes to bits or raises TincFormatError."""
        bits, ones = draw(seed, 300, skew)
        writer = BitWriter()
        writer.write(bits, ones)
        content = writer.finish()
        rng = np.random.default_rng(seed)
        for item in (content[: rng.integers(0, len(content) + 1)], rng.bytes(40), b"\xff" * 40):
            try:
                read = BitReader(item).read(ones)
            except TincFormatError as error:
                assert "damaged" in str(error)
            else:
                assert read.shape == ones.shape and set(np.unique(read)) <= {0, 1}


class TestAdaptiveBits:
    @given(seeds, st.integers(1, 20), st.lists(st.integers(0, 300), min_size=1, max_size=6))
    @settings(max_examples=40, deadline=None, derandomize=True)
    def test_round_trip(self, seed: int, contexts: int, counts: list[int]) -> None:
        rng = np.random.default_rng(seed)
        guess = rng.integers(0, 65537, contexts)
        chosen = [rng.integers(0, contexts, count) for count in counts]
        bits = [(rng.random(len(item)) < item / contexts).astype(np.int64) for item in chosen]
        writer, coder = BitWriter(), AdaptiveBits(guess)
        for item, some in zip(chosen, bits, strict=True):
            coder.write(writer, item, some)
        reader, back = BitReader(writer.finish()), AdaptiveBits(guess)
        for item, some in zip(chosen, bits, strict=True):
            assert np.array_equal(back.read(reader, item), some)
        assert np.array_equal(coder.counts, back.counts)

    def test_learns(self) -> None:
        """Bits with nine ones in ten cost half a bit, for any initial probability."""
        bits = (np.random.default_rng(0).random(20000) < 0.9).astype(np.int64)
        writer = BitWriter()
        AdaptiveBits([1000]).write(writer, np.zeros(len(bits), dtype=np.int64), bits)
        assert len(writer.finish()) == pytest.approx(20000 * 0.469 / 8, rel=0.03)

    def test_probabilities_stay_inside(self) -> None:
        coder = AdaptiveBits([0, 65536, 32768])
        for bit in (0, 1):
            for _ in range(50):
                coder.learn(np.zeros(1000, dtype=np.int64), np.full(1000, bit))
                assert ((coder.table() >= 24) & (coder.table() <= 65536 - 24)).all()
                assert (coder.counts.sum(1) <= 9600).all() and (coder.counts >= 1).all()
