"""Export of training steps with filtered gradients, for runtimes that train on a device."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradfilter.conversion import convert
from visionkernels.files import replace_file
from visionkernels.ops.filtered_conv import Radius

__all__ = ["TrainingGraph", "export_training_graph", "training_graph"]


class TrainingGraph(nn.Module):
    """A model with its loss, from images and labels to the mean cross-entropy."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor]:
        """Return the loss alone."""
        return (F.cross_entropy(self.model(images), labels),)


def training_graph(
    model: nn.Module, images: Tensor, *, last_n: int, radius: Radius = 2
) -> torch.export.ExportedProgram:
    """Convert `model` in place, and return its forward and backward pass as one exported program of core ATen ops.

    Its outputs are the loss and the gradients that `graph_signature.backward_signature` names. Norms use their running
    statistics, and activations are not lean: the runtime plans its own memory. Raises ValueError as `convert`.
    """
    from torch.export.experimental import _export_forward_backward

    convert(
        model, radius, last_n=last_n, example_input=images, train_norm="none", lean_activations=False, exportable=True
    )
    labels = torch.zeros(len(images), dtype=torch.long)
    program = torch.export.export(TrainingGraph(model.eval()), (images, labels))
    return _export_forward_backward(program)


def export_training_graph(
    model: nn.Module, images: Tensor, path: Path, *, last_n: int, radius: Radius = 2, overwrite: bool = False
) -> list[str]:
    """Write `training_graph` as a .pt2 file and return the names of the parameters whose gradients it outputs."""
    program = training_graph(model, images, last_n=last_n, radius=radius)
    with replace_file(path, overwrite=overwrite) as temporary, temporary.open("wb") as file:
        torch.export.save(program, file)
    signature = program.graph_signature.backward_signature
    assert signature is not None
    return [name.removeprefix("model.") for name in signature.gradients_to_parameters.values()]
