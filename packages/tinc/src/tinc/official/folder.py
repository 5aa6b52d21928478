"""Official folders of weights: a sub-folder of raw float32 files for each node, and opt.yaml with the options.

The files have no shapes: levels follow from names, and widths from sizes. The volume's shape, type and range, which
official folders lack, are in side_info.json of the folders that tinc writes.
"""

import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tinc.official.allocation import Dims, Node, TreePlan, node_places
from tinc.official.model import OctreeMLP, decode
from tinc.official.volume import SideInfo, normalise, read_volume, with_channels
from tinc.recipes import MAX_LEVELS, RECIPES, Level, OfficialRecipe, from_options, to_options
from visionkernels.checks import InputError
from visionkernels.extras import require
from visionkernels.weights import Checkpoint, CheckpointError, read_checkpoint

__all__ = ["OfficialModel", "decode_official", "load_official", "official_state", "open_official", "save_official"]

_OPTIONS, _SIDE_INFO = "opt.yaml", "side_info.json"
_KEY = re.compile(r"(\d)-(\d{1,3})-(\d{1,3})-(\d{1,3})/(\d{1,3})-([WB])")
_MAX_PARAMETERS = 1 << 28  # 1 GiB of float32
_MAX_FILES = 1 << 20
_MAX_TEXT_BYTES = 1 << 20


@dataclass(frozen=True)
class OfficialModel:
    """A loaded tree, its side info, and the options of its training."""

    model: OctreeMLP
    side_info: SideInfo
    recipe: OfficialRecipe


def official_state(model: OctreeMLP) -> dict[str, Tensor]:
    """Return copies of all weights under official keys, e.g. "1-0-0-1/0-W" with the shape (outputs, inputs)."""
    return {name: value.detach().cpu().clone() for name, value in model.node_parameters()}


def save_official(
    folder: str | Path,
    model: OctreeMLP,
    recipe: OfficialRecipe,
    *,
    side_info: SideInfo | None = None,
    overwrite: bool = False,
) -> int:
    """Write the tree as an official folder, whole or not at all, and return its bytes.

    Args:
        folder: the folder
        model: the tree; weights are written as little-endian float32, row by row
        recipe: the options in opt.yaml
        side_info: the content of side_info.json; None leaves the file out, as the official code does
        overwrite: replace an existing folder; otherwise it raises FileExistsError
    """
    folder = Path(folder)
    if folder.exists() and not overwrite:
        raise FileExistsError(f"{folder} exists; pass --overwrite to replace it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        partial.chmod(0o755)
        for key, value in official_state(model).items():
            path = partial / key
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(value.numpy().astype("<f4").tobytes())
        # JSON is valid YAML, and needs no library
        (partial / _OPTIONS).write_text(json.dumps(to_options(recipe)) + "\n", encoding="utf-8")
        if side_info is not None:
            (partial / _SIDE_INFO).write_text(json.dumps(asdict(side_info)) + "\n", encoding="utf-8")
        num_bytes = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
        if folder.exists():
            old = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-old-"))
            folder.rename(old / folder.name)
            partial.rename(folder)
            shutil.rmtree(old)
        else:
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return num_bytes


def load_official(
    source: str | Path | Checkpoint,
    volume: np.ndarray | str | Path | None = None,
    side_info: SideInfo | None = None,
    *,
    recipe: OfficialRecipe | None = None,
) -> OctreeMLP:
    """Return the tree of an official folder or file, in evaluation mode; arguments and errors as `open_official`."""
    return open_official(source, volume, side_info, recipe=recipe).model.eval()


def open_official(
    source: str | Path | Checkpoint,
    volume: np.ndarray | str | Path | None = None,
    side_info: SideInfo | None = None,
    *,
    recipe: OfficialRecipe | None = None,
) -> OfficialModel:
    """Open an official folder (or the folder above its `models`), or a .safetensors or .pth file with the same keys.

    The side info comes from `side_info`, from the original `volume`, or from side_info.json. Activations, w0 and range
    come from `recipe`, from opt.yaml, or else are those of all named configurations: sines, w0 30, 0 to 100. No code of
    a file is run. Raises FileNotFoundError; CheckpointError for weights that are missing, unexpected or misshapen, with
    the first five and the configuration that the file seems to hold; ImportError for a YAML file without pyyaml; and
    ValueError without side info, or with that of another volume.
    """
    path = source.path if isinstance(source, Checkpoint) else Path(source)
    if (path / "models").is_dir():
        path = path / "models"
    state = _read_folder(path) if path.is_dir() else dict(read_checkpoint(source).state)
    dims = _tree_of(state, path)
    layers = _layers(dims)
    if recipe is None:
        recipe = _stored_recipe(path)
    if recipe is None:
        recipe = OfficialRecipe(name=path.stem, levels=tuple(Level(1.0, number) for number in layers))
    if tuple(level.layers for level in recipe.levels) != layers:
        stated = ", ".join(str(level.layers) for level in recipe.levels)
        raise CheckpointError(f"{path} does not fit its options, which have {stated} layers a level; {_seems(layers)}")
    channels = list(dims.values())[-1].output
    side_info = _side_info(path, volume, side_info, recipe)
    if side_info.shape[3] != channels:
        raise InputError(f"side_info has {side_info.shape[3]} channels, the leaves of {path} have {channels}")
    plan = TreePlan(
        nodes=tuple(Node(level, index, sizes) for (level, index), sizes in dims.items()),
        volume_shape=side_info.shape[:3],
        activations=tuple(level.activation for level in recipe.levels),
        w0=recipe.w0,
    )
    model = OctreeMLP(plan)
    with torch.no_grad():
        for key, parameter in model.node_parameters():
            parameter.copy_(state[key].view_as(parameter))
    return OfficialModel(model.eval(), side_info, replace(recipe, output=channels))


def decode_official(path: str | Path, volume: str | Path) -> tuple[np.ndarray, int]:
    """Return the volume [depth, height, width, channels] of a folder or file of weights, and its bytes.

    Raises the errors of `open_official`.
    """
    loaded = open_official(path, volume=volume)
    files = [file for file in (Path(path), *Path(path).rglob("*")) if file.is_file()]
    return decode(loaded.model, loaded.side_info), sum(file.stat().st_size for file in files)


def _read_folder(folder: Path) -> dict[str, Tensor]:
    """Return the values of all files in sub-folders as flat tensors, under "sub-folder/file"."""
    files = [path for node in sorted(folder.iterdir()) if node.is_dir() for path in sorted(node.iterdir())]
    sizes = [path.stat().st_size for path in files]
    if len(files) > _MAX_FILES or sum(sizes) > 4 * _MAX_PARAMETERS:
        raise CheckpointError(
            f"{folder} holds {len(files)} files of {sum(sizes)} bytes; at most {_MAX_FILES} files of "
            f"{4 * _MAX_PARAMETERS} bytes are read"
        )
    state = {}
    for path, size in zip(files, sizes, strict=True):
        key = f"{path.parent.name}/{path.name}"
        if _KEY.fullmatch(key) and size % 4:
            raise CheckpointError(f"{path} has {size} bytes, not a whole number of float32; it is damaged")
        # the key of any other file is enough to report it
        data = path.read_bytes() if _KEY.fullmatch(key) and path.is_file() else b""
        state[key] = torch.from_numpy(np.frombuffer(data, "<f4").astype(np.float32))
    return state


Place = tuple[int, tuple[int, int, int]]


def _tree_of(state: Mapping[str, Tensor], source: Path) -> dict[Place, Dims]:
    """Return the sizes of the nodes, in pre-order. Raises CheckpointError unless the weights form a full octree."""
    counts: dict[int, Counter[str]] = {}
    for key in state:
        if match := _KEY.fullmatch(key):
            level, layer = int(match[1]), int(match[5])
            # number of nodes of a level with such a layer
            counts.setdefault(level, Counter())[f"{layer}-{match[6]}"] += 1
    if not counts:
        raise CheckpointError(f"{source} contains no weights of nodes, such as 0-0-0-0/0-W")
    depth = max(counts) + 1
    if depth > MAX_LEVELS:
        raise CheckpointError(f"{source} holds a tree of {depth} levels; at most {MAX_LEVELS} are read")
    layers = tuple(_usual_layers(counts.get(level, Counter())) for level in range(depth))
    expected = {
        f"{Node(level, index, _NO_DIMS).name}/{layer}-{kind}"
        for level, index in node_places(depth)
        for layer in range(layers[level])
        for kind in "WB"
    }
    missing, unexpected = sorted(expected - set(state)), sorted(set(state) - expected)
    dims: dict[Place, Dims] = {}
    misshapen: list[str] = []
    if not missing:
        for place in node_places(depth):
            dims[place] = _node_dims(place, state, layers, dims, misshapen)
    if missing or unexpected or misshapen:
        kinds = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
        problems = ", ".join(
            f"{len(names)} weights {kind}" + (f" (first: {', '.join(names[:5])})" if names else "")
            for kind, names in kinds.items()
        )
        raise CheckpointError(f"{source} is not a complete tree: {problems}; {_seems(layers)}")
    return dims


def _usual_layers(counts: Counter[str]) -> int:
    """Return the number of layers of at least half of a level's nodes, so that a single stray file does not count."""
    most = max(counts.values(), default=0)
    return max((int(name.partition("-")[0]) + 1 for name, count in counts.items() if 2 * count >= most), default=1)


_NO_DIMS = Dims(0, 0, 0, 0)


def _node_dims(
    place: Place,
    state: Mapping[str, Tensor],
    layers: tuple[int, ...],
    above: Mapping[Place, Dims],
    misshapen: list[str],
) -> Dims:
    """Return the sizes of a node from its biases, and append weights that do not fit to `misshapen`.

    Args:
        place: level and index of the node
        state: all weights
        layers: number of layers by level
        above: sizes of the nodes before it, in pre-order
        misshapen: messages about weights
    """
    level, index = place
    name, number = Node(level, index, _NO_DIMS).name, layers[level]
    inputs = above[level - 1, (index[0] // 2, index[1] // 2, index[2] // 2)].output if level else 3
    sizes = [state[f"{name}/{layer}-B"].numel() for layer in range(number)]
    is_leaf = level == len(layers) - 1
    dims = Dims(inputs, sizes[0], sizes[-1], number)
    leaves = [sizes.output for (depth, _), sizes in above.items() if depth == level]
    allowed = {
        f"{number - 1}-B": leaves[0] if is_leaf and leaves else sizes[-1] if is_leaf else sizes[0],
        **{f"{layer}-B": sizes[0] for layer in range(number - 1)},
    }
    for file, size in allowed.items():
        if state[f"{name}/{file}"].numel() != size or size == 0:
            misshapen.append(f"{name}/{file} of {state[f'{name}/{file}'].numel()} values instead of {max(size, 1)}")
    for layer, (after, before) in enumerate(zip(sizes, [inputs, *sizes[:-1]], strict=True)):
        weight = state[f"{name}/{layer}-W"]
        shapes = {(after, before), (after * before,)}
        if tuple(weight.shape) not in shapes or not weight.is_floating_point():
            misshapen.append(f"{name}/{layer}-W of {list(weight.shape)} {weight.dtype} instead of {[after, before]}")
    return dims


def _layers(dims: Mapping[Place, Dims]) -> tuple[int, ...]:
    return tuple({level: sizes.layers for (level, _), sizes in dims.items()}.values())


def _seems(layers: tuple[int, ...]) -> str:
    names = [name for name, recipe in RECIPES.items() if tuple(level.layers for level in recipe.levels) == layers]
    counts = ", ".join(map(str, layers))
    return f"it seems to hold {len(layers)} levels of {counts} layers, " + (
        f"as {' and '.join(names)} {'has' if len(names) == 1 else 'have'}" if names else "unlike any named one"
    )


def _stored_recipe(path: Path) -> OfficialRecipe | None:
    text = _text(path, _OPTIONS)
    if text is None:
        return None
    try:
        options = json.loads(text)
    except json.JSONDecodeError:
        yaml = require("yaml", "tinc-vision[official]")
        try:
            options = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise CheckpointError(f"{path / _OPTIONS} is damaged: {str(error).partition(chr(10))[0]}") from error
    if not isinstance(options, dict):
        raise CheckpointError(f"{path / _OPTIONS} holds a {type(options).__name__}; it must be a mapping of options")
    return from_options(options, name=path.name)


def _side_info(
    path: Path, volume: np.ndarray | str | Path | None, side_info: SideInfo | None, recipe: OfficialRecipe
) -> SideInfo:
    if side_info is not None:
        return side_info
    if volume is not None:
        array = with_channels(volume) if isinstance(volume, np.ndarray) else read_volume(volume)
        return normalise(array, scale_min=recipe.normal_min, scale_max=recipe.normal_max)[1]
    text = _text(path, _SIDE_INFO)
    if text is None:
        raise InputError(f"{path} lacks the shape, type and range of the volume; give the original volume or side_info")
    try:
        return SideInfo.from_dict(json.loads(text))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path / _SIDE_INFO} is damaged: {error}") from error


def _text(path: Path, name: str) -> str | None:
    """Return the text of a small file in a folder, or in the folder above `models`; None without the file."""
    candidates = [path / name, path.parent / name] if path.name == "models" else [path / name]
    file = next((place for place in candidates if place.is_file()), None)
    if file is None:
        return None
    if file.stat().st_size > _MAX_TEXT_BYTES:
        raise CheckpointError(f"{file} has {file.stat().st_size} bytes; at most {_MAX_TEXT_BYTES} are read")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file} is not a text file: {error}") from error
