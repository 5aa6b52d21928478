"""The choice among an op's implementations, and the way out of autocast."""

import inspect
import pkgutil

import pytest
import torch

from visionkernels import ops
from visionkernels.ops import choose_backend, without_autocast
from visionkernels.ops._dispatch import implementation


class TestChooseBackend:
    def test_every_tensor_counts(self, monkeypatch):
        pytest.importorskip("triton", reason="triton is not installed")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        single, double = torch.zeros(1), torch.zeros(1, dtype=torch.float64)
        assert choose_backend("demo", "triton", single, single) == "triton"
        for tensors in ((single, double), (double, single)):
            with pytest.raises(RuntimeError, match=r"cannot run demo: its kernels take .*, not float64; use backend="):
                choose_backend("demo", "triton", *tensors)
            assert choose_backend("demo", "auto", *tensors) == "eager"


class TestImplementation:
    @pytest.mark.parametrize("op", [module.name for module in pkgutil.iter_modules(ops.__path__) if module.ispkg])
    def test_same_arguments(self, op):
        """An op's functions take the same arguments in the same order; eager may have more, by keyword."""
        modules = [implementation(f"{ops.__name__}.{op}", backend) for backend in ("reference", "eager", "triton")]
        shared = set.intersection(*(set(module.__all__) for module in modules))
        assert shared
        for name in shared:
            signatures = [inspect.signature(getattr(module, name)).parameters.values() for module in modules]
            reference, eager, triton = ([str(x) for x in each if x.kind != x.KEYWORD_ONLY] for each in signatures)
            assert reference == eager == triton
            assert not any(x.kind == x.KEYWORD_ONLY for x in (*signatures[0], *signatures[2]))


class TestWithoutAutocast:
    def test_precision(self):
        x = torch.eye(2)
        with torch.autocast("cpu", torch.bfloat16):
            with without_autocast(x):
                assert (x @ x).dtype == torch.float32
            assert (x @ x).dtype == torch.bfloat16

    def test_meta(self):
        """A device that autocast does not know."""
        x = torch.empty(2, 2, device="meta")
        with without_autocast(x):
            assert (x @ x).dtype == torch.float32

    def test_compile(self):
        def product(x):
            with without_autocast(x):
                return x @ x

        compiled = torch.compile(product, fullgraph=True, backend="eager")
        x = torch.eye(2)
        assert compiled(x).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert compiled(x).dtype == torch.float32
