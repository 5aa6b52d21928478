"""Smooth L1 loss to layer-normalised features of a teacher (G2SD, sec. 3)."""

from jaxtyping import Float
from torch import Tensor

from visionkernels.checks import InputError
from visionkernels.ops._checks import check_alike, check_floating, check_not_negative, check_positive
from visionkernels.ops._dispatch import Backend, choose_backend, implementation, without_autocast

__all__ = ["feature_smooth_l1"]

_MAX_KERNEL_CHANNELS = 8192  # of the longest row that fits into registers


def feature_smooth_l1(
    prediction: Float[Tensor, "*batch channels"],
    hidden: Float[Tensor, "*batch channels"],
    *,
    beta: float = 2.0,
    eps: float = 1e-6,
    backend: Backend = "auto",
) -> Float[Tensor, ""]:
    r"""Compare predicted features with the layer-normalised hidden state of a teacher (G2SD, sec. 3).

    With the mean and the biased variance of `hidden` over its channels,

        e = prediction - (hidden - mean) / sqrt(variance + eps)
        loss = mean over all elements of  e**2 / (2 * beta) if |e| < beta else |e| - beta / 2.

    Computes in float32 (float64 where an input is float64), under autocast too, and returns that dtype. `hidden` may
    have another floating dtype than `prediction`, and gets no gradient. Triton keeps the inputs for backward, takes at
    most 8192 channels and has no second derivative.

    Raises TypeError for dtypes and devices, ValueError for shapes that differ or are empty, a `beta` that is not
    positive and an `eps` below 0, RuntimeError for `backend="triton"` where it cannot run.
    """
    check_floating("feature_smooth_l1", "features", prediction=prediction, hidden=hidden)
    if not prediction.ndim or not prediction.numel():
        raise InputError(f"prediction has shape {list(prediction.shape)}; expected [*batch, channels], none of them 0")
    check_alike(prediction=prediction, hidden=hidden)
    check_positive(beta=beta)
    check_not_negative(eps=eps)
    channels, unsupported = prediction.shape[-1], None
    if channels > _MAX_KERNEL_CHANNELS:
        unsupported = f"rows of {channels} channels exceed the kernels' {_MAX_KERNEL_CHANNELS}"
    chosen = choose_backend("feature_smooth_l1", backend, prediction, hidden, unsupported=unsupported)
    with without_autocast(prediction):
        loss = implementation(__name__, chosen).feature_smooth_l1
        return loss(prediction, hidden.detach(), float(beta), float(eps))
