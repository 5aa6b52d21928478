"""What holds for every loss between a student and a teacher; what is special to one stands in its own file."""

from functools import partial
from importlib import import_module

import pytest
import torch
from torch import Tensor

from visionkernels.ops.channel_wise_distillation import channel_wise_distillation
from visionkernels.ops.feature_smooth_l1 import feature_smooth_l1
from visionkernels.ops.nkd_loss import nkd_loss
from visionkernels.testing.ops import BACKENDS, DEVICE, check_backend, check_compiled, gradients, over_backends

CASES = {
    # loss, shape of student and teacher, options
    "cwd-map": (channel_wise_distillation, (2, 3, 6, 7), {}),
    "cwd-temperature": (channel_wise_distillation, (2, 3, 6, 7), {"temperature": 4.0}),
    "cwd-cold": (channel_wise_distillation, (2, 3, 6, 7), {"temperature": 0.25}),
    "cwd-one-position": (channel_wise_distillation, (2, 3, 1), {}),
    "cwd-one-row": (channel_wise_distillation, (1, 1, 4099), {"temperature": 2.0}),
    "cwd-volume": (channel_wise_distillation, (1, 5, 3, 5, 7), {}),
    "smooth-l1-tokens": (feature_smooth_l1, (2, 5, 24), {}),
    "smooth-l1-sharp": (feature_smooth_l1, (2, 5, 24), {"beta": 0.3}),
    "smooth-l1-eps": (feature_smooth_l1, (3, 7), {"eps": 0.5}),
    "smooth-l1-one-channel": (feature_smooth_l1, (4, 1), {}),
    "smooth-l1-one-row": (feature_smooth_l1, (37,), {"beta": 1.0}),
    "smooth-l1-many-rows": (feature_smooth_l1, (73, 63), {}),
    "smooth-l1-wide": (feature_smooth_l1, (2, 4099), {}),
    "nkd-plain": (nkd_loss, (6, 12), {}),
    "nkd-tempered": (nkd_loss, (6, 12), {"alpha": 1.5, "temperature": 2.0}),
    "nkd-cold": (nkd_loss, (3, 7), {"temperature": 0.25}),
    "nkd-label-only": (nkd_loss, (5, 9), {"alpha": 0.0}),
    "nkd-two-classes": (nkd_loss, (5, 2), {"temperature": 3.0}),
    "nkd-one-sample": (nkd_loss, (1, 31), {}),
    "nkd-many-classes": (nkd_loss, (2, 2311), {"temperature": 4.0}),
}
TYPICAL = ["cwd-temperature", "smooth-l1-sharp", "nkd-tempered"]
PLAIN = ["cwd-map", "smooth-l1-tokens", "nkd-plain"]
every_backend = pytest.mark.parametrize("backend", ["reference", *BACKENDS])


def make(case, dtype=torch.float32):
    """Return the loss with its options, the student's tensor, and those that follow it."""
    loss, shape, options = CASES[case]
    student, teacher = (torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype) for _ in range(2))
    labels = []
    if loss is nkd_loss:
        labels = [torch.randint(shape[1], shape[:1], device=DEVICE)]
        labels[0][0] = shape[1] - 1
    return partial(loss, **options), 2 * student, [3 * teacher + 1, *labels]


def gradient(loss, student: Tensor, *others: Tensor, **options: object) -> Tensor:
    return gradients(lambda leaf: loss(leaf, *others, **options), [student])[0]


class TestLosses:
    @over_backends(CASES, half=[*TYPICAL, *PLAIN])
    def test_reference(self, backend, case, dtype):
        loss, student, (teacher, *labels) = make(case, dtype)

        def run(student: Tensor, backend: str) -> Tensor:
            """Return the loss times up to 256, so that gradients are not far below one, in the student's dtype."""
            out = loss(student, teacher.to(student.dtype), *labels, backend=backend)
            return (out * min(student.numel(), 256)).to(student.dtype)

        check_backend(partial(run, backend=backend), partial(run, backend="reference"), [student])

    @every_backend
    @pytest.mark.parametrize("case", PLAIN)
    def test_mixed_dtypes(self, case, backend):
        """The loss is float32, the gradient has the student's dtype, and the teacher has none."""
        loss, student, (teacher, *labels) = make(case)
        for ours, theirs in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
            leaf, target = (x.detach().to(d).requires_grad_() for x, d in ((student, ours), (teacher, theirs)))
            out = loss(leaf, target, *labels, backend=backend)
            out.backward()
            assert out.dtype == torch.float32 and leaf.grad.dtype == ours and target.grad is None
            torch.testing.assert_close(out, loss(leaf.float(), target.float(), *labels, backend="reference"))
        if backend != "triton":
            assert loss(student, teacher.double(), *labels, backend=backend).dtype == torch.float64

    @every_backend
    @pytest.mark.parametrize("case", TYPICAL)
    def test_autocast(self, case, backend):
        loss, *inputs = make(case)
        expected = gradient(loss, inputs[0], *inputs[1], backend=backend)
        with torch.autocast(DEVICE, torch.bfloat16):
            torch.testing.assert_close(gradient(loss, inputs[0], *inputs[1], backend=backend), expected)

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("case", PLAIN)
    def test_strides(self, case, backend):
        """Transposed and sliced maps, an expanded teacher, every other label."""
        loss, student, (teacher, *labels) = make(case)
        every_other = [torch.stack([each, 0 * each], 1)[:, 0] for each in labels]
        last = student.shape[-1]
        for change in (lambda x: x.mT.contiguous().mT, lambda x: torch.cat([x, x], -1)[..., :last]):
            ours = gradient(loss, change(student), change(teacher), *every_other, backend=backend)
            torch.testing.assert_close(ours, gradient(loss, student, teacher, *labels, backend=backend))
        shared = teacher[:1].expand_as(teacher)
        expected = gradient(loss, student, shared.contiguous(), *labels, backend=backend)
        torch.testing.assert_close(gradient(loss, student, shared, *labels, backend=backend), expected)

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("case", PLAIN)
    def test_twice(self, case, backend):
        """Backward can run again on a kept graph, scales by the incoming gradient and is the same to the bit."""
        loss, student, others = make(case)
        out = loss(student.requires_grad_(), *others, backend=backend)
        once, again, triple = (torch.autograd.grad(k * out, student, retain_graph=True)[0] for k in (1, 1, 3))
        assert torch.equal(once, again)
        torch.testing.assert_close(triple, 3 * once)

    @every_backend
    @pytest.mark.parametrize("case", TYPICAL)
    def test_no_grad(self, case, backend):
        loss, student, others = make(case)
        expected = loss(student.requires_grad_(), *others, backend=backend).detach()
        for leaf in (student, student.detach()):
            with torch.no_grad():
                out = loss(leaf, *others, backend=backend)
            torch.testing.assert_close(out, expected)
            assert not out.requires_grad

    @pytest.mark.parametrize(("case", "backend"), [(case, "triton") for case in PLAIN] + [("cwd-map", "eager")])
    def test_no_second_derivative(self, case, backend):
        loss, student, others = make(case)
        out = loss(student.requires_grad_(), *others, backend=backend)
        (grad,) = torch.autograd.grad(out, student, create_graph=True)
        with pytest.raises(RuntimeError):
            grad.sum().backward()

    @pytest.mark.parametrize("backend", ["reference", "eager"])
    @pytest.mark.parametrize("case", [*PLAIN, *TYPICAL, "cwd-volume", "smooth-l1-eps", "nkd-two-classes"])
    def test_gradcheck(self, case, backend):
        loss, student, others = make(case, torch.float64)
        leaves = [student.requires_grad_()]
        assert torch.autograd.gradcheck(lambda leaf: loss(leaf, *others, backend=backend), leaves, fast_mode=True)

    @pytest.mark.parametrize("case", TYPICAL)
    def test_compile_export(self, case):
        loss, student, others = make(case)
        check_compiled(lambda leaf: loss(leaf, *others), [student])

    # opcheck itself reads .grad of tensors that are no leaves
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
    @pytest.mark.parametrize(
        ("name", "others", "statistics", "numbers"),
        [
            ("channel_wise_distillation", 1, [(4, 6)], (2.0,)),
            ("feature_smooth_l1", 1, [], (2.0, 1e-6)),
            ("nkd_loss", 2, [(6, 6)], (1.5, 2.0)),
        ],
    )
    def test_opcheck(self, name, others, statistics, numbers):
        """The registered operators, all of which take rows."""
        kernels = import_module(f"visionkernels.ops.{name}.triton")
        _, student, tensors = make("nkd-plain")
        torch.library.opcheck(kernels._forward_op, (student.requires_grad_(), *tensors[:others], *numbers))
        kept = [torch.rand(shape, device=DEVICE) for shape in statistics]
        arguments = (torch.ones((), device=DEVICE), student.detach(), *tensors[:others], *kept, *numbers)
        torch.library.opcheck(kernels._backward_op, arguments)
