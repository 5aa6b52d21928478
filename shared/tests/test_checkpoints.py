import argparse
import hashlib
import http.server
import os
import pathlib
import pickle
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from visionkernels.checkpoints import (
    CheckpointError,
    KeyRules,
    download,
    load_strict,
    read_state,
    save_weights,
)

STATE = {"fc.weight": torch.arange(6.0).reshape(2, 3), "fc.bias": torch.tensor([1.0, 2.0])}


def equal(left, right):
    torch.testing.assert_close(left, right, rtol=0, atol=0)
    return True


class RunsCode:
    def __init__(self, function, argument):
        self.call = (function, (argument,))

    def __reduce__(self):
        return self.call


class TestReadState:
    @pytest.mark.parametrize(
        ("content", "weights", "taken_from"),
        [
            (STATE, "auto", ""),
            ({"model": STATE, "model_ema": {}}, "auto", "model"),
            ({"model_ema": {"fc.bias": STATE["fc.bias"]}, "state_dict": STATE}, "auto", "state_dict"),
            ({"model": {"x": torch.zeros(1)}, "state_dict_ema": STATE}, "ema", "state_dict_ema"),
            ({"teacher": STATE, "epoch": 3}, "model", "teacher"),
            ({"model": {f"module._orig_mod.{key}": value for key, value in STATE.items()}}, "auto", "model"),
        ],
        ids=["bare", "model", "before-ema", "ema", "teacher", "wrapped"],
    )
    def test_finds_the_weights(self, tmp_path, content, weights, taken_from):
        torch.save(content, tmp_path / "w.pth")
        checkpoint = read_state(tmp_path / "w.pth", weights=weights)
        assert checkpoint.taken_from == taken_from
        assert equal(checkpoint.state, STATE)

    def test_averaged_weights_are_never_taken_silently(self, tmp_path, caplog):
        torch.save({"model_ema": STATE}, tmp_path / "w.pth")
        assert read_state(tmp_path / "w.pth").taken_from == "model_ema"
        assert "only averaged weights" in caplog.text
        with pytest.raises(CheckpointError, match="no model weights; it holds model_ema"):
            read_state(tmp_path / "w.pth", weights="model")

    @pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
    def test_old_training_checkpoint(self, tmp_path, zipped):
        extras = {
            "args": argparse.Namespace(lr=1e-3, output_dir=pathlib.PosixPath("out"), betas=[0.9, 0.999]),
            "max_accuracy": np.float64(81.4),
            "history": np.arange(3),
            "epoch": 299,
        }
        torch.save({"model": STATE, **extras}, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
        checkpoint = read_state(tmp_path / "w.pth")
        assert equal(checkpoint.state, STATE)
        assert checkpoint.metadata == {"max_accuracy": "81.4", "epoch": "299"}

    @pytest.mark.parametrize(
        ("attack", "name"),
        [(RunsCode(os.mkdir, "owned"), r"\w+\.mkdir"), (RunsCode(exec, "open('owned', 'w')"), r"\S*exec")],
        ids=["blocked-module", "unknown-global"],
    )
    def test_never_runs_code(self, tmp_path, monkeypatch, attack, name):
        monkeypatch.chdir(tmp_path)
        torch.save({"model": STATE, "args": attack}, "w.pth")
        with pytest.raises(CheckpointError, match=rf"w\.pth needs the Python object {name} to load"):
            read_state("w.pth")
        assert not pathlib.Path("owned").exists()

    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    def test_truncated(self, tmp_path, suffix):
        whole = tmp_path / f"whole{suffix}"
        if suffix == ".pth":
            torch.save({"model": STATE}, whole)
        else:
            save_weights(whole, STATE, metadata={})
        content = whole.read_bytes()
        for length in {0, 1, 8, 9, 20, len(content) // 2, len(content) - 1}:
            (tmp_path / "cut").write_bytes(content[:length])
            with pytest.raises(CheckpointError, match="cut is damaged"):
                read_state(tmp_path / "cut")

    @pytest.mark.filterwarnings("ignore:Detected pickle protocol")
    @pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
    def test_damaged_anywhere(self, tmp_path, zipped):
        torch.save({"model": STATE}, tmp_path / "whole.pth", _use_new_zipfile_serialization=zipped)
        content = (tmp_path / "whole.pth").read_bytes()
        generator = np.random.default_rng(0)
        for place in generator.integers(len(content), size=100):
            damaged = bytearray(content)
            damaged[place] ^= 1 << int(generator.integers(8))
            (tmp_path / "w.pth").write_bytes(damaged)
            try:
                assert read_state(tmp_path / "w.pth").state.keys()  # a flipped bit of a weight or of padding
            except CheckpointError as error:
                assert "w.pth" in str(error)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ([1, 2], "holds a list"),
            ({"model": {}}, "holds nothing where weights were expected, in model"),
            ({"epoch": 3}, r"non-tensor entries \(first: epoch\)"),
            ({"model": {"a": 1}}, "first: a"),
            ({"model": {0: torch.zeros(1)}}, "first: 0"),
        ],
        ids=["list", "empty", "no-weights", "number", "number-as-key"],
    )
    def test_not_a_checkpoint(self, tmp_path, content, message):
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(CheckpointError, match=message):
            read_state(tmp_path / "w.pth")

    def test_errors(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"none\.pth"):
            read_state(tmp_path / "none.pth")
        (tmp_path / "text.pth").write_text("hello, this is no checkpoint")
        with pytest.raises(CheckpointError, match=r"text\.pth is damaged"):
            read_state(tmp_path / "text.pth")
        (tmp_path / "pickle.pth").write_bytes(pickle.dumps({"a": 1}, protocol=2))
        with pytest.raises(CheckpointError, match=r"pickle\.pth"):
            read_state(tmp_path / "pickle.pth")
        torch.save(STATE, tmp_path / "w.pth")
        with pytest.raises(ValueError, match="weights='best' must be"):
            read_state(tmp_path / "w.pth", weights="best")
        with pytest.raises(CheckpointError, match="no ema weights; it holds a bare state dict"):
            read_state(tmp_path / "w.pth", weights="ema")


RULES = KeyRules(
    {
        "stages.3.{j}.attn.qkv.{p}": "stages.3.blocks.{j}.attn.qkv.{p}",
        "stages.{i}.{j}.attn.qkv.qkv.{p}": "stages.{i}.blocks.{j}.attn.qkv.{p}",
        "stages.{i}.{j}.pos.{p}": "stages.{i}.blocks.{j}.position.{p}",
        "backbone.{rest*}": "body.{rest*}",
    },
    transforms={"stages.{i}.{j}.pos.{p}": (lambda tensor: tensor.T, lambda tensor: tensor.T)},
    ignored={"{any*}.attn_mask": "rebuilt from the size"},
)


class TestKeyRules:
    def test_rename(self):
        names = {
            "stages.0.11.attn.qkv.qkv.bias": "stages.0.blocks.11.attn.qkv.bias",
            "stages.3.1.attn.qkv.weight": "stages.3.blocks.1.attn.qkv.weight",
            "backbone.stem.0.weight": "body.stem.0.weight",
        }
        state = {key: torch.tensor(float(index)) for index, key in enumerate(names)}
        renamed = RULES.rename({**state, "a.b.attn_mask": torch.zeros(1)})
        assert renamed == {names[key]: value for key, value in state.items()}

    @given(st.integers(0, 2), st.integers(0, 40), st.sampled_from(["weight", "bias"]))
    def test_round_trip(self, stage, block, kind):
        state = {f"stages.{stage}.{block}.pos.{kind}": STATE["fc.weight"], "backbone.x": STATE["fc.bias"]}
        renamed = RULES.rename(state)
        assert renamed[f"stages.{stage}.blocks.{block}.position.{kind}"].shape == (3, 2)
        assert equal(RULES.inverse().rename(renamed), state)

    def test_unmapped(self):
        with pytest.raises(CheckpointError, match=r"7 keys are in no rule \(first: k0, k1, k2, k3, k4\)"):
            RULES.rename({f"k{index}": torch.zeros(1) for index in range(7)})

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            ({"a.{x}": "b.{y}"}, "same placeholders"),
            ({"a.{x}": "b"}, "same placeholders"),
            ({"a.{x}": "c.{x}", "b.{x}": "c.{x}"}, "both match"),
            ({"a.{x}": "c.{x}", "a.one": "d.one"}, "both match"),
            ({"a.{x}": "n.{x}.w", "b.{x}": "n.z.{x}"}, "both match"),
            ({"{x*}": "{x*}", "a.{y}": "b.{y}"}, "both match"),
        ],
        ids=["names", "lost", "same-target", "general-first", "crossing-targets", "catch-all-first"],
    )
    def test_ambiguous(self, names, message):
        with pytest.raises(ValueError, match=message):
            KeyRules(names)

    def test_special_before_general(self):
        rules = KeyRules({"a.{y}": "b.{y}", "{x*}": "new.{x*}"})
        assert list(rules.rename({"a.w": torch.zeros(1), "c.d.w": torch.zeros(1)})) == ["b.w", "new.c.d.w"]

    def test_parts_of_a_component(self):
        rules = KeyRules({"layer{i}.w": "layers.{i}.w", "conv{i}.w": "convs.{i}.w"})
        assert list(rules.rename({"layer12.w": torch.zeros(1)})) == ["layers.12.w"]

    def test_errors(self):
        with pytest.raises(ValueError, match="left side of no rule"):
            KeyRules({"a": "b"}, transforms={"c": (torch.neg, torch.neg)})


class TestLoadStrict:
    @staticmethod
    def model(width=3, classes=2):
        return nn.Sequential(nn.Linear(width, width), nn.Linear(width, classes))

    def test_loads(self):
        source, target = self.model(), self.model()
        load_strict(target, source.state_dict(), source="w.pth")
        assert equal(target.state_dict(), source.state_dict())

    def test_names_what_differs(self):
        state = self.model(width=4).state_dict()
        state["extra"] = state.pop("0.bias")
        candidates = {"wide": lambda: {key: tuple(value.shape) for key, value in state.items()}, "no": dict}
        with pytest.raises(
            CheckpointError,
            match=r"w\.pth does not fit Sequential: 1 keys missing \(first: 0\.bias\), "
            r"1 keys unexpected \(first: extra\), "
            r"2 keys misshapen \(first: 0\.weight \[4, 4\] instead of \[3, 3\], .*; it fits wide",
        ):
            load_strict(self.model(), state, source="w.pth", candidates=candidates)

    def test_candidates_are_lazy(self):
        load_strict(self.model(), self.model().state_dict(), source="", candidates={"a": lambda: pytest.fail("built")})

    def test_other_classes(self):
        target, state = self.model(classes=7), self.model(classes=2).state_dict()
        with pytest.raises(CheckpointError, match=r"'1' has 2 classes, the model 7; .*keep=\['1'\]"):
            load_strict(target, state, source="w.pth")
        before = target[1].weight.clone()
        load_strict(target, state, source="w.pth", keep=["1"])
        assert equal(target[0].weight.detach(), state["0.weight"])
        assert equal(target[1].weight, before)


class TestSaveWeights:
    def test_round_trip(self, tmp_path):
        shared = torch.arange(6.0).reshape(2, 3)
        state = {"a": shared, "tied": shared, "view": shared.T}
        save_weights(tmp_path / "w.safetensors", state, metadata={"model": "tiny"})
        checkpoint = read_state(tmp_path / "w.safetensors")
        assert equal(checkpoint.state, state)
        assert checkpoint.metadata == {"format": "pt", "model": "tiny"}

    def test_errors(self, tmp_path):
        save_weights(tmp_path / "w.safetensors", STATE, metadata={})
        with pytest.raises(FileExistsError, match="--overwrite"):
            save_weights(tmp_path / "w.safetensors", STATE, metadata={})
        save_weights(tmp_path / "w.safetensors", {"a": torch.ones(1)}, metadata={}, overwrite=True)
        assert list(read_state(tmp_path / "w.safetensors").state) == ["a"]


CONTENT = bytes(range(256)) * 400
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.BaseHTTPRequestHandler):
    """Sends CONTENT, stops after `cut` bytes, honours ranges if asked to, notes what was asked."""

    cut: int | None = None
    ranges = True
    asked: list

    def do_GET(self):
        start = 0
        self.asked.append(self.headers.get("Range"))
        if self.headers.get("Range") and self.ranges:
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
            self.send_response(206 if start < len(CONTENT) else 416)
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        self.wfile.write(CONTENT[start : self.cut])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    handler = type("Handler", (Server,), {"asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        handler.url = f"http://127.0.0.1:{running.server_port}/files/w.pth?download=1"
        yield handler
        running.shutdown()
        thread.join()


class TestDownload:
    def test_fetches_once(self, server, tmp_path):
        path = download(server.url, sha256=SHA256, cache=tmp_path)
        assert path == tmp_path / "w.pth"
        assert path.read_bytes() == CONTENT
        assert download(server.url, sha256=SHA256, cache=tmp_path) == path
        assert len(server.asked) == 1

    @pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no-ranges"])
    def test_goes_on_after_a_cut(self, server, tmp_path, ranges):
        server.cut, server.ranges = 70_000, ranges
        with pytest.raises(OSError, match="broke off at 70000 of 102400 bytes; run again"):
            download(server.url, sha256=SHA256, cache=tmp_path)
        server.cut = None
        assert download(server.url, sha256=SHA256, cache=tmp_path).read_bytes() == CONTENT
        assert server.asked == [None, "bytes=70000-"]
        assert len(list(tmp_path.iterdir())) == 1

    def test_wrong_hash(self, server, tmp_path):
        with pytest.raises(CheckpointError, match="it was removed"):
            download(server.url, sha256="0" * 64, cache=tmp_path)
        assert not list(tmp_path.iterdir())

    def test_errors(self, tmp_path):
        with pytest.raises(ValueError, match="with its sha256"):
            download("https://example.org/w.pth", cache=tmp_path)
        with pytest.raises(ValueError, match="source='ftp://x' must be"):
            download("ftp://x", sha256=SHA256)
