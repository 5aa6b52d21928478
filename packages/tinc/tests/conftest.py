"""What the tests share: seeds, one thread, no network, small volumes, and a small file of each kind."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import tinc
from tinc import container
from tinc.encoding import tree_layer
from tinc.residual import blocks
from visionkernels.testing.fixtures import reproducible  # noqa: F401 - every test uses it
from visionkernels.testing.golden import load_module

Wavy = Callable[..., np.ndarray]
EXAMPLES = (
    "residual-uint8", "residual-uint16", "residual-int16", "residual-float32", "residual-2", "residual-4", "channels",
    "mask", "mask-channels", "tree", "tree-float32", "both", "constant-leaves", "step", "step-tree", "step-float32",
    "step-float32-tree", "bits", "bits-tree", "palette", "palette-tree", "constant", "checksums", "tiles",
)  # fmt: skip


@pytest.fixture(scope="session")
def wavy() -> Wavy:
    """Waves around 100 with an amplitude of 40, and some noise: `wavy(shape, dtype, noise=3)`."""

    def make(shape: tuple[int, ...], dtype: str = "uint8", noise: float = 3) -> np.ndarray:
        grid = np.meshgrid(*(np.linspace(0, 3, size) for size in shape), indexing="ij")
        waves = np.sin(sum((axis + 1) * each for axis, each in enumerate(grid)))
        return (waves * 40 + 100 + np.random.default_rng(0).normal(size=shape) * noise).astype(dtype)

    return make


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train trees for 12 steps instead of thousands."""
    for preset, steps in (("fast", 12), ("balanced", 12), ("best", 16)):
        monkeypatch.setitem(tree_layer.TRAINING_STEPS, preset, steps)


@pytest.fixture(scope="session")
def examples(wavy: Wavy) -> dict[str, tinc.TincFile]:
    """A small file of every kind."""
    make, draw = tinc.compress, np.random.default_rng(0)
    masked, half = wavy((6, 12, 10)), wavy((3, 34, 4))
    masked[:, :4] = masked[:3, :6] = 0
    half[:, :17] = 7
    signed = wavy((5, 6, 17), "float32") - 100
    signed[0, 0, :4] = 0, -0.0, 1e-45, -1e-45
    ranks = (draw.integers(0, 4, (6, 7, 8)) * 9001).astype(np.uint16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tree_layer.TRAINING_STEPS, "balanced", 12)
        files = {f"residual-{dtype}": make(wavy((5, 11, 9), dtype), preset="fast", bpv=1.5)
                 for dtype in ("uint8", "uint16", "int16", "float32")}  # fmt: skip
        files |= {
            "residual-2": make(wavy((17, 13), "uint16"), preset="fast", bytes=120),
            "residual-4": make(wavy((3, 5, 4, 6), "int16"), preset="fast", bytes=120),
            "channels": make(wavy((3, 9, 7, 2)), preset="fast", bytes=96, channel_axis=-1, metadata={"unit": "µm"}),
            "mask": make(masked, preset="fast", bytes=220),
            "mask-channels": make(np.stack([masked, masked // 2], 1), preset="fast", bytes=300, channel_axis=1),
            "tree": make(wavy((9, 17, 6)), bytes=700, layers="tree"),
            "tree-float32": make(wavy((18, 33), "float32"), bytes=700, layers="tree"),
            "both": make(wavy((9, 17, 6)), bytes=300, layers="both"),
            "constant-leaves": make(half, bytes=200, layers="both"),
            "step": make(wavy((5, 6, 7), "uint16"), max_error=4),
            "step-tree": make(wavy((5, 6, 17), "uint16"), max_error=4, layers="both"),
            "step-float32": make(wavy((5, 6, 7), "float32"), max_error=0.5),
            "step-float32-tree": make(wavy((5, 6, 17), "float32"), max_error=0.5, layers="tree"),
            "bits": make(signed, lossless=True),
            "bits-tree": make(signed, lossless=True, layers="both"),
            "palette": make(ranks, lossless=True),
            "palette-tree": make(ranks, lossless=True, layers="both"),
            "constant": make(np.full((3, 4), 9, dtype=np.int16), psnr=30),
        }
        patch.setattr(container, "TILE_CHECKS_FROM", 0)
        files["checksums"] = make(masked, preset="fast", bytes=280)
        patch.setattr(blocks, "TILE_VOXELS", 128)
        files["tiles"] = make(masked, preset="fast", bytes=300)
    assert set(files) == set(EXAMPLES)
    return files


@pytest.fixture(params=EXAMPLES)
def example(request: pytest.FixtureRequest, examples: dict[str, tinc.TincFile]) -> tinc.TincFile:
    """Each of `examples`."""
    return examples[request.param]


@pytest.fixture(scope="session")
def decoder() -> ModuleType:
    """The second decoder."""
    return load_module(Path(__file__).with_name("decoder.py"))
