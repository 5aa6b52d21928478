import json

import numpy as np
import pytest
import torch

from visionkernels.testing.golden import (
    check_cases,
    compare_array,
    compare_case,
    compare_param_grads,
    make_inputs,
)

OUT = torch.arange(12.0).reshape(3, 4) / 4
STATISTICS = {"mean": 1.375, "std": OUT.std(correction=0).item(), "absmax": 2.75}
LISTED = {
    "name": "listed",
    "outputs": [{"name": "out", "npz_key": "stored_out", "shape": [3, 4], "flat_stride": 5, **STATISTICS}],
    "atol": 1e-4,
    "rtol": 1e-4,
}
NAMED = {
    "name": "named",
    "tensors": {"out": {"shape": [3, 4], "stride": 5, **STATISTICS}},
    "tolerance": {"float32": {"rtol": 1e-4, "atol": 1e-4}},
}
STORED = OUT.reshape(-1)[::5].numpy()


def named(outputs, **tolerance):
    return compare_case(NAMED, {"out": STORED}, outputs, label="float32", **({"rtol": 2e-4, "atol": 0.0} | tolerance))


class TestCheckCases:
    @pytest.fixture
    def folder(self, tmp_path):
        def write(cases, **others):
            (tmp_path / "index.json").write_text(json.dumps({"cases": cases, **others}))
            return tmp_path

        np.savez(tmp_path / "one.npz", a=np.ones(2))
        np.savez(tmp_path / "all.npz", **{"one/a": np.zeros(2), "two/a": np.ones(3), "three.a": np.ones(4)})
        return write

    @staticmethod
    def sizes(case, stored):
        return [f"{case['name']} {key} {array.size}" for key, array in stored.items()]

    def test_listed_and_named_cases(self, folder):
        expected = {"one": ["one a 2"], "none": []}
        cases = {"one": {"file": "one.npz"}, "none": {"file": None}}
        assert check_cases(folder(cases), self.sizes) == expected
        assert check_cases(folder([{"name": name, **case} for name, case in cases.items()]), self.sizes) == expected

    def test_one_file_for_all_cases(self, folder):
        expected = {"two": ["two a 3"], "three": ["three a 4"]}
        assert check_cases(folder({"two": {}, "three": {}}, npz="all.npz"), self.sizes) == expected
        assert check_cases(folder([{"name": "two", "file": "all.npz"}]), self.sizes) == {"two": ["two a 3"]}

    def test_failure_is_a_mismatch(self, folder):
        assert check_cases(folder({"one": {}}), lambda case, stored: 1 / 0) == {
            "one": ["one: ZeroDivisionError: division by zero"]
        }
        (mismatch,) = check_cases(folder({"one": {"file": "none.npz"}}), self.sizes)["one"]
        assert "FileNotFoundError" in mismatch


class TestMakeInputs:
    def test_listed_and_named(self):
        normal, uniform = {"seed": 1, "shape": [2, 3]}, {"seed": 2, "shape": [4], "kind": "random_sample"}
        inputs = make_inputs({"inputs": {"a": normal, "b": uniform}})
        listed = [{"name": "a", "generator": "standard_normal", **normal}, {"name": "b", **uniform}]
        torch.testing.assert_close(make_inputs({"inputs": listed}), inputs, rtol=0, atol=0)
        wanted = np.random.RandomState(1).standard_normal((2, 3)).astype(np.float32)
        np.testing.assert_array_equal(inputs["a"], wanted)
        np.testing.assert_array_equal(inputs["b"], np.random.RandomState(2).random_sample(4).astype(np.float32))

    def test_unknown_generator(self):
        with pytest.raises(ValueError, match="generator 'simplex' is unknown"):
            make_inputs({"inputs": {"a": {"seed": 1, "shape": [2], "kind": "simplex"}}})


class TestCompareCase:
    def test_agrees(self):
        assert compare_case(LISTED, {"stored_out": STORED}, {"out": OUT}) == []
        assert named({"out": OUT}) == []

    def test_tolerance(self):
        # 1e-4 + 1e-4 * 2.75 and 2e-4 * 2.75
        for factor in (0.9, 1.1):
            moved = OUT + factor * 3.75e-4
            assert bool(compare_case(LISTED, {"stored_out": STORED}, {"out": moved})) == (factor > 1)
            assert bool(named({"out": OUT + factor * 5.5e-4})) == (factor > 1)
        plain = NAMED | {"tolerance": {"rtol": 1e-4, "atol": 1e-4}}
        assert compare_case(plain, {"out": STORED}, {"out": OUT + 3e-4}) == []
        assert "named.out: differs by" in compare_case(plain, {"out": STORED}, {"out": OUT + 5e-4})[0]

    def test_elements_that_are_not_stored(self):
        moved = OUT.clone()
        moved[0, 1] += 1
        assert [line.split(" ")[:2] for line in named({"out": moved})] == [
            ["named.float32.out:", "mean"],
            ["named.float32.out:", "std"],
        ]

    def test_loss(self):
        case = LISTED | {"loss": 2.0}
        stored = {"stored_out": STORED}
        # the tolerance of one element times the root of twelve
        assert compare_case(case, stored, {"out": OUT, "loss": torch.tensor(2.0012)}) == []
        (mismatch,) = compare_case(case, stored, {"out": OUT, "loss": torch.tensor(2.0014)})
        assert mismatch.startswith("listed.loss: differs by 0.0014")

    def test_nothing_compared_is_a_mismatch(self):
        assert compare_case({"name": "a", "rtol": 0, "atol": 0, "outputs": []}, {}, {"out": OUT}) == [
            "a: the case describes no outputs"
        ]
        assert named({}) == ["named.float32.out: not computed"]
        assert compare_case(LISTED, {}, {"out": OUT}) == ["listed.out: not stored"]


class TestCompareArray:
    @pytest.mark.parametrize(
        ("value", "stored", "message"),
        [
            (torch.ones(1), np.ones(0), "0 stored numbers instead of 1"),
            (torch.ones(1000), np.ones(1), "1 stored numbers instead of 1000"),
            (torch.ones(2), np.array([1.0, np.nan]), "differs by nan"),
            (torch.tensor([1 + 2j]), np.array([1 + 3j]), "differs by 1,"),
            (torch.tensor([1 + 2j]), np.array([1.0]), "complex numbers against real ones"),
            (torch.tensor([1.0]), np.array([1 + 2j]), "complex numbers against real ones"),
        ],
        ids=["empty", "one-for-all", "nan", "imaginary", "no-imaginary", "unwanted-imaginary"],
    )
    def test_mismatches(self, value, stored, message):
        (mismatch,) = compare_array("a", value, stored, shape=value.shape, tolerance=1e-6)
        assert mismatch.startswith(f"a: {message}")

    @pytest.mark.parametrize(
        ("value", "stored"),
        [
            (torch.tensor([1 + 2j, 3j]), np.array([1 + 2j, 3j], np.complex64)),
            (torch.tensor([-torch.inf, 2.0]), np.array([-np.inf, 2.0])),
            (torch.ones(2, dtype=torch.bfloat16), np.ones(2)),
            (torch.tensor([True, False]), np.array([True, False])),
            (torch.tensor(3), np.array(3)),
            (torch.ones(0, 2), np.ones((0, 2))),
        ],
        ids=["complex", "infinite", "bfloat16", "boolean", "scalar", "empty"],
    )
    def test_agrees(self, value, stored):
        assert compare_array("a", value, stored, shape=value.shape, tolerance=0.0) == []

    def test_strides(self):
        value = torch.arange(24.0).reshape(2, 3, 4)
        for stride, stored in ((7, [0, 7, 14, 21]), ([1, 2, 3], [0, 3, 8, 11, 12, 15, 20, 23])):
            assert compare_array("a", value, np.array(stored), shape=[2, 3, 4], stride=stride, tolerance=0.0) == []


class TestCompareParamGrads:
    def test_nothing_stated_is_a_mismatch(self):
        assert compare_param_grads({"name": "a", "param_grads": {"values": {}}}, {}) == [
            "a: the case states no gradients"
        ]

    def test_norm_and_sum(self):
        case = {"name": "a", "param_grads": {"values": {"w": [2.0, 4.0], "frozen": None}}}
        assert compare_param_grads(case, {"w": torch.ones(4), "frozen": None}) == []
        assert len(compare_param_grads(case, {"w": -torch.ones(4), "frozen": torch.ones(1)})) == 2
