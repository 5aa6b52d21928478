"""The entry point of every command: sub-commands from plain functions, exit codes, errors in one line.

tyro reads the flags, their help and their types from a function's signature and docstring. This module decides what
reaches the user: results on stdout, everything else on stderr, and a traceback only with `--debug`.

Exit codes: 0 done, 1 the work failed, 2 the input or the usage is wrong, 130 interrupted, 141 the pipe's reader left.
"""

import contextlib
import functools
import inspect
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import tyro

from visionkernels.files import refuse_existing, write_json
from visionkernels.recipes import check_known

if TYPE_CHECKING:
    from visionkernels.profiling import BenchRow
    from visionkernels.tables import Figure, Table
    from visionkernels.training import FitOptions

__all__ = ["ReportOptions", "choose_recipe", "find_device", "print_metrics", "report_bench", "report_fit", "run"]

Command = Callable[..., int | None]
Recipe = TypeVar("Recipe")

# what the user can mend: files, a missing extra
_ENVIRONMENT_ERRORS = (
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
    ImportError,
)
# torch's mark of an error from a data worker, whose traceback is the text of the message
_FROM_WORKER = "in DataLoader worker process"


def run(
    prog: str, commands: Mapping[str, Command], *, description: str, version: str, argv: Sequence[str] | None = None
) -> int:
    """Run the sub-command that `argv` (by default the process's own arguments) names, and return the exit code.

    A command is a function with typed, documented arguments: `tyro.conf.Positional[T]` is a positional, everything
    else a flag, the fields of a dataclass argument are flags of their own. It returns None (done) or an exit code.
    `--version`, `--help` and `--debug` (accepted anywhere before `--`) are added here.

    Errors of files and of imports are the user's, and so are a ValueError and a TypeError that the command's package
    or visionkernels raised by a `raise` or defined. From anywhere else those are mistakes of the code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    debug = "--debug" in own
    arguments = [a for a in own if a != "--debug"] + arguments[len(own) :]
    try:
        code = _dispatch(prog, commands, description, version, arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as error:
        return _say(f"{prog}: {str(error) or 'interrupted'}", debug, 130)
    except BrokenPipeError:
        # the interpreter flushes stdout once more at exit and would complain there
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if isinstance(error, _ENVIRONMENT_ERRORS) or _is_check(error, commands.values()):
            return _say(f"{prog}: error: {_sentence(error)}", debug, 2)
        hint = "" if debug else " (--debug shows the traceback)"
        return _say(f"{prog}: error: {type(error).__name__}: {_sentence(error)}{hint}", debug, 1)


# what a metric is called for people, and how it is written
_METRICS = {
    "top1": "top-1 {:.2f} %",
    "top5": "top-5 {:.2f} %",
    "loss": "loss {:.4f}",
    "main_loss": "loss of the main output {:.4f}",
    "val_loss": "loss in evaluation {:.4f}",
    "majority_top1": "always the most frequent class: top-1 {:.2f} %",
    "num_pictures": "{} pictures",
    "miou": "mIoU {:.2f} %",
    "pixel_accuracy": "pixels right {:.2f} %",
    "miou_before": "before fine-tuning: mIoU {:.2f} %",
    "majority_miou": "always the most frequent class: mIoU {:.2f} %",
}


def print_metrics(metrics: Mapping[str, float]) -> None:
    """Print metrics, a line each, in words where they are known; where in training they were taken is left out."""
    for name, value in metrics.items():
        if name not in ("epoch", "update", "lr"):
            print(_METRICS.get(name, name.replace("_", " ") + " {:.4g}").format(value))


def choose_recipe(
    name: str, find: Callable[[str], Recipe], read: Callable[[str], Recipe], fit: "FitOptions | None" = None
) -> Recipe:
    """Return the recipe that `find` has under this name or that `read` finds in a run.json, with the options."""
    chosen: Any = read(name) if name.endswith(".json") else find(name)
    recipe: Recipe = chosen if fit is None else replace(chosen, fit=fit.apply(chosen.fit))
    return recipe


def report_fit(metrics: Mapping[str, float], weights: Path) -> None:
    """Print what a training reached and where its weights are; of several processes only the first does."""
    if os.environ.get("RANK", "0") == "0":
        print_metrics(metrics)
        print(f"weights: {weights}")


def find_device(name: str) -> Any:
    """Return the torch.device of a `--device` flag; "auto" is a GPU if there is one. Raises ValueError for others."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={name!r} cannot be used: {str(error).partition(chr(10))[0]}") from error


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """What is measured, and where it goes."""

    full: bool = False
    """also the cells that take more than minutes"""
    json: Path | None = None
    """write the tables here as well"""
    figures_dir: Path | None = None
    """draw the figures into this folder"""
    overwrite: bool = False
    """replace existing outputs"""

    def measure(self, package: str, tables: "Sequence[Table]", figures: "Sequence[Figure]" = ()) -> int:
        """Measure, print and write as `visionkernels.tables.reproduce` does; returns the exit code."""
        from visionkernels.tables import reproduce

        return reproduce(package, tables, figures, **vars(self))


def report_bench(rows: "Iterable[BenchRow]", *, json: str | Path | None = None, overwrite: bool = False) -> None:
    """Print the rows as they are measured (on stderr), then as a table; write them as a JSON list as well.

    Raises FileExistsError before anything is measured.
    """
    from visionkernels.profiling import bench_table

    refuse_existing(json, overwrite)
    measured = []
    for row in rows:
        print(f"{row.id}: {row.ratio:.2f}", file=sys.stderr)
        measured.append(row)
    print(bench_table(measured))
    if json is not None:
        write_json(json, [asdict(row) for row in measured], overwrite=overwrite)


def _dispatch(prog: str, commands: Mapping[str, Command], description: str, version: str, arguments: list[str]) -> int:
    name = arguments[0] if arguments else None
    if name in ("-h", "--help"):
        print(_overview(prog, commands, description))
        return 0
    if name == "--version":
        print(f"{prog} {version}")
        return 0
    known = ", ".join(commands)
    if name is None:
        raise ValueError(f"no command given; choose from: {known} (`{prog} --help` explains them)")
    check_known("command", name, commands)
    call = _parse(f"{prog} {name}", commands[name], arguments[1:])
    return 0 if call is None else call() or 0


def _overview(prog: str, commands: Mapping[str, Command], description: str) -> str:
    width = max(map(len, commands))
    summaries = {name: (inspect.getdoc(command) or "").partition("\n")[0] for name, command in commands.items()}
    listing = "\n".join(f"  {name:{width}}  {summary}" for name, summary in summaries.items())
    return (
        f"usage: {prog} COMMAND [OPTIONS]\n\n{description}\n\ncommands:\n{listing}\n\n"
        f"`{prog} COMMAND --help` explains a command, `--version` prints the version,\n"
        "`--debug` shows the traceback of an error."
    )


def _parse(prog: str, command: Command, arguments: list[str]) -> Callable[[], int | None] | None:
    """The call that `arguments` describe; None where they asked for help, which is then printed."""

    @functools.wraps(command)
    def bind(*args: Any, **kwargs: Any) -> Callable[[], int | None]:
        return functools.partial(command, *args, **kwargs)

    asks_help = not {"-h", "--help"}.isdisjoint(arguments)
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _wide_lines(not asks_help):
            flags = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)
            call: Callable[[], int | None] = tyro.cli(bind, prog=prog, args=arguments, config=flags)
            return call
    except SystemExit as stop:
        if stop.code:
            raise ValueError(_parse_error(err.getvalue())) from None
    print("\n".join(_without_boxes(out.getvalue())))
    return None


@contextlib.contextmanager
def _wide_lines(active: bool) -> Iterator[None]:
    """Keep tyro from breaking a message, perhaps inside a path, at the width of the terminal."""
    before = os.environ.get("COLUMNS")
    if active:
        os.environ["COLUMNS"] = "10000"
    try:
        yield
    finally:
        if active:
            os.environ.pop("COLUMNS")
            if before is not None:
                os.environ["COLUMNS"] = before


def _without_boxes(text: str) -> list[str]:
    """The lines of tyro's output without the boxes and rulers that it draws around its groups."""
    lines = [re.sub("[╭╮╰╯│─]", "", line).rstrip() for line in text.splitlines()]
    return [line for line in lines if not line or line.strip(" -")]


def _parse_error(text: str) -> str:
    """tyro's report in one line, without its title and the help that it appends."""
    _title, *lines = [line.strip() for line in _without_boxes(text) if line]
    end = next((i for i, line in enumerate(lines) if line.startswith(("For full helptext", "Argument helptext"))), None)
    return " ".join(lines[:end])


def _is_check(error: Exception, commands: Collection[Command]) -> bool:
    """Whether a `raise` of our own packages raised this ValueError or TypeError, or its class is one of theirs."""
    if not isinstance(error, ValueError | TypeError):
        return False
    packages = {"visionkernels", *(command.__module__.partition(".")[0] for command in commands)}
    if type(error).__module__.partition(".")[0] in packages:
        return True
    text = str(error) if _FROM_WORKER in str(error) else "".join(traceback.format_exception(error))
    frames = re.findall(r'^  File "(.+)", line \d+, in .+\n +(.*)', text, flags=re.MULTILINE)
    file, statement = frames[-1] if frames else ("", "")
    folders = [Path(__file__).parent, *map(_package_folder, commands)]
    return statement.startswith("raise ") and any(folder in Path(file).parents for folder in folders)


def _package_folder(command: Command) -> Path:
    """The folder of the outermost package that the command is in, or of its script."""
    return Path(inspect.getfile(command)).parents[max(command.__module__.count(".") - 1, 0)]


def _sentence(error: Exception) -> str:
    if _FROM_WORKER in str(error):  # the last line is "module.Type: message"
        return str(error).strip().rpartition("\n")[2].partition(": ")[2]
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return "; ".join(filter(None, map(str.strip, str(error).splitlines()))) or type(error).__name__


def _say(message: str, debug: bool, code: int) -> int:
    if debug:
        traceback.print_exc()
    print(message, file=sys.stderr)
    return code
