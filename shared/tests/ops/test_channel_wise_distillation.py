from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from visionkernels.ops.channel_wise_distillation import channel_wise_distillation, eager
from visionkernels.testing.ops import check_backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["eager", "triton"]
CASES = {
    # shape of both maps, options
    "map": ((2, 3, 6, 7), {}),
    "temperature": ((2, 3, 6, 7), {"temperature": 4.0}),
    "cold": ((2, 3, 6, 7), {"temperature": 0.25}),
    "one-position": ((2, 3, 1), {}),
    "one-row": ((1, 1, 4099), {"temperature": 2.0}),
    "volume": ((1, 5, 3, 5, 7), {}),
}


def make(case, dtype=torch.float32):
    shape, options = CASES[case]
    return [2 * torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype) for _ in range(2)], options


def run(student: Tensor, teacher: Tensor, **options: object) -> Tensor:
    """Return the loss times up to 256, so that gradients are not far below one, in the dtype of the student."""
    loss = channel_wise_distillation(student, teacher.to(student.dtype), **options)
    return (loss * min(student.numel(), 256)).to(student.dtype)


def gradient(student: Tensor, teacher: Tensor, **options: object) -> Tensor:
    leaf = student.detach().requires_grad_()
    return torch.autograd.grad(channel_wise_distillation(leaf, teacher, **options), leaf)[0]


class TestChannelWiseDistillation:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_reference(self, backend, case, dtype):
        if backend == "triton" and dtype == torch.float64:
            pytest.skip("the kernels take at most float32")
        (student, teacher), options = make(case, dtype)
        ours = partial(run, teacher=teacher, backend=backend, **options)
        check_backend(ours, partial(run, teacher=teacher, backend="reference", **options), [student])

    def test_definition(self):
        """Two positions by hand: a teacher of 1/4 and 3/4, a student of 1/2 each."""
        student, teacher = torch.zeros(1, 1, 2), torch.tensor([[[1.0, 3.0]]]).log()
        torch.testing.assert_close(channel_wise_distillation(student, teacher), torch.tensor(2.0).log())
        torch.testing.assert_close(gradient(student, teacher), torch.tensor([[[0.25, -0.25]]]))

    @pytest.mark.parametrize("chunk", [1, 84, 1 << 20])
    def test_chunks(self, monkeypatch, chunk):
        """Any number of rows at a time, the last fewer, gives the same."""
        monkeypatch.setattr(eager, "_CHUNK_ELEMENTS", chunk)
        student, teacher = (torch.randn(1, 5, 6, 7).to(DEVICE) for _ in range(2))
        ours = partial(run, teacher=teacher, backend="eager")
        check_backend(ours, partial(run, teacher=teacher, backend="reference"), [student])

    @pytest.mark.parametrize("programs", [1, 6, 100])
    def test_splits(self, monkeypatch, programs):
        """A row in one program of several blocks, in sections of several, and in one program a block."""
        from visionkernels.ops.channel_wise_distillation import triton

        monkeypatch.setattr(triton, "_BLOCK", 16)
        monkeypatch.setattr(triton, "_PROGRAMS", programs)
        student, teacher = (3 * torch.randn(1, 2, 151).to(DEVICE) for _ in range(2))
        # the largest logits in the middle, first and last section
        student[..., 70], teacher[..., 3], teacher[:, 1, 150] = 9, 12, 14
        ours = partial(run, teacher=teacher, backend="triton", temperature=0.7)
        check_backend(ours, partial(run, teacher=teacher, backend="reference", temperature=0.7), [student])

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_strides(self, backend):
        """Channels-last maps, of one sample too, slices and an expanded teacher."""
        (student, teacher), _ = make("map")
        expected = gradient(student, teacher, backend=backend)
        last = [each.contiguous(memory_format=torch.channels_last) for each in (student, teacher)]
        torch.testing.assert_close(gradient(*last, backend=backend), expected)
        one = gradient(last[0][:1], last[1][:1], backend=backend)
        torch.testing.assert_close(one, 2 * expected[:1])
        wide = [torch.cat([each, each], -1)[..., :7] for each in (student, teacher)]
        torch.testing.assert_close(gradient(*wide, backend=backend), expected)
        shared = teacher[:1].expand(2, -1, -1, -1)
        expected = gradient(student, shared.contiguous(), backend=backend)
        torch.testing.assert_close(gradient(student, shared, backend=backend), expected)

    @pytest.mark.parametrize("backend", ["reference", *BACKENDS])
    def test_mixed_dtypes(self, backend):
        """The loss is float32, the gradient of the student's dtype, and the teacher has none."""
        (student, teacher), _ = make("map")
        for student_dtype, teacher_dtype in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
            half = student.detach().to(student_dtype).requires_grad_()
            target = teacher.detach().to(teacher_dtype).requires_grad_()
            loss = channel_wise_distillation(half, target, backend=backend)
            loss.backward()
            assert loss.dtype == torch.float32 and half.grad.dtype == student_dtype and target.grad is None
            expected = channel_wise_distillation(half.float(), target.float(), backend="reference")
            torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        if backend != "triton":
            assert channel_wise_distillation(student, teacher.double(), backend=backend).dtype == torch.float64

    @pytest.mark.parametrize("backend", ["reference", *BACKENDS])
    def test_autocast(self, backend):
        (student, teacher), _ = make("map")
        expected = gradient(student, teacher, backend=backend)
        with torch.autocast(DEVICE, torch.bfloat16):
            torch.testing.assert_close(gradient(student, teacher, backend=backend), expected)

    @pytest.mark.parametrize("backend", ["reference", *BACKENDS])
    def test_offset(self, backend):
        """Adding a large number to a channel changes neither the loss nor the gradient."""
        student, teacher = (torch.randint(-4, 5, (2, 3, 50), device=DEVICE).float() for _ in range(2))
        loss, grad = (f(student, teacher, backend=backend) for f in (channel_wise_distillation, gradient))
        shifted = (student + 2**19, teacher - 2**19)
        torch.testing.assert_close(channel_wise_distillation(*shifted, backend=backend), loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient(*shifted, backend=backend), grad, rtol=1e-5, atol=1e-8)

    @pytest.mark.parametrize("backend", ["reference", *BACKENDS])
    def test_large_gaps(self, backend):
        student = torch.tensor([[[0.0, 1e4, -1e4]]], device=DEVICE)
        teacher = torch.tensor([[[1e4, 0.0, -1e4]]], device=DEVICE)
        loss = channel_wise_distillation(student, teacher, backend=backend)
        torch.testing.assert_close(loss, torch.tensor(1e4, device=DEVICE))
        grad = gradient(student, teacher, backend=backend)
        torch.testing.assert_close(grad, torch.tensor([[[-1.0, 1.0, 0.0]]], device=DEVICE))

    @pytest.mark.parametrize("backend", ["reference", *BACKENDS])
    def test_nan(self, backend):
        """Makes the loss NaN, and the gradients of its own row only."""
        for position in (0, 1):
            inputs, _ = make("map")
            inputs[position][0, 1, 2, 3] = torch.nan
            assert channel_wise_distillation(*inputs, backend=backend).isnan()
            grad = gradient(*inputs, backend=backend)
            assert grad[0, 1].isnan().all() and grad.isnan().sum() == 42

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_twice(self, backend):
        """Backward can run again on a kept graph, scales by the incoming gradient and is the same to the bit."""
        (student, teacher), _ = make("map")
        leaf = student.requires_grad_()
        loss = channel_wise_distillation(leaf, teacher, backend=backend)
        once, again, triple = (torch.autograd.grad(k * loss, leaf, retain_graph=True)[0] for k in (1, 1, 3))
        assert torch.equal(once, again)
        torch.testing.assert_close(triple, 3 * once)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_no_second_derivative(self, backend):
        (student, teacher), _ = make("map")
        loss = channel_wise_distillation(student.requires_grad_(), teacher, backend=backend)
        (grad,) = torch.autograd.grad(loss, student, create_graph=True)
        with pytest.raises(RuntimeError):
            grad.sum().backward()

    @pytest.mark.parametrize("backend", ["reference", *BACKENDS])
    def test_no_grad(self, backend):
        (student, teacher), options = make("temperature")
        expected = channel_wise_distillation(student.requires_grad_(), teacher, backend=backend, **options).detach()
        for inputs in ((student, teacher), (student.detach(), teacher)):
            with torch.no_grad():
                out = channel_wise_distillation(*inputs, backend=backend, **options)
            torch.testing.assert_close(out, expected)
            assert not out.requires_grad

    @pytest.mark.parametrize("backend", ["reference", "eager"])
    @pytest.mark.parametrize("case", ["map", "temperature", "volume"])
    def test_gradcheck(self, case, backend):
        (student, teacher), options = make(case, torch.float64)
        function = partial(channel_wise_distillation, teacher=teacher, backend=backend, **options)
        assert torch.autograd.gradcheck(function, [student.requires_grad_()], fast_mode=True)

    @settings(max_examples=30, deadline=None)
    @given(st.data())
    def test_properties(self, data):
        """The teacher's entropy plus the KL divergence, whatever the order of positions; least for equal maps."""
        batch, channels, positions = (data.draw(st.integers(1, 6)) for _ in range(3))
        temperature = data.draw(st.floats(0.2, 5))
        student, teacher = (torch.randn(batch, channels, positions, dtype=torch.float64) for _ in range(2))
        function = partial(channel_wise_distillation, temperature=temperature)
        loss, least = function(student, teacher), function(teacher, teacher)
        log_student, log_teacher = ((each / temperature).log_softmax(-1) for each in (student, teacher))
        divergence = F.kl_div(log_student, log_teacher, reduction="sum", log_target=True) / (batch * channels)
        torch.testing.assert_close(loss - least, temperature**2 * divergence)
        order = torch.randperm(positions)
        torch.testing.assert_close(function(student[..., order], teacher[..., order]), loss)
        assert gradient(teacher, teacher, temperature=temperature).abs().max() < 1e-12

    def test_compile_export(self):
        (student, teacher), options = make("temperature")
        function = partial(channel_wise_distillation, teacher=teacher, **options)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        leaf = student.requires_grad_()
        torch.testing.assert_close(compiled(leaf), function(leaf))
        ours, expected = (torch.autograd.grad(f(leaf), leaf)[0] for f in (compiled, function))
        torch.testing.assert_close(ours, expected)

        class Loss(torch.nn.Module):
            def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
                return channel_wise_distillation(student, teacher, **options)

        exported = torch.export.export(Loss(), (student.detach(), teacher))
        torch.testing.assert_close(exported.module()(student.detach(), teacher), function(student).detach())

    # opcheck itself reads .grad of tensors that are no leaves
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
    def test_opcheck(self):
        from visionkernels.ops.channel_wise_distillation.triton import _backward_op, _forward_op

        student, teacher = torch.randn(3, 50, device=DEVICE), torch.randn(3, 50, device=DEVICE)
        torch.library.opcheck(_forward_op, (student.requires_grad_(), teacher, 2.0))
        arguments = (torch.ones((), device=DEVICE), student.detach(), teacher, torch.rand(4, 3, device=DEVICE), 2.0)
        torch.library.opcheck(_backward_op, arguments)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"student": torch.ones(2, 3, 4).long()}, TypeError, "student is torch.int64; channel_wise_distillation t"),
            ({"teacher": torch.ones(2, 3, 4).bool()}, TypeError, "teacher is torch.bool"),
            (
                {"teacher": torch.ones(2, 3, 4, device="meta")},
                TypeError,
                "teacher is on meta; expected cpu, as student",
            ),
            (
                {"student": torch.ones(2, 3)},
                ValueError,
                r"student has shape \[2, 3\]; expected \[batch, channels, \*sp",
            ),
            ({"student": torch.ones(0, 3, 4)}, ValueError, r"student has shape \[0, 3, 4\].*, at least one of each"),
            ({"student": torch.ones(2, 3, 4, 0)}, ValueError, r"student has shape \[2, 3, 4, 0\]"),
            ({"teacher": torch.ones(2, 3, 5)}, ValueError, r"teacher has shape \[2, 3, 5\]; expected \[2, 3, 4\]"),
            ({"temperature": 0.0}, ValueError, "temperature=0.0 must be a positive number"),
            ({"temperature": float("nan")}, ValueError, "temperature=nan"),
            ({"backend": "cuda"}, ValueError, "backend='cuda' is not a backend"),
            ({"backend": "triton", "teacher": torch.ones(2, 3, 4).double()}, RuntimeError, "not float64"),
        ],
    )
    def test_errors(self, change, error, message):
        arguments = {"student": torch.ones(2, 3, 4), "teacher": torch.ones(2, 3, 4)} | change
        with pytest.raises(error, match=message):
            channel_wise_distillation(**arguments)
