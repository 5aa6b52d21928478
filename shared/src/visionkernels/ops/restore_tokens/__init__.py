"""The input of a masked autoencoder's decoder: visible tokens at their patches, the mask token elsewhere (MAE)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from visionkernels.checks import InputError
from visionkernels.ops._checks import check_devices, check_floating, check_index, check_range, is_readable
from visionkernels.ops._dispatch import Backend, choose_backend, implementation, without_autocast

__all__ = ["restore_tokens"]


def restore_tokens(
    visible: Float[Tensor, "batch visible_tokens channels"],
    mask_token: Float[Tensor, " channels"],
    positions: Float[Tensor, "tokens channels"],
    ids_restore: Int[Tensor, "batch patches"],
    *,
    backend: Backend = "auto",
) -> Float[Tensor, "batch tokens channels"]:
    r"""Put visible tokens back at their patches, fill the others with the mask token, and add positions (MAE, sec. 3).

    `visible` holds the class token and K visible patches, `positions` one row for the class token and each of the L
    patches. With r = ids_restore[b, i] in [0, L),

        out[b, 0]     = visible[b, 0] + positions[0]
        out[b, 1 + i] = (visible[b, 1 + r] if r < K else mask_token) + positions[1 + i].

    Each row of `ids_restore` is a permutation: patch i was the r-th of the shuffled patches, of which the first K were
    kept. The output has the dtype that `visible`, `mask_token` and `positions` promote to; additions are float32
    (float64 for float64 input), under autocast too. `ids_restore` is not differentiable. Triton is deterministic in
    backward, as eager is on a CPU, and has no second derivative.

    Raises TypeError for dtypes and devices, ValueError for shapes that disagree, K outside [1, L], and rows of
    `ids_restore` that are no permutation of 0 ... L - 1 (on a GPU: a device-side assertion), RuntimeError for
    `backend="triton"` where it cannot run.
    """
    _check_tokens(visible, mask_token, positions)
    _check_ids(ids_restore, visible, len(positions) - 1)
    chosen = choose_backend("restore_tokens", backend, visible, mask_token, positions)
    with without_autocast(visible):
        return implementation(__name__, chosen).restore_tokens(visible, mask_token, positions, ids_restore)


def _check_tokens(visible: Tensor, mask_token: Tensor, positions: Tensor) -> None:
    check_floating("restore_tokens", "tokens", visible=visible, mask_token=mask_token, positions=positions)
    check_devices(visible=visible, mask_token=mask_token, positions=positions)
    if visible.ndim != 3 or not visible.shape[2]:
        raise InputError(f"visible has shape {list(visible.shape)}; expected [batch, 1 + visible patches, channels]")
    channels = visible.shape[2]
    if mask_token.shape != (channels,):
        raise InputError(f"mask_token has shape {list(mask_token.shape)}; expected [{channels}], the channels")
    if positions.ndim != 2 or positions.shape[1] != channels:
        raise InputError(f"positions has shape {list(positions.shape)}; expected [1 + patches, {channels}]")
    patches, kept = len(positions) - 1, visible.shape[1] - 1
    if not 1 <= kept <= patches:
        raise InputError(
            f"visible has {kept} patches after the class token, and positions {patches}; expected 1 to {patches}"
        )


def _check_ids(ids_restore: Tensor, visible: Tensor, patches: int) -> None:
    check_index("ids_restore", ids_restore)
    check_devices(visible=visible, ids_restore=ids_restore)
    if ids_restore.shape != (len(visible), patches):
        raise InputError(f"ids_restore has shape {list(ids_restore.shape)}; expected [{len(visible)}, {patches}]")
    check_range("ids_restore", ids_restore, patches)
    if is_readable(ids_restore):
        is_named = torch.zeros_like(ids_restore, dtype=torch.bool).scatter_(1, ids_restore.long(), True).all()
        if not ids_restore.is_cpu:
            torch._assert_async(is_named)
        elif not is_named:
            raise InputError(f"ids_restore has a row that names a patch twice; expected permutations of {patches}")
