"""Mutated `.tinc` files and official folders for `test_mutated_files.py`, with right checksums too."""

import dataclasses
import json
import shutil
from functools import cache
from pathlib import Path
from random import Random
from tempfile import mkdtemp
from typing import Any

import numpy as np
from numcodecs import get_codec

import tinc
from tinc import container
from tinc.chunks import TincChunks
from tinc.contents import Contents
from tinc.official import decode, normalise, open_official, plan_tree, save_official
from tinc.official.model import OctreeMLP
from tinc.recipes import Level, OfficialRecipe, expand_grid, read_yaml
from visionkernels.testing.mutations import MutatedReader, mutated, mutated_json

__all__ = ["CODE_READERS"]

CODES = [file.read_bytes() for file in sorted((Path(__file__).parent / "files").glob("v*/*.tinc"))]
MOST = 1 << 22


def read_code(path: Path) -> None:
    """Read all of a file that decodes to at most 4 MiB, a part, a coarser level and the metadata."""
    file = tinc.open(path, max_nbytes=MOST)
    file.info()
    part = tuple(slice(0, min(2, size)) for size in file.shape)
    file[part]
    file.metadata_of(part)
    if file.nbytes <= MOST:
        whole = file.decode()
        assert whole.shape == file.shape and whole.dtype == file.dtype
        file.decode(level=file.levels)


def read_start(path: Path) -> None:
    tinc.open(path, partial=True, max_nbytes=MOST).decode()


def read_chunk(path: Path) -> None:
    TincChunks().decode(path.read_bytes(), out=np.empty((5, 6), np.uint8))


def code_bytes(folder: Path, random: Random) -> Path:
    (folder / "x.tinc").write_bytes(mutated(random.choice(CODES), random))
    return folder / "x.tinc"


def chunk_bytes(folder: Path, random: Random) -> Path:
    content = TincChunks().encode(np.arange(30, dtype=np.uint8).reshape(5, 6))
    (folder / "x.tinc").write_bytes(mutated(content, random) if random.random() < 0.5 else random.choice(CODES))
    return folder / "x.tinc"


def code_header(folder: Path, random: Random) -> Path:
    """Bytes of the header, with its length, the file's and the checksums right."""
    content = random.choice(CODES)
    reader = container._Reader(memoryview(content)[container._PREFIX.size :])
    size = reader.number("size")
    start = container._PREFIX.size + reader.place
    writer, header = container._Writer(), mutated(content[start : start + size], random)
    writer.number(len(header))
    body = bytes(writer.content) + header + content[start + size :]
    checks_tiles = bool(content[6] & 1)
    checked = bytes(writer.content) + header if checks_tiles else body
    (folder / "x.tinc").write_bytes(container._prefix(len(body), checked, checks_tiles) + body)
    return folder / "x.tinc"


def code_streams(folder: Path, random: Random) -> Path:
    """Bytes of streams and the JSON of the metadata, with all lengths and checksums right."""
    content = random.choice(CODES)
    contents, directory = container.unpack(memoryview(content))
    streams = [directory.stream(content, number) for number in range(contents.num_streams)]
    if streams and random.random() < 0.8:
        number = random.randrange(len(streams))
        streams[number] = mutated(streams[number], random)
    changed: Contents = dataclasses.replace(contents, streams=tuple(streams))
    if random.random() < 0.3:
        metadata = {"axes": "ZYX"[-len(contents.shape) :], "spacing": [1.0] * len(contents.shape), "nifti": AFFINES}
        text = json.dumps(mutated_json(metadata, random)).encode()
        changed = dataclasses.replace(changed, metadata=mutated(text, random) if random.random() < 0.3 else text)
    (folder / "x.tinc").write_bytes(container.pack(changed, checks_tiles=random.random() < 0.5))
    return folder / "x.tinc"


AFFINES = {"sform": [[2.0, 0, 0, 1], [0, 2.0, 0, 1], [0, 0, 2.0, 1]], "sform_code": 1, "toffset": 1.0, "dim_info": 57}


@cache
def official() -> dict[str, bytes]:
    """Return the files of an official folder by their names."""
    folder = Path(mkdtemp())
    try:
        recipe = OfficialRecipe(name="x", levels=(Level(1.0, 2), Level(1.0, 3)), ratio=0.5)
        volume = (np.random.default_rng(0).gamma(0.5, size=(4, 4, 6)) * 1000).astype(np.uint16)
        values, side_info = normalise(volume)
        model = OctreeMLP(plan_tree(recipe, values, 2 * volume.nbytes), seed=3)
        save_official(folder / "x", model, recipe, side_info=side_info)
        files = [file for file in (folder / "x").rglob("*") if file.is_file()]
        return {str(file.relative_to(folder / "x")): file.read_bytes() for file in files}
    finally:
        shutil.rmtree(folder)


def official_folder(folder: Path, random: Random) -> Path:
    parts = dict(official())
    for _ in range(random.choice((1, 1, 2))):
        name = random.choice(["opt.yaml", "side_info.json"] if random.random() < 0.6 else list(parts))
        match random.randrange(8):
            case 0:
                parts.pop(name)
                parts[random.choice(("x/y", "9-0-0-0/0-W", "0-0-0-0/99-W", "1-0-0-0/x"))] = bytes(8)
                break
            case 1 | 2:
                parts[name] = mutated(parts[name], random)
            case _ if name.endswith((".yaml", ".json")):
                odd = mutated_json(_json(parts[name]), random)
                parts[name] = json.dumps(odd).encode()
            case _:
                values = np.frombuffer(parts[name][: len(parts[name]) // 4 * 4], np.float32).copy()
                values[: random.choice((1, 9))] = random.choice((np.nan, np.inf, -1e38, 0))
                parts[name] = values.tobytes()[: random.choice((len(values.tobytes()), 4, 0))]
    for name, content in parts.items():
        (folder / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "x" / name).write_bytes(content)
    return folder / "x"


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return {}


def read_official(path: Path) -> None:
    loaded = open_official(path)
    if np.prod([float(size) for size in loaded.side_info.shape]) <= MOST:
        decode(loaded.model, loaded.side_info)


GRID = {
    "Static": {"CompressFramwork": {"Ratio": 64, "Network": {"level_info": [[1.0, 2], [1.5, 3, "Sine", "aoi"]]}}},
    "Dynamic": {"PRODUCT": {"a": {"CompressFramwork": {"Ratio": 8}}, "b": {"CONCAT": {"c": [{"x": 1}, {"x": 2}]}}}},
}


def yaml_file(folder: Path, random: Random) -> Path:
    text = json.dumps(mutated_json(GRID if random.random() < 0.7 else GRID["Static"], random)).encode()
    (folder / "x.yaml").write_bytes(mutated(text, random) if random.random() < 0.2 else text)
    return folder / "x.yaml"


def read_options(path: Path) -> None:
    (expand_grid if b"Static" in path.read_bytes() else read_yaml)(path)


def codec_options(folder: Path, random: Random) -> Path:
    options = {"id": "tinc", "ratio": 32, "preset": "fast", "channel_axis": 0, "nan": "fill", "seed": 1}
    (folder / "x.json").write_text(json.dumps(mutated_json(options, random) | {"id": "tinc"}))
    return folder / "x.json"


def read_codec(path: Path) -> None:
    codec = get_codec(json.loads(path.read_text()))
    codec.decode(codec.encode(np.arange(60, dtype=np.uint8).reshape(3, 4, 5)))


CODE_READERS = [
    MutatedReader("tinc bytes", code_bytes, read_code),
    MutatedReader("tinc header", code_header, read_code),
    MutatedReader("tinc streams", code_streams, read_code),
    MutatedReader("tinc partial", code_bytes, read_start),
    MutatedReader("tinc partial streams", code_streams, read_start),
    MutatedReader("tinc chunk", chunk_bytes, read_chunk),
    MutatedReader("official folder", official_folder, read_official),
    MutatedReader("official options", yaml_file, read_options),
    MutatedReader("codec options", codec_options, read_codec, ((TypeError, "unexpected keyword"),)),
]
