"""The choice among an op's implementations, and the way out of autocast."""

import pytest
import torch

from visionkernels.ops import choose_backend, without_autocast


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
