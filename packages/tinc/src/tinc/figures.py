"""The pictures of the report: rate-distortion curves, and slices with their errors."""

from pathlib import Path
from typing import Any

import numpy as np

from tinc.compression import compress
from tinc.rivals import compare, match
from tinc.samples import sample_volume
from visionkernels.extras import require

__all__ = ["draw_curves", "draw_slices"]


def _pyplot() -> Any:
    require("matplotlib", "tinc-vision[plots]").use("agg")
    return require("matplotlib.pyplot", "tinc-vision[plots]")


def draw_curves(path: Path) -> None:
    """Draw PSNR against bits a sample for tinc and other codecs."""
    pyplot = _pyplot()
    rows = list(compare(sample_volume(), (16, 32, 64, 128, 256), preset="fast", layers=("residual",)))
    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    for name in dict.fromkeys(row["codec"] for row in rows):
        own = [row for row in rows if row["codec"] == name]
        label = name.replace("tinc residual", "tinc")
        style = {"linewidth": 2.4, "color": "black"} if label == "tinc" else {"linewidth": 1.2}
        axes.plot(
            [16 / row["ratio"] for row in own], [row["psnr"] for row in own], "o-", markersize=4, label=label, **style
        )
    axes.set(xscale="log", xlabel="bits a sample", ylabel="PSNR, dB")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def draw_slices(path: Path) -> None:
    """Draw a slice, its reconstructions by tinc and HEVC at 64x, and their errors on one scale."""
    pyplot = _pyplot()
    volume = sample_volume()
    decoded = {"tinc": compress(volume, ratio=64, preset="fast").decode()}
    coded = match("hevc", volume, 64)
    if coded is not None:
        decoded["HEVC"] = coded[1]
    place = len(volume) // 2
    figure, axes = pyplot.subplots(2, 1 + len(decoded), figsize=(2.6 * (1 + len(decoded)), 6.6), layout="constrained")
    axes[0, 0].imshow(volume[place], cmap="gray")
    axes[0, 0].set_title("original")
    errors = {name: image.astype(np.float64) - volume for name, image in decoded.items()}
    limit = float(np.percentile(np.abs(np.concatenate([image[place] for image in errors.values()])), 99))
    for column, (name, image) in enumerate(decoded.items(), 1):
        axes[0, column].imshow(image[place], cmap="gray", vmin=volume[place].min(), vmax=volume[place].max())
        axes[0, column].set_title(name)
        shown = axes[1, column].imshow(errors[name][place], cmap="RdBu", vmin=-limit, vmax=limit)
        axes[1, column].set_title(f"error, RMS {np.sqrt(np.square(errors[name]).mean()):.0f}")
    figure.colorbar(shown, ax=axes[1, 0], location="left", fraction=0.9)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
