"""The entry point of every command: sub-commands from plain functions, exit codes, errors in one line.

tyro reads the flags, their help and their types from a function's signature and docstring. This module decides what
reaches the user: results on stdout, everything else on stderr, and a traceback only with `--debug`.

Exit codes: 0 done, 1 the work failed, 2 the input or the usage is wrong, 130 interrupted, 141 stdout was closed.
"""

import contextlib
import functools
import inspect
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from visionkernels.checks import InputError, check_known

__all__ = ["Command", "run"]

Command = Callable[..., int | None]

# what the user can mend: a wrong input, files, a missing extra
_USER_ERRORS = (
    InputError,
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

    InputError and errors of files and imports are the user's to mend; every other error is the work's.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    debug = "--debug" in own
    _prepare_streams()
    arguments = [a for a in own if a != "--debug"] + arguments[len(own) :]
    try:
        code = _dispatch(prog, commands, description, version, arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as error:
        return _say(f"{prog}: {str(error) or 'interrupted'}", debug, 130)
    except BrokenPipeError:
        _drop_stdout()
        return 141
    except Exception as error:
        return _answer(prog, _of_stdout(error), debug)


def _answer(prog: str, error: Exception, debug: bool) -> int:
    if isinstance(error, _USER_ERRORS):
        return _say(f"{prog}: error: {_sentence(error)}", debug, 2)
    hint = "" if debug else " (--debug shows the traceback)"
    return _say(f"{prog}: error: {type(error).__name__}: {_sentence(error)}{hint}", debug, 1)


def _of_stdout(error: Exception) -> Exception:
    """Return the error with the name of stdout, where that holds what it cannot write: a stream's errors have none."""
    if isinstance(error, OSError) and error.filename is None:
        try:
            sys.stdout.flush()
        except OSError as full:
            _drop_stdout()
            return OSError(full.errno, full.strerror, "stdout")
    return error


def _drop_stdout() -> None:
    # the interpreter flushes stdout once more at exit and would complain there
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
        raise InputError(f"no command given; choose from: {known} (`{prog} --help` explains them)")
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
    import tyro

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
            raise InputError(_parse_error(err.getvalue())) from None
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


def _sentence(error: Exception) -> str:
    if _FROM_WORKER in str(error):  # the last line is "module.Type: message"
        return str(error).strip().rpartition("\n")[2].partition(": ")[2]
    is_named = isinstance(error, OSError) and error.strerror and error.filename is not None
    text = f"{error.filename}: {error.strerror}" if is_named else str(error)  # type: ignore[attr-defined]
    return "; ".join(filter(None, map(str.strip, text.splitlines()))) or type(error).__name__


def _say(message: str, debug: bool, code: int) -> int:
    with contextlib.suppress(OSError):  # the exit code remains where stderr takes nothing
        if debug:
            traceback.print_exc()
        print(message, file=sys.stderr)
    return code


def _prepare_streams() -> None:
    """Open streams that the caller closed, lest files take their numbers; escape what an encoding lacks, as stderr."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115 - for as long as the process runs
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
