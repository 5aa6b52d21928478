"""The verbs that read alike in every package: train, eval, export, info, reproduce, bench, from its record."""

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from visionkernels.checks import InputError
from visionkernels.cli.options import FitOptions, RecipeDefault, ReportOptions
from visionkernels.cli.printing import find_device, print_metrics, report_bench, report_fit, write_result
from visionkernels.cli.running import Command, run
from visionkernels.files import refuse_existing
from visionkernels.package import Package

__all__ = ["run_package", "shared_verbs"]

Size = tuple[int, int]


def run_package(package: Package, argv: Sequence[str] | None = None) -> int:
    """Run the command of `package` with `argv`, by default the process's arguments; return the exit code."""
    shared = shared_verbs(package)
    own = {name: verb for name, verb in package.verbs.items() if name not in shared}
    shared |= {name: verb for name, verb in package.verbs.items() if name in shared}
    last = {name: shared.pop(name) for name in ("info", "reproduce", "bench")}
    commands = {**shared, **own, **last}
    return run(package.name, commands, description=package.summary, version=package.version, argv=argv)


def shared_verbs(package: Package) -> dict[str, Command]:
    """Return the shared verbs of a package by name; one without recipes has neither train nor eval nor export."""
    trained = {"train": _train, "eval": _evaluate, "export": _export} if package.recipes is not None else {}
    makers: dict[str, Callable[[Package], Command]] = {
        **trained, "info": _info, "reproduce": _reproduce, "bench": _bench
    }  # fmt: skip
    return {name: make(package) for name, make in makers.items()}


def _train(package: Package) -> Command:
    def train(
        recipe: Positional[str],
        *,
        out: Path,
        data: RecipeDefault[str | None] = None,
        init: RecipeDefault[Path | None] = None,
        teacher: RecipeDefault[str | None] = None,
        teacher_checkpoint: RecipeDefault[Path | None] = None,
        further: Any,
        fit: FitOptions = FitOptions(),
    ) -> None:
        from visionkernels.recipes import choose
        from visionkernels.training import train_by_recipe

        chosen = choose(recipe, package.resolve(package.recipes or ""), listing=f"`{package.name} info` lists them")
        chosen = replace(chosen, fit=fit.apply(chosen.fit))
        given = {"init": init, "teacher": teacher, "teacher_checkpoint": teacher_checkpoint, **_given(further)}
        result = train_by_recipe(chosen, data, out, **given)
        note = None if package.verdict is None else package.resolve(package.verdict)(result.metrics)
        report_fit(result.metrics, result.weights, note)

    return _described(
        train, package.train_options, "Train by a recipe; rerun the same command to resume.",
        recipe=f"name (see `{package.name} info`), or a run.json",
        out="folder of the run and its weights",
        data="folder of images, wds/FOLDER or hfds/NAME",
        init="weights to start from",
        teacher="weights file, or a model by name such as timm:NAME",
        teacher_checkpoint="weights of a teacher by name",
    )  # fmt: skip


def _evaluate(package: Package) -> Command:
    def evaluate(
        *,
        checkpoint: Path,
        data: str | None = None,
        model: str | None = None,
        num_classes: int | None = None,
        batch_size: int = 64,
        workers: int = 0,
        device: str = "auto",
        json: Path | None = None,
        overwrite: bool = False,
    ) -> None:
        from visionkernels.checks import check_loading
        from visionkernels.weights import open_trained

        refuse_existing(json, overwrite)
        check_loading(workers, batch_size)
        opened = open_trained(checkpoint, package=package, model=model, num_classes=num_classes)
        measure = package.resolve(package.evaluate)
        metrics = measure(opened, data, device=find_device(device), workers=workers, batch_size=batch_size)
        write_result(json, {"checkpoint": str(checkpoint), "data": data, **metrics}, overwrite=overwrite)
        print_metrics(metrics)

    return _described(
        evaluate, None, "Measure trained weights on validation data.",
        checkpoint=f"weights of `{package.name} train` or of another package, official ones, or a bare state dict",
        data="as for `train`; default: the data that the weights were trained on",
        **_NAMING,
        batch_size="images that a classifier computes together",
        workers="data loading processes",
        device="auto, cpu, cuda, ...",
        **_writing("the result"),
    )  # fmt: skip


def _export(package: Package) -> Command:
    def export(
        *,
        out: Path,
        checkpoint: Path | None = None,
        model: str | None = None,
        num_classes: int | None = None,
        format: Literal["onnx", "pt2"] | None = None,
        size: Size | None = None,
        further: Any,
        overwrite: bool = False,
    ) -> None:
        from visionkernels.weights import open_trained

        refuse_existing(out, overwrite)
        if checkpoint is not None:
            opened = open_trained(checkpoint, package=package, model=model, num_classes=num_classes)
        else:
            opened = _untrained(package, model, num_classes)
        write = package.resolve(package.export)
        install = f"{package.distribution}[export]"
        shapes = write(opened, out, format=format, size=size, install=install, overwrite=overwrite, **_given(further))
        print(f"{out}: {shapes}, {out.stat().st_size / 1e6:.1f} MB")

    return _described(
        export, package.export_options, "Write a model for other runtimes: ONNX, or a program of torch.export.",
        out="the .onnx or .pt2 to write",
        checkpoint="its weights, as for `eval`; without them, --model is exported with random weights",
        **_NAMING,
        format="default: the suffix of the file",
        size="height and width of the image in pixels; default: the model's own",
        overwrite="replace an existing output",
    )  # fmt: skip


def _untrained(package: Package, model: str | None, num_classes: int | None) -> Any:
    from visionkernels.tasks.classification import untrained

    if model is None:
        raise InputError("--checkpoint is missing; give weights, or --model NAME for random ones")
    print(f"{model} has random weights: no --checkpoint was given", file=sys.stderr)
    package.register_models()
    return untrained(model, num_classes, package=package.name)


def _info(package: Package) -> Command:
    def info() -> None:
        print(f"{package.distribution} {package.version}")
        if package.facts is not None:
            print("\n".join(package.resolve(package.facts)()))
        if package.recipes is not None:
            recipes = package.resolve(package.recipes).values()
            is_short = len(recipes) <= 50
            print(f"recipes for `{package.name} train`{'' if is_short else ' with built-in data'}:")
            for recipe in recipes:
                if is_short or recipe.data is not None:
                    print(f"  {recipe.name}: {recipe.summary}")

    return _described(info, None, "Print the version, the models and the recipes.")


def _reproduce(package: Package) -> Command:
    def reproduce(*, report: ReportOptions = ReportOptions()) -> int:
        from visionkernels.tables import reproduce as measure

        figures = () if package.figures is None else package.resolve(package.figures)()
        return measure(package.distribution, package.resolve(package.tables)(), figures, **vars(report))

    return _described(
        reproduce, None, "Measure the paper's tables: what this machine can, and for the rest what it would take."
    )


def _bench(package: Package) -> Command:
    def bench(*, full: bool = False, json: Path | None = None, overwrite: bool = False) -> None:
        report_bench(package.resolve(package.bench)(full=full), json=json, overwrite=overwrite)

    return _described(
        bench, None, "Time the package beside the official algorithm and the strongest alternatives.",
        full="also with two threads, larger shapes, and more repeats",
        **_writing("the rows"),
    )  # fmt: skip


_NAMING = {
    "model": "model of weights that do not name it: timm's NAME, torchvision:NAME, module:callable, or a recipe",
    "num_classes": "outputs of that model; default: those of the weights",
}


def _writing(what: str) -> dict[str, str]:
    return {"json": f"write {what} here as well", "overwrite": "replace an existing output"}


def _described(verb: Callable[..., Any], options: type | None, summary: str, **flags: str) -> Command:
    """Give a verb its help, and flags of `options` as its parameter `further`."""
    # tyro reads the flags and their help from the signature and the docstring
    verb.__doc__ = "\n".join([summary, "", "Args:", *(f"    {name}: {text}" for name, text in flags.items())])
    verb.__doc__ = verb.__doc__ if flags else summary
    signature = inspect.signature(verb)
    parameters = dict(signature.parameters)
    if "further" in parameters:
        if options is None:
            del parameters["further"]
            del verb.__annotations__["further"]
            verb.__kwdefaults__ = {**(verb.__kwdefaults__ or {}), "further": None}
        else:
            default = options()
            parameters["further"] = parameters["further"].replace(annotation=options, default=default)
            verb.__annotations__["further"] = options
    verb.__signature__ = signature.replace(parameters=list(parameters.values()))  # type: ignore[attr-defined]
    return verb


def _given(further: Any) -> dict[str, Any]:
    """Return the options that differ from their defaults."""
    if further is None:
        return {}
    default = type(further)()
    return {name: value for name, value in vars(further).items() if value != getattr(default, name)}
