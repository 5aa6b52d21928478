import argparse
import collections
import functools
import io
import os
import pathlib
import pickle
import subprocess
import sys
import tracemalloc
import types

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from visionkernels.weights import (
    CheckpointError,
    KeyRules,
    _array_pickles,
    _stand_ins,
    load_strict,
    read_checkpoint,
    save_weights,
)

STATE = {"fc.weight": torch.arange(6.0).reshape(2, 3), "fc.bias": torch.tensor([1.0, 2.0])}


def equal(left, right):
    torch.testing.assert_close(left, right, rtol=0, atol=0)
    return True


class Calls:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


class ByName:
    """Is pickled as the global of that name, which need not exist here."""

    def __init__(self, module, name):
        self.place = (module, name)

    def __call__(self):
        pytest.fail("it only looks like a function")

    @staticmethod
    def dump(pickler, value):
        pickler.write(b"c" + "\n".join([*value.place, ""]).encode())


class NamingPickler(pickle._Pickler):
    """The pickler that torch.save is given to write ByName objects, alone or as what a Calls calls."""

    dispatch = {**pickle._Pickler.dispatch, ByName: ByName.dump}  # noqa: RUF012


NAMING = types.ModuleType("naming")
NAMING.Pickler = NamingPickler


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
        checkpoint = read_checkpoint(tmp_path / "w.pth", weights=weights)
        assert checkpoint.taken_from == taken_from
        assert equal(checkpoint.state, STATE)

    def test_averaged_weights_are_never_taken_silently(self, tmp_path, caplog):
        torch.save({"model_ema": STATE}, tmp_path / "w.pth")
        assert read_checkpoint(tmp_path / "w.pth").taken_from == "model_ema"
        assert "only averaged weights" in caplog.text
        with pytest.raises(CheckpointError, match="no model weights; it holds model_ema"):
            read_checkpoint(tmp_path / "w.pth", weights="model")

    def test_several_sets_of_weights_are_told(self, tmp_path, caplog):
        other = {"0.weight": torch.ones(1)}
        torch.save({"student": STATE, "teacher": other, "model_ema": other, "optimizer": {"state": {}}}, tmp_path / "w")
        assert read_checkpoint(tmp_path / "w").taken_from == "student"
        assert caplog.messages == [f"{tmp_path / 'w'} holds several sets of weights; took student, left teacher"]
        torch.save({"model": STATE, "last_shuffle_up": other}, tmp_path / "w")
        assert read_checkpoint(tmp_path / "w").taken_from == "model"
        assert "took model, left last_shuffle_up" in caplog.messages[1]
        assert equal(read_checkpoint(tmp_path / "w", entry="last_shuffle_up").state, other)
        assert len(caplog.messages) == 2

    def test_entry(self, tmp_path):
        parts = {"vln_bert": {"epoch": 3, "state_dict": STATE}, "critic": {"state_dict": {"module.a": torch.ones(1)}}}
        torch.save(parts, tmp_path / "w")
        for message in (
            r"first: vln_bert, critic\).*; entries with weights: vln_bert\.state_dict, critic\.state_dict",
            r"no entry 'critics'; entries with weights: vln_bert\.state_dict, critic\.state_dict",
        ):
            with pytest.raises(CheckpointError, match=message):
                read_checkpoint(tmp_path / "w", entry="critics" if "critics" in message else None)
        checkpoint = read_checkpoint(tmp_path / "w", entry="vln_bert.state_dict")
        assert equal(checkpoint.state, STATE)
        assert checkpoint.taken_from == "vln_bert.state_dict"
        assert list(read_checkpoint(tmp_path / "w", entry="critic.state_dict").state) == ["a"]

    @pytest.mark.parametrize("entry", ["", "model"])
    def test_versions_of_modules_are_no_weights(self, tmp_path, entry):
        state = {**STATE, "_metadata": collections.OrderedDict({"": {"version": 1}})}
        torch.save({entry: state} if entry else state, tmp_path / "w")
        assert equal(read_checkpoint(tmp_path / "w").state, STATE)

    def test_lightning(self, tmp_path):
        # as omegaconf's configurations are pickled
        config = Calls(ByName("omegaconf.dictconfig", "DictConfig"), None)
        cache = collections.defaultdict(dict, {"a": {}})
        kept = {"cfg": config, "cache": cache, "type": ByName("typing", "Any"), "of": dict}
        torch.save({"state_dict": STATE, "hyper_parameters": kept}, tmp_path / "w", pickle_module=NAMING)
        assert equal(read_checkpoint(tmp_path / "w").state, STATE)

    @pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
    @pytest.mark.parametrize("name", ["PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"])
    def test_paths_of_every_python(self, tmp_path, module, name):
        torch.save({"model": STATE, "a": Calls(ByName(module, name), "out")}, tmp_path / "w", pickle_module=NAMING)
        assert equal(read_checkpoint(tmp_path / "w").state, STATE)

    @pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
    def test_old_training_checkpoint(self, tmp_path, zipped):
        extras = {
            "args": argparse.Namespace(lr=1e-3, output_dir=pathlib.PosixPath("out"), betas=[0.9, 0.999]),
            "max_accuracy": np.float64(81.4),
            "history": np.arange(3),
            "name": np.str_("x"),
            "epoch": 299,
            "rounds": np.array([7], ">i4")[0],
        }
        torch.save({"model": STATE, **extras}, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
        checkpoint = read_checkpoint(tmp_path / "w.pth")
        assert equal(checkpoint.state, STATE)
        assert checkpoint.metadata == {"max_accuracy": "81.4", "epoch": "299", "rounds": "7"}

    @pytest.mark.parametrize(
        ("attack", "name"),
        [(Calls(os.mkdir, "owned"), r"\w+\.mkdir"), (Calls(exec, "open('owned', 'w')"), r"\S*exec")],
        ids=["blocked-module", "unknown-global"],
    )
    def test_never_runs_code(self, tmp_path, monkeypatch, attack, name):
        monkeypatch.chdir(tmp_path)
        torch.save({"model": STATE, "args": attack}, "w.pth")
        with pytest.raises(CheckpointError, match=rf"w\.pth needs the Python object {name} to load"):
            read_checkpoint("w.pth")
        assert not pathlib.Path("owned").exists()

    def test_never_follows_pointers(self, tmp_path):
        array, dtype = ByName("numpy", "ndarray"), Calls(ByName("numpy", "dtype"), "O8")
        forged = Calls(array, (2,), dtype, b"A" * 16)
        torch.save({"model": STATE, "args": Calls(array, forged)}, tmp_path / "w", pickle_module=NAMING)
        # what an array of objects does with such addresses ends the process
        code = (
            "import sys; from visionkernels.weights import read_checkpoint; print(*read_checkpoint(sys.argv[1]).state)"
        )
        ran = subprocess.run([sys.executable, "-c", code, tmp_path / "w"], capture_output=True, text=True)
        assert ran.stdout.split() == list(STATE), (ran.returncode, ran.stderr)

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
                read_checkpoint(tmp_path / "cut")

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
                assert read_checkpoint(tmp_path / "w.pth").state.keys()  # a flipped bit of a weight or of padding
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
            read_checkpoint(tmp_path / "w.pth")

    def test_errors(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"none\.pth"):
            read_checkpoint(tmp_path / "none.pth")
        (tmp_path / "text.pth").write_text("hello, this is no checkpoint")
        with pytest.raises(CheckpointError, match=r"text\.pth is damaged"):
            read_checkpoint(tmp_path / "text.pth")
        (tmp_path / "pickle.pth").write_bytes(pickle.dumps({"a": 1}, protocol=2))
        with pytest.raises(CheckpointError, match=r"pickle\.pth"):
            read_checkpoint(tmp_path / "pickle.pth")
        torch.save(STATE, tmp_path / "w.pth")
        with pytest.raises(ValueError, match="weights='best' must be"):
            read_checkpoint(tmp_path / "w.pth", weights="best")
        with pytest.raises(CheckpointError, match="no ema weights; it holds a bare state dict"):
            read_checkpoint(tmp_path / "w.pth", weights="ema")


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


class TestArrays:
    """Plain pickles of numpy's arrays, as detectron2's model zoo has them."""

    def write(self, path, content, **options):
        path.write_bytes(pickle.dumps(content, **options))
        return path

    @pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
    def test_reads(self, tmp_path, protocol):
        generator = np.random.default_rng(0)
        arrays = {
            "rows": generator.random((2, 3), dtype=np.float32),
            "columns": np.asfortranarray(generator.random((3, 4))),
            "swapped": generator.random(5).astype(">f4"),
            "count": np.array(3),
            "none": np.zeros((0, 4), np.float16),
            "flags": np.array([True, False]),
        }
        content = {"model": collections.OrderedDict(arrays), "__author__": "third party", "iteration": 7}
        checkpoint = read_checkpoint(self.write(tmp_path / "w.pkl", content, protocol=protocol))
        expected = {key: torch.tensor(each.astype(each.dtype.newbyteorder("="))) for key, each in arrays.items()}
        assert equal(checkpoint.state, expected)
        assert (checkpoint.taken_from, checkpoint.metadata["iteration"]) == ("model", "7")

    def test_python_2(self, tmp_path):
        """Bytes were text there."""
        array = np.array([1.5, -200.0], np.float32)
        text = array.tobytes().decode("latin1")

        class Old:
            def __reduce__(self):
                made = (ByName("numpy", "ndarray"), (0,), "b")
                state = (1, (2,), Calls(ByName("numpy", "dtype"), "f4"), False, text)
                return ByName("numpy.core.multiarray", "_reconstruct"), made, state

        content = io.BytesIO()
        NamingPickler(content, 2).dump({"w": Old()})
        (tmp_path / "w.pkl").write_bytes(content.getvalue())
        assert equal(read_checkpoint(tmp_path / "w.pkl").state, {"w": torch.from_numpy(array)})

    @pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
    def test_never_runs_code(self, tmp_path, monkeypatch, protocol):
        monkeypatch.chdir(tmp_path)
        for attack in (Calls(os.mkdir, "owned"), {"model": {"w": Calls(exec, "open('owned', 'w')")}}):
            with pytest.raises(CheckpointError, match=r"w\.pkl needs the Python object \S+ to load"):
                read_checkpoint(self.write(tmp_path / "w.pkl", attack, protocol=protocol))
        assert not pathlib.Path("owned").exists()

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"w": np.array(["a"])}, "non-tensor entries"),
            ({"w": np.ones(2, [("x", "f4")])}, "non-tensor entries"),
            ({"w": np.ma.ones(2)}, r"needs the Python object numpy\.ma\.core"),
            ({"w": np.array([None])}, "non-tensor entries"),
            ([np.ones(2)], "holds a list"),
            (7, "holds a int"),
        ],
        ids=["text", "records", "masked", "objects", "list", "number"],
    )
    def test_not_numbers(self, tmp_path, content, message):
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(self.write(tmp_path / "w.pkl", content))

    @pytest.mark.parametrize(
        "content",
        [
            # an object that is given the hundred millionth place
            b"\x80\x02}r" + (10**8).to_bytes(4, "little") + b".",
            # attributes of functions that stand for others
            b"\x80\x02c_codecs\nencode\n}X\x04\x00\x00\x00evilK\x01sb.",
            b"\x80\x02cnumpy.core.multiarray\nscalar\nN}X\x0c\x00\x00\x00__defaults__)s\x86b.",
            # keys whose hash overflows the stack
            b"\x80\x02}" + b")" + b"\x85" * 1_000_000 + b"K\x01s.",
            pickle.dumps({"w": 10**5000}),
            pickle.dumps({10**5000: np.ones(2)}),
            # 2^30 dictionaries, were they copied
            pickle.dumps(functools.reduce(lambda inner, _: {"a": inner, "b": inner}, range(30), {})),
            # a text that doubles where it is written out
            b"\x80\x02]X\x02\x00\x00\x00f4a" + b"]q\x00h\x00ah\x00a" * 40 + b".",
        ],
        ids=["memo", "function", "defaults", "deep-key", "number", "key", "shared", "lists"],
    )
    def test_attacks(self, tmp_path, content):
        """None costs memory or time, or changes what this process has."""
        (tmp_path / "w.pkl").write_bytes(content)
        tracemalloc.start()
        with pytest.raises(CheckpointError):
            read_checkpoint(tmp_path / "w.pkl")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 100 * len(content) + 10_000_000
        assert not _array_pickles._encode.__dict__ and _stand_ins._scalar.__defaults__ == (b"",)

    def test_one_datum_for_many_arrays(self, tmp_path):
        """A small file that asks for gigabytes."""
        datum = b"\x8e" + (80_000).to_bytes(8, "little") + bytes(80_000) + b"\x94"
        made = b"cnumpy._core.numeric\n_frombuffer\n(h\x00cnumpy\ndtype\nU\x02f8\x85RJ" + (10_000).to_bytes(4, "little")
        arrays = b"".join(b"U\x02%02d" % i + made + b"\x85U\x01CtR" for i in range(50))
        (tmp_path / "many.pkl").write_bytes(b"\x80\x04" + datum + b"0}(" + arrays + b"u.")
        with pytest.raises(CheckpointError, match=r"many\.pkl is damaged: its arrays are larger than the file"):
            read_checkpoint(tmp_path / "many.pkl")

    def test_damaged_anywhere(self, tmp_path):
        content = pickle.dumps({"model": {"w": np.arange(6.0)}, "iteration": 3})
        generator = np.random.default_rng(0)
        for place in (*generator.integers(len(content), size=200), None):
            damaged = bytearray(content if place is not None else content[:40])
            if place is not None:
                damaged[place] ^= 1 << int(generator.integers(8))
            (tmp_path / "w.pkl").write_bytes(damaged)
            try:
                assert read_checkpoint(tmp_path / "w.pkl").state.keys()  # a flipped bit of a number
            except CheckpointError as error:
                assert "w.pkl" in str(error)


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
            ({"a.{x}": "c.{x}", "b.{x}": "c.{x}"}, "never reached"),
            ({"a.{x}": "c.{x}", "a.one": "d.one"}, "never reached"),
            ({"{x*}": "{x*}", "a.{y}": "b.{y}"}, "never reached"),
            ({"{0}.w": "{0}.w"}, r"placeholders of '\{0\}\.w' must be different names"),
            ({"{x}.{x}": "{x}.{x}"}, "must be different names"),
        ],
        ids=["names", "lost", "same-target", "general", "catch-all", "number", "twice"],
    )
    def test_ambiguous(self, names, message):
        with pytest.raises(ValueError, match=message):
            KeyRules(names)

    @pytest.mark.parametrize(
        ("names", "key"),
        [({"a.{x}": "n.{x}.w", "{x}.b": "n.z.{x}"}, "a.b"), ({"a{x*}.w": "b{x*}.w", "{y}c.{z}": "{y}d.{z}"}, "ac.w")],
        ids=["crossing", "parts"],
    )
    def test_ambiguous_key(self, names, key):
        """Neither of two rules is the more special one for a key that both match."""
        with pytest.raises(ValueError, match=f"both match {key}; narrow one of them"):
            KeyRules(names).rename({key: torch.zeros(1)})

    def test_special_before_general(self):
        rules = KeyRules({"a.{y}": "b.{y}", "{x*}": "new.{x*}"})
        assert list(rules.rename({"a.w": torch.zeros(1), "c.d.w": torch.zeros(1)})) == ["b.w", "new.c.d.w"]

    def test_parts_of_a_component(self):
        rules = KeyRules({"layer{i}.w": "layers.{i}.w", "conv{i}.w": "convs.{i}.w"})
        assert list(rules.rename({"layer12.w": torch.zeros(1)})) == ["layers.12.w"]

    def test_patterns_that_share_no_key(self):
        rules = KeyRules({"block{rest*}": "blocks{rest*}", "head.{p}": "fc.{p}", "x{a}.b.c": "y{a}.b.d"})
        assert list(rules.rename({"block1.x.y": torch.zeros(1), "head.w": torch.zeros(1)})) == ["blocks1.x.y", "fc.w"]

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

    def test_keeps_single_parameters(self):
        target, state = self.model(), self.model().state_dict()
        before = target[1].bias.clone()
        load_strict(target, state, source="", keep=["1.bias"])
        assert equal(target[1].bias, before)
        assert equal(target[1].weight.detach(), state["1.weight"])

    @pytest.mark.parametrize(
        ("build", "other", "key"),
        [
            (lambda size: nn.ParameterDict({"pos_embed": torch.zeros(size, 3)}), 7, "pos_embed"),
            (lambda size: nn.Sequential(nn.Embedding(size, 3), nn.Linear(3, 2)), 7, r"0\.weight"),
            (lambda size: nn.Linear(3, size), 7, "weight"),
        ],
        ids=["bare", "vocabulary", "whole"],
    )
    def test_only_a_head_is_called_a_classifier(self, build, other, key):
        with pytest.raises(CheckpointError, match=rf"keys misshapen \(first: {key} \["):
            load_strict(build(2), build(other).state_dict(), source="w.pth")

    @pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
    def test_kinds_of_numbers(self, dtype):
        state = self.model().state_dict()
        state["1.bias"] = state["1.bias"].to(dtype)
        with pytest.raises(CheckpointError, match=rf"1 keys of another kind \(first: 1\.bias {dtype} instead of"):
            load_strict(self.model(), state, source="w.pth")
        half = {key: value.half() for key, value in self.model().state_dict().items()}
        load_strict(self.model(), half, source="")

    def test_counters_may_be_floats(self):
        norm, state = nn.BatchNorm1d(2), nn.BatchNorm1d(2).state_dict()
        load_strict(norm, state | {"num_batches_tracked": torch.tensor(3.0)}, source="")
        assert norm.num_batches_tracked == 3

    def test_errors(self):
        with pytest.raises(ValueError, match=r"keep=\['heads'\] names no submodule or parameter of Sequential"):
            load_strict(self.model(), self.model().state_dict(), source="", keep=["heads", "1"])
        with pytest.raises(ValueError, match="Sequential is on the meta device"):
            load_strict(self.model().to("meta"), self.model().state_dict(), source="")


class TestSaveWeights:
    def test_round_trip(self, tmp_path):
        shared = torch.arange(6.0).reshape(2, 3)
        state = {"a": shared, "tied": shared, "view": shared.T}
        save_weights(tmp_path / "w.safetensors", state, metadata={"model": "tiny"})
        checkpoint = read_checkpoint(tmp_path / "w.safetensors")
        assert equal(checkpoint.state, state)
        assert checkpoint.metadata == {"format": "pt", "model": "tiny"}

    def test_errors(self, tmp_path):
        save_weights(tmp_path / "w.safetensors", STATE, metadata={})
        with pytest.raises(FileExistsError, match="--overwrite"):
            save_weights(tmp_path / "w.safetensors", STATE, metadata={})
        save_weights(tmp_path / "w.safetensors", {"a": torch.ones(1)}, metadata={}, overwrite=True)
        assert list(read_checkpoint(tmp_path / "w.safetensors").state) == ["a"]
