"""The Python blocks of every README and page run and print what they claim, and their commands can be trusted."""

import re
from pathlib import Path

import pytest
from pytest_examples import CodeExample, EvalExample, find_examples

ROOT = Path(__file__).parents[1]
PAGES = [
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/*.md"),
    *ROOT.glob("shared/*.md"),
    *ROOT.glob("shared/src/**/*.md"),
    *ROOT.glob("packages/*/*.md"),
]
# projects of other people on PyPI
FOREIGN = {"g2sd", "tinc", "lana", "bit"}


@pytest.mark.parametrize("example", [*find_examples(*PAGES)], ids=str)
def test_python(
    example: CodeExample, eval_example: EvalExample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    eval_example.set_config(line_length=120)
    eval_example.run_print_check(example)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pip_install_names_our_distributions(page: Path) -> None:
    named = re.findall(r"pip install (?:-\S+ )*['\"]?([a-z0-9]+)(?=['\"\s\[`]|$)", page.read_text())
    assert FOREIGN.isdisjoint(named)


def test_the_two_commands() -> None:
    setup = "python3 -m venv .venv && .venv/bin/pip install -q hatch && .venv/bin/hatch run"
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("python3 -m venv")]
    # .ci/run takes them from there
    assert lines == [f"{setup} reproduce", f"{setup} test"]


def test_local_links() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page} links to {target}"
