"""Visualise attention: record the routing of every layer during a forward pass and draw it over the image."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from biformer.attention import BiLevelRoutingAttention
from biformer.model import BiFormer
from biformer.routing import Routing
from visionkernels.checks import InputError
from visionkernels.extras import require
from visionkernels.pictures.reading import read_picture

__all__ = ["RoutingRecorder", "attend", "draw_routing", "routed_layers", "token_heat"]

# the model's input grows with it: 20 x 400 pixels take some gigabytes
_LONGEST_RATIO = 20


def routed_layers(model: nn.Module) -> dict[str, BiLevelRoutingAttention]:
    """Return the routed layers by the name of their block, e.g. "stages.2.7", in the order of execution."""
    return {
        name.removesuffix(".attn"): module
        for name, module in model.named_modules()
        if isinstance(module, BiLevelRoutingAttention)
    }


class RoutingRecorder:
    """Records the routing of every layer (or of those named) while a model runs.

    with RoutingRecorder(model, ["stages.2.7"]) as recorder:
        model(images)
    recorder["stages.2.7"].index    # [batch, regions, topk]

    A layer that runs twice keeps the last call. Recording computes attention by the reference, beside the model's pass.
    Raises ValueError for a layer that the model lacks.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str] | None = None) -> None:
        present = routed_layers(model)
        unknown = [name for name in (() if layers is None else layers) if name not in present]
        if unknown:
            raise InputError(f"layer {unknown[0]!r} has no routed attention; choose among {', '.join(present)}")
        self.layers = {name: present[name] for name in (present if layers is None else layers)}
        self._records: dict[str, Routing] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> "RoutingRecorder":
        for name, layer in self.layers.items():

            def record(module: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                with torch.no_grad():
                    self._records[name] = module.routing(inputs[0])  # type: ignore[operator]

            self._handles.append(layer.register_forward_pre_hook(record))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def __getitem__(self, layer: str) -> Routing:
        return self._records[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)


def attend(
    image: str | Path | Image.Image, model: BiFormer, layer: str | None, query: tuple[int, int], out: Path
) -> None:
    """Draw the regions that the place `query` of an image attends to, one panel per layer, into the file `out`.

    `query` is (row, column) in pixels of the image. `layer` names a block ("stages.2.7"); None takes the last routed
    block of every stage. The image's shorter side is resized to about the model's input size, the other in proportion,
    to sizes that need no padding. Raises ValueError for a place outside the image and for a layer without routing, and
    FileNotFoundError.
    """
    picture = read_picture(image)
    row, column = query
    if not (0 <= row < picture.height and 0 <= column < picture.width):
        raise InputError(
            f"query={row} {column} is outside the picture of {picture.height} rows, {picture.width} columns"
        )
    if max(picture.size) > _LONGEST_RATIO * min(picture.size):
        size = f"{picture.width} x {picture.height}"
        raise InputError(f"the picture is {size} pixels; a side may be {_LONGEST_RATIO} times the other at most")
    config = resolve_model_data_config(model)
    names = [layer] if layer is not None else _last_of_each_stage(model)
    shape = _padless_shape(picture, min(config["input_size"][1:]), model)
    transform = create_transform(**(config | {"input_size": (3, *shape), "crop_pct": 1.0}))
    with RoutingRecorder(model.eval(), names) as recorder, torch.no_grad():
        model(transform(picture)[None].to(next(model.parameters()).device))
    place = (row / picture.height * shape[0], column / picture.width * shape[1])
    draw_routing(picture, {name: recorder[name] for name in names}, place, shape, out)


def _padless_shape(picture: Image.Image, size: int, model: nn.Module) -> tuple[int, int]:
    n_win = next(iter(routed_layers(model).values())).n_win
    # the deepest routed map lies at stride 16
    unit, ratio = 16 * n_win, size / min(picture.size)
    height, width = (max(1, round(side * ratio / unit)) * unit for side in (picture.height, picture.width))
    return height, width


def _last_of_each_stage(model: nn.Module) -> list[str]:
    last = {name.split(".")[1]: name for name in routed_layers(model)}
    return list(last.values())


def draw_routing(
    picture: Image.Image,
    routings: dict[str, Routing],
    place: tuple[float, float],
    shape: tuple[int, int],
    out: Path,
) -> None:
    """Draw panels of `routings` over the image, which a model saw at `shape` (rows, columns), and save them to `out`.

    `place` is (row, column) in that shape. Each panel frames the query's region and the regions that it is routed to,
    numbered by affinity, and lays the attention of the place's own token, averaged over heads, over the picture.
    """
    figure_module = require("matplotlib.figure", "biformer[plots]")
    figure = figure_module.Figure(figsize=(4 * len(routings), 4 * shape[0] / shape[1] + 0.6), layout="constrained")
    for axes, (name, routing) in zip(
        figure.subplots(1, len(routings), squeeze=False)[0], routings.items(), strict=True
    ):
        stride = 4 * 2 ** int(name.split(".")[1])
        _draw_panel(axes, picture, name, routing, place, shape, stride)
    figure.savefig(out, dpi=110)


def _draw_panel(
    axes: Any, picture: Image.Image, name: str, routing: Routing, place: tuple[float, float], shape: tuple[int, int],
    stride: int,
) -> None:  # fmt: skip
    patches = require("matplotlib.patches", "biformer[plots]")
    height, width = (side * stride for side in routing.region_size)
    region = int(place[0] // height) * routing.grid[1] + int(place[1] // width)
    heat = token_heat(routing, (int(place[0] // stride), int(place[1] // stride)))
    limits = (0, shape[1], shape[0], 0)
    axes.imshow(picture.resize((shape[1], shape[0])), extent=limits)
    reach = (0, heat.shape[1] * stride, heat.shape[0] * stride, 0)
    axes.imshow((heat / heat.max()).numpy(), extent=reach, cmap="inferno", alpha=0.45, interpolation="nearest")
    for rank, chosen in enumerate(routing.index[0, region].tolist(), 1):
        top, left = chosen // routing.grid[1] * height, chosen % routing.grid[1] * width
        axes.add_patch(patches.Rectangle((left, top), width, height, fill=False, edgecolor="gold", linewidth=1.2))
        axes.text(left + 2, top + 2, str(rank), color="gold", fontsize=7, va="top")
    top, left = region // routing.grid[1] * height, region % routing.grid[1] * width
    axes.add_patch(patches.Rectangle((left, top), width, height, fill=False, edgecolor="cyan", linewidth=2))
    axes.plot(place[1], place[0], "+", color="cyan", markersize=9)
    axes.set(title=f"{name}, top {routing.index.shape[-1]}", xticks=[], yticks=[])
    axes.axis(limits)


def token_heat(routing: Routing, token: tuple[int, int], image: int = 0) -> Tensor:
    """Return the attention of one token (row, column of the layer's map) over that map, [H, W], averaged over heads.

    It sums to one, but for pooled keys, whose weights have no single place: raises ValueError for them.
    """
    (rows, columns), (height, width) = routing.grid, routing.region_size
    if routing.attention.shape[-1] != routing.index.shape[-1] * height * width:
        raise InputError("this layer pools keys inside regions, so that its attention has no place in the map")
    region = token[0] // height * columns + token[1] // width
    inside = token[0] % height * width + token[1] % width
    weights = routing.attention[image, region, :, inside].mean(0).unflatten(0, (-1, height * width))
    by_region = weights.new_zeros(rows * columns, height * width)
    by_region.index_add_(0, routing.index[image, region], weights)
    blocks = by_region.view(rows, columns, height, width).transpose(1, 2)
    return blocks.reshape(rows * height, columns * width).cpu()
