import gc
import itertools
import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from visionkernels.profiling import (
    BenchRow,
    Timing,
    bench_table,
    compare,
    count_flops,
    count_parameters,
    peak_memory_bytes,
    saved_activation_bytes,
)


class TestCountParameters:
    def test_shared_count_once(self):
        tied = nn.Linear(3, 3, bias=False)
        assert count_parameters(nn.Sequential(tied, tied, nn.Linear(3, 2))) == 9 + 6 + 2


class Attention(nn.Module):
    def __init__(self, fused):
        super().__init__()
        self.norm, self.project, self.fused = nn.LayerNorm(8), nn.Linear(8, 24), fused

    def forward(self, x):
        q, k, v = self.project(self.norm(x)).chunk(3, -1)
        if self.fused:
            return F.scaled_dot_product_attention(q[None], k[None], v[None])[0]
        return (q @ k.mT).softmax(-1) @ v


@pytest.mark.parametrize("arithmetic", ["skip", "run"])
class TestCountFlops:
    def test_by_hand(self, arithmetic):
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.BatchNorm2d(8),
            nn.GELU(),
            nn.Conv2d(8, 8, 5, padding=2, groups=8),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 10),
        )
        count = count_flops(net, torch.zeros(2, 3, 8, 8), arithmetic=arithmetic)
        assert count.conv == 2 * 16 * 8 * 27 + 2 * 16 * 8 * 25
        assert count.batch_norm == 2 * 2 * 8 * 16
        assert (count.linear, count.matmul, count.layer_norm) == (2 * 80, 0, 0)
        assert count.total == count.conv + count.batch_norm + 160
        assert count.gflops == count.total / 1e9

    @pytest.mark.parametrize("fused", [False, True])
    def test_attention(self, arithmetic, fused):
        count = count_flops(Attention(fused), torch.zeros(2, 5, 8), arithmetic=arithmetic)
        assert (count.linear, count.matmul, count.layer_norm) == (2 * 5 * 8 * 24, 2 * 2 * 25 * 8, 5 * 2 * 5 * 8)

    def test_multihead_attention(self, arithmetic):
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        count = count_flops(layer, torch.zeros(3, 5, 8), arithmetic=arithmetic)
        assert count.linear == 15 * (8 * 24 + 8 * 8 + 2 * 8 * 16)
        assert count.matmul == 2 * 3 * 25 * 8

    def test_linear_of_a_strided_input(self, arithmetic):
        class Permuted(nn.Linear):
            def forward(self, x):
                return super().forward(x.permute(0, 2, 3, 1))

        count = count_flops(Permuted(4, 6), torch.zeros(2, 4, 3, 5), arithmetic=arithmetic)
        assert (count.linear, count.matmul) == (2 * 15 * 24, 0)

    def test_norm_subclasses(self, arithmetic):
        timm_layers = pytest.importorskip("timm.layers", reason="timm is not installed")
        count = count_flops(timm_layers.LayerNorm2d(4), torch.zeros(2, 4, 3, 3), arithmetic=arithmetic)
        assert count.total == count.layer_norm == 5 * 72

    def test_leaves_the_module_as_it_was(self, arithmetic):
        net = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout())
        net[1].eval()
        count_flops(net, torch.randn(3, 4), arithmetic=arithmetic)
        assert [part.training for part in net.modules()] == [True, True, False]
        assert not net[0]._forward_hooks
        assert int(net[0].num_batches_tracked) == 0

    def test_errors(self, arithmetic):
        with pytest.raises(ValueError, match="arithmetic='guess' must be"):
            count_flops(nn.ReLU(), torch.zeros(1), arithmetic="guess")


class TestCountFlopsWithoutArithmetic:
    def test_no_size_is_too_large(self):
        net = nn.Linear(100_000, 100_000, device="meta")
        assert count_flops(net, torch.empty(10, 100_000, device="meta")).linear == 10**11


class TestSavedActivationBytes:
    def test_by_hand(self):
        x, layer = torch.zeros(16, 4), nn.Linear(4, 8)
        # the input for the weight's gradient, and the output of exp; the weight is a parameter
        assert saved_activation_bytes(lambda: layer(x).exp()) == 4 * (16 * 4 + 16 * 8)

    def test_shared_storage_counts_once(self):
        x = torch.zeros(16, requires_grad=True)

        def fn():
            y = x + 1
            return y * y, y[:8].exp() * 0 + y[:8] * y[8:]

        assert saved_activation_bytes(fn) == 4 * (16 + 8)

    def test_nothing_without_gradients(self):
        layer = nn.Linear(4, 8)
        with torch.no_grad():
            assert saved_activation_bytes(lambda: layer(torch.zeros(2, 4))) == 0


class TestPeakMemoryBytes:
    def test_by_hand(self):
        def fn():
            a = torch.empty(1 << 20, dtype=torch.uint8)
            b = torch.empty(3 << 20, dtype=torch.uint8)
            del b
            c = torch.empty(2 << 20, dtype=torch.uint8)
            return a, c

        assert peak_memory_bytes(fn) == 4 << 20

    def test_counts_the_backward_pass(self):
        def step():
            x = torch.zeros(1 << 18, requires_grad=True)
            (x * x).sum().backward()

        # x and x * x; then x, x * x and the gradient, with one more for the sum of its two halves
        assert (3 << 20) <= peak_memory_bytes(step) <= (5 << 20)

    def test_errors(self):
        with pytest.raises(ValueError, match="device='meta' must be"):
            peak_memory_bytes(lambda: None, device="meta")


class TestCompare:
    def test_finds_the_slower(self, monkeypatch):
        now, collecting = [0.0], []
        monkeypatch.setattr(time, "perf_counter", lambda: now[0])

        def candidate(seconds):
            def fn():
                now[0] += next(seconds)
                collecting.append(gc.isenabled())

            return fn

        fast, slow = itertools.repeat(0.25), itertools.chain([9, 1, 3], itertools.repeat(1))
        timings = compare({"fast": candidate(fast), "slow": candidate(slow)}, repeats=5, min_seconds=1)
        assert timings["fast"] == Timing(0.25, 0, (0.25,) * 5)
        assert timings["slow"] == Timing(1, 0, (3, 1, 1, 1, 1))
        assert collecting == [False] * (2 + 4 * 5 + 2 + 5)
        assert gc.isenabled()

    def test_takes_turns_and_restores_threads(self):
        order, threads = [], []
        before = torch.get_num_threads()

        def candidate(name):
            def fn():
                order.append(name)
                threads.append(torch.get_num_threads())

            return fn

        compare({"a": candidate("a"), "b": candidate("b")}, threads=1, repeats=3, warmup=1, min_seconds=0)
        assert order == list("ababbaab")
        assert set(threads) == {1}
        assert torch.get_num_threads() == before

    def test_errors(self):
        with pytest.raises(ValueError, match="repeats=0 must be at least 1"):
            compare({}, repeats=0)


ROW = BenchRow(
    id="forward", ours_s=0.0123456, baseline_s=0.02, ratio=1.62, target=1.4, threads=1, dtype="float32", shape="1x3x224"
)
FIELDS = ["id", "ours_s", "baseline_s", "ratio", "target", "threads", "dtype", "shape", "note"]


class TestBenchTable:
    def test_shows_every_field(self):
        header, _, row = bench_table([ROW]).splitlines()
        assert [cell.strip() for cell in header.strip("|").split("|")] == FIELDS
        assert "0.0123" in row
