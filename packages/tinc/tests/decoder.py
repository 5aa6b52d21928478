"""A second decoder of `.tinc` files, written from docs/tinc-format.md alone: plain Python, slow, and without checks."""

import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from typing import Any

import numpy as np

TYPES = ("uint8", "uint16", "int16", "float32")
Index = tuple[int, ...]


# --- prefix and header


class Reader:
    """Reads the numbers of the header in order."""

    def __init__(self, content: bytes) -> None:
        self.content, self.place = content, 0

    def take(self, count: int) -> bytes:
        self.place += count
        return self.content[self.place - count : self.place]

    def number(self) -> int:
        value = shift = 0
        while True:
            byte = self.take(1)[0]
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    def numbers(self, count: int) -> Index:
        return tuple(self.number() for _ in range(count))

    def signed(self) -> int:
        value = self.number()
        return value // 2 if value % 2 == 0 else -(value + 1) // 2

    def real(self) -> float:
        return float(struct.unpack("<d", self.take(8))[0])

    def bytes(self) -> bytes:
        return self.take(self.number())


@dataclass
class Header:
    """The fields of the header, and the streams."""

    dtype: str = ""
    shape: Index = ()
    channel_axis: int | None = None
    channels: int = 1
    offset: float = 0.0
    exponent: int = -4
    tree: dict[str, Any] | None = None
    residual: dict[str, Any] | None = None
    exact: dict[str, Any] | None = None
    metadata: bytes = b""
    streams: list[bytes] = field(default_factory=list)

    @property
    def extent(self) -> Index:
        return (self.channels, *self.shape)

    def cells(self, steps: Index) -> Index:
        return (self.channels, *(-(-n // by) for n, by in zip(self.shape, steps, strict=True)))


def read_header(content: bytes) -> Header:
    """Return the fields of the header and the streams."""
    magic, version, flags, length, checksum = struct.unpack("<4sHHQI", content[:20])
    assert (magic, version, length) == (b"TINC", 1, len(content)) and flags in (0, 1)
    prefix = Reader(content[20:])
    size = prefix.number()
    start = 20 + prefix.place
    checked = content[20 : start + size] if flags else content[20:]
    assert zlib.crc32(content[:16] + checked) == checksum
    read, head = Reader(content[start : start + size]), Header()
    head.dtype = TYPES[read.number()]
    axes = read.number()
    head.shape = read.numbers(axes)
    axis = read.number()
    if axis:
        head.channel_axis, head.channels = axis - 1, read.number()
    if head.dtype == "float32":
        head.offset, head.exponent = read.real(), read.signed()
    parts = read.number()
    count = 0
    if parts & 1:
        head.tree, count = read_tree_shape(read, axes), 1
    if parts & 2:
        head.residual = read_blocks(read, head.extent)
        head.residual |= {
            "mantissa": read.number(),
            "exponent": read.signed(),
            "points": [read.signed() for _ in "123"],
        }
        head.residual["background"] = read.signed() if read.number() else None
        count += math.prod(head.residual["tiles"])
    if parts & 4:
        head.exact = {"grid": read.number()}
        if head.exact["grid"] == 0:
            is_float = head.dtype == "float32"
            head.exact["step"] = read.real() if is_float else read.number()
            head.exact["offset"] = read.real() if is_float else 0
        if head.exact["grid"] == 1:
            head.exact["size"] = read.number()
            count += 1
        head.exact |= read_blocks(read, head.extent)
        if head.exact.get("size") != 1:
            count += math.prod(head.exact["tiles"])
    if parts & 8:
        head.metadata = read.bytes()
    place = start + size
    for _ in range(count):
        length = read.number()
        stream = content[place : place + length]
        assert not flags or struct.unpack("<I", read.take(4)) == (zlib.crc32(stream),)
        head.streams.append(stream)
        place += length
    assert place == len(content) and read.place == size
    return head


def read_blocks(read: Reader, extent: Index) -> dict[str, Any]:
    pairs = [read.numbers(2) for _ in extent[1:]]
    block = (1, *(1 << log for log, _ in pairs))
    tile = (read.number(), *(count for _, count in pairs))
    blocks = tuple(-(-n // b) for n, b in zip(extent, block, strict=True))
    tiles = tuple(-(-n // t) for n, t in zip(blocks, tile, strict=True))
    return {"block": block, "tile": tile, "blocks": blocks, "tiles": tiles}


def read_tree_shape(read: Reader, axes: int) -> dict[str, Any]:
    splits, widths = [(1,) * axes], [b""]
    for _ in range(read.number() - 1):
        splits.append(read.numbers(axes))
        widths.append(read.bytes())
    widths[0] = read.bytes()
    levels = [level for level, level_widths in enumerate(widths) for _ in level_widths]
    fixed, spreads = (read.take(2 * len(levels)) for _ in range(2))
    base = read.signed()
    leaves = math.prod(math.prod(split) for split in splits)
    active = [True] * leaves
    if read.number():
        packed = read.bytes()
        active = [bool(packed[leaf // 8] >> (7 - leaf % 8) & 1) for leaf in range(leaves)]
    rounding = list(zip(fixed[::2], fixed[1::2], strict=True))
    return {"splits": splits, "widths": list(b"".join(widths)), "levels": levels, "rounding": rounding,
            "spreads": list(zip(spreads[::2], spreads[1::2], strict=True)), "active": active, "base": base}  # fmt: skip


# --- range coder


class Bits:
    """The range decoder of a stream."""

    def __init__(self, stream: bytes) -> None:
        stream += bytes(-len(stream) % 4)
        self.words = iter(struct.unpack(f"<{len(stream) // 4}I", stream))
        self.lower, self.range = 0, (1 << 64) - 1
        self.point = next(self.words, 0) << 32 | next(self.words, 0)

    def bit(self, ones: int) -> int:
        one = ones / 65536
        zero = 1 - one
        width = math.floor(zero * (((1 << 24) - 2) / (zero + one))) + 1
        scale = self.range >> 24
        bit = int((self.point - self.lower) % (1 << 64) // scale >= width)
        self.lower += scale * width * bit
        self.range = scale * ((1 << 24) - width if bit else width)
        if self.range < 1 << 32:
            self.lower, self.range = self.lower << 32, self.range << 32
            self.point = self.point << 32 | next(self.words, 0)
        mask = (1 << 64) - 1
        self.lower, self.point = self.lower & mask, self.point & mask
        return bit

    def raw(self, widths: Sequence[int]) -> list[int]:
        values = [0] * len(widths)
        for place in range(max(widths, default=0) - 1, -1, -1):
            for i, width in enumerate(widths):
                if width > place:
                    values[i] = 2 * values[i] + self.bit(1 << 15)
        return values


class Adaptive:
    """Contexts with any hashable names; `guess` returns their initial probabilities."""

    def __init__(self, bits: Bits, guess: Any) -> None:
        self.bits, self.guess, self.coded = bits, guess, 0
        self.counts: dict[Any, list[int]] = {}

    def read(self, contexts: Sequence[Any]) -> list[int]:
        bits: list[int] = []
        while len(bits) < len(contexts):
            size = min(max(self.coded >> 3, 16), 4096)
            portion = contexts[len(bits) : len(bits) + size]
            probabilities = {context: self.probability(context) for context in portion}
            read = [self.bits.bit(probabilities[context]) for context in portion]
            for context, bit in zip(portion, read, strict=True):
                self.counts[context][bit] += 24
            for context in probabilities:
                while sum(self.counts[context]) > 9600:
                    self.counts[context] = [max(count >> 1, 1) for count in self.counts[context]]
            self.coded += len(portion)
            bits += read
        return bits

    def probability(self, context: Any) -> int:
        if context not in self.counts:
            guess = self.guess(context)
            self.counts[context] = [max(1, (65536 - guess) * 48 >> 16), max(1, guess * 48 >> 16)]
        zeros, ones = self.counts[context]
        return min(max(ones * 65536 // (zeros + ones), 24), 65536 - 24)


# --- arrays of integers, and masks


def passes(shape: Index) -> Iterator[tuple[int, int, list[Index]]]:
    """Yield axis, step and places of each pass."""
    step = 1
    while 2 * step < max(shape):
        step *= 2
    while step:
        for axis in range(len(shape)):
            if step < shape[axis]:
                before = [range(0, n, step) for n in shape[:axis]]
                after = [range(0, n, 2 * step) for n in shape[axis + 1 :]]
                yield axis, step, list(product(*before, range(step, shape[axis], 2 * step), *after))
        step //= 2


def moved(place: Index, axis: int, by: int) -> Index:
    return (*place[:axis], place[axis] + by, *place[axis + 1 :])


def read_integers(bits: Bits, shape: Index) -> np.ndarray:
    longer = Adaptive(bits, lambda c: 57000 if c[1] < c[0] - 1 else 40000 if c[1] < c[0] else 16000)
    top = Adaptive(bits, lambda _: 30000)
    values: dict[Index, int] = {}
    missing: dict[Index, int] = {}

    def rests(activity: list[int]) -> list[int]:
        lengths = [0] * len(activity)
        left = list(range(len(activity)))
        for length in range(41):
            going = longer.read([(activity[i], length) for i in left])
            left = [i for i, bit in zip(left, going, strict=True) if bit]
            for i in left:
                lengths[i] = length + 1
        values = [int(length > 0) for length in lengths]
        for place in (0, 1):
            chosen = [i for i, length in enumerate(lengths) if length > place + 1]
            read = top.read([(lengths[i], place, values[i] - (1 << place)) for i in chosen])
            for i, bit in zip(chosen, read, strict=True):
                values[i] = 2 * values[i] + bit
        widths = [max(length - 3, 0) for length in lengths]
        low = bits.raw(widths)
        values = [(high << width) + rest for high, width, rest in zip(values, widths, low, strict=True)]
        signs = iter(bits.raw([1] * sum(value > 0 for value in values)))
        return [-value if value and next(signs) else value for value in values]

    first = (0,) * len(shape)
    values[first], missing[first] = rests([0])[0], 0
    for axis, step, places in passes(shape):
        is_cubic = bits.raw([1])[0]
        guesses, activity = [], []
        for place in places:
            left, right, far_left, far_right = (moved(place, axis, by * step) for by in (-1, 1, -3, 3))
            guess = values[left]
            around = 2 * missing[left]
            if right in values:
                guess = (values[left] + values[right]) >> 1
                around = abs(values[right] - values[left]) + missing[left] + missing[right]
            if is_cubic and all(place in values for place in (right, far_left, far_right)):
                guess = (9 * (values[left] + values[right]) - values[far_left] - values[far_right] + 8) >> 4
            guesses.append(guess)
            activity.append(min(around.bit_length(), 41))
        for place, guess, rest in zip(places, guesses, rests(activity), strict=True):
            values[place], missing[place] = guess + rest, abs(rest)
    array = np.zeros(shape, dtype=np.int64)
    for place, value in values.items():
        array[place] = value
    return array


def read_mask(bits: Bits, shape: Index) -> np.ndarray:
    adaptive = Adaptive(
        bits, lambda c: round(65536 * (0.02 + 0.96 * min((4 * c[0] + c[1] + c[2] / 4) / 14, 1)))
    )  # fmt: skip
    mask = np.zeros(shape, dtype=np.int64)
    mask[(0,) * len(shape)] = bits.raw([1])[0]
    for axis, step, places in passes(shape):
        # distance of known places along each axis
        grid = [step if other < axis else 2 * step for other in range(len(shape))]

        def known(place: Index, *moves: tuple[int, int], grid: list[int] = grid) -> int:
            for along, by in moves:
                last = (shape[along] - 1) // grid[along] * grid[along]
                place = moved(place, along, min(max(place[along] + by, 0), last) - place[along])
            return int(mask[place])

        contexts = []
        for place in places:
            near = known(place, (axis, -step)) + known(place, (axis, step))
            far = known(place, (axis, -3 * step)) + known(place, (axis, 3 * step))
            diagonal = sum(
                known(place, (axis, along), (other, across))
                for other in range(len(shape))
                if other != axis and shape[other] > grid[other]
                for along in (-step, step)
                for across in (-grid[other], grid[other])
            )
            contexts.append((near, far, diagonal, min(step.bit_length() - 1, 2)))
        for place, bit in zip(places, adaptive.read(contexts), strict=True):
            mask[place] = bit
    return mask


# --- the residual layer


THRESHOLDS = [4]
while len(THRESHOLDS) < 23:
    THRESHOLDS.append(THRESHOLDS[-1] + max(8, THRESHOLDS[-1] // 5))


def read_levels(bits: Bits, grid: Index, block: Index) -> dict[tuple[Index, Index], int]:
    """Return the levels of a tile by (block, frequency)."""
    axes = len(grid)

    def first(share: float) -> Any:
        def guess(context: Index) -> int:
            x = share * (THRESHOLDS[context[0] - 1] if context[0] else 2) / 256
            return round(65536 * x / (1 + x))

        return guess

    nonzero, more = Adaptive(bits, first(0.9)), Adaptive(bits, first(0.45))
    goes_on, longer = Adaptive(bits, lambda _: 36000), Adaptive(bits, lambda _: 32768)
    means = read_integers(bits, grid)
    zero = (0,) * axes
    levels: dict[tuple[Index, Index], int] = {}

    def seen(place: Index, frequency: Index) -> int:
        return 0 if frequency == zero else min(abs(levels.get((place, frequency), 0)), 40)

    def lower(place: Index, frequency: Index, by: int) -> int:
        return sum(seen(place, moved(frequency, axis, -by)) for axis in range(axes))

    def context(place: Index, frequency: Index) -> tuple[int, int]:
        beside = [moved(place, axis, by) for axis in range(axes) for by in (-1, 1)]
        beside = [other for other in beside if all(0 <= at < n for at, n in zip(other, grid, strict=True))]
        near, far = lower(place, frequency, 1), lower(place, frequency, 2)
        below = sum(lower(other, frequency, 1) for other in beside)
        a, c = 256 // max(sum(f > 0 for f in frequency), 1), 256 // max(len(beside), 1)
        if sum(place) % 2:
            same = sum(seen(other, frequency) for other in beside)
            expected = (100 * near + 26 * far + (26 * below * c >> 8)) * a + 104 * same * c
        else:
            expected = (128 * near + 52 * far + (76 * below * c >> 8)) * a
        radius = sum((16 * f // b) ** 2 for f, b in zip(frequency, block, strict=True))
        return (
            sum(bound <= expected >> 8 for bound in THRESHOLDS),
            sum(bound <= radius for bound in (1, 3, 8, 20, 48, 110, 260)),
        )

    blocks = list(product(*map(range, grid)))
    frequencies = list(product(*map(range, block)))
    for total, odd in product(range(1, sum(block) - axes + 1), (0, 1)):
        wave = [(g, f) for f in frequencies if sum(f) == total for g in blocks if sum(g) % 2 == odd]
        if not wave:
            continue
        contexts = [context(*coefficient) for coefficient in wave]
        chosen = [i for i, bit in enumerate(nonzero.read(contexts)) if bit]
        signs = bits.raw([1] * len(chosen))
        magnitudes = dict.fromkeys(chosen, 1)
        left = [i for i, bit in zip(chosen, more.read([(contexts[i][0], odd) for i in chosen]), strict=True) if bit]
        for i in left:
            magnitudes[i] = 2
        for level in range(2, 15):
            going = goes_on.read([(min(contexts[i][0] // 4, 5), level) for i in left])
            left = [i for i, bit in zip(left, going, strict=True) if bit]
            for i in left:
                magnitudes[i] = level + 1
        lengths = dict.fromkeys(left, 0)
        rest = left
        for place in range(24):
            rest = [i for i, bit in zip(rest, longer.read([place] * len(rest)), strict=True) if bit]
            for i in rest:
                lengths[i] = place + 1
        for i, low in zip(left, bits.raw([lengths[i] for i in left]), strict=True):
            magnitudes[i] = (1 << lengths[i]) + low + 14
        for i, sign in zip(chosen, signs, strict=True):
            levels[wave[i]] = -magnitudes[i] if sign else magnitudes[i]
    return levels | {(place, zero): int(means[place]) for place in blocks}


def rounded(value: float) -> int:
    """Round a result of the mathematics library; values next to a tie may differ between machines."""
    assert abs(value - math.floor(value) - 0.5) > 1e-7, value
    return round(value)


@cache
def basis(size: int, step: int) -> np.ndarray:
    """Return the basis b[k, n] of `size` places of `step` voxels."""
    basis = np.zeros((size, size), dtype=np.int64)
    for k, n in product(range(size), range(size)):
        gain, x = math.sqrt((2 if k else 1) / size / step), math.pi * k / (2 * size * step)
        gain *= math.sin(step * x) / (step * math.sin(x)) if k else 1
        basis[k, n] = rounded(2**14 * gain * math.cos(math.pi * (2 * n + 1) * k / (2 * size)))
    return basis


def decode_residual(head: Header, streams: list[bytes], tree: np.ndarray, steps: Index) -> np.ndarray:
    """Return the sum of tree and residual layer in cells, with the background."""
    assert head.residual is not None
    result, layer = tree, head.residual
    block, tile, exponent = layer["block"], layer["tile"], layer["exponent"]
    cells = [b // s for b, s in zip(block, steps, strict=True)]
    for stream, where in zip(streams, product(*map(range, layer["tiles"])), strict=True):
        bits = Bits(stream)
        first = [w * t for w, t in zip(where, tile, strict=True)]
        grid = tuple(min(t, n - f) for t, n, f in zip(tile, layer["blocks"], first, strict=True))
        start = [f * b for f, b in zip(first, block, strict=True)]
        voxels = tuple(min(g * b, n - s) for g, b, n, s in zip(grid, block, head.extent, start, strict=True))
        mask = None if layer["background"] is None else read_mask(bits, voxels)
        values = np.zeros([g * c for g, c in zip(grid, cells, strict=True)], dtype=np.int64)
        levels = read_levels(bits, grid, block)
        for place in product(*map(range, grid)):
            part = np.zeros(cells, dtype=np.int64)
            for frequency in product(*map(range, cells)):
                level = levels.get((place, frequency), 0)
                if level:
                    point = layer["points"][min(abs(level), 3) - 1]
                    size = (64 * abs(level) + point) * layer["mantissa"]
                    size = size << exponent if exponent >= 0 else (size + (1 << -exponent >> 1)) >> -exponent
                    size = min(size, 2**33)
                    part[frequency] = size if level > 0 else -size
            for axis, s in enumerate(steps):
                turned = np.moveaxis(part, axis, -1) @ basis(cells[axis], s)
                part = np.moveaxis((turned + (1 << 13)) >> 14, -1, axis)
            values[tuple(slice(p * c, (p + 1) * c) for p, c in zip(place, cells, strict=True))] = part
        low = [s // by for s, by in zip(start, steps, strict=True)]
        inside = tuple(slice(0, -(-n // by)) for n, by in zip(voxels, steps, strict=True))
        box = tuple(slice(at, at + part.stop) for at, part in zip(low, inside, strict=True))
        result[box] += values[inside]
        if mask is not None:
            for place in product(*(range(part.stop) for part in inside)):
                cell = mask[tuple(slice(p * by, (p + 1) * by) for p, by in zip(place, steps, strict=True))]
                i, v = int(cell.sum()), cell.size
                at = tuple(a + b for a, b in zip(low, place, strict=True))
                result[at] = (int(result[at]) * i + layer["background"] * (v - i) + v // 2) // v
    return result


# --- the tree


def decode_tree(head: Header, stream: bytes, steps: Index) -> np.ndarray:
    """Return the values of the tree [C, ...] in cells of `steps` voxels."""
    tree = head.tree
    assert tree is not None
    axes, splits, active = len(head.shape), tree["splits"], tree["active"]
    # the children of a node have successive numbers in their level; places are in the grid of the level
    places: list[list[Index]] = [[(0,) * axes]]
    for split in splits[1:]:
        children = list(product(*map(range, split)))
        places.append([
            tuple(p * s + c for p, s, c in zip(parent, split, child, strict=True))
            for parent in places[-1] for child in children
        ])  # fmt: skip
    needed = [[leaf for leaf, is_active in enumerate(active) if is_active]]
    for split in splits[:0:-1]:
        needed.insert(0, sorted({node // math.prod(split) for node in needed[0]}))
    bits = Bits(stream)
    layers, inputs = [], axes
    for level, width, spreads in zip(tree["levels"], tree["widths"], tree["spreads"], strict=True):
        nodes = needed[level]
        weights = read_weights(bits, (len(nodes), inputs, width), spreads[0])
        biases = read_weights(bits, (len(nodes), 1, width), spreads[1])
        layers.append({node: (weights[row], biases[row, 0]) for row, node in enumerate(nodes)})
        inputs = width
    still = active.count(False)
    constants = iter(read_integers(bits, (still, head.channels)) if still else [])
    sine = [rounded(2**10 * math.sin(2 * math.pi * z / 4096)) for z in range(4096)]
    parts = [math.prod(split[axis] for split in splits) for axis in range(axes)]
    sizes = [-(-n // part) for n, part in zip(head.shape, parts, strict=True)]
    result = np.zeros(head.cells(steps), dtype=np.int64)
    for leaf, place in enumerate(places[-1]):
        starts = [p * n for p, n in zip(place, sizes, strict=True)]
        ends = [min(start + n, end) for start, n, end in zip(starts, sizes, head.shape, strict=True)]
        chain = [leaf]
        for split in splits[:0:-1]:
            chain.insert(0, chain[0] // math.prod(split))
        constant = None if active[leaf] else next(constants)
        cells = [
            range(-(-start // by), -(-max(end, start) // by))
            for start, end, by in zip(starts, ends, steps, strict=True)
        ]
        for cell in product(*cells):
            if constant is not None:
                result[(slice(None), *cell)] = constant
                continue
            x = np.array([
                coordinate(2 * (c * by - start) + by - 1, n)
                for c, start, n, by in zip(cell, starts, sizes, steps, strict=True)
            ])  # fmt: skip
            unit = 2**14
            for number, (level, (multiplier, shift)) in enumerate(zip(tree["levels"], tree["rounding"], strict=True)):
                weights, bias = layers[number][chain[level]]
                if number:
                    x, unit = np.array([sine[z % 4096] for z in x.tolist()]), 2**10
                x = ((x @ weights + bias * unit) * multiplier + ((1 << shift) >> 1)) >> shift
            result[(slice(None), *cell)] = x + tree["base"]
    return result


def coordinate(twice: int, n: int) -> int:
    return -(2**14) if n == 1 else (twice * 2**14 + (n - 1) // 2) // (n - 1) - 2**14


def read_weights(bits: Bits, shape: Index, spread: int) -> np.ndarray:
    mean = (8 + spread % 8) << (spread >> 3)
    t = (mean << 16) // (mean + 64)
    magnitudes = np.zeros(math.prod(shape), dtype=np.int64)
    for digit in range(12):
        ones = min(max((t << 16) // (65536 + t), 1), 65535)
        magnitudes += [bits.bit(ones) << digit for _ in magnitudes]
        t = t * t >> 16
    (chosen,) = np.nonzero(magnitudes)
    magnitudes[chosen] *= 1 - 2 * np.array(bits.raw([1] * len(chosen)), dtype=np.int64)
    return magnitudes.reshape(shape)


# --- samples


def as_float32(values: np.ndarray) -> np.ndarray:
    largest = float(np.finfo(np.float32).max)
    return values.clip(-largest, largest).astype(np.float32)


def to_samples(head: Header, w: np.ndarray) -> np.ndarray:
    if head.dtype == "float32":
        return as_float32(w * 2.0**head.exponent + head.offset)
    limits = np.iinfo(head.dtype)
    return ((w + 7 + ((w >> 4) & 1)) >> 4).clip(limits.min, limits.max).astype(head.dtype)


def decode_exact(head: Header, streams: list[bytes], tree: np.ndarray | None) -> np.ndarray:
    layer = head.exact
    assert layer is not None
    guess = np.zeros(head.extent, dtype=head.dtype) if tree is None else to_samples(head, tree)
    palette = np.zeros(0, dtype=np.int64)
    step, offset = layer.get("step"), layer.get("offset")
    if layer["grid"] == 1:
        palette = read_integers(Bits(streams[0]), (1, layer["size"]))[0].cumsum()
        streams = streams[1:]
        k = np.minimum((palette[:, None] < guess.reshape(1, -1)).sum(0), len(palette) - 1).reshape(head.extent)
    elif layer["grid"] == 2:
        k = order_of_bits(guess.view(np.int32).astype(np.int64))
    elif head.dtype == "float32":
        k = np.rint((guess.astype(np.float64) - offset) / step).astype(np.int64)
    else:
        k = (guess.astype(np.int64) + step // 2) // step
    if tree is None:
        k[...] = 0
    for stream, where in zip(streams, product(*map(range, layer["tiles"])), strict=False):
        start = [w * t for w, t in zip(where, layer["tile"], strict=True)]
        sizes = tuple(min(t, n - s) for t, n, s in zip(layer["tile"], head.extent, start, strict=True))
        k[tuple(slice(s, s + n) for s, n in zip(start, sizes, strict=True))] += read_integers(Bits(stream), sizes)
    if layer["grid"] == 1:
        return palette[k].astype(head.dtype)
    if layer["grid"] == 2:
        return order_of_bits(k).astype(np.int32).view(np.float32)
    if head.dtype == "float32":
        return as_float32(k * step + offset)
    limits = np.iinfo(head.dtype)
    return (k * step).clip(limits.min, limits.max).astype(head.dtype)


def order_of_bits(bits: np.ndarray) -> np.ndarray:
    return np.where(bits < 0, -1 - (bits + (1 << 31)), bits)


def decode(content: bytes, level: int = 0) -> np.ndarray:
    """Return the samples of a file, in cells of 2**level voxels along each axis."""
    head = read_header(content)
    streams = head.streams
    ones = (1,) * len(head.shape)
    steps = tuple(1 << level if n > 1 else 1 for n in head.shape)
    tree = None
    if head.tree is not None:
        tree, streams = decode_tree(head, streams[0], ones if head.exact else steps), streams[1:]
    if head.exact is not None:
        samples = decode_exact(head, streams, tree)
        if level:
            samples = means_of_cells(samples, head.cells(steps), steps)
    else:
        w = np.zeros(head.cells(steps), dtype=np.int64) if tree is None else tree
        samples = to_samples(head, w if head.residual is None else decode_residual(head, streams, w, (1, *steps)))
    return samples[0] if head.channel_axis is None else np.moveaxis(samples, 0, head.channel_axis)


def means_of_cells(samples: np.ndarray, cells: Index, steps: Index) -> np.ndarray:
    means = np.zeros(cells)
    for place in np.ndindex(cells):
        cell = (place[0], *(slice(p * by, (p + 1) * by) for p, by in zip(place[1:], steps, strict=True)))
        means[place] = samples[cell].astype(np.float64).mean()
    return (means if samples.dtype == np.float32 else np.rint(means)).astype(samples.dtype)
