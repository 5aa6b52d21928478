"""Arguments of `compress`, errors, layouts, channels, determinism, interruption."""

import math
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import pytest

import tinc
from tinc.encoding import tree_layer
from tinc.encoding.exact_layer import _middle
from tinc.encoding.targets import OutOfReachError
from tinc.residual.blocks import cut
from tinc.residual.design import choose_blocks

Wavy = Callable[..., np.ndarray]


class TestErrors:
    @pytest.mark.parametrize(
        "dtype", ["float64", "int32", "complex64", "bool", "U3", "int8", "uint32", "float16", object]
    )
    def test_dtype(self, dtype: Any) -> None:
        with pytest.raises(TypeError, match="must be one of uint8, uint16, int16, float32"):
            tinc.compress(np.zeros((4, 4), dtype=dtype), lossless=True)

    @pytest.mark.parametrize("shape", [(0, 4), (4, 0, 4)])
    def test_empty(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match="it is empty"):
            tinc.compress(np.zeros(shape, dtype=np.uint8), lossless=True)

    @pytest.mark.parametrize(
        ("shape", "axis", "axes"), [((4,), None, 1), ((1,) * 5, None, 5), ((3, 4), 0, 1), ((1,) * 6, 0, 5)]
    )
    def test_axes(self, shape: tuple[int, ...], axis: int | None, axes: int) -> None:
        with pytest.raises(ValueError, match=rf"{axes} axes besides channels; it must have 2 to 4"):
            tinc.compress(np.zeros(shape, dtype=np.uint8), lossless=True, channel_axis=axis)

    @pytest.mark.parametrize("axis", [3, -4])
    def test_channel_axis(self, axis: int) -> None:
        with pytest.raises(ValueError, match=rf"channel_axis={axis} must be in \[-3, 3\)"):
            tinc.compress(np.zeros((4, 4, 4), dtype=np.uint8), lossless=True, channel_axis=axis)

    def test_channels(self) -> None:
        with pytest.raises(ValueError, match="axis 2 has 65 channels; at most 64"):
            tinc.compress(np.zeros((4, 4, 65), dtype=np.uint8), lossless=True, channel_axis=-1)

    @pytest.mark.parametrize("target", [{"ratio": 8}, {"max_error": 0.5}, {"psnr": 40}])
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_not_finite(self, target: dict[str, float], value: float) -> None:
        array = np.ones((4, 4), dtype=np.float32)
        array[1, :2] = value
        with pytest.raises(ValueError, match="array has 2 values that are not finite; pass nan='fill'"):
            tinc.compress(array, **target)  # type: ignore[arg-type]

    def test_nothing_finite(self) -> None:
        with pytest.raises(ValueError, match="array has 4 values that are not finite"):
            tinc.compress(np.full((2, 2), np.nan, dtype=np.float32), ratio=2, nan="fill")

    @pytest.mark.parametrize(
        ("target", "got"),
        [
            ({}, "none"),
            ({"ratio": 8, "psnr": 40}, "ratio, psnr"),
            ({"lossless": True, "max_error": 1}, "max_error, lossless"),
        ],
    )
    def test_targets(self, target: dict[str, Any], got: str) -> None:
        with pytest.raises(ValueError, match=f"exactly one target of ratio, bytes, .*; got {got}"):
            tinc.compress(np.zeros((4, 4), dtype=np.uint8), **target)

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("ratio", 1, "must be above 1"), ("ratio", 0.5, "must be above 1"), ("ratio", math.nan, "finite"),
            ("bytes", 0, "must be above 0"), ("bytes", -3, "must be above 0"), ("bytes", True, "finite"),
            ("bpv", 0, "must be above 0"), ("psnr", 0, "must be above 0"), ("psnr", math.inf, "finite"),
            ("max_error", -1, "must be at least 0"), ("max_error", math.inf, "finite"),
        ],
    )  # fmt: skip
    def test_values(self, name: str, value: Any, message: str) -> None:
        with pytest.raises(ValueError, match=rf"{name}={value} .*{message}"):
            tinc.compress(np.zeros((4, 4), dtype=np.uint8), **{name: value})

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"preset": "slow"}, "preset='slow' must be one of 'fast', 'balanced', 'best'"),
            ({"layers": "none"}, "layers='none' must be one of 'auto', 'tree', 'residual', 'both'"),
            ({"nan": "drop"}, "nan='drop' must be one of 'raise', 'fill'"),
            ({"max_seconds": 0}, "max_seconds=0 must be above 0"),
            ({"max_seconds": math.nan}, "max_seconds=nan must be above 0"),
        ],
    )
    def test_options(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            tinc.compress(np.zeros((4, 4), dtype=np.uint8), lossless=True, **options)

    def test_out_of_reach_is_a_value_error(self) -> None:
        assert issubclass(OutOfReachError, ValueError)

    @pytest.mark.parametrize(
        ("metadata", "error"),
        [({"a": math.nan}, ValueError), ({"a": object()}, TypeError), ([], TypeError), ("", TypeError)],
    )
    def test_metadata(self, metadata: Any, error: type[Exception]) -> None:
        with pytest.raises(error):
            tinc.compress(np.zeros((4, 4), dtype=np.uint8), lossless=True, metadata=metadata)


class TestNan:
    @pytest.mark.parametrize(
        "target",
        [
            {"bpv": 12},
            {"max_error": 0.2},
            {"psnr": 50},
        ],
    )
    def test_fill(self, target: dict[str, Any]) -> None:
        """Values that are not finite become the mean of the others, whose quality does not change."""
        array = np.linspace(1, 9, 400, dtype=np.float32).reshape(20, 20)
        array[3, 4], array[5, 6] = np.nan, -np.inf
        file = tinc.compress(array, nan="fill", preset="fast", **target)
        decoded, finite = file.decode(), np.isfinite(array)
        assert np.isfinite(decoded).all()
        assert np.abs(decoded - array)[finite].max() < 0.3
        assert decoded[3, 4] == pytest.approx(array[finite].mean(), abs=0.5)

    def test_lossless_keeps(self) -> None:
        array = np.array([[1, np.nan], [np.inf, 2]], dtype=np.float32)
        assert tinc.compress(array, lossless=True).decode().tobytes() == array.tobytes()


class TestInputs:
    @pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
    @pytest.mark.parametrize("order", ["<", ">"])
    def test_byte_order(self, wavy: Wavy, dtype: str, order: str) -> None:
        array = wavy((5, 6), dtype)
        file = tinc.compress(array.astype(np.dtype(dtype).newbyteorder(order)), lossless=True, preset="fast")
        assert file.tobytes() == tinc.compress(array, lossless=True, preset="fast").tobytes()
        assert file.dtype == np.dtype(dtype)

    @pytest.mark.parametrize("target", [{"lossless": True}, {"bytes": 150}, {"max_error": 2}])
    def test_layouts(self, wavy: Wavy, target: dict[str, Any], tmp_path: Path) -> None:
        """Strided, transposed, read-only and memory-mapped arrays give the bytes of a plain array."""
        array = wavy((12, 10), "uint16")
        expected = tinc.compress(array, preset="fast", **target).tobytes()
        np.save(tmp_path / "a.npy", array)
        frozen = array.copy()
        frozen.setflags(write=False)
        for other in (
            np.repeat(array, 2, 1)[:, ::2], np.asfortranarray(array), array[::-1].copy()[::-1], frozen,
            np.load(tmp_path / "a.npy", mmap_mode="r"),
        ):  # fmt: skip
            before = other.copy()
            assert tinc.compress(other, preset="fast", **target).tobytes() == expected
            assert np.array_equal(other, before)

    @pytest.mark.parametrize(
        ("shape", "target"),
        [
            *product(
                [(1, 1), (1, 1, 1, 1), (1, 9), (9, 1), (1, 7, 1), (2, 1, 1, 5), (13, 11), (3, 17, 5)],
                [{"lossless": True}, {"max_error": 3}, {"bytes": 200}],
            ),
            *product([(1, 1), (1, 7, 1), (13, 11)], [{"psnr": 30}]),
        ],
    )
    def test_shapes(self, shape: tuple[int, ...], target: dict[str, Any]) -> None:
        array = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
        file = tinc.compress(array, preset="fast", **target)
        decoded = file.decode()
        assert decoded.shape == shape
        for level in range(file.levels + 1):
            assert file.decode(level=level).shape == tuple(-(-n // (1 << level)) for n in shape)
        if "lossless" in target:
            assert np.array_equal(decoded, array)

    @pytest.mark.parametrize("layers", ["tree", "both"])
    @pytest.mark.parametrize("shape", [(1, 2), (2, 1, 33)])
    def test_shapes_of_trees(self, shape: tuple[int, ...], layers: Any, few_steps: None) -> None:
        array = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
        file = tinc.compress(array, bytes=300, layers=layers)
        assert file.nbytes_stored <= 300 and file.decode().shape == shape and "tree" in file.info()

    @pytest.mark.parametrize("axis", [0, 1, 2, -1])
    @pytest.mark.parametrize("target", [{"lossless": True}, {"max_error": 2}, {"bytes": 400}])
    def test_channels(self, wavy: Wavy, axis: int, target: dict[str, Any]) -> None:
        """The file is the same for any axis of channels, apart from the header."""
        planes = np.stack([wavy((9, 12)), 200 - wavy((9, 12)), wavy((9, 12)) // 2])
        array = np.moveaxis(planes, 0, axis)
        file = tinc.compress(array, preset="fast", channel_axis=axis, **target)
        decoded = file.decode()
        assert decoded.shape == array.shape and file.info()["channel_axis"] == axis % 3
        first = tinc.compress(planes, preset="fast", channel_axis=0, **target)
        assert file.nbytes_stored == first.nbytes_stored
        assert np.array_equal(np.moveaxis(decoded, axis, 0), first.decode())

    def test_channels_of_trees(self, wavy: Wavy, few_steps: None) -> None:
        planes = np.stack([wavy((16, 20), noise=0), 220 - wavy((16, 20), noise=0)], -1)
        decoded = tinc.compress(planes, bytes=600, layers="tree", channel_axis=2).decode()
        assert decoded.shape == planes.shape

    @pytest.mark.parametrize("tiny", [(1000, 1e-3), (0, 1e-42), (0, 1e-38), (-1e30, 1e24)])
    def test_tiny_ranges_of_float32(self, wavy: Wavy, tiny: tuple[float, float]) -> None:
        """Ranges lie around a large value and among subnormal ones."""
        low, reach = tiny
        array = (low + wavy((9, 10), "float64", noise=0) * reach).astype(np.float32)
        decoded = tinc.compress(array, bpv=8, preset="fast").decode()
        assert np.isfinite(decoded).all()
        assert np.abs(decoded.astype(float) - array).max() < 0.3 * (float(array.max()) - float(array.min()))

    def test_two_values_of_float32(self) -> None:
        array = np.where(np.indices((8, 8)).sum(0) % 2, np.float32(1e30), np.float32(-1e30))
        assert np.abs(tinc.compress(array, psnr=60, preset="fast").decode() - array).max() < 1e28


class TestDeterminism:
    @pytest.mark.parametrize("target", [{"bytes": 300}, {"lossless": True}])
    def test_same_bytes(self, wavy: Wavy, target: dict[str, Any], few_steps: None) -> None:
        array = wavy((4, 17, 6))
        one, two = (tinc.compress(array, layers="both", seed=3, **target).tobytes() for _ in range(2))
        assert one == two

    def test_seed(self, wavy: Wavy, few_steps: None) -> None:
        one, two = (tinc.compress(wavy((4, 17, 6)), bytes=500, layers="tree", seed=seed).tobytes() for seed in (0, 1))
        assert one != two

    def test_global_state(self, wavy: Wavy, few_steps: None) -> None:
        """Global random states are neither read nor changed."""
        import torch

        array = wavy((4, 17, 6))
        torch.manual_seed(5)
        before = torch.random.get_rng_state()
        one = tinc.compress(array, bytes=500, layers="tree").tobytes()
        assert torch.equal(torch.random.get_rng_state(), before)
        torch.manual_seed(6)
        assert tinc.compress(array, bytes=500, layers="tree").tobytes() == one

    @pytest.mark.slow
    def test_processes(self, wavy: Wavy, tmp_path: Path) -> None:
        """Another process, with another hash seed, writes the same bytes."""
        np.save(tmp_path / "a.npy", wavy((4, 17, 6)))
        program = (
            "import sys, numpy, zlib, tinc\n"
            "file = tinc.compress(numpy.load(sys.argv[1]), bytes=150, preset='fast')\n"
            "print(zlib.crc32(file.tobytes()))\n"
        )
        import zlib

        expected = zlib.crc32(tinc.compress(wavy((4, 17, 6)), bytes=150, preset="fast").tobytes())
        result = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "a.npy")], capture_output=True, text=True, check=True,
            env={"PYTHONHASHSEED": "7", "PATH": "", "OMP_NUM_THREADS": "1"},
        ).stdout  # fmt: skip
        assert int(result) == expected


class TestCallback:
    def test_stages(self, wavy: Wavy, few_steps: None) -> None:
        seen: list[tuple[str, float]] = []
        tinc.compress(wavy((4, 17, 6)), bytes=300, layers="both", callback=lambda *item: seen.append(item))
        stages = {stage for stage, _ in seen}
        assert "residual layer" in stages and any(stage.startswith("tree, step 10 of 12") for stage in stages)
        assert any(20 < quality < 60 for _, quality in seen)

    @pytest.mark.parametrize(("stage", "layers"), [("residual layer", "auto"), ("tree", "both"), ("tree", "tree")])
    def test_interrupt(self, wavy: Wavy, stage: str, layers: Any, few_steps: None) -> None:
        """KeyboardInterrupt ends the search with a file that meets the target; the callback is not called again."""
        calls = []

        def callback(name: str, _: float) -> None:
            calls.append(name)
            if name.startswith(stage):
                raise KeyboardInterrupt

        array = wavy((4, 17, 6))
        file = tinc.compress(array, bytes=300, layers=layers, callback=callback)
        assert file.nbytes_stored <= 300 and file.decode().shape == array.shape
        assert sum(name.startswith(stage) for name in calls) <= 1

    @pytest.mark.slow
    def test_interrupted_tree_alone(self, wavy: Wavy) -> None:
        """A file that meets the target is written after a fiftieth of the training."""

        def callback(name: str, _: float) -> None:
            if name.startswith("tree, step 50"):
                raise KeyboardInterrupt

        file = tinc.compress(wavy((8, 16, 16), "uint16"), bytes=1500, layers="tree", callback=callback)
        assert file.nbytes_stored <= 1500

    def test_other_errors_come_through(self, wavy: Wavy) -> None:
        def callback(*_: object) -> None:
            raise RuntimeError("no more")

        with pytest.raises(RuntimeError, match="no more"):
            tinc.compress(wavy((9, 10)), bytes=60, preset="fast", callback=callback)


class TestMaxSeconds:
    def test_ends(self, wavy: Wavy, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(tree_layer.TRAINING_STEPS, "balanced", 200)
        start = process_time()
        file = tinc.compress(wavy((4, 17, 6)), bytes=700, layers="tree", max_seconds=0.1)
        early = process_time() - start
        start = process_time()
        tinc.compress(wavy((4, 17, 6)), bytes=700, layers="tree")
        assert file.nbytes_stored <= 700 and early < 0.6 * (process_time() - start)


class TestMetadata:
    def test_round_trip(self) -> None:
        metadata = {"spacing": [0.5, 1, 2], "unit": "µm", "nested": {"a": None}}
        file = tinc.compress(np.zeros((4, 4), dtype=np.uint8), lossless=True, metadata=metadata)
        assert tinc.open(file.tobytes()).metadata == metadata

    def test_counts(self, wavy: Wavy) -> None:
        """The bytes of metadata count for the target."""
        array = wavy((5, 10, 12))
        file = tinc.compress(array, bytes=450, preset="fast", metadata={"text": "x" * 200})
        assert file.nbytes_stored <= 450 and file.metadata["text"] == "x" * 200


class TestLayers:
    @pytest.mark.slow
    def test_auto_is_the_best(self, wavy: Wavy, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(tree_layer.TRAINING_STEPS, "balanced", 300)
        array = wavy((16, 32, 32), "uint16", noise=0) * 100

        def error(layers: Any) -> float:
            decoded = tinc.compress(array, bytes=700, layers=layers).decode().astype(float)
            return float(np.square(decoded - array).mean())

        auto = error("auto")
        assert auto <= 1.01 * min(error("residual"), error("both"))

    @pytest.mark.slow
    def test_trees_learn(self, wavy: Wavy) -> None:
        array = wavy((16, 32, 32), "uint16", noise=0) * 100
        decoded = tinc.compress(array, bytes=900, layers="tree", preset="fast").decode()
        assert np.square(decoded.astype(float) - array).mean() < array.var() / 300

    def test_tree_of_low_contrast(self, wavy: Wavy, few_steps: None) -> None:
        """A tree of 60000 and a wave of two counts is not worse than the mean."""
        array = (60000 + (wavy((12, 20), "float32", noise=0) - 100) / 20).astype(np.uint16)
        decoded = tinc.compress(array, bytes=400, layers="tree").decode()
        assert np.abs(decoded.astype(float) - array).max() < 10


class TestTwoValues:
    def test_tree_of_two_values(self, few_steps: None) -> None:
        """float32 values of both ends of a range, in few bytes, need large steps of large weights."""
        array = (np.random.default_rng(0).random((16, 32)) < 0.5).astype(np.float32)
        array += array.cumsum(0) / 1000
        assert tinc.compress(array, bytes=100, layers="tree", preset="fast").nbytes_stored <= 100


class TestLosslessWithinASize:
    @pytest.mark.parametrize("shape", [(1, 30_000), (20_000, 4), (150, 200), (3, 100, 100), (2, 5, 50, 60)], ids=str)
    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
    def test_ramp(self, shape: tuple[int, ...], dtype: type[np.generic]) -> None:
        """A size that holds the samples as they are gives them as they are, in arrays of any shape."""
        ramp = np.broadcast_to(3 * sum(np.ogrid[tuple(slice(n) for n in shape)]), shape).astype(dtype)
        exact = tinc.compress(ramp, lossless=True)
        file = tinc.compress(ramp, ratio=4, preset="fast")
        assert exact.nbytes_stored <= ramp.nbytes / 4
        np.testing.assert_array_equal(file[...], ramp)

    def test_box(self) -> None:
        """The samples from which the size is estimated lie in the middle, as a cube where they can."""
        assert _middle((100, 100, 100), 24**3) == (slice(38, 62),) * 3
        assert _middle((1, 100_000), 10_000) == (slice(0, 1), slice(45_000, 55_000))
        assert _middle((5, 4), 1000) == (slice(0, 5), slice(0, 4))


class TestSteepRamp:
    """Coefficients of large blocks at the finest steps."""

    @pytest.mark.parametrize("target", [{"bytes": 2000, "layers": "residual"}, {"psnr": 90}])
    def test_decodes(self, target: dict[str, Any]) -> None:
        array = (np.indices((32, 32)).sum(0) * 1000).astype(np.uint16)
        decoded = tinc.compress(array, preset="fast", **target).decode()
        assert np.abs(decoded.astype(int) - array).max() <= 50


class TestCut:
    @pytest.mark.parametrize(
        "channels",
        [
            1,
            3,
            64,
        ],
    )
    @pytest.mark.parametrize("shape", [(32, 32, 32), (64, 64, 64), (200, 200, 200)])
    def test_tiles_are_readable(self, channels: int, shape: tuple[int, ...]) -> None:
        """No tile is larger than 2**20 voxels, the limit of readers."""
        blocks = cut((channels, *shape), (32, 32, 32))
        assert math.prod(b * t for b, t in zip(blocks.block, blocks.tile, strict=True)) <= 1 << 20

    def test_cover(self) -> None:
        blocks = cut((2, 100, 37, 50), (8, 4, 16))
        seen = np.zeros((2, 100, 37, 50), dtype=int)
        for tile in range(blocks.num_tiles):
            seen[blocks.box(tile)] += 1
        assert (seen == 1).all()

    def test_choice(self, wavy: Wavy) -> None:
        """Blocks are long along smooth axes and short along noisy ones."""
        rng = np.random.default_rng(0)
        lines = np.repeat(rng.normal(size=(1, 64, 1)) * 1000, 64, 2).astype(np.int64)
        blocks, step = choose_blocks(lines, 200)
        assert blocks.block[1] <= blocks.block[2] and blocks.block[2] >= 16 and step > 0
