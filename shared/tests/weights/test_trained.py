"""The record of a weights file: kept through a round trip, refused where it is newer or damaged, opened by its kind."""

import json
from types import SimpleNamespace

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from visionkernels import package as package_module
from visionkernels.checks import InputError
from visionkernels.package import Package, installed_packages
from visionkernels.testing.weights import count_reads
from visionkernels.weights import CheckpointError, Trained, load_strict, open_trained, read_checkpoint, save_weights

WEIGHTS = {"weight": torch.arange(6.0).reshape(2, 3)}
RECORD = Trained(
    kind="renderer",
    package="demo",
    model="line",
    options={"sizes": (3, 2)},
    inputs={"near": 0.5, "far": None},
    class_names=("a", "b"),
    data="rays",
    settings={"name": "small", "layers": ({"width": 1},)},
    details={"started_from": "x.pth"},
)


def build(name, **options):
    return nn.Linear(*options["sizes"], bias=False)


def open_renderer(checkpoint):
    model = build(checkpoint.trained.model, **checkpoint.trained.options)
    load_strict(model, checkpoint.state, source=checkpoint.path)
    return model.eval()


def upgrade(metadata, state):
    if "old_line" not in metadata:
        return None
    return Trained(kind="renderer", package="demo", model="line", options={"sizes": json.loads(metadata["old_line"])})


@pytest.fixture(autouse=True)
def demo(monkeypatch):
    """An installed package whose model is no image model at all."""
    package = Package(
        name="demo", distribution="demo", summary="", openers={"renderer": f"{__name__}:open_renderer"}, recipes=None,
        official=None, upgrade=f"{__name__}:upgrade",
    )  # fmt: skip
    point = SimpleNamespace(name="demo", load=lambda: package)
    monkeypatch.setattr(package_module, "entry_points", lambda group: [point])
    installed_packages.cache_clear()
    yield package
    installed_packages.cache_clear()


class TestRecord:
    def test_round_trip(self, tmp_path):
        RECORD.save(tmp_path / "w.safetensors", WEIGHTS)
        assert read_checkpoint(tmp_path / "w.safetensors").trained == RECORD

    def test_newer(self, tmp_path):
        self.store(tmp_path, version=2)
        with pytest.raises(
            CheckpointError, match=r"record of version 2; this release reads up to 1: run pip install -U"
        ):
            read_checkpoint(tmp_path / "w.safetensors")

    @pytest.mark.parametrize(
        "changes",
        [
            {"kind": None},
            {"options": 3},
            {"class_names": "abc"},
            {"update": "3"},
            {"version": "one"},
            {"version": None},
            {"strange": 1},
        ],
    )
    def test_damaged(self, tmp_path, changes):
        self.store(tmp_path, **changes)
        with pytest.raises(CheckpointError, match=r"w.safetensors has a damaged record of its model: "):
            read_checkpoint(tmp_path / "w.safetensors")

    @pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"version": 1}', "[" * 100_000])
    def test_no_record_at_all(self, tmp_path, text):
        save_weights(tmp_path / "w.safetensors", WEIGHTS, metadata={"trained": text})
        with pytest.raises(CheckpointError, match=r"w.safetensors has a damaged record"):
            read_checkpoint(tmp_path / "w.safetensors")

    @pytest.mark.parametrize("metadata", [{}, {"author": "somebody"}])
    def test_of_another_project(self, tmp_path, metadata):
        safetensors.torch.save_file(WEIGHTS, tmp_path / "w.safetensors", metadata=metadata)
        assert read_checkpoint(tmp_path / "w.safetensors").trained is None

    def test_details(self, tmp_path):
        record = RECORD.with_details(teacher=tmp_path / "t.pth", started_from=None)
        assert record.details == {"started_from": "x.pth", "teacher": str(tmp_path / "t.pth")}

    @staticmethod
    def store(folder, **changes):
        record = json.loads(RECORD.metadata()["trained"]) | changes
        save_weights(folder / "w.safetensors", WEIGHTS, metadata={"trained": json.dumps(record)})


class TestOpenTrained:
    def test_by_its_kind(self, tmp_path):
        RECORD.save(tmp_path / "w.safetensors", WEIGHTS)
        opened = open_trained(tmp_path / "w.safetensors")
        assert opened.trained == RECORD
        assert torch.equal(opened.model.weight, WEIGHTS["weight"]) and not opened.model.training

    def test_of_an_earlier_release(self, tmp_path):
        save_weights(tmp_path / "w.safetensors", WEIGHTS, metadata={"old_line": "[3, 2]"})
        opened = open_trained(tmp_path / "w.safetensors")
        assert (opened.trained.kind, opened.trained.options) == ("renderer", {"sizes": (3, 2)})

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"package": "absent"}, r"was written by the package 'absent', which is not installed here"),
            ({"kind": "navigator"}, r"holds the kind 'navigator', which this release of demo does not know"),
            ({"model": "os:getcwd"}, r"names os:getcwd, code that a file may not run; .*--model os:getcwd"),
        ],
    )
    def test_refused(self, tmp_path, changes, message):
        TestRecord.store(tmp_path, **changes)
        with pytest.raises(CheckpointError, match=message):
            open_trained(tmp_path / "w.safetensors")

    def test_code_that_the_user_names(self, tmp_path):
        TestRecord.store(tmp_path, model="os:getcwd")
        assert open_trained(tmp_path / "w.safetensors", model="os:getcwd").trained.model == "os:getcwd"

    def test_contradictions(self, tmp_path):
        TestRecord.store(tmp_path, options={"sizes": [3, 2], "num_classes": 2})
        with pytest.raises(InputError, match=r"holds the weights of line, not of --model curve"):
            open_trained(tmp_path / "w.safetensors", model="curve")
        with pytest.raises(InputError, match=r"holds a model of 2 classes, not of --num-classes 3"):
            open_trained(tmp_path / "w.safetensors", num_classes=3)


class TestBareStateDict:
    """Weights as timm's training script and `torch.save(model.state_dict())` leave them."""

    @pytest.mark.parametrize("prefix", ["", "module."])
    @pytest.mark.parametrize("wrapper", [None, "state_dict"])
    def test_classifier(self, tmp_path, demo, prefix, wrapper):
        model = timm.create_model("test_resnet", num_classes=5).eval()
        state = {f"{prefix}{key}": value for key, value in model.state_dict().items()}
        torch.save(state if wrapper is None else {wrapper: state, "epoch": 1}, tmp_path / "w.pth")
        opened = open_trained(tmp_path / "w.pth", package=demo, model="test_resnet")
        images = torch.randn(1, 3, 64, 64)
        torch.testing.assert_close(opened.model(images), model(images), rtol=0, atol=0)
        assert (opened.trained.kind, opened.trained.options) == ("classifier", {"num_classes": 5})

    def test_errors(self, tmp_path):
        torch.save(timm.create_model("test_resnet", num_classes=5).state_dict(), tmp_path / "w.pth")
        with pytest.raises(CheckpointError, match=r"does not name its model; give --model NAME \[--num-classes N\]"):
            open_trained(tmp_path / "w.pth")
        with pytest.raises(InputError, match=r"unknown model 'test_resne'; did you mean 'test_resnet'"):
            open_trained(tmp_path / "w.pth", model="test_resne")
        with pytest.raises(CheckpointError, match=r"w.pth does not fit"):
            open_trained(tmp_path / "w.pth", model="test_resnet", num_classes=4)
        with pytest.raises(CheckpointError, match=r"w.pth does not fit"):
            open_trained(tmp_path / "w.pth", model="torchvision:resnet18")
        with pytest.raises(FileNotFoundError):
            open_trained(tmp_path / "none.pth")


def test_a_file_is_read_once(tmp_path, demo, monkeypatch):
    """Whoever opens a file, of this release or an earlier one or bare, parses it once."""
    RECORD.save(tmp_path / "record.safetensors", WEIGHTS)
    save_weights(tmp_path / "earlier.safetensors", WEIGHTS, metadata={"old_line": "[3, 2]"})
    torch.save(timm.create_model("test_resnet", num_classes=5).state_dict(), tmp_path / "bare.pth")
    reads = count_reads(monkeypatch)
    open_trained(tmp_path / "record.safetensors")
    open_trained(tmp_path / "earlier.safetensors")
    open_trained(tmp_path / "bare.pth", model="test_resnet")
    assert reads == {"record.safetensors": 1, "earlier.safetensors": 1, "bare.pth": 1}
