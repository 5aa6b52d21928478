"""Official folders: writing and reading, unusual and damaged folders, and files of the same weights."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tinc.official import decode, load_official, normalise, open_official, plan_tree, save_official
from tinc.official.folder import official_state
from tinc.official.model import OctreeMLP
from tinc.official.volume import SideInfo
from tinc.recipes import RECIPES, Level, OfficialRecipe
from visionkernels.weights import CheckpointError, read_checkpoint

GOLDEN = Path(__file__).parent / "golden"
LAYOUTS = json.loads((GOLDEN / "state_layout.json").read_text())
CASES = json.loads((GOLDEN / "index.json").read_text())["cases"]
RECIPE = replace(RECIPES["default"], ratio=0.2, w0=20.0, normal_max=1.0)


@pytest.fixture(scope="module")
def volume() -> np.ndarray:
    return (np.random.default_rng(0).gamma(0.5, size=(8, 8, 12)) * 1000).astype(np.uint16)


@pytest.fixture(scope="module")
def tree(volume: np.ndarray) -> tuple[OctreeMLP, SideInfo]:
    values, side = normalise(volume, scale_max=1.0)
    return OctreeMLP(plan_tree(RECIPE, values, 2 * volume.nbytes), seed=3), side


@pytest.fixture(scope="module")
def saved(tree: tuple[OctreeMLP, SideInfo], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "models"
    save_official(folder, tree[0], RECIPE, side_info=tree[1])
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "models"))


class TestRoundTrip:
    def test_folder(self, folder: Path, tree: tuple[OctreeMLP, SideInfo]) -> None:
        model, side = tree
        loaded = open_official(folder)
        assert loaded.side_info == side
        assert asdict(loaded.recipe) == asdict(replace(RECIPE, name="models"))
        assert np.array_equal(decode(loaded.model, side), decode(model, side))
        assert all(torch.equal(*pair) for pair in zip(loaded.model.parameters(), model.parameters(), strict=True))
        assert np.array_equal(decode(open_official(folder.parent).model, side), decode(model, side))

    def test_layout(self, folder: Path, tree: tuple[OctreeMLP, SideInfo]) -> None:
        model, side = tree
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        assert set(files) == {*official_state(model), "opt.yaml", "side_info.json"}
        assert np.array_equal(
            np.fromfile(files["2-1-2-3/0-W"], "<f4"), dict(model.node_parameters())["2-1-2-3/0-W"].detach().flatten()
        )
        size = save_official(folder.parent / "again", model, RECIPE, side_info=side)
        assert size == sum(path.stat().st_size for path in files.values())

    def test_side_info(self, folder: Path, volume: np.ndarray, tree: tuple[OctreeMLP, SideInfo]) -> None:
        (folder / "side_info.json").unlink()
        with pytest.raises(ValueError, match="give the original volume or side_info"):
            open_official(folder)
        assert open_official(folder, volume).side_info == tree[1]
        assert open_official(folder, side_info=tree[1]).side_info == tree[1]
        np.save(folder.parent / "volume.npy", volume)
        assert open_official(folder, folder.parent / "volume.npy").side_info == tree[1]
        with pytest.raises(ValueError, match="side_info has 3 channels"):
            open_official(folder, side_info=replace(tree[1], shape=(8, 8, 12, 3)))
        with pytest.raises(ValueError, match="width=6 is not divisible"):
            open_official(folder, volume[..., :6])

    def test_official_options(self, folder: Path) -> None:
        """Options of the official code have block style, a device, and a misspelt allocation."""
        pytest.importorskip("yaml", reason="pyyaml is not installed")
        (folder / "opt.yaml").write_text(
            "Path: /home/somebody/data.tif\nRatio: 64\nTrain:\n  device: cuda\n  batch_size: 5000\n"
            "Network:\n  input: 3\n  output: 1\n  w0: 20\n  level_info:\n"
            "  - [1.0, 2, Sine, euqal]\n  - [0.8, 2, Sine, euqal]\n  - [1.5, 3, Sine, aoi]\n"
            "Preprocess: {normal_min: 0, normal_max: 1}\n"
        )
        assert open_official(folder).recipe.batch_size == 5000

    def test_overwrite(self, folder: Path, tree: tuple[OctreeMLP, SideInfo]) -> None:
        with pytest.raises(FileExistsError, match="--overwrite"):
            save_official(folder, tree[0], RECIPE)
        (folder / "stale").write_text("")
        save_official(folder, tree[0], RECIPE, overwrite=True)
        assert not (folder / "stale").exists()
        assert [path.name for path in folder.parent.iterdir()] == ["models"]


class TestErrors:
    def test_missing(self, folder: Path) -> None:
        (folder / "2-0-0-1" / "1-B").unlink()
        shutil.rmtree(folder / "2-3-3-3")
        with pytest.raises(
            CheckpointError, match=r"7 weights missing \(first: 2-0-0-1/1-B, 2-3-3-3/0-B.*default and mul"
        ):
            open_official(folder)

    def test_unexpected(self, folder: Path) -> None:
        (folder / "2-0-0-0" / "3-W").write_bytes(bytes(4))
        (folder / "notes").mkdir()
        (folder / "notes" / "a.txt").write_text("hello")
        with pytest.raises(CheckpointError, match=r"2 weights unexpected \(first: 2-0-0-0/3-W, notes/a.txt\)"):
            open_official(folder)

    def test_misshapen(self, folder: Path) -> None:
        path = folder / "1-0-0-1" / "1-W"
        path.write_bytes(path.read_bytes()[:-4])
        with pytest.raises(CheckpointError, match=r"1 weights misshapen \(first: 1-0-0-1/1-W of"):
            open_official(folder)
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(CheckpointError, match="not a whole number of float32"):
            open_official(folder)

    def test_empty_file(self, folder: Path) -> None:
        for name in ("0-B", "0-W", "1-W"):
            (folder / "2-0-0-0" / name).write_bytes(b"")
        with pytest.raises(CheckpointError, match="misshapen"):
            open_official(folder)

    def test_no_nodes(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="contains no weights of nodes"):
            open_official(tmp_path)
        with pytest.raises(FileNotFoundError, match="none is not a file"):
            open_official(tmp_path / "none")
        for name in ("9-0-0-0",):
            (tmp_path / name).mkdir()
            (tmp_path / name / "0-W").write_bytes(bytes(12))
        with pytest.raises(CheckpointError, match="a tree of 10 levels; at most 7 are read"):
            open_official(tmp_path)

    def test_claims_much(self, tmp_path: Path) -> None:
        """A sparse file of a terabyte is refused before it is read."""
        (tmp_path / "0-0-0-0").mkdir()
        with (tmp_path / "0-0-0-0" / "0-W").open("wb") as file:
            file.truncate(1 << 40)
        with pytest.raises(CheckpointError, match="at most"):
            open_official(tmp_path)

    def test_options(self, folder: Path) -> None:
        with pytest.raises(CheckpointError, match=r"which have 2, 3 layers a level; it seems to hold 3 levels of 2, 2"):
            open_official(folder, recipe=RECIPES["multi1"])
        (folder / "side_info.json").write_text('{"shape": [8, 8, 12, 1], "dtype": "uint16"}')
        with pytest.raises(CheckpointError, match=r"side_info\.json is damaged"):
            open_official(folder)
        (folder / "opt.yaml").write_bytes(b"\xff\xfe")
        with pytest.raises(CheckpointError, match="is not a text file"):
            open_official(folder)
        (folder / "opt.yaml").write_text("3")
        with pytest.raises(CheckpointError, match="holds a int"):
            open_official(folder)


def layout_state(name: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(shape, generator=generator) for key, shape in LAYOUTS[name].items()}


def volume_shape(name: str) -> tuple[int, int, int, int]:
    volume = CASES[name]["volume"]
    # the shape of test.tif, which the cases do not contain
    return (8, 128, 128, 1) if isinstance(volume, str) else tuple(volume["shape"])


class TestStateFile:
    @pytest.mark.parametrize("name", LAYOUTS)
    @pytest.mark.parametrize("suffix", ["safetensors", "pth"])
    def test_layouts(self, tmp_path: Path, name: str, suffix: str) -> None:
        state, path = layout_state(name), tmp_path / f"weights.{suffix}"
        if suffix == "pth":
            torch.save({"state_dict": state, "epoch": 3}, path)
        else:
            save_file(state, path)
        side = SideInfo(shape=volume_shape(name), dtype="uint16", data_min=0.0, data_max=9.0)
        loaded = open_official(path, side_info=side)
        model = load_official(read_checkpoint(path), side_info=side)
        assert not model.training and official_state(model).keys() == state.keys()
        ours = dict(loaded.model.node_parameters())
        assert list(ours) == list(LAYOUTS[name])
        assert all(torch.equal(ours[key], value) for key, value in state.items())
        assert decode(loaded.model, side).shape == volume_shape(name)

    def test_activations(self, tmp_path: Path) -> None:
        path = tmp_path / "weights.safetensors"
        save_file(layout_state("tree_relu_2ch"), path)
        side = SideInfo(shape=(4, 8, 8, 2), dtype="uint16", data_min=0.0, data_max=9.0)
        levels = (Level(1.0, 1, "ReLU"), Level(1.5, 2, "LeakyReLU0.2"))
        loaded = open_official(path, side_info=side, recipe=OfficialRecipe(name="relu", levels=levels))
        assert loaded.model.plan.activations == ("ReLU", "LeakyReLU0.2") and loaded.recipe.output == 2

    def test_errors(self, tmp_path: Path) -> None:
        state, path = layout_state("tree_var_2lv"), tmp_path / "weights.safetensors"
        state["1-0-0-1/0-W"] = state["1-0-0-1/0-W"].T.contiguous()
        state["head.weight"] = torch.zeros(2)
        save_file(state, path)
        with pytest.raises(CheckpointError, match=r"unexpected \(first: head.weight\), 1 weights misshapen .*\[4, 9\]"):
            open_official(path)
