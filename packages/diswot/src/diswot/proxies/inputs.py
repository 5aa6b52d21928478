"""Proxies of how outputs move with inputs: the Jacobian (jacov, EPE-NAS), the neural tangent kernel (TE-NAS), Zen."""

# J [batch, pixels] gradient of the sum of outputs with respect to the images

import math

import numpy as np
import torch
from torch import Tensor, nn

from diswot.observation import read_map

__all__ = ["bn_logvar", "epe_nas", "jacobian", "jacov", "ntk_condition", "zen"]

_SMALL = 1e-5


def jacobian(model: nn.Module, images: Tensor) -> np.ndarray:
    """Return J, a row an image."""
    images = images.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(images).sum(), images)
    return gradient.flatten(1).double().cpu().numpy()


def jacov(rows: np.ndarray) -> float:
    """Return -sum(log(v + 1e-5) + 1 / (v + 1e-5)) over the eigenvalues v of the correlations of J's rows."""
    correlations = _correlations(rows)
    if not np.isfinite(correlations).all():
        return math.nan
    values = np.linalg.eigvalsh(correlations)
    return float(-(np.log(values + _SMALL) + 1 / (values + _SMALL)).sum())


def epe_nas(rows: np.ndarray, labels: Tensor, num_classes: int) -> float:
    """Return how alike J's rows are within classes: with s = sum log(|correlation| + 1e-5) of a class, the sum of |s|.

    With more than 100 classes, the mean difference of the s of two classes, each divided by its rows squared.
    """
    classes = labels.cpu().numpy()
    sums = []
    for number in np.unique(classes):
        logs = np.log(np.abs(_correlations(rows[classes == number])) + _SMALL)
        sums.append(float(logs.sum()) if num_classes <= 100 else float(logs.sum()) / logs.size)
    if num_classes <= 100:
        return float(np.abs(sums).sum())
    pairs = [abs(a - b) for i, a in enumerate(sums) for b in sums[i + 1 :]]
    return float(np.mean(pairs)) if pairs else 0.0


def _correlations(rows: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.atleast_2d(np.corrcoef(rows))


def ntk_condition(model: nn.Module, images: Tensor) -> float:
    """Return largest / smallest eigenvalue of the Gram matrix of the images' gradients; high ones are bad.

    Each gradient is of one image's summed logits with respect to the parameters called "weight", after one forward pass
    of all images. Infinity for a singular matrix.
    """
    parameters = [value for name, value in model.named_parameters() if "weight" in name and value.requires_grad]
    outputs = model(images)
    rows = []
    for output in outputs:
        parts = torch.autograd.grad(output.sum(), parameters, retain_graph=True, allow_unused=True)
        rows.append(torch.cat([part.flatten() for part in parts if part is not None]))
    gradients = torch.stack(rows).double()
    if not gradients.isfinite().all():
        return math.nan
    values = torch.linalg.eigvalsh(gradients @ gradients.T)
    smallest = float(values[0])
    return float(values[-1]) / smallest if smallest > 0 else math.inf


def zen(model: nn.Module, images: Tensor, noise: Tensor, *, gamma: float = 1e-2) -> float:
    """Return log mean_b sum |f(x) - f(x + gamma e)| + the sum over norms of log sqrt(mean running variance) (Zen-NAS).

    f is the map before pooling, in training mode; x and e are normal noise, and weights are drawn from N(0, 1).
    """
    model.train()
    first = read_map(model, images)
    second = read_map(model, images + gamma * noise)
    difference = (first - second).abs().flatten(1).sum(1).mean()
    return float(difference.log()) + _log_deviations(model)


def bn_logvar(model: nn.Module, images: Tensor) -> float:
    """Return the norms' part of `zen` after one forward pass; a file of the official code calls this "diswot"."""
    model.train()
    read_map(model, images)
    return _log_deviations(model)


def _log_deviations(model: nn.Module) -> float:
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return sum(float(norm.running_var.mean().sqrt().log()) for norm in norms if norm.running_var is not None)
