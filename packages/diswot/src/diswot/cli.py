"""The command `diswot`: its record, and the verbs that are DisWOT's own."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from visionkernels.checks import InputError, check, check_suffix
from visionkernels.cli import RecipeDefault, run_package, write_result
from visionkernels.files import refuse_existing
from visionkernels.package import Package

if TYPE_CHECKING:
    from diswot.budget import Budget

__all__ = ["PACKAGE", "main"]

Init = Literal["gaussian", "kaiming", "keep"]
Draws = Literal["own", "shared"]
Names = Annotated[str, arg(metavar="NAME,NAME,...")]


def score(
    teacher: Positional[str],
    student: Positional[str],
    *,
    terms: Names = "semantic,relation",
    data: str = "patches",
    batch_size: int = 64,
    size: int = 32,
    num_classes: int = 100,
    seeds: int = 3,
    init: Init = "gaussian",
    feature: str = "auto",
    head: str = "auto",
    project: Literal["none", "pad", "class_gram"] = "none",
    json: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Score a student for a teacher, both untrained; higher is better.

    Args:
        teacher: model of timm (ours are s0_713, cifar_resnet56, ...), torchvision:NAME, or module:callable
        student: the same
        terms: any of semantic, relation, channel, correlation
        data: patches of photographs, mnist5k, noise, or a folder of images
        batch_size: images per batch
        size: height and width in pixels
        num_classes: classes of both networks
        seeds: draws of weights and batch to average over
        init: gaussian as in the official code, kaiming, or keep
        feature: module whose output is the last map
        head: the linear classifier
        project: for classifiers of unequal width: pad, or compare classes (class_gram)
        json: write the result here as well
        overwrite: replace an existing output
    """
    from diswot.observation import Reading
    from diswot.scoring import TeacherCache

    refuse_existing(json, overwrite)
    networks = [_network(name, num_classes) for name in (teacher, student)]
    batches = _batches(data, seeds, batch_size, size, num_classes)
    cache = TeacherCache(networks[0], batches, seeds, init, Reading(feature, head))
    result = cache.score(networks[1], key=student, terms=_listed(terms), project=project)
    write_result(json, {"teacher": teacher, "student": student, **asdict(result)}, overwrite=overwrite)
    for name, value in result.terms.items():
        print(f"{name}: {value:.6g}")
    spread = f" ± {result.stderr:.2g} over {seeds} seeds" if seeds > 1 else ""
    print(f"total: {result.total:.6g}{spread}, {result.seconds:.2f} s")


def proxies(
    model: Positional[str],
    *,
    names: Names = "",
    data: str = "patches",
    batch_size: int = 64,
    size: int = 32,
    num_classes: int = 100,
    seed: int = 0,
    init: Init = "kaiming",
    json: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Print the zero-cost proxies of one untrained network.

    Args:
        model: of timm, torchvision:NAME, or module:callable
        names: which ones; default: all
        data: patches of photographs, mnist5k, noise, or a folder of images
        batch_size: images per batch
        size: height and width in pixels
        num_classes: classes of the network
        seed: seed of weights and batch
        init: gaussian, kaiming, or keep
        json: write the figures here as well
        overwrite: replace an existing output
    """
    from diswot import proxies as zero_cost

    refuse_existing(json, overwrite)
    network = _network(model, num_classes)
    batch = _batches(data, 1, batch_size, size, num_classes)[0]
    values: dict[str, float] = {}
    for name in _listed(names) or zero_cost.names():
        try:
            values |= zero_cost.compute(name, network, *batch, init=init, seed=seed, key=model)
        except ValueError as error:
            if names:
                raise
            print(f"{name}: {error}", file=sys.stderr)
    write_result(json, {"model": model, **values}, overwrite=overwrite)
    for name, value in values.items():
        print(f"{name}: {value:.6g}")


def rank(
    *,
    space: str = "s0",
    keys: Names = "",
    budget: str = "",
    teacher: str = "cifar_resnet56",
    proxies: Names = "diswot,semantic,relation,channel,rank,correlation,correlation+params,snip,params",
    truth: str = "auto",
    seeds: int = 9,
    init: Init = "kaiming",
    draws: Draws = "shared",
    data: str = "patches",
    batch_size: int = 64,
    num_classes: int = 100,
    jobs: int = 1,
    json: Path | None = None,
    csv: Path | None = None,
    plot: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Order the networks of a space by scores, and measure how each order agrees with real accuracies.

    Args:
        space: a search space, see `diswot info`
        keys: only these networks; default: those with known accuracies, or the whole space
        budget: only networks within it, such as params=300K,macs=50M
        teacher: model of timm, torchvision:NAME, or module:callable
        proxies: diswot (semantic + relation), semantic, relation, channel, correlation, rank and zscore (of semantic
            and channel), any zero-cost proxy, or a+b, which adds ranks
        truth: file of accuracies (lines "key accuracy", or a NAS-Bench file); auto: the published ones of s0; none
        seeds: draws of weights and batch to average over
        init: kaiming, gaussian as in the official code, or keep
        draws: students' weights: shared by layers of the same name, or own for every student
        data: patches of photographs, mnist5k, noise, or a folder of images
        batch_size: images per batch
        num_classes: classes of all networks
        jobs: processes; -1: one per core
        json: write scores and correlations here as well
        csv: write the scores here as well
        plot: write a .png, .svg or .pdf that plots each order against the accuracies
        overwrite: replace existing outputs
    """
    from diswot import spaces
    from diswot.budget import Budget
    from diswot.ranking import rank as order
    from diswot.reports import agreement_table, order_table, ranking_json, write_csv, write_scatter
    from diswot.scoring import TeacherCache

    for path in (json, csv, plot):
        refuse_existing(path, overwrite)
    chosen = spaces.create(space)
    known = _truth(truth, chosen)
    wanted = _keys(keys, chosen) or list(known) or list(chosen.enumerate())
    wanted = _within(Budget.parse(budget), {key: _Build(chosen, key, num_classes) for key in wanted}, chosen.input_size)
    has_truth = bool(known) and all(key in known for key in wanted)
    if plot is not None:
        check_suffix("plot", plot, ".png", ".svg", ".pdf")
    if plot is not None and not has_truth:
        raise InputError("--plot needs accuracies of all networks; give --truth FILE")
    batches = _batches(data, seeds, batch_size, chosen.input_size[1], num_classes)
    network = _network(teacher, num_classes)
    cache = TeacherCache(network, batches, seeds, init, key=teacher, draws=draws)
    build = {key: _Build(chosen, key, num_classes) for key in wanted}
    ranking = order(build, cache, _listed(proxies), jobs=jobs)
    agreements = ranking.agreements(known) if has_truth else []
    write_result(json, ranking_json(ranking, agreements), overwrite=overwrite)
    if csv is not None:
        write_csv(csv, ranking, known, overwrite=overwrite)
    if plot is not None:
        write_scatter(plot, ranking, known, overwrite=overwrite)
    print(agreement_table(agreements) if has_truth else order_table(ranking))


def search(
    *,
    teacher: str = "cifar_resnet56",
    space: str = "auto",
    budget: str = "",
    algorithm: Literal["aging", "evolution", "random"] = "aging",
    evaluations: int = 200,
    terms: Names = "correlation",
    combined: Literal["sum", "rank", "zscore"] = "sum",
    project: Literal["none", "pad", "class_gram"] = "pad",
    seeds: int = 3,
    final_seeds: RecipeDefault[int | None] = None,
    init: Init = "kaiming",
    draws: Draws = "shared",
    data: str = "patches",
    batch_size: int | None = None,
    num_classes: int = 100,
    seed: int = 0,
    jobs: int = 1,
    shortlist: int = 10,
    out: Path | None = None,
) -> None:
    """Search a space for students of a teacher within a budget, without training.

    Rerun the same command with --out to resume.

    Args:
        teacher: model of timm, torchvision:NAME, or module:callable
        space: see `diswot info`; auto: s0 for teachers of 32 pixels, else timm's networks of the teacher's kind
        budget: such as params=300K,macs=50M,latency=20 (milliseconds, here)
        algorithm: aging (regularised evolution), evolution, or random
        evaluations: number of candidates, repeats included
        terms: any of semantic, relation, channel, correlation, and zero-cost proxies
        combined: add terms as they are (sum), or over the population as ranks or standard scores
        project: for networks of unequal width: pad with empty channels, or compare classes (class_gram)
        seeds: draws of weights and batch to average over
        final_seeds: draws for the order of the shortlist; default: the larger of 9 and --seeds; 0: no reordering
        init: kaiming, gaussian as in the official code, or keep
        draws: students' weights: shared by layers of the same name, or own for every student
        data: patches of photographs, mnist5k, noise, or a folder of images
        batch_size: images per batch; default: 64 for up to 64 pixels, else 16
        num_classes: classes of all networks
        seed: seed of the search
        jobs: processes; -1: one per core
        shortlist: number of students to print
        out: folder that keeps settings, scores and result
    """
    from diswot import spaces
    from diswot.budget import Budget
    from diswot.reports import shortlist_table
    from diswot.scoring import TeacherCache
    from diswot.searching import search as find

    limits = Budget.parse(budget)
    check(shortlist >= 1, "shortlist", shortlist, "at least 1")
    final_seeds = max(9, seeds) if final_seeds is None else final_seeds
    check(not final_seeds or final_seeds >= seeds, "final_seeds", final_seeds, f"0, or at least the {seeds} of seeds")
    if space == "auto":
        space = spaces.kin_of(teacher)
        if space != "s0":
            print(f"space {space}, as the teacher is {teacher}; choose another with --space", file=sys.stderr)
    chosen = spaces.create(space)
    size = chosen.input_size[1]
    if batch_size is None:
        batch_size = 64 if size <= 64 else 16
    batches = _batches(data, max(seeds, final_seeds), batch_size, size, num_classes)
    network = _network(teacher, num_classes)
    cache, final = (
        TeacherCache(network, batches[:count], count, init, key=teacher, draws=draws) if count else None
        for count in (seeds, final_seeds)
    )
    assert cache is not None
    result = find(
        chosen, cache, final=final, finalists=shortlist, budget=limits, algorithm=algorithm, evaluations=evaluations,
        terms=_listed(terms), combined=combined, project=project, num_classes=num_classes, seed=seed, jobs=jobs,
        out=out,
    )  # fmt: skip
    print(shortlist_table(result, shortlist))
    print(f"{len(result.candidates)} students of {len(result.history)} evaluations; best: {result.best.key}")


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Student and loss."""

    student: RecipeDefault[str | None] = None
    """network to train, by name or SPACE:KEY"""
    distiller: RecipeDefault[str | None] = None
    """loss added to KD, see `diswot info`; none: KD alone"""


def facts() -> list[str]:
    """Return the lines of `info` on networks, spaces, scores and losses."""
    from diswot import losses, spaces
    from diswot.ranking import ORDERS

    return [
        "networks: any of timm; ours are s0_713, cifar_resnet56, cifar_wrn_40_2, nb201, nb101, structure_net, ...",
        f"spaces: {', '.join(spaces.SPACES)}",
        f"scores and proxies: {', '.join(ORDERS)}",
        f"distillation losses: {', '.join(losses.names())}",
    ]


PACKAGE = Package(
    name="diswot",
    distribution="diswot",
    summary="DisWOT (CVPR 2023): search a student for a teacher without training either.",
    models=("diswot.networks",),
    openers={"classifier": "visionkernels.tasks.classification:open_classifier"},
    create="diswot.models:create_network",
    sources=("s0", "nasbench201", "nasbench101", "xxbl", "res18", "timm_resnet", "timm_convnext", "timm_vit",
             "timm_efficientnet", "timm_mobilenet"),
    upgrade="diswot.official:upgrade",
    figures="diswot.tables:figures",
    facts="diswot.cli:facts",
    train_options=TrainOptions,
    verbs={"score": score, "search": search, "rank": rank, "proxies": proxies},
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv`, by default the process's arguments; return the exit code."""
    return run_package(PACKAGE, argv)


class _Build:
    """Picklable function that builds a network of a space."""

    def __init__(self, space: Any, key: str, num_classes: int) -> None:
        self.space, self.key, self.num_classes = space, key, num_classes

    def __call__(self) -> Any:
        return self.space.build(self.key, num_classes=self.num_classes)


def _network(name: str, num_classes: int) -> Any:
    import torch

    from diswot.models import create_network

    # parameters that `initialise` does not draw, such as position embeddings, are always the same
    torch.manual_seed(0)
    return create_network(name, num_classes=num_classes)


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _keys(text: str, space: Any) -> list[str]:
    """Return the keys of a list with commas; keys with commas are the shortest texts that the space accepts."""
    parsed: list[str] = []
    key = ""
    for part in map(str.strip, text.split(",")):
        key = f"{key},{part}" if key else part
        try:
            parsed.append(space.parse(key))
        except ValueError:
            continue
        key = ""
    if key:
        space.parse(key)
    return parsed


def _batches(data: str, seeds: int, batch_size: int, size: int, num_classes: int) -> list[Any]:
    from diswot.data import batches

    if seeds < 1:
        raise InputError(f"seeds={seeds} must be at least 1")
    return batches(data, seeds, batch_size, size=size, num_classes=num_classes)


def _within(budget: "Budget", networks: dict[str, _Build], input_size: tuple[int, int, int]) -> list[str]:
    from diswot.budget import cost_of, latency_of

    allowed = [
        key
        for key, build in networks.items()
        if budget.allows(cost_of(build, input_size))
        and (budget.latency_ms is None or latency_of(build(), input_size) <= budget.latency_ms)
    ]
    if not allowed:
        raise InputError(f"budget {budget}: none of {len(networks)} networks is within it")
    return allowed


def _truth(source: str, space: Any) -> dict[str, float]:
    from diswot.data import s0_ground_truth
    from diswot.spaces.benchmarks import read_truth

    if source == "none" or (source == "auto" and space.name != "s0"):
        return {}
    return s0_ground_truth() if source == "auto" else read_truth(source, space)


if __name__ == "__main__":
    sys.exit(main())
