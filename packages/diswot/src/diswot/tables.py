"""The figures of the paper and its repository as data: counts, rank correlations on S0, and what needs training."""

import tempfile
from functools import cache, partial
from pathlib import Path
from typing import Any

import timm
import torch

import diswot.networks  # noqa: F401 - registers the models
from diswot.data import batches, s0_ground_truth
from diswot.initialisation import Draws, Init
from diswot.networks.counting import count_macs
from diswot.ranking import Agreement, Ranking, rank
from diswot.reports import write_scatter
from diswot.scoring import TeacherCache
from diswot.spaces import S0
from visionkernels.profiling import torch_threads
from visionkernels.tables import DATASET, GPU, SAMPLES, TIME, Cell, Figure, Measured, Need, Table, installed

__all__ = ["figures", "tables"]

SEEDS, BATCH = 9, 64
# parameters, multiply-adds in millions
_COUNTS = {
    "s0_713": (259_892, 50.26),
    "s0_333": (278_324, 40.82),
    "cifar_resnet56": (861_620, 125.75),
    "cifar_resnet110": (1_736_564, 253.16),
    "cifar_resnet32x4": (7_433_860, 1083.04),
    "cifar_wrn_16_2": (703_284, None),
    "cifar_vgg8": (3_965_028, None),
    "cifar_mobilenetv2": (812_836, None),
    "cifar_shufflenetv1": (949_258, None),
    "cifar_shufflenetv2": (1_355_528, None),
    "zen_cifar_res32_05m": (546_636, 136.35),
    "zen_cifar_res32_1m": (1_040_844, 159.50),
    "zen_cifar_res32_2m": (2_027_980, 481.82),
    "diswot_imagenet_res18_7m": (7_310_264, 1445.65),
    "nb201_diswot": (864_276, 121.82),
    "nb201_ea": (1_294_356, 184.74),
}
# Kendall with distilled and with vanilla accuracy on all 64 networks, from the repository's plots
_REPOSITORY = {"diswot": (0.710, None), "fisher": (0.63, 0.81), "nwot": (0.32, 0.40), "snip": (0.67, 0.85)}
# teacher: top-1 of distilled ResNet-20, of DisWOT's student, and of that student with the terms as losses too
_TEACHERS = {
    "ResNet-32": (70.24, 71.01, 71.85),
    "ResNet-44": (70.56, 71.25, 72.12),
    "ResNet-56": (70.98, 71.63, 72.56),
    "ResNet-110": (70.79, 71.84, 72.92),
}
_NASBENCH201 = {
    "random search": 71.28, "reinforcement learning": 71.71, "BOHB": 70.84, "DARTS": 66.24, "GDAS": 70.70,
    "NWOT": 73.31, "TE-NAS": 71.24, "DisWOT": 74.21, "DisWOT, relation alone": 73.62,
}  # fmt: skip
_ORDERS = ("semantic", "relation", "channel", "rank", "correlation", "semantic+correlation", "correlation+params",
           "params", "flops", "snip", "grad_norm", "fisher", "nwot")  # fmt: skip
_FORWARD_ONLY = ("diswot", "semantic", "relation", "channel", "rank", "correlation", "semantic+correlation",
                 "correlation+params", "params", "flops")  # fmt: skip
_INITS: tuple[Init, ...] = ("kaiming", "gaussian")
_BENCHMARK = Need("the NAS-Bench-201 file (diswot rank --space nasbench201 --truth FILE)")
_PLOTS = installed("matplotlib", pip="diswot[plots]")


def tables() -> list[Table]:
    """Return all tables."""
    return [_counts(), _s0(), _sources(), _students(), _teachers(), _nasbench201()]


def figures() -> list[Figure]:
    """Return the figures of `diswot reproduce`."""
    caption = (
        "32 networks of S0: scores without training, nine seeds, against CIFAR-100 accuracy after distillation as the "
        "official repository published it."
    )
    return [Figure("s0", "Orders of S0 against measured accuracies", caption, _draw)]


def _counts() -> Table:
    cells = []
    for name, (params, macs) in _COUNTS.items():
        command = f"diswot proxies {name} --names params,flops"
        cells.append(Cell(row=name, column="parameters", paper=params, digits=0, tolerance=0, command=command,
                          measure=partial(_params, name)))  # fmt: skip
        if macs is not None:
            cells.append(Cell(row=name, column="multiply-adds, M", paper=macs, digits=2, tolerance=0.005,
                              command=command, measure=partial(_macs, name)))  # fmt: skip
    convention = (
        "100 classes (ImageNet's structure: 1000), one image. Convolutions and linear layers, one addition an output "
        "for a bias; the reference is what the official code counts."
    )
    return Table("counts", "Parameters and multiply-adds", convention, tuple(cells))


@cache
def _network(name: str) -> Any:
    with torch.device("meta"):
        return timm.create_model(name)


def _params(name: str) -> float:
    return float(sum(weight.numel() for weight in _network(name).parameters()))


def _macs(name: str) -> float:
    network = _network(name)
    return count_macs(network, network.default_cfg["input_size"]) / 1e6


@cache
def ranking(init: Init, draws: Draws, teacher: str, data: str, orders: tuple[str, ...]) -> Ranking:
    """Return the ranking of the 32 networks of S0 whose accuracies are known."""
    space = S0()
    with torch_threads(1):
        samples = batches(data, SEEDS, BATCH)
        cache_ = TeacherCache(timm.create_model(teacher), samples, SEEDS, init, key=teacher, draws=draws)
        return rank({key: space.build(key) for key in s0_ground_truth()}, cache_, orders)


@cache
def _agreements(
    kind: str, init: Init, draws: Draws, teacher: str, data: str, orders: tuple[str, ...]
) -> dict[str, Agreement]:
    rows = ranking(init, draws, teacher, data, orders).agreements(s0_ground_truth(kind))
    return {row.proxy: row for row in rows}


def _kendall(order: str, kind: str = "distilled", init: Init = "kaiming", draws: Draws = "shared",
             teacher: str = "cifar_resnet56", data: str = "patches") -> Measured:  # fmt: skip
    orders = _FORWARD_ONLY if order in _FORWARD_ONLY else _ORDERS
    row = _agreements(kind, init, draws, teacher, data, orders)[order]
    note = f"95 %: {row.kendall_low:.2f} to {row.kendall_high:.2f}; given parameters {row.kendall_given_params:.2f}"
    return Measured(row.kendall, note=note)


def _s0() -> Table:
    """Return a row per order with the defaults of `diswot rank`, then with the paper's initialisation and draws."""
    cells = []
    for order in ("diswot", *_ORDERS):
        distilled, vanilla = _REPOSITORY.get(order, (None, None))
        needs = (SAMPLES,) if order in _FORWARD_ONLY else (SAMPLES, TIME)
        for column, paper, kind in (
            ("Kendall, distilled", distilled, "distilled"),
            ("Kendall, vanilla", vanilla, "vanilla"),
        ):
            cells.append(
                Cell(row=order, column=column, paper=paper, digits=3, tolerance=0.05, better="higher",
                     measure=partial(_kendall, order, kind), needs=needs, command=f"diswot rank --proxies {order}")
            )  # fmt: skip
    for order in ("semantic", "channel", "rank", "correlation"):
        for init in _INITS:
            cells.append(
                Cell(row=f"{order}, {init}, draws of their own", column="Kendall, distilled", paper=None, digits=3,
                     tolerance=0.05, measure=partial(_kendall, order, "distilled", init, "own"), needs=(SAMPLES, TIME),
                     command=f"diswot rank --proxies {order} --init {init} --draws own")
            )  # fmt: skip
    convention = (
        "32 networks of S0 with published accuracy on CIFAR-100; the repository's figures are of all 64 and of other "
        f"batches. Teacher ResNet-56, {BATCH} patches of photographs, means of {SEEDS} seeds. correlation, a+b and "
        "shared draws are ours."
    )
    return Table("s0", "How far to trust a score", convention, tuple(cells))


def _sources() -> Table:
    """Return the table for other teachers and other images, where a fitted score would fail."""
    cells = []
    for order in ("semantic", "channel", "correlation", "correlation+params"):
        for teacher, data in (("cifar_resnet20", "patches"), ("cifar_resnet110", "patches"),
                              ("cifar_wrn_40_1", "patches"), ("cifar_resnet56", "mnist5k"),
                              ("cifar_resnet56", "noise")):  # fmt: skip
            cells.append(
                Cell(row=order, column=f"{teacher}, {data}", paper=None, digits=3, tolerance=0.05,
                     measure=partial(_kendall, order, "distilled", "kaiming", "shared", teacher, data),
                     needs=(SAMPLES, TIME), command=f"diswot rank --proxies {order} --teacher {teacher} --data {data}")
            )  # fmt: skip
    convention = f"Kendall with distilled accuracy on the 32 networks, kaiming, shared draws, {SEEDS} seeds."
    return Table("sources", "Other teachers, other images", convention, tuple(cells))


def _students() -> Table:
    cells = [
        Cell(row=row, column="top-1 %", paper=None, digits=2, tolerance=1.0, needs=(SAMPLES, TIME),
             measure=partial(_distilled, row),
             command="diswot search --budget params=200K; diswot train mnist5k_kd --student KEY --out RUN")
        for row in ("best of the search", "random")
    ]  # fmt: skip
    convention = (
        "MNIST-5k, students of S0 within 200 thousand parameters, distilled from one trained teacher by mnist5k_kd; "
        "mean and spread of five seeds. The random student differs by seed."
    )
    return Table("students", "The best student of the search beside random ones", convention, tuple(cells))


@cache
def _accuracies() -> dict[str, list[float]]:
    import numpy as np

    from diswot.budget import Budget
    from diswot.recipes import RECIPES
    from diswot.searching import search
    from diswot.training import compare_students

    space, budget = S0(), Budget(params=200_000)
    teacher, batches_ = timm.create_model("cifar_resnet56"), batches("patches", 9, BATCH)
    first, final = (TeacherCache(teacher, batches_[:n], n, "kaiming", draws="shared") for n in (3, 9))
    result = search(space, first, final=final, budget=budget, algorithm="random", evaluations=200)
    within = [candidate.key for candidate in result.candidates]
    random = np.random.default_rng(0).choice(within[1:], 5, replace=False).tolist()
    recipe, accuracies = RECIPES["mnist5k_kd"], {}
    with tempfile.TemporaryDirectory() as folder:
        for name, keys in (("best of the search", [result.best.key] * 5), ("random", random)):
            accuracies[name] = [
                compare_students(
                    {f"{name} {key}": partial(space.build, key, num_classes=10)}, recipe, (seed,), Path(folder) / "runs"
                )[f"{name} {key}"][0]
                for seed, key in enumerate(keys)
            ]
    return accuracies


def _distilled(row: str) -> Measured:
    values = torch.tensor(_accuracies()[row])
    return Measured(float(values.mean()), float(values.std()))


def _teachers() -> Table:
    columns = ("KD ResNet-20", "DisWOT", "DisWOT+")
    cells = [
        Cell(row=teacher, column=column, paper=paper, digits=2, tolerance=0.5, needs=(DATASET, GPU),
             command="diswot train cifar100_kd --out RUN --data DIR --teacher-checkpoint FILE --student s0_713")
        for teacher, row in _TEACHERS.items()
        for column, paper in zip(columns, row, strict=True)
    ]  # fmt: skip
    return Table("teachers", "Students of several teachers", "CIFAR-100, top-1 in percent.", tuple(cells))


def _nasbench201() -> Table:
    cells = [
        Cell(row=name, column="top-1 %", paper=paper, digits=2, tolerance=0.5, needs=(_BENCHMARK,),
             command="diswot search --space nasbench201 --evaluations 1000 --out RUN")
        for name, paper in _NASBENCH201.items()
    ]  # fmt: skip
    return Table("nasbench201", "NAS-Bench-201", "CIFAR-100 accuracy of the best network of the search.", tuple(cells))


def _draw(path: Path) -> None:
    scores = ranking("kaiming", "shared", "cifar_resnet56", "patches", _FORWARD_ONLY)
    write_scatter(path, scores, s0_ground_truth(), overwrite=True)
