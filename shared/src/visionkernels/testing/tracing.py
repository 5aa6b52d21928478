"""Extraction of features by torch.fx, as timm's own tests try it on every model that is registered."""

import torch
from timm.models._features_fx import create_feature_extractor, get_notrace_functions, get_notrace_modules
from torch import Tensor, nn
from torchvision.models.feature_extraction import get_graph_node_names

__all__ = ["check_traced"]


def check_traced(model: nn.Module, x: Tensor) -> None:
    """Assert that the graph of `model` in evaluation mode gives its outputs on `x`."""
    model.eval()
    leaves = {"leaf_modules": list(get_notrace_modules()), "autowrap_functions": list(get_notrace_functions())}
    *_, last = get_graph_node_names(model, tracer_kwargs=leaves)[1]
    with torch.no_grad():
        outputs = create_feature_extractor(model, [last])(x)
        torch.testing.assert_close(outputs[last], model(x))
