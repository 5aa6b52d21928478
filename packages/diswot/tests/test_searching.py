"""Searches: the same result however they are run, within the budget, and safe in their folder."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from diswot import spaces
from diswot.budget import Budget
from diswot.networks.structure import parse_structure
from diswot.scoring import TeacherCache
from diswot.searching import search


class Line:
    """Networks of 1 to `length` channels, whose neighbours have one more or one less."""

    name, input_size = "line", (3, 4, 4)

    def __init__(self, length=40):
        self.size = length

    def sample(self, rng):
        return str(rng.integers(1, self.size + 1))

    def mutate(self, key, rng):
        step = int(rng.choice([-1, 1]))
        return str(min(max(int(key) + step, 1), self.size)) if 1 < int(key) < self.size else str(int(key) - step or 2)

    def enumerate(self):
        return map(str, range(1, self.size + 1))

    def parse(self, key):
        return key

    def build(self, key, *, num_classes=5, in_chans=3):
        self.built.append(key)
        return nn.Sequential(
            nn.Conv2d(in_chans, int(key), 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(int(key), num_classes),
        )  # fmt: skip

    built: list[str] = []  # noqa: RUF012 - shared by all on purpose


@pytest.fixture
def line():
    Line.built = []
    return Line()


@pytest.fixture(scope="module")
def cache():
    import timm

    torch.manual_seed(0)
    teacher = timm.create_model("s0_131", num_classes=5)
    return TeacherCache(teacher, [(torch.randn(4, 3, 8, 8), torch.arange(4))], 1, "kaiming")


def run(space, cache, **options):
    return search(space, cache, **{"num_classes": 5, "evaluations": 24, "terms": ("params",), **options})


ALGORITHMS = ("random", "aging", "evolution")


class TestSearch:
    @pytest.mark.parametrize("algorithm", ALGORITHMS)
    def test_the_seed_decides(self, line, cache, algorithm):
        options = {"algorithm": algorithm, "population": 10, "terms": ("relation",), "evaluations": 24}
        first = run(line, cache, **options)
        torch.rand(3)
        np.random.seed(4)  # noqa: NPY002
        assert repr(run(line, cache, **options)) == repr(first)
        assert run(line, cache, seed=1, **options).history != first.history
        assert len(first.history) == 24

    @pytest.mark.parametrize("algorithm", ALGORITHMS)
    @pytest.mark.parametrize(
        ("name", "options"), [("s0", {"depths": (1, 3)}), ("nasbench201", {"width": 4, "cells": 1, "image_size": 8})]
    )
    def test_real_spaces(self, cache, algorithm, name, options):
        space = spaces.create(name, **options)
        # 64 channels before the classifier, as the teacher has, or padded up to them
        found = run(
            space,
            cache,
            algorithm=algorithm,
            terms=("semantic", "relation"),
            project="pad",
            population=8,
            evaluations=8,
        )
        scores = [each.score for each in found.candidates]
        assert scores == sorted(scores, reverse=True)
        assert {each.key for each in found.candidates} == set(found.history)
        for each in found.candidates[:2]:
            score = cache.score(space.build(each.key, num_classes=5), key=each.key, project="pad")
            assert each.terms == pytest.approx(score.terms)
            assert each.score == pytest.approx(score.total)
            assert each.params == sum(p.numel() for p in space.build(each.key, num_classes=5).parameters())

    def test_more_evaluations_go_on(self, line, cache):
        short, long = (run(line, cache, evaluations=count) for count in (16, 32))
        assert long.history[:16] == short.history

    @pytest.mark.parametrize("algorithm", ["aging", "evolution"])
    def test_evolution_climbs(self, line, cache, algorithm):
        """From a random start, parameters being the score, the largest network is found by small steps."""
        line.size = 150
        found = run(line, cache, algorithm=algorithm, population=16, evaluations=800, tournament=4)
        best = np.array([int(key) for key in found.history])
        assert best[:16].max() < best[-16:].max()
        assert int(found.best.key) > 140
        assert found.best.score == max(each.score for each in found.candidates)

    def test_aging_changes_the_best_of_the_tournament(self, line, cache):
        """With a tournament far larger than the population, all children are neighbours of the best member."""
        line.size = 1000
        found = run(line, cache, population=8, tournament=400, evaluations=80)
        history = [int(key) for key in found.history]
        for start in range(8, 80, 8):
            parent = max(history[start - 8 : start])
            assert all(abs(child - parent) <= 1 for child in history[start : start + 8])

    def test_aging_drops_the_oldest(self, line, cache):
        """Each generation fills the population, so that the best of all is forgotten once it has aged."""
        line.size = 1000
        found = run(line, cache, population=8, tournament=1, evaluations=160)
        history = [int(key) for key in found.history]
        for start in range(8, 160, 8):
            parents = set(history[start - 8 : start])
            assert all(parents & {child - 1, child + 1} for child in history[start : start + 8])

    def test_repeats_cost_nothing(self, line, cache):
        line.size = 3
        found = run(line, cache, algorithm="random", evaluations=60)
        assert len(found.history) == 60
        assert len(found.candidates) == 3
        # once for what it costs, once for its score
        assert Counter(line.built) == Counter({"1": 2, "2": 2, "3": 2})

    @pytest.mark.parametrize("combined", ["sum", "rank", "zscore"])
    def test_combined(self, line, cache, combined):
        found = run(line, cache, algorithm="random", terms=("params", "relation"), combined=combined)
        table = np.array([[each.terms[name] for each in found.candidates] for name in ("params", "relation")])
        if combined == "rank":
            expected = (np.argsort(np.argsort(table)) + 1).sum(0)
        elif combined == "zscore":
            expected = ((table - table.mean(1, keepdims=True)) / table.std(1, keepdims=True)).sum(0)
        else:
            expected = table.sum(0)
        np.testing.assert_allclose([each.score for each in found.candidates], expected, rtol=1e-6)

    def test_stderr(self, line):
        import timm

        cache = TeacherCache(
            timm.create_model("s0_111", num_classes=5), [(torch.randn(4, 3, 8, 8), torch.arange(4))], 3
        )
        found = run(line, cache, terms=("relation",), evaluations=4)
        score = cache.score(line.build(found.best.key), key=found.best.key, terms=["relation"])
        assert found.best.stderr == pytest.approx(score.stderr)

    def test_scores_that_are_none(self, tmp_path):
        """NWOT is -infinity where two pictures are one; what is NaN ranks behind it, and JSON stays valid."""
        import timm

        class Sick(Line):
            name = "sick"

            def build(self, key, *, num_classes=5, in_chans=3):
                model = super().build(key, num_classes=num_classes)
                if int(key) % 2:
                    model[0].weight.data.mul_(math.nan)
                return model

        images = torch.randn(1, 3, 8, 8).expand(4, -1, -1, -1)
        cache = TeacherCache(timm.create_model("s0_111", num_classes=5), [(images, torch.arange(4))], 1, "keep")
        options = {"terms": ("snip", "nwot"), "out": tmp_path / "out", "algorithm": "random", "evaluations": 60}
        with pytest.warns(RuntimeWarning, match="snip is nan"):
            found = run(Sick(6), cache, **options)
        scores = [each.score for each in found.candidates]
        assert scores[:3] == [-math.inf] * 3
        assert all(map(math.isnan, scores[3:]))
        assert len(scores) == 6
        text = (tmp_path / "out" / "result.json").read_text()
        stored = json.loads(text, parse_constant=lambda name: pytest.fail(name))
        assert stored["candidates"][0]["score"] is None
        for line in (tmp_path / "out" / "scores.jsonl").read_text().splitlines():
            json.loads(line, parse_constant=lambda name: pytest.fail(name))
        # read back from there, the same
        assert repr(run(Sick(6), cache, **options)) == repr(found)

    def test_finalists(self, line, cache, tmp_path):
        """The best are scored again with more seeds and ordered by that; the others follow as they were."""
        final = replace(cache, batches=list(cache.batches) * 3, seeds=3)
        options = {"terms": ("relation",), "evaluations": 30, "algorithm": "random"}
        plain = run(line, cache, **options)
        found = run(line, cache, final=final, finalists=4, out=tmp_path / "out", **options)
        assert {each.key for each in found.candidates[:4]} == {each.key for each in plain.candidates[:4]}
        assert repr(found.candidates[4:]) == repr(plain.candidates[4:])
        assert [each.seeds for each in found.candidates[:5]] == [3, 3, 3, 3, 1]
        scores = [each.score for each in found.candidates[:4]]
        assert scores == sorted(scores, reverse=True)
        again = final.score(line.build(found.best.key), key=found.best.key, terms=["relation"])
        assert found.best.score == pytest.approx(again.total)
        line.built.clear()
        assert repr(run(line, cache, final=final, finalists=4, out=tmp_path / "out", **options)) == repr(found)
        # only counted, not scored
        assert max(Counter(line.built).values()) == 1

    def test_evolution_starts_from_the_initial_structure(self, cache):
        """The first eleven members differ from it in one block."""
        space = spaces.create("xxbl", image_size=8)
        found = run(space, cache, algorithm="evolution", evaluations=11, round_size=1)
        initial = parse_structure(space.initial).blocks
        for key in found.history:
            blocks = parse_structure(key).blocks
            # one block in another form, or cut in two, and the input of the next one
            assert sum(block not in initial for block in blocks) <= 3
            assert len(blocks) <= len(initial) + 1

    @pytest.mark.slow  # two processes import torch
    @pytest.mark.parametrize("algorithm", ALGORITHMS)
    def test_jobs(self, cache, algorithm):
        space = spaces.create("s0")
        options = {"algorithm": algorithm, "population": 8, "terms": ("semantic", "snip"), "evaluations": 20}
        assert repr(run(space, cache, jobs=2, **options)) == repr(run(space, cache, **options))


class TestBudget:
    @pytest.mark.parametrize("algorithm", ALGORITHMS)
    def test_all_are_within(self, cache, algorithm):
        budget = Budget(params=250_000, macs=30e6)
        found = run(spaces.create("s0", depths=(1, 3)), cache, algorithm=algorithm, budget=budget, population=8)
        assert found.candidates
        assert all(each.params <= 250_000 and each.macs <= 30e6 for each in found.candidates)

    @pytest.mark.parametrize("algorithm", ALGORITHMS)
    def test_one_network_fits(self, cache, algorithm):
        """All its neighbours are beyond the budget, so that candidates are drawn anew."""
        found = run(
            spaces.create("s0", depths=(1, 3)),
            cache,
            algorithm=algorithm,
            budget=Budget(params=80_000),
            population=8,
        )
        assert found.history == ("111",) * 24

    def test_unmet(self, cache):
        with pytest.raises(
            RuntimeError,
            match=r"budget params=1000: none of 2000 candidates of s0 in a row is within it; the smallest seen has "
            r"77,\d{3} parameters and 12,\d{3},\d{3} multiply-accumulates$",
        ):
            run(spaces.create("s0", depths=(1, 3)), cache, budget=Budget(params=1000))

    def test_latency(self, line, cache):
        found = run(line, cache, budget=Budget(latency_ms=1000), evaluations=2)
        assert all(0 < each.latency_ms < 1000 for each in found.candidates)
        assert run(line, cache, evaluations=8).best.latency_ms is None

    def test_latency_unmet(self, line, cache):
        line.size = 2
        with pytest.raises(RuntimeError, match=r"budget latency_ms=1e-06: none of 2000.*; the fastest takes \S+ ms"):
            run(line, cache, budget=Budget(latency_ms=1e-6))

    def test_latency_is_kept(self, line, cache, tmp_path):
        options = {"budget": Budget(latency_ms=1000), "evaluations": 2, "out": tmp_path / "out"}
        assert repr(run(line, cache, **options)) == repr(run(line, cache, **options))


class TestFolder:
    def test_goes_on(self, line, cache, tmp_path):
        options = {"terms": ("relation", "params"), "evaluations": 40, "population": 8}
        expected = repr(run(line, cache, **options))
        run(line, cache, out=tmp_path / "out", **{**options, "evaluations": 13})
        line.built.clear()
        assert repr(run(line, cache, out=tmp_path / "out", **options)) == expected
        assert max(Counter(line.built).values()) <= 2
        line.built.clear()
        assert repr(run(line, cache, out=tmp_path / "out", **options)) == expected
        # only counted, not scored
        assert max(Counter(line.built).values()) == 1
        assert {path.name for path in (tmp_path / "out").iterdir()} == {"settings.json", "scores.jsonl", "result.json"}

    def test_result(self, line, cache, tmp_path):
        found = run(line, cache, out=str(tmp_path / "deep" / "out"))
        stored = json.loads((tmp_path / "deep" / "out" / "result.json").read_text())
        assert stored["history"] == list(found.history)
        assert [each["key"] for each in stored["candidates"]] == [each.key for each in found.candidates]
        assert stored["settings"] == json.loads((tmp_path / "deep" / "out" / "settings.json").read_text())

    @pytest.mark.parametrize(
        ("changes", "named"),
        [
            ({"seed": 1}, "seed"),
            ({"terms": ("snip",)}, "terms"),
            ({"budget": Budget(params=10**9)}, "budget"),
            ({"algorithm": "random"}, "algorithm"),
            ({"population": 9}, "population"),
            ({"tournament": 2}, "tournament"),
            ({"round_size": 3}, "round_size"),
            ({"combined": "rank"}, "combined"),
            ({"project": "pad"}, "project"),
            ({"num_classes": 6}, "num_classes"),
            ({"space": Line(41)}, "space"),
            ({"final": True}, "final"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_other_settings(self, line, cache, tmp_path, changes, named):
        run(line, cache, out=tmp_path, evaluations=2)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(ValueError, match=rf"holds a search with other {named}; give another folder"):
            if "final" in changes:
                changes = {"final": cache}
            run(changes.pop("space", line), cache, out=tmp_path, **changes)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    def test_other_teacher(self, line, cache, tmp_path):
        run(line, cache, out=tmp_path, evaluations=2)
        for other in (
            replace(cache, key="other"),
            replace(cache, batches=[(cache.batches[0][0] + 1, torch.arange(4))]),
        ):
            with pytest.raises(ValueError, match="holds a search with other teacher"):
                run(line, other, out=tmp_path)

    def test_the_same_teacher_made_again(self, line, cache, tmp_path):
        import timm

        run(line, cache, out=tmp_path, evaluations=2)
        torch.manual_seed(99)
        again = TeacherCache(timm.create_model("s0_131", num_classes=5), cache.batches, 1, "kaiming")
        run(line, again, out=tmp_path, evaluations=2)

    def test_folder_of_other_files(self, line, cache, tmp_path):
        (tmp_path / "thesis.tex").write_text("mine")
        with pytest.raises(ValueError, match="is a folder of other files; give a new one"):
            run(line, cache, out=tmp_path)

    def test_torn_line(self, line, cache, tmp_path):
        expected = repr(run(line, cache, out=tmp_path))
        scores = tmp_path / "scores.jsonl"
        content = scores.read_bytes()
        for length in (len(content) - 1, len(content) - 30, 3, 0):
            scores.write_bytes(content[:length])
            assert repr(run(line, cache, out=tmp_path)) == expected

    @pytest.mark.parametrize(
        "damage",
        ["garbage\n", '{"key": "1"}\n', '{"key": "KEY", "result": 5}\n', '{"key": "KEY", "result": null}\n',
         '{"key": "KEY", "result": {"scores": {}, "stderr": {}}}\n',
         '{"key": "KEY", "result": {"scores": {"params": null}, "stderr": {"params": 1}}}\n',
         '{"key": "KEY", "result": {"scores": {"params": "high"}, "stderr": {"params": 1}}}\n'],
        ids=["garbage", "no-result", "number", "null", "empty", "null-score", "text"],
    )  # fmt: skip
    def test_damaged_scores(self, line, cache, tmp_path, damage):
        found = run(line, cache, out=tmp_path)
        (tmp_path / "scores.jsonl").write_text(damage.replace("KEY", found.history[0]))
        with pytest.raises(ValueError, match=r"scores\.jsonl"):
            run(line, cache, out=tmp_path)

    @pytest.mark.parametrize("content", ["", "{", "[1]", "3"])
    def test_damaged_settings(self, line, cache, tmp_path, content):
        run(line, cache, out=tmp_path)
        (tmp_path / "settings.json").write_text(content)
        with pytest.raises(ValueError, match=r"settings\.json is damaged: .*; give another folder"):
            run(line, cache, out=tmp_path)

    @pytest.mark.slow  # another process imports torch
    def test_killed(self, tmp_path):
        """A search that is killed between two scores ends with the result of one that was left alone."""
        script = tmp_path / "run.py"
        script.write_text(_SCRIPT)
        argv = [sys.executable, str(script)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([*argv, str(tmp_path / "killed")], env=environment)
        scores = tmp_path / "killed" / "scores.jsonl"
        deadline = time.monotonic() + 120
        while not scores.exists() or scores.read_bytes().count(b"\n") < 5:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "killed" / "result.json").exists()
        kept = scores.read_bytes()
        space = spaces.create("s0")
        for name in ("killed", "alone"):
            _script_search(space, tmp_path / name)
        assert scores.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
        results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("killed", "alone")]
        assert results[0]["history"] == results[1]["history"]
        assert results[0] == results[1]


_SCRIPT = f"""
import importlib.util, sys
from pathlib import Path

import torch
from diswot import spaces

torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("theirs", {str(Path(__file__))!r})
theirs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(theirs)
theirs._script_search(spaces.create("s0"), Path(sys.argv[1]))
"""


def _script_search(space, out):
    import timm

    torch.manual_seed(0)
    batch = torch.randn(8, 3, 32, 32), torch.arange(8) % 5
    cache = TeacherCache(timm.create_model("s0_131", num_classes=5), [batch], 2, "kaiming")
    search(space, cache, num_classes=5, evaluations=40, population=8, terms=("semantic", "correlation"), out=out)


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"algorithm": "genetic"}, "algorithm='genetic' must be one of 'aging', 'evolution', 'random'"),
            ({"combined": "mean"}, "combined='mean' must be one of 'sum', 'rank', 'zscore'"),
            ({"project": "crop"}, "project='crop' must be one of"),
            ({"evaluations": 0}, "evaluations=0 must be at least 1"),
            ({"population": 0}, "population=0 must be at least 2"),
            ({"population": 1}, "population=1 must be at least 2"),
            ({"tournament": 0}, "tournament=0 must be at least 1"),
            ({"round_size": 0}, "round_size=0 must be at least 1"),
            ({"finalists": 0}, "finalists=0 must be at least 1"),
            ({"terms": ()}, r"terms=\(\) must be one or more"),
            ({"terms": ("snap",)}, "unknown term 'snap'; did you mean 'snip'"),
            ({"terms": ("rank",)}, "unknown term 'rank'"),
            ({"terms": ("semantic",)}, "channels, which the semantic term cannot compare; use the relation term only"),
        ],
    )
    def test_options(self, line, cache, tmp_path, options, message):
        with pytest.raises(ValueError, match=message):
            run(line, cache, **options)

    def test_settings_are_checked_before_a_folder_is_made(self, line, cache, tmp_path):
        with pytest.raises(ValueError, match="unknown term"):
            run(line, cache, terms=("snap",), out=tmp_path / "out")
        assert not (tmp_path / "out").exists()
