"""Operations and kept activations of the backward pass of a convolution, exact and filtered (sec. 3)."""

from dataclasses import dataclass

from gradfilter.conv import pads_to_same
from gradfilter.trace import Call
from visionkernels.ops.filtered_conv import Radius, check_radius, grid_size

__all__ = ["LayerCost", "layer_cost", "layer_coverage"]


@dataclass(frozen=True)
class LayerCost:
    """Cost of one convolution, for the batch that it was traced with."""

    saved_elements: int
    """Elements of the input that the convolution keeps for backward."""
    flops: int
    """Operations of the gradients of weight and input; a multiply-add counts as 2."""


def layer_cost(call: Call, radius: Radius | None) -> LayerCost:
    """Return the cost of backward with patches of `radius` outputs; None is exact.

    The filtered count covers both products on the cells, the sum of the kernel, and the two averages.
    """
    conv, (batch, in_channels, height, width) = call.module, call.input_size
    _, out_channels, out_height, out_width = call.output_size
    weights = out_channels * (in_channels // conv.groups)
    taps = conv.kernel_size[0] * conv.kernel_size[1]
    inputs, outputs = batch * in_channels * height * width, batch * out_channels * out_height * out_width
    if radius is None:
        return LayerCost(inputs, 4 * batch * weights * taps * out_height * out_width)
    rows, columns = grid_size((out_height, out_width), check_radius(radius))
    return LayerCost(
        batch * in_channels * rows * columns, 4 * batch * weights * rows * columns + weights * taps + outputs + inputs
    )


def layer_coverage(call: Call) -> float:
    """Return the share of (output, tap) pairs that read the map and not zeros around it."""
    conv = call.module
    if conv.padding_mode != "zeros":
        return 1.0
    shares = []
    for axis, (size, outputs) in enumerate(zip(call.input_size[2:], call.output_size[2:], strict=True)):
        kernel, stride, dilation = conv.kernel_size[axis], conv.stride[axis], conv.dilation[axis]
        if pads_to_same(conv) or conv.padding == "same":
            before = max((outputs - 1) * stride + (kernel - 1) * dilation + 1 - size, 0) // 2
        else:
            before = 0 if isinstance(conv.padding, str) else conv.padding[axis]
        reads = [
            0 <= output * stride + tap * dilation - before < size for output in range(outputs) for tap in range(kernel)
        ]
        shares.append(sum(reads) / len(reads))
    return shares[0] * shares[1]
