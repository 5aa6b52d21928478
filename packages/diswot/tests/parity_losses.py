"""Golden cases of the losses: kinds "losses", "crd", "relation" and "semantic"."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from diswot import losses
from diswot.losses.contrastive import CRD, contrastive_loss
from diswot.losses.stages import VariationalRegressor
from diswot.similarity import relation_loss, semantic_loss
from visionkernels.testing.golden import Case, compare_case, make_inputs, recipe_weights

__all__ = ["KINDS", "run"]


def run(case: Case, stored: Mapping[str, np.ndarray]) -> list[str]:
    """Return the mismatches of one case; a kind that is none of `KINDS` is one."""
    if case["kind"] not in KINDS:
        return [f"no runner for kind {case['kind']!r}"]
    return compare_case(case, stored, KINDS[case["kind"]](case))


def _similarity(case: Case, loss: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
    inputs = make_inputs(case)
    student = inputs["student"].requires_grad_()
    value = loss(student, inputs["teacher"])
    (grad,) = torch.autograd.grad(value, student)
    return {"loss": value, "score": -value, "grad_student": grad}


def _losses(case: Case) -> dict[str, Tensor]:
    tensors = _Tensors(case)
    outputs: dict[str, Tensor] = {}
    for name in case["outputs"]:
        # an entry's gradients come with it
        if name not in outputs and "_grad" not in name:
            students, value = tensors.compute(name)
            outputs[name] = value
            grads = torch.autograd.grad(value, students)
            outputs |= {f"{name}_grad{i}": grad for i, grad in enumerate(grads)}
    return outputs


class _Tensors:
    """The inputs that a case of kind "losses" describes, each drawn from its own seed."""

    def __init__(self, case: Case) -> None:
        config = case["config"]
        self.seed, self.batch, self.num_samples = config["seed"], config["b"], config.get("n_data", 500)
        sides = list(zip(config["C"], config["H"], strict=True))
        # sizes that the configuration leaves out are those of the gradients
        shapes = {name: output["shape"] for name, output in case["outputs"].items()}
        vector = next((shape for name, shape in shapes.items() if name in ("cc_grad0", "rkd_grad0", "pkt_grad0")), [64])
        scores_shape = shapes.get("crd_contrast_grad0", (self.batch, 17, 1))
        self.student_maps = [self._normal(i, channels, side, side) for i, (channels, side) in enumerate(sides)]
        self.teacher_maps = [self._normal(10 + i, channels, side, side) for i, (channels, side) in enumerate(sides)]
        self.small_maps = [
            self._normal(40 + i, channels, side // 2, side // 2) for i, (channels, side) in enumerate(sides)
        ]
        self.logits = [self._normal(20 + i, config["num_classes"], scale=3) for i in range(2)]
        self.vectors = [self._normal(22 + i, vector[-1]) for i in range(2)]
        scores = np.random.RandomState(self.seed + 30).random_sample(scores_shape) + 0.1
        self.scores = torch.from_numpy(scores.astype(np.float32))

    def _normal(self, offset: int, *axes: int, scale: float = 1) -> Tensor:
        draw = np.random.RandomState(self.seed + offset).standard_normal((self.batch, *axes))
        return torch.from_numpy((scale * draw).astype(np.float32))

    def compute(self, entry: str) -> tuple[list[Tensor], Tensor]:
        """Return the student's tensors and the loss of one entry."""
        if entry == "crd_contrast":
            scores = self.scores.requires_grad_()
            return [scores], contrastive_loss(scores[..., 0], self.num_samples)
        if entry == "vid":
            return self._vid()
        distiller = _distiller(entry)
        student, teacher = self._features(entry, distiller)
        leaves = [student] if isinstance(student, Tensor) else list(student)
        for leaf in leaves:
            leaf.requires_grad_()
        return leaves, distiller(student, teacher)

    def _vid(self) -> tuple[list[Tensor], Tensor]:
        student, teacher = self.student_maps[1].requires_grad_(), self.teacher_maps[1]
        regressor = _with_recipe(VariationalRegressor(student.shape[1], teacher.shape[1]), "vid.")
        return [student], regressor(student, teacher)

    def _features(self, entry: str, distiller: losses.Distiller) -> tuple[losses.Features, losses.Features]:
        if entry.startswith(("hint", "ft")):
            return self.student_maps[1], self.teacher_maps[1]
        match distiller.source:
            case "logits":
                return self.logits[0], self.logits[1]
            case "pooled":
                return self.vectors[0], self.vectors[1]
            case "last_map":
                return self.student_maps[2], self.teacher_maps[2]
        return self.student_maps, self.small_maps if entry.endswith("poolstudent") else self.teacher_maps


def _distiller(entry: str) -> losses.Distiller:
    """Return the loss that an entry names, such as kd_T4, ft_p2, at_poolstudent or unified_batch_kl."""
    name, _, detail = entry.partition("_")
    if name == "kd":
        return losses.create("kd", temperature=float(detail.removeprefix("T")))
    if name == "ft":
        return losses.create("ft", p=int(detail.removeprefix("p") or 1))
    if name == "unified":
        return losses.create("unified", mode=detail.replace("_bug", "_cross"))
    return losses.create({"pearson": "pearson_interclass"}.get(name, name))


def _with_recipe(module: nn.Module, prefix: str = "", kept: tuple[str, ...] = ()) -> nn.Module:
    state = {prefix + key: value for key, value in module.state_dict().items()}
    generated = recipe_weights(state, kept)
    module.load_state_dict({key.removeprefix(prefix): value for key, value in generated.items()})
    return module


def _crd(case: Case) -> dict[str, Tensor]:
    config = case["config"]
    seed, batch, num_samples, num_negatives = (config[key] for key in ("seed", "b", "n_data", "nce_k"))
    draw = [np.random.RandomState(seed + i).standard_normal((batch, config[f"{'st'[i]}_dim"])) for i in range(2)]
    student, teacher = (torch.from_numpy(each.astype(np.float32)) for each in draw)
    random = np.random.RandomState(seed + 2)
    index = torch.from_numpy(random.permutation(num_samples)[:batch])
    contrast_index = torch.from_numpy(random.randint(0, num_samples, (batch, num_negatives + 1)))
    contrast_index[:, 0] = index
    distiller = CRD(
        config["s_dim"], config["t_dim"], num_samples, width=config["feat_dim"], num_negatives=num_negatives,
        temperature=config["nce_t"], momentum=config["nce_m"],
    )  # fmt: skip
    _with_recipe(distiller, kept=tuple(case["kept_buffers"]))
    student.requires_grad_()
    first = distiller(student, teacher, index, contrast_index)
    (grad,) = torch.autograd.grad(first, student)
    second = distiller(student, teacher, index, contrast_index)
    after = {f"{name}_after": getattr(distiller.contrast, name) for name in ("params", "memory_v1", "memory_v2")}
    return {"loss1": first, "grad_student": grad, "loss2": second, **after}


KINDS: dict[str, Callable[[Case], dict[str, Tensor]]] = {
    "losses": _losses,
    "crd": _crd,
    "relation": lambda case: _similarity(case, relation_loss),
    "semantic": lambda case: _similarity(case, semantic_loss),
}
